"""Minimal-norm attacks: planes against linear programmes, closed forms, slow loops, foolbox and the
authors' FAB; promises and misuse."""
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import fgsm, margin, pgd
from robustnb.core import make_generator
from robustnb.attacks.minimum_norm import carlini_wagner, deepfool, fab, _finish, onto_plane
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM

norms = dict(Linf=Linf(1), L2=L2(1e4), L1=L1(1e4))
shape = (2, 3, 3)
by_norm = pytest.mark.parametrize('norm', norms)
attacks = dict(deepfool=deepfool, fab=partial(fab, steps=25),
               carlini_wagner=partial(carlini_wagner, steps=40))
by_name = pytest.mark.parametrize('name', attacks)


def make_net(hidden=(), dtype=torch.float64, classes=5, seed=0):
    "A linear model, or a small network"
    g = make_generator(seed, 'net')
    sizes = [18, *hidden, classes]
    layers = [o for i in range(len(sizes)-1)
              for o in (nn.Linear(sizes[i], sizes[i+1]), nn.Tanh())][:-1]
    for layer in layers[::2]:
        weight = torch.randn(layer.weight.shape, generator=g)
        sizes_of_rows = torch.linspace(.5, 2, len(weight))[:, None]
        layer.weight.data = 2*weight/sizes[0]**.5*sizes_of_rows
        layer.bias.data = .1*torch.randn(layer.bias.shape, generator=g)
        if layer is layers[0]:
            layer.bias.data -= .5*layer.weight.data.sum(1)
    return nn.Sequential(nn.Flatten(), *layers).eval().to(dtype)


def make_batch(model, n=8, lo=-.2, hi=1.2, dtype=torch.float64):
    "Images, many of whose pixels are black or white unless `lo` and `hi` forbid it, and the model's answers"
    x = ((lo + (hi-lo)*torch.rand(n, *shape, generator=make_generator(1), dtype=torch.float64))
         .clamp(0, 1).to(dtype))
    return x, model(x).argmax(1)


def programme(x, grad, gain, norm):
    """The shortest change with that gain by linear programming, or for L2 by bisection; its length,
    or None where out of reach"""
    x = x.flatten().numpy()
    grad = grad.flatten().numpy()
    if (np.where(grad*np.sign(gain) > 0, 1-x, -x)*grad).sum()*np.sign(gain) < abs(gain): return None
    if norm == 'L2':
        change = lambda t: (x + t*np.sign(gain)*grad).clip(0, 1)-x
        lo, hi = 0., 1e6
        for _ in range(200):
            mid = (lo+hi)/2
            if abs(grad@change(mid)) < abs(gain):
                lo = mid
            else:
                hi = mid
        return np.linalg.norm(change(hi))
    linprog = pytest.importorskip('scipy.optimize').linprog
    n = len(x)
    one = np.eye(len(x))
    if norm == 'L1':
        return linprog(np.ones(2*n), A_eq=[np.r_[grad, -grad]], b_eq=[gain],
                       bounds=[*zip(np.zeros(n), 1-x), *zip(np.zeros(n), x)]).fun
    sides = np.block([[one, -np.ones((n, 1))], [-one, -np.ones((n, 1))]])
    return linprog(np.eye(n+1)[n], A_ub=sides, b_ub=np.zeros(2*n), A_eq=[np.r_[grad, 0]],
                   b_eq=[gain], bounds=[*zip(-x, 1-x), (0, None)]).fun


