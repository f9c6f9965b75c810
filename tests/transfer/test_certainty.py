import pytest, torch
from hypothesis import given, settings, strategies as st

from robustnb.core import make_generator
from robustnb.transfer.certainty import (
    expected_class_losses, expected_loss, foreseen_accuracy, granted, known_sharpness, shifted, standardized)


def answers(n=40, k=5, seed=0):
    return torch.randn(n, k, generator=make_generator(seed, 'a'), dtype=torch.float64)


def by_hand(logits, copied, s):
    "The law with loops"
    rows = [[v - sum(r)/len(r) for v in r] for r in logits.tolist()]
    flat = [v for r in rows for v in r]
    std = (sum(v*v for v in flat)/len(flat) - (sum(flat)/len(flat))**2)**.5
    below = above = 0.
    for r, q in zip(rows, copied.tolist()):
        e = [2.718281828459045**(s*v/std) for v in r]
        p = [o/sum(e) for o in e]
        below += max(p)
        above += p[q.index(max(q))]
    return 1 - above/below


@pytest.mark.parametrize('given, s', (((.5,), .5), ((), 3.6), ((9.,), 9.)))
def test_the_law_with_loops(given, s):
    logits = answers()
    copied = logits + answers(seed=1)
    assert expected_loss(logits, copied, *given)[0] == pytest.approx(by_hand(logits, copied, s), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(.01, 100), st.floats(-5, 5))
def test_units_of_the_logits_do_not_matter(factor, shift):
    logits = answers()
    copied = logits + answers(seed=1)
    assert expected_loss(factor*logits + shift, 3*copied - 1)[0] == pytest.approx(
        expected_loss(logits, copied)[0], abs=1e-9)


def test_never_below_zero_and_nothing_lost_by_itself():
    logits = answers()
    assert expected_loss(logits, logits) == (0., 0.)
    for seed in range(5):
        assert expected_loss(logits, answers(seed=seed+1))[0] > 0


def test_a_clear_answer_costs_more_than_a_hesitant_one():
    logits = torch.tensor([[4., 0, 0], [1., .9, 0], [0., 4, 0], [0., 0, 4]])
    flipped = lambda i: logits.index_copy(0, torch.tensor([i]), logits[[i]][:, [1, 0, 2]])
    assert expected_loss(logits, flipped(1))[0] < expected_loss(logits, flipped(0))[0]


def test_the_known_accuracy_is_the_mean_certainty():
    logits = answers(300, 10)
    for accuracy in (.2, .6, .95):
        p = granted(logits, known_sharpness(logits, accuracy))
        assert p.max(1).values.mean().item() == pytest.approx(accuracy, abs=1e-6)


def test_class_losses_add_up_to_the_loss():
    logits = answers(300, 6)
    copied = logits + answers(300, 6, 1)
    p = granted(logits)
    own = logits.argmax(1)
    had = torch.stack([p[own == k, k].sum() for k in range(6)])
    found = expected_class_losses(logits, copied)
    assert (had*found).sum().item()/had.sum().item() == pytest.approx(expected_loss(logits, copied)[0])


def test_a_class_that_nobody_is_in_has_no_loss():
    logits = torch.eye(4)[[0, 1, 1, 2]]
    assert expected_class_losses(logits, logits).isnan().tolist() == [False, False, False, True]


def test_the_standard_error_is_the_spread_of_samples():
    g = make_generator(0, 'many')
    logits = 2*torch.randn(30_000, 10, generator=g)
    copied = logits + 2*torch.randn(30_000, 10, generator=g)
    found = [expected_loss(a, b) for a, b in zip(logits.split(50), copied.split(50))]
    losses, errors = torch.tensor(found).T
    assert .8 < errors.mean()/losses.std() < 1.1


