"Attacks: image by image against foolbox, one table of promises for every attack and threat, and misuse."
import copy, random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import cross_entropy, fgsm, multi_attack, margin, pgd
from robustnb.core import make_generator
from robustnb.evaluation.robust_accuracy import transfer_attack
from robustnb.models.wrapping import Normalized
from robustnb.attacks.threat_models import L2, Linf


def make_net(dtype=torch.float64, seed=0, classes=5):
    "A small convolutional classifier with normalisation inside and no flat regions"
    g = make_generator(seed, 'net')
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
                        nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)/p[0].numel()**.5 if p.ndim > 1 else 0*p)
        net[-1].weight.mul_(5)
    return Normalized(net, (.5, .45, .4), (.2, .25, .3)).eval().to(dtype)


def make_batch(dtype=torch.float64, n=12, model=None):
    "Images, some of whose pixels lie on the border of the range, with the model's own answers as labels"
    x = (1.2*torch.rand(n, 3, 8, 8, generator=make_generator(0, 'images'),
                        dtype=torch.float64)-.1).clamp(0, 1).to(dtype)
    y = (model or make_net(dtype))(x).argmax(1)
    assert len(y.unique()) > 2
    return x, y


def iterates(model, attack):
    "What `attack` returns, and every batch it asks the model about after the look at the first image"
    asked = []
    hook = model.register_forward_pre_hook(lambda m, args: asked.append(args[0].detach().clone()))
    out = attack(model)
    hook.remove()
    return out, asked[1:]


@pytest.mark.parametrize('steps, step_size', ((1, .03), (7, .004), (10, .01)))
@pytest.mark.parametrize('threat, reference', ((Linf(8/255), 'LinfPGD'), (L2(.4), 'L2PGD')),
                         ids=('Linf', 'L2'))
def test_pgd_follows_foolbox_step_by_step(threat, reference, steps, step_size):
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    if reference == 'L2PGD':
        step_size *= 8
    model = make_net()
    x, y = make_batch(model=model)
    out, asked = iterates(model, lambda m: pgd(m, x, y, threat, steps=steps, step_size=step_size))
    assert len(asked) == steps+1
    assert torch.equal(asked[0], x)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    for k in range(1, steps+1):
        attack = getattr(foolbox.attacks,
                         reference)(abs_stepsize=step_size, steps=k, random_start=False)
        theirs = attack(bounded, x, y, epsilons=threat.eps)[1]
        assert (theirs-x).abs().max() > .5*min(step_size, threat.eps)/8, f'step {k}'
        assert (theirs-asked[k]).abs().max() < 1e-9, f'step {k}'
    with torch.no_grad():
        losses = torch.stack([cross_entropy(model(a), y) for a in asked])
    assert torch.equal(out, torch.stack(asked)[losses.argmax(0), torch.arange(len(x))])


class Waves(nn.Module):
    "The loss goes up and down within the budget"
    def forward(self, x):
        wave = (25*x).sin().flatten(1).sum(1)
        return torch.stack([wave, -wave], 1)


@pytest.mark.parametrize('threat', (Linf(.3), L2(4.)), ids=repr)
def test_the_best_iterate_is_kept_for_each_image(threat):
    model = Waves().eval()
    x = make_batch()[0]
    y = torch.arange(len(x)) % 2
    out, asked = iterates(model, lambda m: pgd(
        m, x, y, threat, steps=9, step_size=threat.eps/(8 if threat.eps < 1 else 5)))
    losses = torch.stack([cross_entropy(model(a), y) for a in asked])
    best = losses.argmax(0)
    assert len(best.unique()) > 1, 'the case is worth looking at'
    assert (best < 9).any(), 'the case is worth looking at'
    assert torch.equal(out, torch.stack(asked)[best, torch.arange(len(x))])


@pytest.mark.parametrize('threat, reference', ((Linf(8/255), 'LinfFastGradientAttack'),
                                               (L2(.4), 'L2FastGradientAttack')),
                         ids=('Linf', 'L2'))
def test_fgsm_is_that_of_foolbox(threat, reference):
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    model = make_net()
    x, y = make_batch(model=model)
    theirs = getattr(foolbox.attacks, reference)()(
        foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu'), x, y, epsilons=threat.eps)[1]
    ours = fgsm(model, x, y, threat)
    assert (ours-x).abs().max() > .01
    assert (ours-theirs).abs().max() < 1e-9


attacks = dict(fgsm=fgsm, fgsm_margin=partial(fgsm, loss=margin), pgd=pgd,
               pgd_margin=partial(pgd, loss=margin), one_step=partial(pgd, steps=1),
               long_steps=partial(pgd, steps=5, step_size=1.),
               transfer=transfer_attack(make_net(seed=1), pgd),
               multi_attack=multi_attack(fgsm, pgd))
threats = (Linf(0), Linf(2/255), Linf(8/255), Linf(1), L2(0), L2(.3), L2(3.))


def snapshot(model):
    "All of a model that an attack could touch"
    return ([(k, v.clone()) for k, v in model.state_dict().items()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
              len(m._backward_hooks), sorted(vars(m))) for m in model.modules()])


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize('seed', (None, 3), ids=('no start', 'random start'))
@pytest.mark.parametrize('threat', threats, ids=repr)
@pytest.mark.parametrize('name', attacks)
def test_promises(name, threat, seed):
    attack = attacks[name]
    model = make_net()
    x, y = make_batch(model=model)
    run = lambda seed=seed: attack(model, x, y, threat,
                                   generator=None if seed is None else make_generator(seed))
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
    assert out.min() >= 0
    assert out.max() <= 1
    assert (threat.distance(x, out) <= threat.eps + 1e-9).all()
    assert torch.equal(run(), out), 'the same seed gives the same images'
    with torch.no_grad():
        assert torch.equal(run(), out), 'also where gradients are off'
    if threat.eps == 0:
        assert (out-x).abs().max() < 1e-12
    if seed is not None and name in ('pgd', 'one_step') and 0 < threat.eps < 1:
        assert not torch.equal(run(seed+1), out)
    loss = lambda x: (margin if 'margin' in name else cross_entropy)(model(x), y).detach()
    gain = loss(out) - loss(x)
    if name in ('pgd', 'pgd_margin', 'one_step') or name == 'long_steps' and seed is None:
        assert (gain >= -1e-9).all(), 'no worse than doing nothing'
    if threat.eps > 0 and name != 'transfer':
        assert gain.mean() > 0
    if threat == Linf(1):
        assert name not in ('pgd', 'pgd_margin') or (model(out).argmax(1) != y).all(), (
            'everything falls if everything is allowed')


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('threat', (Linf(8/255), L2(.3)), ids=repr)
@pytest.mark.parametrize('name', ('fgsm', 'pgd'))
def test_precision_of_the_images_is_kept(name, threat, dtype):
    model = make_net(dtype)
    x, y = make_batch(dtype, model=model)
    out = attacks[name](model, x, y, threat, generator=make_generator(0))
    assert out.dtype == dtype
    assert threat.allows(x, out).all()
    assert (out.double() - attacks[name](make_net(), x.double(), y,
                                         threat)).abs().max() <= 2*threat.eps + 1e-6


