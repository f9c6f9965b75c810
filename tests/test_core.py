"Images, labels, models and seeds: what is wrong is refused by name, what is drawn belongs to the image."
import os, subprocess, sys
import numpy as np
import pytest
import torch
from torch import nn
from robustnb.core import (
    batches, check_images, check_labels, check_model, draw, image_generators, make_generator,
    memory_layout, pick_device, progress, some_of, subseed, to_float, to_uint8)
from robustnb.contract import predict

good = torch.linspace(0, 1, 2*3*4*4).view(2, 3, 4, 4)


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_images_of_every_float_type_pass(dtype):
    x = good.to(dtype)
    assert check_images(x) is x
    assert check_images(x[:, :1]).shape == (2, 1, 4, 4)


@pytest.mark.parametrize('x, error, words', (
    (good*255, ValueError, r'values in \[0, 255\]'), (good-1e-4, ValueError, 'Divide by 255'),
    (good+1e-4, ValueError, 'undo the normalisation'),
    (good.masked_fill(good == 1, float('nan')), ValueError, 'nan'),
    (good.masked_fill(good == 1, float('inf')), ValueError, 'inf'),
    (good[0], ValueError, r'x\[None\]'), (good[:0], ValueError, 'non-empty'),
    (good[..., :0], ValueError, 'non-empty'), (good.flatten(1), ValueError, 'N,C,H,W'),
    ((good*255).byte(), TypeError, 'to_float'), (good > .5, TypeError, 'floating point'),
    (good.to(torch.complex64), TypeError, 'floating point'),
    (good.numpy(), TypeError, 'ndarray'), (None, TypeError, 'NoneType'),
    ([good], TypeError, 'list')))
def test_images_that_are_refused(x, error, words):
    with pytest.raises(error, match=words) as e:
        check_images(x, 'pictures')
    assert '`pictures`' in str(e.value)


@pytest.mark.parametrize('y, error, words', (
    (torch.tensor([0, 3]), ValueError, r'\[0, 3\); got 3 at position 1 \(1 such'),
    (torch.tensor([-1, -2]), ValueError, r'got -1 at position 0 \(2 such'),
    (torch.tensor([0]), ValueError, '1 labels for 2 images'),
    (torch.tensor([0, 1, 2]), ValueError, '3 labels'),
    (torch.tensor([0., 1.]), TypeError, 'float32'),
    (torch.tensor([0, 1], dtype=torch.int32), TypeError, 'int32'),
    (torch.eye(2), TypeError, 'argmax'), (torch.tensor([[0], [1]]), TypeError, r'\(2, 1\)'),
    (np.array([0, 1]), TypeError, 'as_tensor'), ([0, 1], TypeError, 'list')))
def test_labels_that_are_refused(y, error, words):
    assert check_labels(torch.tensor([0, 2]), 2, 3).tolist() == [0, 2]
    with pytest.raises(error, match=words) as e:
        check_labels(y, 2, 3, 'answers')
    assert '`answers`' in str(e.value)


def test_models_that_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(48, 4), nn.Dropout()))
    with pytest.raises(ValueError, match=r'the model itself is in training mode \(5 parts\)'):
        check_model(net)
    net.eval()[1][1].train()
    with pytest.raises(ValueError, match=r'1\.1 is in training mode \(1 parts\)'):
        check_model(net)
    assert check_model(net.eval()) is net
    for bad in (lambda x: x, nn.Linear, None):
        with pytest.raises(TypeError, match='torch.nn.Module'):
            check_model(bad)


def test_eight_bits_survive_a_round_trip_and_small_errors():
    grey = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    x = to_float(grey)
    assert x.shape == (3, 3, 5, 7)
    assert x.dtype == torch.float32
    assert x[1, 2, 3, 4] == grey[1, 3, 4, 2]/np.float32(255)
    for shift in (-.49, 0, .49):
        assert (to_uint8((x + shift/255).clamp(0, 1)) == grey).all()
    assert (to_uint8(x.double()) == grey).all()
    assert to_uint8(x.requires_grad_()).dtype == np.uint8
    for bad in (grey[0], grey/255, grey.astype(np.int64)):
        with pytest.raises(TypeError, match='uint8'):
            to_float(bad)
    with pytest.raises(ValueError, match='in .0, 1.'):
        to_uint8(x*255)


