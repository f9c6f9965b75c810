"""Black-box attacks: closed forms, slow loops, an independent Square and an evolution by scipy,
honest counts of queries, and what must not succeed."""
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks import score_based
from robustnb.attacks.gradient import cross_entropy, margin, pgd
from robustnb.attacks.score_based import one_pixel, random_search, square, square_side
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.threat_models import L0, L1, L2, Linf
from robustnb.contract import open_model
from robustnb.core import draw, image_generators, make_generator
from helpers_attacks import Ten, grey, linear, make_batch, make_net, same, snapshot, wrong_uses


class Counter(nn.Module):
    "How often each image was asked about; images are told apart by the one nearest to the query"
    def __init__(self, net, x):
        super().__init__()
        self.net = net
        self.x = x
        self.begin()
        open_model(self.eval(), x)
        self.begin()

    def begin(self):
        self.asked = torch.zeros(len(self.x), dtype=torch.int64)
        self.seen = []

    def forward(self, x):
        who = torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)
        self.asked += who.bincount(minlength=len(self.x))
        self.seen.append((who.clone(), x.clone()))
        return self.net(x)


attacks = dict(random_search=partial(random_search, tries=60), square=partial(square, queries=60),
               square_ce=partial(square, queries=60, loss=cross_entropy),
               one_pixel=partial(one_pixel, population=20, generations=3))
cases = [(name, threat) for name in attacks
         for threat in (Linf(0), Linf(4/255), Linf(1), L2(0), L2(.3), L1(3.), SSIM(.95), L0(0),
                        L0(1), L0(4), L0(1000))
         if name == 'random_search'
            or isinstance(threat, L0) == (name == 'one_pixel') and not isinstance(threat, SSIM)]
named = pytest.mark.parametrize('name, threat', cases,
                                ids=lambda o: o if isinstance(o, str) else repr(o))


@named
def test_promises(name, threat):
    attack = attacks[name]
    model = make_net()
    x, y = make_batch(model=model)
    y = torch.where(torch.arange(12) == 3, (y+1) % 5, y)
    before = snapshot(model)
    image = x.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    out = attack(model, x, y, threat, make_generator(3))
    assert same(snapshot(model), before)
    assert torch.equal(x, image)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    assert threat.allows(x, out).all(), 'an image that is wrong already is left alone'
    assert torch.equal(out[3], x[3]), 'an image that is wrong already is left alone'
    gain = margin(model(out), y) - margin(model(x), y)
    assert (gain >= 0).all()
    assert (gain.max() > 0) == (threat.eps > 0)
    assert torch.equal(attack(model, x, y, threat, make_generator(3)), out)
    assert torch.equal(attack(model, x, y, threat), attack(
        model, x, y, threat, make_generator(0))), 'no generator stands for seed 0'
    if threat.eps > 0:
        assert not torch.equal(attack(model, x, y, threat, make_generator(4)), out)
    order = torch.randperm(12, generator=make_generator(0))
    assert (attack(model, x[order], y[order], threat,
                   make_generator(3)) - out[order]).abs().max() < 1e-9
    some = [0, 3, 7, 11]
    alone = torch.cat(
        [attack(model, x[i:i+1], y[i:i+1], threat, make_generator(3)) for i in some])
    assert (alone-out[some]).abs().max() < 1e-9, 'an image does not know its batch'


@named
def test_a_constant_answer_cannot_be_changed(name, threat):
    x = make_batch()[0]
    for y in (torch.full((12,), 9), torch.zeros(12, dtype=torch.int64)):
        assert torch.equal(attacks[name](Ten().eval(), x, y, threat), x)


@named
def test_float32_and_images_of_odd_shapes(name, threat):
    for shape in ((1, 1, 1), (3, 2, 2), (1, 3, 17), (2, 5, 4)):
        x = torch.rand(3, *shape, generator=make_generator(0))
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval().requires_grad_(False)
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(3, x[0].numel(), generator=make_generator(1)))
        y = model(x).argmax(1)
        if isinstance(threat, SSIM) and min(shape[1:]) < 7: continue
        out = attacks[name](model, x, y, threat)
        assert out.dtype == x.dtype
        assert threat.allows(x, out).all()


