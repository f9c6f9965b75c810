"""The audit: its bound holds as often as it says, counted over every case there can be."""
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom
from torch import nn

from robustnb.attacks.gradient import pgd
from robustnb.attacks.score_based import random_search, square
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.standard import autoattack
from robustnb.attacks.threat_models import L2, Linf
from robustnb.core import make_generator
from robustnb.evaluation.auditing import audit, Audit, most_still_to_fall


def slow_bound(survivors, sampled, fallen, confidence):
    "Every total in turn, by the distribution of scipy"
    return max(total for total in range(fallen, survivors-(sampled-fallen)+1)
               if hypergeom.cdf(fallen, survivors, total, sampled) > 1-confidence)


def coverage(survivors, sampled, bounds):
    "How often these bounds hold, for each number that would fall: over all samples that can be"
    totals = np.arange(survivors+1)[:, None]
    chance = hypergeom.pmf(np.arange(sampled+1), survivors, totals, sampled)
    return (chance*(np.array(bounds) >= totals)).sum(1)


def all_bounds(survivors, sampled, confidence=.95):
    "The bound for each number that may have fallen"
    return [most_still_to_fall(survivors, sampled, k, confidence) for k in range(sampled+1)]


@pytest.mark.parametrize('survivors, sampled', ((1, 1), (5, 2), (17, 6), (60, 20)))
@pytest.mark.parametrize('confidence', (.5, .95, .99))
def test_the_bound_is_that_of_the_distribution(survivors, sampled, confidence):
    for fallen in range(sampled+1):
        assert most_still_to_fall(survivors, sampled, fallen, confidence) == slow_bound(
            survivors, sampled, fallen, confidence)


@pytest.mark.parametrize('survivors, sampled, least', (
    (50, 20, .9535), (314, 50, .9501), (314, 100, .9500), (7, 3, .95), (40, 1, .95)))
def test_coverage_is_at_least_the_confidence_for_every_total(survivors, sampled, least):
    bounds = all_bounds(survivors, sampled)
    found = coverage(survivors, sampled, bounds)
    assert found.min() >= .95
    assert least == .95 or found.min() == pytest.approx(least, abs=1e-4), 'real.md'
    assert all(a <= b for a, b in zip(bounds, bounds[1:]))
    tighter = coverage(survivors, sampled, [o-1 for o in bounds])
    assert tighter.min() < .95, 'one image less would not hold'


def test_coverage_counted_over_all_samples_by_hand():
    for survivors, sampled in ((6, 2), (7, 4)):
        bounds = all_bounds(survivors, sampled)
        computed = coverage(survivors, sampled, bounds)
        for total in range(survivors+1):
            held = [bounds[sum(i < total for i in drawn)] >= total
                    for drawn in itertools.combinations(range(survivors), sampled)]
            assert sum(held)/len(held) >= .95
            assert sum(held)/len(held) == pytest.approx(computed[total])


def test_bounds_of_the_paper_in_points():
    points = lambda total, n, s, k=0: round(100*most_still_to_fall(s, n, k)/total, 1)
    assert [points(1000, 50, 314, k) for k in (0, 1, 2)] == [1.6, 2.6, 3.5]
    assert [points(1000, 100, 314, k) for k in (0, 1, 2)] == [.7, 1.2, 1.7]
    assert [points(10_000, n, 3140) for n in (50, 100, 300)] == [1.8, .9, .3]
    assert most_still_to_fall(100_000, 1000, 3) < 1000, 'numbers that no float could hold'


def test_figures_of_an_audit_by_hand():
    "Four of forty fell: eight of the eighty survivors are likely to, and the bound is on all of them"
    found = Audit(100, 80, tuple(range(40)), (3, 5, 7, 9), .9)
    most = slow_bound(80, 40, 4, .9)
    assert (found.robust_accuracy, found.best_guess, found.lower) == (.8, .72, (80-most)/100)
    assert str(found) == (f'80.0 %, likely 72.0 %, not below {80-most}.0 % '
                          '(90 %, 40 of 80 survivors attacked again, 4 fell)')
    assert Audit(100, 0, (), (), .95).best_guess == 0


