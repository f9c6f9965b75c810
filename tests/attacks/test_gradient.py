"Attacks: image by image against foolbox, one table of promises for every attack and threat, and misuse."
import copy, random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import (
    cross_entropy, fgsm, full_pgd, is_correct, margin, multi_attack, pgd, restarts, to_the_end)
from robustnb.core import make_generator
from robustnb.evaluation.robust_accuracy import transfer_attack
from robustnb.attacks.threat_models import L2, Linf
from helpers_attacks import Ten, iterates, make_batch, make_net, same, snapshot, wrong_uses


@pytest.mark.parametrize('steps, step_size', ((1, .03), (7, .004), (10, .01)))
@pytest.mark.parametrize('threat, reference', ((Linf(8/255), 'LinfPGD'), (L2(.4), 'L2PGD')),
                         ids=('Linf', 'L2'))
def test_pgd_follows_foolbox_step_by_step(threat, reference, steps, step_size):
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    if reference == 'L2PGD':
        step_size *= 8
    model = make_net()
    x, y = make_batch(model=model)
    out, asked = iterates(model, lambda m: full_pgd(m, x, y, threat, steps=steps,
                                                     step_size=step_size))
    assert len(asked) == steps+1
    assert torch.equal(asked[0], x)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    for k in range(1, steps+1):
        kind = getattr(foolbox.attacks, reference)
        attack = kind(abs_stepsize=step_size, steps=k, random_start=False)
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
    step_size = threat.eps/(8 if threat.eps < 1 else 5)
    out, asked = iterates(model, lambda m: full_pgd(m, x, y, threat, steps=9, step_size=step_size))
    losses = torch.stack([cross_entropy(model(a), y) for a in asked])
    best = losses.argmax(0)
    assert len(best.unique()) > 1, 'the case is worth looking at'
    assert (best < 9).any(), 'the case is worth looking at'
    assert torch.equal(out, torch.stack(asked)[best, torch.arange(len(x))])


@pytest.mark.parametrize('start', (None, 3), ids=('no start', 'random start'))
@pytest.mark.parametrize('loss', (cross_entropy, margin))
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.15)), ids=repr)
def test_an_image_leaves_at_its_first_wrong_iterate_and_the_others_take_all_steps(threat, loss, start):
    model = make_net()
    x, y = make_batch(n=40, model=model)
    y[:6] = (y[:6]+1) % 5    # wrong from the start
    how = dict(steps=12, step_size=.4*threat.eps, loss=loss)
    seed = lambda: None if start is None else make_generator(start)
    full, path = iterates(model, lambda m: full_pgd(m, x, y, threat, seed(), **how))
    out, asked = iterates(model, lambda m: pgd(m, x, y, threat, seed(), **how))
    with torch.no_grad():
        wrong = torch.stack([model(o).argmax(1) != y for o in path])
    falls = wrong.any(0)
    first = wrong.int().argmax(0)
    assert first[falls].unique().numel() > 2, 'the case is worth looking at'
    assert 6 < falls.sum() < 40, 'the case is worth looking at'
    expected = torch.where(falls.view(-1, 1, 1, 1),
                           torch.stack(path)[first, torch.arange(len(x))], full)
    assert (out-expected).abs().max() < 1e-12
    assert [len(o) for o in asked] == [int((~wrong[:k].any(0)).sum()) for k in range(len(path))]
    assert torch.equal(model(out).argmax(1) != y, falls)


class Grey(nn.Module):
    "Class 0, and the less so the nearer all pixels are to .55"
    def forward(self, x):
        far = (x-.55).abs().flatten(1).sum(1, keepdim=True)
        return torch.cat([100+far, -far], 1)


@pytest.mark.parametrize('attack', (pgd, full_pgd))
@pytest.mark.parametrize('how, shares', ((dict(), [1, 1-.96**2, 1-.96**2+.92**2]),
                                         (dict(steps=20), [1/8, 2/8, 3/8]),
                                         (dict(step_size=.01), [.1, .2, .3])))