def exact(model, x, y, norm):
    """Distances (N,K-1) to the borders of an affine model within the range of the pixels, the
    likeliest class first; nan where out of reach"""
    w = model[1].weight.detach()
    z = model(x).detach()
    order = [[k for k in z[i].argsort(descending=True).tolist() if k != y[i]]
             for i in range(len(x))]
    def to_border(i, k):
        length = programme(x[i], w[k]-w[y[i]], (z[i, y[i]]-z[i, k]).item(), norm)
        return length or np.nan
    rows = [[to_border(i, k) for k in order[i]] for i in range(len(x))]
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize('dtype', (torch.float64, torch.float32), ids=str)
@by_norm
def test_the_step_onto_a_plane_is_the_shortest(norm, dtype):
    threat = norms[norm]
    n = 40
    g = make_generator(4)
    x = (1.4*torch.rand(n, *shape, generator=g)-.2).clamp(0, 1)
    grad = torch.randn(n, *shape, generator=g)
    fraction = torch.rand(n, generator=g)
    grad[::3] = grad[::3]*(torch.rand(grad[::3].shape, generator=g) < .6)
    grad[1::5], grad[0], x[2] = grad[1::5].sign(), 0, .5
    sign = torch.where(torch.rand(n, generator=g) < .5, -1, 1)
    ends = torch.where(grad*sign.view(-1, 1, 1, 1) > 0, 1-x, -x)*(grad != 0)
    gain = (grad*ends).flatten(1).sum(1)*fraction*1.3 + 1e-3*sign
    x = x.to(dtype)
    grad = grad.to(dtype)
    gain = gain.to(dtype)
    ends = ends.to(dtype)
    change = onto_plane(x, grad, gain, threat)
    close = 1e-9 if dtype == torch.float64 else 1e-5
    assert change.dtype == dtype
    assert change.shape == x.shape
    assert (x+change >= -close).all()
    assert (x+change <= 1+close).all()
    best = [programme(x[i].double(), grad[i].double(), gain[i].item(), norm) for i in range(n)]
    out = torch.tensor([b is None for b in best])
    assert out[0]
    assert 5 < out.sum() < 20, 'some planes are out of reach'
    assert torch.allclose(change[out], ends[out]), 'there every pixel is at its end'
    assert ((grad*change).flatten(1).sum(1)-gain)[~out].abs().max() < 10*close
    length = threat.distance(x, x+change)[~out].double()
    shortest = torch.tensor([b for b in best if b is not None], dtype=torch.float64)
    assert torch.allclose(length, shortest, rtol=0, atol=10*close)
    assert (onto_plane(x, grad, 0*gain, threat) == 0).all()
    assert torch.equal(onto_plane(x, grad, gain, SSIM(.9)), onto_plane(x, grad, gain, L2(.1)))


@by_norm
@pytest.mark.parametrize('edge', (False, True), ids=('inside', 'edge'))
def test_the_nearest_wrong_image_of_an_affine_model(norm, edge):
    model = make_net()
    threat = norms[norm]
    x, y = make_batch(model, 8) if edge else make_batch(model, 12, .3, .7)
    borders = exact(model, x, y, norm)
    gap = model(x)[torch.arange(len(x)), y][:, None]-model(x)
    w = model[1].weight[y][:, None]-model[1].weight
    dual = dict(Linf=1, L2=2, L1=torch.inf)[norm]
    free = (gap/w.norm(p=dual, dim=2)).scatter(1, y[:, None], torch.inf).amin(1)
    if not edge:
        assert torch.allclose(free[free < .3], borders[free < .3].nan_to_num(9).amin(1)), (
            'the textbook holds where no pixel stops')
        assert (free < .3).sum() > 3, 'the textbook holds where no pixel stops'
    nearest = borders.nan_to_num(torch.inf).amin(1)
    assert edge or (nearest < .95*borders[:, 0].nan_to_num(torch.inf)).any(), (
        'the likeliest class is not always the nearest')
    ratio = lambda out: (threat.distance(x, out)/nearest).detach()
    def within(out, least, most):
        near = (ratio(out) >= least) & (ratio(out) <= most)
        return (near & (margin(model(out), y) > 0) & threat.allows(x, out)).all()
    assert within(deepfool(model, x, y, threat, steps=1, overshoot=0), 1, 1+5e-4)
    assert within(deepfool(model, x, y, threat, steps=1), 1.015 if not edge else 1, 1.0205)
    assert within(fab(model, x, y, threat, steps=25), 1, 1.002)
    if norm == 'L2' and not edge:
        out = carlini_wagner(model, x, y, threat, steps=150)
        assert within(out, 1, 1.03*borders[:, 0]/nearest)
        assert (ratio(out) < 1.01).sum() > 9
    likeliest = borders[:, 0].isfinite()
    for attack in (partial(deepfool, candidates=1, overshoot=0), partial(fab, targets=1, steps=25)):
        far = threat.distance(x, attack(model, x, y, threat))
        assert (far[likeliest]/borders[likeliest, 0] < 1.002).all()
        assert likeliest.sum() > 3


