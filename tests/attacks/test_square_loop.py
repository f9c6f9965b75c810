"Square against a slow loop over one image that uses the same draws, and what its proposals spend."
import pytest
import torch

from robustnb.attacks import score_based as blackbox
from robustnb.attacks.gradient import margin
from robustnb.attacks.score_based import square
from robustnb.core import draw, image_generators, make_generator
from robustnb.attacks.threat_models import L1, L2, Linf
from test_gradient import make_batch, make_net


def sides(queries, p, pixels):
    marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    return lambda at: max(
        1, round((p*pixels/2**len([m for m in marks if at*10_000//queries > m]))**.5))


@pytest.mark.parametrize('queries', (12, 120, 240))
@pytest.mark.parametrize('eps', (.004, .02, .05))
def test_linf_squares_follow_a_slow_loop(eps, queries):
    model = make_net()
    side_at = sides(queries, .8, 64)
    x, y = make_batch(model=model)
    out, fell = square(model, x, y, Linf(eps), make_generator(7), queries=queries), 0
    for i, g in enumerate(image_generators(make_generator(7), x)):
        ask = lambda image: margin(model(image[None]), y[i:i+1]).item()
        clean = x[i]
        signs = draw(torch.rand, [g], 192, like=x)[0]
        best = clean.clone()
        for c in range(3):
            for col in range(8):
                best[c, :, col] = (
                    (clean[c, :, col] + (eps if signs[8*c+col] >= .5 else -eps)).clamp(0, 1))
        height = ask(best)
        for at in range(1, queries-2):
            if at % 100 == 1:
                numbers = draw(torch.rand, [g], 100, 8, like=x)[0]
            if height > 0: break
            u = numbers[(at-1) % 100].tolist()
            side = min(side_at(at), 8)
            new = best.clone()
            top = int(u[0]*(9-side))
            left = int(u[1]*(9-side))
            for c in range(3):
                for row in range(top, top+side):
                    for col in range(left, left+side):
                        new[c, row, col] = min(
                            max(clean[c, row, col].item() + (eps if u[5+c] >= .5 else -eps), 0), 1)
            value = ask(new)
            if value > height:
                best, height = new, value
        fell += height > 0
        assert (out[i] - (best if height > ask(clean) else clean)).abs().max() < 1e-12
    assert eps > .01 or fell < 12


@pytest.mark.parametrize('side', (1, 2, 3, 4, 6, 8))
@pytest.mark.parametrize('threat', (L2(.2), L1(1.5)), ids=repr)
def test_proposals_spend_the_budget_and_touch_two_windows(threat, side):
    x = .4 + .2*torch.rand(20, 3, 8, 8, generator=make_generator(0), dtype=torch.float64)
    best = blackbox._first(threat, x,
                           torch.rand(20, 192, generator=make_generator(1), dtype=torch.float64))
    assert (threat.distance(x, best) - threat.eps).abs().max() < 1e-6
    for k in range(5):
        u = torch.rand(20, 8, generator=make_generator(2, k), dtype=torch.float64)
        new = blackbox._propose(threat, x, best, side, u)
        assert (threat.distance(x, new) - threat.eps).abs().max() < 1e-6
        assert threat.allows(x, new).all()
        assert ((new-best).abs().flatten(1).amax(1) > 1e-6).float().mean() > .5, (
            'two empty windows have nothing to give')
        size = min(max(side + 1 - side % 2, 3), 8)
        outside = torch.ones(20, 1, 8, 8, dtype=torch.bool)
        for i in range(20):
            for a in (0, 2):
                row = int(u[i, a+0]*(9-size))
                col = int(u[i, a+1]*(9-size))
                outside[i, :, row:row+size, col:col+size] = False
        old = (best-x)*outside
        now = (new-x)*outside
        if isinstance(threat, L2):
            share = (old*now).flatten(1).sum(
                1)/(old.flatten(1).norm(dim=1)*now.flatten(1).norm(dim=1)).clamp_min(1e-12)
            alive = old.flatten(1).norm(dim=1) > 1e-9
            assert (share[alive] > 1-1e-9).all(), 'elsewhere the change is scaled at most'
        best = new


@pytest.mark.parametrize('power', (1, 2))
@pytest.mark.parametrize('side', (3, 5, 7))
def test_a_bump_is_two_opposite_halves_of_equal_length(power, side):
    bump = blackbox._bump(side, power, torch.zeros(1, dtype=torch.float64))
    upper = bump[:side//2]
    lower = bump[side//2:]
    length = lambda o: o.abs().pow(power).sum()**(1/power)
    assert bump.shape == (side, side)
    assert (upper > 0).all()
    assert (lower < 0).all()
    assert abs(length(bump)-1) < 1e-6
    assert abs(length(upper)-length(lower)) < 1e-6
