"""Carlini-Wagner under SSIM: closed forms and slow versions, and what the multiplier is for."""
from functools import partial

import pytest
import torch

from helpers_descriptors import distance, Line, pictures, problem, rule, Same, students, teacher, windowed
from robustnb.core import make_generator
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.threat_models import L2
from robustnb.descriptors import carlini_wagner as C
from robustnb.descriptors.carlini_wagner import carlini_wagner_ssim

pytestmark = pytest.mark.usefixtures('one_thread')


def test_random_sizes_belong_to_the_generator():
    x, people, targets = problem()
    attack = partial(carlini_wagner_ssim, students=students, steps=20)
    assert not torch.equal(attack(teacher, x, targets, rule, make_generator(3)),
                           attack(teacher, x, targets, rule, make_generator(4)))
    assert not torch.equal(attack(teacher, x, targets, rule),
                           attack(teacher, x, targets, rule, make_generator(4)))
    assert torch.equal(attack(teacher, x, targets, rule), attack(teacher, x, targets, rule))


def test_a_student_without_a_slope_makes_no_further_query():
    x, people, targets = problem()
    queried = []
    def oracle(o):
        queried.append(len(o))
        return teacher(o)
    assert torch.equal(carlini_wagner_ssim(oracle, x, targets, rule, students=Same().eval()),
                       (x*255).round()/255)
    assert queried == [6]


def test_the_best_of_several_iterates_is_kept():
    x, _, targets = problem()
    seen = []
    def oracle(o):
        seen.append(o.clone())
        return teacher(o)
    out = carlini_wagner_ssim(oracle, x, targets, rule, students=students, steps=20)
    assert len(seen) == 11
    assert all(torch.equal(o, (o*255).round()/255) for o in seen)
    scores = torch.stack([distance(teacher(o), targets) for o in seen])
    assert torch.allclose(distance(teacher(out), targets), scores.amin(0), atol=1e-6)
    assert (scores[1:].std(0) > 0).all()


def test_the_optimiser_begins_at_start():
    x, _, targets = problem()
    start = carlini_wagner_ssim(teacher, x, targets, rule, students=teacher, steps=40)
    seen = []
    def oracle(o):
        seen.append(o.clone())
        return teacher(o)
    carlini_wagner_ssim(oracle, x, targets, rule, start=start, students=students, steps=1)
    assert torch.equal(seen[0], start)
    assert (seen[1]-start).abs().mean() < .5*(start-x).abs().mean()


def test_linear_student_reaches_the_closed_form():
    line = Line(1).eval()
    x = .3 + .4*torch.rand(5, 3, 12, 12, generator=make_generator(0))
    far = torch.full((5, 1, 1), -20.)
    for eps in (.3, 1.):
        fall = (line(x)-line(carlini_wagner_ssim(line, x, far, L2(eps), students=line))).flatten()
        assert (fall > .95*eps*line.w.norm()).all()
        assert (fall < 1.005*eps*line.w.norm() + 1/255).all()
    slow = carlini_wagner_ssim(line, x, far, L2(1.), students=line, steps=3)
    assert ((line(x)-line(slow)).flatten() < .9*line.w.norm()).all()
    near = line(x)[:, None] - .05*line.w.norm()
    assert ((L2(1.).distance(x, carlini_wagner_ssim(line, x, near, L2(1.), students=line)) < .6)
            .all()), 'no more change than the target asks for'


def test_linear_student_reaches_projected_gradient():
    many = Line(6).eval()
    x = pictures(4, 12)
    targets = 2*torch.randn(4, 3, 6, generator=make_generator(5))
    slow = x
    for i in range(200):
        b = slow.clone().requires_grad_()
        loss = sum((many(b)-targets[:, j]).norm(dim=1) for j in range(3)).sum()
        slow = rule.project(
            x, slow - .1*(1-i/200)*rule.steepest(torch.autograd.grad(loss, b)[0], x, slow))
    clean = distance(many(x), targets)
    found = carlini_wagner_ssim(many, x, targets, rule, students=many, steps=200)
    assert (clean-distance(many(slow), targets)).min() > .3
    assert (distance(many(found), targets) < distance(
        many(slow), targets) + .02*(clean-distance(many(slow), targets))).all()
    assert (rule.distance(x, found) > .03).all()


def test_the_multiplier_finds_the_rule(monkeypatch):
    "A penalty without it ends 15 to 35% beyond the rule"
    many = Line(6).eval()
    x = pictures(4, 12)
    targets = 4*torch.randn(4, 3, 6, generator=make_generator(5))
    far = []
    fit = C.fit_8bit
    monkeypatch.setattr(C, 'fit_8bit', lambda x, x_adv, threat: (
        far.append(threat.distance(x, x_adv)/.05), fit(x, x_adv, threat))[1])
    carlini_wagner_ssim(many, x, targets, rule, students=many, steps=200)
    assert ((far[-1]-1).abs() < .03).all()
    assert (far[0] - 1).abs().max() > .05


def test_the_ensemble_counts_every_student():
    x, _, targets = problem()
    one = lambda s: torch.autograd.grad(
        sum((s(b)-targets[:, j]).norm(dim=1) for j in range(2)).sum()/2, b)[0]
    b = x.clone().requires_grad_()
    want = (one(students[0])+one(students[1]))/2
    found = C._slope(students, x, torch.zeros_like(x), targets, rule, torch.zeros(6), 1., None)
    assert torch.allclose(found, want, rtol=1e-3, atol=1e-6)


def test_lagrangian_term():
    c = torch.tensor([-2., -.5, 0., .5])
    free = torch.zeros(4)
    assert torch.equal(C._lagrangian(c, free, 1.), torch.tensor([0, 0, 0, .125]))
    for weight in (.5, 1., 4.):
        m = torch.tensor([.3]*4)
        want = [-.09/(2*weight) if .3+weight*a <= 0 else .3*a + weight*a*a/2 for a in c.tolist()]
        assert torch.allclose(C._lagrangian(c, m, weight), torch.tensor(want), atol=1e-6)
    x, _, targets = problem()
    change = .002*torch.randn(x.shape, generator=make_generator(0))
    free = torch.zeros(6)
    assert (rule.distance(x, (x+change).clamp(0, 1)) < .05).all()
    none = C._slope(students, x, change, targets, SSIM(1e-9), free, 1., None)
    assert torch.equal(C._slope(students, x, change, targets, rule, free, 1., None),
                       none), 'inside the rule it has no slope'
    assert not torch.equal(C._slope(students, x, 20*change, targets, rule, free, 1., None),
                           C._slope(students, x, 20*change, targets, SSIM(1e-9), free, 1., None))
    far = (x + 20*change).clamp(0, 1)
    assert torch.allclose(
        C._excess(rule, x, far), (1-torch.tensor([windowed(a*255, b*255) for a, b in zip(
            x.permute(0, 2, 3, 1).numpy(), far.permute(0, 2, 3, 1).numpy())]).float())/.05 - 1,
        atol=1e-3)
