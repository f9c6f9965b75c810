import pytest, torch

from robustnb.core import make_generator
from robustnb.transfer.certainty import expected_loss, standardized
from robustnb.transfer.crops import foreseen_leads, leads
from robustnb.transfer.noise import clear_answers, foreseen_answers, rounding_noise


def answers(n=80, k=6, seed=0):
    return torch.randn(n, k, generator=make_generator(seed, 'a'), dtype=torch.float64)


def test_the_parts_add_up():
    logits = answers()
    copied = .8*logits + .4*answers(seed=1) + torch.arange(6)
    noise = rounding_noise(logits, copied)
    l = standardized(logits)
    ranked = (noise.by_rank + noise.remainder).gather(1, l.argsort(1, descending=True).argsort(1))
    centred = copied - copied.mean(1, keepdim=True)
    std = (logits - logits.mean(1, keepdim=True)).std(correction=0)
    assert torch.allclose(noise.gain*l + noise.shift + ranked, centred/std)
    assert noise.remainder.mean(0).abs().max() < 1e-12


def test_units_do_not_matter():
    logits = answers()
    copied = logits + .3*answers(seed=1)
    a = rounding_noise(logits, copied)
    b = rounding_noise(20*logits + 3, 20*copied - 5)
    assert a.gain == pytest.approx(b.gain) and torch.allclose(a.remainder, b.remainder)


def test_the_favourite_carries_its_own_noise():
    "A copy that always weakens the favourite, of crops of class 0, weakens it in any class"
    crops = answers()
    crops[:, 0] += 3
    weak = crops.clone()
    weak[:, 0] -= 2
    natural = torch.cat([crops, answers(seed=2)])
    copied = torch.cat([weak, answers(seed=2)])
    l, q = foreseen_answers((natural, copied), (natural, copied))
    # the shift of class 0 is one part, and the favourite of every image loses too
    other = l.argmax(1) != 0
    best = l.argmax(1, keepdim=True)
    lost = (l - q).gather(1, best)[:, 0]
    mean = (l - q).mean(1)
    assert (lost - mean)[other].mean() > .05


def test_clear_answers_have_the_foreseen_leads_and_keep_their_classes():
    logits = answers(200, 10)
    made = clear_answers(logits, 200)
    assert torch.allclose(leads(made).sort().values, foreseen_leads(logits), atol=.02)
    classes = lambda o: o.argmax(1).bincount(minlength=10)
    assert torch.equal(classes(made), classes(logits))


def test_the_same_seed_the_same_answers():
    pair = answers(), answers() + .5*answers(seed=1)
    a, b, c = (foreseen_answers(pair, pair, 100, s) for s in (0, 0, 1))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])


def test_systematic_parts_are_the_mean_of_both():
    logits = answers(400)
    shifted = lambda d: logits + d*torch.eye(6)[2]
    both = foreseen_answers((logits, shifted(-3.)), (logits, shifted(3.)))
    one = foreseen_answers((logits, shifted(-3.)), (logits, shifted(-3.)))
    assert expected_loss(*both)[0] < .02 < expected_loss(*one)[0]


def test_shapes_are_compared():
    with pytest.raises(ValueError, match=r'shape of `logits`, \(80, 6\); got \(80, 5\)'):
        rounding_noise(answers(), answers(k=5))
