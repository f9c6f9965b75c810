"Banks, mining and successive halving: by hand on sets small enough to check"
from functools import partial

import numpy as np
import pandas as pd
import pytest

from helpers_curation import is_wrong, marking, nets, pool, seeded
from robustnb.curation.search import (
    build_bank, mine_errors, mix, random_mixtures, successive_halving)
from robustnb.curation.selection import among, by_entropy
from robustnb.curation.training_sets import build_training_set, unchanged

marks = dict(a=marking(1), b=marking(2))


@pytest.fixture(scope='module')
def bank(): return build_bank(pool, marks, 40, seed=1)


def test_a_mixture_has_the_proportions_asked_for(bank):
    made = mix(bank, dict(a=.25, b=.75), 40)
    assert (made.images[:, 0, 0, 0] == 1).sum() == 10
    assert (made.rows.source == 'a').sum() == 10
    assert set(mix(bank, dict(a=1.), 40).rows['image']) == set(bank['a'].rows['image'])


def test_a_mixture_uses_the_pool_evenly_and_follows_its_seed():
    few = build_bank(pool[:20], marks, 60, seed=1)
    chosen = [mix(few, dict(a=.7, b=.3), 40, seed=s) for s in (0, 0, 1)]
    assert all((o.rows['image'].value_counts() == 2).all() for o in chosen)
    assert np.array_equal(chosen[0].images, chosen[1].images)
    assert not chosen[0].rows.equals(chosen[2].rows)
    assert mix(few, dict(a=.5, b=.5), 30).rows['image'].value_counts().between(1, 2).all()


def test_options_of_a_bank_go_to_their_source():
    undecided = partial(by_entropy, models=nets)
    bank = build_bank(pool, dict(a=unchanged, b=unchanged), 5, select=dict(a=among(18, undecided)))
    rows = pd.DataFrame(dict(image=np.arange(90), success=None))
    best = undecided(pool.images, pool.labels, rows, 5, seeded())
    assert set(bank['a'].rows['image']) == set(best)
    assert set(bank['b'].rows['image']) != set(best)


@pytest.mark.parametrize('proportions, words', (
    (dict(a=.5), 'sum to 1'), (dict(c=1.), 'it has 0'), (dict(a=1.), 'must hold 41')))
def test_mixtures_that_the_bank_cannot_give(proportions, words, bank):
    with pytest.raises(ValueError, match=words):
        mix(bank, proportions, 41)


def test_mining_queries_the_networks_of_the_round_before():
    fitted = []
    def fit(data, seed):
        fitted.append((len(data), seed))
        return nets
    made, log = mine_errors(pool, [unchanged], 30, fit, rounds=3, candidates=3)
    assert [n for n, _ in fitted] == [10, 20]
    assert fitted[0][1] != fitted[1][1]
    assert made.rows.source.unique().tolist() == ['round 1', 'round 2', 'round 3']
    assert log['round'].tolist() == [1, 2, 3]
    assert log.images.tolist() == [10, 20, 30]
    wrong = is_wrong(made.images, made.y).sum(0)
    base = is_wrong(pool.images, pool.y).sum(0)
    assert wrong[10:].mean() > base.mean() + .2
    assert log.any_wrong.iloc[1:].between(.3, 1).all()
    assert log.all_wrong.iloc[1] <= log.any_wrong.iloc[1]


def test_mining_uses_the_pool_evenly():
    fit = lambda data, seed: nets
    made, _ = mine_errors(pool, [unchanged], 45, fit, rounds=5, candidates=3)
    assert made.rows['image'].is_unique
    again, _ = mine_errors(pool, [unchanged], 45, fit, rounds=5, candidates=3)
    assert made.rows.equals(again.rows)
    with pytest.raises(ValueError, match='`rounds` must be at most the 3 images wanted; got 4'):
        mine_errors(pool, [unchanged], 3, fit, rounds=4)