@pytest.mark.parametrize('name, norm', (('deepfool', 'Linf'), ('deepfool', 'L1'), ('fab', 'Linf'),
                                        ('fab', 'L2'), ('fab', 'L1'), ('carlini_wagner', 'L2')))
def test_the_radius_decides(name, norm):
    model = make_net()
    attack = attacks[name]
    x, y = make_batch(model, 9, .3, .7)
    borders = exact(model, x, y, norm).nan_to_num(torch.inf)
    nearest = borders.amin(1)
    for i, factor, g in ((0, .95, None), (2, 1.05, None), (8, .95, make_generator(2)),
                         (3, 1.05, make_generator(3))):
        threat = type(norms[norm])((factor*nearest[i]).item())
        out = attack(model, x, y, threat, g)
        height = margin(model(out), y)
        clear = (nearest/threat.eps-1).abs() > (.021 if name == 'deepfool' else .01)
        if name == 'carlini_wagner':
            clear &= (borders[:, 0] == nearest) & (nearest > .03)
        assert clear[i]
        assert clear.sum() > 2
        assert torch.equal((height > 0)[clear], (nearest < threat.eps)[clear])
        assert threat.allows(x, out).all()
        assert (threat.distance(x, out)[height <= 0] > .999*threat.eps).all(), (
            'what is too far comes back projected')
        assert (height > margin(model(x), y)).all(), 'what is too far comes back projected'


def slow_deepfool(model, x, y, threat, steps, overshoot, candidates):
    "One image"
    order = [k for k in model(x)[0].argsort(descending=True).tolist() if k != y][:candidates]
    total, now = torch.zeros_like(x), x
    for _ in range(steps):
        if margin(model(now), y) > 0: break
        at = now.clone().requires_grad_()
        ways = []
        z = model(at)[0]
        for k in order:
            grad, = torch.autograd.grad(z[k]-z[y.item()], at, retain_graph=True)
            gain = (z[y.item()]-z[k]).detach()[None] + 1e-6
            change = onto_plane(now, grad, gain, threat)
            ways.append((threat._length(change).item()*gain.item()/(grad*change).sum().item(),
                         change))
        total = total + min(ways, key=lambda o: o[0])[1]
        now = (x + (1+overshoot)*total).clamp(0, 1)
    return now


def slow_fab(model, x, y, threat, start, steps, targets, enough):
    "One image; the nearest wrong one and how often the loop asked, the halvings at the end included"
    order = [k for k in model(x)[0].argsort(descending=True).tolist() if k != y][:targets]
    best = x
    near = np.inf
    for k in order:
        now = start
        for _ in range(steps):
            if near <= enough: return best
            at = now.clone().requires_grad_()
            f = model(at)[0, k]-model(at)[0, y.item()]
            grad, = torch.autograd.grad(f, at)
            f = f.detach()
            length = lambda d: threat._length(d).item()
            d1 = onto_plane(now, grad, -f[None], threat)
            d2 = onto_plane(x, grad, -(f + (grad*(x-now)).sum())[None], threat)
            alpha = min(length(d1)/(length(d1)+length(d2)), .1)
            now = ((1-alpha)*(now + 1.05*d1) + alpha*(x + 1.05*d2)).clamp(0, 1)
            if margin(model(now), y) > 0:
                if length(now-x) < near:
                    best, near = now, length(now-x)
                now = x + .9*(now-x)
    if near < np.inf and near > enough:
        lo, hi = 0., 1.
        for _ in range(12):
            lo, hi = (lo, (lo+hi)/2) if margin(model(x + (lo+hi)/2*(best-x)), y) > 0 else (
                (lo+hi)/2, hi)
        best = x + hi*(best-x)
    return best


def slow_carlini_wagner(model, x, y, threat, steps, lr, confidence, enough):
    "One image, with the optimiser of torch"
    best = x
    near = np.inf
    low = 0.
    high = np.inf
    const = 1e-3
    for _ in range(9):
        if near <= enough: break
        w, worked = ((2*x-1)*.9999).atanh().requires_grad_(), False
        adam = torch.optim.Adam([w], lr=lr)
        for i in range(steps):
            image = (w.tanh()+1)/2
            height = margin(model(image), y)[0]
            if height > confidence:
                worked = worked or i >= steps//2
                if threat.distance(x, image).item() < near:
                    best = image.detach()
                    near = threat.distance(x, image).item()
            adam.zero_grad()
            ((image-x).square().sum() + const*max(confidence-height, 0*height)).backward()
            adam.step()
        if worked:
            high = const
        else:
            low = const
        const = (low+high)/2 if high < np.inf else 10*const
    return best


