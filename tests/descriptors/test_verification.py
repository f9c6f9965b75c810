"""Rates of a face system against loops over all pairs and thresholds, closed forms, and attacks
that must not succeed."""
import importlib.machinery, io, itertools, sys, types, warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from robustnb.core import to_uint8
from robustnb.descriptors import verification as V
from robustnb.descriptors.verification import (
    dodging_rate, equal_error_rate, false_accept_rate, image_changes, image_quality,
    impersonation_rate, match_shares, pair_distances, rank_one, survival, threshold_at,
    true_accept_rate, verification_table)
from helpers_descriptors import pictures, windowed

rng = np.random.default_rng(0)
who = np.array(list('aaabbbbccd'))
points = rng.normal(size=(10, 3))
grid = rng.integers(4, size=(10, 2)).astype(float)       # with ties


def apart(a, b): return float(np.sqrt(((np.asarray(a)-np.asarray(b))**2).sum()))


def lists(points, who):
    "Distances of same and other pairs, pair by pair"
    out = [], []
    for i, j in itertools.combinations(range(len(points)), 2):
        out[who[i] != who[j]].append(apart(points[i], points[j]))
    return out


@pytest.mark.parametrize('points', [points, grid])
def test_pairs_are_those_of_a_loop(points):
    for got, want in zip(pair_distances(torch.tensor(points), who), lists(points, who)):
        assert np.allclose(sorted(got), sorted(want), atol=1e-12)
    assert [len(o) for o in pair_distances(points, who)] == [3+6+1, 45-10]


@pytest.mark.parametrize('points', [points, grid])
@pytest.mark.parametrize('far', [0, .03, .1, .5, .99])
def test_the_threshold_is_the_largest_that_keeps_the_rate(points, far):
    same, other = lists(points, who)
    t = threshold_at(far, other)
    share = lambda t: np.mean([o < t for o in other])
    assert share(t) <= far
    assert share(np.nextafter(t, np.inf)) > far
    assert true_accept_rate(same, other, far) == np.mean([o < t for o in same])


def slow_eer(same, other):
    found = []
    for t in sorted({*same, *other, np.inf}):
        wrong_in = Fraction(sum(o < t for o in other), len(other))
        wrong_out = Fraction(sum(not o < t for o in same), len(same))
        found.append((abs(wrong_in-wrong_out), t, (wrong_in+wrong_out)/2))
    return float(min(found)[2])


def test_the_equal_error_rate_is_that_of_a_loop():
    for seed in range(30):
        r = np.random.default_rng(seed)
        same = r.integers(0, 9, size=r.integers(1, 12)).tolist()
        other = (r.integers(0, 9, size=r.integers(1, 12)) + seed % 4).tolist()
        assert equal_error_rate(same, other) == pytest.approx(slow_eer(same, other), abs=1e-12)
    assert equal_error_rate([1, 2, 3], [4, 5]) == 0
    assert equal_error_rate([4, 5], [1, 2]) == 1
    normal = rng.normal(size=(2, 20_000)) + 20
    # two normal laws, two deviations apart: each errs beyond one deviation
    assert equal_error_rate(normal[0], normal[1] + 2) == pytest.approx(.1587, abs=.005)


def test_too_few_strangers_cannot_tell_a_rate():
    _, other = lists(points, who)
    assert threshold_at(1/35, other) == sorted(other)[1]
    with pytest.raises(ValueError, match='`far` must be 0, or at least 1/35'):
        threshold_at(.001, other)
    for bad in (-.1, 1, float('nan')):
        with pytest.raises(ValueError, match=r'`far` must lie in \[0, 1\)'):
            threshold_at(bad, other)
    for bad in ([], [-1.], [np.nan], [np.inf]):
        with pytest.raises(ValueError, match='`other` must be distances'):
            threshold_at(.5, bad)
        with pytest.raises(ValueError, match='`same` must be distances'):
            equal_error_rate(bad, other)


def test_strangers_who_match_are_worth_a_warning():
    other = np.arange(1, 101)/100
    with pytest.warns(UserWarning, match='60% of the pairs of strangers match .* Align the faces'):
        assert false_accept_rate(other, .605) == .6
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert false_accept_rate(other, .025) == .02
        assert false_accept_rate(other, .605, most=.6) == .6
    for bad in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='`threshold` must be a distance above 0'):
            false_accept_rate(other, bad)


def test_rank_one_is_that_of_a_loop():
    hits = []
    for i in range(len(points)):
        if (who == who[i]).sum() > 1:
            near = min((apart(points[i], points[j]), j) for j in range(len(points)) if j != i)[1]
            hits.append(who[near] == who[i])
    assert len(hits) == 9
    assert rank_one(points, who) == np.mean(hits)
    with pytest.raises(ValueError, match='a person with at least 2 images'):
        rank_one(points, range(10))


