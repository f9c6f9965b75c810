"""Threat models: projections against the definition of nearest, closed forms on linear models,
random starts."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq
from torch import nn

from robustnb.attacks.adaptive_pgd import apgd, apgd_targeted
from robustnb.attacks.gradient import fgsm, full_pgd, margin, pgd
from robustnb.attacks.standard import autoattack, cascade
from robustnb.attacks.score_based import one_pixel, random_search, square
from robustnb.core import make_generator
from robustnb.attacks.minimum_norm import carlini_wagner, deepfool, fab
from robustnb.attacks.transferable import di_fgsm, mi_fgsm, ni_fgsm, si_fgsm, ti_fgsm, vmi_fgsm
from robustnb.attacks.perceptual import advdrop, recolor, wasserstein
from robustnb.attacks.threat_models import L0, L1, L2, Linf, _mask_of_largest
from robustnb.attacks.ssim_rule import SSIM, ssim
from helpers_attacks import Linear, dot, gain, grey, linear, rand, randn

checked = settings(deadline=None, derandomize=True, max_examples=50)
balls = (Linf, L2, L1)
nan = float('nan')
lengths = {Linf: lambda d: abs(d).reshape(len(d), -1).max(1),
           L2: lambda d: (d.reshape(len(d), -1)**2).sum(1)**.5,
           L1: lambda d: abs(d).reshape(len(d), -1).sum(1)}
duals = {Linf: lambda g: g.abs().flatten(1).sum(1), L2: lambda g: g.flatten(1).norm(dim=1),
         L1: lambda g: g.abs().flatten(1).amax(1)}


@st.composite
def problems(draw, kinds=(Linf, L2, L1, SSIM), scales=(1e-7, 1e-3, .1, 1, 30, 1e6, 1e30),
             dtypes=(np.float32, np.float64)):
    "A threat, images with many pixels on the border of the range, and points near and far"
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from(scales))
    threat = kind(draw(st.sampled_from((.5, .9, .99, 1) if kind is SSIM else (
        0, 1e-6, .01, .3, 1) if kind is Linf else (0, 1e-6, .01, .3, 2, 50))))
    low = 7 if kind is SSIM else 1
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(low, low+2),
                           st.integers(low, low+2)))
    bits = 8*np.dtype(dtype).itemsize
    values = lambda lo, hi: st.one_of(st.sampled_from((float(lo), float(hi), .5)),
                                      st.floats(lo, hi, width=bits))
    x = draw(arrays(dtype, shape, elements=values(0, 1)))
    move = draw(arrays(dtype, shape, elements=values(-1, 1)))
    return threat, torch.from_numpy(x), torch.from_numpy(x + dtype(scale)*move)


@checked
@given(problems())
def test_projected_images_are_allowed_and_stay(problem):
    threat, x, far = problem
    before = (x.clone(), far.clone())
    rounding = 2e-7 if x.dtype == torch.float32 else 1e-15
    near = threat.project(x, far)
    assert torch.equal(before[0], x)
    assert torch.equal(before[1], far)
    assert near.dtype == x.dtype
    assert near.shape == x.shape
    assert near.isfinite().all()
    assert threat.allows(x, near).all()
    assert near.min() >= 0
    assert near.max() <= 1
    if isinstance(threat, SSIM):
        assert (ssim(x.double(), near.double()) >= threat.level - 5e-7).all()
    else:
        most = threat.eps*(1 + 2*rounding) + x[0].numel()*rounding
        assert (lengths[type(threat)]((near-x).double().numpy()) <= most).all()
    moved = (threat.project(x, near)-near).abs().max()
    assert moved <= (1e-4 if isinstance(threat, SSIM) else 8*rounding)


@checked
@given(problems(scales=(1e-7, 1e-3, .02, .3)))
def test_images_already_inside_come_back_unchanged(problem):
    threat, x, far = problem
    goal = far.clamp(0, 1)
    if isinstance(threat, SSIM):
        inside = threat.distance(x.double(), goal.double()) <= threat.eps
    else:
        inside = torch.from_numpy(lengths[type(threat)]((goal-x).double().numpy()) <= threat.eps)
    moved = (threat.project(x, goal)-goal)[inside].abs()
    assert (moved <= (0 if isinstance(threat, (L1, SSIM)) else torch.finfo(x.dtype).eps)).all()
    assert torch.equal(threat.project(x, x), x)


@checked
@given(problems(kinds=balls, scales=(1e-3, .1, 1, 30), dtypes=(np.float64,)), st.integers(0, 1000))
def test_nearest_of_all_allowed_images(problem, seed):
    "No allowed image lies beyond the plane through the projection that faces the far point"
    threat, x, far = problem
    if isinstance(threat, L2):
        # L2 is clamped afterwards: keep the range out of it
        x, far, threat = .3 + .4*x, .3 + .4*x + (far-x), L2(min(threat.eps, .29))
    near = threat.project(x, far)
    beyond = lambda o: (dot(far-near, o-near)/(1 + (far-near).flatten(1).norm(dim=1))).max()
    for k in range(6):
        inside = rand(*x.shape, seed=seed+k)
        noise = randn(*x.shape, seed=seed+k)
        for o in (inside, x + noise, near + .1*noise, near + .5*(far-x)*inside):
            assert beyond(threat.project(x, o)) < 1e-9
        assert beyond(threat.sample(x, make_generator(seed+k))) < 1e-9
    corners = x + threat.eps*threat.steepest(far-near)
    assert beyond(threat.project(x, corners)) < 1e-9


@checked
@given(problems(kinds=(L1,), scales=(1e-3, .1, 1, 30, 1e4)))
def test_l1_projection_is_the_slow_one(problem):
    threat, x, far = problem
    for a, b, near in zip(x.double().numpy(), far.double().numpy(),
                          threat.project(x, far).double().numpy()):
        size, cap = abs(b-a), abs(b.clip(0, 1)-a)
        kept = lambda t: np.minimum(np.maximum(size-t, 0), cap)
        if cap.sum() <= threat.eps:
            t = 0.
        elif threat.eps == 0:
            t = size.max()
        else:
            over = lambda t: kept(t).sum()-threat.eps
            t = brentq(over, 0, size.max(), xtol=1e-15, rtol=1e-15)
        assert abs(near - a - kept(t)*np.sign(b-a)).max() < (
            3e-7 if x.dtype == torch.float32 else 1e-8*max(1, size.max()/30))


def test_l1_projection_of_known_points():
    x = torch.tensor([0., .5, .95, .2]).view(1, 1, 1, 4)
    far = torch.tensor([.5, .9, 3., .25]).view(1, 1, 1, 4)
    for eps, change in ((.55, (.3, .2, .05, 0)), (.75, (.4, .3, .05, 0)),
                        (.05, (0, 0, .05, 0)), (1., (.5, .4, .05, .05)), (0, (0, 0, 0, 0))):
        assert torch.allclose(L1(eps).project(x, far), x + torch.tensor(change), atol=1e-7), eps


@pytest.mark.parametrize('value', (3e38, float('inf'), -float('inf')))
@pytest.mark.parametrize('threat', (Linf(.1), L1(2.), SSIM(.9)), ids=repr)
def test_points_out_of_reach(threat, value):
    x = rand(2, 1, 8, 8, dtype=torch.float32)
    assert threat.allows(x, threat.project(x, torch.full_like(x, value))).all()


def test_the_memory_layout_does_not_matter():
    x = rand(3, 3, 9, 8)
    far = randn(3, 3, 9, 8)
    g = randn(3, 3, 9, 8, seed=1)
    other = lambda o: o.to(memory_format=torch.channels_last)
    for threat in (Linf(.1), L2(1.), L1(5.), SSIM(.9)):
        near = threat.project(x, far)
        assert torch.allclose(threat.project(other(x), other(far)), near)
        assert torch.allclose(threat.project(other(x), far), near)
        assert torch.allclose(threat.steepest(other(g), other(x), other(near)),
                              threat.steepest(g, x, near))
        assert torch.equal(threat.sample(other(x), make_generator(0)),
                           threat.sample(x, make_generator(0)))


@pytest.mark.parametrize('threat', (Linf(.15), L2(.3), L1(.5)), ids=repr)
def test_projection_is_the_nearest_image_of_the_ball(threat):
    x = .3 + .4*rand(30, 1, 2, 2)
    far = x + .15*randn(30, 1, 2, 2)
    near = threat.project(x, far)
    others = torch.stack([threat.sample(x, make_generator(k)) for k in range(300)])
    length = lambda a: (a-far).flatten(-3).norm(dim=-1)
    assert (length(near) <= length(others).amin(0) + 1e-12).all()
    inside = threat.distance(x, far) <= threat.eps
    assert 0 < inside.sum() < 30
    assert (near-far)[inside].abs().max() < 1e-12
    assert (threat.distance(x, near) <= threat.eps + 1e-12).all()
    assert (length(near)[~inside] > 1e-6).all()


@pytest.mark.parametrize('size', (32, 224))
@pytest.mark.parametrize(
    'threat', (L2(.1), L2(.5), L2(3.), L2(20.), L2(50.), L1(12), L1(900.), Linf(8/255)), ids=repr)
def test_projected_images_are_allowed_at_every_size(size, threat):
    x = rand(2, 3, size, size, dtype=torch.float32)
    # the same rounding error in each pixel
    x[0] = .5
    far = 1-x.round()
    near = threat.project(x, far)
    start = threat.sample(x, make_generator(0))
    assert threat.allows(x, near).all()
    assert threat.allows(x, start).all()
    free = threat.distance(x, far) > threat.eps
    over = x + (near-x)*1.01
    assert (threat.distance(x, near) > .999*threat.eps)[free].all()
    assert not threat.allows(x, over)[free].any()


@pytest.mark.parametrize('threat', (Linf(.1), L2(2.), L1(3.), SSIM(.97)), ids=repr)
def test_what_is_not_allowed(threat):
    x = good = rand(4, 3, 8, 8, dtype=torch.float32).clamp(.01, .99)
    assert threat.allows(x, x).all()
    assert threat.distance(x, x).max() == 0
    one = lambda value: good.index_put(
        (torch.tensor([2]), torch.tensor([1]), torch.tensor([3]), torch.tensor([3])),
        torch.tensor(value))
    x[2, 1, 3, 3] = .995
    assert threat.allows(x, one(1.)).all(), 'above white, though near'
    assert threat.allows(x, one(1.01)).tolist() == [
        True, True, False, True], 'above white, though near'
    x[2, 1, 3, 3] = .005
    assert threat.allows(x, one(0.)).all(), 'below black'
    assert threat.allows(x, one(-.01)).tolist() == [True, True, False, True], 'below black'
    assert threat.allows(x, one(nan)).tolist() == [True, True, False, True]
    assert not threat.allows(x, x + 2*threat.eps).any()
    assert not threat.allows(x, 1-x).any()


def test_tolerance_is_that_of_rounding():
    x = .5*rand(3, 3, 32, 32, dtype=torch.float32)
    one = lambda value: x + nn.functional.pad(torch.full((1, 1, 1, 1), value), (5, 26, 7, 24))
    for threat in (Linf(0), L2(0), L1(0)):
        assert threat.allows(x, one(1e-7)).all()
        assert not threat.allows(x, one(5e-6)).any()
    assert not L1(.4).allows(x, one(.14)).any()
    assert L1(.43).allows(x, one(.14)).all()
    grey = torch.arange(256.).view(1, 1, 16, 16)
    for a, b in ((grey/255, (grey+8).clamp_max(255)/255), (grey/255, (grey-8).clamp_min(0)/255)):
        assert Linf(8/255).allows(a, b)
        assert not Linf(7.99/255).allows(a, b)


refused = {
    'grey levels': (Linf, 8, '8/255'),
    'negative Linf': (Linf, -.1, r'`eps` must be in \[0, 1\].*got -0.1.*8/255'),
    'NaN Linf': (Linf, nan, 'got nan.*8/255'), 'negative L2': (L2, -1, 'got -1.*8/255'),
    'NaN L2': (L2, nan, '8/255'),
    'negative L1': (L1, -1e-9, '`eps` must be finite and not negative'),
    'NaN L1': (L1, nan, 'got nan'), 'words': (Linf, '8/255', "must be a number.*got '8/255'"),
    'endless L2': (L2, float('inf'), 'finite'), 'endless L1': (L1, float('inf'), 'finite'),
    'no level': (SSIM, 0, r'`level` must be in \(0, 1\].*got 0'),
    'percent': (SSIM, 95, 'got 95.*usual limit is .95'),
    'level below zero': (SSIM, -.5, 'got -0.5'), 'NaN level': (SSIM, nan, 'got nan')}


@pytest.mark.parametrize('case', refused)
def test_budgets_in_other_units_are_refused(case):
    kind, value, words = refused[case]
    with pytest.raises((ValueError, TypeError), match=words):
        kind(value)


@pytest.mark.parametrize('attack',
                         (fgsm, pgd, apgd, apgd_targeted, mi_fgsm, ni_fgsm, di_fgsm, ti_fgsm,
                          si_fgsm, vmi_fgsm, deepfool, fab, carlini_wagner, random_search,
                          square, one_pixel, autoattack, cascade, advdrop, wasserstein, recolor))
def test_a_bare_number_is_no_threat(attack):
    with pytest.raises(TypeError, match='`threat` must be .*0.03'):
        attack(Linear(torch.ones(12)).eval(), rand(2, 3, 2, 2, dtype=torch.float32),
               torch.zeros(2, dtype=torch.int64), .03)


def test_budgets_at_the_ends_of_the_range_are_fine():
    x = rand(2, 1, 8, 8)
    assert SSIM(1).eps == 0
    assert SSIM(.95).eps == pytest.approx(.05)
    assert L1(1e6).eps == 1e6
    for threat in (Linf(0), L2(0), L1(0), SSIM(1)):
        assert torch.equal(threat.project(x, 1-x), x)
        assert torch.equal(threat.sample(x, make_generator(0)), x)
    for threat in (Linf(1), L2(100.), L1(1e6)):
        assert (threat.project(x, 1-x) - (1-x)).abs().max() < 1e-15


@pytest.mark.parametrize('threat', (Linf(8/255), L2(.2), L1(.25)), ids=repr)
def test_closed_form_on_a_linear_model(threat):
    "The best gain is `eps` times the dual norm of the weights where no pixel meets the end of the range"
    x = .3 + .4*rand(8, 3, 6, 6)
    w = randn(1, 3, 6, 6)
    best = threat.eps*duals[type(threat)](w)
    found = gain(full_pgd, x, w, threat, steps=40, step_size=threat.eps/4)
    assert (found <= best + 1e-9).all()
    assert (found > .999*best).all()
    assert (gain(full_pgd, x, w, threat, steps=1, step_size=.1*threat.eps) < .11*best).all(), (
        'a step too short must not get there')
    if not isinstance(threat, L1):
        assert ((gain(fgsm, x, w, threat) - best).abs() < 1e-9).all()


def knapsack(x, w, eps):
    """The exact optimum of a linear loss over the L1 ball and the range of the pixels: the largest
    weights first, each to the end of the range"""
    room = torch.where(w > 0, 1-x, x).flatten(1)
    order = w.abs().flatten(1).expand_as(room).argsort(1, descending=True)
    room, size = room.gather(1, order), w.abs().flatten(1).expand_as(room).gather(1, order)
    spent = (eps - (room.cumsum(1)-room)).clamp_min(0).minimum(room)
    return (spent*size).sum(1)


@pytest.mark.parametrize('eps', (.3, 4., 12., 40., 1000.))
def test_l1_where_the_range_of_the_pixels_binds(eps):
    x = rand(8, 3, 8, 8)
    w = randn(1, 3, 8, 8)
    threat = L1(eps)
    best = knapsack(x, w, eps)
    assert eps < 1 or (best < .95*eps*w.abs().max()).all(), 'the range binds'
    far = threat.project(x, x + 3e4*w)
    assert torch.allclose(dot(far-x, w.expand_as(x)), best, rtol=1e-6), (
        'the projection of a point very far along the weights is the optimum')
    found = gain(full_pgd, x, w, threat, steps=150, step_size=eps/20)
    assert (found <= best + 1e-9).all()
    assert (found > .985*best).all()


@checked
@given(st.sampled_from(balls), st.integers(0, 10_000), st.sampled_from((1e-25, 1e-3, 1., 1e6)),
       st.booleans())
def test_steepest_is_dual_to_the_length(kind, seed, scale, ties):
    g = scale*randn(4, 2, 3, 3, seed=seed)
    if ties:
        g = scale*(g/scale).round()
    g[1], g[2] = 0, scale
    step = kind(.5).steepest(g)
    length = torch.from_numpy(lengths[kind](step.numpy()))
    assert torch.allclose(length, (g.abs().flatten(1).amax(1) > 0).double(),
                          atol=1e-6), 'of length one, or none where the gradient is zero'
    assert torch.allclose(dot(g, step), duals[kind](g), rtol=1e-9, atol=0)
    for k in range(5):
        other = randn(4, 2, 3, 3, seed=seed+k)
        gained = dot(g, other)/torch.from_numpy(lengths[kind](other.numpy()))
        assert (gained <= dot(g, step)*(1+1e-9)).all()
    if kind is not L1:
        assert torch.equal(step, kind(.5).steepest(g, rand(4, 2, 3, 3), rand(4, 2, 3, 3, seed=1)))


def test_the_steepest_direction_has_length_one_even_where_the_gradient_is_tiny():
    grad = randn(4, 3, 8, 8,
                 dtype=torch.float32)*torch.tensor([1., 1e-10, 1e-25, 0.]).view(4, 1, 1, 1)
    for step in (L2(1.).steepest(grad), SSIM(.9).steepest(grad)):
        assert torch.allclose(step.flatten(1).norm(dim=1), torch.tensor([1., 1., 1., 0.]),
                              atol=1e-5)
    assert torch.equal(Linf(1.).steepest(grad)[:3].abs(), torch.ones(3, 3, 8, 8))
    assert not Linf(1.).steepest(grad)[3].any()
    assert L1(1.).steepest(grad).flatten(1).abs().sum(1).tolist() == [1, 1, 1, 0]
    x = rand(1, 3, 8, 8, dtype=torch.float32).expand(4, -1, -1, -1)
    g = grad[:1]*torch.tensor([1., 1e-10, 1e-25, 0.]).view(4, 1, 1, 1)
    preconditioned = SSIM(.9).steepest(g, x, x)
    assert torch.allclose(preconditioned[:3], preconditioned[:1].expand(3, -1, -1, -1), rtol=1e-4)
    assert not preconditioned[3].any()
    assert preconditioned[0].norm() > .1


def slow_sparse_step(g, x, now):
    "One image, one coordinate after the other"
    g, x, now = (o.flatten().tolist() for o in (g, x, now))
    changed = sum(abs(a-b) > 1e-9 for a, b in zip(now, x))
    n = len(g)
    k = int(max(1, min(changed/1.5 if changed else .2*n, .2*n)))
    able = [i for i in range(n) if g[i] > 0 and now[i] < 1 or g[i] < 0 and now[i] > 0]
    best = sorted(able, key=lambda i: (-abs(g[i]), i))[:k]
    return [(1 if g[i] > 0 else -1)/len(best) if i in best else 0. for i in range(n)]


def test_the_sparse_step_of_l1():
    x = rand(7, 2, 5, 5)
    g = randn(7, 2, 5, 5)
    now = x.clone()
    now.flatten(1)[1, :1] = .5
    now.flatten(1)[2, :4] = .5
    now.flatten(1)[3, :12] = .5
    now[4] = .5
    # nothing has room left
    now[5] = (g[5] > 0).double()
    # one pixel has
    now[6] = (g[6] > 0).double()
    now.flatten(1)[6, 7] = .5
    step = L1(3.).steepest(g, x, now)
    for i in range(7):
        assert np.allclose(step[i].flatten(), slow_sparse_step(g[i], x[i], now[i])), i
    assert (step != 0).flatten(1).sum(1).tolist() == [10, 1, 2, 8, 10, 0, 1]
    assert torch.allclose(step.abs().flatten(1).sum(1),
                          torch.tensor([1., 1, 1, 1, 1, 0, 1]).double())
    same = torch.ones_like(g)
    assert torch.allclose(L1(3.).steepest(same, x, x).abs().flatten(1).sum(1),
                          torch.ones(7).double()), 'equal gradients'
    assert (L1(3.).steepest(same, x, x) != 0).sum() == 70, 'equal gradients'
    assert torch.equal(L1(3.).steepest(g, x), L1(3.).steepest(g))


starts = (Linf(.1), L2(2.), L1(3.), SSIM(.9))


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('threat', starts, ids=repr)
def test_a_random_start_depends_on_the_seed_and_the_image_alone(threat, dtype):
    x = rand(6, 3, 9, 8, dtype=dtype)
    start = lambda x, seed=5: threat.sample(x, make_generator(seed))
    state = torch.get_rng_state()
    all_of_them = start(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all_of_them.dtype == dtype
    assert threat.allows(x, all_of_them).all()
    assert torch.equal(start(x), all_of_them)
    assert torch.equal(start(x.flip(0)).flip(0), all_of_them)
    alone = torch.cat([start(x[i:i+1]) for i in range(6)])
    assert (alone-all_of_them).abs().max() < 1e-6
    moved = (all_of_them-x).flatten(1)
    assert (moved.abs().amax(1) > 1e-3).all(), 'each image has its own'
    assert (moved[0]-moved[1]).abs().max() > 1e-3, 'each image has its own'
    assert (start(x, 6)-all_of_them).abs().flatten(1).amax(1).min() > 1e-3
    assert torch.equal(threat.sample(x, None), threat.sample(x, make_generator(0)))
    low = threat.sample(x.float(), make_generator(5)).double()
    high = threat.sample(x.float().double(), make_generator(5))
    assert (low-high).abs().max() < 1e-5
    generator = make_generator(5)
    first = threat.sample(x, generator)
    assert not torch.equal(first, threat.sample(x, generator)), 'the next start is another one'


@pytest.mark.parametrize('threat', (Linf(.1), L2(.1), L1(.1)), ids=repr)
def test_samples_are_uniform_in_the_ball(threat):
    x = .45 + .1*rand(10_000, 1, 1, 3)
    step = threat.sample(x, make_generator(0)) - x
    length = torch.from_numpy(lengths[type(threat)](step.numpy()))/threat.eps
    for radius in (.3, .6, .9):
        assert abs((length <= radius).double().mean() - radius**3) < .015
    assert step.mean((0, 1, 2)).abs().max() < .002
    assert length.max() <= 1 + 1e-12
    part = (step/threat.eps)[:, 0, 0].abs()
    cdf = {Linf: lambda s: s, L2: lambda s: 1.5*s - .5*s**3, L1: lambda s: 1-(1-s)**3}[type(threat)]
    for s in (.1, .3, .6):
        assert ((part <= s).double().mean(0) - cdf(s)).abs().max() < .015, (
            'fraction of the ball with a coordinate so small')
    assert ((step[:, 0, 0, 0]*step[:, 0, 0, 1] > 0).double().mean() - .5).abs() < .015, (
        'signs are independent')


@pytest.mark.parametrize('n', (0, 1, 3, 36, 50))
def test_projection_to_few_pixels_is_the_nearest(n):
    x, _ = grey()
    far = x + .6*torch.randn(x.shape, generator=make_generator(1), dtype=x.dtype)
    threat = L0(n)
    near = threat.project(x, far)
    changed = ((near-x).abs() > 0).any(1).flatten(1)
    assert (threat.distance(x, near) == changed.sum(1)).all()
    assert (changed.sum(1) == min(n, 36)).all()
    assert threat.allows(x, near).all()
    size = (far.clamp(0, 1)-x).square().sum(1).flatten(1)
    for i in range(len(x)):
        assert set(changed[i].nonzero().flatten().tolist()) == set(sorted(
            range(36), key=lambda k: -size[i, k].item())[:n])
    assert torch.equal(near, torch.where(changed.view(-1, 1, 6, 6), far.clamp(0, 1), x))
    assert torch.equal(threat.project(x, near), near)
    assert threat.allows(x, x + 2e-8).all(), 'rounding is no change'
    if n < 36:
        assert not threat.allows(x, far.clamp(0, 1)).any()
        assert not L0(n).allows(x, L0(n+1).project(x, far)).any()
    for bad in (1.2, -.1, torch.nan):
        assert not threat.allows(x, near.index_fill(1, torch.tensor(0), bad)).any()


def test_random_pixels_are_uniform():
    x = .5 + 1e-5*torch.rand(4000, 1, 3, 3, generator=make_generator(9))
    threat = L0(2)
    changed = ((threat.sample(x, make_generator(0))-x).abs() > 1e-4).flatten(1)
    assert (changed.sum(1) <= 2).all()
    assert (changed.double().mean(0)-2/9).abs().max() < .03
    colours = threat.sample(x, make_generator(0)).flatten(1)[changed]
    for q in (.1, .5, .9):
        assert abs(colours.double().quantile(q)-q) < .02


@pytest.mark.parametrize('n', (1, 2, 5))
def test_one_step_is_exact_where_few_pixels_may_change(n):
    model, w = linear()
    x, y = grey()
    most = torch.where(w > 0, 1-x, x).mul(w.abs()).sum(1).flatten(1)
    best = most.sort(1, descending=True).values[:, :n].sum(1)
    gain = lambda x_adv: (margin(model(x_adv), y)-margin(model(x), y)).detach()
    assert torch.allclose(gain(fgsm(model, x, y, L0(n), loss=margin)), best)
    assert (gain(pgd(model, x, y, L0(n), loss=margin)) > .7*best).all()
    assert (gain(one_pixel(model, x, y, L0(n), population=10, generations=2)) < best).all()
    places = _mask_of_largest(w.abs().sum(0)[None], n).expand(4, -1, -1, -1)
    assert torch.equal(L0(n).steepest(w.expand(4, 3, 6, 6)), w.sign()*places)
