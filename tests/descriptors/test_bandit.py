"The bandit: budget, rule, arms that see the gradient and arms that do not, answers that fail"
import math

import pytest
import torch
from torch import nn

from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.threat_models import L2
from robustnb.core import image_generators, make_generator, round_to_8bit
from robustnb.descriptors import bandit
from robustnb.descriptors.bandit import Bandit, bandit_descriptor, gain_share, smoothed_gradient
from robustnb.descriptors.blackbox import BlackBox, descriptor_distance
from robustnb.descriptors.query_attacks import square_descriptor


class Linear(nn.Module):
    "Descriptors that are linear in the image: the gradient is the same everywhere"
    def __init__(self, dim=6, side=24, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(dim, 3, 6, 6, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=(side, side), mode='bilinear')
        self.register_buffer('weight', smooth.flatten(1)/side)
    def forward(self, x): return x.flatten(1) @ self.weight.T


box = Linear().eval()
x = round_to_8bit(torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1)))
others = round_to_8bit(torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(2)))
targets = box(others).view(3, 2, 6)
rule = SSIM(.9)


def far(images, of=box): return descriptor_distance(of(images), targets)


def attack(queries=20, students=(), oracle=None, **more):
    oracle = oracle or BlackBox(box, 3*queries)
    return bandit_descriptor(oracle, x, targets, rule, students=students,
                             plan=Bandit(queries, **more)), oracle


@pytest.mark.parametrize('students', [(), (box,), (Linear(seed=5).eval(),), (Linear(seed=5).eval(), box)])
def test_budget_rule_and_gain(students):
    got, oracle = attack(students=students)
    assert oracle.used <= 60
    assert torch.equal(got, round_to_8bit(got)) and rule.allows(x, got).all()
    assert (far(got) <= far(x)).all() and (far(got) < far(x)).any()


def test_a_student_that_is_the_box_beats_all():
    blind = far(attack()[0]).mean()
    wrong = far(attack(students=[Linear(seed=5).eval()])[0]).mean()
    right = far(attack(students=[box])[0]).mean()
    both = far(attack(students=[Linear(seed=5).eval(), box])[0]).mean()
    assert right < blind and right < wrong and both < blind
    assert (far(x).mean()-right) > 1.5*(far(x).mean()-blind)


def test_without_students_it_is_square_question_for_question():
    for seed in (0, 3):
        asked, other = BlackBox(box, 60), BlackBox(box, 60)
        got = bandit_descriptor(asked, x, targets, rule, make_generator(seed), plan=Bandit(20))
        square = square_descriptor(other, x, targets, rule, make_generator(seed), queries=20)
        assert torch.equal(got, square) and asked.used == other.used


def test_dodging_is_the_other_way():
    got, _ = attack(students=[box], dodge=True)
    assert (far(got) > far(x)).all() and rule.allows(x, got).all()


def test_same_seed_same_images():
    one, two = (attack(students=[box], oracle=BlackBox(box, 60))[0] for _ in range(2))
    assert torch.equal(one, two)
    other = bandit_descriptor(BlackBox(box, 60), x, targets, rule, make_generator(9), students=[box],
                              plan=Bandit(20))
    assert not torch.equal(one, other)


def test_a_box_that_fails():
    "No answer about one image at all; none about others now and then"
    calls = []
    def says(images):
        d = box(images)
        for k, image in enumerate(images):
            calls.append(1)
            if torch.equal(image, x[1]) or not len(calls) % 7:
                d[k] = torch.nan
        return d
    got = bandit_descriptor(says, x, targets, rule, students=[box], plan=Bandit(20))
    assert (far(got) <= far(x) + 1e-6).all()
    silent = lambda o: torch.full((len(o), 6), torch.nan)
    nothing = bandit_descriptor(silent, x, targets, rule, plan=Bandit(5))
    assert torch.equal(nothing, x)


def test_a_budget_that_ends():
    oracle = BlackBox(box, 10)
    got, _ = attack(40, [box], oracle)
    assert oracle.used == 10 and (far(got) <= far(x)).all()


def test_start_and_another_threat_model():
    threat = L2(.5)
    start, _ = attack(students=[box])
    got = bandit_descriptor(BlackBox(box, 60), x, targets, threat, start=start, students=[box],
                            plan=Bandit(20))
    assert threat.allows(x, got).all()
    assert far(got).mean() < far(x).mean()


