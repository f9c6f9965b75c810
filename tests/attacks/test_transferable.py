"""Momentum attacks: a slow version of each, image by image; foolbox; symmetries; one table of
promises; ensembles."""
import copy, random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks.gradient import cross_entropy, dlr, loss_and_grad, margin, margin_to, pgd
from robustnb.core import image_generators, make_generator
from robustnb.attacks.transferable import (
    di_fgsm, ensemble, mi_fgsm, ni_fgsm, si_fgsm, ti_fgsm, vmi_fgsm)
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from helpers_attacks import make_batch, make_net, same, snapshot, wrong_uses

family = dict(mi=mi_fgsm, ni=ni_fgsm, di=di_fgsm, ti=ti_fgsm, si=si_fgsm, vmi=vmi_fgsm)
threats = (Linf(8/255), L2(.4), L1(6), SSIM(.95))


def slow_gradient(model, image, label, change=lambda z: z):
    "The gradient of one image's loss behind `change`, by `.backward()` on a copy of the model"
    model = copy.deepcopy(model)
    z = image.clone().requires_grad_()
    nn.CrossEntropyLoss()(model(change(z)[None]), torch.tensor([label])).backward()
    return z.grad


def slow_resize(z, u, probability):
    "Xie's change of one image (C,H,W) from the four numbers `u`"
    h, w = z.shape[1:]
    if u[0] >= probability: return z
    high = round(h*(.9 + .1*u[1]))
    wide = round(w*(.9 + .1*u[1]))
    top = int(u[2]*(h-high+1))
    left = int(u[3]*(w-wide+1))
    small = F.interpolate(z[None], (high, wide), mode='bilinear', align_corners=False)[0]
    return F.pad(small, (left, w-wide-left, top, h-high-top))


def slow_smooth(g, kernel):
    "Each pixel is the mean of its neighbours, weighted by a bell that is three deviations wide on each side"
    r = kernel//2
    bell = np.exp(-np.linspace(-3, 3, kernel)**2/2) if r else np.ones(1)
    window = np.outer(bell, bell)/bell.sum()**2
    out = torch.zeros_like(g)
    for i, j in np.ndindex(*g.shape[1:]):
        for a, b in np.ndindex(kernel, kernel):
            if 0 <= i+a-r < g.shape[1] and 0 <= j+b-r < g.shape[2]:
                out[:, i, j] += window[a, b]*g[:, i+a-r, j+b-r]
    return out


def slow(name, model, image, label, threat, seed, steps, decay, kernel=5, copies=5,
         probability=.5, beta=1.5):
    "The algorithm box of each paper for one image"
    own = image_generators(make_generator(seed), image[None])[0]
    reach = dict(Linf=threat.eps, L2=threat.eps/image.numel()**.5,
                 L1=threat.eps/image.numel()).get(type(threat).__name__)
    if reach is None:
        reach = threat.eps/(1 - .01**2/(1+.01**2))
    now = image
    g = torch.zeros_like(image)
    v = 0
    alpha = threat.eps/steps
    for _ in range(steps):
        at = now + reach/steps*decay*g if name in ('ni', 'si') else now
        if name == 'di':
            u = torch.rand(4, 1, generator=own).flatten().double().tolist()
            new = slow_gradient(model, at, label, lambda z: slow_resize(z, u, probability))
        elif name == 'si':
            new = sum(slow_gradient(model, at, label, lambda z: z*.5**i)
                      for i in range(copies))/copies
        elif name == 'ti':
            new = slow_smooth(slow_gradient(model, at, label), kernel)
        elif name == 'vmi':
            plain = slow_gradient(model, at, label)
            new = plain + v
            near = []
            for _ in range(20):
                r = 2*torch.rand(*image.shape, generator=own).double() - 1
                near.append(slow_gradient(model, at + beta*reach*r, label))
            v = torch.stack(near).mean(0) - plain
        else:
            new = slow_gradient(model, at, label)
        g = decay*g + new*new.numel()/new.abs().sum()
        step = alpha*threat.steepest(g[None], image[None], now[None])
        now = threat.project(image[None], now[None] + step)[0]
    return now


