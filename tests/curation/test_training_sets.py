"Selection, building, recipes, hidden sets, scores and search: by hand on sets small enough to check."
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.curation import hidden as H
from robustnb.curation import selection as S
from robustnb.attacks.gradient import fgsm
from robustnb.core import make_generator
from robustnb.curation.training_sets import (
    attacked, build_training_set, load_training_set, set_card, summary, TrainingSet, unchanged)
from robustnb.data import ImageSet
from robustnb.curation.published import (published_mixture, published_names,
                                         simulated_training, towards_random)
from robustnb.curation.search import (
    build_bank, concatenate_sets, mine_errors, mix, random_shares, successive_halving)
from robustnb.attacks.threat_models import Linf

seeded = lambda: make_generator(0)
rng = np.random.default_rng(0)
pool = ImageSet(rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8), np.arange(90) % 3, 3)


class Brightness(nn.Module):
    "Says class 0 for dark images, 1 for middling ones, 2 for bright ones, from the pixel in the corner"
    def __init__(self, at=0):
        super().__init__()
        self.at = at
    def forward(self, x):
        v = x[:, :, self.at, self.at].mean(1, keepdim=True)
        return 8*torch.cat([1-2*v, .5-0*v, 2*v-1], 1)


nets = [Brightness(0).eval(), Brightness(7).eval()]


def said(images, k=0):
    return nets[k](
        torch.from_numpy(images).permute(0, 3, 1, 2).float()/255).softmax(1).double().numpy()


def entropy_of(p): return -(p*np.log(p)).sum(1)


def candidates(policy, n=20, images=pool.images, labels=pool.labels, rows=None, **kw):
    rows = pd.DataFrame(dict(image=np.arange(len(images)), success=None)) if rows is None else rows
    return policy(images, labels, rows, n, seeded(), **kw)


def test_policies_by_hand():
    p = (said(pool.images, 0) + said(pool.images, 1))/2
    wrong = np.stack([said(pool.images, k).argmax(1) != pool.y for k in (0, 1)])
    assert {*candidates(S.misclassified, 90, models=nets)} == {*np.flatnonzero(wrong.any(0))}
    assert {*candidates(S.misclassified, 90, models=nets,
                        by=all)} == {*np.flatnonzero(wrong.all(0))}
    assert (np.diff(wrong.sum(0)[candidates(S.most_wrong, 90, models=nets)]) <= 0).all()
    assert wrong.sum(0).max() == 2 > wrong.sum(0).min()
    for highest in (True, False):
        order = np.argsort(-entropy_of(p) if highest else entropy_of(p), kind='stable')
        assert candidates(S.by_entropy, 15, models=nets,
                          highest=highest).tolist() == order[:15].tolist()
        assert candidates(S.by_entropy, 15, models=nets, highest=highest,
                          skip=.2).tolist() == order[18:33].tolist()
    second = np.sort(p, 1)[:, 1]
    assert np.allclose(second[candidates(S.second_highest, 90, models=nets)], np.sort(second)[::-1])
    first = candidates(S.second_highest, 90, models=nets, wrong_first=True)
    assert wrong.any(0)[first][:wrong.any(0).sum()].all()
    assert np.allclose(second[first][:wrong.any(0).sum()], np.sort(second[wrong.any(0)])[::-1])


def test_draws_are_random_and_without_repetition():
    a = candidates(S.everything)
    b = S.everything(pool.images, pool.labels, None, 20, make_generator(1))
    assert len({*a}) == 20
    assert {*a} != {*b}
    assert a.tolist() == candidates(S.everything).tolist()
    assert {*candidates(S.everything, 90)} == {*range(90)}


def test_success_is_read_from_the_table():
    rows = pd.DataFrame(dict(image=np.arange(90), success=[True, None, False]*30))
    assert {*candidates(S.succeeded, 90, rows=rows)} == {*range(0, 90, 3)}
    assert len(candidates(S.succeeded, 7, rows=rows)) == 7


