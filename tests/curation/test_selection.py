"Selection policies by hand, on images whose brightness decides"
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from helpers_curation import is_wrong, nets, pool, probabilities, seeded
from robustnb.core import make_generator
from robustnb.curation import selection as S

mean_probability = (probabilities(pool.images, 0) + probabilities(pool.images, 1))/2
entropy = -(mean_probability*np.log(mean_probability)).sum(1)
wrong = is_wrong(pool.images, pool.y)


def chosen(policy, n=20, rows=None, **options):
    if rows is None:
        rows = pd.DataFrame(dict(image=np.arange(90), success=None))
    return policy(pool.images, pool.labels, rows, n, seeded(), **options)


def test_misclassified_by_any_or_all_networks():
    by_any = chosen(S.misclassified, 90, models=nets)
    by_all = chosen(S.misclassified, 90, models=nets, by=all)
    assert {*by_any} == {*np.flatnonzero(wrong.any(0))}
    assert {*by_all} == {*np.flatnonzero(wrong.all(0))}
    assert (S.is_wrong(nets, pool.images, pool.labels).numpy() == wrong).all()


def test_most_misclassified_by_hand():
    assert (np.diff(wrong.sum(0)[chosen(S.most_misclassified, 90, models=nets)]) <= 0).all()
    assert wrong.sum(0).max() == 2
    assert wrong.sum(0).min() < 2


def test_entropy_orders_the_window():
    for highest in (True, False):
        order = np.argsort(-entropy if highest else entropy, kind='stable')
        first = chosen(S.by_entropy, 15, models=nets, highest=highest)
        later = chosen(S.by_entropy, 15, models=nets, highest=highest, skip=.2)
        assert first.tolist() == order[:15].tolist()
        assert later.tolist() == order[18:33].tolist()


def test_second_highest_by_hand():
    second = np.sort(mean_probability, 1)[:, 1]
    assert np.allclose(second[chosen(S.second_highest, 90, models=nets)], np.sort(second)[::-1])
    first = chosen(S.second_highest, 90, models=nets, wrong_first=True)
    n_wrong = wrong.any(0).sum()
    assert wrong.any(0)[first][:n_wrong].all()
    assert np.allclose(second[first][:n_wrong], np.sort(second[wrong.any(0)])[::-1])


def test_draws_are_random_and_without_repetition():
    a = chosen(S.everything)
    b = S.everything(pool.images, pool.labels, None, 20, make_generator(1))
    assert len({*a}) == 20
    assert {*a} != {*b}
    assert a.tolist() == chosen(S.everything).tolist()
    assert {*chosen(S.everything, 90)} == {*range(90)}


def test_success_is_read_from_the_table():
    rows = pd.DataFrame(dict(image=np.arange(90), success=[True, None, False]*30))
    assert {*chosen(S.succeeded, 90, rows=rows)} == {*range(0, 90, 3)}
    assert len(chosen(S.succeeded, 7, rows=rows)) == 7


def test_equal_scores_come_in_random_order():
    dull = np.zeros((40, 8, 8, 3), np.uint8)
    labels = np.eye(3)[np.ones(40, int)]
    orders = [S.most_misclassified(dull, labels, None, 10, make_generator(s), models=nets).tolist()
              for s in (0, 1)]
    assert orders[0] != orders[1]
    assert len({*orders[0]}) == 10


def test_balanced_gives_each_class_as_many_up_to_one():
    for n, least in ((30, 10), (31, 10), (5, 1)):
        counts = np.bincount(pool.y[chosen(S.balanced(S.everything), n)], minlength=3)
        assert counts.sum() == n
        assert counts.min() == least
        assert counts.max()-counts.min() <= 1
    missing = S.balanced(S.everything)(pool.images[:0], pool.labels[:0], None, 3, seeded())
    assert len(missing) == 0


def test_worst_kinds_by_hand():
    "Seats by Webster's method, found by trying divisors"
    kind = np.array(['a', 'b', 'c'])[np.arange(90)*7 % 3]
    right = np.arange(90) < 20
    labels = np.eye(3)[np.where(right & (kind == 'a') | (kind == 'c') & (np.arange(90) % 2 == 0),
                                probabilities(pool.images).argmax(1), (pool.y+1) % 3)]
    mistakes = probabilities(pool.images).argmax(1) != labels.argmax(1)
    error = pd.Series(mistakes).groupby(kind).mean()
    rows = pd.DataFrame(dict(transform=kind))
    for n in (7, 20, 33):
        at = S.worst_kinds(pool.images, labels, rows, n, seeded(), models=nets[0])
        seats = pd.Series(kind[at]).value_counts().reindex(error.index)
        rounded = np.floor(error.to_numpy()/np.linspace(.005, 1, 20_000)[:, None] + .5)
        expected = rounded[(rounded.sum(1) <= n).argmax()]
        assert expected.sum() == n
        assert seats.tolist() == expected.tolist()
        assert len({*at}) == n
    others = S.worst_kinds(pool.images, labels, rows, 33, make_generator(1), models=nets[0])
    assert {*others} != {*at}, 'images within a kind are drawn'