@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('name, steps, decay, own', (
    ('mi', 6, .9, {}), ('ni', 6, .9, {}), ('di', 6, 1., dict(probability=.7)),
    ('ti', 5, 1., dict(kernel=5)), ('ti', 2, .5, dict(kernel=3)),
    ('si', 4, .8, dict(copies=3)), ('vmi', 3, 1., dict(beta=1.5))))
def test_each_method_is_its_slow_version(name, steps, decay, own, threat):
    model = make_net()
    x, y = make_batch(n=6, model=model)
    ours = family[name](model, x, y, threat, make_generator(4), steps=steps, decay=decay, **own)
    theirs = torch.stack([slow(name, model, x[i], y[i].item(), threat, 4, steps, decay, **own)
                          for i in range(len(x))])
    plain = mi_fgsm(model, x, y, threat, steps=steps, decay=decay)
    assert (ours-theirs).abs().max() < 1e-9
    assert (ours-x).abs().amax((1, 2, 3)).min() > 1e-3
    assert name == 'mi' or (ours-plain).abs().max() > 1e-4, 'the method matters in this case'


@pytest.mark.parametrize('shape', ((12, 20), (33, 15)))
def test_changed_images_of_other_shapes(shape):
    class Weighted(nn.Module):
        def forward(self, x):
            return torch.stack([(w*x).sin().flatten(1).mean(1), (w*x).cos().flatten(1).mean(1)], 1)
    w = torch.rand(1, 2, *shape, generator=make_generator(0, 1), dtype=torch.float64)
    x = torch.rand(5, 2, *shape, generator=make_generator(0, 5), dtype=torch.float64)
    w = 5*w
    y = torch.arange(5) % 2
    model = Weighted().eval()
    ours = di_fgsm(model, x, y, L2(1.), make_generator(1), steps=3, probability=1)
    theirs = torch.stack([slow('di', model, x[i], y[i].item(), L2(1.), 1, 3, 1., probability=1)
                          for i in range(5)])
    assert (ours-theirs).abs().max() < 1e-9


@pytest.mark.parametrize('threat, reference', ((Linf(8/255), 'LinfBasicIterativeAttack'),
                                               (L2(.4), 'L2BasicIterativeAttack')),
                         ids=('Linf', 'L2'))
def test_without_memory_it_is_the_basic_iterative_method(threat, reference):
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    model = make_net()
    x, y = make_batch(model=model)
    for steps in (1, 4, 10):
        kind = getattr(foolbox.attacks, reference)
        attack = kind(abs_stepsize=threat.eps/steps, steps=steps, random_start=False)
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
        theirs = attack(bounded, x, y, epsilons=threat.eps)[1]
        for attack in (mi_fgsm, ni_fgsm):
            assert (attack(model, x, y, threat, steps=steps, decay=0)-theirs).abs().max() < 1e-9
    assert (mi_fgsm(model, x, y, threat)-theirs).abs().max() > 1e-3


@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('general, special', (
    (partial(ti_fgsm, kernel=1), mi_fgsm), (partial(di_fgsm, probability=0), mi_fgsm),
    (partial(si_fgsm, copies=1), ni_fgsm), (partial(vmi_fgsm, beta=0), mi_fgsm),
    (partial(vmi_fgsm, steps=1), partial(mi_fgsm, steps=1)),
    (partial(ni_fgsm, steps=1), partial(mi_fgsm, steps=1))))
def test_with_its_option_at_rest_each_is_the_plainer_method(general, special, threat):
    model = make_net()
    x, y = make_batch(model=model)
    assert (general(model, x, y, threat) - special(model, x, y, threat)).abs().max() < 1e-9


