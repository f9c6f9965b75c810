import numpy as np, pytest, torch
from scipy.integrate import quad
from scipy.stats import norm

from robustnb.core import make_generator
from robustnb.transfer.certainty import expected_loss, standardized
from robustnb.transfer.crops import foreseen_leads, leads
from robustnb.transfer.noise import clear_answers, flip_chances, foreseen_answers, rounding_noise


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


def test_ranks_lose_the_mean_of_both():
    "On natural crops the favourite loses 2 standard deviations, on moved ones nothing"
    logits = standardized(answers(400))
    weak = logits.scatter_add(1, logits.argmax(1, keepdim=True), torch.full((400, 1), -2.).double())
    lost = {}
    for name, natural, moved in (('both', weak, weak), ('one', weak, logits), ('other', logits, weak)):
        l, q = foreseen_answers((logits, natural), (logits, moved))
        gap = (l - q).gather(1, l.argmax(1, keepdim=True)) - (l - q).mean(1, keepdim=True)
        lost[name] = gap.mean().item()
    assert lost['both'] > .5
    assert lost['one'] == pytest.approx(lost['both']/2, rel=.1)
    assert lost['other'] == pytest.approx(lost['both']/2, rel=.1)


def test_what_is_left_is_that_of_moved_crops():
    logits = answers(400)
    noisy = logits + answers(400, seed=1)
    assert expected_loss(*foreseen_answers((logits, noisy), (logits, logits)))[0] < .02
    assert expected_loss(*foreseen_answers((logits, logits), (logits, noisy)))[0] > .04


def test_shapes_are_compared():
    with pytest.raises(ValueError, match=r'shape of `logits`, \(80, 6\); got \(80, 5\)'):
        rounding_noise(answers(), answers(k=5))


def test_two_classes_flip_as_the_normal_law_says():
    "With two classes and noise of its own the chance is that of one normal variable"
    lead = torch.linspace(.1, 4, 60, dtype=torch.float64)
    known = 2*answers(20_000, 2)
    noise = 1.5*answers(20_000, 2, seed=1)
    noise -= noise.mean(1, keepdim=True)
    asked = torch.stack([lead, 0*lead], 1)
    expected = torch.special.ndtr(-lead/(1.5*2**.5))
    assert torch.allclose(flip_chances(asked, known, known + noise), expected, atol=.02)


def test_chances_by_hand():
    """Few crops: the changes are learnt by least squares with a weight on none (as rows of their own), the
    weight that foretells best each crop from the others; what that misses has a covariance, and the chance
    is an integral over the favourite's noise"""
    n, k = 30, 4
    centred = lambda o: (o - o.mean(1, keepdim=True)).numpy()
    known, copied, new = (centred(answers(n, k, seed)) for seed in range(3))
    std = known.std()
    mixed = known@answers(k, k, 3).numpy()
    a, b, new = known/std, (known + .15*(mixed - mixed.mean(1, keepdims=True)) + .7*copied)/std, new/std
    gain = (a*b).sum()/(a*a).sum()
    shift = (b - gain*a).mean(0)
    rest = b - gain*a - shift

    def learnt(rows, weight):
        return np.linalg.lstsq(np.vstack([a[rows], (weight*n)**.5*np.eye(k)]),
                               np.vstack([rest[rows], np.zeros((k, k))]))[0]
    others = [[j for j in range(n) if j != i] for i in range(n)]
    weights = [*(.1*4**j for j in range(9)), 1e12]
    missed = [np.stack([rest[i] - a[i]@learnt(others[i], w) for i in range(n)]) for w in weights]
    best = min(range(len(weights)), key=lambda j: (missed[j]**2).sum())
    assert 0 < best < len(weights) - 1
    moves = gain*np.eye(k) + learnt([*range(n)], weights[best])
    cov = missed[best].T@missed[best]/n
    def chance(row):
        own, foreseen = row.argmax(), row@moves + shift
        def stays(z):
            "The noise of the favourite is z standard deviations; each other class has what that leaves it"
            product = norm.pdf(z)
            for j in set(range(k)) - {own}:
                part = cov[own, j]/cov[own, own]
                left = foreseen[own] - foreseen[j] + (1 - part)*z*cov[own, own]**.5
                product *= norm.cdf(left/(cov[j, j] - part**2*cov[own, own])**.5)
            return product
        return 1 - quad(stays, -8, 8)[0]
    found = flip_chances(*(torch.from_numpy(o*std) for o in (new[:6], a, b)))
    assert found.numpy() == pytest.approx([chance(o) for o in new[:6]], abs=1e-3)
    assert found.max() > .2