def test_kinds_without_an_error_come_last_and_none_gives_more_than_it_has():
    labels = np.eye(3)[probabilities(pool.images).argmax(1)]
    labels[:10] = np.roll(labels[:10], 1, 1)
    rows = pd.DataFrame(dict(transform=np.where(np.arange(90) < 10, 'fog', 'clean')))
    at = S.worst_kinds(pool.images, labels, rows, 15, seeded(), models=nets[0])
    assert {*at[:10]} == {*range(10)}
    assert len({*at}) == 15


@pytest.mark.parametrize('policy, column', (
    (S.succeeded, 'success'), (partial(S.hardest_version, models=nets), 'image'),
    (partial(S.worst_kinds, models=nets), 'transform')))
def test_a_column_that_is_not_there_is_named(policy, column):
    with pytest.raises(ValueError, match=f'`rows` must have the column `{column}`; got other'):
        chosen(policy, rows=pd.DataFrame(dict(other=np.zeros(90))))


def test_among_is_the_policy_with_a_number():
    undecided = partial(S.by_entropy, models=nets)
    wrong_ones = partial(S.misclassified, models=nets)
    for policy, alone in ((S.succeeded, True), (undecided, False), (wrong_ones, True)):
        lucky = S.among(4, policy)
        rows = pd.DataFrame(dict(image=np.arange(90), success=[True, None, False]*30))
        assert chosen(lucky, 12, rows=rows).tolist() == chosen(policy, 12, rows=rows).tolist()
        assert lucky.candidates == 4
        assert lucky.one_by_one is alone


@pytest.mark.parametrize('candidates', (0, .9, float('nan'), float('inf')))
def test_among_refuses_numbers(candidates):
    with pytest.raises(ValueError, match='`candidates` must be at least 1'):
        S.among(candidates)


@pytest.mark.parametrize('make, name', (
    (S.balanced, 'policy'), (lambda o: S.among(2, o), 'policy'), (lambda o: S.among(2, partial(o)), 'policy'),
    (lambda o: chosen(S.hardest_version, models=nets, then=o), 'then')))
def test_a_number_that_nobody_would_see_is_refused(make, name):
    with pytest.raises(ValueError, match=f'`{name}` must be a policy without `among`'):
        make(S.among(3))


def test_balanced_takes_the_best_of_each_class_first():
    best = [np.flatnonzero(pool.y == k)[np.argsort(-entropy[pool.y == k])[:2]] for k in range(3)]
    top = chosen(S.balanced(partial(S.by_entropy, models=nets)), 6)
    assert {*top} == {*np.concatenate(best)}
    assert {*pool.y[top[:3]]} == {0, 1, 2}


def test_hardest_version_by_hand():
    rows = pd.DataFrame(dict(image=np.arange(90)//3))
    best = np.array([3*i + int(entropy[3*i:3*i+3].argmax()) for i in range(30)])
    most_undecided = partial(S.by_entropy, models=nets)
    few = chosen(S.hardest_version, 5, rows=rows, models=nets, then=most_undecided)
    assert sorted(chosen(S.hardest_version, 30, rows=rows, models=nets)) == best.tolist()
    assert {*few} == {*best[np.argsort(-entropy[best])[:5]]}


def test_gradient_norm_by_finite_differences():
    images, labels = pool.images[:6], pool.labels[:6]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()/255
    y = torch.from_numpy(labels).double()
    expected = 0
    for net in nets:
        loss = lambda o: -(y*net(o).log_softmax(1)).sum(1)
        slopes = []
        for k in range(x[0].numel()):
            step = torch.zeros(x[0].numel(), dtype=torch.double)
            step[k] = 1e-5
            step = step.view(x[0].shape)
            slopes.append((loss(x+step) - loss(x-step))/2e-5)
        expected = expected + torch.stack(slopes).norm(dim=0)/len(nets)
    assert torch.allclose(S.gradient_norm(nets, images, labels, 4).double(), expected, atol=1e-4)


def test_gradients_are_those_of_the_attacks():
    "A model that computes its own is asked for them; one without any, and one that answers NaN, are refused"
    class Own(torch.nn.Module):
        def forward(self, x): return nets[0](x)
        def loss_and_grad(self, x, y, loss):
            assert loss(nets[0](x), y).shape == (len(x),)
            return None, torch.full_like(x, .5), None
    images, labels = pool.images[:6], pool.labels[:6]
    assert torch.allclose(S.gradient_norm(Own().eval(), images, labels), torch.full((6,), .5*192**.5))
    class Steps(torch.nn.Module):
        def forward(self, x): return nets[0]((9*x.detach()).round())
    with pytest.raises(ValueError, match='`model` must be differentiable'):
        S.gradient_norm(Steps().eval(), images, labels)
    class Tuple(torch.nn.Module):
        def forward(self, x): return dict(logits=nets[0](x))
    plain = S.gradient_norm(nets[0], images, labels)
    assert torch.allclose(S.gradient_norm(Tuple().eval(), images, labels), plain)


def test_the_easiest_images_come_first():
    steep = S.gradient_norm(nets, pool.images, pool.labels)
    first = chosen(S.low_gradient_norm, 90, models=nets)
    assert (steep[first].diff() >= 0).all()
    assert steep[first[0]] < steep[first[-1]]
