"""Attacks on descriptors: the saved image, the second place's rules step by step, and students that
learn from what was paid for."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from helpers_descriptors import pictures, windowed
from robustnb.core import make_generator, round_to_8bit, to_uint8
from robustnb.attacks.ssim_rule import SSIM, ssim
from robustnb.attacks.threat_models import L2, Linf
from robustnb.descriptors import attack as D
from robustnb.descriptors.attack import (
    allows_saved, attack_descriptor, baseline, fgsm_masked, fgvm, fit_8bit, Plan,
    shrink_and_place, target_combinations)
from robustnb.descriptors.blackbox import BlackBox, descriptor_distance

RULE = SSIM(.95)


pytestmark = pytest.mark.usefixtures('one_thread')


class Linear(nn.Module):
    "A descriptor that is linear in the pixels"
    def __init__(self, seed=0, dim=6, noise=0.):
        super().__init__()
        g = make_generator(seed)
        w = torch.randn(dim, 3*16*16, generator=g)
        self.w = nn.Parameter(w + noise*torch.randn(w.shape, generator=make_generator(seed+1)))
        self.eval()

    def forward(self, x): return (x.flatten(1)-.5) @ self.w.T/30


def photos(n=6, seed=0, rough=.05):
    "Smooth images with some texture"
    g = make_generator(seed)
    low = nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=g), size=16, mode='bilinear')
    return round_to_8bit((low + rough*torch.randn(n, 3, 16, 16, generator=g)).clamp(0, 1))


@pytest.fixture(scope='module')
def case():
    x = photos()
    box = Linear()
    with torch.no_grad():
        targets = box(photos(15, seed=1)).view(3, 5, 6).repeat(2, 1, 1)
    return x, targets, box, Linear(noise=.8)


def distance(box, x, targets):
    with torch.no_grad():
        return descriptor_distance(box(round_to_8bit(x)), targets)


ATTACKS = dict(baseline=baseline, fgvm=lambda *a, **k: fgvm(*a, queries=12, **k),
               masked=lambda *a, **k: fgsm_masked(*a, queries=12, **k),
               ours=lambda *a, **k: attack_descriptor(*a, plan=Plan(queries=12), **k))


# ---- the saved image

def test_fit_against_a_slow_similarity():
    x = (pictures(8)*255).round()/255
    near = x + .01*torch.randn(x.shape, generator=make_generator(0))
    inside = (near.clamp(0, 1)*255).round()/255
    loose = fit_8bit(x, near, SSIM(.5))
    assert torch.allclose(loose, inside, atol=1e-6)
    far = fit_8bit(x, x + torch.randn(x.shape, generator=make_generator(0)), RULE)
    lost = [1-windowed(a, b) for a, b in zip(to_uint8(x), to_uint8(far))]
    assert max(lost) <= .05
    assert min(lost) > .04
    assert torch.equal(far, (far*255).round()/255)
    assert torch.equal(fit_8bit(x, far, RULE), far)
    assert torch.equal(fit_8bit(x, far, SSIM(1.)), x)


def test_images_are_shrunk_and_placed():
    x = pictures(3, 16)
    assert torch.allclose(shrink_and_place(x, torch.tensor([[.999, .5, .5]]*3)), x, atol=1e-6)
    assert torch.allclose(shrink_and_place(x, torch.rand(3, 3, generator=make_generator(0)), 1.), x,
                          atol=1e-6)
    small = shrink_and_place(x, torch.tensor([[0., 0., .999]]*3), .5)
    want = nn.functional.interpolate(x, size=(8, 8), mode='bilinear', align_corners=False)
    assert torch.allclose(small[:, :, :8, 8:], want, atol=1e-6)
    assert (small[:, :, 8:] == 0).all()
    assert (small[:, :, :, :8] == 0).all()


def test_saved_images_by_the_competition_rule():
    skimage = pytest.importorskip('skimage.metrics')
    x = photos()
    y = fit_8bit(x, x + .1*torch.randn(x.shape, generator=make_generator(5)), RULE)
    for a, b in zip(x, y):
        grey = [(o*255).round().byte().permute(1, 2, 0).numpy() for o in (a, b)]
        assert .95 <= skimage.structural_similarity(*grey, channel_axis=2, data_range=255) < .952
    assert torch.equal(y, round_to_8bit(y))


def test_rule_is_exact_about_grey_levels():
    x = torch.full((1, 3, 9, 9), 50/255)
    for k, good in ((7, True), (8, True), (9, False)):
        assert allows_saved(x, x + k/255, Linf(8/255)).item() == good
    one = x.clone()
    one[0, 0, 0, 0] += 3/255
    assert allows_saved(x, one, L2(3/255)).item()
    assert not allows_saved(x, one, L2(2.99/255)).item()
    assert allows_saved(x, x + .001,
                        Linf(0)).item(), 'less than half a grey level is not in the file'


def test_fit_goes_as_far_as_it_may():
    x = photos()
    move = .2*torch.randn(x.shape, generator=make_generator(2))
    y = fit_8bit(x, x + move, Linf(8/255))
    assert ((y-x).abs().amax((1, 2, 3))*255).round().eq(8).all()
    assert torch.equal(fit_8bit(x, x, RULE), x)
    mixed = torch.cat([x[:1] + 1/255, x[1:2] + move[1:2]]).clamp(0, 1)
    assert torch.equal(fit_8bit(x[:2], mixed, RULE)[:1],
                       round_to_8bit(mixed[:1])), 'one image does not depend on another'


def test_a_file_over_the_rule_tells_by_how_much(monkeypatch):
    x = photos()
    looks = []
    look = D._distance_saved
    monkeypatch.setattr(D, '_distance_saved', lambda *a: looks.append(len(a[0])) or look(*a))
    lost = {}
    for size in (.05, .2, 1.):
        y = fit_8bit(x, x + size*torch.randn(x.shape, generator=make_generator(2)), RULE)
        lost[size] = RULE.distance(x.double(), y.double())
        assert (lost[size] <= .05 + 1e-12).all()
        assert lost[size].min() > .045
    assert looks[:1] == [len(x)]
    assert len(looks) <= 12, 'not a ladder of ten'


# ---- the second place

def test_goals():
    t = torch.randn(2, 5, 3, generator=make_generator(0))
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    fours = [(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4), (0, 2, 3, 4)]
    threes = [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 2, 3), (0, 2, 4), (0, 3, 4), (1, 2, 3),
              (1, 2, 4)]
    wanted = [(0, 1, 2, 3, 4), *((i,) for i in range(5)), *pairs, *fours, *threes]
    assert len(wanted) == 28
    assert torch.allclose(target_combinations(t),
                          torch.stack([t[:, list(c)].mean(1) for c in wanted], 1), atol=1e-6)


def cut(g): return (g/g.std()).clamp(-2, 2)


def masked(g):
    size = g.abs()
    return torch.where(size > size.mean() + size.std(), g.sign(), 0.)


def slow_fgvm(box, x, targets, students, queries, step=cut):
    "One image, as the second place wrote it"
    goals = target_combinations(targets[None])[0]
    now = x.clone()
    kept = x.clone()
    best, k, patience = descriptor_distance(box(x[None]), targets[None]).item(), 0, 5
    for _ in range(queries-1):
        at = now[None].detach().requires_grad_(True)
        d = sum(s(at) for s in students)/len(students)
        g, = torch.autograd.grad((d-goals[k % 28]).square().mean(), at)
        new = now - .016*.225*step(g[0])
        file = round_to_8bit(new.clamp(0, 1)[None])
        if ssim(x[None].double(), file.double()) < .95: break
        s = descriptor_distance(box(file), targets[None]).item()
        if s < best:
            now, kept, best, patience = new, file[0], s, 28
        else:
            patience = patience-1
            k = k+1
            if patience == 0:
                now, patience = new, 4
    return kept


@pytest.mark.parametrize('attack,step', [(fgvm, cut), (fgsm_masked, masked)])
def test_fgvm_is_the_slow_one(case, attack, step):
    x, targets, box, _ = case
    students = [Linear(noise=2.5), Linear(noise=2.5, seed=4)]
    with torch.no_grad():
        found = attack(box, x, targets, RULE, students=students, queries=40)
    for i in range(len(x)):
        with torch.no_grad():
            wanted = None
        wanted = slow_fgvm(lambda o: box(o).detach(), x[i], targets[i], students, 40, step)
        assert torch.allclose(found[i], wanted, atol=1e-6), i
    assert not torch.equal(found, x)


def test_fgvm_jumps_after_five_failures():
    """A box that never gets nearer: five goals are tried from the clean image, then one step is
    taken, then four from there"""
    x = photos(1)
    asked = []
    far = torch.zeros(1, 5, 6)

    def box(o):
        asked.append(o.clone())
        return torch.full((len(o), 6), float(len(asked)))
    targets = torch.randn(1, 5, 6, generator=make_generator(3))
    fgvm(box, x, targets, SSIM(.5), students=[Linear()], queries=11)
    moved = [(o-x).abs().amax().item()*255 for o in asked]
    assert moved[0] == 0
    assert all(m <= 2.1 for m in moved[1:6])
    assert all(m <= 4.1 for m in moved[6:10])
    second = fgvm_step(Linear(), fgvm_step(Linear(), x, target_combinations(targets)[:, 4]),
                       target_combinations(targets)[:, 5])
    assert torch.allclose(asked[6], round_to_8bit(second.clamp(0, 1)),
                          atol=1e-6), 'the step taken all the same is the fifth'


def fgvm_step(student, now, goal):
    at = now.detach().requires_grad_(True)
    g, = torch.autograd.grad((student(at)-goal).square().mean(1).sum(), at)
    return now - .016*.225*(g/g.flatten(1).std(1).view(-1, 1, 1, 1)).clamp(-2, 2)


# ---- the organisers' baseline

def test_range_fault_stops_early(case):
    _, targets, box, student = case
    x = photos(rough=0)
    lost = lambda fault: 1-ssim(
        x, baseline(box, x, targets, RULE, students=[student], range_fault=fault))
    assert (lost(True) <= lost(False)).all()
    assert lost(True).mean() < .96*lost(False).mean()
    assert lost(False).mean() > .03


def test_baseline_first_step(case):
    x, targets, box, student = case
    at = x[:1].clone().requires_grad_(True)
    step = sum(torch.autograd.grad((student(at)-targets[0, j]).square().mean(), at)[0].sign()
               for j in range(5))
    wanted = round_to_8bit((x[:1] - .01*.225*step).clamp(0, 1))
    level = 1 - RULE.distance(x[:1].double(), wanted.double()).item() - 1e-6
    found = baseline(box, x[:1], targets[:1], SSIM(level), students=[student])
    assert torch.equal(found, wanted) or (ssim(x[:1], found) >= level and distance(
        box, found, targets[:1]) <= distance(box, wanted, targets[:1]))


# ---- ours

def test_perfect_student_reaches_the_best_linear_step(case):
    "For a linear descriptor and one target far away, the best image under L2 is known"
    x, _, box, _ = case
    x = round_to_8bit(.4 + .2*x)
    with torch.no_grad():
        goal = box(x)*1e3
    rule = L2(.5)
    found = attack_descriptor(box, x, goal[:, None], rule, students=[box],
                              plan=Plan(queries=20, refresh=0))
    gained = distance(box, x, goal[:, None]) - distance(box, found, goal[:, None])
    u = goal/goal.norm(dim=1, keepdim=True)
    most = .5*(u @ box.w/30).norm(dim=1)
    assert (gained > .9*most).all()
    assert (gained < 1.02*most).all()


def test_learning_helps_and_students_are_left_alone(case):
    x, targets, box, student = case
    before = student.w.detach().clone()
    score = lambda plan: distance(
        box, attack_descriptor(box, x, targets, RULE, students=[student], plan=plan),
        targets).mean()
    plan = Plan(queries=25)
    assert score(plan) < score(replace(plan, refresh=0)) - .003
    assert torch.equal(before, student.w)
    assert student.w.grad is None


def learnt(case, seen, **options):
    "A student after thirty steps on what was seen"
    learner = copy.deepcopy(case[3])
    D._learn([learner], [torch.optim.Adam(learner.parameters(), 1e-2)], seen,
             Plan(refresh=30, **options), make_generator(0))
    return learner.requires_grad_(False)


def seen_at(box, *images):
    with torch.no_grad():
        return [((x*255).round().byte(), box(x)) for x in images]


def test_learning_brings_students_nearer(case):
    x, _, box, student = case
    gap = lambda o: (1 - torch.cosine_similarity(o(x), box(x))).mean().item()
    assert gap(learnt(case, seen_at(box, x))) < .5*gap(student)


def test_learning_from_how_answers_differ(case):
    x, _, box, student = case
    moved = round_to_8bit((x + .02*torch.randn(x.shape, generator=make_generator(3))).clamp(0, 1))
    off = lambda o: (o(moved) - o(x) - box(moved) + box(x)).norm(dim=1).mean().item()
    seen = seen_at(box, moved, x)
    assert off(learnt(case, seen, differences=1.)) < .3*off(learnt(case, seen, differences=0.))
    assert off(learnt(case, seen, differences=0.)) > .5*off(student)


def test_a_step_of_learning_written_out(case):
    x, _, box, student = case
    moved = round_to_8bit((x + .02*torch.randn(x.shape, generator=make_generator(3))).clamp(0, 1))
    learner = copy.deepcopy(student)
    plan = Plan(refresh=1, differences=.7)
    seen = seen_at(box, moved, x)
    D._learn([learner], [torch.optim.SGD(learner.parameters(), .1)], seen, plan, make_generator(0))
    g = make_generator(0)
    w = student.w.detach().clone().requires_grad_(True)
    rows = torch.randint(6, (16,), generator=g)
    earlier = torch.randint(2, (16,), generator=g)
    answer, loss = (lambda o: (o.flatten()-.5) @ w.T/30), 0
    for i, k in zip(rows.tolist(), earlier.tolist()):
        a = x[i]
        b = (moved, x)[k][i]
        said_a = box(a[None])[0].detach()
        said_b = box(b[None])[0].detach()
        loss = loss + sum(1 - torch.cosine_similarity(answer(o), d, dim=0)
                          for o, d in ((a, said_a), (b, said_b)))/32
        loss = loss + .7/16*((answer(a) - answer(b) - said_a + said_b)
                             .norm()**2/(said_a-said_b).norm().clamp_min(1e-3)**2)
    change, = torch.autograd.grad(loss, w)
    assert torch.allclose(learner.w, student.w - .1*change, atol=1e-5)
    assert change.abs().max() > 1e-3


def test_learning_passes_over_what_was_not_answered(case):
    x, _, box, student = case
    first, last = seen_at(box, round_to_8bit(.9*x), x)
    # no image has two answers
    first[1][::2] = float('nan')
    last[1][1::2] = float('nan')
    assert torch.equal(learnt(case, [first, last]).w, learnt(case, [first, last], differences=0.).w)
    assert not torch.equal(learnt(case, [first, last]).w, student.w)
    first[1].fill_(float('nan'))
    last[1].fill_(float('nan'))
    assert torch.equal(learnt(case, [first, last]).w, student.w)


def test_residual_repairs_a_student_that_is_off_by_a_constant(case):
    x, targets, box, _ = case
    score = lambda student, **o: distance(box, attack_descriptor(
        box, x, targets, RULE, students=[student], plan=Plan(queries=12, refresh=0, **o)),
                                          targets)
    assert torch.allclose(score(Shifted(2.), residual=True), score(box), atol=1e-5)
    assert score(Shifted(2.)).mean() > score(box).mean() + .01


class Shifted(Linear):
    "The box, off by a constant"
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x): return super().forward(x) + self.by*torch.linspace(-1, 1, 6)


def test_nesterov_looks_ahead(case):
    "On one target, the gradient of the second step is taken a momentum further than the first step went"
    x, targets, box, student = case
    asked = []
    plan = Plan(inner=2, decay=.5, nesterov=True, length=.1)

    class Watched(Linear):
        def forward(self, o):
            asked.append(o.detach().clone())
            return super().forward(o)
    watched = Watched(noise=.8)
    length = torch.full((6, 1, 1, 1), .1)
    D._descend([watched], x, x, targets, RULE, plan, length)
    ahead = asked.copy()
    asked.clear()
    D._descend([watched], x, x, targets, RULE, replace(plan, nesterov=False), length)
    first = (asked[1]-x).norm().item()
    second = (ahead[1]-x).norm().item()
    # half a step further
    assert torch.equal(asked[0], ahead[0])
    assert 1.35*first < second < 1.65*first


def test_shaped_steps_gain_more(case):
    x, targets, box, _ = case
    # one half rough, one half flat
    x = round_to_8bit(torch.cat([x[:, :, :8], .5 + .1*x[:, :, 8:]], 2))
    score = lambda **o: distance(box, attack_descriptor(
        box, x, targets, RULE, students=[box], plan=Plan(queries=30, refresh=0, **o)),
                                 targets).mean()
    assert score() < score(shaped=False)


@pytest.mark.parametrize('change', [
    dict(shaped=False), dict(pulled_back=False), dict(decay=0), dict(inner=1), dict(length=.2),
    dict(refresh=0), dict(differences=0.), dict(residual=True), dict(nesterov=True)])
def test_every_switch_does_something(case, change):
    x, targets, box, student = case
    # so far away that no step is too long
    plan = Plan(queries=8)
    targets = 10*targets
    run = lambda p: attack_descriptor(box, x, targets, RULE, students=[student], plan=p)
    assert torch.equal(run(plan), run(plan))
    assert not torch.equal(run(plan), run(replace(plan, **change)))


# ---- the contract

@pytest.mark.parametrize('name', ATTACKS)
def test_contract(case, name):
    x, targets, box, student = case
    keep = x.clone(), targets.clone()
    state = torch.get_rng_state()
    found = ATTACKS[name](BlackBox(box, 1000), x, targets, RULE, students=[student])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(keep[0], x)
    assert torch.equal(keep[1], targets)
    assert torch.equal(found, round_to_8bit(found))
    assert allows_saved(x, found, RULE).all()
    assert not found.requires_grad
    assert (distance(box, found, targets) <= distance(box, x, targets) + 1e-6).all()
    assert distance(box, found, targets).mean() < distance(box, x, targets).mean()
    again = ATTACKS[name](BlackBox(box, 1000), x, targets, RULE, students=[student], start=found)
    assert (distance(box, again, targets) <= distance(box, found, targets) + 1e-6).all(), (
        'a stage never loses what the one before gained')


@pytest.mark.parametrize('name,most', [('fgvm', 12), ('ours', 12), ('baseline', 2)])
def test_queries(case, name, most):
    x, targets, box, student = case
    asked = []

    def counting(o):
        asked.append(len(o))
        return box(o)
    ATTACKS[name](counting, x, targets, RULE, students=[student])
    assert sum(asked) <= most*len(x)
    assert name == 'fgvm' or sum(asked) == most*len(x)


@pytest.mark.parametrize('name', ['fgvm', 'ours'])
@pytest.mark.parametrize('limit', [6, 7, 20])
def test_budget_ends_in_the_middle(case, name, limit):
    x, targets, box, student = case
    oracle = BlackBox(box, limit)
    found = ATTACKS[name](oracle, x, targets, RULE, students=[student])
    assert oracle.used <= limit
    assert allows_saved(x, found, RULE).all()
    assert (distance(box, found, targets) <= distance(box, x, targets) + 1e-6).all()


@pytest.mark.parametrize('name', ATTACKS)
def test_a_box_that_fails_on_some_images(case, name):
    x, targets, box, student = case

    def shaky(o):
        d = box(o).detach().clone()
        d[::2] = float('nan')
        return d
    found = ATTACKS[name](shaky, x, targets, RULE, students=[student])
    assert found.isfinite().all()
    assert allows_saved(x, found, RULE).all()


@pytest.mark.parametrize('name', ATTACKS)
def test_what_must_not_succeed(case, name):
    x, targets, box, student = case
    constant = lambda o: torch.ones(len(o), 6)
    assert torch.equal(ATTACKS[name](constant, x, targets, RULE, students=[student]), x)
    assert torch.equal(ATTACKS[name](box, x, targets, SSIM(1.), students=[student]), x)


@pytest.mark.parametrize('change,words', [
    (lambda a: a | dict(x=a['x']*.999), 'pixels k/255'),
    (lambda a: a | dict(x=2*a['x']), r'pixels in \[0, 1\]'),
    (lambda a: a | dict(targets=a['targets'][:2]), r'`targets` must be descriptors \(N,T,D\)'),
    (lambda a: a | dict(targets=a['targets'][:, 0]), r'`targets` must be descriptors'),
    (lambda a: a | dict(targets=a['targets']*torch.tensor([1.]*5 + [float('nan')])),
     '`targets` must be finite'),
    (lambda a: a | dict(students=[]), '`students` must hold'),
    (lambda a: a | dict(students=[Linear().train()]), 'evaluation mode'),
    (lambda a: a | dict(start=1-a['x']), '`start` must be images'),
    (lambda a: a | dict(start=a['x'][:2]), '`start` must be images'),
    (lambda a: a | dict(oracle=lambda o: torch.ones(len(o), 4)), '`oracle` must answer')])
@pytest.mark.parametrize('name', ATTACKS)
def test_bad_input(case, name, change, words):
    x, targets, box, student = case
    args = change(dict(oracle=box, x=x, targets=targets, students=[student], start=None))
    with pytest.raises((ValueError, TypeError), match=words):
        ATTACKS[name](args['oracle'], args['x'], args['targets'], RULE,
                      students=args['students'], start=args['start'])


@pytest.mark.parametrize('bad', [dict(queries=1), dict(queries=9.), dict(inner=0), dict(decay=1),
                                 dict(decay=float('nan')), dict(refresh=-1),
                                 dict(differences=-1), dict(differences=float('nan')),
                                 dict(length=0), dict(length=2), dict(length=float('nan'))])
def test_bad_plans(bad):
    with pytest.raises((ValueError, TypeError), match='got'):
        Plan(**bad)


def test_length_follows_the_box(case, monkeypatch):
    x, targets, box, student = case
    lengths = []
    descend = D._descend
    monkeypatch.setattr(D, '_descend', lambda *a: lengths.append(a[-1].flatten()) or descend(*a))
    # kept, left out, kept: distances to a target at zero
    answers = iter([1., .5, 2., .4])
    attack_descriptor(lambda o: torch.full((len(o), 6), next(answers)), x, 0*targets, RULE,
                      students=[student], plan=Plan(queries=4, length=.2, refresh=0))
    assert np.allclose(torch.stack(lengths), [[.2]*6, [.24]*6, [.204]*6])
