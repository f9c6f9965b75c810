"Hidden test sets and scores: counted by hand, and found again only where nothing changed"
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import nn

from helpers_curation import Brightness, nets, pool, probabilities
from robustnb.attacks.gradient import dlr
from robustnb.attacks.threat_models import L2, Linf
from robustnb.curation import hidden as H
from robustnb.curation.training_sets import concatenate_sets, TrainingSet


def counts_table(right):
    "Two sets, two networks, two seeds, ten images in each of two families and slices"
    rows = [dict(set=s, model=m, seed=k, family=f, slice=c, n=10, correct=right(s, m, k, f, c))
            for s in 'ab' for m in 'uv' for k in (0, 1) for f in ('clean', 'noise')
            for c in ('public_a', 'final')]
    return pd.DataFrame(rows)


def test_families_attack_the_networks_in_turn_under_every_budget():
    made = H.families(dict(A=nets[0], B=nets[1]), .5)
    attacks = dict(
        linf=[('fgsm', {}), ('pgd', dict(steps=10)), ('pgd', dict(steps=20)), *((f'{o}_fgsm', dict(steps=5))
              for o in ('mi', 'di', 'ti', 'vmi')), ('apgd', dict(steps=25, loss=dlr))],
        l2=[('fgsm', {}), ('pgd', dict(steps=20)), ('carlini_wagner', dict(steps=25)),
            ('deepfool', dict(overshoot=.1))])
    budgets = dict(linf=[Linf(e/255) for e in (2, 4, 8, 12, 16)], l2=[L2(e) for e in (.25, .5, 1., 1.5, 2.5)])
    for family, budget in budgets.items():
        wanted = [(*attack, repr(t)) for t in budget for attack in attacks[family]]
        said = [o.said for o in made[family]]
        named = lambda o: (getattr(o, 'func', o).__name__, getattr(o, 'keywords', {}))
        assert [(*named(o[1]), o[3]) for o in said] == wanted
        assert [o.surrogate for o in made[family]] == (['A', 'B']*len(wanted))[:len(wanted)]


@pytest.mark.parametrize('n, sizes', [(40, [20, 10, 10]), (20, [10, 5, 5])])
def test_half_of_the_hidden_images_wait_for_the_end(n, sizes):
    made = H.hidden_set(pool, dict(A=nets[0]), n, proportions=dict(clean=1.))
    counts = made.rows['slice'].value_counts()
    assert counts[['final', 'public_a', 'public_b']].tolist() == sizes


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


def kinds_table(right):
    "As `counts_table`, with a seen family of two sizes, two unseen families and clean images"
    sides = dict(clean='clean', noise='seen', fog='unseen', blocks='unseen')
    rows = [dict(set=s, model=m, seed=k, family=f, kind=sides[f], slice='final', n=n,
                 correct=n*right(s, m, k, f))
            for s in 'ab' for m in 'uv' for k in (0, 1, 2) for f in sides
            for n in ((10, 30) if f == 'noise' else (10,))]
    return pd.DataFrame(rows)


def by_kind(s, m, k, f):
    known = dict(clean=.9, noise=.6, fog=.4, blocks=.2)[f]
    return known + (s == 'b')*(.1 + .05*k)*(f != 'clean') - (s == 'b')*.2*(f == 'noise')*(m == 'u')


def test_ranking_of_seen_and_unseen_by_hand():
    table = H.rank_training_sets(kinds_table(by_kind), 'final')
    assert table.index.tolist() == ['b', 'a']
    assert np.isclose(table.seen['a'], .6)
    assert np.isclose(table.unseen['a'], .3)
    assert np.isclose(table.score['a'], .45)
    assert np.isclose(table.se['a'], 0)
    seeds = [((.6 + .1 + .05*k - .1) + (.3 + .1 + .05*k))/2 for k in (0, 1, 2)]
    assert np.isclose(table.score['b'], np.mean(seeds))
    assert np.isclose(table.se['b'], np.std(seeds, ddof=1)/3**.5)
    assert np.isclose(table.clean['b'], .9)
    assert table.worst_family['b'] == 'blocks'
    assert np.isclose(table.blocks['b'], .35)
    weighed = H.rank_training_sets(kinds_table(by_kind), 'final', dict(fog=1))
    assert np.allclose(weighed.score, weighed.fog)