@pytest.mark.parametrize('threat', (Linf(.03), L2(.4), L1(3.)), ids=repr)
@pytest.mark.parametrize('queries', (2, 3, 40, 250))
def test_no_image_is_asked_about_more_often_than_granted(threat, queries):
    x, y = grey()
    model = Counter(linear()[0], x).eval()
    out = square(model, x, y, threat, queries=queries)
    assert (model.asked[1:] == queries-1).all(), (
        'the first image is looked at once more, by `check_attack`')
    assert model.asked[0] == queries, 'the first image is looked at once more'
    if queries == 2:
        assert torch.equal(out, x)
    elif queries > 40:
        assert (out != x).flatten(1).any(1).all()


@pytest.mark.parametrize('attack, threat', (
    (partial(random_search, tries=150), L2(.8)), (partial(square, queries=150), Linf(.03)),
    (partial(square, queries=150), L2(.4)), (partial(square, queries=150), L1(3.)),
    (partial(one_pixel, population=10, generations=10), L0(2))),
                         ids=('random', 'Linf', 'L2', 'L1', 'L0'))
def test_an_image_that_fell_is_left_alone(attack, threat):
    x, y = grey(20)
    w = linear()[1]
    heights = (w*x).flatten(1).sum(1)
    for bias in heights.quantile(torch.tensor([.5, .7, .95], dtype=x.dtype)).tolist():
        model = Counter(linear(bias)[0], x).eval()
        out = attack(model, x, y, threat)
        fallen, step = model.net(out).argmax(1) == 1, 1
        if 'generations' in attack.keywords:
            step = 10
        for i in range(1, 20):
            asked = torch.cat([o[who == i] for who, o in model.seen])
            wrong = [bool(o.any()) for o in (
                margin(model.net(asked[1:]), y[:1].expand(len(asked)-1)) > 0).split(step)]
            if margin(model.net(x[i:i+1]), y[:1]) > 0:
                assert len(asked) == 1
            else:
                assert not any(wrong[:-1])
                assert wrong[-1] == fallen[i]
                assert fallen[i] or len(asked) >= 100


def test_one_pixel_and_random_search_count_as_documented():
    x, y = grey()
    for attack, threat, granted in ((partial(random_search, tries=17), Linf(.01), 17),
                                    (partial(one_pixel, population=9, generations=4), L0(2), 9*5)):
        model = Counter(linear()[0], x).eval()
        attack(model, x, y, threat)
        assert (model.asked[1:] == granted+1).all()
        model = Counter(linear(-1000.)[0], x).eval()
        attack(model, x, y, threat)
        assert (model.asked[1:] == 1).all(), 'images that are wrong need no more than a look'


@pytest.mark.parametrize('threat, exact, least', (
    (Linf(.03), lambda w: .03*w.abs().sum(), .98), (L2(.4), lambda w: .4*w.norm(), .55),
    (L1(2.), lambda w: 2*w.abs().max(), .5)),
                         ids=('Linf', 'L2', 'L1'))
def test_square_comes_near_the_closed_form(threat, exact, least):
    model, w = linear()
    x, y = grey()
    reached = [(margin(model(square(model, x, y, threat, queries=q)), y) - margin(model(x), y))
               .detach()/exact(w) for q in (3, 60, 1500)]
    assert (reached[2] <= 1+1e-6).all()
    assert (reached[0] <= reached[1]).all()
    assert reached[1].mean() < .9*reached[2].mean()
    assert reached[2].mean() > least
    assert (margin(model(square(model, x, 1-y, threat)), y) == margin(model(x), y)).all()


