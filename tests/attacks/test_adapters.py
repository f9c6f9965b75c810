"Attacks of foolbox and torchattacks: the images of the library itself, and more promises than it makes."
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')

from robustnb.attacks import adapters
from robustnb.attacks.adapters import (
    brendel_bethge, from_foolbox, from_torchattacks, hop_skip_jump, pointwise)
from robustnb.attacks.gradient import margin
from robustnb.attacks.threat_models import L0, L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from robustnb.contract import open_model
from robustnb.core import image_generators, make_generator
from helpers_attacks import Ten, make_batch, make_net, same, snapshot, wrong_uses

fa = foolbox.attacks
blended = fa.LinearSearchBlendedUniformNoiseAttack(steps=20)
fixed = {
    'LinfPGD': (fa.LinfPGD(steps=5, rel_stepsize=.3, random_start=False), Linf(6/255)),
    'L2PGD': (fa.L2PGD(steps=5, rel_stepsize=.3, random_start=False), L2(.3)),
    'L1PGD': (fa.L1PGD(steps=5, rel_stepsize=.3, random_start=False), L1(4.)),
    'FGSM': (fa.LinfFastGradientAttack(), Linf(6/255)),
    'L2FastGradient': (fa.L2FastGradientAttack(), L2(.3)),
    'MIFGSM': (fa.MIFGSM(steps=4), Linf(6/255)),
    'AdamPGD': (fa.LinfAdamPGD(steps=4, random_start=False), Linf(6/255)),
    'SparseL1': (fa.SparseL1DescentAttack(steps=4), L1(4.)),
    'contrast': (fa.L2ContrastReductionAttack(), L2(1.))}
minimal = {
    'LinfDeepFool': (fa.LinfDeepFoolAttack(steps=10), Linf(6/255)),
    'L2DeepFool': (fa.L2DeepFoolAttack(steps=10), L2(.3)), 'DDN': (fa.DDNAttack(steps=40), L2(.6)),
    'CarliniWagner': (fa.L2CarliniWagnerAttack(binary_search_steps=2, steps=15, stepsize=.05),
                      L2(.3)),
    'EAD': (fa.EADAttack(binary_search_steps=5, steps=25, initial_stepsize=.05), L1(1.)),
    'NewtonFool': (fa.NewtonFoolAttack(steps=8), L2(.3))}
drawn = {
    'LinfPGD start': (fa.LinfPGD(steps=3), Linf(6/255)),
    'L2 noise': (fa.L2RepeatedAdditiveGaussianNoiseAttack(repeats=5), L2(2.)),
    'SaltAndPepper': (fa.SaltAndPepperNoiseAttack(steps=20), L2(2.)),
    'Boundary': (fa.BoundaryAttack(init_attack=blended, steps=15), L2(4.)),
    'HopSkipJump': (fa.HopSkipJumpAttack(init_attack=blended, steps=2), L2(.5)),
    'Pointwise': (fa.PointwiseAttack(init_attack=blended, l2_binary_search=False), L0(30)),
    'Virtual': (fa.VirtualAdversarialAttack(steps=2), L2(.3))}
attacks = fixed | minimal | drawn
named = pytest.mark.parametrize('name', attacks)


def case(name, dtype=torch.float64, n=6):
    model = make_net(dtype)
    return model, *make_batch(dtype, n=12, model=model), *attacks[name]


