"Transforms against slow versions, one image at a time; promises of all; bad input."
import os, random, subprocess, sys
from functools import partial

import imgaug as ia
import imgaug.augmenters as iaa
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from robustnb.augmentation import transforms as T
from robustnb.core import make_generator, to_float, to_uint8
from robustnb.augmentation.soft_labels import cutmix, mixup

seeded = lambda *a: make_generator(0, *a)
x = torch.rand(40, 3, 16, 20, generator=seeded('x'))
y = torch.eye(10)[torch.arange(40) % 10]
random_ones = (T.gaussian_noise, T.uniform_noise, T.salt_and_pepper, T.dropout,
               T.coarse_dropout, T.gaussian_blur, T.average_blur, T.median_blur, T.multiply,
               T.add, T.gamma, T.photometric, T.posterize, T.affine, mixup, cutmix)
all_ones = random_ones + (T.fast_pipeline(), T.imgaug_pipeline(), T.one_of(T.add, T.gamma),
                          T.sometimes(.5, T.add), T.from_torchvision(lambda o: 255-o))
by_transform = pytest.mark.parametrize('transform', all_ones, ids=T.describe)


@by_transform
def test_promises(transform):
    before = x.clone()
    state = torch.random.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    ia_state = ia.random.get_global_rng().generator.bit_generator.state['state']
    a, b = transform(x, y, seeded())
    assert a.shape == x.shape
    assert a.dtype == x.dtype
    assert a.min() >= 0
    assert a.max() <= 1
    assert not torch.equal(a, x)
    assert b.shape == y.shape
    assert b.dtype == y.dtype
    assert b.min() >= 0
    assert torch.allclose(b.sum(1), torch.ones(40))
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == np_state).all()
    assert str(ia.random.get_global_rng().generator.bit_generator.state['state']) == str(ia_state)
    again = transform(x, y, seeded())[0]
    other = transform(x, y, make_generator(1))[0]
    assert torch.equal(a, again)
    assert transform is all_ones[-1] or not torch.equal(a, other)


@pytest.mark.parametrize('transform', random_ones[:14], ids=T.describe)
def test_labels_pass_and_grey_images_of_any_size(transform):
    assert transform(x, y, seeded())[1] is y
    if transform is not T.photometric:
        assert transform(x[:, :1, :9], y, seeded())[0].shape == (40, 1, 9, 20)


def test_each_image_has_a_strength_of_its_own_between_the_ends():
    flat = torch.full((4000, 1, 2, 2), .5)
    added = T.add(flat, y, seeded(), value=(-.2, .4))[0][:, 0, 0, 0]-.5
    assert -.2 <= added.min() < -.19
    assert .39 < added.max() <= .4
    assert abs(added.mean()-.1) < .01
    assert added.unique().numel() > 3900
    noise = T.gaussian_noise(torch.full((2000, 1, 16, 16), .5), y, seeded(),
                             sigma=(.02, .1))[0].std((1, 2, 3))
    assert noise.min() < .03
    assert noise.max() > .09
    assert abs(noise.mean()-.06) < .003


@pytest.mark.parametrize('transform, option', (
    (T.gaussian_noise, {}), (T.uniform_noise, {}), (T.dropout, {}),
    (T.salt_and_pepper, dict(amount=.4)), (T.multiply, {}), (T.coarse_dropout, dict(p=.5))))
def test_the_fraction_of_colored_images(transform, option):
    out = transform(torch.full((1000, 3, 8, 8), .5), y, seeded(), per_channel=.3, **option)[0]
    colored = ((out[:, 0] != out[:, 1]).flatten(1).any(1)
                | (out[:, 0] != out[:, 2]).flatten(1).any(1))
    assert abs(colored.float().mean()-.3) < .05
    first = out[colored][:, 0].flatten(1)-.5
    second = out[colored][:, 1].flatten(1)-.5
    if transform in (T.gaussian_noise, T.uniform_noise):
        assert abs((first*second).mean()/first.square().mean()) < .05