def test_a_linear_loss_leads_to_the_border_at_any_scale():
    "On a linear loss all gradients agree: the steps add up to the border, however small the logits"
    class Ramp(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k
        def forward(self, x):
            return self.k*torch.stack(
                [0*x.flatten(1).sum(1), x[:, 0].flatten(1).sum(1) - x[:, 1].flatten(1).sum(1)], 1)
    x = .4 + .2*torch.rand(4, 3, 8, 8, generator=make_generator(0), dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64)
    toward = torch.tensor([1., -1., 0.]).view(1, 3, 1, 1).to(x)
    for attack in (mi_fgsm, ni_fgsm, vmi_fgsm, si_fgsm):
        for k in (.01, 1e-6):
            assert (attack(Ramp(k).eval(), x, y, Linf(.05)) - x - .05*toward).abs().max() < 1e-9
            assert (attack(Ramp(k).eval(), x, 1-y, Linf(.05)) - x + .05*toward).abs().max() < 1e-9


@pytest.mark.parametrize('threat', (*threats, Linf(0), Linf(1), L2(3.), SSIM(1.)), ids=repr)
@pytest.mark.parametrize('name', family)
def test_promises(name, threat):
    attack = partial(family[name], steps=4)
    model = make_net()
    x, y = make_batch(n=6, model=model)
    run = lambda seed=3, at=slice(None): attack(model, x[at], y[at], threat,
                                                None if seed is None else make_generator(seed))
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
    assert threat.allows(x, out).all()
    assert (threat.distance(x, out) <= threat.eps + 1e-9).all()
    assert torch.equal(run(), out)
    assert torch.equal(run(None), run(0))
    with torch.no_grad():
        assert torch.equal(run(), out), 'also where gradients are off'
    if threat.eps == 0:
        assert (out-x).abs().max() < 1e-12
    elif name in ('di', 'vmi'):
        assert not torch.equal(run(5), out)
    else:
        assert torch.equal(run(5), out)
    alone = torch.cat([run(at=slice(i, i+1)) for i in range(len(x))])
    turned = run(at=torch.arange(len(x)).flip(0)).flip(0)
    assert (alone-out).abs().max() < 1e-9
    assert (turned-out).abs().max() < 1e-9
    if 0 < threat.eps < 1:
        assert cross_entropy(model(out), y).mean() > cross_entropy(model(x), y).mean()


@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('name', family)
def test_precision_of_the_images_is_kept(name, threat):
    model = make_net(torch.float32)
    x, y = make_batch(torch.float32, model=model)
    out = family[name](model, x, y, threat, steps=3)
    assert out.dtype == torch.float32
    assert threat.allows(x, out).all()
    assert (out-x).abs().max() > 1e-3


@pytest.mark.parametrize('name', family)
def test_no_gradient_no_move(name):
    class Still(nn.Module):
        def forward(self, x):
            return (0*x).flatten(1).sum(1, keepdim=True) + torch.arange(10., dtype=x.dtype)
    x = make_batch()[0]
    for threat in threats:
        assert torch.equal(
            family[name](Still().eval(), x, torch.full((len(x),), 9), threat, steps=2), x)


@pytest.mark.parametrize('use', wrong_uses)
@pytest.mark.parametrize('name', family)
def test_wrong_use_is_refused(name, use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        family[name](*change(model, *make_batch(model=model)), Linf(8/255))


nan = float('nan')
@pytest.mark.parametrize(
    'attack, name', [(partial(a, **{k: v}), k) for k, vs in dict(steps=(0, -1, nan, 2.5), decay=(
        -.1, nan, float('inf'))).items() for v in vs for a in family.values()]
                    + [(partial(di_fgsm, probability=v), 'probability') for v in (-.1, 1.1, nan)]
                    + [(partial(ti_fgsm, kernel=v), 'kernel') for v in (0, 4, -1, nan, 5.)]
                    + [(partial(si_fgsm, copies=v), 'copies') for v in (0, nan)]
                    + [(partial(vmi_fgsm, beta=v), 'beta') for v in (-1., nan, float('inf'))])
def test_options_out_of_range_are_named(attack, name):
    with pytest.raises((ValueError, TypeError), match=f'`{name}`.* got '):
        attack(make_net(), *make_batch(), Linf(.1))


members = lambda: [make_net(seed=s) for s in (0, 1, 2)]
weights = (2, 1, 5)


@pytest.mark.parametrize('combine', ('logits', 'gradients'))
def test_an_ensemble_answers_with_the_weighted_mean(combine):
    nets = members()
    x = make_batch()[0]
    for given, used in ((None, (1/3,)*3), (weights, (.25, .125, .625)),
                        ([20, 10, 50], (.25, .125, .625))):
        out = ensemble(nets, given, combine)(x)
        assert (out - sum(w*net(x) for w, net in zip(used, nets))).abs().max() < 1e-12
        assert out.requires_grad
    both = ensemble(nets, combine=combine)
    assert not any(m.training for m in both.modules())
    assert all(p is q for p, q in zip(both.parameters(),
                                      (p for net in nets for p in net.parameters())))


@pytest.mark.parametrize('loss', (cross_entropy, margin, dlr, margin_to))
def test_gradients_of_an_ensemble(loss):
    nets = members()
    x, y = make_batch()
    if loss is margin_to:
        y = torch.stack([y, (y+1) % 5], 1)
    wanted = torch.zeros_like(x)
    for net, w in zip(nets, weights):
        for i in range(len(x)):
            z = x[i:i+1].clone().requires_grad_()
            g, = torch.autograd.grad(loss(net(z), y[i:i+1]).sum(), z)
            wanted[i:i+1] += w/8*g/g.abs().mean()
    model = ensemble(nets, weights, 'gradients')
    with torch.no_grad():
        value, grad, logits = loss_and_grad(model, x, y, loss)
    assert (grad-wanted).abs().max() < 1e-9
    assert torch.equal(logits, model(x))
    assert torch.equal(value, loss(logits, y))
    assert not grad.requires_grad
    assert not logits.requires_grad
    value, grad, logits = loss_and_grad(ensemble(nets, weights), x, y, loss)
    z = x.clone().requires_grad_()
    mean = loss(sum(w*net(z) for w, net in zip((.25, .125, .625), nets)), y)
    assert (grad - torch.autograd.grad(mean.sum(), z)[0]).abs().max() < 1e-9
    assert (value-mean).abs().max() < 1e-9


def test_attacks_follow_an_ensemble():
    nets = members()
    x, y = make_batch()
    for combine in ('logits', 'gradients'):
        model = ensemble(nets, weights, combine)
        before = snapshot(model)
        twin = copy.deepcopy(model)
        for attack in (pgd, mi_fgsm, vmi_fgsm):
            out = attack(model, x, y, Linf(8/255), steps=3)
            assert Linf(8/255).allows(x, out).all()
            assert torch.equal(attack(twin, x, y, Linf(8/255), steps=3), out)
        assert same(snapshot(model), before)
    one = [mi_fgsm(ensemble([nets[0]], [7.], c), x, y, Linf(8/255))
           for c in ('logits', 'gradients')]
    assert all((o - mi_fgsm(nets[0], x, y, Linf(8/255))).abs().max() < 1e-9 for o in one)


def test_a_loud_member_leads_the_logits_but_not_the_gradients():
    """A loud linear member against two quiet ones: its logits decide the mean, but of three
    gradients it has one vote"""
    class Pull(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k
        def forward(self, x):
            s = self.k*(x[:, 0]-x[:, 2]).flatten(1).mean(1)
            return torch.stack([s, -s], 1)
    x = make_batch()[0]*.5 + .25
    y = torch.zeros(12, dtype=torch.int64)
    nets = [Pull(-10.).eval(), Pull(1.).eval(), Pull(1.).eval()]
    def shift(combine):
        x_adv = mi_fgsm(ensemble(nets, combine=combine), x, y, Linf(.05), steps=2)
        return (x_adv-x)[:, 0].mean()
    assert shift('logits') > .04
    assert shift('gradients') < -.04


@pytest.mark.parametrize('args, error, words', (
    (([],), ValueError, '`models` must hold at least one model'),
    ((members(), [1, 2]), ValueError, '`weights` must be 3 positive numbers.*got'),
    ((members(), [1, 0, 1]), ValueError, '`weights`'),
    ((members(), [1, -1, 1]), ValueError, '`weights`'),
    ((members(), [1, nan, 1]), ValueError, '`weights`'),
    ((members(), [1, float('inf'), 1]), ValueError, '`weights`'),
    ((members(), None, 'votes'), ValueError,
     "`combine` must be 'logits' or 'gradients'; got 'votes'"),
    (([make_net().train()],), ValueError, 'Call `model.eval'),
    ((['net'],), TypeError, 'must be a torch.nn.Module')))
def test_wrong_ensembles_are_named(args, error, words):
    with pytest.raises(error, match=words):
        ensemble(*args)


def test_members_must_agree_on_the_classes():
    x, y = make_batch()
    with pytest.raises(ValueError, match='same classes; they answer with 5, 7 logits'):
        mi_fgsm(ensemble([make_net(), make_net(classes=7)]), x, y, Linf(.1))