def test_steps_shrink_unless_their_number_or_length_is_given(attack, how, shares):
    x = torch.full((2, 3, 4, 4), .5, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    _, asked = iterates(Grey().eval(), lambda m: attack(m, x, y, Linf(.1), **how))
    assert len(asked) == how.get('steps', 25)+1
    for now, share in zip(asked[1:], shares):
        assert (now - x - .1*share).abs().max() < 1e-12


class Gap(nn.Module):
    "Class 0 unless two pixels differ by less than a sixtieth of .1"
    def forward(self, x):
        apart = x.flatten(1).diff(dim=1).abs()
        return torch.cat([apart, torch.full_like(apart, .1/60)], 1)


def test_shrinking_steps_end_in_a_gap_that_equal_ones_jump_over():
    x = torch.full((400, 1, 1, 2), .5, dtype=torch.float64)
    x[..., 0] += .19*torch.linspace(-1, 1, 400, dtype=torch.float64).view(-1, 1, 1)
    y = torch.zeros(400, dtype=torch.int64)
    fallen = lambda **how: Gap()(pgd(Gap().eval(), x, y, Linf(.1), **how)).argmax(1).sum().item()
    assert fallen() > 240 > 1.5*fallen(steps=40, step_size=.1/8)
    assert fallen() > 1.5*fallen(steps=40)


def test_all_that_fall_at_once_end_the_attack():
    model = make_net()
    x, y = make_batch(model=model)
    out, asked = iterates(model, lambda m: pgd(m, x, (y+1) % 5, Linf(8/255), steps=50))
    assert torch.equal(out, x)
    assert len(asked) == 1


class Drawn(nn.Module):
    "Every answer is right or wrong by a draw"
    def forward(self, x):
        side = (torch.rand(len(x), dtype=x.dtype) < .5).to(x)*10
        light = x.flatten(1).sum(1)
        return torch.stack([side + .1*light, 10-side], 1)


def test_a_lucky_draw_is_no_reason_to_leave():
    torch.manual_seed(0)
    model = Drawn().eval()
    x = make_batch()[0]
    y = torch.zeros(len(x), dtype=torch.int64)
    seen = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    pgd(model, x, y, Linf(8/255), steps=6)
    hook.remove()
    assert seen[-7:] == 7*[len(x)]


def test_to_the_end_finds_pgd_inside_partials():
    model = make_net()
    x, y = make_batch(model=model)
    threat = Linf(8/255)
    found = to_the_end(partial(partial(pgd, steps=7), step_size=.01))(model, x, y, threat)
    assert torch.equal(found, full_pgd(model, x, y, threat, steps=7, step_size=.01))
    assert not torch.equal(found, pgd(model, x, y, threat, steps=7, step_size=.01))
    other = restarts(pgd, 2)
    with pytest.raises(TypeError, match="`attack` must be a function .* got 'pgd'"):
        restarts('pgd', 2)
    assert to_the_end(other) is other
    crafted = transfer_attack(model, partial(pgd, steps=7, step_size=.01))
    assert torch.equal(crafted(Ten().eval(), x, y, threat), found), 'judged on another model'


@pytest.mark.parametrize('threat, reference', ((Linf(8/255), 'LinfFastGradientAttack'),
                                               (L2(.4), 'L2FastGradientAttack')),
                         ids=('Linf', 'L2'))
def test_fgsm_is_that_of_foolbox(threat, reference):
    foolbox = pytest.importorskip('foolbox', reason='foolbox is not installed')
    model = make_net()
    x, y = make_batch(model=model)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    theirs = getattr(foolbox.attacks, reference)()(bounded, x, y, epsilons=threat.eps)[1]
    ours = fgsm(model, x, y, threat)
    assert (ours-x).abs().max() > .01
    assert (ours-theirs).abs().max() < 1e-9


attacks = dict(fgsm=fgsm, fgsm_margin=partial(fgsm, loss=margin), pgd=pgd,
               pgd_margin=partial(pgd, loss=margin), full_pgd=full_pgd, one_step=partial(pgd, steps=1),
               long_steps=partial(pgd, steps=5, step_size=1.),
               transfer=transfer_attack(make_net(seed=1), pgd),
               multi_attack=multi_attack(fgsm, pgd))
threats = (Linf(0), Linf(2/255), Linf(8/255), Linf(1), L2(0), L2(.3), L2(3.))


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
    if seed is not None and name in ('full_pgd', 'one_step') and 0 < threat.eps < 1:
        assert not torch.equal(run(seed+1), out)
    loss = lambda x: (margin if 'margin' in name else cross_entropy)(model(x), y).detach()
    gain = loss(out) - loss(x)
    if name in ('full_pgd', 'pgd_margin', 'one_step') or name == 'long_steps' and seed is None:
        assert (gain >= -1e-9).all(), 'no worse than doing nothing'
    if threat.eps > 0 and name != 'transfer':
        assert gain.mean() > 0
    if threat == Linf(1):
        assert name not in ('pgd', 'pgd_margin', 'full_pgd') or (model(out).argmax(1) != y).all(), (
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
    exact = attacks[name](make_net(), x.double(), y, threat)
    assert (out.double()-exact).abs().max() <= 2*threat.eps + 1e-6


@pytest.mark.parametrize('name', ('fgsm', 'pgd', 'full_pgd', 'pgd_margin', 'multi_attack'))
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.3)), ids=repr)
def test_an_image_does_not_know_its_batch(name, threat):
    model = make_net()
    x, y = make_batch(model=model)
    alone = torch.cat([attacks[name](model, x[i:i+1], y[i:i+1], threat) for i in range(len(x))])
    assert (alone - attacks[name](model, x, y, threat)).abs().max() < 1e-9


