"Training sets are built, cut, saved and read: by hand on images small enough to check"
import copy
import inspect
import random
from functools import partial

import numpy as np
import pytest
import torch

from helpers_curation import Brightness, marking, nets, pool, probabilities, seeded
from robustnb.attacks.gradient import fgsm, full_pgd, pgd
from robustnb.attacks.threat_models import Linf
from robustnb.augmentation.corruptions import corruption
from robustnb.augmentation.soft_labels import mixup
from robustnb.augmentation.transforms import chain, describe, gaussian_noise, one_of, sometimes
from robustnb.curation import training_sets
from robustnb.curation.contest import contest_network
from robustnb.curation.selection import among, balanced, everything, misclassified, succeeded
from robustnb.curation.training_sets import (
    apportion, attacked, build_training_set, concatenate_sets, contact_sheet,
    corruption_table, load_training_set, set_card,
    summary, TrainingSet, unchanged)
from robustnb.curation.hidden import hidden_set
from robustnb.curation.published import summed
from robustnb.curation.search import build_bank
from robustnb.curation.unseen import held_out_set
from robustnb.data import ImageSet


@pytest.mark.parametrize('proportions, quotas',
                         ((dict(a=.5, b=.5), (10, 10)), (dict(a=1/3, b=2/3), (7, 13)),
                          (dict(a=.025, b=.975), (1, 19)), (dict(b=1., a=0), (0, 20))))
def test_proportions_become_whole_numbers(proportions, quotas):
    made = build_training_set(pool, dict(a=marking(1), b=marking(2)), proportions, 20)
    assert tuple((made.rows.source == k).sum() for k in 'ab') == quotas
    assert tuple((made.images[:, 0, 0, 0] == k).sum() for k in (1, 2)) == quotas


def test_images_labels_and_rows_stay_together():
    half = lambda x, y, generator: (x, .5*y + .5/3)
    made = build_training_set(pool, dict(clean=unchanged, soft=half), dict(clean=.5, soft=.5), 90)
    clean = (made.rows.source == 'clean').to_numpy()
    assert (made.images == pool.images[made.rows['image']]).all()
    assert (made.y == pool.y[made.rows['image']]).all()
    assert np.allclose(made.labels.max(1), np.where(clean, 1, 2/3))
    assert (np.diff(clean.astype(int)) != 0).sum() > 20
    assert made.rows['image'][clean].value_counts().max() == 1
    assert np.bincount(made.y[clean]).tolist() == [15]*3


@pytest.mark.parametrize('seed', (3, 5, 7))
def test_every_beginning_is_balanced(seed):
    made = build_training_set(pool, dict(clean=unchanged), dict(clean=1), 46, seed=seed)
    assert np.bincount(made.y).max() == 16


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
    build_training_set(pool, dict(a=[marking(k) for k in (1, 2, 3)]), dict(a=1), 12,
                       select=among(candidates, look))
    rows = seen[0]
    each = rows.groupby('image')['transform'].nunique()
    assert len(rows) == 12*candidates
    assert rows['image'].nunique() == images
    assert (each == versions).all()
    assert rows['transform'].value_counts().nunique() == 1
    assert rows['transform'].nunique() == 3


def test_sources_with_their_own_pool_and_history():
    other = ImageSet(255-pool.images[:20], pool.labels[:20], 3)
    sources = dict(a=unchanged, b=(other, unchanged),
                   c=attacked(fgsm, nets[0], Linf(8/255), 'corner'))
    made = build_training_set(pool, sources, dict(a=.4, b=.2, c=.4), 50)
    b, c = ((made.rows.source == k).to_numpy() for k in 'bc')
    assert (made.images[b] == other.images[made.rows['image'][b]]).all()
    assert (made.rows.surrogate[b] == '').all()
    assert made.rows.success[b].isna().all()
    fooled = probabilities(made.images[c]).argmax(1) != made.y[c]
    assert (made.rows.surrogate[c] == 'corner').all()
    assert (made.rows.success[c].astype(bool) == fooled).all()
    assert made.rows['transform'][c].iloc[0].startswith('attacked(fgsm, corner, Linf(eps=0.03')
    change = abs(made.images[c].astype(int)-pool.images[made.rows['image'][c]])
    assert change.max() == 8


