"""Descriptor attacks that only ask: closed forms, SciPy's evolution, exact counts of questions, the
rule on the uint8 file, and what must not succeed."""
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.core import make_generator, round_to_8bit, to_uint8
from robustnb.attacks.score_based import square_side
from robustnb.attacks.ssim_rule import SSIM, ssim
from robustnb.attacks.threat_models import L2, Linf
from robustnb.descriptors import query_attacks as ds
from robustnb.descriptors.attack import fit_8bit
from robustnb.descriptors.blackbox import descriptor_distance
from robustnb.descriptors.query_attacks import nes_descriptor, pixel_evolution, square_descriptor

N, T, D = 5, 3, 12
attacks = dict(pixel=partial(pixel_evolution, pixels=1),
               square=partial(square_descriptor, queries=30),
               nes=partial(nes_descriptor, queries=30, samples=6))
named = pytest.mark.parametrize('name', attacks)
rule = SSIM(.95)


def images(n=N, size=16, channels=3, dtype=torch.float64, seed=0):
    coarse = torch.rand(n, channels, 5, 5, generator=make_generator(seed, 'images'), dtype=dtype)
    return round_to_8bit(nn.functional.interpolate(
        .15+.7*coarse, size=(size, size+2), mode='bilinear'))


def net(shape=(3, 16, 18), out=D, seed=0, smooth=True):
    "A frozen net of unit descriptors in float64"
    g = make_generator(seed, 'net')
    m = nn.Sequential(nn.AvgPool2d(2) if smooth else nn.Identity(), nn.Flatten(),
                      nn.LazyLinear(24), nn.Tanh(), nn.Linear(24, out)).double()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        m(torch.zeros(1, *shape, dtype=torch.float64))
    for p in m.parameters():
        p.data = torch.randn(p.shape, generator=g,
                             dtype=torch.float64)/(p.shape[-1]**.5 if p.ndim > 1 else 10)
    m.requires_grad_(False).eval()
    return lambda x: nn.functional.normalize(m(3*(x-.5).double()), dim=1).to(x)


class Oracle:
    "Counts, checks every question, and fails as told"
    def __init__(self, box, limit=None, silent=lambda x: torch.zeros(len(x), dtype=torch.bool)):
        self.box = box
        self.silent = silent
        self.calls = []
        self.asked = []
        self.limit, self.used = limit, 0
        if limit is not None:
            type(self).left = property(lambda s: s.limit-s.used if s.limit is not None
                                                 else float('inf'))

    def __call__(self, x):
        assert torch.equal(x, round_to_8bit(x))
        assert len(x)
        d = self.box(x).clone()
        if self.limit is not None:
            assert self.left > 0, 'asked although the budget is spent'
            d[self.left:] = torch.nan
        d[self.silent(x)] = torch.nan
        self.used += len(x) if self.limit is None else min(len(x), self.left)
        self.calls.append(len(x))
        self.asked.append(x.clone())
        return d


def problem(**k):
    x = images()
    box = net(**k)
    return (x, box, box(images(N*T, seed=1)).view(N, T, D),
            lambda a, t: descriptor_distance(box(a), t))


def really_allowed(x, a, level=.95):
    "The rule as a checker of files applies it"
    metrics = pytest.importorskip('skimage.metrics')
    pairs = zip(to_uint8(x), to_uint8(a))
    return all(metrics.structural_similarity(o, p, channel_axis=2, data_range=255) >= level
               for o, p in pairs)


