"""SSIM against scikit-image and a loop over windows; its projection, its steps, and the rule on
files."""
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import full_pgd, margin, pgd
from robustnb.attacks import ssim_rule as module
from robustnb.attacks.ssim_rule import SSIM, file_ssim, image_parts, ssim, ssim_along
from robustnb.attacks.threat_models import L2
from robustnb.core import make_generator, to_uint8
from robustnb.data import digits, subset
from helpers_attacks import Linear, dot, gain, rand, randn


@pytest.fixture(scope='module')
def photos(): return subset(digits('test'), 20, seed=0).x


def pair(size, kind, seed):
    "A pair of 8-bit images (H,W,3)"
    rng = np.random.default_rng(seed)
    if kind == 'random': return rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    rows, cols = np.mgrid[:size, :size]/size
    if kind == 'smooth':
        a = np.stack([127 + 120*np.sin(3*rows + k)*np.cos(2*cols) for k in range(3)], 2)
    else:
        a = np.full((size, size, 3), seed*100.)
    b = a + rng.normal(0, (1, 8, 40)[seed], a.shape)
    return np.stack([a, b]).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize('size', (7, 8, 32, 224))
def test_ssim_is_that_of_scikit_image(size):
    reference = pytest.importorskip('skimage.metrics',
                                    reason='scikit-image is not installed').structural_similarity
    pairs = [pair(size, kind, seed) for kind in ('random', 'smooth', 'flat') for seed in range(3)]
    sides = torch.from_numpy(np.stack(pairs, 1)).permute(0, 1, 4, 2, 3)
    a, b = sides.float()/255
    theirs = torch.tensor([reference(p, q, channel_axis=2, data_range=255) for p, q in pairs])
    assert (ssim(a, b)-theirs).abs().max() < 1e-6
    assert theirs.min() < .2
    assert theirs.max() > .9
    assert (ssim(b, a)-theirs).abs().max() < 1e-6
    assert ssim(a, a).eq(1).all()
    exact = torch.tensor([reference(p/255, q/255, channel_axis=2, data_range=1.) for p, q in pairs])
    assert (ssim(*sides.double()/255)-exact).abs().max() < 1e-12


def test_ssim_keeps_its_digits_where_images_are_nearly_equal():
    x = rand(3, 1, 9, 9)
    d = randn(3, 1, 9, 9)
    loss = torch.stack([1-ssim(x, x + t*d) for t in (1e-3, 1e-4, 1e-5)])
    assert torch.allclose(loss[:-1]/loss[1:], torch.tensor(100.).double(), rtol=1e-2)
    assert torch.allclose(ssim_along(x, d)(torch.tensor([.1, .2, 0.]).view(3, 1, 1, 1)),
                          ssim(x, x + torch.tensor([.1, .2, 0.]).view(3, 1, 1, 1)*d))
    assert ssim(x.float(), x.float()).dtype == torch.float32
    assert ssim(x[:1], x[:1]).shape == (1,)


@pytest.mark.parametrize('shape', ((2, 2, 7, 7), (1, 1, 9, 8)))
def test_gradient_of_ssim(shape):
    a = rand(*shape).requires_grad_()
    b = rand(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(ssim, (a, b))


@pytest.mark.parametrize('a, b, words', (
    ((1, 3, 6, 9), (1, 3, 6, 9), 'at least 7 pixels high and wide'),
    ((1, 3, 9, 6), (1, 3, 9, 6), r'got \(1, 3, 9, 6\)'), ((1, 3, 8, 8), (2, 3, 8, 8), 'same shape'),
    ((1, 3, 8, 8), (1, 1, 8, 8), 'same shape'), ((3, 8, 8), (3, 8, 8), r'\(N,C,H,W\)')))
def test_images_that_have_no_ssim(a, b, words):
    with pytest.raises(ValueError, match=words):
        ssim(torch.zeros(a), torch.zeros(b))
    if a == b and len(a) == 4:
        x = torch.zeros(a)
        y = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match=words):
            pgd(Linear(torch.ones(a)).eval(), x, y, SSIM(.9))
        with pytest.raises(ValueError, match=words):
            pgd(Linear(torch.ones(a)).eval(), x, y, SSIM(.9), generator=make_generator(0))