def test_labels_attacked_are_the_likeliest():
    seen = []
    def attack(model, x, y, threat, generator=None):
        seen.append(y)
        return x
    labels = torch.tensor([[.2, .5, .3], [.6, .2, .2]])
    attacked(attack, nets[0], Linf(.1))(torch.rand(2, 3, 8, 8), labels, seeded())
    assert seen[0].tolist() == [1, 0]


@pytest.mark.parametrize('change, words', (
    (dict(proportions=dict(clean=.9)), 'must sum to 1; got 0.9'),
    (dict(proportions=dict(clean=.5, other=.5)), "'other' is none of clean"),
    (dict(proportions=dict(clean=float('nan'))), r'numbers in \[0, 1\]'),
    (dict(proportions=dict(clean=1.2)), r'numbers in \[0, 1\]'),
    (dict(sources=dict(clean=[])), "'clean' must hold at least one transform"),
    (dict(sources=dict(clean=(pool, []))), 'at least one transform'),
    (dict(n=50_001), '50,000'), (dict(n=0), 'between 1'),
    (dict(select=dict(nobody=everything)), '`select` must name sources'),
    (dict(batch_size=0), '`batch_size` must be a whole number, at least 1'),
    (dict(sources=dict(clean=lambda x, y, g: (x+1, y))),
     "source 'clean' failed: `x` must hold pixels"),
    (dict(n=2.5), '`n` must be a whole number'),
    (dict(proportions=dict(clean=1.), sources={}), 'there are none'),
    (dict(sources=dict(clean=lambda x, y, g: x)), "source 'clean' failed: `transform` must return a pair"),
    (dict(sources=dict(clean=lambda x, y: (x, y))),
     "source 'clean' failed: .* were given. A transform gets .x, y, generator."),
    (dict(sources=dict(clean=lambda x, y, g: (x, y.argmax(1)))),
     "source 'clean' failed: `labels` must come back as rows of probabilities, .30, 3."),
    (dict(select=partial(misclassified, models=nets, by=all),
          sources=dict(clean=lambda x, y, g: (x*0, torch.eye(3)[y.argmax(1)*0]))),
     "source 'clean' must give 30 images; misclassified.* lets 0 of 30"),
    (dict(sources=dict(clean=lambda x, y, g: (x, y-1))), '`labels` must be rows of probabilities')))
def test_plans_that_cannot_be_built(change, words):
    with pytest.raises(ValueError, match=words):
        build_training_set(**dict(pool=pool, sources=dict(clean=unchanged),
                                  proportions=dict(clean=1.), n=30) | change)


@pytest.mark.parametrize('cut', (np.s_[:, :4, :4], np.s_[..., :1]))
def test_pools_of_other_shapes_are_refused_before_any_work(cut):
    made = []
    def costly(x, y, generator):
        made.append(len(x))
        return x, y
    other = ImageSet(pool.images[cut], pool.y, 3)
    with pytest.raises(ValueError, match='images of one shape .H,W,C.; got .8, 8, 3., and .* in source .b.'):
        build_training_set(pool, dict(a=costly, b=(other, costly)), dict(a=.5, b=.5), 60)
    four = ImageSet(pool.images, pool.y, 4)
    with pytest.raises(ValueError, match='the same classes; .* in source .b.'):
        build_training_set(pool, dict(a=costly, b=(four, costly)), dict(a=.5, b=.5))
    assert not made
    parts = [build_training_set(o, dict(a=unchanged), dict(a=1.), 9) for o in (pool, other)]
    with pytest.raises(ValueError, match='images of one shape .* in part 2'):
        concatenate_sets(parts)