@pytest.mark.parametrize('limited', (False, True), ids=('all', 'ball'))
@by_norm
@by_name
def test_attacks_follow_slow_loops(name, norm, limited):
    model = make_net((12,))
    threat = norms[norm]
    n = 5
    x, y = make_batch(model, n, -.1, 1.1)
    g = make_generator(7)
    ours, slow = dict(
        deepfool=(lambda t: deepfool(model, x, y, t, steps=4, overshoot=.1, candidates=3),
                  lambda a, b, s: slow_deepfool(model, a, b, threat, 4, .1, 3)),
        fab=(lambda t: fab(model, x, y, t, g, steps=8, targets=3),
             lambda a, b, s: slow_fab(model, a, b, threat, s, 8, 3, enough)),
        carlini_wagner=(
            lambda t: carlini_wagner(model, x, y, t, steps=9, lr=.1, confidence=.1),
            lambda a, b, s: slow_carlini_wagner(model, a, b, threat, 9, .1, .1, enough)))[name]
    if limited:
        threat = type(threat)(threat.distance(x, ours(threat)).median().item()*1.02)
    enough, start = (threat.eps, (x + threat.sample(x, make_generator(7)))/2) if limited else (0, x)
    out = ours(threat)
    found = torch.cat([slow(x[i:i+1], y[i:i+1], start[i:i+1]) for i in range(n)]).detach()
    inside = threat.distance(x, found) <= threat.eps
    expected = torch.where(inside.view(-1, 1, 1, 1), found, threat.project(x, found))
    expected = torch.where((margin(model(expected), y) > margin(model(x), y)).view(-1, 1, 1, 1),
                           expected, x)
    assert (out-expected).abs().max() < 2e-6
    assert (margin(model(found), y) > 0).sum() > 3
    assert not limited or 0 < inside.sum() < n


def test_borders_out_of_reach_and_borders_far_away():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3)).double().eval()
    model[1].weight.data = torch.tensor([[0., 0], [1, 0], [0, 1]]).double()
    model[1].bias.data = torch.tensor([0, -1.3, -.9]).double()
    x = torch.tensor([.95, .5]).double().view(1, 1, 1, 2)
    y = torch.tensor([0])
    goal = torch.tensor([.95, .9]).double().view(1, 1, 1, 2)
    for threat in norms.values():
        assert (deepfool(model, x, y, threat)-goal)[..., 1].abs() < .01
        assert margin(model(deepfool(model, x, y, threat)), y) > 0
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 2)).double().eval()
    model[1].weight.data = torch.tensor([[0.], [1]]).double().expand(2, 40).clone()
    model[1].bias.data = torch.tensor([20.5, 0]).double()
    x = torch.zeros(1, 1, 1, 40).double()
    for attack in (deepfool, partial(fab, steps=10)):
        assert 20.5 < L1(1e4).distance(x, attack(model, x, y, L1(1e4))) < 20.6


class Wave(nn.Module):
    "The loss falls, and only then rises over the border"
    def forward(self, x):
        far = x.flatten(1).mean(1)-.5
        return torch.stack([0*far, 3*far**2 - .2 + .1*(40*far).sin()], 1)


def test_a_projection_that_makes_it_worse_is_not_returned():
    x = torch.full((1, *shape), .5, dtype=torch.float64)
    y = torch.tensor([0])
    model = Wave().eval()
    found = x + .196
    assert margin(model(found), y) > 0
    assert margin(model(x+.1178), y) < margin(model(x), y) < margin(model(x+.04), y) < 0
    for eps, expected in ((.2, found), (.1178, x), (.04, x+.04)):
        assert torch.allclose(_finish(model, x, y, Linf(eps), found), expected, rtol=0, atol=1e-12)


