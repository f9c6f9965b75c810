"""Auto-PGD, iterate by iterate against the paper's algorithm for one image; who leaves, who judges,
and misuse."""
import math
from functools import partial

import pytest
import torch
from torch import nn

from robustnb.attacks.adaptive_pgd import _climb, apgd, apgd_targeted, climb, gradients, walk
from robustnb.attacks.gradient import cross_entropy, dlr, dlr_to, margin, margin_to
from robustnb.core import make_generator
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from helpers_attacks import make_batch, make_net


def parts_of(model, x, y, eps, norm, loss):
    "For one image: value and gradient, projection, direction"
    def value_and_grad(z):
        z = z.clone().requires_grad_()
        value = loss(model(z[None]), y[None])[0]
        value.backward()
        return value.item(), z.grad
    def project(z):
        d = z-x
        d = d.clamp(-eps, eps) if norm == 'Linf' else d*min(1., eps/max(d.norm().item(), 1e-30))
        return (x+d).clamp(0, 1)
    return value_and_grad, project, (lambda g: g.sign()) if norm == 'Linf' else (lambda g: g/g.norm())


def slow_walk(model, x, y, eps, norm, loss, steps):
    "For one image: gradients of mean size one, .7 of what was; steps from 2 eps to .05 eps; all points"
    value_and_grad, project, unit = parts_of(model, x, y, eps, norm, loss)
    visited = [x]
    total = 0
    for k in range(steps):
        grad = value_and_grad(visited[-1])[1]
        total = .7*total + grad/grad.abs().mean()
        length = eps*(.05 + 1.95*math.cos(math.pi*k/steps/2)**2)
        visited.append(project(visited[-1] + length*unit(total)))
    return torch.stack(visited)


def slow_apgd(model, x, y, eps, norm, loss, steps):
    "Algorithm 1 of Croce and Hein for one image, with the authors' window lengths; every point it visits"
    value_and_grad, project, unit = parts_of(model, x, y, eps, norm, loss)
    visited = [x]
    step = 2*eps
    value, grad = value_and_grad(x)
    best, best_grad, best_value = x, grad, value
    now, old, last_value = x, x, value
    window, done, rises, halved, checked = max(int(.22*steps), 1), 0, 0, True, value
    for k in range(steps):
        z = project(now + step*unit(grad))
        new = z if k == 0 else project(now + .75*(z-now) + .25*(now-old))
        old, now = now, new
        visited.append(now)
        value, grad = value_and_grad(now)
        rises = rises + (value > last_value)
        last_value = value
        done = done+1
        if value > best_value:
            best, best_grad, best_value = now, grad, value
        if done == window:
            halve = rises <= .75*window or (not halved and checked >= best_value)
            if halve:
                step, now, grad = step/2, best, best_grad
            halved, checked, rises, done = halve, best_value, 0, 0
            window = max(window - max(int(.03*steps), 1), int(.06*steps), 1)
    return torch.stack(visited)


def recorded(model, loss, x, y, threat, steps, search=climb):
    "The points that `search` visits, for images that it is told never fall"
    visited = []
    ask = gradients(model, loss, 5)
    def listen(z, labels, wanted=True):
        visited.append(z.clone())
        return ask(z, labels, wanted)
    search(listen, x, y, threat, x, steps,
           judge=lambda images, labels: torch.zeros(len(images), dtype=torch.bool))
    return torch.stack(visited, 1)


@pytest.mark.parametrize('steps', (7, 40))
@pytest.mark.parametrize('loss', (cross_entropy, dlr, margin, dlr_to, margin_to),
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.3)), ids=repr)
def test_climb_visits_the_points_of_the_paper(threat, loss, steps):
    model = make_net()
    x, y = make_batch(n=6, model=model)
    labels = torch.stack([y, (y+1) % 5], 1) if loss in (dlr_to, margin_to) else y
    ours = recorded(model, loss, x, labels, threat, steps)
    for i in range(len(x)):
        theirs = slow_apgd(model, x[i], labels[i], threat.eps, type(threat).__name__, loss, steps)
        assert ours[i].shape == theirs.shape, f'image {i}'
        assert (ours[i]-theirs).abs().max() < 1e-9, f'image {i}'
    moved = (ours[:, 1:]-ours[:, :-1]).flatten(2).norm(dim=2)
    assert (moved[:, -1] < .6*moved[:, 0]).any(), 'steps were halved'