def through(wrap, *nets, threat=Linf(.2)):
    "A set whose one source attacks these networks inside something else"
    return build_training_set(pool, dict(a=wrap(*(attacked(fgsm, o, threat, f'net{i}')
                                                  for i, o in enumerate(nets)))), dict(a=1.), 60)


@pytest.mark.parametrize('wrap', (
    lambda a: chain(partial(gaussian_noise, sigma=.01), a), partial(sometimes, 1.), one_of, partial,
    lambda a: chain(sometimes(1., one_of(a)), partial(gaussian_noise, sigma=.01)),
    lambda a: summed(partial(gaussian_noise, sigma=.01), a)))
def test_the_network_attacked_is_known_through_what_is_around_the_attack(wrap):
    made = through(wrap, nets[0])
    right = lambda images, y: probabilities(images).argmax(1) == y
    assert (made.rows.success.astype(bool) == ~right(made.images, made.y)).all()
    assert made.rows.success.any()
    at = made.rows['image']
    assert (made.rows.known.astype(bool) == right(pool.images[at], pool.y[at])).all()
    assert (made.rows.surrogate == 'net0').all()


def test_of_several_networks_in_one_transform_nothing_is_said():
    made = through(chain, *nets)
    assert made.rows.success.isna().all()
    assert (made.rows.surrogate == 'net0 + net1').all()
    assert not through(chain, nets[0], nets[0]).rows.success.isna().any()


def test_attacks_succeed_on_photographs_that_were_known():
    "Images that the network got wrong before are nobody's success"
    still = through(chain, nets[0], threat=Linf(0.))
    assert still.rows.success.any()
    assert summary(still).attack_success['a'] == 0
    known = still[still.rows.known.astype(bool).to_numpy()]
    assert summary(known).attack_success['a'] == 0
    unknown = still[~still.rows.known.astype(bool).to_numpy()]
    assert np.isnan(summary(unknown).attack_success['a'])
    older = TrainingSet(still.images, still.labels, 3, still.rows.drop(columns='known'))
    assert summary(older).attack_success['a'] == older.rows.success.mean()