def test_equal_scores_come_in_random_order():
    dull = np.zeros((40, 8, 8, 3), np.uint8)
    orders = [S.most_wrong(dull, np.eye(3)[np.ones(40, int)], None, 10, make_generator(s),
                           models=nets).tolist() for s in (0, 1)]
    assert orders[0] != orders[1]
    assert len({*orders[0]}) == 10


def test_balanced_shares_out_what_does_not_divide():
    for n, least in ((30, 10), (31, 10), (5, 1)):
        counts = np.bincount(pool.y[candidates(S.balanced(S.everything), n)], minlength=3)
        assert counts.sum() == n
        assert counts.min() == least
        assert counts.max()-counts.min() <= 1
    top = candidates(S.balanced(partial(S.by_entropy, models=nets)), 6)
    p = (said(pool.images, 0) + said(pool.images, 1))/2
    assert {*top} == {int(i) for k in range(
        3) for i in np.flatnonzero(pool.y == k)[np.argsort(-entropy_of(p)[pool.y == k])[:2]]}
    assert {*pool.y[top[:3]]} == {0, 1, 2}
    missing = S.balanced(S.everything)(pool.images[:0], pool.labels[:0], None, 3, seeded())
    assert len(missing) == 0


def test_hardest_version_by_hand():
    rows = pd.DataFrame(dict(image=np.arange(90)//3))
    p = (said(pool.images, 0) + said(pool.images, 1))/2
    best = [3*i + int(entropy_of(p)[3*i:3*i+3].argmax()) for i in range(30)]
    assert sorted(candidates(S.hardest_version, 30, rows=rows, models=nets)) == best
    assert set(candidates(S.hardest_version, 5, rows=rows, models=nets, then=partial(
        S.by_entropy, models=nets))) == set(np.array(best)[np.argsort(-entropy_of(p)[best])[:5]])


def flipped(k):
    def mark(x, y, generator): return (x*0 + k/255), y
    mark.__name__ = f'mark{k}'
    return mark


@pytest.mark.parametrize('shares, quotas',
                         ((dict(a=.5, b=.5), (10, 10)), (dict(a=1/3, b=2/3), (7, 13)),
                          (dict(a=.025, b=.975), (1, 19)), (dict(b=1., a=0), (0, 20))))
def test_shares_become_whole_numbers(shares, quotas):
    made = build_training_set(pool, dict(a=flipped(1), b=flipped(2)), shares, 20)
    assert tuple((made.rows.source == k).sum() for k in 'ab') == quotas
    assert tuple((made.images[:, 0, 0, 0] == k).sum() for k in (1, 2)) == quotas


def test_images_labels_and_rows_stay_together():
    half = lambda x, y, generator: (x, .5*y + .5/3)
    made = build_training_set(pool, dict(clean=unchanged, soft=half), dict(clean=.5, soft=.5), 90)
    assert (made.images == pool.images[made.rows['image']]).all()
    assert (made.y == pool.y[made.rows['image']]).all()
    assert np.allclose(made.labels.max(1), np.where(made.rows.source == 'clean', 1, 2/3))
    assert (np.diff((made.rows.source == 'clean').to_numpy().astype(int)) != 0).sum() > 20
    counts = made.rows[made.rows.source == 'clean']['image'].value_counts()
    assert counts.max() == 1
    assert np.bincount(made.y[(made.rows.source == 'clean').to_numpy()]).tolist() == [15]*3


@pytest.mark.parametrize('seed', (3, 5, 7))
def test_every_beginning_is_balanced(seed):
    assert np.bincount(build_training_set(pool, dict(clean=unchanged), dict(clean=1), 46,
                                          seed=seed).y).max() == 16


def test_a_small_pool_is_gone_through_again():
    made = build_training_set(pool[:30], dict(clean=unchanged), dict(clean=1), 75)
    assert made.rows['image'].value_counts().isin((2, 3)).all()
    assert len(made) == 75


@pytest.mark.parametrize('candidates, images, versions',
                         ((1, 12, 1), (2, 12, 2), (3, 12, 3), (6, 24, 3)))
def test_versions_take_turns_or_are_all_made(candidates, images, versions):
    seen = []
    def look(x, labels, rows, n, generator):
        seen.append(rows)
        return np.arange(n)
    build_training_set(pool, dict(a=[flipped(k) for k in (1, 2, 3)]), dict(a=1), 12,
                       select=look, candidates=candidates)
    rows = seen[0]
    each = rows.groupby('image')['transform'].nunique()
    assert len(rows) == 12*candidates
    assert rows['image'].nunique() == images
    assert (each == versions).all()
    assert rows['transform'].value_counts().nunique() == 1
    assert rows['transform'].nunique() == 3


def test_sources_with_their_own_pool_and_history():
    other = ImageSet(255-pool.images[:20], pool.labels[:20], 3)
    made = build_training_set(pool, dict(a=unchanged, b=(other, unchanged),
                                         c=attacked(fgsm, nets[0], Linf(8/255), 'corner')),
                              dict(a=.4, b=.2, c=.4), 50)
    b, c = ((made.rows.source == k).to_numpy() for k in 'bc')
    assert (made.images[b] == other.images[made.rows['image'][b]]).all()
    assert (made.rows.surrogate[c] == 'corner').all()
    assert (made.rows.surrogate[b] == '').all()
    assert made.rows.success[b].isna().all()
    assert (
        made.rows.success[c].astype(bool) == (said(made.images[c]).argmax(1) != made.y[c])).all()
    assert made.rows['transform'][c].iloc[0].startswith('attacked(fgsm, corner, Linf(eps=0.03')
    assert (abs(made.images[c].astype(int)-pool.images[made.rows['image'][c]]).max((
        1, 2, 3)) == 8).any()
    assert abs(made.images[c].astype(int)-pool.images[made.rows['image'][c]]).max() <= 8


def test_labels_attacked_are_the_likeliest():
    seen = []
    def attack(model, x, y, threat, generator=None):
        seen.append(y)
        return x
    labels = torch.tensor([[.2, .5, .3], [.6, .2, .2]])
    attacked(attack, nets[0], Linf(.1))(torch.rand(2, 3, 8, 8), labels, seeded())
    assert seen[0].tolist() == [1, 0]


@pytest.mark.parametrize('change, words', (
    (dict(shares=dict(clean=.9)), 'must sum to 1; got 0.9'),
    (dict(shares=dict(clean=.5, other=.5)), "'other' is none of clean"),
    (dict(shares=dict(clean=float('nan'))), r'numbers in \[0, 1\]'),
    (dict(shares=dict(clean=1.2)), r'numbers in \[0, 1\]'),
    (dict(sources=dict(clean=[])), "'clean' must hold at least one transform"),
    (dict(sources=dict(clean=(pool, []))), 'at least one transform'),
    (dict(n=50_001), '50,000'), (dict(n=0), 'between 1'),
    (dict(select=dict(nobody=S.everything)), '`select` must name sources'),
    (dict(candidates=dict(clean=0)), '`candidates` must be at least 1'),
    (dict(sources=dict(clean=lambda x, y, g: (x+1, y))),
     "source 'clean' failed: `x` must hold pixels"),
    (dict(select=partial(S.misclassified, models=nets, by=all),
          sources=dict(clean=lambda x, y, g: (x*0, torch.eye(3)[y.argmax(1)*0]))),
     "source 'clean' must give 30 images; misclassified.* lets 0 of 30"),
    (dict(sources=dict(clean=lambda x, y, g: (x, y-1))), '`labels` must be rows of probabilities')))
def test_plans_that_cannot_be_built(change, words):
    with pytest.raises(ValueError, match=words):
        build_training_set(**dict(pool=pool, sources=dict(clean=unchanged),
                                  shares=dict(clean=1.), n=30) | change)


def test_sets_can_be_cut_saved_and_read(tmp_path):
    made = build_training_set(pool, dict(clean=unchanged, fooled=attacked(fgsm, nets[0], Linf(.2))),
                              dict(clean=.5, fooled=.5), 40)
    for cut in (slice(5, 9), np.array([3, 1, 7]), made.y == 2):
        part = made[cut]
        at = np.arange(40)[cut]
        assert (part.images == made.images[at]).all()
        assert part.rows['image'].tolist() == made.rows['image'].iloc[at].tolist()
        assert part.rows.index.tolist() == [*range(len(at))]
    again = load_training_set(made.save(tmp_path/'set'))
    assert (again.images == made.images).all()
    assert again.rows.surrogate.tolist() == made.rows.surrogate.tolist()
    assert again.rows.success.fillna(
        '').astype(str).tolist() == made.rows.success.fillna('').astype(str).tolist()
    table = summary(again)
    assert table.attack_success['fooled'] == made.rows.success[made.rows.source == 'fooled'].mean()
    assert np.isnan(table.attack_success['clean'])
    page = set_card(again, tmp_path/'card.html', 'A <b> set').read_text()
    assert 'A &lt;b&gt; set' in page
    assert '<b> set' not in page
    assert 'attacked(fgsm' in page


def test_nothing_is_written_where_one_file_cannot_be(tmp_path, monkeypatch):
    made = build_training_set(pool, dict(clean=unchanged), dict(clean=1.), 10)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', full)
    with pytest.raises(OSError, match='No space left'):
        made.save(tmp_path/'set')
    assert not [*(tmp_path/'set').glob('*')]


@pytest.mark.parametrize('name', published_names)
def test_every_recipe_has_shares_for_its_sources(name):
    plan = published_mixture(name, dict(a=nets[0], b=nets[1]), nets[0], pool, effort=.01)
    assert abs(sum(plan['shares'].values())-1) < 1e-9
    assert set(plan['shares']) == set(plan['sources'])
    assert all(k in plan['sources'] for o in ('select', 'candidates')
               for k in (plan.get(o) if isinstance(plan.get(o), dict) else ()))


@pytest.mark.parametrize('kw, words', (
    (dict(name='gold'), '`name` must be one of clean'), (dict(nets={}), '`nets`'),
    (dict(effort=0), '`effort`'), (dict(name='mission_generated'), '`generated` must be given')))
def test_recipes_that_do_not_exist(kw, words):
    with pytest.raises(ValueError, match=words):
        published_mixture(**dict(name='mission', nets=dict(a=nets[0])) | kw)


def test_targets_are_wrong_and_random():
    seen = []
    def attack(model, x, y, threat, generator=None, loss=None):
        seen.append((y, loss))
        return x
    y = torch.arange(300) % 3
    towards_random(attack)(nets[0], torch.rand(300, 3, 8, 8), y, Linf(.1), seeded())
    target, loss = seen[0]
    assert (target != y).all()
    assert set(((target-y) % 3).tolist()) == {1, 2}
    assert 100 < ((target-y) % 3 == 1).sum() < 200
    logits = torch.randn(4, 3)
    assert torch.allclose(loss(logits, target[:4]),
                          logits.log_softmax(1)[torch.arange(4), target[:4]])


def answers_table(right):
    "Two sets, two networks, two seeds, ten images in each of two families and slices"
    rows = [dict(set=s, network=n, seed=k, family=f, slice=c, n=10, correct=right(s, n, k, f, c))
            for s in 'ab' for n in 'uv' for k in (0, 1) for f in ('clean', 'noise')
            for c in ('public_a', 'final')]
    return pd.DataFrame(rows)


def test_standings_by_hand():
    table = H.standings(answers_table(lambda s, n, k, f, c: (
        8 if s == 'b' else 4) + (c == 'final')*2 + (n == 'u')*k - (f == 'noise')),
                        'public_a')
    assert table.index.tolist() == ['b', 'a']
    assert np.isclose(table.score['b'], np.mean([.75, .85, .75, .75]))
    assert np.isclose(table.se['b'], np.std([.75, .8], ddof=1)/2**.5)
    assert table.worst_family['a'] == 'noise'
    assert np.isclose(table.clean['b'], .825)
    assert np.isclose(table.worst['a'], .325)
    assert np.isclose(table.noise['b'], .725)
    assert H.standings(answers_table(lambda s, n, k, f, c: 5 + (c == 'final')),
                       ('final',)).score.eq(.6).all()


def test_standings_with_other_weights():
    rows = answers_table(
        lambda s, n, k, f, c: (8 if (f == 'noise') == (s == 'a') else 3) + (n == 'u') + k)
    rows.loc[rows.family == 'clean', ['n', 'correct']] *= 3
    assert H.standings(rows, 'public_a').index[0] == 'b'
    assert H.standings(rows, 'public_a', dict(noise=3, clean=1)).index[0] == 'a'
    table = H.standings(rows, 'public_a', dict(noise=3, clean=1))
    by_seed = [np.mean([(3*(8+u+k) + 3+u+k)/40 for u in (1, 0)]) for k in (0, 1)]
    assert np.isclose(table.score['a'], np.mean(by_seed))
    assert np.isclose(table.se['a'], np.std(by_seed, ddof=1)/2**.5)
    assert np.allclose(H.standings(rows, 'public_a', dict(noise=7)).score,
                       H.standings(rows, 'public_a').noise.loc[['a', 'b']])
    for bad in (dict(fog=1), dict(noise=0), dict(noise=-1, clean=2), dict(noise=float('nan')), {}):
        with pytest.raises(ValueError, match='`shares`'):
            H.standings(rows, 'public_a', bad)
    for bad in (dict(sets={}), dict(networks={}), dict(seeds=())):
        with pytest.raises(ValueError, match='must each hold at least one'):
            H.score_training_sets(**dict(sets=dict(a=None), hidden=None, networks=dict(a=None),
                                         config={}, seeds=(0,)) | bad)
    for bad in (dict(width=0.), dict(width=5.), dict(epochs=0), dict(epochs=201)):
        with pytest.raises(ValueError, match='`width` must be in'):
            H.proxies(**bad)


def test_answers_count_families_and_slices():
    rows = pd.DataFrame(dict(family=np.where(np.arange(90) < 30, 'dark', 'rest'),
                             slice=np.array(['public_a', 'final'])[np.arange(90) % 2], image=0))
    table = H.answers(
        nets[0], TrainingSet(pool.images, pool.labels, 3, rows)).set_index(['family', 'slice'])
    right = said(pool.images).argmax(1) == pool.y
    for (family, part), row in table.iterrows():
        at = (rows.family == family) & (rows.slice == part)
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
    config = dict(net=dict(epochs=1))
    score = (
        lambda data=pool, hidden=hidden, config=config, seeds=(0, 1), build=lambda seed: Brightness(): len(
            H.score_training_sets(dict(s=data), hidden, dict(net=build), config, seeds,
                                  tmp_path)) and len(trained))
    assert score() == 2
    assert trained == [0, 1]
    assert score() == 2
    assert score(seeds=(0, 1, 2)) == 3
    assert score(data=pool[:60]) == 5
    assert score(config=dict(net=dict(epochs=2))) == 7
    assert score(hidden=hidden[:50]) == 9
    assert score(build=lambda seed: nn.Sequential(Brightness())) == 11
    assert score() == 11
    dark = TrainingSet(pool.images//2, pool.labels, 3, rows)
    assert score(hidden=dark) == 13
    assert not [*tmp_path.glob('*/checkpoint.pt')]


def test_mixing_and_joining():
    bank = build_bank(pool, dict(a=flipped(1), b=flipped(2)), 40, seed=1)
    made = mix(bank, dict(a=.25, b=.75), 40)
    assert (made.images[:, 0, 0, 0] == 1).sum() == 10
    assert (made.rows.source == 'a').sum() == 10
    assert set(mix(bank, dict(a=1.), 40).rows['image']) == set(bank['a'].rows['image'])
    few = build_bank(pool[:20], dict(a=flipped(1), b=flipped(2)), 60, seed=1)
    chosen = [mix(few, dict(a=.7, b=.3), 40, seed=s) for s in (0, 0, 1)]
    assert all((o.rows['image'].value_counts() == 2).all() for o in chosen)
    assert np.array_equal(chosen[0].images, chosen[1].images)
    assert not chosen[0].rows.equals(chosen[2].rows)
    assert mix(few, dict(a=.5, b=.5), 30).rows['image'].value_counts().between(1, 2).all()
    assert len(concatenate_sets([made, bank['a']])) == 80
    assert (concatenate_sets([made, bank['a']]).images[40:] == bank['a'].images).all()
    one = {k: build_bank(pool, dict(a=unchanged), 5,
                         select=dict(a=partial(S.by_entropy, models=nets)),
                         candidates=dict(a=18))['a'] for k in (0,)}[0]
    assert set(one.rows['image']) == set(candidates(S.by_entropy, 5, models=nets))
    for bad, words in ((dict(a=.5), 'sum to 1'), (dict(c=1.), 'it has 0'),
                       (dict(a=1.), 'must hold 41')):
        with pytest.raises(ValueError, match=words):
            mix(bank, bad, 41)
    with pytest.raises(ValueError, match='at least one'):
        concatenate_sets([])


def test_mining_asks_the_networks_of_the_round_before():
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
    wrong = np.stack([said(made.images, k).argmax(1) != made.y for k in (0, 1)]).sum(0)
    base = np.stack([said(pool.images, k).argmax(1) != pool.y for k in (0, 1)]).sum(0)
    assert wrong[10:].mean() > base.mean() + .2
    assert log.any_wrong.iloc[1:].between(.3, 1).all()
    assert log.all_wrong.iloc[1] <= log.any_wrong.iloc[1]


def test_simulated_training_attacks_what_it_trains(monkeypatch):
    from robustnb.curation import published as recipes
    steps = []
    def fake(recipe, net, data, seed):
        steps.append((recipe.epochs, net.at, len(data)))
        return Brightness(net.at+1).eval(), None
    monkeypatch.setattr(recipes, 'train', fake)
    made = simulated_training(pool, nets[0], 20, rounds=3, radii=(.05,), steps=1)
    assert steps == [(1, 0, 90), (1, 1, 90), (1, 2, 90)]
    assert len(made) == 20
    assert made.rows.surrogate.value_counts().to_dict() == {
        'round 1': 7, 'round 2': 7, 'round 3': 6}
    with pytest.raises(ValueError, match='`rounds` must be at least 1; got 0'):
        simulated_training(pool, nets[0], 20, rounds=0)


def test_halving_by_hand():
    plans = {f'p{i}': dict(a=i/9, b=1-i/9) for i in range(10)}
    seen = []
    def level(sets):
        seen.append(sorted(sets))
        return pd.DataFrame([dict(set=k, network='n', seed=0, family='clean', slice=c, n=9,
                                  correct=(v if c == 'public_a' else 9-v))
                             for k, v in sets.items() for c in ('public_a', 'final')])
    table = successive_halving(plans, lambda shares: round(9*shares['a']), [level, level], keep=.3)
    assert seen == [sorted(plans), ['p7', 'p8', 'p9']]
    assert table[table.level == 2].plan.tolist() == ['p9', 'p8', 'p7']
    assert np.isclose(table.score.iloc[0], 1)
    assert successive_halving(plans, lambda shares: round(9*shares['a']), [level, level], keep=.3,
                              slices=('final',)).plan.iloc[-3:].tolist() == ['p0', 'p1', 'p2']
    for bad in (0, 1, float('nan')):
        with pytest.raises(ValueError, match='`keep`'):
            successive_halving(plans, None, [level], keep=bad)


def test_random_mixtures():
    made = random_shares('abc', 50, seed=1)
    assert len(made) == 50
    assert all(abs(sum(o.values())-1) < 1e-9 and min(o.values()) > 0 for o in made.values())
    assert made == random_shares('abc', 50, seed=1) != random_shares('abc', 50, seed=2)
    assert abs(np.mean([o.get('a', 0) for o in made.values()])-1/3) < .12