def test_fewer_known_images_than_classes_are_no_worse_than_the_leads():
    "40 answers with 200 classes: a map that fits them all knows nothing of others"
    known, new = answers(40, 200), answers(600, 200, seed=5)
    noise = [.4*answers(len(o), 200, seed=seed) for o, seed in ((known, 6), (new, 7))]
    flips = (new + noise[1]).argmax(1) != new.argmax(1)
    top = new.topk(2, 1).values
    def area(score):
        ranks = score.argsort().argsort().double() + 1
        n = flips.sum()
        return (ranks[flips].sum() - n*(n+1)/2)/(n*(~flips).sum())
    chances = flip_chances(new, known, known + noise[0])
    assert area(chances) > area(top[:, 1] - top[:, 0]) - .01 and area(chances) > .65
    assert abs(chances.mean() - flips.double().mean()) < .1


def test_noise_that_follows_other_classes_is_learnt():
    "A copy that confuses class 0 with class 1 flips images of 0 that are far from any border"
    centred = lambda logits: logits - logits.mean(1, keepdim=True)
    known = centred(answers(2000))
    mixed = known.clone()
    mixed[:, 1] += 2*known[:, 0]
    new = centred(answers(400, seed=3))
    moved = new.clone()
    moved[:, 1] += 2*new[:, 0]
    flips = moved.argmax(1) != new.argmax(1)
    chances = flip_chances(new, known, mixed)
    assert ((chances > .5) == flips).double().mean() > .93
    top = new.topk(2, 1).values
    clear = top[:, 0] - top[:, 1] > 1
    assert chances[clear & flips].mean() > .9 and chances[clear & ~flips].mean() < .1


def test_chances_do_not_depend_on_units_or_on_the_images_asked_with():
    known = answers()
    copied = known + .6*answers(seed=1)
    new = answers(30, seed=2)
    chances = flip_chances(new, known, copied)
    assert 0 < chances.min() and chances.max() < 1
    assert torch.allclose(flip_chances(9*new + 2, 9*known - 1, 9*copied), chances)
    assert torch.allclose(flip_chances(new[:3], known, copied), chances[:3])


def test_flip_chances_refuse_what_does_not_fit():
    known = answers()
    with pytest.raises(ValueError, match='`logits` must have the 6 classes of `known`; got 5'):
        flip_chances(answers(k=5), known, known)
    with pytest.raises(ValueError, match=r'`copied` must have the shape of `known`, \(80, 6\); got \(9, 6\)'):
        flip_chances(known, known, known[:9])
    with pytest.raises(ValueError, match='`known` must be finite'):
        flip_chances(known, known*torch.nan, known)
    with pytest.raises(ValueError, match='`copied` must be answers'):
        flip_chances(known, known, None)


def test_a_class_that_is_raised_leaves_nothing_to_chance():
    known = answers(500)
    new = answers(200, seed=1)
    def raised(logits): return logits + 2*torch.eye(6)[4]
    flips = raised(new).argmax(1) != new.argmax(1)
    chances = flip_chances(new, known, raised(known))
    assert 20 < flips.sum() < 180
    assert chances[flips].min() > .9 and chances[~flips].max() < .1


def test_leads_that_shrink_are_lost_more_often():
    known, new = answers(4000), answers(4000, seed=1)
    noise = .3*answers(4000, seed=2), .3*answers(4000, seed=3)
    found = {}
    for gain in (.3, 1., 3.):
        flips = (gain*new + noise[1]).argmax(1) != new.argmax(1)
        found[gain] = flip_chances(new, known, gain*known + noise[0]).mean() / flips.double().mean()
    assert all(.9 < o < 1.1 for o in found.values()), found
