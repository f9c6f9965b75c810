import numpy as np, pytest, torch

from robustnb.core import make_generator
from robustnb.transfer.certainty import expected_class_losses, expected_loss, granted, known_sharpness
from robustnb.transfer.noise import foreseen_answers
from robustnb.transfer.prediction import predict_loss, prediction_interval


def pair(n=300, size=.6, seed=0):
    g = make_generator(seed, 'pair')
    logits = torch.randn(n, 8, generator=g, dtype=torch.float64)
    return logits, logits + size*torch.randn(n, 8, generator=g)


def test_photographs_alone_are_the_law():
    found = predict_loss(pair())
    assert found.loss == expected_loss(*pair())[0]
    assert torch.equal(found.by_class, expected_class_losses(*pair()))
    certain = granted(pair()[0]).max(1).values.mean().item()
    assert (found.lo, found.hi) == prediction_interval(found.loss, 300, accuracy=certain)


def test_crops_alone_are_the_law_on_foreseen_answers():
    found = predict_loss(None, pair(seed=1), pair(seed=2), seed=3)
    assert found.loss == expected_loss(*foreseen_answers(pair(seed=1), pair(seed=2), seed=3))[0]


@pytest.mark.parametrize('size', (.6, 5.))
def test_the_weight_is_that_of_inverse_variances(size):
    "Crops far from the photographs are off by what they are off: their variance over p(1-p) is at least that"
    crops = pair(size=size, seed=1), pair(size=size, seed=2)
    one, other = predict_loss(pair(40)), predict_loss(None, *crops)
    middle = (one.loss + other.loss)/2
    apart = (one.loss - other.loss)**2/(middle*(1-middle))
    assert (apart > .12) == (size == 5), 'the case is worth looking at'
    certain = granted(pair(40)[0]).max(1).values.mean()
    weights = torch.tensor([1/(.2*(1-certain)**2 + 3/40), 1/max(.11, apart)]).double()
    weights /= weights.sum()
    mixed = predict_loss(pair(40), *crops)
    assert mixed.loss == pytest.approx(weights @ torch.tensor([one.loss, other.loss]).double())
    assert torch.allclose(mixed.by_class, weights @ torch.stack([one.by_class, other.by_class]))


def test_intervals_by_hand():
    """Half of the width is .005 and the root of p(1-p) times .2(1-A)^2 + 3/n, .11 of crops, or both in
    parallel"""
    half = lambda *which: [prediction_interval(.3, *which)[1] - .3, .3 - prediction_interval(.3, *which)[0]]
    for which, variance in (((100,), .038), ((100, True), 1/(1/.038 + 1/.11)), ((0, True), .11)):
        assert half(*which) == pytest.approx(2*[.005 + (variance*.21)**.5])
    lo, hi = prediction_interval(.3, 100, accuracy=.4)
    assert hi - lo == pytest.approx(2*(.005 + (.102*.21)**.5))
    assert prediction_interval(.3, 0, True, .4) == prediction_interval(.3, 0, True)
    assert prediction_interval(0., 100) == (-.005, .005)
    assert prediction_interval(.99, 2) == (pytest.approx(.985 - (1.508*.0099)**.5), 1.)


def test_the_known_accuracy_sets_the_sharpness():
    s = known_sharpness(pair()[0], .7)
    found = predict_loss(pair(), accuracy=.7)
    assert found.loss == expected_loss(*pair(), s)[0]
    assert (found.lo, found.hi) == pytest.approx(prediction_interval(found.loss, 300, accuracy=.7))
    assert torch.equal(found.by_class, expected_class_losses(*pair(), s))


def test_intervals_widen_as_images_become_fewer_and_stay_in_range():
    for loss in np.linspace(0, 1, 11):
        widths = [np.diff(prediction_interval(loss, n)).item() for n in (5, 20, 100, 2000)]
        assert widths == sorted(widths, reverse=True)
        for n in (1, 20, 0):
            lo, hi = prediction_interval(loss, n, True)
            assert -.01 < lo <= loss <= hi <= 1


def test_the_interval_holds_what_sampling_does():
    "Labels drawn from the probabilities themselves: only the number of images can be wrong"
    L, Q = pair(20_000, .8)
    labels = granted(L).multinomial(1, generator=make_generator(1, 'labels'))[:, 0]
    right = lambda o: (o.argmax(1) == labels).double().mean()
    true = float(1 - right(Q)/right(L))
    found = [predict_loss((L[i:i+40], Q[i:i+40])) for i in range(0, 12_000, 40)]
    assert .85 < np.mean([o.lo <= true <= o.hi for o in found]) <= 1
    # half of the width would not do
    assert np.mean([abs(o.loss - true) <= (o.hi - o.lo)/4 for o in found]) < .85


@pytest.mark.parametrize('call, words', [
    (lambda: predict_loss(), '`photographs` or both'),
    (lambda: predict_loss(pair(), pair()), 'given together'),
    (lambda: prediction_interval(1.2, 10), r'share in \[0, 1\]; got 1.2'),
    (lambda: prediction_interval(.2, 10, accuracy=90), r'`accuracy` must be a share in \[0, 1\]; got 90'),
    (lambda: prediction_interval(.2, 0), 'at least 1 where no crops')])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words): call()