@pytest.mark.parametrize('name', ('fgsm', 'pgd', 'pgd_margin', 'multi_attack'))
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.3)), ids=repr)
def test_an_image_does_not_know_its_batch(name, threat):
    model = make_net()
    x, y = make_batch(model=model)
    alone = torch.cat([attacks[name](model, x[i:i+1], y[i:i+1], threat) for i in range(len(x))])
    assert (alone - attacks[name](model, x, y, threat)).abs().max() < 1e-9


def test_more_steps_are_no_weaker():
    model = make_net()
    x, y = make_batch(model=model)
    losses = torch.stack([cross_entropy(
        model(pgd(model, x, y, Linf(4/255), steps=k, step_size=1/255)),
        y).detach() for k in range(6)])
    assert (losses.diff(dim=0) >= 0).all()
    assert (losses[-1] > losses[0]).all()


def test_huge_logits_hide_the_cross_entropy_but_not_the_margin():
    model = make_net(torch.float32)
    threat = Linf(8/255)
    x, y = make_batch(torch.float32, model=model)
    with torch.no_grad():
        keep = margin(model(x), y) < -.3
    x = x[keep]
    y = y[keep]
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in scaled.net[-1].parameters():
            p.mul_(1000)
    robust = lambda m, loss: (
        m(pgd(m, x, y, threat, loss=loss)).argmax(1) == y).float().mean().item()
    assert robust(scaled, margin) == robust(
        model, margin) <= robust(model, cross_entropy) < robust(scaled, cross_entropy)


class Ten(nn.Module):
    "Not a classifier of these images: its answer is constant"
    def forward(self, x):
        return (0*x).flatten(1).sum(1, keepdim=True) + torch.arange(10., dtype=x.dtype)


@pytest.mark.parametrize('name', ('fgsm', 'pgd', 'transfer'))
def test_a_constant_answer_cannot_be_changed(name):
    x = make_batch()[0]
    for y in (torch.full((len(x),), 9), torch.zeros(len(x), dtype=torch.int64)):
        attack = transfer_attack(Ten().eval(), pgd) if name == 'transfer' else attacks[name]
        out = attack(Ten().eval(), x, y, Linf(8/255))
        assert torch.equal(out, x), 'no gradient, no move'


wrong_uses = {
    'training mode': (lambda m, x, y: (m.train(), x, y), ValueError, 'Call `model.eval'),
    'one part in training mode': (lambda m, x, y: (m.net[0].train() and m, x, y), ValueError,
                                  'net.0 is in training mode'),
    'no module': (lambda m, x, y: (m.forward, x, y), TypeError, 'must be a torch.nn.Module'),
    'normalised outside': (lambda m, x, y: (m, (x-.5)/.25, y), ValueError, 'the model normalises'),
    'one NaN': (lambda m, x, y: (m, torch.cat([x[:-1], x[-1:]*float('nan')]), y), ValueError,
                'pixels in .0, 1.'),
    'grey levels': (lambda m, x, y: (m, (x*255).byte(), y), TypeError, 'floating point'),
    'no batch': (lambda m, x, y: (m, x[0], y[:1]), ValueError, r'x\[None\]'),
    'an empty batch': (lambda m, x, y: (m, x[:0], y[:0]), ValueError, 'non-empty'),
    'an array': (lambda m, x, y: (m, x.numpy(), y), TypeError, 'torch tensor'),
    'labels of another model': (lambda m, x, y: (m, x, y+4), ValueError,
                                r'class numbers in \[0, 5\)'),
    'a negative label': (lambda m, x, y: (m, x, y-9), ValueError, 'got -'),
    'too few labels': (lambda m, x, y: (m, x, y[:-1]), ValueError, '11 labels for 12 images'),
    'soft labels': (lambda m, x, y: (m, x, torch.eye(5)[y]), TypeError, 'argmax'),
    'labels as floats': (lambda m, x, y: (m, x, y.double()), TypeError, 'int64'),
}


@pytest.mark.parametrize('use', wrong_uses)
@pytest.mark.parametrize('attack', (fgsm, pgd))
def test_wrong_use_is_refused(attack, use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        attack(*change(model, *make_batch(model=model)), Linf(8/255))


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match='`steps` must not be negative; got -1'):
        pgd(make_net(), *make_batch(), Linf(.1), steps=-1)