def test_no_further_than_foolbox():
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    model = make_net((12,), torch.float32)
    x, y = make_batch(model, 12, .3, .7, torch.float32)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    threat = norms['L2']
    for reference, norm in ((foolbox.attacks.L2DeepFoolAttack(), 'L2'),
                            (foolbox.attacks.LinfDeepFoolAttack(), 'Linf')):
        theirs = reference(bounded, x, y, epsilons=None)[0]
        ours = deepfool(model, x, y, norms[norm])
        assert (theirs-x).abs().amax() > .01
        assert (ours-theirs).abs().max() < 3e-4
    reference = foolbox.attacks.L2CarliniWagnerAttack(steps=100, stepsize=.01, abort_early=False)
    theirs = reference(bounded, x, y, epsilons=None)[0]
    ours = carlini_wagner(model, x, y, threat, steps=100)
    ratio = threat.distance(x, ours)/threat.distance(x, theirs)
    assert (ratio < 1.02).all()
    assert ratio.median() > .8


@by_norm
def test_fab_is_as_near_as_that_of_the_authors(norm):
    theirs = pytest.importorskip(
        'pyautoattack.fab_pt',
        reason='pyautoattack, the authors\' code as a package, is not installed').FABAttack_PT
    model = make_net((12,), torch.float32)
    threat = norms[norm]
    x, y = make_batch(model, 12, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        other = theirs(model, norm=norm, n_iter=20, eps=1e4, targeted=True, n_target_classes=1,
                       device='cpu').perturb(x, y)
    ours = fab(model, x, y, threat, steps=20, targets=1)
    ratio = threat.distance(x, ours)/threat.distance(x, other)
    both = (margin(model(other), y) > 0) & ratio.isfinite()
    assert both.sum() > 9
    assert (ratio[both] < 1.001).all()
    assert (ratio[both] > .97).sum() > .7*both.sum()


threats = (Linf(.02), L2(0), L2(1e4), L1(.3), SSIM(.95))


@pytest.mark.parametrize('threat', threats, ids=repr)
@by_name
def test_promises(name, threat):
    wide = isinstance(threat, SSIM)
    attack = partial(attacks[name], steps=7)
    model = (make_net((12,)) if not wide
             else nn.Sequential(nn.AvgPool2d(3, 3), make_net((12,))).eval())
    x, y = make_batch(model, 7) if not wide else (lambda x: (x, model(x).argmax(1)))(
        torch.rand(7, 2, 9, 9, generator=make_generator(0), dtype=torch.float64))
    y = torch.where(torch.arange(7) == 3, (y+1) % 5, y)
    before = [p.clone() for p in model.parameters()]
    image = x.clone()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    out = attack(model, x, y, threat, make_generator(3))
    assert torch.equal(x, image)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert threat.allows(x, out).all()
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(out[3], x[3])
    assert (margin(model(out), y) >= margin(model(x), y)).all()
    if threat.eps == 0:
        assert torch.equal(out, x)
    else:
        assert not torch.equal(out, x)
    order = torch.tensor([4, 1, 6, 0, 3, 2, 5])
    parts = torch.cat(
        [attack(model, x[o], y[o], threat, make_generator(3)) for o in order.split(3)])
    assert (parts-out[order]).abs().max() < 1e-9
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, threat, make_generator(3)), out)
    if name != 'fab':
        assert torch.equal(attack(model, x, y, threat), out)
    if 0 < threat.eps < 1 and name == 'fab' and not wide:
        assert not torch.equal(attack(model, x, y, threat), out), 'the start is random'
    assert torch.equal(attack(model, x, (model(x).argmax(1)+1) % 5, threat), x)


@pytest.mark.parametrize('norm, eps', (('Linf', .03), ('L2', .15), ('L1', .5)))
def test_no_gradient_attack_succeeds_in_a_smaller_ball(norm, eps):
    model = make_net((12,))
    x, y = make_batch(model, 30)
    threat = norms[norm]
    far = {name: threat.distance(x, attack(model, x, y, threat))
           for name, attack in attacks.items() if name != 'carlini_wagner'}
    assert (far['fab'] <= 1.001*far['deepfool']).all()
    assert (far['fab'] < .98*far['deepfool']).sum() > 5
    for attack in (fgsm, partial(pgd, loss=margin, steps=40)):
        fallen = margin(model(attack(model, x, y, type(threat)(eps))), y) > 0
        assert (far['fab'][fallen] <= eps).all()
        assert fallen.sum() > 3