def test_the_first_image_has_stripes_and_the_second_differs_by_a_square():
    x, y = grey(4)
    model = Counter(linear()[0], x).eval()
    square(model, x, y, Linf(.1), queries=12)
    asked = torch.stack([o[1] for o in model.seen[2:]])
    d = asked-x
    assert torch.allclose(d.abs(), torch.full_like(
        d, .1)), 'every pixel is at one end of its range, here none is clamped'
    assert torch.equal(d[0].sign(), d[0, :, :, :1].sign().expand_as(d[0]))
    assert len(d[0].sign().flatten(1).unique(dim=0)) == 4
    model = linear()[0]
    seen = []
    best = asked[0]
    height = margin(model(asked[0]), y)
    for o in asked[1:]:
        changed = ((o-best).abs() > 1e-9).any(1)
        for i in range(4):
            rows = changed[i].any(1).nonzero().flatten()
            cols = changed[i].any(0).nonzero().flatten()
            if len(rows):
                assert len(rows) <= 5
                assert len(cols) <= 5
                assert rows[-1]-rows[0] < 5
                assert cols[-1]-cols[0] < 5
            for c in range(3):
                assert len((o[i, c][changed[i]]-x[i, c][changed[i]]).sign().unique()) <= 1, (
                    'one colour for the whole square')
        value = margin(model(o), y)
        better = value > height
        seen.append(better)
        best = torch.where(better.view(-1, 1, 1, 1), o, best)
        height = torch.where(better, value, height)
    assert 0 < torch.stack(seen).float().mean() < 1
    kept = torch.where((height > margin(model(x), y)).view(-1, 1, 1, 1), best, x)
    assert torch.equal(square(model, x, y, Linf(.1), queries=12),
                       kept), 'only what improves is kept'
    assert not torch.equal(kept, x), 'only what improves is kept'


def test_squares_reach_every_corner():
    x, y = grey(2)
    model = Counter(linear()[0], x).eval()
    square(model, x, y, Linf(.1), queries=900)
    late = torch.stack([o[1] for o in model.seen[500:]])
    moved = (model.seen[-1][1]-late).abs().amax((0, 1, 2))
    assert (moved[[0, 0, -1, -1], [0, -1, 0, -1]] > 0).all()


def test_squares_shrink_on_the_paper_schedule():
    x = torch.zeros(1, 3, 32, 32)
    sides = [square_side(at, 10_000, .8, x)
             for at in (1, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999)]
    assert sides == [round((.8/2**k*1024)**.5) for k in (0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9)]
    assert [square_side(at, 500, .8, x) for at in (0, 3, 11, 26)] == [
        square_side(20*at, 10_000, .8, x) for at in (0, 3, 11, 26)]
    assert square_side(1, 100, 1., torch.zeros(1, 1, 4, 40)) == 4