def slow_ssim(a, b):
    "Window by window, with numpy's own covariance"
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    c1 = (.01*255)**2
    c2 = (.03*255)**2
    seen = []
    for c in range(a.shape[2]):
        for i, j in itertools.product(range(a.shape[0]-6), range(a.shape[1]-6)):
            u = a[i:i+7, j:j+7, c].ravel()
            v = b[i:i+7, j:j+7, c].ravel()
            (vu, cov), (_, vv) = np.cov(u, v)
            seen.append(
                (2*u.mean()*v.mean()+c1)*(2*cov+c2)/((u.mean()**2+v.mean()**2+c1)*(vu+vv+c2)))
    return np.mean(seen)


@pytest.fixture(scope='module')
def images(photos): return to_uint8(photos)[:4, :16, :18]


def test_the_rule_to_double_precision(images):
    a = images
    noise = np.random.default_rng(0).integers(-19, 20, a.shape)
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    got = file_ssim(a, b)
    assert got.dtype == np.float64
    assert .2 < got.min() < got.max() < .99
    assert np.allclose(got, [slow_ssim(*o) for o in zip(a, b)], atol=1e-12, rtol=0)
    many = np.repeat(a, 30, 0)
    assert np.allclose(file_ssim(many, np.repeat(b, 30, 0)), np.repeat(got, 30), atol=1e-12)
    metrics = pytest.importorskip('skimage.metrics')
    theirs = [metrics.structural_similarity(*o, channel_axis=2, data_range=255) for o in zip(a, b)]
    assert np.allclose(got, theirs, atol=1e-12, rtol=0)


def test_the_rule_needs_images_of_one_size(images):
    with pytest.raises(ValueError, match='like `images`'):
        file_ssim(images, images[:, 1:])
    with pytest.raises(TypeError, match='uint8'):
        file_ssim(images, images.astype(float))
    with pytest.raises(ValueError, match='7 pixels'):
        file_ssim(images[:, :6], images[:, :6])


@pytest.mark.parametrize('level', (.5, .9, .99))
def test_ssim_projection_ends_on_the_line_just_inside(photos, level):
    threat = SSIM(level)
    noise = .8*randn(*photos.shape, dtype=torch.float32)
    goal = (photos + noise).clamp(0, 1)
    near = threat.project(photos, photos + noise)
    kept = ssim(photos, near)
    out = ssim(photos, goal) < level
    assert out.all()
    assert (kept >= level - 1e-6).all()
    assert (kept < level + 1e-3).all()
    along = near-photos
    across = goal-photos
    part = dot(along, across)/dot(across, across)
    assert (along - part.view(-1, 1, 1, 1)*across).abs().max() < 1e-6
    assert (part > 0).all()
    assert (part < 1).all()
    mixed = torch.cat([photos[:3] + 1e-4, goal[3:]])
    assert torch.equal(threat.project(photos, mixed)[:3], mixed[:3].clamp(0, 1))
    assert torch.equal(threat.project(photos, mixed)[3:], near[3:])


def slow_part(x, goal, level):
    "The largest part of the change that the rule allows, by sixty halvings in double precision"
    lo = torch.zeros(len(x), 1, 1, 1).double()
    hi = torch.ones_like(lo)
    for _ in range(60):
        mid = (lo+hi)/2
        good = (ssim(x, x + mid*(goal-x)) >= level).view(-1, 1, 1, 1)
        lo = torch.where(good, mid, lo)
        hi = torch.where(good, hi, mid)
    return lo


@pytest.mark.parametrize('level', (.8, .95, .999, .9999))
@pytest.mark.parametrize('kind', ('photos', 'flat', 'bright', 'smooth'))
def test_ssim_projection_is_a_bisection_in_a_few_looks(photos, level, kind, monkeypatch):
    x = photos[:8]
    g = randn(*x.shape, dtype=torch.float32)
    if kind == 'flat': x = torch.full_like(x, .3)
    move = {'bright': torch.full_like(x, .5) + .01*g,
            'smooth': nn.functional.avg_pool2d(g, 7, 1, 3)}.get(kind, g)
    goal = (x + torch.linspace(.02, 1, 8).view(-1, 1, 1, 1)*move).clamp(0, 1)
    looks = []
    along = module._loss_along
    def counted(*args):
        loss = along(*args)
        return lambda t: looks.append(t) or loss(t)
    monkeypatch.setattr(module, '_loss_along', counted)
    near = SSIM(level).project(x, goal)
    assert len(looks) <= 16
    monkeypatch.undo()
    kept = ssim(x.double(), near.double())
    outside = ssim(x.double(), goal.double()) < level
    assert (kept >= level).all(), 'to double precision, and without tolerance'
    assert (1-kept[outside] >= (1-2e-4)*(1-level)).all()
    assert outside.any()
    assert torch.equal(near[~outside], goal[~outside])
    x, goal, near = [o[outside].double() for o in (x, goal, near)]
    part = slow_part(x, goal, level)
    found = dot(near-x, goal-x)/dot(goal-x, goal-x)
    assert torch.allclose(found, part.flatten(), rtol=3e-4, atol=0)