def test_the_table_says_what_the_functions_say():
    same, other = pair_distances(points, who)
    with pytest.warns(UserWarning, match='strangers match'):
        row = verification_table(points, who, np.median(other) + 1e-9)
    assert row.eer == equal_error_rate(same, other)
    assert row.rank_one == rank_one(points, who)
    assert row.far == 18/35
    assert (row.images, row.identities) == (10, 4)
    assert np.isnan([row.tar_1, row.threshold_01]).all()
    assert 'far' not in verification_table(points, who)
    many = rng.normal(size=(80, 4))
    names = np.arange(80) % 40
    row = verification_table(many, names)
    assert row.tar_01 == true_accept_rate(*pair_distances(many, names), .001)
    assert row.threshold_1 == threshold_at(.01, pair_distances(many, names)[1])


@pytest.mark.parametrize('by_person', [False, True])
def test_impersonation_and_dodging_are_those_of_loops(by_person):
    attacked = np.random.default_rng(5).normal(size=(6, 3))
    wanted = list('abcdab')
    t = 1.3
    each = []
    for a, person in zip(attacked, wanted):
        hits = [apart(a, g) < t for g, k in zip(points, who) if k == person]
        each.append(any(hits) if by_person else sum(hits)/len(hits))
    assert 0 < np.mean(each) < 1
    given = attacked, wanted, points, who, t
    assert impersonation_rate(*given, by_person) == pytest.approx(np.mean(each))
    assert dodging_rate(*given, by_person) == pytest.approx(1-np.mean(each))
    if not by_person:
        assert np.allclose(match_shares(*given), each)


def test_the_ends_of_an_attack():
    "An image that stays impersonates nobody; one that is another's image is that person"
    centres = 10*np.eye(4)
    faces = centres[np.arange(40) % 4] + .01*rng.normal(size=(40, 4))
    names = np.arange(40) % 4
    rest = slice(4, None)
    known = faces[rest], names[rest], 1.
    assert impersonation_rate(faces[:4], [1, 2, 3, 0], *known) == 0
    assert dodging_rate(faces[:4], names[:4], *known) == 0
    assert impersonation_rate(faces[[5, 6, 7, 4]], [1, 2, 3, 0], *known) == 1
    assert dodging_rate(faces[[5, 6, 7, 4]], names[:4], *known) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`gallery` must hold an image of every person; .* 'z'"):
        impersonation_rate(points[:1], ['z'], points, who, 1)
    with pytest.raises(ValueError, match='descriptors of one length; got 2 and 3'):
        match_shares(points[:1, :2], ['a'], points, who, 1)
    with pytest.raises(ValueError, match='`threshold` must be a distance above 0'):
        match_shares(points[:1], ['a'], points, who, 0)
    holed = points.copy()
    holed[3, 1] = np.nan
    with pytest.raises(ValueError, match='`descriptors` must be finite; row 3'):
        pair_distances(holed, who)
    with pytest.raises(ValueError, match='`attacked` must be finite; row 3'):
        match_shares(holed, who, points, who, 1)
    for bad in (points[:, 0], points[:0], points[:9]):
        with pytest.raises(ValueError, match=r'`descriptors` must be \(N,D\), with `identities`'):
            rank_one(bad, who)
    for bad in (['a']*10, range(10)):
        with pytest.raises(ValueError, match='`identities` must have at least 2 persons'):
            pair_distances(points, bad)


# ---- what survives

def test_the_changes_are_what_their_names_say():
    x = pictures(3, 20, width=24)
    assert list(image_changes) == ['as it is', 'JPEG 75', 'half size and back', 'shift by 3 pixels', 'mirror']
    out = {k: f(x) for k, f in image_changes.items()}
    assert all(o.shape == x.shape and 0 <= o.min() and o.max() <= 1 for o in out.values())
    assert torch.equal(out['as it is'], x)
    assert torch.equal(out['mirror'], x[..., range(23, -1, -1)])
    assert torch.equal(out['shift by 3 pixels'][:, :, 3:, 3:], x[:, :, :-3, :-3])
    assert torch.equal(out['shift by 3 pixels'][:, :, :3, :3], x[:, :, :1, :1].expand(-1, -1, 3, 3))
    for a, o in zip(to_uint8(x), to_uint8(out['JPEG 75'])):
        f = io.BytesIO()
        Image.fromarray(a).save(f, 'jpeg', quality=75)
        assert np.array_equal(o, np.asarray(Image.open(f)))
    checks = (torch.arange(20)[:, None] + torch.arange(24)) % 2
    flat = image_changes['half size and back'](checks[None, None].expand(1, 3, -1, -1).float())
    assert abs(flat[..., 4:-4, 4:-4]-.5).max() < .1          # the finest pattern is gone
    even = torch.full((1, 3, 9, 7), .3)
    assert torch.allclose(image_changes['half size and back'](even), even, atol=1e-6)