@pytest.mark.parametrize('call, words', [
    (lambda: expected_loss(answers(), answers(39)), 'shape of `logits`'),
    (lambda: expected_loss(answers()/0, answers()), '`logits` must be finite; 40 of 40'),
    (lambda: expected_loss(answers(), answers()*torch.inf), '`copied` must be finite'),
    (lambda: expected_loss(answers(k=1), answers(k=1)), 'two classes'),
    (lambda: standardized(torch.zeros(3)), r'got \(3,\)'),
    (lambda: granted(answers(), 0), '`sharpness` must be positive; got 0'),
    (lambda: known_sharpness(answers(), .2), 'above chance, 1/5'),
    (lambda: known_sharpness(answers(), 1.), 'below 1')])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words): call()


def moved_by_hand(x, dy, dx):
    "Each pixel looks for its colour; beyond the border a picture is mirrored about its outermost pixels"
    h, w = x.shape[-2:]
    def inside(k, n): return -k if k < 0 else 2*(n-1)-k if k >= n else k
    rows = torch.tensor([inside(i-dy, h) for i in range(h)])
    columns = torch.tensor([inside(j-dx, w) for j in range(w)])
    return x[:, :, rows][..., columns]


sizes = {(32, 32): (2, 2), (16, 48): (1, 3), (8, 8): (1, 1), (224, 224): (14, 14), (2, 2): (1, 1),
         (1, 40): (0, 2), (28, 28): (2, 2)}


@pytest.mark.parametrize('sides, step', sizes.items())
def test_shifts_by_hand(sides, step):
    x = torch.rand(2, 3, *sides, generator=make_generator(0, 'x'))
    dy, dx = step
    by_hand = [moved_by_hand(x, a*dy, b*dx) for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    for found, known in zip(shifted(x), by_hand, strict=True):
        assert torch.equal(found, known)


def test_accuracy_counted_by_hand():
    logits = torch.eye(4).repeat(5, 1)      # 20 images
    moved = [logits.clone() for _ in range(4)]
    for k in range(3):
        moved[k][k] = -moved[k][k] + torch.eye(4)[(k+1) % 4]
    assert foreseen_accuracy(logits, moved) == pytest.approx(1 - 1.4*3.5/81)


def test_accuracy_stays_between_chance_and_one():
    logits = 30*torch.eye(4)[torch.arange(50) % 4]
    assert .99 < foreseen_accuracy(logits, 4*[logits]) < 1
    low = foreseen_accuracy(logits, 4*[logits.roll(1, 1)])
    assert low == pytest.approx(1.1/4)
    known_sharpness(logits, low)    # can be used


@pytest.mark.parametrize('scale', (.01, .5, 1., 6.))
def test_a_network_is_right_no_more_often_than_it_says(scale):
    logits = scale*torch.randn(200, 4, generator=make_generator(0, 'l'), dtype=torch.float64)
    says = logits.softmax(1).max(1).values.mean()
    least = granted(logits).max(1).values.mean()
    agrees = 1 - 1.4*.5/801
    assert foreseen_accuracy(logits, 4*[logits]) == pytest.approx(min(max(says, least), agrees))
    assert (says > least) == (scale > 2)


def test_shifted_answers_must_be_finite():
    logits = torch.randn(5, 4)
    with pytest.raises(ValueError, match='`moved` must be finite'):
        foreseen_accuracy(logits, [logits*torch.nan])


def test_one_pixel_cannot_be_shifted():
    with pytest.raises(ValueError, match=r'more than one pixel.*got shape \(4, 3, 1, 1\)'):
        shifted(torch.rand(4, 3, 1, 1))


@pytest.mark.parametrize('moved', [[], [torch.randn(1, 4)], [torch.randn(5, 3)], [torch.randn(5, 4), None]])
def test_shifted_answers_must_fit(moved):
    with pytest.raises(ValueError, match=r'`moved` must be .* of the shape of `logits`, \(5, 4\)'):
        foreseen_accuracy(torch.randn(5, 4), moved)


def test_logits_that_are_all_the_same_have_no_sharpness():
    with pytest.raises(ValueError, match='`logits` must tell classes apart'):
        known_sharpness(torch.zeros(10, 5), .5)