@pytest.mark.parametrize('name', fixed | minimal)
def test_the_images_are_those_of_foolbox(name):
    model, x, y, attack, threat = case(name)
    ours = from_foolbox(attack)(model, x, y, threat)
    bounded = foolbox.PyTorchModel(make_net(), bounds=(0, 1), device='cpu')
    with torch.enable_grad():
        if name in fixed:
            theirs = attack(bounded, x, y, epsilons=threat.eps)[1]
        else:
            theirs = torch.cat(
                [attack(bounded, x[i:i+1], y[i:i+1], epsilons=None)[0] for i in range(12)])
    further = x + 1.02*(theirs-x) if name in minimal else theirs
    choices = torch.stack([x, *(torch.where(threat.allows(x, o).view(-1, 1, 1, 1), o,
                                            threat.project(x, o.clamp(0, 1)))
                                for o in (theirs, further))])
    which = torch.stack([margin(model(o), y) for o in choices]).argmax(0)
    assert (ours - choices[which, torch.arange(12)]).abs().max() < 1e-9
    inside = threat.allows(x, theirs)
    assert (inside & (which > 0)).sum() >= 3
    assert (model(ours).argmax(1) != y).any()
    if name in minimal:
        assert (which == 2).any()
        assert (model(ours).argmax(1) != y)[inside & (model(theirs).argmax(1) != y)].all()


@pytest.mark.parametrize('name', drawn)
def test_the_draws_are_those_of_foolbox_with_the_seed_of_the_image(name):
    model, x, y, attack, threat = case(name)
    ours = from_foolbox(attack)(model, x[:4], y[:4], threat, make_generator(5))
    bounded, hits = foolbox.PyTorchModel(make_net(), bounds=(0, 1), device='cpu'), 0
    for i, g in enumerate(image_generators(make_generator(5), x[:4])):
        seed = torch.randint(2**62, (), generator=g).item()
        with torch.random.fork_rng(devices=[]):
            before = random.getstate(), np.random.get_state()
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            options = (dict(epsilon=threat.eps)
                       if name in ('LinfPGD start', 'L2 noise', 'Virtual') else {})
            theirs = attack.run(bounded, x[i:i+1],
                                foolbox.criteria.Misclassification(y[i:i+1]), **options)
            random.setstate(before[0])
            np.random.set_state(before[1])
        if (threat.allows(x[i:i+1], theirs)
            and margin(model(theirs), y[i:i+1]) > margin(model(x[i:i+1]), y[i:i+1])):
            further = x[i] + 1.02*(theirs[0]-x[i])
            assert min((ours[i]-theirs[0]).abs().max(), (ours[i]-further.clamp(0, 1)).abs().max(),
                       (ours[i]-threat.project(x[i:i+1], further[None])[0]).abs().max()) < 1e-9
            hits += 1
    assert hits > 0, 'the case is worth looking at'


@named
def test_promises(name):
    model, x, y, attack, threat = case(name)
    x = x[:6]
    y = torch.where(torch.arange(6) == 3, (y[:6]+1) % 5, y[:6])
    adapted = from_foolbox(attack)
    before = snapshot(model)
    image = x.clone()
    settings = repr(attack)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    out = adapted(model, x, y, threat, make_generator(3))
    assert same(snapshot(model), before)
    assert torch.equal(x, image)
    assert repr(attack) == settings
    now = np.random.get_state()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (now[1] == states[2][1]).all()
    assert now[2:] == states[2][2:]
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert threat.allows(x, out).all(), 'an image that is wrong already is left alone'
    assert torch.equal(out[3], x[3]), 'an image that is wrong already is left alone'
    assert (margin(model(out), y) >= margin(model(x), y)).all()
    assert (out != x).any()
    random.random()
    np.random.rand()
    torch.rand(1)
    with torch.no_grad():
        assert torch.equal(adapted(model, x, y, threat, make_generator(3)),
                           out), 'the same seed, whatever the global state'
    order = torch.tensor([4, 0, 5, 2])
    assert ((adapted(model, x[order], y[order], threat, make_generator(3)) - out[order]).abs()
            .max() < 1e-9), 'an image does not know its batch'
    if name in drawn:
        assert not torch.equal(adapted(model, x, y, threat, make_generator(4)), out)


@named
def test_float32_and_a_budget_of_nothing(name):
    model, x, y, attack, threat = case(name, torch.float32)
    out = from_foolbox(attack)(model, x[:3], y[:3], threat)
    assert out.dtype == torch.float32
    assert threat.allows(x[:3], out).all()
    nothing = type(threat)(0)
    assert (from_foolbox(attack)(model, x[:3], y[:3], nothing) - x[:3]).abs().max() < 1e-6