def test_images_leave_at_the_first_success():
    model = make_net((12,))
    sizes = []
    x, y = make_batch(model, 12)
    hook = model.register_forward_pre_hook(
        lambda m, args: sizes.append((len(args[0]), args[0].requires_grad)))
    asked = {}
    for name, attack in attacks.items():
        for threat in (L2(50.), L2(.999)) if name != 'deepfool' else (L2(50.),):
            sizes.clear()
            attack(model, x, y, threat)
            asked[name, threat.eps] = sum(n for n, grad in sizes if grad)
    hook.remove()
    assert asked['fab', .999] < .4*asked['fab', 50.]
    assert asked['carlini_wagner', .999] < .9*asked['carlini_wagner', 50.] == .9*9*40*12
    assert asked['deepfool', 50.] < 12*4*10


wrong = ((lambda m, x, y: (m.train(), x, y), ValueError, 'Call `model.eval'),
         (lambda m, x, y: (m.forward, x, y), TypeError, 'must be a torch.nn.Module'),
         (lambda m, x, y: (m, 255*x, y), ValueError, 'Divide by 255'),
         (lambda m, x, y: (m, x[0], y), ValueError, 'Add the batch dimension'),
         (lambda m, x, y: (m, (x*255).byte(), y), TypeError, 'Use `to_float`'),
         (lambda m, x, y: (m, x, y[:-1]), ValueError, 'one label per image'),
         (lambda m, x, y: (m, x, y+5), ValueError, 'class numbers in'),
         (lambda m, x, y: (m, x, y.float()), TypeError, 'must be int64'),
         (lambda m, x, y: (m, x*torch.nan, y), ValueError, r'pixels in \[0, 1\]'))


@pytest.mark.parametrize('change, error, words', wrong)
@by_name
def test_wrong_use_is_refused(name, change, error, words):
    model = make_net()
    with pytest.raises(error, match=words):
        attacks[name](*change(model, *make_batch(model)), Linf(.1))


@pytest.mark.parametrize('attack, settings, words', (
    (deepfool, dict(steps=-1), '`steps` must be a whole number, at least 0; got -1'),
    (deepfool, dict(steps=1.5), '`steps` must be a whole number'),
    (deepfool, dict(candidates=0), '`candidates` must be a whole number, at least 1; got 0'),
    (deepfool, dict(overshoot=-.1), '`overshoot` must not be negative; got -0.1'),
    (deepfool, dict(overshoot=float('nan')), 'got nan'),
    (fab, dict(steps=-1), '`steps` must be a whole number, at least 0; got -1'),
    (fab, dict(targets=0), '`targets` must be a whole number, at least 1; got 0'),
    (carlini_wagner, dict(steps=-1), '`steps` must be a whole number, at least 0; got -1'),
    (carlini_wagner, dict(lr=0), '`lr` must be positive .* got 0 and 0.0'),
    (carlini_wagner, dict(confidence=-1.), 'got 0.01 and -1.0'),
    (carlini_wagner, dict(lr=float('nan')), 'got nan')))
def test_wrong_settings_are_refused(attack, settings, words):
    model = make_net()
    with pytest.raises((ValueError, TypeError), match=words):
        attack(model, *make_batch(model), L2(.1), **settings)
    for good in (deepfool, fab, carlini_wagner):
        assert torch.equal(good(model, *make_batch(model), L2(.1), steps=0), make_batch(model)[0])


def test_a_pixel_without_slope_stays_where_it_is_however_far_the_plane():
    change = onto_plane(torch.full((1, 1, 1, 2), .5), torch.tensor([1., 0.]).view(1, 1, 1, 2),
                        torch.tensor([1e9]), L2(1.))
    assert change.flatten().tolist() == [.5, 0]


def test_a_border_through_a_corner_of_the_box_is_crossed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.], [1]]).expand(2, 4))
        net[1].bias.copy_(torch.tensor([2., 0]))
    x = torch.zeros(1, 1, 1, 4).double()
    y = torch.tensor([0])
    for attack in (deepfool, fab):
        assert net(attack(net, x, y, L1(1e4))).argmax(1) == 1