def test_memory_finds_the_gradient_of_a_linear_box():
    "After as many steps as numbers in a space of few dimensions, by regression alone"
    basis = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(3)).sign()
    size = torch.randint(-3, 4, (40, 8), generator=torch.Generator().manual_seed(4)).float()
    steps = size @ basis.flatten(1)/255
    memory = bandit._Memory(x[:1], lambda d, i: d/d.norm())
    assert not memory.ready(3) and memory.ready(30)
    before = x[:1].expand(40, -1, -1, -1)
    after = before + steps.view_as(before)
    memory.learn(0, after, box(after), before, box(before))
    direction = torch.randn(6, generator=torch.Generator().manual_seed(5))
    found = memory._gradient(0, direction)
    true = direction/direction.norm() @ box.weight
    true = steps.T @ torch.linalg.lstsq(steps.T, true[:, None], driver='gelsd').solution[:, 0]
    assert torch.cosine_similarity(found, true, dim=0) > .95


@pytest.mark.parametrize('dodge', [False, True])
def test_away_is_the_slope_of_the_goal(dodge):
    goal = bandit._Goal(targets, dodge)
    d = box(x)[1].clone().requires_grad_(True)
    slope, = torch.autograd.grad(goal.loss(d[None], 1).sum(), d)
    assert torch.allclose(goal.away(d.detach(), 1), slope, atol=1e-6)


def test_a_square_that_failed_comes_back_with_the_other_sign():
    arm = bandit._Squares(x, 20, image_generators(make_generator(0), x))
    rows = torch.arange(3)
    propose = lambda: (arm.propose(rows, x, x, None, rule, 5), arm.pattern.clone())[1]
    first = propose()
    arm.hear(rows, torch.tensor([False, False, True]))
    second = propose()
    assert torch.equal(second[:2], -first[:2]) and not torch.equal(second[2], -first[2])
    arm.hear(rows, torch.tensor([False, False, False]))
    third = propose()
    assert not torch.equal(third[0].abs(), first[0].abs()) and torch.equal(third[2], -second[2])


def test_students_are_left_alone():
    student = Linear(seed=5).eval()
    kept = student.weight.clone()
    attack(students=[student])
    assert torch.equal(student.weight, kept)


class Scholar(nn.Module):
    "Counts its lessons"
    def __init__(self, log, owner=None):
        super().__init__()
        self.log, self.owner = log, owner
    def fork(self): return Scholar(self.log, object())
    def forward(self, images): return box(images)
    def learn(self, asked, answers, before, said):
        assert torch.allclose(answers, box(asked)) and torch.allclose(said, box(before))
        self.log.append((id(self), len(asked)))


def test_each_image_teaches_its_own_student():
    log = []
    attack(13, [Scholar(log).eval()], learn_every=4)
    assert len(log) == 3*3 and {n for _, n in log} == {4}
    assert len({who for who, _ in log}) == 3


def test_blur_keeps_the_sum_and_is_a_gaussian():
    spot = torch.zeros(1, 2, 41, 41)
    spot[:, 0, 20, 20] = 1
    soft = bandit._blurred(spot, 2.)
    assert math.isclose(soft.sum(), 1, rel_tol=1e-5) and soft[0, 1].abs().max() == 0
    assert torch.allclose(soft[0, 0, 20, 23]/soft[0, 0, 20, 20], torch.tensor(math.exp(-9/8)), rtol=1e-4)


def test_smoothed_gradient_of_a_linear_loss():
    "Without blur, the mean over many views has the sum of the plain gradient, less what left the image"
    flat = lambda images: images.mean((1, 2, 3))[:, None]
    grad = smoothed_gradient(flat, x[:1], lambda d: d[:, 0], make_generator(0), views=20, blur=0)
    assert math.isclose(grad.sum(), 1, rel_tol=.05)