def test_more_steps_are_no_weaker():
    model = make_net()
    x, y = make_batch(model=model)
    found = [full_pgd(model, x, y, Linf(4/255), steps=k, step_size=1/255) for k in range(6)]
    losses = torch.stack([cross_entropy(model(o), y).detach() for o in found])
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
    assert robust(scaled, margin) == robust(model, margin)
    assert robust(model, margin) <= robust(model, cross_entropy)
    assert robust(model, cross_entropy) < robust(scaled, cross_entropy)


@pytest.mark.parametrize('name', ('fgsm', 'pgd', 'transfer'))
def test_a_constant_answer_cannot_be_changed(name):
    x = make_batch()[0]
    for y in (torch.full((len(x),), 9), torch.zeros(len(x), dtype=torch.int64)):
        attack = transfer_attack(Ten().eval(), pgd) if name == 'transfer' else attacks[name]
        out = attack(Ten().eval(), x, y, Linf(8/255))
        assert torch.equal(out, x), 'no gradient, no move'


@pytest.mark.parametrize('use', wrong_uses)
@pytest.mark.parametrize('attack', (fgsm, pgd, full_pgd))
def test_wrong_use_is_refused(attack, use):
    change, error, words = wrong_uses[use]
    model = make_net()
    with pytest.raises(error, match=words):
        attack(*change(model, *make_batch(model=model)), Linf(8/255))


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match='`steps` must be a whole number, at least 0; got -1'):
        pgd(make_net(), *make_batch(), Linf(.1), steps=-1)


def test_inference_mode_changes_nothing_and_its_weights_are_named():
    net = make_net()
    x, y = make_batch(model=net)
    before = pgd(net, x, y, Linf(8/255))
    assert not torch.equal(before, x)
    with torch.inference_mode():
        assert torch.equal(pgd(net, x.clone(), y.clone(), Linf(8/255)), before)
        made_inside = copy.deepcopy(net)
    with pytest.raises(ValueError, match='`model` must have weights .*copy.deepcopy'):
        pgd(made_inside, x, y, Linf(8/255))
    assert torch.equal(pgd(copy.deepcopy(made_inside), x, y, Linf(8/255)), before)


class Same(nn.Module):
    "All logits are equal, as those of a network that was rounded to death"
    def forward(self, x): return 0*x.flatten(1)[:, :5]


def test_a_tie_is_right_where_the_largest_logit_is_the_first():
    x, _ = make_batch()
    y = torch.arange(len(x)) % 5
    assert is_correct(Same().eval(), x, y)[0].tolist() == (y == 0).nonzero().flatten().tolist()