def test_images_at_the_edge_stay_as_they_are(photos):
    threat = SSIM(.95)
    near = threat.project(photos, photos + randn(*photos.shape, dtype=torch.float32))
    assert torch.equal(threat.project(photos, near), near)
    assert torch.equal(SSIM(1.).project(photos, near), photos)
    assert torch.equal(SSIM(1.).project(photos, photos), photos)


def test_images_are_taken_in_small_parts(photos):
    for n, shape, most, size in ((20, (3, 32, 32), 2**17, 42), (5, (3, 224, 224), 2**17, 1),
                                 (7, (1, 8, 8), 128, 2), (0, (3, 8, 8), 2**17, 1)):
        x = torch.zeros(n, *shape)
        parts = image_parts(x, most)
        assert [i for s in parts for i in range(n)[s]] == list(range(n))
        assert all(s.stop-s.start <= size for s in parts)
        assert len(parts) == max(1, -(-n//size))
    many = photos.repeat(4, 1, 1, 1)
    far = many + randn(*many.shape, dtype=torch.float32)
    g = randn(*many.shape, seed=1, dtype=torch.float32)
    threat = SSIM(.9)
    assert len(image_parts(many)) == 2
    for f in (threat.project, threat.distance, lambda x, y: threat.steepest(g[:len(x)], x, y)):
        assert torch.equal(f(many, far)[:7], f(many[:7], far[:7]))
    for f in (ssim, threat.project, lambda x, y: threat.steepest(x, x, y)):
        assert len(f(many[:0], many[:0])) == 0


def test_the_cost_of_a_pixel_is_that_of_changing_it_alone():
    """In `steepest` each pixel counts in inverse proportion to the similarity that it costs, here
    measured pixel by pixel"""
    x = .5 + .2*randn(1, 1, 11, 12) * torch.linspace(.2, 1.2, 12)
    g, h = randn(1, 1, 11, 12), 1e-4
    lost = 1 - ssim(x.expand(132, -1, -1, -1), x + h*torch.eye(132).double().view(132, 1, 11, 12))
    ratio = (SSIM(.9).steepest(g, x, x).flatten()*lost/g.flatten())
    assert (ratio/ratio.median() - 1).abs().max() < .01
    assert lost.max() > 30*lost.min()
    assert (ratio > 0).all()


@pytest.mark.parametrize('level, low, high', ((.999, .9, 1.1), (.95, .6, 1.2), (.8, .5, 1.2)))
def test_a_step_of_eps_loses_about_eps(photos, level, low, high):
    threat = SSIM(level)
    for seed, size in ((0, 1), (1, 3), (2, 7)):
        g = nn.functional.avg_pool2d(randn(*photos.shape, seed=seed, dtype=torch.float32),
                                     size, 1, size//2)
        step = threat.eps*threat.steepest(g, photos, photos)
        lost = threat.distance(photos, photos + step)/threat.eps
        assert low < lost.min()
        assert lost.max() < high
        tenth = threat.distance(photos, photos + .1*step)/threat.eps
        assert ((tenth > .0085) & (tenth < .0115)).all(), 'the loss grows with the square'


class Plain(SSIM):
    "SSIM whose step does not know what a pixel costs"
    def steepest(self, grad, x=None, x_adv=None):
        step = L2(1.).steepest(grad)
        return step*(self.eps*(1-ssim_along(x, step)(.01))/1e-4).rsqrt().view(-1, 1, 1, 1)


@pytest.mark.parametrize('level', (.9, .98))
def test_generic_pgd_spends_the_similarity_where_it_is_cheap(photos, level):
    w = nn.functional.avg_pool2d(randn(1, 3, 32, 32, dtype=torch.float32), 3, 1, 1)
    threat = SSIM(level)
    ours = gain(full_pgd, photos, w, threat)
    plain = gain(full_pgd, photos, w, Plain(level))
    assert ours.mean() > 1.6*plain.mean()
    assert (ours > plain).double().mean() > .9
    found = full_pgd(Linear(w).eval(), photos, torch.ones(len(photos), dtype=torch.int64), threat,
                loss=margin)
    assert (threat.distance(photos, found) > .9*threat.eps).all(), 'the budget is used'
    assert (gain(full_pgd, photos, w, threat, steps=2, step_size=.02*threat.eps) < .1*ours).all(), (
        'steps too short must not get there')