@named
def test_promises(name):
    attack = attacks[name]
    x, box, t, far = problem()
    image = x.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    oracle = Oracle(box)
    out = attack(oracle, x, t, rule, make_generator(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.equal(x, image)
    assert out.dtype == x.dtype
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(out, round_to_8bit(out))
    assert really_allowed(x, out)
    assert all(really_allowed(x[i:i+1].expand(len(o), -1, -1, -1), o)
               for i, o in enumerate(torch.cat(oracle.asked)[:N, None]))
    gain = far(x, t)-far(out, t)
    assert (gain >= 0).all()
    assert gain.max() > 0
    clean = lambda a: x[torch.cdist(a.flatten(1), x.flatten(1)).argmin(1)]
    for a in oracle.asked:
        assert really_allowed(clean(a), a), 'no question breaks the rule'
    first = far(x, t)
    asked = torch.cat(oracle.asked)
    who = torch.cdist(asked.flatten(1), x.flatten(1)).argmin(1)
    least = torch.stack(
        [far(asked[who == i], t[i].expand((who == i).sum(), -1, -1)).min() for i in range(N)])
    assert torch.allclose(far(out, t), least), 'the best image asked about comes back'
    assert (least <= first).all(), 'the best image asked about comes back'
    assert torch.equal(attack(box, x, t, rule, make_generator(3)), out)
    assert torch.equal(attack(box, x, t, rule), attack(box, x, t, rule, make_generator(0)))
    assert not torch.equal(attack(box, x, t, rule, make_generator(4)), out)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(attack(box, x[order], t[order], rule, make_generator(3)), out[order])
    assert torch.equal(
        torch.cat([attack(box, x[i:i+1], t[i:i+1], rule, make_generator(3)) for i in range(N)]),
        out), 'an image does not know its batch'


@named
def test_goes_on_from_a_start_and_is_never_worse(name):
    attack, (x, box, t, far) = attacks[name], problem()
    start = square_descriptor(box, x, t, rule, make_generator(9), queries=60)
    oracle = Oracle(box)
    out = attack(oracle, x, t, rule, start=start)
    assert torch.equal(oracle.asked[0], start)
    assert (far(out, t) <= far(start, t)).all()
    assert really_allowed(x, out)
    if name != 'pixel':
        assert (far(out, t) < far(start, t)).any()
    wild = x + .3*torch.randn(x.shape, generator=make_generator(1), dtype=x.dtype)
    oracle = Oracle(box)
    out = attack(oracle, x, t, rule, start=wild.clamp(0, 1))
    first = fit_8bit(x, wild, rule)
    assert torch.equal(oracle.asked[0], first)
    assert really_allowed(x, out)
    assert (far(out, t) <= far(first, t)).all()


@named
def test_a_constant_descriptor_cannot_be_moved(name):
    x, _, t, _ = problem()
    for value in (0., 1.):
        assert torch.equal(
            attacks[name](lambda a: torch.full((len(a), D), value).to(a), x, t, rule), x)
    assert torch.equal(
        attacks[name](lambda a: torch.full((len(a), D), torch.nan).to(a), x, t, rule), x)
    for still in (SSIM(1.), Linf(0.)):
        assert torch.equal(attacks[name](net(), x, t, still), x)


@named
@pytest.mark.parametrize('threat', (Linf(8/255), L2(1.), Linf(.03)), ids=repr)
def test_other_threat_models(name, threat):
    x, box, t, far = problem()
    out = attacks[name](box, x, t, threat)
    assert threat.allows(x, out).all()
    assert (threat.distance(x, out) <= threat.eps+1e-9).all()
    assert torch.equal(out, round_to_8bit(out))
    assert (far(out, t) <= far(x, t)).all()
    assert (far(out, t) < far(x, t)).sum() >= (1 if name == 'pixel' else N)
    if threat == Linf(8/255) and name != 'pixel':
        assert threat.distance(x, out).max() > 7.9/255


@named
def test_float32_grey_and_odd_shapes(name):
    for shape in ((1, 7, 7), (3, 8, 21), (1, 13, 9)):
        x = torch.rand(2, *shape, generator=make_generator(2))
        box = net(shape, out=D)
        t = box(torch.rand(2, *shape, generator=make_generator(3)))[:, None]
        out = attacks[name](box, x, t, rule)
        assert out.dtype == torch.float32
        assert torch.equal(out, round_to_8bit(out))
        assert (ssim(round_to_8bit(x).double(), out.double()) >= .95-1e-6).all()


def test_queries_are_counted_as_granted():
    x, box, t, _ = problem()
    for queries in (1, 2, 17, 130):
        oracle = Oracle(box)
        square_descriptor(oracle, x, t, rule, queries=queries)
        assert oracle.calls == [N]*queries
    for queries, samples, calls in ((1, 4, []), (3, 4, []), (4, 4, [2, 1]), (5, 4, [2, 1, 1]),
                                    (6, 4, [4, 1]), (7, 4, [4, 1, 1]), (16, 4, [4, 1]*3),
                                    (14, 6, [6, 1, 4, 1, 1])):
        oracle = Oracle(box)
        nes_descriptor(oracle, x, t, rule, queries=queries, samples=samples)
        assert oracle.calls == [N]+[N*k for k in calls], (queries, samples, oracle.calls)
        assert oracle.used <= N*queries, (queries, samples, oracle.calls)
        if queries > 3:
            assert oracle.used == N*queries
    for batch, sizes in ((10**6, [N*150]), (750, [750]), (400, [400, 350])):
        oracle = Oracle(box)
        pixel_evolution(oracle, x, t, Linf(1.), pixels=2, batch=batch)
        assert oracle.calls == [N] + sizes*10, (
            'one question for the start, then 150 members 5 times for a pixel')
    one, other = (pixel_evolution(box, x, t, rule, pixels=1, batch=b) for b in (97, 10**6))
    assert torch.equal(one, other)
    oracle = Oracle(box)
    assert torch.equal(pixel_evolution(oracle, x, t, rule, pixels=0), x)
    assert oracle.calls == [N]


@named
def test_the_budget_ends_in_the_middle(name):
    x, box, t, far = problem()
    for limit in (2, N, N+3, 3*N+2, 60):
        oracle = Oracle(box, limit)
        out = attacks[name](oracle, x, t, rule)
        assert oracle.used == limit
        assert really_allowed(x, out)
        assert (far(out, t) <= far(x, t)).all()
        asked = torch.cat(oracle.asked)
        if limit <= N:
            assert torch.equal(out, x)
        if limit == 60:
            assert (far(out, t) < far(x, t)).any()
        if limit == 2:
            assert len(oracle.calls) == 1
    full = attacks[name](Oracle(box, 10**6), x, t, rule)
    assert torch.equal(full, attacks[name](box, x, t, rule)), 'a budget that lasts changes nothing'
    assert torch.equal(
        attacks[name](type('Spent', (), dict(left=0, __call__=lambda s, x: 1/0))(), x, t, rule), x)


@named
def test_missing_answers_are_survived(name):
    x, box, t, far = problem()
    oracle = Oracle(box, silent=lambda a: (a*255).round().flatten(1).sum(1) % 3 == 0)
    out = attacks[name](oracle, x, t, rule)
    asleep = oracle.silent(x)
    assert asleep.any(), 'the case is worth looking at'
    assert not asleep.all(), 'the case is worth looking at'
    assert torch.equal(out[asleep], x[asleep])
    assert (far(out, t) <= far(x, t)).all()
    assert (far(out, t)[~asleep] < far(x, t)[~asleep]).any()
    assert not oracle.silent(out[~asleep]).any(), 'an unanswered image is not chosen'
    clean = torch.cdist(torch.cat(oracle.asked[1:]).flatten(1), x.flatten(1)).argmin(1)
    assert not asleep[clean].any(), 'no more questions about an image whose start had no answer'
    for value in (torch.inf, torch.nan):
        deaf = lambda a: torch.where((a == x[:1]).flatten(1).all(1, keepdim=True)
                                     | (a == x[1:2]).flatten(1).all(1, keepdim=True),
                                     box(a), torch.tensor(value).to(a))
        assert torch.equal(attacks[name](deaf, x, t, rule), x)


def test_fit_8bit():
    x = images(40, 14)
    noise = torch.randn(x.shape, generator=make_generator(1), dtype=x.dtype)
    for size in (.02, .1, .6, 3.):
        fit = fit_8bit(x, x+size*noise, rule)
        assert torch.equal(fit, round_to_8bit(fit))
        assert really_allowed(x, fit)
        assert torch.equal(fit_8bit(x, fit, rule), fit)
        if size >= .1:
            assert (ssim(x, fit) < .953).all(), 'little of the allowed change is given away'
    assert torch.equal(fit_8bit(x, x+.1*noise, SSIM(1.)), x)
    gentle = x+.004*noise
    assert torch.equal(fit_8bit(x, gentle, SSIM(.5)), round_to_8bit(gentle.clamp(0, 1)))
    assert (ssim(x, round_to_8bit(rule.project(x, x+.1*noise))) < .95).any(), (
        'rounding alone breaks the rule')
    rough = (x+.0015).clamp(0, 1)
    assert torch.equal(fit_8bit(rough, rough, rule),
                       round_to_8bit(rough)), 'the clean image is rounded too'
    rough = (x + .9/255*(torch.rand(x.shape, generator=make_generator(5))-.5)).clamp(0, 1)
    assert torch.equal(fit_8bit(rough, x+.1*noise, rule),
                       fit_8bit(round_to_8bit(rough), x+.1*noise, rule))
    level = 1-(ssim(x, round_to_8bit((x+.05*noise).clamp(0, 1)))[:1]).item()
    tight = SSIM(1-level+1e-9)
    assert ssim(x[:1], fit_8bit(x[:1], round_to_8bit((x+.05*noise).clamp(0, 1))[:1],
                                     tight)).item() >= tight.level, 'no tolerance'
    with pytest.raises(ValueError, match='shape of `x`'):
        fit_8bit(x, x[:1], rule)
    with pytest.raises(ValueError, match='must be finite'):
        fit_8bit(x, x*torch.nan, rule)
    with pytest.raises(ValueError, match='pixels in'):
        fit_8bit(2*x, x, rule)


def linear(seed=0, shape=(3, 16, 18)):
    "One number, linear in the pixels, with smooth weights; the target is far above"
    w = nn.functional.interpolate(
        torch.randn(1, shape[0], 4, 4, generator=make_generator(seed), dtype=torch.float64),
        size=shape[1:], mode='bicubic')
    return lambda a: (a*w).flatten(1).sum(1, keepdim=True), w[0]


def test_closed_forms_on_a_linear_oracle():
    x = images()
    t = torch.full((N, 1, 1), 1e3, dtype=torch.float64)
    model, w = linear()
    gain = lambda a: (model(a)-model(x))[:, 0]
    exact = torch.maximum((w*(1-x)), (-w*x)).sum(1).flatten(1).amax(1)
    runs = torch.stack([gain(pixel_evolution(model, x, t, Linf(1.), make_generator(s),
                                             pixels=1))/exact for s in range(4)])
    assert (runs <= 1+1e-9).all()
    assert runs.mean() > .75
    assert runs.min() > .55
    two = gain(pixel_evolution(model, x, t, Linf(1.), pixels=3))/exact
    assert (two > 1.5).all(), 'three pixels in turn, from fresh populations'
    exact = 4*.999/255*w.abs().sum()
    for attack, share in ((partial(nes_descriptor, queries=300), .9),
                          (partial(square_descriptor, queries=600), .45)):
        reached = gain(attack(model, x, t, Linf(4/255)))/exact
        assert (reached < 1.002).all(), reached
        assert reached.mean() > share, reached
    best = x
    for _ in range(25):
        best = fit_8bit(x, best + rule.eps*rule.steepest(w.expand_as(x), x, best), rule)
    best = gain(best)
    share = gain(nes_descriptor(model, x, t, rule, queries=400))/best
    assert share.mean() > .85, share
    assert (share < 1.05).all(), share
    for attack in attacks.values():
        assert (gain(attack(model, x, -t, rule)) <= 0).all(), 'towards a target below'


def new_memory(n, rows, length, dim):
    return ds._new_memory(torch.zeros(n, 1, 1, length).double(), rows, dim)


@pytest.mark.parametrize('large', (90, 255))
def test_gradient_from_memory_is_exact_where_the_oracle_is_linear(large):
    g = make_generator(0)
    w = torch.randn(*(2, 6, 20), generator=g, dtype=torch.float64)
    steps = torch.randint(-large, large+1, (2, 40, 20), generator=g)
    d = torch.randn(*(2, 6), generator=g, dtype=torch.float64)
    t = torch.randn(*(2, 3, 6), generator=g, dtype=torch.float64)
    changes = (steps.double()/255) @ w.mT
    memory = new_memory(2, 30, 20, 6)
    changes[:, 3] = torch.nan
    for s in (slice(0, 7), slice(7, 20), slice(20, 40)):
        ds._remember(memory, steps[:, s].short(), changes[:, s])
    assert memory['steps'].dtype == torch.int8
    kept = memory['steps'].double()*memory['unit'][:, :, None]
    assert memory['count'] == 40
    assert torch.allclose(memory['gram'], kept @ kept.mT)
    wanted = steps[:, 10:].roll(10, 1).double()/255
    assert torch.allclose(kept, wanted, atol=1e-9 if large < 128 else 1.01/255, rtol=0)
    point = d.clone().requires_grad_()
    u = torch.autograd.grad(descriptor_distance(point, t).sum(), point)[0]
    wanted = (u[:, None] @ w)[:, 0]
    found = ds._gradient(memory, d, t, (2, 20))
    assert (nn.functional.cosine_similarity(found, wanted) > .995).all()
    assert (found-wanted).norm() < .1*wanted.norm()
    lam = .01*(kept*kept).sum(2).mean(1)
    slow = torch.stack([kept[i].T @ torch.linalg.inv(kept[i] @ kept[i].T + lam[i]*torch.eye(30))
                        @ (memory['changes'][i] @ u[i]) for i in range(2)])
    assert torch.allclose(found, slow, atol=1e-9)
    few = new_memory(2, 30, 20, 6)
    ds._remember(few, steps[:, :5].short(), changes[:, :5])
    assert (few['steps'][:, 3] == 0).all()
    assert (few['changes'][:, 3] == 0).all()
    assert few['gram'].isfinite().all()
    a = few['steps'][:, :5].double()*few['unit'][:, :5, None]
    lam = .01*(a**2).sum(2).mean(1)
    a = a[0]
    assert torch.allclose(
        ds._gradient(few, d, t, (2, 20))[0],
        a.T @ torch.linalg.inv(a @ a.T + lam[0]*torch.eye(5)) @ few['changes'][0, :5] @ u[0])


def test_a_long_step_is_summed_in_parts(monkeypatch):
    g = make_generator(0)
    steps = torch.randint(-100, 101, (1, 5, 2**14 + 3), generator=g).short()
    changes = torch.randn(1, 5, 6, generator=g, dtype=torch.float64)
    memory = new_memory(1, 5, steps.shape[2], 6)
    ds._remember(memory, steps, changes)
    kept = steps[0].double()/255
    assert len(ds._parts(steps[0])) > 1
    assert torch.allclose(memory['gram'][0], kept @ kept.T)


def test_large_images_are_asked_about_a_few_at_a_time():
    """Ten images of 224 px keep a byte for each number of a step, and the oracle never gets more
    than 13 of them at once"""
    x = images(10, 224, dtype=torch.float32)
    calls = []
    def box(o):
        calls.append(len(o))
        return nn.functional.avg_pool2d(o, 64).flatten(1)
    t = box(x.flip(3))[:, None]
    out = nes_descriptor(box, x, t, Linf(4/255), queries=4, samples=2)
    assert (descriptor_distance(box(out), t) < descriptor_distance(box(x), t)).all()
    assert calls[2:-2] == [13, 7, 10]
    memory = ds._new_memory(x, 100, 27)
    held = sum(o.numel()*o.element_size() for o in memory.values() if isinstance(o, torch.Tensor))
    assert held < 160e6


def test_only_a_nearer_candidate_replaces_an_image():
    now = torch.zeros(3, 1, 1, 1)
    candidates = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8).view(3, 2, 1, 1, 1)
    best, value = ds._best(now, torch.ones(3), candidates,
                           torch.tensor([[2., 1.], [.5, .2], [.7, torch.inf]]))
    assert torch.equal(best.flatten(), torch.tensor([0, 4, 5])/255)
    assert torch.equal(value, torch.tensor([1., .2, .7]))


def test_memory_and_squares_are_worth_their_queries(monkeypatch):
    x, box, t, far = problem()
    reached = {}
    for rows in (ds._ROWS, 4):
        monkeypatch.setattr(ds, '_ROWS', rows)
        reached[rows] = torch.stack([far(
            nes_descriptor(box, x, t, rule, make_generator(s), queries=100, samples=4),
            t).mean() for s in range(3)])
    assert reached[ds._ROWS].mean() - .01 > reached[max(reached)].mean(), reached
    noise = torch.stack([far(fit_8bit(
        x, x + .2*torch.randn(x.shape, generator=make_generator(i), dtype=x.dtype), rule),
                             t) for i in range(100)]).amin(0).mean()
    squares = far(square_descriptor(box, x, t, rule, queries=100), t).mean()
    start = far(x, t).mean()
    assert start-reached[max(reached)].min() > 2*(start-noise), (start, noise, squares, reached)
    assert start-squares > 1.5*(start-noise), (start, noise, squares, reached)


def test_evolution_is_that_of_scipy():
    optimize = pytest.importorskip('scipy.optimize')
    x, box, t, far = problem(smooth=False)
    x = x[:2]
    t = t[:2]

    def sequential(i, seed):
        "SciPy's loop, one image in each call, as the second place ran it"
        counted = [0]
        def height(v):
            counted[0] += 1
            v = np.minimum(v.astype(int), (15, 17, 255, 255, 255))
            a = x[i:i+1].clone()
            a[0, :, v[0], v[1]] = torch.from_numpy(v[2:]/255)
            return far(a, t[i:i+1]).item()
        found = optimize.differential_evolution(height, [(0, 16), (0, 18)] + [(0, 256)]*3,
                                                popsize=30, maxiter=4, recombination=1,
                                                atol=-1, polish=False, seed=seed)
        return found.fun, counted[0]

    theirs = [[sequential(i, s) for s in range(8)] for i in range(2)]
    ours = []
    calls = []
    for s in range(8):
        oracle = Oracle(box)
        ours.append(far(pixel_evolution(oracle, x, t, Linf(1.), make_generator(s), pixels=1), t))
        assert oracle.used == 2*751
        assert len(oracle.calls) == 6
        calls.append(len(oracle.calls))
    ours = torch.stack(ours, 1)
    other = torch.tensor([[o[0] for o in row] for row in theirs])
    assert all(o[1] == 750 for row in theirs for o in row), 'as many questions for each image'
    assert 2*750 >= 50*max(calls)
    gain = far(x, t)[:, None]-ours
    scipy_gain = far(x, t)[:, None]-other
    assert (scipy_gain > 0).all(), (gain.mean(1), scipy_gain.mean(1))
    assert ((gain.mean(1)/scipy_gain.mean(1)).log().abs() < .2).all(), (
        gain.mean(1), scipy_gain.mean(1))


@pytest.mark.parametrize('coarse', (False, True))
def test_evolution_follows_its_rule(coarse):
    g = make_generator(0)
    seen = []
    p, k, generations = 8, 3, 3
    u = torch.rand(2, 1+generations, p, 2*k, generator=g, dtype=torch.float64)
    goal = torch.tensor([.2, .9, .5], dtype=torch.float64)
    depth = lambda o: (2*(o-goal).square().sum(-1)).round() if coarse else (o-goal).square().sum(-1)
    def height(genes):
        seen.append(genes.clone())
        return depth(genes)
    best, value = ds._evolve(height, u)
    assert len(seen) == 1+generations
    for column in seen[0].transpose(1, 2).reshape(-1, p):
        assert sorted((column*p).long().tolist()) == list(range(p)), 'a Latin hypercube'
    for i in range(2):
        genes = seen[0][i]
        h = depth(genes)
        for n in range(1, 1+generations):
            v = u[i, n]
            child = torch.empty_like(genes)
            lead = genes[h.argmin()]
            scale = .5+.5*v[0, 2]
            for m in range(p):
                rest = [(m+o) % p for o in range(1, p)]
                first = rest.pop(int(v[m, 0]*(p-1)))
                second = rest[int(v[m, 1]*(p-2))]
                child[m] = lead + scale*(genes[first]-genes[second])
                for c in range(k):
                    if not 0 <= child[m, c] <= 1:
                        child[m, c] = v[m, 3+c]
            assert torch.allclose(child, seen[n][i])
            new = depth(child)
            genes = torch.where((new <= h)[:, None], child, genes)
            h = torch.minimum(new, h)
        assert torch.allclose(best[i], genes[h.argmin()]), 'of equal members the child stays'
        assert torch.isclose(value[i], h.min())


def test_members_outside_the_rule_are_not_queried():
    x, box, t, far = problem()
    start = nes_descriptor(box, x, t, SSIM(.97), queries=60)
    oracle = Oracle(box)
    pixel_evolution(oracle, x, t, SSIM(.97), start=start, pixels=1)
    assert N < oracle.used < .5*(N*751), 'near the limit the rule forbids most pixels'
    oracle = Oracle(box)
    assert torch.equal(pixel_evolution(oracle, x, t, SSIM(1.)),
                       x), 'only members equal to the image itself'
    assert oracle.used < 100, 'only members equal to the image itself'
    free = Oracle(box)
    pixel_evolution(free, x, t, SSIM(.01), pixels=1)
    assert free.used == N*751
    for a in free.asked[1:]:
        assert (a.view(N, -1, *x.shape[1:]) != x[:, None]).any(2).flatten(2).sum(2).le(1).all()


def test_squares():
    x = images(dtype=torch.float64)
    t = torch.full((N, 1, 1), 1e3, dtype=torch.float64)
    seen = []
    def up(a):
        seen.append(a.clone())
        return torch.full((len(a), 1), -float(len(seen))).to(a)
    square_descriptor(up, x, t, Linf(5/255), queries=9, p=1.)
    d = torch.stack(seen)-x
    assert torch.allclose(d[2::2], -d[1::2][:4],
                          atol=1e-12), 'a square that failed is tried with the opposite sign'
    assert len(d[1::2].flatten(1).unique(dim=0)) == 4, 'and then there is a new one'
    for o in d[1:]:
        for i in range(N):
            where = o[i].abs().amax(0) > 0
            rows = where.any(1).nonzero().flatten()
            cols = where.any(0).nonzero().flatten()
            assert where[rows[0]:rows[-1]+1, cols[0]:cols[-1]+1].all()
            assert len(rows) == len(cols)
            assert all(len(o[i, c][where].sign().unique()) == 1 for c in range(3))
            assert torch.allclose(o[i].abs()[:, where], torch.tensor(5/255).double())
    sides = [int((o[0].abs().amax(0) > 0).any(1).sum()) for o in d[1:]]
    assert sides[::2] == [square_side(k, 9, 1., x) for k in (1, 3, 5, 7)]
    assert sides[1::2] == sides[::2]
    assert sides[0] > sides[-1]
    seen.clear()
    square_descriptor(up, x, t, Linf(5/255), queries=500)
    reached = (torch.stack(seen) != x).any(2).flatten(0, 1).any(0)
    assert reached[[0, 0, -1, -1], [0, -1, 0, -1]].all(), 'every part is reached'
    assert reached.float().mean() > .9, 'every part is reached'


@named
def test_errors(name):
    x, box, t, _ = problem()
    attack = attacks[name]
    for bad in (t[0], t[:2], t*torch.nan):
        with pytest.raises(ValueError, match='`targets` must be (finite )?descriptors'):
            attack(box, x, bad, rule)
    for bad in (lambda a: box(a)[:, :1], lambda a: box(a)[:2], lambda a: box(a)[:, :5]):
        with pytest.raises(ValueError, match='`oracle` must answer with one descriptor'):
            attack(bad, x, t, rule)
    with pytest.raises(ValueError, match='pixels in'):
        attack(box, 255*x, t, rule)
    with pytest.raises(ValueError, match='shape of `x`'):
        attack(box, x, t, rule, start=x[:2])
    wrong = dict(pixel=[dict(pixels=-1), dict(batch=0)],
                 square=[dict(queries=0), dict(queries=9.), dict(p=0), dict(p=1.1), dict(p=torch.nan)],
                 nes=[dict(queries=0), dict(samples=3), dict(samples=4.), dict(samples=0),
                      dict(samples=1000)])[name]
    for k in wrong:
        with pytest.raises((ValueError, TypeError), match=f'`{next(iter(k))}` must'):
            attack.func(box, x, t, rule, **k)