def test_who_asks_all_knows_and_who_asks_none_does_not():
    for fallen in range(8):
        assert most_still_to_fall(7, 7, fallen) == fallen
    assert most_still_to_fall(7, 0, 0) == 7
    assert most_still_to_fall(0, 0, 0) == 0


@pytest.mark.parametrize('counts, error', (
    ((5, 6, 0), ValueError), ((5, 3, 4), ValueError), ((5, 3, -1), ValueError),
    ((5., 3, 1), TypeError), ((5, True, 1), TypeError), ((5, 3, 1, 1), ValueError),
    ((5, 3, 1, 0.), ValueError), ((5, 3, 1, float('nan')), ValueError)))
def test_wrong_counts(counts, error):
    with pytest.raises(error, match='`fallen`|`confidence`|whole numbers'):
        most_still_to_fall(*counts)


class Brightness(nn.Module):
    "Right as long as the mean of the image is below .5"
    def __init__(self, draws=0.):
        super().__init__()
        self.draws = draws
    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        noise = self.draws*torch.randn(len(x), 1)
        return torch.cat([.5-mean+noise, mean-.5, mean-1, mean-1, mean-1], 1)


def weak_and_strong(x, threat):
    "Results of an attack that finds nothing, and the largest change there is"
    return x.clone(), partial(lambda model, x, y, threat, generator: (x+threat.eps).clamp(0, 1))


def images(means, side=2):
    return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, side, side).contiguous()


def test_the_bound_holds_where_everything_is_known():
    "500 sets of 120 images; how many fall to the full attack is drawn first"
    threat = Linf(.1)
    generator = make_generator(0)
    held = []
    for _ in range(500):
        falls = torch.rand(120, generator=generator) < .4*torch.rand((), generator=generator)
        means = torch.where(falls, .45, .2) + .02*torch.rand(120, generator=generator)
        x = images(means.tolist())
        weak, strong = weak_and_strong(x, threat)
        found = audit(Brightness().eval(), x, torch.zeros(120).long(), weak, threat, 30, attack=strong)
        assert (found.images, found.survivors, len(found.sampled)) == (120, 120, 30)
        assert set(found.fallen) == {i for i in found.sampled if falls[i]}
        held.append(found.lower <= 1 - falls.float().mean().item() + 1e-6)
    assert sum(held) >= .93*500


def test_each_survivor_is_drawn_equally_often():
    threat = Linf(.1)
    generator = make_generator(1)
    seen = torch.zeros(20)
    for _ in range(400):
        x = images((.4*torch.rand(20, generator=generator)).tolist())
        weak, strong = weak_and_strong(x, threat)
        found = audit(Brightness().eval(), x, torch.zeros(20).long(), weak, threat, 5, attack=strong)
        assert len(set(found.sampled)) == 5
        seen[list(found.sampled)] += 1
    assert (seen/400-.25).abs().max() < 5*(.25*.75/400)**.5


def test_only_survivors_are_drawn_and_positions_are_those_of_x():
    x = images([.45, .1, .6, .45, .1, .3])       # falls, stands, wrong, fallen already, stands, stands
    y = torch.zeros(6).long()
    threat = Linf(.1)
    weak, strong = weak_and_strong(x, threat)
    weak[3] += .1
    weak[2] = .5                                 # clean wrong, attacked right: no survivor
    found = audit(Brightness().eval(), x, y, weak, threat, attack=strong)
    assert (found.survivors, found.sampled, found.fallen) == (4, (0, 1, 4, 5), (0,))
    assert found.robust_accuracy == 4/6
    assert found.best_guess == found.lower == 3/6
    assert str(found) == '66.7 %, 50.0 % under the full evaluation (all 4 survivors attacked again, 1 fell)'
    part = audit(Brightness().eval(), x, y, weak, threat, 2, attack=strong)
    assert len(part.sampled) == 2
    assert part.lower < found.lower