def sides(queries, p, pixels):
    marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    return lambda at: max(
        1, round((p*pixels/2**len([m for m in marks if at*10_000//queries > m]))**.5))


@pytest.mark.parametrize('queries', (12, 120, 240))
@pytest.mark.parametrize('eps', (.004, .02, .05))
def test_linf_squares_follow_a_slow_loop(eps, queries):
    model = make_net()
    side_at = sides(queries, .8, 64)
    x, y = make_batch(model=model)
    out = square(model, x, y, Linf(eps), make_generator(7), queries=queries)
    fell = 0
    for i, g in enumerate(image_generators(make_generator(7), x)):
        ask = lambda image: margin(model(image[None]), y[i:i+1]).item()
        clean = x[i]
        signs = draw(torch.rand, [g], 192, like=x)[0]
        best = clean.clone()
        for c in range(3):
            for col in range(8):
                best[c, :, col] = (
                    (clean[c, :, col] + (eps if signs[8*c+col] >= .5 else -eps)).clamp(0, 1))
        height = ask(best)
        for at in range(1, queries-2):
            if at % 100 == 1:
                numbers = draw(torch.rand, [g], 100, 8, like=x)[0]
            if height > 0: break
            u = numbers[(at-1) % 100].tolist()
            side = min(side_at(at), 8)
            new = best.clone()
            top = int(u[0]*(9-side))
            left = int(u[1]*(9-side))
            for c in range(3):
                for row in range(top, top+side):
                    for col in range(left, left+side):
                        new[c, row, col] = min(
                            max(clean[c, row, col].item() + (eps if u[5+c] >= .5 else -eps), 0), 1)
            value = ask(new)
            if value > height:
                best, height = new, value
        fell += height > 0
        assert (out[i] - (best if height > ask(clean) else clean)).abs().max() < 1e-12
    assert eps > .01 or fell < 12


@pytest.mark.parametrize('side', (1, 2, 3, 4, 6, 8))
@pytest.mark.parametrize('threat', (L2(.2), L1(1.5)), ids=repr)
def test_proposals_spend_the_budget_and_touch_two_windows(threat, side):
    x = .4 + .2*torch.rand(20, 3, 8, 8, generator=make_generator(0), dtype=torch.float64)
    u = torch.rand(20, 192, generator=make_generator(1), dtype=torch.float64)
    best = score_based._first(threat, x, u)
    assert (threat.distance(x, best) - threat.eps).abs().max() < 1e-6
    for k in range(5):
        u = torch.rand(20, 8, generator=make_generator(2, k), dtype=torch.float64)
        new = score_based._propose(threat, x, best, side, u)
        assert (threat.distance(x, new) - threat.eps).abs().max() < 1e-6
        assert threat.allows(x, new).all()
        assert ((new-best).abs().flatten(1).amax(1) > 1e-6).float().mean() > .5, (
            'two empty windows have nothing to give')
        size = min(max(side + 1 - side % 2, 3), 8)
        outside = torch.ones(20, 1, 8, 8, dtype=torch.bool)
        for i in range(20):
            for a in (0, 2):
                row = int(u[i, a+0]*(9-size))
                col = int(u[i, a+1]*(9-size))
                outside[i, :, row:row+size, col:col+size] = False
        old = (best-x)*outside
        now = (new-x)*outside
        if isinstance(threat, L2):
            length = lambda d: d.flatten(1).norm(dim=1)
            cosine = (old*now).flatten(1).sum(1)/(length(old)*length(now)).clamp_min(1e-12)
            assert (cosine[length(old) > 1e-9] > 1-1e-9).all(), 'elsewhere it is scaled at most'
        best = new


@pytest.mark.parametrize('power', (1, 2))
@pytest.mark.parametrize('side', (3, 5, 7))
def test_a_bump_is_two_opposite_halves_of_equal_length(power, side):
    bump = score_based._bump(side, power, torch.zeros(1, dtype=torch.float64))
    upper = bump[:side//2]
    lower = bump[side//2:]
    length = lambda o: o.abs().pow(power).sum()**(1/power)
    assert bump.shape == (side, side)
    assert (upper > 0).all()
    assert (lower < 0).all()
    assert abs(length(bump)-1) < 1e-6
    assert abs(length(upper)-length(lower)) < 1e-6


@pytest.mark.parametrize('threat, norm', ((Linf(.03), 'Linf'), (L2(.4), 'L2'), (L1(4.), 'L1')),
                         ids=('Linf', 'L2', 'L1'))
def test_square_succeeds_as_often_as_an_independent_one(threat, norm):
    theirs = pytest.importorskip('pyautoattack.square',
                                 reason='pyautoattack is not installed').SquareAttack
    g = make_generator(0, 'net')
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
                          nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten(),
                          nn.Linear(512, 5)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g)/p[0].numel()**.5 if p.ndim > 1 else 0*p)
        model[-1].weight.mul_(5)
    x = torch.rand(100, 3, 16, 16, generator=make_generator(0))
    y = model(x).argmax(1)
    wrong = lambda x_adv: (model(x_adv).argmax(1) != y).float().mean().item()
    ours = wrong(square(model, x, y, threat, queries=202))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        attack = theirs(model, norm=norm, eps=threat.eps, n_queries=200, p_init=.8, seed=0,
                        resc_schedule=True, device='cpu')
        other = wrong(attack.perturb(x, y))
    floor = wrong(random_search(model, x, y, threat, tries=50))
    assert .1 < other < .95
    assert abs(ours-other) < .08
    assert floor < other-.1


class Steps(nn.Module):
    "Answers without autograd, in coarse steps"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        with torch.no_grad():
            return (20*self.net(x)).round()/20


class Loud(nn.Module):
    "Logits so large that the softmax of float32 saturates"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return 1000*self.net(x)


@pytest.mark.parametrize('wrap', (Steps, Loud))
def test_square_sees_through_a_masked_gradient(wrap):
    net = make_net(torch.float32)
    x, y = make_batch(torch.float32, n=30, model=net)
    with torch.no_grad():
        keep = margin(net(x), y) < -.3
    x = x[keep]
    y = y[keep]
    model = wrap(net).eval()
    threat = Linf(8/255)
    wrong = lambda m, x_adv: (m(x_adv).argmax(1) != y).sum().item()
    found = wrong(model, square(model, x, y, threat, queries=300))
    assert found >= .8*wrong(net, pgd(net, x, y, threat, loss=margin)) > 3
    if wrap is Steps:
        with pytest.raises(ValueError, match='Use `square`'):
            pgd(model, x, y, threat)
    else:
        assert found > 1.5*wrong(model, pgd(model, x, y, threat))


def test_random_search_finds_what_its_samples_hold():
    model = make_net()
    threat = Linf(4/255)
    x, y = make_batch(model=model)
    generator = make_generator(5)
    samples = [x] + [threat.sample(x, make_generator(s))
                     for s in torch.randint(2**62, (6,), generator=generator).tolist()]
    heights = torch.stack([margin(model(o), y).detach() for o in samples])
    assert (heights <= 0).all(), 'the case is worth looking at'
    assert len(heights.argmax(0).unique()) > 2, 'the case is worth looking at'
    out = random_search(model, x, y, threat, make_generator(5), tries=6)
    assert (out - torch.stack(samples)[heights.argmax(0), torch.arange(12)]).abs().max() < 1e-12


class Curved(nn.Module):
    """Far from the border; what a pixel adds to the margin is known, and greatest at black, at
    white or between"""
    def __init__(self, w):
        super().__init__()
        self.w = w
    def forward(self, x):
        gain = (self.w*(4*x).sin()).flatten(1).sum(1)
        return torch.stack([1000 + 0*gain, gain], 1)

    def best(self, x):
        "The most that each position can add, by trying all colours (N,H,W)"
        colours = torch.linspace(0, 1, 2001, dtype=x.dtype).view(-1, 1, 1, 1)
        return (self.w*(4*colours).sin()).amax(0).sum(0) - (self.w*(4*x).sin()).sum(1)


def test_one_pixel_finds_the_best_single_pixel():
    x, y = grey(20)
    for shape, least, found in (((3, 6, 6), .85, 6), ((1, 6, 6), .97, 16)):
        x = x[:, :shape[0]]
        model = Curved(linear(shape=shape)[1]).eval()
        best = model.best(x).flatten(1)
        out = one_pixel(model, x, y, L0(1), population=100, generations=60)
        where = ((out-x).abs() > 0).any(1).flatten(1)
        assert (where.sum(1) == 1).all()
        gain = margin(model(out), y)-margin(model(x), y)
        assert (gain <= best.amax(1)+1e-6).all()
        assert (gain/best.amax(1)).mean() > least
        assert (where.int().argmax(1) == best.argmax(1)).sum() >= found


def test_one_pixel_gains_as_much_as_the_evolution_of_scipy():
    optimize = pytest.importorskip('scipy.optimize')
    x, y = grey(10)
    model = Curved(linear()[1]).eval()
    members = 30
    generations = 15
    ours = margin(model(one_pixel(model, x, y, L0(1), make_generator(0), members, generations)), y)
    def theirs(i):
        def cost(genes):
            image = x[i:i+1].clone()
            image[0, :, min(int(genes[0]*6), 5), min(int(genes[1]*6), 5)] = torch.as_tensor(
                genes[2:])
            return -margin(model(image), y[i:i+1]).item()
        return -optimize.differential_evolution(
            cost, [(0, 1)]*5, strategy='rand1bin', mutation=.5, recombination=1.,
            maxiter=generations, popsize=members//5, polish=False, updating='deferred', rng=i,
            tol=0).fun
    other = torch.tensor([theirs(i) for i in range(10)])
    clean = margin(model(x), y)
    assert .95 < (ours-clean).mean()/(other-clean).mean() < 1.5
    assert (ours > clean).all()


def test_one_pixel_follows_a_slow_loop():
    x, y = grey(8)
    model = Curved(linear()[1]).eval()
    members = 7
    generations = 6
    left = []
    out = one_pixel(model, x, y, L0(2), make_generator(0), members, generations)
    for i, g in enumerate(image_generators(make_generator(0), x)):
        genes = torch.cat([draw(torch.rand, [g], members, 2, 2, like=x),
                           (.5 + .5*draw(torch.randn, [g], members, 2, 3, like=x)).clamp(0, 1)],
                          3)[0]
        shuffle = draw(torch.rand, [g], generations, members, like=x)[0]
        def show(gene):
            image = x[i:i+1].clone()
            for row, col, *colour in gene.tolist():
                image[0, :, min(int(row*6), 5), min(int(col*6), 5)] = torch.tensor(
                    colour, dtype=x.dtype)
            return image
        ask = lambda gene: margin(model(show(gene)), y[i:i+1]).item()
        heights = [ask(o) for o in genes]
        for k in range(generations):
            order = shuffle[k].argsort().tolist()
            old = genes.clone()
            for j in range(members):
                child = (old[order[j]] + .5*(old[order[j-1]]-old[order[j-2]])).clamp(0, 1)
                if ask(child) > heights[j]:
                    genes[j], heights[j] = child, ask(child)
        left.append(max(heights) > margin(model(x[i:i+1]), y[i:i+1]))
        assert torch.equal(out[i:i+1],
                           show(genes[int(np.argmax(heights))]) if left[-1] else x[i:i+1])
    assert any(left)


@pytest.mark.parametrize('use', wrong_uses)
@pytest.mark.parametrize('name', attacks)
def test_wrong_use_is_refused(name, use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        attacks[name](*change(model, *make_batch(model=model)),
                      L0(1) if name == 'one_pixel' else Linf(8/255))


@pytest.mark.parametrize('call, words', (
    (lambda *a: square(*a, SSIM(.9)), 'must be Linf, L2 or L1 .* Use `random_search`'),
    (lambda *a: square(*a, L0(1)), 'got L0'),
    (lambda *a: one_pixel(*a, Linf(.1)), r'e.g. `L0\(1\)`; got Linf'),
    (lambda *a: square(*a, Linf(.1), queries=1), '`queries` must be a whole number, at least 2'),
    (lambda *a: square(*a, Linf(.1), p=0.), 'got 0.0'),
    (lambda *a: square(*a, Linf(.1), p=float('nan')), 'got nan'),
    (lambda *a: square(*a, Linf(.1), p=1.1), r'`p` must be in \(0, 1\]'),
    (lambda *a: random_search(*a, Linf(.1), tries=0), '`tries` must be a whole number, at least 1; got 0'),
    (lambda *a: one_pixel(*a, L0(1), population=2), '`population` must be a whole number, at least 3'),
    (lambda *a: one_pixel(*a, L0(1), population=10.), 'got 10.0'),
    (lambda *a: one_pixel(*a, L0(1), generations=-1),
     '`generations` must be a whole number, at least 0; got -1'),
    (lambda *a: L0(-1), 'at least 0 pixels; got -1'), (lambda *a: L0(1.), 'got 1.0')))
def test_wrong_settings_are_refused(call, words):
    model = make_net()
    with pytest.raises((TypeError, ValueError), match=words):
        call(model, *make_batch(model=model))