def test_gradients_that_were_there_stay():
    model, x, y, attack, threat = case('LinfDeepFool')
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.)
    frozen = next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.grad.clone()) for p in model.parameters()]
    from_foolbox(attack)(model, x, y, threat)
    assert all(p.requires_grad == r and torch.equal(p.grad, g)
               for p, (r, g) in zip(model.parameters(), before))
    assert not frozen.requires_grad


def test_an_attack_that_breaks_leaves_no_trace():
    class Broken(fa.LinfDeepFoolAttack):
        def run(self, *args, **kwargs):
            torch.rand(3)
            random.random()
            np.random.rand()
            raise RuntimeError('broken')

    model, x, y, *_ = case('FGSM')
    before = snapshot(model)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3])
    with pytest.raises(RuntimeError, match='broken'):
        from_foolbox(Broken())(model, x, y, Linf(.1))
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2][0]).all()
    assert np.random.get_state()[2] == states[2][1]


@pytest.mark.parametrize('attack', (
    pointwise, hop_skip_jump, from_foolbox(fa.BoundaryAttack(steps=5)),
    from_foolbox(fa.LinfDeepFoolAttack()), from_foolbox(fa.LinfPGD(steps=2))))
def test_a_constant_answer_cannot_be_changed(attack):
    x = make_batch()[0][:2]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.equal(attack(Ten().eval(), x, torch.full((2,), 9), Linf(.1)), x)


class HalfConstant(nn.Module):
    "Dark images are always of class 0"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        dark = (x[:, :, 0, 0] < .05).all(1, keepdim=True)
        return torch.where(dark, torch.tensor([9., 0, 0, 0, 0], dtype=x.dtype), self.net(x))


@pytest.mark.parametrize('alone', (True, False))
def test_an_image_without_a_start_does_not_stop_the_others(alone, monkeypatch):
    x = .1 + .9*make_batch()[0][:5].clamp(0, 1)
    model = HalfConstant(make_net()).eval()
    threat = L2(3.)
    y = model(x).argmax(1)
    real = blended.run
    monkeypatch.setattr(blended, 'run', lambda m, at, criterion: torch.where(
        torch.isin(at[:, 0, 0, 0], x[1, 0, 0, 0]).view(-1, 1, 1, 1), at, real(m, at, criterion)))
    out = from_foolbox(fa.HopSkipJumpAttack(init_attack=blended, steps=1),
                       alone=alone)(model, x, y, threat)
    wrong = model(out).argmax(1) != y
    assert torch.equal(out[1], x[1])
    assert wrong.sum() >= 3


def test_batches_are_used_where_images_do_not_meet():
    model, x, y, *_ = case('FGSM')
    sizes = []
    open_model(model, x)
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    for attack, alone, expected in (
            (fa.LinfPGD(steps=2, random_start=False), None, 12), (fa.LinfPGD(steps=2), None, 1),
            (fa.LinfDeepFoolAttack(steps=2), None, 1), (fa.LinfDeepFoolAttack(steps=2), False, 12),
            (fa.LinfPGD(steps=2, random_start=False), True, 1),
            (fa.L2CarliniWagnerAttack(binary_search_steps=1, steps=2), None, 1)):
        sizes.clear()
        from_foolbox(attack, alone)(model, x, y, L2(.3) if 'Carlini' in repr(attack) else Linf(.03))
        assert set(sizes[2:]) == {expected}


