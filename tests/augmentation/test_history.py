"What transforms tell of each image: against what the images show"
import re, threading
from functools import partial

import pytest
import torch
from torchvision.transforms import v2

from robustnb.augmentation import transforms as T
from robustnb.augmentation.corruptions import corruption, reference_corruption
from robustnb.augmentation.history import apply_noted, note
from robustnb.augmentation.soft_labels import cutmix, mixup
from robustnb.core import make_generator

seeded = lambda *a: make_generator(0, *a)
x = torch.rand(40, 3, 16, 20, generator=seeded('x'))
y = torch.eye(10)[torch.arange(40) % 10]


def drawn(transform, x=x, pool=None): return apply_noted(transform, x, y[:len(x)], seeded(), pool)[2]


def number(text, name): return float(re.search(rf'\b{name}=(-?[\d.e-]+)', text)[1])


@pytest.mark.parametrize('transform, name, measured', (
    (partial(T.add, value=(-.2, .2)), 'value', lambda o: o[:, 0, 0, 0]-.5),
    (partial(T.multiply, factor=(.5, 1.5), per_channel=0), 'factor', lambda o: o[:, 0, 0, 0]*2),
    (partial(T.gamma, power=(.5, 2)), 'power', lambda o: -o[:, 0, 0, 0].log2()),
    (partial(T.gaussian_noise, sigma=(.02, .1), per_channel=1), 'sigma', lambda o: o.std((1, 2, 3))),
    (partial(T.salt_and_pepper, amount=(.1, .5)), 'amount',
     lambda o: (o[:, 0] != .5).float().mean((1, 2)))))
def test_the_number_told_is_the_number_used(transform, name, measured):
    grey = torch.full((40, 3, 64, 64), .5)
    out, _, notes = apply_noted(transform, grey, y, seeded())
    told = torch.tensor([number(o, name) for o in notes])
    assert told.unique().numel() > 30
    assert (measured(out)-told).abs().max() < .1*told.abs().max()


@pytest.mark.parametrize('transform', (
    T.uniform_noise, T.dropout, T.coarse_dropout, T.gaussian_blur, T.average_blur, T.median_blur,
    T.photometric, T.posterize, T.affine, T.fast_pipeline(), mixup, cutmix), ids=T.describe)
def test_listening_changes_nothing(transform):
    a, b, notes = apply_noted(transform, x, y, seeded())
    plain = transform(x, y, seeded())
    assert torch.equal(a, plain[0])
    assert torch.equal(b, plain[1])
    assert all(notes)
    assert len({*notes}) > 3


def test_members_are_named_in_the_order_in_which_they_were_applied():
    def named(k):
        def mark(x, y, generator): return x*10 + k, y
        mark.__name__ = f'mark{k}'
        return mark
    start = torch.zeros(300, 1, 1, 1)
    both = T.sometimes(.7, T.some_of(0, 3, *map(named, (1, 2, 3))))
    out, _, notes = apply_noted(both, start, torch.ones(300, 2), seeded())
    for value, words in zip(out.flatten().long().tolist(), notes):
        digits = [o.removeprefix('mark') for o in words.split(', ') if o]
        assert ''.join(digits) == (str(value) if value else '')
    assert {*notes} >= {'', 'mark1', 'mark3, mark1, mark2'}


def test_partners_are_told_by_their_place_in_the_pool():
    pool = [100+7*i for i in range(40)]
    for mix in (mixup, cutmix):
        out, labels, notes = apply_noted(T.one_of(mix, T.add), x, y, seeded(), pool)
        told = [i for i, o in enumerate(notes) if 'partner' in o]
        assert 10 < len(told) < 30
        for i in told:
            j = (int(number(notes[i], 'partner'))-100)//7
            w = number(notes[i], 'weight')
            assert torch.allclose(labels[i], w*y[i] + (1-w)*y[j], atol=2e-3)
        assert all(o.startswith(mix.__name__) or o.startswith('add value=') for o in notes)


def test_a_corruption_says_which_and_how_severe():
    big = torch.rand(6, 3, 32, 32, generator=seeded('big'))
    assert T.describe(corruption('snow', 2)) == "corruption('snow', 2)"
    assert T.describe(corruption('fog', 1, 'cifar10-c')) == "corruption('fog', 1, 'cifar10-c')"
    assert T.describe(reference_corruption('fog', 1)) == "reference_corruption('fog', 1)"
    assert drawn(corruption('contrast', 4), big) == ['contrast 4']*6
    assert drawn(T.chain(corruption('contrast', 4, 'cifar10-c'), T.gamma), big)[0].startswith(
        'contrast 4 cifar10-c power=')
    nested = drawn(T.some_of(1, 1, corruption('contrast', 1), T.one_of(corruption('fog', 5))), big)
    assert {*nested} == {'contrast 1', 'fog 5'}


def test_pipelines_that_do_not_tell_are_named():
    mixed = T.one_of(T.from_torchvision(v2.RandomInvert(1.)), T.from_imgaug(T.imgaug_augmenters().Add(3)))
    assert {*drawn(mixed)} == {'from_torchvision(RandomInvert)', 'from_imgaug(Add)'}
    assert drawn(T.from_torchvision(lambda o: o)) == ['']*40


def test_threads_and_errors_leave_no_listener_behind():
    heard = []
    def other(): heard.append(apply_noted(T.add, x[:2], y[:2], seeded())[2])
    def busy(x, y, generator):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        note('mine')
        return x, y
    assert drawn(busy) == ['mine']*40
    assert all(o.startswith('value=') for o in heard[0])
    def fails(x, y, generator): raise KeyError('no')
    with pytest.raises(KeyError):
        drawn(fails)
    T.add(x, y, seeded())
    assert drawn(lambda x, y, g: (x, y)) == ['']*40
