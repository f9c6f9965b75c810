"Hidden test sets and scores: counted by hand, and found again only where nothing changed"
import numpy as np
import pandas as pd
import pytest
from torch import nn

from helpers_curation import Brightness, nets, pool, probabilities
from robustnb.curation import hidden as H
from robustnb.curation.training_sets import TrainingSet


def counts_table(right):
    "Two sets, two networks, two seeds, ten images in each of two families and slices"
    rows = [dict(set=s, model=m, seed=k, family=f, slice=c, n=10, correct=right(s, m, k, f, c))
            for s in 'ab' for m in 'uv' for k in (0, 1) for f in ('clean', 'noise')
            for c in ('public_a', 'final')]
    return pd.DataFrame(rows)


def test_ranking_by_hand():
    def right(s, m, k, f, c):
        return (8 if s == 'b' else 4) + (c == 'final')*2 + (m == 'u')*k - (f == 'noise')
    table = H.rank_training_sets(counts_table(right), 'public_a')
    assert table.index.tolist() == ['b', 'a']
    assert np.isclose(table.score['b'], np.mean([.75, .85, .75, .75]))
    assert np.isclose(table.se['b'], np.std([.75, .8], ddof=1)/2**.5)
    assert table.worst_family['a'] == 'noise'
    assert np.isclose(table.clean['b'], .825)
    assert np.isclose(table.worst['a'], .325)
    assert np.isclose(table.noise['b'], .725)


def test_only_the_slices_named_count():
    rows = counts_table(lambda s, m, k, f, c: 5 + (c == 'final'))
    assert H.rank_training_sets(rows, ('final',)).score.eq(.6).all()


@pytest.fixture
def unequal():
    "Set a is good at noise, b at clean images, of which there are three times as many"
    rows = counts_table(
        lambda s, m, k, f, c: (8 if (f == 'noise') == (s == 'a') else 3) + (m == 'u') + k)
    rows.loc[rows.family == 'clean', ['n', 'correct']] *= 3
    return rows


def test_other_weights_change_the_ranking(unequal):
    assert H.rank_training_sets(unequal, 'public_a').index[0] == 'b'
    table = H.rank_training_sets(unequal, 'public_a', dict(noise=3, clean=1))
    by_seed = [np.mean([(3*(8+u+k) + 3+u+k)/40 for u in (1, 0)]) for k in (0, 1)]
    assert table.index[0] == 'a'
    assert np.isclose(table.score['a'], np.mean(by_seed))
    assert np.isclose(table.se['a'], np.std(by_seed, ddof=1)/2**.5)


def test_one_weighted_family_is_its_column(unequal):
    noise = H.rank_training_sets(unequal, 'public_a').noise
    only = H.rank_training_sets(unequal, 'public_a', dict(noise=7))
    assert np.allclose(only.score, noise.loc[['a', 'b']])


@pytest.mark.parametrize('bad', (dict(fog=1), dict(noise=0), dict(noise=-1, clean=2),
                                 dict(noise=float('nan')), {}))
def test_weights_that_mean_nothing(bad, unequal):
    with pytest.raises(ValueError, match='`weights`'):
        H.rank_training_sets(unequal, 'public_a', bad)


@pytest.mark.parametrize('bad', (dict(sets={}), dict(networks={}), dict(seeds=())))
def test_a_comparison_needs_one_of_each(bad):
    arguments = dict(sets=dict(a=None), hidden=None, networks=dict(a=None), config={}, seeds=(0,))
    with pytest.raises(ValueError, match='must each hold at least one'):
        H.score_training_sets(**arguments | bad)


@pytest.mark.parametrize('bad', (dict(width=0.), dict(width=5.), dict(epochs=0), dict(epochs=201)))
def test_proxies_inside_the_rules(bad):
    with pytest.raises(ValueError, match='`width` must be in'):
        H.proxy_networks(**bad)


def test_correct_answers_are_counted_by_family_and_slice():
    rows = pd.DataFrame(dict(family=np.where(np.arange(90) < 30, 'dark', 'rest'),
                             slice=np.array(['public_a', 'final'])[np.arange(90) % 2], image=0))
    table = H.count_correct(nets[0], TrainingSet(pool.images, pool.labels, 3, rows))
    right = probabilities(pool.images).argmax(1) == pool.y
    assert len(table) == 4
    for row in table.itertuples():
        at = (rows.family == row.family) & (rows.slice == row.slice)
        assert row.n == at.sum()
        assert row.correct == right[at].sum()


def test_a_run_is_found_again_only_if_nothing_changed(tmp_path, monkeypatch):
    trained = []
    def fake(model, images, labels, config, seed, checkpoint, device=None):
        trained.append(seed)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text('')
        return nets[0], None
    monkeypatch.setattr(H, 'contest_train', fake)
    rows = pd.DataFrame(dict(family='clean', slice='final', image=0), index=range(90))
    hidden = TrainingSet(pool.images, pool.labels, 3, rows)
    dark = TrainingSet(pool.images//2, pool.labels, 3, rows)
    other_slice = TrainingSet(pool.images, pool.labels, 3, rows.assign(slice='public_a'))

    def runs(data=pool, hidden=hidden, epochs=1, seeds=(0, 1), build=lambda seed: Brightness()):
        "How many trainings there have been after this comparison"
        H.score_training_sets(dict(s=data), hidden, dict(net=build), dict(net=dict(epochs=epochs)),
                              seeds, tmp_path)
        return len(trained)

    assert runs() == 2
    assert trained == [0, 1]
    assert runs() == 2
    assert runs(seeds=(0, 1, 2)) == 3
    assert runs(data=pool[:60]) == 5
    assert runs(epochs=2) == 7
    assert runs(hidden=hidden[:50]) == 9
    assert runs(build=lambda seed: nn.Sequential(Brightness())) == 11
    assert runs() == 11
    assert runs(hidden=dark) == 13
    assert runs(hidden=other_slice) == 15
    assert not [*tmp_path.glob('*/checkpoint.pt')]
