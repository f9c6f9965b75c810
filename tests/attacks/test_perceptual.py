"""Dropped detail, moved light and changed colours: scipy, slow versions with loops, closed forms;
one table of promises."""
import copy, math, random
from functools import partial

import numpy as np
import pytest
import scipy.fft
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import linprog
from torch import nn

from robustnb.attacks.gradient import cross_entropy, margin, pgd
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.data import digits, subset
from robustnb.models.zoo import build_model
from robustnb.attacks.transferable import ensemble
from robustnb.attacks.perceptual import (
    advdrop, _at_colors, _dct, _hats, _idct, recolor, wasserstein)
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from robustnb.models.training import Recipe, train
from helpers_attacks import iterates, make_batch, make_net, same, snapshot, wrong_uses

family = dict(advdrop=partial(advdrop, tables=(5, 120)),
              wasserstein=partial(wasserstein, mass=.03), recolor=recolor)
threats = (Linf(0), Linf(8/255), Linf(1), L2(0), L2(.4), L1(0), L1(6), SSIM(.95))
free = Linf(1.)
nan = float('nan')
inf = float('inf')


def rand(*shape, seed=0):
    return torch.rand(shape, generator=make_generator(seed, 'rand'), dtype=torch.float64)


class Linear(nn.Module):
    "Two logits whose margin for label 0 is the weighted sum of the pixels, less a bias"
    def __init__(self, w, bias=100.):
        super().__init__()
        self.w, self.bias = w, bias
    def forward(self, x):
        s = (self.w*x).flatten(1).sum(1)
        return torch.stack([0*s, s-self.bias], 1)


def by_itself(model, image, label, y_of=margin):
    "The gradient of one image's loss, on a copy of the model"
    model = copy.deepcopy(model)
    z = torch.as_tensor(image).clone().requires_grad_()
    logits = model(z[None])
    y_of(logits, torch.tensor([label])).sum().backward()
    return z.grad.numpy(), margin(logits, torch.tensor([label])).item()


# ---- detail dropped