def test_views_are_turned_moved_scaled_mirrored_and_noisy():
    "A spot twelve pixels to the right of the middle: up to 8 degrees, 4 % of the side, 8 % nearer or farther"
    image = torch.zeros(1, 1, 41, 41)
    image[..., 19:22, 31:34] = 1
    seen = []
    def student(view):
        seen.append(view.detach()[0, 0])
        return view.flatten(1)
    smoothed_gradient(student, image, lambda d: d.sum(1), make_generator(0), views=150)
    places = torch.stack([(o > .4).nonzero().float().mean(0)-20 for o in seen])
    down, right = places.abs().T
    assert 2.2 < down.max() < 12*1.08*math.sin(math.radians(8)) + .04*41 + .3
    assert 9.3-.3 < right.min() < 11 and 13 < right.max() < 14.6+.3
    assert 50 < (places[:, 1] < 0).sum() < 100
    noise = torch.stack([o[:, 18:23] for o in seen])
    assert .047 < noise.std() < .053 and noise.mean().abs() < .001


def test_gain_share_under_l2_is_the_cosine_of_the_gradients():
    student = Linear(seed=5).eval()
    def gradient(net):
        image = x.clone().requires_grad_(True)
        return torch.autograd.grad(far(image, net).sum(), image)[0].flatten(1)
    cosine = torch.cosine_similarity(gradient(student), gradient(box), dim=1)
    assert torch.allclose(gain_share(student, box, x, targets, L2(.5)), cosine, atol=1e-5)
    assert torch.allclose(gain_share(box, box, x, targets, rule), torch.ones(3), atol=1e-5)


def test_gains_by_hand():
    """Mean gains that fade by .93 with each question to an arm, of .03 each before the first; three parts an
    image's own and one that of all; and a little for an arm that was hardly asked"""
    gains = bandit._Gains(2, 2)
    heard = [([0, 1], [.5, .1]), ([0, 0], [.2, .0]), ([1, 0], [.3, .4])]
    for chosen, gained in heard:
        gains.hear(torch.tensor(chosen), torch.tensor(gained))
    gain = {(arm, i): .03 for arm in (0, 1) for i in (0, 1)}
    count = dict.fromkeys(gain, 1.)
    for chosen, gained in heard:
        for i, (arm, new) in enumerate(zip(chosen, gained)):
            gain[arm, i] = .93*gain[arm, i] + new
            count[arm, i] = .93*count[arm, i] + 1
    assert gains.gain.flatten().tolist() == pytest.approx(list(gain.values()))
    assert gains.count.flatten().tolist() == pytest.approx(list(count.values()))
    for first in (.1, .16, .3, .5):
        gains.gain = torch.tensor([[first, .5], [.2, .2]])
        gains.count = torch.tensor([[1., 2.], [1., 2.]])
        mean = lambda a, i: (3*gains.gain[a, i] + gains.gain[a].sum())/(3*gains.count[a, i] + 3)
        best = [int(mean(1, i) > mean(0, i)) for i in (0, 1)]
        assert gains.choose(0, torch.tensor([True, True])).tolist() == best
    gains.gain[:], gains.count[:] = .1, 1.
    gains.gain[1] -= .0005
    gains.count[1] -= .1
    assert (gains.choose(1, torch.tensor([True, True])) == 1).all(), 'its mean is larger'
    gains.gain[1] = .1*.9 - .0001
    assert (gains.choose(1, torch.tensor([True, True])) == 0).all()
    # .002*sqrt(log 100)*(1/sqrt(.9) - 1) = .00023, of which the mean lacks .00011
    assert (gains.choose(99, torch.tensor([True, True])) == 1).all()
    assert (gains.choose(99, torch.tensor([True, False])) == 0).all()


def test_gains_ask_the_best():
    gains = bandit._Gains(2, 3)
    seen = torch.zeros(2)
    for at in range(1, 100):
        chosen = gains.choose(at, torch.tensor([True, True]))
        gains.hear(chosen, torch.tensor([0, .01])[chosen])
        seen += torch.bincount(chosen, minlength=2)
    assert seen[1] > 5*seen[0] > 0


@pytest.mark.parametrize('plan', [dict(queries=1), dict(queries=9.), dict(learn_every=0)])
def test_refusals(plan):
    with pytest.raises((ValueError, TypeError), match='must be a whole number, at least'):
        Bandit(**plan)
    with pytest.raises(ValueError, match='targets'):
        bandit_descriptor(box, x, targets[:2], rule)
    own = image_generators(None, x)
    assert len(own) == 3


def test_a_student_that_trains_is_refused():
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        attack(students=[nn.Sequential(nn.BatchNorm2d(3), box)])