def test_a_clean_family_is_never_the_worst_of_kinds():
    table = H.rank_training_sets(kinds_table(lambda s, m, k, f: .1 if f == 'clean' else .5), 'final')
    assert (table.worst == .5).all()


def test_difference_of_two_sets_by_hand():
    rows = kinds_table(by_kind)
    gain = H.compare_sets(rows, 'b', 'a', 'final')
    each = np.array([[.1 + .05*k - (.1 if m == 'u' else 0) for k in (0, 1, 2)] for m in 'uv']).ravel()
    assert (gain.runs == 6).all()
    assert np.isclose(gain.difference.score, each.mean())
    # Student's t with 5 degrees of freedom
    assert np.isclose(gain.high.score - gain.difference.score, 2.570582*each.std(ddof=1)/6**.5, atol=1e-6)
    assert np.isclose(gain.difference.score - gain.low.score, gain.high.score - gain.difference.score)
    assert np.allclose(gain.loc['clean', ['difference', 'low', 'high']].astype(float), 0)
    assert np.isclose(gain.difference.unseen, .15)
    assert np.isclose(gain.difference.worst, .15)
    assert gain.index.tolist() == ['seen', 'unseen', 'score', 'clean', 'worst']


def test_pairs_are_runs_of_the_same_network_and_seed():
    "Differences between networks and seeds cancel, in whatever order the rows come"
    rows = kinds_table(lambda s, m, k, f: .1*k + .3*(m == 'u') + (.05 if s == 'b' else 0))
    gain = H.compare_sets(rows.sample(frac=1, random_state=0), 'b', 'a', 'final')
    assert np.allclose(gain.loc[:, ['difference', 'low', 'high']], .05)
    fewer = rows[~((rows.set == 'a') & (rows.seed == 2))]
    assert (H.compare_sets(fewer, 'b', 'a', 'final').runs == 4).all()


@pytest.mark.parametrize('lost, said', (
    (dict(set='b', model='v', seed=1), 'networks and seeds for every set; it lacks .b with v and seed 1'),
    (dict(set='a', seed=0), "it lacks 'a with u and seed 0', 'a with v and seed 0'. Train"),
    (dict(set='b', family='noise'), 'of noise public_a, a with u and seed 0 has 10, b with u and .* has 0'),
    (dict(set='b', family='clean', seed=0), 'of clean public_a, a with u and seed 0 has 10')))
def test_sets_are_ranked_over_the_same_runs_and_images(lost, said):
    rows = counts_table(lambda s, m, k, f, c: 5)
    kept = rows[~rows[[*lost]].eq(lost).all(axis=1)]
    with pytest.raises(ValueError, match=said):
        H.rank_training_sets(kept, 'public_a')
    if 'family' in lost:
        with pytest.raises(ValueError, match=said):
            H.compare_sets(kept, 'a', 'b', 'public_a')


def test_every_image_is_counted_and_none_without_a_family():
    part = lambda **k: TrainingSet(pool.images[:20], pool.labels[:20], 3,
                                   pd.DataFrame(dict(slice='final', image=range(20)) | k))
    known = [part(family='fog', severity=1), part(family='clean')]
    table = H.count_correct(nets[0], concatenate_sets(known))
    assert table.n.tolist() == [20, 20]
    assert table.family.tolist() == ['clean', 'fog']
    table = table.assign(set='a', model='u', seed=0)
    assert len(H.rank_training_sets(table, 'final')) == 1
    for other in (part(family=None), part(), part(family='fog', kind='seen'), part(family='')):
        odd = concatenate_sets([*known, other])
        arguments = dict(sets=dict(a=pool), networks=dict(net=lambda seed: 1/0), config=dict(net={}))
        for count in (lambda: H.count_correct(nets[0], odd),
                      lambda: H.score_training_sets(hidden=odd, **arguments)):
            with pytest.raises(ValueError, match='`hidden.rows` must have a `(family|kind)` in every row'):
                count()
    with pytest.raises(ValueError, match='`rows` must have a `family` in every row.*; 1 of 2'):
        H.rank_training_sets(table.assign(family=['fog', None]), 'final')