def test_a_switch_of_the_network_changes_the_copy_that_is_attacked():
    class Flip(torch.nn.Sequential):
        flip = False
        def forward(self, x): return -super().forward(x) if self.flip else super().forward(x)
    model = Flip(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    fresh = copy.deepcopy(model)
    fresh.flip = True
    source = attacked(fgsm, model, Linf(.2))
    made = lambda f: build_training_set(pool, dict(a=f), dict(a=1.), 30).images
    before = made(source)
    model.flip = True
    assert (made(source) != before).any()
    assert (made(source) == made(attacked(fgsm, fresh, Linf(.2)))).all()


@pytest.fixture
def fooled():
    sources = dict(clean=unchanged, fooled=attacked(fgsm, nets[0], Linf(.2)))
    return build_training_set(pool, sources, dict(clean=.5, fooled=.5), 40)


def test_sets_can_be_cut(fooled):
    for cut in (slice(5, 9), np.array([3, 1, 7]), fooled.y == 2):
        part = fooled[cut]
        at = np.arange(40)[cut]
        assert (part.images == fooled.images[at]).all()
        assert part.rows['image'].tolist() == fooled.rows['image'].iloc[at].tolist()
        assert part.rows.index.tolist() == [*range(len(at))]


def test_sets_are_read_as_they_were_saved(fooled, tmp_path):
    again = load_training_set(fooled.save(tmp_path/'set'))
    success = lambda data: data.rows.success.fillna('').astype(str).tolist()
    assert (again.images == fooled.images).all()
    assert again.rows.surrogate.tolist() == fooled.rows.surrogate.tolist()
    assert success(again) == success(fooled)
    table = summary(again)
    successes = fooled.rows.success[fooled.rows.source == 'fooled']
    known = fooled.rows.known[fooled.rows.source == 'fooled'].astype(bool)
    assert table.attack_success['fooled'] == successes[known].mean()
    assert np.isnan(table.attack_success['clean'])
    assert table.fraction.to_dict() == dict(clean=.5, fooled=.5)


def test_a_card_shows_text_as_text(fooled, tmp_path):
    page = set_card(fooled, tmp_path/'card.html', 'A <b> set').read_text()
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


def test_sets_are_concatenated_in_order():
    parts = [build_training_set(pool, {k: marking(i)}, {k: 1.}, 20) for i, k in enumerate('ab')]
    both = concatenate_sets(parts)
    assert len(both) == 40
    assert (both.images[20:] == parts[1].images).all()
    assert both.rows.source.tolist() == ['a']*20 + ['b']*20
    with pytest.raises(ValueError, match='at least one'):
        concatenate_sets([])


# ---- candidates, evenness, copies

class Lucky:
    "An attack that fools for the images whose corner is darker than `part`, and counts what it is asked"
    def __init__(self, part): self.part, self.asked = part, 0
    def __call__(self, model, x, y, threat, generator=None):
        self.asked += len(x)
        dark = x[:, 0, 0, 0] < self.part
        wrong = ((y+1) % 3).float()/2
        return torch.where(dark.view(-1, 1, 1, 1), wrong.view(-1, 1, 1, 1).expand_as(x), x)


def lucky(part, n=40, policy=succeeded, candidates=4):
    "What was asked of an attack until `n` images were there"
    attack = Lucky(part)
    # an image that is left alone is right: class 0 is dark, 2 bright
    images = np.repeat(np.array([20, 128, 235], np.uint8)[pool.y], 192).reshape(90, 8, 8, 3)
    noise = np.random.default_rng(0).integers(-20, 20, images.shape)
    own = ImageSet((images+noise).astype(np.uint8), pool.labels, 3)
    made = build_training_set(own, dict(a=attacked(attack, nets[0], Linf(1.))), dict(a=1.), n,
                              select=among(candidates, policy))
    return attack.asked, made


def test_candidates_are_made_until_the_quota_is_full():
    asked, made = lucky(2.)
    assert asked == 40
    assert made.rows.success.all()
    assert made.rows['image'].is_unique
    asked, made = lucky(.7)          # two classes of three
    assert 55 <= asked <= 75
    assert made.rows.success.all()
    assert len(made) == 40
    with pytest.raises(ValueError, match='lets 0 of 160 candidates'):
        lucky(-1.)
    with pytest.raises(ValueError, match="among.1.1, succeeded. lets .* of 44 .* more than 1.1 for each"):
        lucky(.7, candidates=1.1)


def test_policies_that_compare_see_all_candidates():
    assert lucky(2., policy=balanced(everything))[0] == 160
    assert lucky(2., policy=everything)[0] == 40
    assert lucky(2., policy=partial(misclassified, models=nets[0]))[0] == 40


@pytest.mark.parametrize('n', (45, 90, 200))
def test_photographs_are_used_evenly_over_the_whole_set(n):
    sources = dict(a=marking(1), b=[marking(2), marking(3)], c=unchanged)
    made = build_training_set(pool, sources, dict(a=.2, b=.5, c=.3), n)
    uses = np.bincount(made.rows['image'], minlength=90)
    assert uses.max()-uses.min() <= 1
    assert np.bincount(made.y).max() - np.bincount(made.y).min() <= 3


def test_a_pool_of_its_own_is_counted_by_itself():
    other = ImageSet(255-pool.images[:20], pool.labels[:20], 3)
    sources = dict(a=unchanged, b=(other, unchanged), c=(other, marking(9)))
    made = build_training_set(pool, sources, dict(a=.5, b=.25, c=.25), 80)
    theirs = made.rows['image'][made.rows.source != 'a']
    assert (np.bincount(theirs) == 2).all()
    assert made.rows['image'][made.rows.source == 'a'].is_unique


def test_even_use_after_uneven_failures():
    "A source that fails for some photographs leaves others used twice; those that follow make up for it"
    used = np.array([0, 3, 1, 0, 2, 0])
    taken = training_sets._assigned(12, pool[:6], 1, 1, used, np.random.default_rng(0))[0]
    total = used.copy()
    for i in taken:
        assert total[i] == total.min()
        total[i] += 1
    assert total.tolist() == [3]*6


@pytest.mark.parametrize('V', (3, 4, 6))
def test_every_version_meets_every_class(V):
    made = build_training_set(pool, dict(a=[marking(k) for k in range(V)]), dict(a=1.), 90)
    table = np.zeros((V, 3), int)
    np.add.at(table, (made.images[:, 0, 0, 0], made.y), 1)
    assert table.min() > 0
    assert table.max()-table.min() <= 6


def test_one_copy_for_each_network_until_its_weights_change(monkeypatch):
    seen = []
    def watched(*args, **options):
        seen.append(args[0])
        return made(*args, **options | dict(low=False))      # exact on every processor
    made = training_sets.search_copy
    monkeypatch.setattr(training_sets, 'search_copy', watched)
    net = contest_network('preactresnet18', .05)
    other = contest_network('preactresnet18', .05, seed=1)
    images = torch.rand(6, 3, 32, 32, generator=seeded())
    y = torch.eye(10)[:6]
    steps = partial(pgd, steps=3)
    run = lambda net, attack=steps: attacked(attack, net, Linf(.1))(images, y, seeded())[0]
    first = run(net)
    exact = full_pgd(net, images, y.argmax(1), Linf(.1), generator=seeded(), steps=3)
    assert (first-exact).abs().mean() < .01*(images-exact).abs().mean()
    for attack in (steps, fgsm, steps):
        run(net, attack)
        run(other, attack)
    assert len(seen) == 2
    with torch.no_grad():
        for p in net.parameters():
            p.data.mul_(1.5)
    run(net)
    assert len(seen) == 3


def test_the_network_has_the_last_word_where_the_copy_is_rounded(monkeypatch):
    "A copy that is always fooled: every image that the network still knows is attacked on the exact one"
    class Fooled(torch.nn.Module):
        low = True
        def forward(self, x): return nets[0](x).flip(1)
    fast = Fooled().eval()
    copies = {True: fast, False: Brightness(0).eval()}
    monkeypatch.setattr(training_sets, 'search_copy', lambda model, x, y, low=True: copies[low])
    monkeypatch.setattr(training_sets, '_copies', training_sets.WeakKeyDictionary())
    asked = []
    def attack(model, x, y, threat, generator=None):
        asked.append((model, len(x)))
        return x if model is fast else 1-x
    x = torch.tensor([.1, .9, .1]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    y = torch.eye(3)[[0, 2, 2]]                  # the third is wrong already
    out = attacked(attack, nets[0], Linf(1.))(x, y, seeded())[0]
    assert asked == [(fast, 3), (copies[False], 2)]
    assert torch.allclose(out[:2], 1-x[:2])
    assert torch.equal(out[2], x[2])
    assert x[0].max() < .2


def test_images_that_stop_are_fooled_and_nearer():
    x = pool.x[:30]
    y = torch.from_numpy(pool.labels[:30])
    on = lambda **options: attacked(partial(pgd, steps=8), nets[0], Linf(.6), **options)
    early, late = (f(x, y, None)[0] for f in (on(stop=True), on()))
    answers = lambda o: nets[0](o).argmax(1)
    both = (answers(early) != y.argmax(1)) & (answers(late) != y.argmax(1))
    assert both.sum() > 10
    assert (answers(early) != y.argmax(1)).equal(answers(late) != y.argmax(1))
    far = lambda o: (o-x).abs().flatten(1).amax(1)[both]
    assert (far(early) <= far(late)+1e-6).all()
    assert far(early).mean() < .7*far(late).mean()
    assert describe(on(stop=True)).endswith('stop=True)')


# ---- what a transform returns

@pytest.mark.parametrize('change, words', (
    (lambda y: y.argmax(1), r'rows of probabilities, \(10, 3\); its transform returned \(10,\)'),
    (lambda y: y*float('nan'), 'with sum 1; row 0 of the batch'), (lambda y: y-.1, 'sum 1; row 0'),
    (lambda y: y*(torch.arange(10) != 4)[:, None], 'row 4 of the batch came back as'),
    (lambda y: y[:9], 'its transform returned'), (lambda y: y.numpy(), 'returned ndarray'),
    (lambda y: y[:, :2], 'its transform returned'), (lambda y: y*2, 'sum 1')))
def test_labels_of_a_transform_are_checked_at_its_first_batch(change, words):
    asked = []
    def wrong(x, y, generator):
        asked.append(len(x))
        return x, change(y)
    with pytest.raises(ValueError, match="source 'second' failed: .*" + words):
        build_training_set(pool, dict(first=unchanged, second=wrong), dict(first=.5, second=.5), 80,
                           batch_size=10)
    assert asked == [10]


def test_images_of_a_transform_are_checked():
    for bad in (lambda x: x[:1], lambda x: x[:, :1], lambda x: x[..., :4], lambda x: x.numpy()):
        with pytest.raises(ValueError, match="source 'a' failed: `images` must come back"):
            build_training_set(pool, dict(a=lambda x, y, g: (bad(x), y)), dict(a=1.), 10)


# ---- history

def test_what_was_drawn_is_kept(tmp_path):
    snow = one_of(corruption('snow', 2), corruption('fog', 3))
    wide = ImageSet(np.repeat(np.repeat(pool.images, 4, 1), 4, 2), pool.labels, 3)
    sources = dict(a=[corruption('snow', 2), corruption('fog', 5)], b=chain(snow, gaussian_noise),
                   c=sometimes(.5, snow), d=mixup, e=attacked(fgsm, nets[0], Linf(8/255)))
    made = build_training_set(wide, sources, dict.fromkeys(sources, .2), 100, batch_size=7)
    again = load_training_set(made.save(tmp_path/'set'))
    assert again.rows.drawn.tolist() == made.rows.drawn.tolist()
    assert corruption_table(again).equals(corruption_table(made))
    assert list(corruption_table(made).columns) == [1, 2, 3, 4, 5]
    rows = made.rows.groupby('source').drawn
    assert rows.get_group('a').value_counts().to_dict() == {'snow 2': 10, 'fog 5': 10}
    assert rows.get_group('b').str.fullmatch(r'(snow 2|fog 3) sigma=[\d.e-]+').all()
    assert {*rows.get_group('c')} == {'', 'snow 2', 'fog 3'}
    assert {*rows.get_group('e')} == {'eps=0.0314'}
    by_hand = {(k, s): sum(f'{k} {s}' in o for o in made.rows.drawn)
               for k in ('snow', 'fog') for s in range(1, 6)}
    assert corruption_table(made).stack().to_dict() == by_hand
    assert "corruption('snow', 2)" in {*made.rows['transform']}
    for i in np.flatnonzero(made.rows.source == 'd'):
        partner, weight = (float(o.split('=')[1]) for o in made.rows.drawn[i].split())
        own, other = (wide.images[int(k)].astype(float) for k in (made.rows['image'][i], partner))
        assert abs(weight*own + (1-weight)*other - made.images[i]).max() < 1.5


def test_a_table_without_corruptions_is_empty():
    made = build_training_set(pool, dict(a=gaussian_noise), dict(a=1.), 10)
    assert corruption_table(made).shape == (0, 5)


# ---- resume

def test_a_killed_run_goes_on_with_the_next_source(tmp_path):
    asked = []
    def first(x, y, generator):
        asked.append('first')
        return x.flip(3), y
    def killed(x, y, generator): raise KeyboardInterrupt
    second = attacked(fgsm, nets[0], Linf(.2))
    half = dict(first=.5, second=.5)
    build = partial(build_training_set, pool, proportions=half, n=40, seed=3)
    whole = build(dict(first=first, second=second))
    with pytest.raises(KeyboardInterrupt):
        build(dict(first=first, second=killed), folder=tmp_path)
    assert len([*tmp_path.iterdir()]) == 1
    asked.clear()
    resumed = build(dict(first=first, second=second), folder=tmp_path)
    assert not asked
    assert (resumed.images == whole.images).all()
    assert (resumed.labels == whole.labels).all()
    assert resumed.rows.equals(whole.rows)
    assert not [o for o in tmp_path.iterdir() if o.suffix != '.pt']


@pytest.mark.parametrize('change', (
    dict(seed=4), dict(n=42), dict(batch_size=20), dict(select=misclassified), dict(select=among(2)),
    dict(pool=pool[1:]), dict(sources=dict(a=attacked(fgsm, nets[1], Linf(.2)))),
    dict(sources=dict(a=attacked(fgsm, nets[0], Linf(.3)))),
    dict(sources=dict(a=attacked(pgd, nets[0], Linf(.2))))))
def test_a_kept_source_answers_its_own_question_only(change, tmp_path):
    plan = dict(pool=pool, sources=dict(a=attacked(fgsm, nets[0], Linf(.2))), proportions=dict(a=1.),
                n=40)
    if change.get('select') is misclassified:
        change = dict(select=among(4, partial(misclassified, models=nets[1])))
        plan |= dict(select=among(4, partial(misclassified, models=nets[0])))
    for _ in range(2):
        build_training_set(**plan, folder=tmp_path)
    assert len([*tmp_path.iterdir()]) == 1
    other = build_training_set(**plan | change, folder=tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    assert (other.images == build_training_set(**plan | change).images).all()


def test_a_kept_source_knows_which_photographs_were_used_before(tmp_path):
    sources = dict(a=unchanged, b=marking(1))
    build_training_set(pool, sources, dict(a=.5, b=.5), 20, folder=tmp_path)
    more = partial(build_training_set, pool, sources, dict(a=.75, b=.25), 40)
    assert more(folder=tmp_path).rows.equals(more().rows)


def test_a_damaged_file_of_a_source_is_refused(tmp_path):
    build = partial(build_training_set, pool, dict(a=unchanged), dict(a=1.), 20, folder=tmp_path)
    build()
    path, = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        build()


@pytest.mark.parametrize('change, words', (
    (dict(sources=dict(a=3)), "`sources` must hold transforms .* 'a' is 3"),
    (dict(sources=dict(a=[unchanged, None])), '`sources` must hold transforms'),
    (dict(select=3), '`select` must be a policy .* got 3'),
    (dict(select=dict(a='all')), "`select` .* got 'all'")))
def test_what_cannot_be_called_is_refused_before_anything_is_made(change, words):
    with pytest.raises(TypeError, match=words):
        build_training_set(**dict(pool=pool, sources=dict(a=unchanged), proportions=dict(a=1.), n=9) | change)


def test_pages_need_a_history():
    for show in (summary, contact_sheet, partial(set_card, path='none.html')):
        with pytest.raises(TypeError, match='`data` must be a `TrainingSet`'):
            show(pool)
    with pytest.raises(ValueError, match='`proportions` must not be negative'):
        apportion(dict(a=-1., b=2.), 9)


def test_options_are_arguments_that_can_be_seen():
    for make in (build_training_set, build_bank, hidden_set, held_out_set):
        parameters = inspect.signature(make).parameters
        assert 'folder' in parameters
        assert all(o.kind is o.POSITIONAL_OR_KEYWORD for o in parameters.values()), 'nothing is hidden in **'
    with pytest.raises(TypeError, match='unexpected keyword'):
        build_training_set(pool, dict(a=unchanged), dict(a=1.), 20, batchsize=3)


def test_a_bank_and_hidden_images_are_kept_in_a_folder(tmp_path):
    sources = dict(a=unchanged, b=gaussian_noise)
    bank = [build_bank(pool, sources, 20, folder=tmp_path/'bank', batch_size=k) for k in (10, 10, 20)]
    assert len([*(tmp_path/'bank').iterdir()]) == 4, 'the size of a batch is part of the question'
    assert (bank[0]['b'].images == bank[1]['b'].images).all()
    assert (bank[0]['b'].images != bank[2]['b'].images).any()
    noisy = dict(clean=.5, noise=.5)
    large = ImageSet(np.repeat(np.repeat(pool.images, 2, 1), 2, 2), pool.labels, 3)
    hidden = [hidden_set(large, dict(a=nets[0]), 20, effort=.05, proportions=noisy, folder=f)
              for f in (None, tmp_path/'hidden', tmp_path/'hidden')]
    assert len([*(tmp_path/'hidden').iterdir()]) == 2
    assert all((o.images == hidden[0].images).all() and o.rows.equals(hidden[0].rows) for o in hidden)


def test_a_transform_that_draws_elsewhere_gives_the_same_set_again():
    def light(x, y, generator):
        shade = random.random()*np.random.rand()*torch.rand(())
        return x*float(shade), y
    grey = ImageSet(np.full_like(pool.images, 200), pool.labels, 3)
    build = partial(build_training_set, grey, dict(a=light), dict(a=1.), 30, batch_size=10)
    make = lambda seed: build(seed=seed).images
    assert (make(0) == make(0)).all()
    assert (make(0) != make(1)).any()
    assert len(np.unique(make(0))) == 3, 'each batch draws its own'


def test_candidates_of_another_round_are_drawn_anew():
    def color(x, y, generator):
        return torch.rand(len(x), 3, 1, 1, generator=generator).expand_as(x).clone(), y
    rounds = []
    def half(images, labels, rows, n, generator):
        rounds.append(len(images))
        return np.arange(len(images))[::2][:n]
    half.one_by_one = True
    made = build_training_set(pool, dict(a=color), dict(a=1.), 30, select=among(4, half))
    assert len(rounds) > 1
    assert len(np.unique(made.images[:, 0, 0], axis=0)) == 30


def test_another_pass_over_the_pool_has_an_order_of_its_own():
    seen = []
    def look(x, labels, rows, n, generator):
        seen.append(rows['image'].to_numpy())
        return np.arange(n)
    build_training_set(pool, dict(a=unchanged), dict(a=1), 180, select=look)
    first, second = seen[0][:90], seen[0][90:]
    assert {*first} == {*second} == {*range(90)}
    assert (first == second).mean() < .2


class OffGrid(torch.nn.Module):
    "Class 1 for images with a pixel between two grey levels"
    def forward(self, x):
        off = (255*x - (255*x).round()).abs().flatten(1).amax(1)
        return torch.stack([off < .1, off >= .1, off > 9], 1).float()


def test_success_is_that_of_the_image_as_it_is_stored():
    def lift(x, y, generator): return (x + .2/255).clamp(0, 1), y
    lift.model = OffGrid().eval()
    zeros = ImageSet(pool.images//2, np.zeros(90, int), 3)
    x, _ = lift(zeros.x, None, None)
    assert (lift.model(x).argmax(1) == 1).all(), 'before it is rounded the network is wrong'
    assert not build_training_set(zeros, dict(a=lift), dict(a=1.), 9).rows.success.any()


def test_only_a_whole_label_is_hard():
    def soft(x, y, generator): return x, .95*y + .05/3
    made = build_training_set(pool, dict(a=soft, b=unchanged), dict(a=.5, b=.5), 30)
    assert summary(made).hard_labels.tolist() == [0, 1]