def test_survival_asks_every_box_with_every_change():
    x = pictures(12, 16, seed=1)
    names = np.arange(12) % 3
    boxes = dict(near=lambda o: o[:, :, 4:12:4, 4:12:4].flatten(1),
                 served=lambda o: o.mean((2, 3)).numpy())
    cut = dict(near=.5, served=.1)
    rest = np.arange(3, 12)
    table = survival(boxes, cut, x[:3], names[:3], [1, 2, 0], x[rest], names[rest])
    assert list(table) == ['box', 'change', 'images', 'impersonation', 'dodging']
    assert len(table) == 10
    assert (table.images == 3).all()
    for row in table.itertuples():
        box = lambda o: np.asarray(boxes[row.box](torch.tensor(to_uint8(o)/255).permute(0, 3, 1, 2).float()))
        said = box(image_changes[row.change](x[:3]))
        known = box(x[rest]), names[rest], cut[row.box]
        assert row.impersonation == pytest.approx(impersonation_rate(said, [1, 2, 0], *known))
        assert row.dodging == pytest.approx(dodging_rate(said, names[:3], *known))
    assert table.impersonation.nunique() > 2
    own = survival(boxes, cut, x[:3], names[:3], [1, 2, 0], x[rest], names[rest],
                   dict(black=torch.zeros_like))
    assert own.change.tolist() == ['black']*2
    assert own.dodging.tolist() == [1, 1]
    for thresholds in ({}, dict(near=.5)):
        with pytest.raises(ValueError, match='one for each of `boxes`'):
            survival(boxes, thresholds, x[:3], names[:3], [1, 2, 0], x[rest], names[rest])


# ---- what can be seen

def test_quality_is_that_of_the_files():
    x = pictures(3, 16)
    x_adv = x.clone()
    x_adv[1] = (x[1] + torch.randn(x[1].shape, generator=torch.Generator().manual_seed(0))/30).clamp(0, 1)
    x_adv[2, 0, 3, 4] = 1 - x[2, 0, 3, 4].round()
    rows = image_quality(x, x_adv)
    assert list(rows) == ['grey_levels', 'ssim']
    for a, b, row in zip(to_uint8(x), to_uint8(x_adv), rows.itertuples()):
        assert row.grey_levels == max(abs(int(p)-int(q)) for p, q in zip(a.ravel(), b.ravel()))
        assert row.ssim == pytest.approx(windowed(a, b), abs=1e-9)
    assert rows.grey_levels[0] == 0
    assert rows.grey_levels[2] > 127
    with pytest.raises(ValueError, match='`x_adv` must be images like `x`'):
        image_quality(x, x_adv[:2])


def test_lpips_is_asked_where_it_is_installed(monkeypatch):
    asked = []
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == 'alex'
        def forward(self, x, x_adv, normalize):
            asked.append((self.training, normalize))
            return (x-x_adv).abs().amax((1, 2, 3), keepdim=True)
    module = types.ModuleType('lpips')
    module.LPIPS = LPIPS
    module.__spec__ = importlib.machinery.ModuleSpec('lpips', None)
    x = pictures(3, 16)
    monkeypatch.setitem(sys.modules, 'lpips', module)
    rows = image_quality(x, 1-x)
    assert asked == [(False, True)]
    assert np.allclose(rows.perceptual, rows.grey_levels/255)
    assert (image_quality(x, x, lambda a, b: torch.ones(len(a))).perceptual == 1).all()
    assert len(asked) == 1
    monkeypatch.setattr(V.importlib.util, 'find_spec', lambda name: None)
    assert 'perceptual' not in image_quality(x, 1-x)


def test_reversed_descriptors_and_missing_names():
    there, back = pair_distances(points, who), pair_distances(points[::-1], who[::-1])
    assert all(np.allclose(np.sort(a), np.sort(b)) for a, b in zip(there, back))
    names = who.astype(object)
    for lost in (None, np.nan):
        names[3] = lost
        with pytest.raises(ValueError, match='`identities` must say whose each image is; that of row 3'):
            pair_distances(points, names)
    with pytest.raises(ValueError, match='`persons` must say'):
        match_shares(points, names, points, who, 1.)