@pytest.mark.parametrize('loss', (margin, margin_to), ids=lambda f: f.__name__)
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.3)), ids=repr)
def test_walk_visits_the_points_of_one_image_after_the_other(threat, loss):
    model = make_net()
    x, y = make_batch(n=6, model=model)
    labels = torch.stack([y, (y+1) % 5], 1) if loss is margin_to else y
    ours = recorded(model, loss, x, labels, threat, 9, walk)
    for i in range(len(x)):
        theirs = slow_walk(model, x[i], labels[i], threat.eps, type(threat).__name__, loss, 9)
        assert (ours[i]-theirs).abs().max() < 1e-9, f'image {i}'


@pytest.mark.parametrize('loss, name', ((cross_entropy, 'ce'), (dlr, 'dlr')))
@pytest.mark.parametrize('threat', (Linf(2/255), L2(.1)), ids=repr)
def test_apgd_is_that_of_the_authors(threat, loss, name):
    base = pytest.importorskip(
        'pyautoattack.autopgd_base',
        reason='pyautoattack, the authors\' code as a package, is not installed')
    model = make_net()
    x, y = make_batch(n=30, model=model)
    theirs = base.APGDAttack(model, n_iter=50, norm=type(threat).__name__, eps=threat.eps,
                             loss=name, seed=0, device='cpu', verbose=False)
    theirs.init_hyperparam(x)
    _, right, best, _ = theirs.attack_single_run(x, y, x_init=x)
    fallen = climb(gradients(model, loss), x, y, threat, x, 50)[2]
    assert torch.equal(fallen, ~right.bool())
    assert 0 < fallen.sum() < 30
    left = ~fallen
    values = torch.stack([loss(model(z), y[left]) for z in recorded(
        model, loss, x[left], y[left], threat, 50).transpose(0, 1)])
    assert (values.amax(0) - best[left]).abs().max() < 1e-9


def test_images_leave_when_they_fall_and_batches_are_refilled():
    model = make_net()
    sizes = []
    threat = Linf(3/255)
    x, y = make_batch(n=40, model=model)
    ask = gradients(model, margin, 8)
    def listen(z, labels, wanted=True):
        sizes.append(len(z))
        return ask(z, labels, wanted)
    out, height, fallen = climb(listen, x, y, threat, x, 20)
    assert sizes[0] == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 40-int(fallen.sum()) > 0
    assert fallen.sum() > 5
    with torch.no_grad():
        assert torch.equal(margin(model(out), y) > 0, fallen)
        assert torch.allclose(margin(model(out), y), height)
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    ask(x, y)
    assert seen == [8]*5


def test_the_judge_has_the_last_word():
    model = make_net()
    threat = Linf(6/255)
    x, y = make_batch(n=20, model=model)
    asked = []
    def judge(images, labels):
        asked.append(len(images))
        return margin(model(images), labels).detach() > .5
    out, _, fallen = climb(gradients(model, cross_entropy), x, y, threat, x, 30, judge)
    easy = climb(gradients(model, cross_entropy), x, y, threat, x, 30)[2]
    with torch.no_grad():
        assert (margin(model(out), y)[fallen] > .5).all()
    assert len(asked) > 1
    assert fallen.sum() <= easy.sum()
    assert fallen.any()
    assert not climb(gradients(model, cross_entropy), x, y, threat, x, 5,
                     lambda images, labels: torch.zeros(len(images), dtype=torch.bool))[2].any()


attacks = dict(apgd=apgd, apgd_dlr=partial(apgd, loss=dlr, steps=20),
               apgd_targeted=partial(apgd_targeted, steps=15),
               targeted_margin=partial(apgd_targeted, steps=10, targets=2, loss=margin_to))


@pytest.mark.parametrize('seed', (None, 3))
@pytest.mark.parametrize('name', attacks)
@pytest.mark.parametrize('threat', (Linf(4/255), L2(.2), L1(3.), SSIM(.98)), ids=repr)
def test_batches_order_and_seeds(threat, name, seed):
    model = make_net()
    attack = partial(attacks[name], steps=12)
    x, y = make_batch(n=12, model=model)
    run = lambda x, y: attack(model, x, y, threat,
                              generator=None if seed is None else make_generator(seed))
    whole = run(x, y)
    order = torch.randperm(12, generator=make_generator(0))
    assert threat.allows(x, whole).all()
    assert whole.dtype == x.dtype
    assert torch.equal(run(x, y), whole)
    assert (
        (torch.cat([run(x[i:i+5], y[i:i+5]) for i in range(0, 12, 5)]) - whole).abs().max() < 1e-7)
    assert (run(x[order], y[order]) - whole[order]).abs().max() < 1e-7
    with torch.no_grad():
        assert (margin(model(whole), y) >= margin(model(x), y) - 1e-9).float().mean() > .9