def test_streams_are_stable_and_apart():
    assert subseed(0, 'noise') == 7207491209231784873
    assert subseed(3) != subseed(4)
    names = [(), ('a',), ('b',), ('a', 'b'), ('ab',), ('a', 1), ('a', '1'), (1,), ('1',), (1.,)]
    assert len({subseed(s, *n) for s in (0, 1) for n in names}) == 2*len(names)
    assert subseed(np.int64(1), 'a', np.int64(2), np.float64(.5)) == subseed(1, 'a', 2, .5)
    draws = torch.stack([torch.randn(1000, generator=make_generator(0, 'x', i)) for i in range(20)])
    assert (torch.corrcoef(draws) - torch.eye(20)).abs().max() < .15
    for bad in (.5, '1', None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match='`seed` must be an integer'):
            subseed(bad)


@pytest.mark.parametrize('n, size', ((0, 3), (1, 3), (3, 3), (4, 3), (10, 1), (5, 100)))
def test_batches_cover_everything_once(n, size):
    parts = [list(range(n))[s] for s in batches(n, size)]
    assert sum(parts, []) == list(range(n))
    assert all(0 < len(p) <= size for p in parts)
    assert all(s.stop <= n for s in batches(n, size))


def test_devices():
    assert pick_device('cpu') == torch.device('cpu')
    assert pick_device(torch.device('meta')).type == 'meta'
    assert pick_device() == torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cpu'"):
            pick_device('cuda:1')


def test_progress_is_silent_in_logs(capfd):
    assert list(progress(iter('abc'), 'letters', total=3)) == ['a', 'b', 'c']
    assert capfd.readouterr() == ('', '')


def test_predict_keeps_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
    x = good.clone().requires_grad_()
    out = predict(net, x)
    assert not out.requires_grad
    assert x.grad is None
    assert (out-net(x)).abs().max() < 1e-6
    for size in (1, 2, 3):
        assert (predict(net, x, size)-out).abs().max() < 1e-6
    assert predict(net.double(), x.double()).dtype == torch.float64
    assert predict(nn.Flatten().eval(), good).shape == (2, 48), 'a model without parameters'
    with pytest.raises(ValueError, match='Divide by 255'):
        predict(net, good*255)


def test_random_numbers_belong_to_the_image():
    x = torch.rand(9, 3, 4, 4, generator=make_generator(0))
    numbers = lambda x, seed=5, kind=torch.rand: draw(
        kind, image_generators(None if seed is None else make_generator(seed), x), 2, 3, like=x)
    whole = numbers(x)
    assert whole.shape == (9, 2, 3)
    assert len(whole.unique()) == 54
    assert whole.dtype == torch.float32
    order = torch.randperm(9, generator=make_generator(1))
    assert torch.equal(numbers(x[order]), whole[order])
    assert torch.equal(torch.cat([numbers(x[i:i+1]) for i in range(9)]), whole)
    assert torch.equal(numbers(x.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(numbers(x.double()), whole.double())
    assert torch.equal(numbers(x[[0, 0]])[0],
                       numbers(x[[0, 0]])[1]), 'copies of an image draw the same'
    changed = x.clone()
    changed[3, 0, 0, 0] += 1e-6
    assert (numbers(changed) != whole).flatten(1).any(1).tolist() == [i == 3 for i in range(9)]
    assert not torch.equal(numbers(x, 6), whole)
    assert torch.equal(numbers(x, None), numbers(x, 0))
    one = make_generator(5)
    many = make_generator(5)
    image_generators(one, x[:1])
    image_generators(many, x)
    assert torch.equal(one.get_state(), many.get_state()), (
        "the caller's generator moves on by one number, whatever the batch")
    assert numbers(x, kind=torch.randn).min() < 0 <= whole.min()


def test_lists_in_messages_stop_after_five():
    assert some_of('abcde') == "'a', 'b', 'c', 'd', 'e'"
    assert some_of('abcdef') == "'a', 'b', 'c', 'd', 'e' and 1 more"
    assert some_of(iter(range(100))) == '0, 1, 2, 3, 4 and 95 more'


def test_narrow_convolutions_keep_the_ordinary_layout():
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(4, 2))
    assert memory_layout(wide) == torch.channels_last
    assert memory_layout(nn.Sequential(wide, nn.Conv2d(16, 15, 1))) == torch.contiguous_format


def imported_by(*statements):
    "Which of torch, imgaug and sklearn a fresh Python has imported after each of `statements`"
    show = 'import sys\nprint(*[o for o in ("torch", "imgaug", "sklearn") if o in sys.modules])'
    job = '\n'.join(f'{o}\n{show}' for o in statements)
    done = subprocess.run([sys.executable, '-c', job], capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_is_cheap():
    after = imported_by('import robustnb', 'import robustnb.augmentation.transforms',
                        'import robustnb.curation.published',
                        'robustnb.augmentation.transforms.imgaug_pipeline()')
    assert after == ['', 'torch', 'torch', 'torch imgaug']