def slow_blocks(image, change):
    "`change(coefficients, channel, row, column)` for each block of 8 x 8 of an image (C,H,W), by scipy"
    c, h, w = image.shape
    full = np.pad(255*image - 128, ((0, 0), (0, -h % 8), (0, -w % 8)), 'edge')
    out = np.empty_like(full)
    for k, i, j in np.ndindex(c, full.shape[1]//8, full.shape[2]//8):
        at = k, slice(8*i, 8*i+8), slice(8*j, 8*j+8)
        out[at] = scipy.fft.idctn(change(scipy.fft.dctn(full[at], norm='ortho'), k, i, j),
                                  norm='ortho')
    return (out[:, :h, :w] + 128)/255


@pytest.mark.parametrize('h, w', ((8, 8), (16, 24), (7, 9), (1, 20)))
def test_cosine_transform_is_that_of_scipy(h, w):
    x = rand(3, 2, h, w)
    ours = _dct(x)
    assert ours.shape == (3, 2, -(-h//8), -(-w//8), 8, 8)
    assert (_idct(ours, h, w)-x).abs().max() < 1e-12
    for n in range(3):
        def check(c, k, i, j):
            assert np.abs(c - ours[n, k, i, j].numpy()).max() < 1e-9
            return c
        assert np.abs(slow_blocks(x[n].numpy(), check) - x[n].numpy()).max() < 1e-12


def slow_advdrop(model, image, label, steps, tables, y_of=margin):
    "One image, one coefficient at a time"
    image = image.numpy()
    rounded = lambda c, t: np.round(c/t)*t
    every = [tables[0] + k*(tables[1]-tables[0])/35 for k in range(36)]
    used = np.full((len(image), 8, 8), float(tables[0]))
    best, height = image, by_itself(model, image, label)[1]
    for i in range(steps+1):
        raw = slow_blocks(image, lambda c, k, *_: rounded(c, used[k]))
        now = raw.clip(0, 1)
        grad, value = by_itself(model, now, label, y_of)
        if value > height:
            best, height = now, value
        if i == steps: return torch.tensor(best)
        inside = grad*((raw >= 0) & (raw <= 1))
        gain = np.zeros_like(used)
        new = used.copy()
        pad = np.pad(inside, ((0, 0), (0, -inside.shape[1] % 8), (0, -inside.shape[2] % 8)))
        blocks = []
        def collect(c, k, a, b):
            slope = scipy.fft.dctn(pad[k, 8*a:8*a+8, 8*b:8*b+8], norm='ortho')/255
            blocks.append((k, c, slope))
            return c
        slow_blocks(image, collect)
        for at in np.ndindex(used.shape):
            for t in every:
                g = sum(slope[at[1:]]*(rounded(c[at[1:]], t) - rounded(c[at[1:]], used[at]))
                        for channel, c, slope in blocks if channel == at[0])
                if g > gain[at] + 1e-15:
                    gain[at], new[at] = g, t
        first = sorted(np.ndindex(used.shape), key=lambda o: -gain[o])
        for at in first[:math.ceil(2/(i+2)*used.size)]:
            used[at] = new[at]


class Bent(nn.Module):
    "Three logits of images of any size, with slopes that change"
    def forward(self, x):
        w = 4*torch.randn(3, *x.shape[1:], generator=make_generator(0), dtype=torch.float64)
        return torch.stack([(k*x).sin().flatten(1).sum(1) for k in w], 1)


@pytest.mark.parametrize('shape, steps, tables, loss', (
    ((1, 10, 13), 7, (5, 60), margin), ((2, 8, 8), 5, (10, 120), cross_entropy),
    ((1, 16, 16), 3, (5, 40), margin)))
def test_advdrop_is_its_slow_version(shape, steps, tables, loss):
    model = Bent().eval()
    x = rand(2, *shape)
    y = model(x).argmax(1)
    ours = advdrop(model, x, y, free, steps=steps, tables=tables, loss=loss)
    theirs = [[slow_advdrop(model, a, b.item(), n, tables, loss) for a, b in zip(x, y)]
              for n in (steps, 1)]
    assert (ours-x).abs().max() > .02
    assert (ours-torch.stack(theirs[0])).abs().max() < 1e-9
    assert (ours-torch.stack(theirs[1])).abs().max() > 1e-3, 'more than the first step counts'


def test_the_transform_is_rounded_with_one_table_for_all_blocks():
    w = torch.randn(2, 16, 24, generator=make_generator(0), dtype=torch.float64)
    x = .35 + .3*rand(2, 2, 16, 24)
    for low, high in ((3, 24), (6, 6)):
        out = advdrop(Linear(w).eval(), x, torch.zeros(2, dtype=torch.int64), free, steps=4,
                      tables=(low, high))
        changed = (out != x).flatten(1).any(1)
        out = _dct(out[changed])
        before = _dct(x[changed])
        on_grid = lambda t: ((out/t - (out/t).round()).abs() < 1e-7).flatten(2, 3).all(2)
        tables = torch.linspace(low, high, 36, dtype=torch.float64)
        multiple = torch.stack([on_grid(t) for t in tables])
        assert multiple.any(0).all()
        assert high/3 < (out-before).abs().max() <= high/2 + 1e-9
        assert changed.any(), 'tables moved'
        if low < high:
            assert changed.all()
            assert (multiple.int().argmax(0) > 0).float().mean() > .5, 'tables moved'


def test_tables_that_tend_to_nothing_change_nothing():
    model = make_net()
    x, y = make_batch()
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        out = advdrop(model.to(dtype), x.to(dtype), y, free, steps=3, tables=(1e-9, 1e-9))
        assert out.dtype == dtype
        assert (out-x.to(dtype)).abs().max() < most
    assert (advdrop(make_net(), x, y, free, steps=3, tables=(1e-9, 40)) - x).abs().max() > .01


# ---- light moved

def distance(a, b):
    """Wasserstein distance of two images (H,W) of equal light, |rows| + |columns| apart: a linear
    program over what goes from where to where"""
    at = np.array(list(np.ndindex(*a.shape)))
    n = len(at)
    cost = np.abs(at[:, None]-at[None]).sum(2)
    rows = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    found = linprog(cost.ravel(), A_eq=np.concatenate(rows)[:-1],
                    b_eq=np.concatenate([a.ravel(), b.ravel()])[:-1])
    assert found.success
    return found.fun


@pytest.mark.parametrize('mass', (.01, .1, .5))
def test_light_is_kept_and_moves_as_far_as_allowed(mass):
    w = torch.randn(2, 4, 4, generator=make_generator(1), dtype=torch.float64)
    x = (1.4*rand(3, 2, 4, 4, seed=1)-.2).clamp(0, 1)
    out = wasserstein(Linear(w).eval(), x, torch.zeros(3, dtype=torch.int64), free, mass=mass)
    assert (out.sum((2, 3)) - x.sum((2, 3))).abs().max() < 1e-12
    assert out.min() >= 0
    assert out.max() <= 1
    for a, b in zip(x.numpy(), out.numpy()):
        used = sum(distance(p, q*(p.sum()/q.sum())) for p, q in zip(a, b))
        assert used <= mass*a.sum() + 1e-9
        assert mass == .5 or used > .9*mass*a.sum()


def test_one_pixel_that_matters_gets_the_whole_budget():
    w = torch.zeros(1, 4, 4, dtype=torch.float64)
    x = .3 + .4*rand(2, 1, 4, 4)
    for at, sign in (((1, 2), 1), ((0, 0), 1), ((3, 1), -1), ((3, 3), -1)):
        w.zero_()[0][at] = sign
        out = wasserstein(Linear(w).eval(), x, torch.zeros(2, dtype=torch.int64), free, mass=.02)
        budget = .02*x.sum((1, 2, 3))
        assert (sign*(out-x)[:, 0][(slice(None), *at)] - budget).abs().max() < 1e-9
        assert all(abs(distance(a, b) - m) < 1e-7
                   for a, b, m in zip(x[:, 0].numpy(), out[:, 0].numpy(), budget.tolist()))
        around = [(at[0]+i, at[1]+j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        neighbors = sum(0 <= i < 4 and 0 <= j < 4 for i, j in around)
        assert ((out-x).abs() > 1e-12).sum((1, 2, 3)).tolist() == [1+neighbors]*2


def slow_wasserstein(model, image, label, mass, steps, low, high):
    "One image; a flow is a dictionary from pairs of neighbours"
    x = image.numpy()
    c, h, w = x.shape
    edges = [((k, i, j), (k, i+a, j+b)) for k, i, j in np.ndindex(c, h, w)
             for a, b in ((0, 1), (1, 0)) if i+a < h and j+b < w]
    flow = dict.fromkeys(edges, 0.)
    budget = mass*x.sum()
    best = x
    height = by_itself(model, x, label)[1]
    for step in range(steps+1):
        now = x.copy()
        for (a, b), f in flow.items():
            now[a] -= f
            now[b] += f
        grad, value = by_itself(model, now, label)
        if value > height:
            best, height = now, value
        if step == steps: return torch.tensor(best)
        slope = {(a, b): grad[b]-grad[a] for a, b in edges}
        length = 4/steps*(1-step/steps)*budget/math.sqrt(sum(s*s for s in slope.values()))
        flow = {e: f + length*slope[e] for e, f in flow.items()}
        if sum(map(abs, flow.values())) > budget:
            sizes, total = sorted(map(abs, flow.values()), reverse=True), 0
            for n, size in enumerate(sizes, 1):
                total += size
                if size > (total-budget)/n:
                    off = (total-budget)/n
            flow = {e: math.copysign(max(abs(f)-off, 0), f) for e, f in flow.items()}
        given = np.zeros_like(x)
        taken = np.zeros_like(x)
        for (a, b), f in flow.items():
            if f < 0:
                a, b = b, a
            given[a] += abs(f)
            taken[b] += abs(f)
        for (a, b), f in flow.items():
            p, q = (a, b) if f > 0 else (b, a)
            flow[a, b] = f*min(1, (x[p]-low[p])/max(given[p], 1e-30),
                               (high[q]-x[q])/max(taken[q], 1e-30))


@pytest.mark.parametrize('eps', (1., .1))
def test_wasserstein_is_its_slow_version(eps):
    model = make_net()
    x, y = make_batch()
    ours = wasserstein(model, x[:4], y[:4], Linf(eps), mass=.05, steps=6)
    def theirs_of(image, label):
        low = (image-eps).clamp_min(0).numpy()
        high = (image+eps).clamp_max(1).numpy()
        return slow_wasserstein(model, image, label.item(), .05, 6, low, high)
    theirs = torch.stack([theirs_of(a, b) for a, b in zip(x[:4], y[:4])])
    assert (ours-theirs).abs().max() < 1e-7
    assert (ours-x[:4]).abs().amax((1, 2, 3)).min() > .02
    assert eps == 1 or ((ours-x[:4]).abs() > .09).any(), 'the limit matters'


@pytest.mark.parametrize('threat', threats, ids=repr)
def test_no_threat_loses_light(threat):
    model = make_net()
    x, y = make_batch()
    out = wasserstein(model, x, y, threat, mass=.2, steps=10)
    assert threat.allows(x, out).all()
    assert (out.sum((2, 3)) - x.sum((2, 3))).abs().max() < 1e-9
    assert (threat.eps == 0 or threat == free
            or (threat.distance(x, out) > .9*threat.eps).any()), 'the threat is what limits it'


def test_a_black_image_has_nothing_to_move():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    model = make_net()
    assert torch.equal(wasserstein(model, x, model(x).argmax(1), free), x)


# ---- colours changed

@pytest.mark.parametrize('channels, knots', ((1, 2), (1, 6), (2, 4), (3, 2), (3, 5)))
def test_lattice_is_that_of_scipy(channels, knots):
    x = rand(2, channels, 3, 5)
    lattice = rand(2, channels, knots**channels, seed=1)
    x[:, :, 0, :2] = torch.tensor([0., 1.], dtype=torch.float64)
    ours = _at_colors(lattice, _hats(x, knots))
    for n in range(2):
        for c in range(channels):
            grid = RegularGridInterpolator([np.linspace(0, 1, knots)]*channels,
                                           lattice[n, c].view(*[knots]*channels).numpy())
            assert np.abs(grid(x[n].flatten(1).T.numpy()) - ours[n, c].numpy()).max() < 1e-12


@pytest.mark.parametrize('channels, knots', ((1, 9), (3, 5)))
def test_recolor_finds_the_best_filter_of_a_linear_model(channels, knots):
    eps = 8/255
    g = make_generator(0)
    w = torch.randn(channels, 6, 7, generator=g, dtype=torch.float64)
    x = (1 + torch.randint(0, knots-2, (4, channels, 6, 7), generator=g)).double()/(knots-1)
    model = Linear(w).eval()
    y = torch.zeros(4, dtype=torch.int64)
    for n in range(4):
        sums = {}
        for i, j in np.ndindex(6, 7):
            sums.setdefault(tuple(x[n, :, i, j].tolist()), []).append(w[:, i, j])
        exact = eps*sum(torch.stack(o).sum(0).abs().sum().item() for o in sums.values())
        gain = lambda **kw: (
            w*(recolor(model, x[n:n+1], y[:1], Linf(eps), knots=knots, **kw) - x[n])).sum().item()
        assert abs(gain()-exact) < 1e-9
        assert abs(gain(steps=5)-2*gain(steps=5, loss=lambda z, y: margin(z, y)/7)/2) < 1e-9
        assert abs(gain(steps=1)-exact) < 1e-9, 'noise could do more'
        assert exact < .97*eps*w.abs().sum().item(), 'noise could do more'
    with pytest.raises(AssertionError):
        assert abs(gain(steps=0)-exact) < 1e-9


@pytest.mark.parametrize('knots', (2, 4))
def test_recolor_finds_the_best_curve_of_a_linear_model(knots):
    "Greys between the points of the curve: each point moves by eps against the weights that it shares in"
    eps = .06
    w = torch.randn(1, 5, 5, generator=make_generator(2), dtype=torch.float64)
    x = .1 + .8*rand(1, 1, 5, 5)
    parts = [np.interp(x.flatten(), np.linspace(0, 1, knots), row) @ w.flatten().numpy()
             for row in np.eye(knots)]
    assert len({bool(p > 0) for p in parts}) == 2, 'the curve bends'
    out = recolor(Linear(w).eval(), x, torch.tensor([0]), Linf(eps), knots=knots)
    assert abs((w*(out-x)).sum().item() - eps*np.abs(parts).sum()) < 1e-9


@pytest.mark.parametrize('threat', threats, ids=repr)
def test_equal_colours_stay_equal(threat):
    model = make_net()
    x = torch.randint(0, 3, (12, 3, 8, 8), generator=make_generator(0)).double()/2*.9 + .02
    x[:, 1:] = x[:, :1] + x[:, 1:]*.01
    y = model(x).argmax(1)
    out = recolor(model, x, y, threat, steps=8)
    for a, b in zip(x.flatten(2), out.flatten(2)):
        same = (a.T[:, None] == a.T[None]).all(2)
        assert same.float().mean() > 2/64
        assert (b.T[:, None]-b.T[None]).abs().amax(2)[same].max() < 1e-9
    assert threat.allows(x, out).all()
    assert threat.eps == 0 or (out-x).abs().max() > .5*min(threat.eps, .02)
    if threat == L2(.4):
        assert (threat.distance(x, out) > .97*threat.eps).any(), 'all of the budget'
    noise = pgd(model, x, y, threat, steps=8)
    assert threat.eps == 0 or any(
        (q.T[:, None]-q.T[None]).abs().amax(2)[(a.T[:, None] == a.T[None]).all(2)].max() > 1e-4
        for a, q in zip(x.flatten(2), noise.flatten(2)))


# ---- all three

@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('name', family)
def test_promises(name, threat):
    attack = family[name]
    model = make_net()
    x, y = make_batch(model=model)
    y[3] = (y[3]+1) % 5
    run = lambda seed=None, at=slice(None): attack(
        model, x[at], y[at], threat, generator=None if seed is None else make_generator(seed),
        steps=6)
    before = snapshot(model)
    image = x.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    out = run()
    assert same(snapshot(model), before)
    assert torch.equal(x, image)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    assert threat.allows(x, out).all()
    assert (threat.distance(x, out) <= threat.eps + 1e-9).all()
    assert torch.equal(run(), out), 'nothing is random'
    assert torch.equal(run(5), out), 'nothing is random'
    with torch.no_grad():
        assert torch.equal(run(), out), 'also where gradients are off'
    alone = torch.cat([run(at=slice(i, i+1)) for i in range(len(x))])
    turned = run(at=torch.arange(len(x)).flip(0)).flip(0)
    assert (alone-out).abs().max() < 1e-9
    assert (turned-out).abs().max() < 1e-9
    assert torch.equal(out[3], x[3]), 'already misclassified'
    gain = (margin(model(out), y) - margin(model(x), y)).detach()
    assert (gain >= -1e-12).all()
    assert gain.mean() > .05 if threat.eps else (out-x).abs().max() < 1e-12


@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('name', family)
def test_precision_of_the_images_is_kept(name, threat):
    model = make_net(torch.float32)
    x, y = make_batch(torch.float32, model=model)
    out = family[name](model, x, y, threat, steps=3)
    assert out.dtype == torch.float32
    assert threat.allows(x, out).all()
    assert threat.eps == 0 or (out-x).abs().max() > 1e-3


@pytest.mark.parametrize('threat', (free, L2(1.)), ids=repr)
@pytest.mark.parametrize('name', family)
def test_the_image_with_the_largest_margin_is_kept(name, threat):
    model = make_net()
    x, y = make_batch()
    y[3] = (y[3]+1) % 5
    left = torch.arange(len(x)) != 3
    out, asked = iterates(model, lambda m: family[name](
        m, x, y, threat, steps=12, loss=lambda z, y: (4*margin(z, y)).sin()))
    assert len(asked) == 14
    assert all(len(o) == 11 for o in asked[1:])
    assert all(threat.allows(x[left], o).all() for o in asked[1:])
    values = torch.stack([margin(model(o), y[left]) for o in [x[left], *asked[1:]]]).detach()
    assert len(values.argmax(0).unique()) > 1
    assert torch.equal(out[left],
                       torch.stack([x[left], *asked[1:]])[values.argmax(0), torch.arange(11)])


@pytest.mark.parametrize('name', family)
def test_no_gradient_no_move(name):
    class Still(nn.Module):
        def forward(self, x):
            return (0*x).flatten(1).sum(1, keepdim=True) + torch.arange(10., dtype=x.dtype)
    x = make_batch()[0]
    for threat in threats:
        assert torch.equal(
            family[name](Still().eval(), x, torch.full((len(x),), 9), threat, steps=2), x)


@pytest.mark.parametrize('name', family)
def test_an_ensemble_with_a_gradient_of_its_own(name):
    model = ensemble([make_net(seed=s) for s in (0, 1)], combine='gradients')
    x = make_batch()[0]
    y = model(x).argmax(1)
    out = family[name](model, x, y, Linf(8/255), steps=6)
    assert Linf(8/255).allows(x, out).all()
    assert (margin(model(out), y) > margin(model(x), y) + .01).all()


@pytest.fixture(scope='module')
def trained():
    "A small network that knows its digits, and test images"
    recipe = Recipe(flip=False, batch_size=20, lr=.05, crop=1).shortened(6)
    net, _ = train(recipe, build_model('ResNet_18', width=.125),
                   subset(digits('train', size=16), 300, seed=0), device='cpu')
    test = subset(digits('test', size=16), 60, seed=0)
    return net, test.x, torch.as_tensor(test.y)


budgets = dict(
    advdrop=[partial(advdrop, steps=20, tables=(5, t)) for t in (5, 40, 80, 160)],
    wasserstein=[partial(wasserstein, steps=15, mass=m) for m in (0, .02, .05, .1)],
    recolor=[lambda m, x, y, t, e=e: recolor(m, x, y, Linf(e/255)) for e in (0, 16, 32, 64)])


@pytest.mark.parametrize('name', budgets)
def test_more_budget_fools_more(trained, name):
    net, x, y = trained
    out = [attack(net, x, y, free) for attack in budgets[name]]
    left = [(predict(net, o).argmax(1) == y).sum().item() for o in [x, *out]]
    heights = [margin(predict(net, o), y).mean() for o in [x, *out]]
    assert left[0] > 50
    assert left[0]-left[1] <= 2
    assert sorted(left, reverse=True) == left
    assert left[-1] < .6*left[0]
    assert heights == sorted(heights)
    assert heights[2] > heights[0] + .5
    assert heights[4] > heights[2] + 1


def test_advdrop_beats_the_search_by_sign_and_by_chance(trained):
    "The paper's loop with its soft rounding, and random tables, in the same range"
    net, x, y = trained
    def image_of(table, hardness):
        c = _dct(x)/table
        low = c.floor().detach()
        k = math.log(2/hardness-1)
        return _idct((low + (torch.tanh((c-low-.5)*k)/(1-hardness) + 1)/2)*table, 16,
                     16).clamp(0, 1)
    def soft(steps=40, low=5., high=160.):
        table = torch.full((len(x), 3, 1, 1, 8, 8), low)
        for i in range(steps):
            t = table.clone().requires_grad_()
            slope, = torch.autograd.grad(
                margin(net(image_of(t, max(.1*(1-i/steps), 1e-9))), y).sum(), t)
            table = (table + 4*slope.sign()).clamp(low, high)
        return image_of(table, 1e-9)
    height = lambda o: margin(predict(net, o), y)
    dice = make_generator(0)
    chance = height(x)
    for _ in range(40):
        chance = torch.maximum(chance, height(image_of(
            5 + 155*torch.rand(len(x), 3, 1, 1, 8, 8, generator=dice), 1e-9)))
    ours = height(advdrop(net, x, y, free, steps=40, tables=(5, 160)))
    assert ours.mean() > max(chance.mean(), height(soft()).mean()) + 1.5
    assert (ours >= chance).float().mean() > .9


@pytest.mark.parametrize('use', wrong_uses)
@pytest.mark.parametrize('name', family)
def test_wrong_use_is_refused(name, use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        family[name](*change(model, *make_batch(model=model)), Linf(8/255))


@pytest.mark.parametrize('attack, name', [(partial(a, **{k: v}), k) for a, options in (
    (advdrop,
     dict(tables=((0, 40), (-1, 40), (40, 5), (nan, 40), (5, nan), (5, inf)), steps=(-1, nan))),
    (wasserstein, dict(mass=(-.1, nan, inf), steps=(-1, nan))),
    (recolor, dict(knots=(1, 0, 2.5, nan, inf), steps=(-1, nan))))
                                          for k, vs in options.items() for v in vs])
def test_options_out_of_range_are_named(attack, name):
    with pytest.raises((ValueError, TypeError), match=f'`{name}`.* got '):
        attack(make_net(), *make_batch(), Linf(.1))


def test_zero_steps_are_a_look_at_the_start():
    model = make_net()
    x, y = make_batch()
    for attack in (wasserstein, recolor):
        assert torch.equal(attack(model, x, y, free, steps=0), x)
    out = advdrop(model, x, y, free, steps=0, tables=(40, 40))
    rounded = torch.stack([torch.tensor(slow_blocks(o.numpy(), lambda c, *_: np.round(c/40)*40))
                           for o in x]).clamp(0, 1)
    better = margin(model(rounded), y) > margin(model(x), y)
    assert better.any()
    assert (out - torch.where(better.view(-1, 1, 1, 1), rounded, x)).abs().max() < 1e-12