def test_nothing_left_to_audit():
    x = images([.6, .7])
    found = audit(Brightness().eval(), x, torch.zeros(2).long(), x, Linf(.1))
    assert (found.survivors, found.sampled, found.robust_accuracy, found.lower) == (0, (), 0, 0)


def test_the_published_evaluation_is_the_one_that_is_run(monkeypatch):
    from robustnb.evaluation import auditing
    asked = []
    def counting(model, x, y, threat, generator):
        asked.append(len(x))
        return autoattack(model, x, y, threat, generator)
    monkeypatch.setattr(auditing, 'autoattack', counting)
    x = images([.45, .48, .6, .45])
    found = audit(Brightness().eval(), x, torch.zeros(4).long(), x, L2(.4), 2)
    assert asked == [2]
    assert len(found.fallen) == 2


def test_falling_is_a_property_of_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    x = torch.rand(30, 3, 4, 4)
    y = model(x).argmax(1)
    few = partial(square, queries=40)
    together = audit(model, x, y, x, Linf(.1), attack=few)
    assert 0 < len(together.fallen) < 30
    for i in range(6):
        alone = audit(model, x[i:i+1], y[i:i+1], x[i:i+1], Linf(.1), attack=few)
        assert bool(alone.fallen) == (i in together.fallen)
    assert len(audit(model, x, y, x, Linf(.1), 7, attack=few).sampled) == 7


def test_other_threats_take_an_attack_of_their_own():
    x = torch.rand(6, 3, 8, 8, generator=make_generator(0))*.9
    y = Brightness()(x).argmax(1)
    with pytest.raises(TypeError, match='Use `cascade`'):
        audit(Brightness().eval(), x, y, x, SSIM(.9))
    some = audit(Brightness().eval(), x, y, x, SSIM(.9), attack=partial(random_search, tries=3))
    assert some.survivors == 6


def test_wrong_uses():
    x = images([.45, .3, .1])
    y = torch.zeros(3).long()
    threat = Linf(.1)
    weak, strong = weak_and_strong(x, threat)
    leaving = lambda model, x, y, threat, generator: (x+.2).clamp(0, 1)
    for given, error, words in (
            (dict(x_adv=x[:2]), ValueError, 'one attacked image for each'),
            (dict(x_adv=x+.2), ValueError, 'must stay inside .*3 of 3'),
            (dict(x_adv=x*255), ValueError, '`x_adv` must hold pixels'),
            (dict(x_adv=None), TypeError, '`x_adv` must be a torch tensor'),
            (dict(threat=.1), TypeError, '`threat` must be a threat model'),
            (dict(n=0), ValueError, '`n` must be a whole number, at least 1'),
            (dict(confidence=95), ValueError, '`confidence` must be between 0 and 1'),
            (dict(attack=leaving), ValueError, "attack 'attack' left its threat model"),
            (dict(y=y[:2]), ValueError, 'one label per image'),
            (dict(model=Brightness(.1).eval()), ValueError, 'answer the same when it is asked twice'),
            (dict(model=Brightness()), ValueError, 'Call `model.eval')):
        with pytest.raises(error, match=words):
            audit(**dict(model=Brightness().eval(), x=x, y=y, x_adv=weak, threat=threat,
                         attack=strong) | given)
    found = audit(Brightness().eval(), x, y, pgd(Brightness().eval(), x, y, threat), threat, attack=strong)
    assert found.survivors == 2


class Same(nn.Module):
    "All logits are equal"
    def forward(self, x): return 0*x.flatten(1)[:, :5]


def test_a_tie_is_no_survivor_unless_it_is_the_answer():
    x = torch.rand(20, 3, 4, 4, generator=make_generator(0))
    found = audit(Same().eval(), x, torch.arange(20) % 5, x, Linf(8/255), attack=pgd)
    assert found.robust_accuracy == .2