def test_targets_are_tried_in_order_and_only_by_survivors():
    model = make_net()
    asked = []
    x, y = make_batch(n=20, model=model)
    def spy(logits, labels):
        asked.append(labels.clone())
        return margin_to(logits, labels)
    apgd_targeted(model, x, y, Linf(1/255), steps=1, targets=3, loss=spy)
    with torch.no_grad():
        order = model(x).scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True).indices
    assert torch.equal(asked[0], torch.stack([y, order[:, 0]], 1))
    sizes = [len(a) for a in asked]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20
    rows = {tuple(r) for r in asked[-1].tolist()}
    assert rows <= {(a, b) for a, b in torch.stack([y, order[:, 2]], 1).tolist()}
    everything = apgd_targeted(model, x, y, Linf(1/255), steps=1, targets=99)
    assert Linf(1/255).allows(x, everything).all()


def test_what_is_already_wrong_is_left_alone_and_a_constant_cannot_fall():
    model = make_net()
    x, y = make_batch(n=10, model=model)
    wrong = (y+1) % 5
    for attack in attacks.values():
        assert torch.equal(attack(model, x, wrong, Linf(.1)), x)
        flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double().eval()
        with torch.no_grad():
            flat[1].weight.zero_()
            flat[1].bias.copy_(torch.arange(5.))
        assert torch.equal(flat(attack(flat, x, torch.full_like(y, 4), Linf(.1))), flat(x))


@pytest.mark.parametrize('call, words',
                         ((partial(apgd, steps=-1), '`steps` must be a whole number, at least 0; got -1'),
                          (partial(apgd_targeted, targets=0), '`targets` must be a whole number, at least 1'),
                          (partial(apgd_targeted, steps=10.), '`steps` must .* got 10.0'),
                          (partial(apgd_targeted, targets=1.5), '`targets` must .* got 1.5'),
                          (partial(apgd, loss=lambda z, y: z.detach().sum(1)), 'Use `square`')))
def test_wrong_uses(call, words):
    model = make_net()
    with pytest.raises((ValueError, TypeError), match=words):
        call(model, *make_batch(model=model), Linf(.1))


def test_ratios_need_enough_classes():
    model = make_net(classes=3)
    x, y = make_batch(model=model)
    with pytest.raises(ValueError, match='at least 4 classes; this one has 3. Use `margin_to`'):
        apgd_targeted(model, x, y, Linf(.1))
    assert Linf(.1).allows(x, apgd(model, x, y, Linf(.1), loss=dlr, steps=3)).all()


def l1_length(d): return d.flatten(1).abs().sum(1)


def test_sparse_steps_come_from_two_larger_balls():
    model = make_net()
    x, y = make_batch(n=6, model=model)
    seen = []
    def look(now, labels, wanted=True):
        seen.append((now.clone(), wanted))
        return gradients(model, cross_entropy)(now, labels, wanted)
    never = lambda images, labels: torch.zeros(len(images), dtype=torch.bool)
    climb(look, x, y, L1(1.), x, 20, never)
    lengths = torch.stack([l1_length(o-x).max() for o, _ in seen])
    assert len(seen) == 20 + 1 and sum(wanted for _, wanted in seen) == 20 - 2
    assert 2 < lengths[:6].max() <= 3.001 and 1 < lengths[6:12].max() <= 2.001
    assert lengths[12:].max() <= 1.001
    # what comes first in a ball is the nearest of the larger one, brought back
    with torch.no_grad():
        height = torch.stack([margin(model(o), y) for o, _ in seen[:6]])
    nearest = torch.stack([o for o, _ in seen[:6]])[height.argmax(0), torch.arange(6)]
    assert torch.equal(seen[6][0], L1(2.).project(x, nearest))
    seen.clear()
    climb(look, x, y, L1(1.), x, 4, never)
    assert len(seen) == 4 + 1 and sum(wanted for _, wanted in seen) == 4, 'too few for three balls'


def test_from_outside_more_images_fall_than_from_within():
    model = make_net()
    x, y = make_batch(n=200, model=model)
    stand = lambda found: int((model(found).argmax(1) == y).sum())
    for eps, fewer in ((.8, 5), (1.6, 1)):
        outside = climb(gradients(model, cross_entropy), x, y, L1(eps), x, 30)[0]
        within = _climb(gradients(model, cross_entropy), x, y, L1(eps), x, 30, None)[0]
        assert L1(eps).allows(x, outside).all()
        assert stand(outside) <= stand(within) - fewer
    assert torch.equal(*(f(gradients(model, margin), x, y, L2(.3), x, 10, None)[0] for f in (climb, _climb)))