def test_noise_has_its_distribution():
    flat = torch.full((500, 3, 16, 16), .5)
    noise = (T.gaussian_noise(flat, y, seeded(), sigma=.08, per_channel=1)[0]-.5)/.08
    assert abs(noise.mean()) < 5e-3
    assert abs(noise.std()-1) < 5e-3
    assert abs((noise**4).mean()-3) < .05
    assert abs(noise[..., 1:]*noise[..., :-1]).mean() < .7
    even = (T.uniform_noise(flat, y, seeded(), width=.3)[0]-.5)/.3
    assert abs(even.abs().max()-1) < 1e-3
    assert abs(even.mean()) < 5e-3
    assert abs(even.abs().mean()-.5) < 5e-3
    salt = T.salt_and_pepper(flat, y, seeded(), amount=.25)[0]
    assert abs((salt == 1).float().mean()-.125) < 5e-3
    assert abs((salt == 0).float().mean()-.125) < 5e-3
    assert torch.equal(T.salt_and_pepper(flat, y, seeded(), amount=0)[0], flat)
    assert (T.salt_and_pepper(flat, y, seeded(), amount=1)[0] != .5).all()
    assert (T.dropout(flat, y, seeded(), p=1)[0] == 0).all()


def test_rectangles_cover_whole_cells():
    out = T.coarse_dropout(torch.ones(200, 3, 12, 16), y, seeded(), p=.2, size=.25,
                           per_channel=0)[0][:, 0]
    cells = torch.stack([out[:, 4*i:4*i+4] for i in range(3)], 1)
    columns = (torch.arange(16)*3//16)
    for k in range(3):
        assert (cells[..., columns == k].flatten(2).std(2) == 0).all()
    assert abs((out == 0).float().mean()-.2) < .05


def slow_blur(image, kernel, anchor):
    "Convolution with mirrored borders, pixel by pixel"
    h, w = image.shape
    mirror = lambda i, n: (lambda j: j if j < n else 2*n-2-j)(abs(i) % (2*n-2))
    return np.array([[sum(k*l*image[mirror(r+i-anchor, h), mirror(c+j-anchor, w)]
                          for i, k in enumerate(kernel)
                          for j, l in enumerate(kernel)) for c in range(w)] for r in range(h)])


@pytest.mark.parametrize('sigma', (.4, 1., 2.3))
def test_gaussian_blur_is_the_slow_one(sigma):
    r = int(np.ceil(4*sigma))
    at = np.arange(-r, r+1)
    kernel = np.exp(-at**2/(2*sigma**2))*(abs(at) <= 4*sigma)
    slow = slow_blur(x[0, 1].numpy().astype(float), kernel/kernel.sum(), r)
    assert abs(T.gaussian_blur(x[:2], y, seeded(), sigma=sigma)[0][0, 1].numpy()-slow).max() < 1e-5


@pytest.mark.parametrize('size', (1, 2, 5))
def test_average_blur_is_the_slow_one(size):
    slow = slow_blur(x[0, 0].numpy().astype(float), np.ones(size)/size, size//2)
    assert abs(T.average_blur(x[:1], y, seeded(), size=size)[0][0, 0].numpy()-slow).max() < 1e-5


def test_median_blur_is_the_slow_one():
    image = np.pad(to_uint8(x)[3, :, :, 2], 2, mode='edge')
    slow = np.array([[np.median(image[r:r+5, c:c+5]) for c in range(20)] for r in range(16)])
    assert (to_uint8(T.median_blur(x, y, seeded(), size=5)[0])[3, :, :, 2] == slow).all()
    mixed = T.median_blur(x, y, seeded(), size=(3, 7))[0]
    fixed = [T.median_blur(x, y, seeded(), size=k)[0] for k in (3, 5, 7)]
    which = torch.stack([(mixed == f).flatten(1).all(1) for f in fixed])
    assert which.any(0).all()
    assert (which.sum(1) > 5).all()


def test_flat_white_images_stay_in_range():
    white = torch.ones(50, 3, 16, 16)
    for f in (T.gaussian_blur, T.average_blur, T.affine):
        assert torch.allclose(f(white, y, seeded())[0], white, atol=1e-6)
        assert f(white, y, seeded())[0].max() <= 1


def test_hue_turns_around_grey_and_keeps_the_mean():
    dull = .3 + .4*x
    turned = T.photometric(dull, y, seeded(), brightness=1, contrast=1, saturation=1, hue=.13)[0]
    back = T.photometric(turned, y, seeded(), brightness=1, contrast=1, saturation=1, hue=-.13)[0]
    grey = torch.full((2, 3, 4, 4), .6)
    red = torch.tensor([.8, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert torch.allclose(
        T.photometric(red, y, seeded(), brightness=1, contrast=1, saturation=1, hue=1/3)[0],
        red.roll(1, 1), atol=1e-6)
    inside = ((turned > 0) & (turned < 1)).all(1)
    assert torch.allclose(turned.mean(1)[inside], dull.mean(1)[inside], atol=1e-5)
    assert torch.allclose(back.permute(0, 2, 3, 1)[inside], dull.permute(0, 2, 3, 1)[inside],
                          atol=1e-5)
    assert (turned-dull).abs().mean() > .02
    assert torch.allclose(
        T.photometric(grey, y, seeded(), brightness=1, contrast=1, saturation=3, hue=.4)[0],
        grey, atol=1e-6)


def test_contrast_keeps_the_mean_grey_and_saturation_the_grey():
    weights = torch.tensor([.299, .587, .114]).view(1, 3, 1, 1)
    dull = .4 + .2*x
    still = dict(brightness=1, contrast=1, saturation=1, hue=0)
    more, vivid = (T.photometric(dull, y, seeded(), **still | o)[0]
                   for o in (dict(contrast=1.7), dict(saturation=1.5)))
    assert torch.allclose((more*weights).sum(1).mean((1, 2)),
                          (dull*weights).sum(1).mean((1, 2)), atol=1e-5)
    assert torch.allclose(more.std((2, 3)), 1.7*dull.std((2, 3)), atol=1e-5)
    assert torch.allclose((vivid*weights).sum(1), (dull*weights).sum(1), atol=1e-5)
    assert vivid.std(1).mean() > 1.4*dull.std(1).mean()


def test_scale_enlarges_and_degrees_turn_counter_clockwise():
    spot = torch.zeros(1, 1, 17, 17)
    spot[..., 8, 12] = 1
    still = dict(degrees=0, shift=0, scale=1)
    where = lambda o: divmod(int(T.affine(spot, y, seeded(), **still | o)[0].flatten().argmax()),
                             17)
    assert where(dict(degrees=90)) == (4, 8)
    assert where(dict(degrees=180)) == (8, 4)
    assert where(dict(scale=.5)) == (8, 10)
    assert where(dict(shift=2/17)) == (10, 14)


@pytest.mark.parametrize('h, w', ((32, 64), (64, 32), (48, 48)))
def test_a_turned_bar_keeps_its_sides(h, w):
    bar = torch.zeros(1, 1, h, w)
    bar[..., h//2-2:h//2+2, w//2-14:w//2+14] = 1
    turned = lambda degrees: T.affine(bar, y[:1], seeded(), degrees=degrees, shift=0, scale=1)[0][0, 0]
    sides = lambda degrees: [len(o.unique()) for o in (turned(degrees) > .5).nonzero().unbind(1)]
    assert sides(90) == [28, 4]
    assert sides(45)[0] == sides(45)[1]
    assert torch.allclose(turned(180), bar[0, 0], atol=1e-4)


def test_some_of_takes_each_at_most_once_in_every_order():
    marks = [partial(lambda x, y, g, k: (x*10 + k, y), k=k) for k in (1, 2, 3)]
    start = torch.zeros(3000, 1, 1, 1), torch.ones(3000, 2)
    found = T.some_of(0, 3, *marks)(*start, seeded())[0].flatten().long()
    values, counts = found.unique(return_counts=True)
    assert {*values.tolist()} == {0, 1, 2, 3, 12, 13, 21, 23, 31, 32, 123, 132, 213, 231, 312, 321}
    by_length = [counts[[len(str(v)) == k if v else k == 0 for v in values.tolist()]]
                 for k in range(4)]
    assert all(abs(c.sum()-750) < 100 and c.max() < 1.5*c.min() for c in by_length)


def test_imgaug_augmenters_are_left_alone_and_see_rounded_images():
    augmenter = iaa.Sequential([iaa.Add(3), iaa.Identity()])
    state = lambda: repr(augmenter.random_state.generator.bit_generator.state)
    known = hasattr(augmenter.random_state, 'generator')
    before = state() if known else None
    out = T.from_imgaug(augmenter)(x, y, seeded())[0]
    assert torch.equal(out, (to_float(to_uint8(x))*255 + 3).round().clamp(0, 255)/255)
    assert not known or state() == before


@pytest.mark.parametrize('job, words', (
    (lambda: T.gaussian_noise(x, y, seeded(), sigma=-1), '`sigma` must not be negative'),
    (lambda: T.gaussian_noise(x, y, seeded(), sigma=(.2, .1)),
     '`sigma` must be a finite number or a pair'),
    (lambda: T.add(x, y, seeded(), value=float('nan')), '`value` must be a finite'),
    (lambda: T.dropout(x, y, seeded(), p=(-.1, .2)), r'`p` must be in .0, 1.'),
    (lambda: T.median_blur(x, y, seeded(), size=4), '`size` must be odd'),
    (lambda: T.average_blur(x, y, seeded(), size=0), '`size` must be whole pixels'),
    (lambda: T.posterize(x, y, seeded(), levels=1), '`levels` must be at least 2; got 1'),
    (lambda: T.median_blur(x, y, seeded(), size=(3, 8)), '`size` must be odd'),
    (lambda: T.average_blur(x, y, seeded(), size=(2.5, 3)), '`size` must be whole pixels'),
    (lambda: T.gaussian_noise(x, y, seeded(), sigma=(0, .1, .2)), '`sigma` must be a finite number or'),
    (lambda: T.gaussian_noise(x, y, seeded(), sigma='big'), "`sigma` .* got 'big'"),
    (lambda: T.gaussian_noise(x, y, seeded(), per_channel=3), r'`per_channel` must be in .0, 1.; got 3'),
    (lambda: T.multiply(x, y, seeded(), per_channel=float('nan')), '`per_channel`'),
    (lambda: T.salt_and_pepper(x, y, seeded(), amount=2), '`amount` must be in'),
    (lambda: T.coarse_dropout(x, y, seeded(), p=5), '`p` must be in'),
    (lambda: T.sometimes('a', T.add), '`p` must be in'),
    (lambda: T.from_torchvision(v2.Normalize([.5], [.5]))(x, y, seeded()), 'Normalize does not'),
    (lambda: T.photometric(x[:, :1], y, seeded()), '3 channels'),
    (lambda: T.affine(x, y, seeded(), scale=0), '`scale`'),
    (lambda: T.sometimes(1.2, T.add), r'`p` must be in'), (lambda: T.one_of(), 'at least one'),
    (lambda: T.some_of(1, 0, T.add), '`least`')))
def test_bad_input(job, words):
    with pytest.raises(ValueError, match=words):
        job()


def test_levels_chances_and_eight_bits():
    few = T.posterize(x, y, seeded(), levels=5)[0]
    assert torch.allclose(few, (4*x).round()/4)
    assert few.unique().numel() == 5
    black = torch.zeros(2000, 1, 2, 2)
    out = T.sometimes(.2, partial(T.add, value=.1))(black, torch.ones(2000, 2), seeded())[0]
    changed = (out > 0).flatten(1).all(1)
    assert abs(changed.float().mean()-.2) < .03
    inverted = T.from_torchvision(lambda o: 255-o)(x, y, seeded())[0]
    assert (to_uint8(inverted) == 255-to_uint8(x)).all()
    assert torch.allclose(T.from_torchvision(lambda o: o)(x, y, seeded())[0], (255*x).round()/255)


def test_floats_of_torchvision_are_pixels_or_refused():
    floats = v2.ToDtype(torch.float32, scale=True)
    assert (to_uint8(T.from_torchvision(floats)(x, y, seeded())[0]) == to_uint8(x)).all()
    assert torch.allclose(T.from_torchvision(lambda o: o.double()/255)(x, y, seeded())[0],
                          T.from_torchvision(lambda o: o)(x, y, seeded())[0])
    bad = (lambda o: o.float(), lambda o: o.int(), lambda o: o.numpy(), lambda o: floats(o)*float('nan'),
           v2.Compose([floats, v2.Normalize([.5]*3, [.5]*3)]))
    for transform in bad:
        with pytest.raises(ValueError, match='`transform` must return a uint8 tensor, or floats'):
            T.from_torchvision(transform)(x, y, seeded())


def test_imgaug_where_only_the_temporary_folder_can_be_written(tmp_path):
    "numba finds no place for its cache beside the package or in the home folder, as in containers"
    job = '''
import numba.core.caching as caching
for name, o in vars(caching).items():
    if name.endswith('CacheLocator') and 'UserProvided' not in name:
        o.from_function = classmethod(lambda *args: None)
try:
    import imgaug
except RuntimeError as e:
    print(str(e)[:12])
from robustnb.augmentation.transforms import imgaug_augmenters, imgaug_pipeline
import torch
x = torch.rand(4, 3, 32, 32)
print(imgaug_pipeline()(x, torch.eye(4), torch.Generator().manual_seed(0))[0].shape == x.shape)
print(imgaug_augmenters() is imgaug_augmenters())
'''
    env = {k: v for k, v in os.environ.items() if k != 'NUMBA_CACHE_DIR'} | dict(TMPDIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', job], capture_output=True, text=True, env=env)
    assert done.stdout.split('\n') == ['cannot cache', 'True', 'True', ''], done.stderr
    assert not [o.name for o in tmp_path.iterdir() if o.name.startswith('robustnb')]


@pytest.mark.parametrize('make, name', (
    (lambda: T.chain(T.add, 3), 'transforms'), (lambda: T.sometimes(.5, None), 'transform'),
    (lambda: T.one_of(T.add, 'gamma'), 'transforms'), (lambda: T.from_torchvision(3), 'transform')))
def test_what_is_no_transform_is_refused_when_it_is_given(make, name):
    with pytest.raises(TypeError, match=f'`{name}` must be callable'):
        make()


@pytest.mark.parametrize('draw', (random.random, lambda: np.random.rand(), lambda: torch.rand(()).item()))
@pytest.mark.parametrize('wrap', ('torchvision', 'imgaug'))
def test_what_others_draw_follows_the_generator(draw, wrap):
    if wrap == 'torchvision':
        t = T.from_torchvision(lambda o: o.flip(2) if draw() < .5 else o)
    else:
        perhaps = lambda images, *more: [i[:, ::-1] if draw() < .5 else i for i in images]
        t = T.from_imgaug(iaa.Lambda(func_images=perhaps))
    states = random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    made = t(x, y, seeded())[0]
    assert torch.equal(made, t(x, y, seeded())[0])
    assert not torch.equal(made, t(x, y, seeded('other'))[0])
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_images_of_several_shapes_or_kinds_are_named():
    for t, name in ((T.from_imgaug(iaa.Crop(px=(0, 4), keep_size=False)), 'augmenter'),
                    (T.from_torchvision(v2.RandomRotation(40, expand=True)), 'transform')):
        with pytest.raises(ValueError, match=f'`{name}` must return images of one shape.*resize after it'):
            t(x, y, seeded())
    floats = T.from_imgaug(iaa.Lambda(func_images=lambda o, *more: [i/255 for i in o]))
    with pytest.raises(ValueError, match='`augmenter` must return uint8 images .*float64'):
        floats(x, y, seeded())
    with pytest.raises(ValueError, match='got an array of uint8.*ToImage'):
        T.from_torchvision(lambda o: o.numpy())(x, y, seeded())