def test_names_choose_the_attack_of_the_norm(monkeypatch):
    made = []
    def stand_in(name):
        class Made(fa.LinfDeepFoolAttack):
            def __init__(self, **options):
                super().__init__()
                made.append((name, options))
        return Made
    for name in ('LinfinityBrendelBethgeAttack', 'L2BrendelBethgeAttack',
                 'L1BrendelBethgeAttack', 'L0BrendelBethgeAttack', 'HopSkipJumpAttack'):
        monkeypatch.setattr(adapters.foolbox.attacks, name, stand_in(name))
    model, x, y, *_ = case('FGSM')
    for threat in (Linf(.05), L2(.3), L1(3.), L0(9)):
        assert threat.allows(x[:2], brendel_bethge(model, x[:2], y[:2], threat, steps=7)).all()
    for threat in (Linf(.05), L2(.3)):
        hop_skip_jump(model, x[:2], y[:2], threat, steps=8)
    walks = [(f'{n}BrendelBethgeAttack', dict(steps=7)) for n in ('Linfinity', 'L2', 'L1', 'L0')]
    jumps = [('HopSkipJumpAttack', dict(steps=8, constraint=n)) for n in ('linf', 'l2')]
    assert made == walks + jumps


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_brendel_and_bethge_improve_on_their_start(dtype, monkeypatch):
    """With a plain step to the border in place of foolbox's optimizer, which numba would compile
    for half a minute"""
    pytest.importorskip('numba', reason='numba is not installed')
    class Plain:
        def solve(self, x0, x, b, lo, hi, c, r):
            step = x0-x + b*(c - b@(x0-x))/(b@b)
            return np.clip(x + step*min(1, r/np.linalg.norm(step)), lo, hi) - x
    monkeypatch.setattr(fa.L2BrendelBethgeAttack, 'instantiate_optimizer', lambda self: Plain())
    model, x, y, *_ = case('FGSM', dtype)
    x = x[:6]
    y = y[:6]
    everything = L2(50.)
    out = brendel_bethge(model, x, y, everything, steps=60)
    start = from_foolbox(fa.LinearSearchBlendedUniformNoiseAttack(steps=50))(
        model, x, y, everything)
    assert out.dtype == dtype
    assert (model(out).argmax(1) != y).all()
    assert everything.distance(x, out).mean() < .9*everything.distance(x, start).mean()
    near = brendel_bethge(model, x[2:4], y[2:4], L2(2.), steps=60)
    assert L2(2.).allows(x[2:4], near).all()
    assert torch.equal(near, brendel_bethge(model, x, y, L2(2.), steps=60)[2:4])