def test_a_missing_severity_stays_missing_in_files(tmp_path):
    rows = pd.DataFrame(dict(slice='final', image=range(20), family='fog', severity=[1, np.nan]*10))
    TrainingSet(pool.images[:20], pool.labels[:20], 3, rows).save(tmp_path)
    assert H.load_hidden(tmp_path).rows.severity.equals(rows.severity)


@pytest.mark.parametrize('name', ('../out', '/tmp/out', 'a/b', '..'))
def test_runs_stay_in_their_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(H, 'contest_train', lambda *a, **k: (nets[0], None))
    rows = pd.DataFrame(dict(family='clean', slice='final', image=0), index=range(90))
    hidden = TrainingSet(pool.images, pool.labels, 3, rows)
    H.score_training_sets({name: pool}, hidden, {name: lambda seed: Brightness()}, {name: {}}, (0,),
                          tmp_path/'runs')
    assert len([*tmp_path.glob('runs/*/answers.csv')]) == len([*tmp_path.rglob('answers.csv')]) == 1


def test_without_kinds_every_image_counts_alike():
    gain = H.compare_sets(counts_table(lambda s, m, k, f, c: 4 + (s == 'b')*(f == 'noise')), 'b', 'a')
    assert gain.index.tolist() == ['score', 'clean', 'worst']
    assert np.isclose(gain.difference.score, .05)


@pytest.mark.parametrize('given, said', (
    (dict(a='c'), '`a` and `b` must be sets'), (dict(b='c'), '`a` and `b`'),
    (dict(slices='public_a'), '`slices`')))
def test_comparisons_that_cannot_be_made(given, said):
    with pytest.raises(ValueError, match=said):
        H.compare_sets(kinds_table(by_kind), **dict(a='a', b='b', slices='final') | given)
    one = kinds_table(by_kind)
    with pytest.raises(ValueError, match='`rows` must hold at least two runs'):
        H.compare_sets(one[(one.seed == 0) & (one.model == 'u')], 'a', 'b', 'final')


def test_answers_are_counted_by_kind_and_severity():
    rows = pd.DataFrame(dict(family='fog', kind='seen', slice='final', image=0,
                             severity=np.arange(90) % 5 + 1))
    hidden = TrainingSet(pool.images, pool.labels, 3, rows)
    table = H.count_correct(nets[0], hidden)
    assert table.severity.tolist() == [1, 2, 3, 4, 5]
    assert (table.n == 18).all()
    assert table.correct.sum() == (probabilities(pool.images).argmax(1) == pool.y).sum()
    unlike = TrainingSet(pool.images, pool.labels, 3, rows.assign(kind='unseen'))
    keys = [H._key(pool, o, {}, nets[0]) for o in (hidden, unlike)]
    assert keys[0] != keys[1]


def corrupted_folder(folder, each=10, names=('fog', 'snow')):
    "Files in the form of CIFAR-10-C: image `i` of severity `s` of the k-th corruption is `20*s + 100*k + i`"
    labels = np.arange(each) % 3
    for k, name in enumerate(names):
        value = np.concatenate([20*s + 100*k + np.arange(each) for s in range(1, 6)]).astype(np.uint8)
        np.save(folder/f'{name}.npy', np.broadcast_to(value[:, None, None, None], (5*each, 8, 8, 3)))
    np.save(folder/'labels.npy', np.tile(labels, 5).astype(np.uint8))