@pytest.mark.parametrize('sources', (2, 99, 100, 300, 1000))
@pytest.mark.parametrize('concentration', (.5, 1000.))
def test_random_mixtures_are_whole(sources, concentration):
    for mixture in random_mixtures([f's{i}' for i in range(sources)], 20, 0, concentration).values():
        assert np.isclose(sum(mixture.values()), 1)
        assert min(mixture.values()) > 0


def ninths(proportions):
    "A stand-in for a training set of nine images: the ninths of source a"
    return [round(9*proportions['a'])]*9


plans = {f'p{i}': dict(a=i/9, b=1-i/9) for i in range(10)}


def count_ninths(sets):
    "The public slice likes source a, the final one source b"
    return pd.DataFrame([dict(set=k, model='n', seed=0, family='clean', slice=c, n=9,
                              correct=v[0] if c == 'public_a' else 9-v[0])
                         for k, v in sets.items() for c in ('public_a', 'final')])


def test_halving_by_hand():
    seen = []
    def level(sets):
        seen.append(sorted(sets))
        return count_ninths(sets)
    table = successive_halving(plans, ninths, [level, level], keep=.3)
    assert seen == [sorted(plans), ['p7', 'p8', 'p9']]
    assert table[table.level == 2].plan.tolist() == ['p9', 'p8', 'p7']
    assert np.isclose(table.score.iloc[0], 1)


def test_halving_by_another_slice():
    table = successive_halving(plans, ninths, [count_ninths]*2, keep=.3, slices=('final',))
    assert table.plan.iloc[-3:].tolist() == ['p0', 'p1', 'p2']


def test_levels_must_score_every_set():
    for change in (lambda sets: dict([*sets.items()][1:]), lambda sets: sets | dict(other=[0])):
        with pytest.raises(ValueError, match='`levels` must.*level 1 differ in .(p0|other)'):
            successive_halving(plans, ninths, [lambda sets: count_ninths(change(sets))]*2)


def test_a_baseline_races_as_it_is():
    built = []
    def build(plan):
        built.append(plan)
        return mix(bank_of_marks, plan, 18)
    bank_of_marks = build_bank(pool, marks, 20)
    clean = build_training_set(pool, dict(clean=unchanged), dict(clean=1.), 18)
    def level(sets):
        "How many images have no mark"
        return pd.DataFrame([dict(set=k, model='n', seed=0, family='clean', slice='final', n=18,
                                  correct=(v.images[:, 0, 0, 0] > 2).sum()) for k, v in sets.items()])
    mixtures = dict(a=dict(a=1.), b=dict(a=.5, b=.5))
    table = successive_halving(mixtures | dict(clean=clean), build, [level]*2, slices='final')
    assert table[table.level == 2].plan.tolist() == ['clean']
    assert built == [*mixtures.values()]
    with pytest.raises(ValueError, match='`plans` must give sets of one size.*a 18, b 18, clean 10'):
        successive_halving(mixtures | dict(clean=clean[:10]), build, [level], slices='final')


@pytest.mark.parametrize('bad', (0, 1, float('nan')))
def test_halving_keeps_some_and_drops_some(bad):
    with pytest.raises(ValueError, match='`keep`'):
        successive_halving(plans, None, [count_ninths], keep=bad)


@pytest.mark.parametrize('call, name', (
    (lambda: build_bank(pool, marks, 9, select=dict(z=by_entropy)), 'select'),
    (lambda: mine_errors(pool, [], 9, None), 'versions'), (lambda: random_mixtures([], 3), 'names'),
    (lambda: random_mixtures('ab', 3, concentration=0), 'concentration')))
def test_searches_that_mean_nothing(call, name):
    with pytest.raises(ValueError, match=f'`{name}`'):
        call()


def test_random_mixtures():
    made = random_mixtures('abc', 50, seed=1)
    assert len(made) == 50
    assert all(abs(sum(o.values())-1) < 1e-9 for o in made.values())
    assert all(min(o.values()) > 0 for o in made.values())
    assert made == random_mixtures('abc', 50, seed=1)
    assert made != random_mixtures('abc', 50, seed=2)
    assert abs(np.mean([o.get('a', 0) for o in made.values()])-1/3) < .12