def test_decisions_alone_and_few_pixels():
    model, x, y, *_ = case('FGSM')
    class Decisions(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return torch.eye(5, dtype=x.dtype)[model(x).argmax(1)]
    for attack, threat in ((lambda *a: hop_skip_jump(*a, steps=4), Linf(16/255)),
                           (lambda *a: hop_skip_jump(*a, steps=4), L2(.8)),
                           (pointwise, L0(12)), (pointwise, L1(6.))):
        out = attack(Decisions().eval(), x[:2], y[:2], threat)
        assert threat.allows(x[:2], out).all()
        assert (model(out).argmax(1) != y[:2]).any()


@pytest.mark.parametrize('use', wrong_uses)
def test_wrong_use_is_refused(use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        from_foolbox(fa.LinfDeepFoolAttack())(*change(model, *make_batch(model=model)), Linf(8/255))


@pytest.mark.parametrize('call, words', (
    (lambda *a: from_foolbox(fa.LinfPGD())(*a, L2(.5)),
     'in the norm of the attack, Linf distance; got L2'),
    (lambda *a: from_foolbox(fa.L2PGD())(*a, SSIM(.9)), 'in the norm of the attack'),
    (lambda *a: from_foolbox(fa.L1PGD())(*a, L0(1)), 'in the norm of the attack'),
    (lambda *a: from_foolbox(fa.LinfPGD), 'must be a configured foolbox attack'),
    (lambda *a: from_foolbox(fa.LinfPGD().repeat(2)), 'use `restarts`'),
    (lambda *a: from_foolbox(fa.SpatialAttack()), 'changes pixel values'),
    (lambda *a: from_foolbox(fa.GenAttack()), 'GenAttack also needs a wanted class'),
    (lambda *a: from_foolbox(fa.BinarizationRefinementAttack()), 'needs wrong images'),
    (lambda *a: from_foolbox(fa.DatasetAttack()), 'DatasetAttack also needs other images'),
    (lambda *a: hop_skip_jump(*a, L1(3.)), 'must be Linf or L2'),
    (lambda *a: brendel_bethge(*a, SSIM(.9)), 'must be Linf, L2, L1 or L0')))
def test_wrong_settings_are_refused(call, words):
    model = make_net()
    with pytest.raises(TypeError, match=words):
        call(model, *make_batch(model=model))


class Far:
    "An object like those of torchattacks: a random start, then one step, too far"
    def __init__(self, model, eps):
        self.model = model
        self.eps = eps
    def __call__(self, images, labels):
        start = (images + self.eps*torch.empty_like(images).uniform_(-1, 1)).requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.model(start), labels)
        loss.backward()    # would fill the gradients of the weights
        return start.detach() + 3*self.eps*start.grad.sign()


def test_objects_of_torchattacks_keep_the_promises():
    net = make_net()
    x, y = make_batch(model=net)
    threat = Linf(8/255)
    attack = from_torchattacks(Far)
    before = snapshot(net)
    state = torch.get_rng_state()
    out = attack(net, x, y, threat, make_generator(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(net), before)
    assert threat.allows(x, out).all()
    assert (net(out).argmax(1) != y).any(), 'the case is worth looking at'
    order = torch.tensor([7, 2, 9])
    assert (attack(net, x[order], y[order], threat, make_generator(2))-out[order]).abs().max() < 1e-9
    whole = from_torchattacks(Far, alone=False)
    assert not torch.allclose(whole(net, x[order], y[order], threat, make_generator(2)),
                              whole(net, x, y, threat, make_generator(2))[order])
    wrong = (y+1) % 5
    for done in (attack, from_foolbox(fa.LinfPGD(steps=3))):
        assert torch.equal(done(net, x, wrong, threat), x), 'nothing to do'
    with pytest.raises(TypeError, match='`make` must be a function'):
        from_torchattacks('PGD')


@pytest.mark.parametrize('kind, options, threat', (
    ('PGD', dict(alpha=2/255, steps=5, random_start=False), Linf(8/255)),
    ('PGDL2', dict(alpha=.2, steps=5, random_start=False), L2(.5)),
    ('MIFGSM', dict(alpha=2/255, steps=4), Linf(8/255))))
def test_an_attack_of_torchattacks_is_the_one_called_directly(kind, options, threat):
    torchattacks = pytest.importorskip('torchattacks', reason='torchattacks is not installed')
    net = make_net(torch.float32)
    x, y = make_batch(torch.float32, model=net)
    make = lambda model, eps: getattr(torchattacks, kind)(model, eps=eps, **options)
    out = from_torchattacks(make)(net, x, y, threat)
    theirs = torch.cat([make(net, threat.eps)(a, b) for a, b in zip(x.split(1), y.split(1))])
    higher = margin(net(theirs), y) > margin(net(x), y)
    assert higher.sum() > 6, 'the case is worth looking at'
    assert (out[higher]-theirs[higher]).abs().max() < 1e-5
    with pytest.raises(TypeError, match='holds a model already'):
        from_torchattacks(make(net, threat.eps))


class Views:
    "An object like those of torchattacks that flattens with `view`, which fails on channels-last gradients"
    def __init__(self, model, eps):
        self.model = model
        self.eps = eps
    def __call__(self, images, labels):
        start = images.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.model(start), labels, reduction='sum')
        grad, = torch.autograd.grad(loss, start)
        return start.detach() + self.eps*grad/grad.view(len(images), -1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize('alone', (True, False))
def test_the_layout_of_the_images_does_not_matter_to_other_libraries(alone):
    net = make_net()
    x, y = make_batch(model=net)
    last = x.contiguous(memory_format=torch.channels_last)
    attack = from_torchattacks(Views, alone)
    with pytest.raises(RuntimeError, match='view size'):
        Views(net, .5)(last, y)
    out = attack(net, last, y, L2(.5))
    assert (out-attack(net, x, y, L2(.5))).abs().max() < 1e-12
    assert not torch.equal(out, x)