def test_corruptions_in_files_of_severities(tmp_path):
    corrupted_folder(tmp_path)
    whole = H.load_hidden(tmp_path)
    assert len(whole) == 100
    assert set(whole.rows['slice']) == {'final'}
    for i, row in enumerate(whole.rows.itertuples()):
        k = ('fog', 'snow').index(row.family)
        assert (whole.images[i] == 20*row.severity + 100*k + row.image).all()
        assert whole.y[i] == row.image % 3
    assert whole.rows.groupby(['family', 'severity']).size().eq(10).all()
    few = H.load_hidden(tmp_path, each=4, classes=('cat', 'dog', 'fox'))
    assert few.classes == ('cat', 'dog', 'fox')
    assert few.rows.groupby(['family', 'severity']).size().eq(4).all()
    assert few.rows.image.max() == 3
    # answers by severity, from the brightness in the corner
    table = H.count_correct(nets[0], whole).set_index(['family', 'severity'])
    assert table.correct['fog', 1] == 4, 'all are dark'
    assert table.n.sum() == 100


def test_only_what_is_asked_for_is_read(tmp_path):
    corrupted_folder(tmp_path, each=2000)
    size = sum(o.stat().st_size for o in tmp_path.iterdir())
    whole = H.load_hidden(tmp_path, severities=(2, 5))
    tracemalloc.start()
    few = H.load_hidden(tmp_path, each=20, severities=(2, 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 3.8e6
    assert peak < size/20
    assert few.rows.groupby(['family', 'severity']).size().to_dict() == {
        (f, s): 20 for f in ('fog', 'snow') for s in (2, 5)}
    same = whole[(whole.rows.image < 20).to_numpy()]
    assert (few.images == same.images).all()
    assert (few.labels == same.labels).all()
    assert few.rows.equals(same.rows)
    few.images[:] = 0
    assert H.load_hidden(tmp_path, each=20).images.any(), 'files stay as they are'


def test_corruptions_in_files_that_do_not_fit(tmp_path):
    corrupted_folder(tmp_path)
    np.save(tmp_path/'rain.npy', np.zeros((40, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match='`path` must hold an image in rain.npy for each of the 50 labels'):
        H.load_hidden(tmp_path)
    np.save(tmp_path/'rain.npy', np.zeros((50, 9, 8, 3), np.uint8))
    with pytest.raises(ValueError, match='images of one size; rain.npy'):
        H.load_hidden(tmp_path)
    np.save(tmp_path/'rain.npy', np.zeros((50, 8, 8, 3)))
    with pytest.raises(ValueError, match='rain.npy .* uint8 .* got float64'):
        H.load_hidden(tmp_path)
    whole = (tmp_path/'fog.npy').read_bytes()
    for end in (len(whole)-1, len(whole)//2, 40, 0):
        (tmp_path/'rain.npy').write_bytes(whole[:end])
        with pytest.raises(ValueError, match='rain.npy is cut off.*Copy it again'):
            H.load_hidden(tmp_path)
    (tmp_path/'rain.npy').write_bytes(b'no array')
    with pytest.raises(ValueError, match='`path` must hold plain numpy arrays; .*rain.npy is'):
        H.load_hidden(tmp_path)
    (tmp_path/'rain.npy').unlink()
    np.save(tmp_path/'labels.npy', np.arange(50) % 3)
    with pytest.raises(ValueError, match='the same class numbers five times'):
        H.load_hidden(tmp_path)
    np.save(tmp_path/'labels.npy', np.tile(np.arange(10) % 3, 5))
    with pytest.raises(ValueError, match='`each` must be a whole number, at least 1'):
        H.load_hidden(tmp_path, each=0)
    with pytest.raises(ValueError, match='`classes` must name every class of labels.npy, .* up to 2; got 2'):
        H.load_hidden(tmp_path, classes=2)
    for severities in ((), (0, 1), (6,)):
        with pytest.raises(ValueError, match='`severities` must be some of 1 to 5'):
            H.load_hidden(tmp_path, severities=severities)
    (tmp_path/'labels.npy').rename(tmp_path/'label')
    with pytest.raises(FileNotFoundError, match='`path` must hold labels.npy'):
        H.load_hidden(tmp_path)
    (tmp_path/'label').rename(tmp_path/'labels.npy')
    for name in ('fog', 'snow'):
        (tmp_path/f'{name}.npy').unlink()
    with pytest.raises(ValueError, match='has labels.npy alone'):
        H.load_hidden(tmp_path)


def picture_folder(folder, tops):
    "One picture of each of two classes, as bright as its place says"
    for i, top in enumerate(tops):
        for k, name in enumerate(('cat', 'dog')):
            (folder/top/name).mkdir(parents=True)
            Image.new('RGB', (8, 8), (10*i + k,)*3).save(folder/top/name/'a.png')


def test_class_folders_are_one_family_and_folders_of_them_several(tmp_path):
    picture_folder(tmp_path/'one', [''])
    one = H.load_hidden(tmp_path/'one')
    assert one.rows.family.tolist() == ['own', 'own']
    assert one.images[:, 0, 0, 0].tolist() == [0, 1]
    picture_folder(tmp_path/'many', ['fog', 'snow'])
    many = H.load_hidden(tmp_path/'many', size=4)
    assert many.rows.family.tolist() == ['fog', 'fog', 'snow', 'snow']
    assert many.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert many.images.shape[1:] == (4, 4, 3)
    assert H.load_hidden(tmp_path/'many', split='snow').images[:, 0, 0, 0].tolist() == [10, 11]
    picture_folder(tmp_path/'split', ['test', 'train'])
    with pytest.raises(ValueError, match='`split` must be named'):
        H.load_hidden(tmp_path/'split')
    assert len(H.load_hidden(tmp_path/'split', split='test')) == 2
    with pytest.raises(FileNotFoundError, match='`path` .* nothing there'):
        H.load_hidden(tmp_path/'none')


def test_npy_pairs_and_sets_with_a_table(tmp_path):
    pool.save(tmp_path/'pair')
    pair = H.load_hidden(tmp_path/'pair')
    assert (pair.images == pool.images).all()
    assert set(pair.rows.family) == {'own'}
    (tmp_path/'pair'/'classes.json').unlink()
    assert H.load_hidden(tmp_path/'pair', classes=('a', 'b', 'c')).classes == ('a', 'b', 'c')
    rows = pd.DataFrame(dict(family='fog', kind='unseen', slice='public_a', image=np.arange(90)))
    TrainingSet(pool.images, pool.labels, 3, rows).save(tmp_path/'set')
    assert H.load_hidden(tmp_path/'set').rows.equals(rows)
    rows = rows.rename(columns=dict(family='source')).drop(columns='slice')
    TrainingSet(pool.images, pool.labels, 3, rows).save(tmp_path/'built')
    built = H.load_hidden(tmp_path/'built').rows
    assert set(built.family) == {'fog'}
    assert set(built['slice']) == {'final'}
    TrainingSet(pool.images, pool.labels, 3, rows.drop(columns='source')).save(tmp_path/'bare')
    with pytest.raises(ValueError, match='`path` must hold a provenance.csv with a column'):
        H.load_hidden(tmp_path/'bare')


def test_answers_do_not_depend_on_how_many_are_asked_at_a_time(monkeypatch):
    rows = pd.DataFrame(dict(family='fog', slice='final', image=np.arange(90)))
    hidden = TrainingSet(pool.images, pool.labels, 3, rows)
    whole = H.count_correct(nets[0], hidden)
    monkeypatch.setattr(H, 'batches', lambda n, size: [slice(i, i+7) for i in range(0, n, 7)])
    assert H.count_correct(nets[0], hidden).equals(whole)
