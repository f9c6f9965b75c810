"""The 19 corruptions: against the package with both tables of constants, against closed forms and
slow versions, and what must fail."""
import ast
import inspect
import pickle
import random
from functools import lru_cache

import cv2
import numpy as np
import pytest
import torch
from imagecorruptions import corruptions as package
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

from robustnb.augmentation import corruptions
from robustnb.core import make_generator, to_float, to_uint8
from robustnb.augmentation.corruptions import corruption, corruption_names, reference_corruption

exact = ('defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression',
         'gaussian_blur', 'saturate')
chance = tuple(o for o in corruption_names if o not in exact)
tables = 'imagenet-c', 'cifar10-c'
everything = pytest.mark.parametrize('name', corruption_names)
both = pytest.mark.parametrize('table', tables)

cifar = dict(    # as in the authors' make_cifar_c.py
    gaussian_noise=[.04, .06, .08, .09, .10],
    shot_noise=[500, 250, 100, 75, 50],
    impulse_noise=[.01, .02, .03, .05, .07],
    speckle_noise=[.06, .1, .12, .16, .2],
    gaussian_blur=[.4, .6, .7, .8, 1],
    glass_blur=[(.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)],
    defocus_blur=[(.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)],
    motion_blur=[(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    zoom_blur=[np.arange(1, o, .01) for o in (1.06, 1.11, 1.16, 1.21, 1.26)],
    fog=[(.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)],
    snow=[(.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
          (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)],
    spatter=[(.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
             (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)],
    contrast=[.75, .5, .4, .3, .15],
    brightness=[.05, .1, .15, .2, .3],
    saturate=[(.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)],
    jpeg_compression=[80, 65, 58, 50, 40],
    pixelate=[.95, .9, .85, .75, .65])


def photos(step=96, size=32):
    x = to_float(np.stack([o[:384, :640] for o in load_sample_images().images]))
    return x.unfold(2, size, step).unfold(
        3, size, step).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)


x = photos()


def run(name, severity, table='imagenet-c', x=x, seed=0):
    return corruption(name, severity, table)(x, None, make_generator(seed))[0]


def far(a, b): return 255*(a-b).abs().mean().item()


def centred_zoom(image, factor):
    "The enlargement of the authors' script: what is too long is cut at both ends"
    big = package.clipped_zoom(image, factor)
    h, w = image.shape[:2]
    top = (big.shape[0]-h)//2
    left = (big.shape[1]-w)//2
    return big[top:top+h, left:left+w]


def theirs(name, severity, table, x=x, seed=0):
    """The package's own function on each image of `x`, its constants replaced by those of
    CIFAR-10-C if asked; float, before the cut to 8 bits"""
    function = getattr(package, name)
    if table == 'cifar10-c':
        tree = ast.parse(inspect.getsource(function))
        first = next(o for o in tree.body[0].body
                     if isinstance(o, ast.Assign) and o.targets[0].id == 'c')
        first.value = ast.parse('CIFAR[severity-1]', mode='eval').body
        space = vars(package) | dict(CIFAR=cifar[name], clipped_zoom=centred_zoom)
        exec(compile(ast.fix_missing_locations(tree), name, 'exec'), space)
        function = space[name]
    own = name in ('impulse_noise', 'glass_blur')
    state = np.random.get_state()
    np.random.seed(seed)
    with np.errstate(invalid='ignore'):
        out = [np.asarray(
            function(Image.fromarray(o), severity, **(dict(seed=seed+i) if own else {})),
            float) for i,o in enumerate(to_uint8(x))]
    np.random.set_state(state)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)/255


def test_the_names_are_the_packages():
    from imagecorruptions import get_corruption_names
    assert list(corruption_names) == get_corruption_names('all')
    assert len(corruption_names) == 19
    assert isinstance(corruption_names, tuple)


@pytest.mark.parametrize(
    'name', [o for o in corruption_names if o not in ('zoom_blur', 'elastic_transform')])
def test_the_constants_are_the_packages_and_the_authors(name):
    literal = next(o for o in ast.walk(ast.parse(inspect.getsource(getattr(package, name))))
                   if isinstance(o, ast.List) and o.elts)
    cut = lambda c: [o[:-1] if name == 'snow' else o[:2] if name == 'frost' else o for o in c]
    assert cut(corruptions._imagenet[name]) == ast.literal_eval(literal)
    assert name == 'frost' or cut(corruptions._cifar[name]) == cifar[name]
    rest = dict(snow=([(0,), (1,)], -1), frost=([(1.1, 6), (.2, 5)], 2))
    if name in rest:
        assert [{c[rest[name][1]:] for c in t[name]} for t in (
            corruptions._imagenet, corruptions._cifar)] == [{o} for o in rest[name][0]]


@both
@pytest.mark.parametrize('name', exact)
def test_without_chance_equals_the_package(name, table):
    limit = dict(pixelate=.75, jpeg_compression=1e-4).get(name, 1e-3)
    for size in ((32, 32), (48, 33)):
        images = photos(128, 48)[:, :, :size[0], :size[1]]
        for s in range(1, 6):
            apart = far(run(name, s, table, images), theirs(name, s, table, images))
            assert apart < limit, (s, apart)
    assert far(run(name, 1, table),
               theirs(name, 2, table)) > limit, 'another severity is another image'


def moments(name, s, table, other):
    "Change of the images by both: mean size, mean, and standard deviation, as ratios to those of `other`"
    ours = torch.cat([run(name, s, table, seed=o) for o in range(3)])
    clean = torch.cat([x]*3)
    seen = ~other.isnan().flatten(1).any(1)
    assert seen.float().mean() > .9
    a = (ours-clean)[seen]
    b = (other-clean)[seen]
    return torch.stack([a.abs().mean()/b.abs().mean(), 1 + (a.mean()-b.mean())/b.abs().mean(),
                        a.std()/b.std()])


@both
@pytest.mark.parametrize('name', [o for o in chance if o not in ('frost', 'elastic_transform')])
def test_with_chance_agrees_with_the_package(name, table):
    for s in range(1, 6):
        # the package darkens here, see below
        if (name, table, s) == ('motion_blur', 'imagenet-c', 5): continue
        found = moments(name, s, table,
                        torch.cat([theirs(name, s, table, seed=1000*o) for o in range(3)]))
        assert (abs(found-1) < (.14 if name == 'spatter' else .09)).all(), (s, found)


@pytest.mark.parametrize('name', ['frost', 'elastic_transform'])
def test_frost_and_warp_agree_with_the_package(name):
    for s in (1, 5):
        found = moments(name, s, 'imagenet-c',
                        torch.cat([theirs(name, s, 'imagenet-c', seed=1000*o) for o in range(3)]))
        assert (abs(found-1) < (.14 if name == 'frost' else .05)).all(), (s, found)


def slow_warp(image, c, rng):
    "Affine jitter and random field with OpenCV and scipy; image (H,W,3) in [0,1]"
    h, w = image.shape[:2]
    middle = np.float32([h//2, w//2])
    arm = min(h, w)//3
    corners = np.float32([middle+arm, [middle[0]+arm, middle[1]-arm], middle-arm])
    M = cv2.getAffineTransform(corners,
                               corners + rng.uniform(-c[2], c[2], (3, 2)).astype(np.float32))
    image = cv2.warpAffine(image, M, (w, h), borderMode=cv2.BORDER_REFLECT_101)
    blur = lambda: ndimage.gaussian_filter(rng.uniform(-1, 1, (h, w)), c[1], mode='reflect',
                                           truncate=3)*c[0] if c[0] else np.zeros((h, w))
    rows, columns = np.mgrid[:h, :w]
    at = rows + blur(), columns + blur()
    return np.stack(
        [ndimage.map_coordinates(image[..., k], at, order=1, mode='reflect') for k in range(3)], -1)


@lru_cache
def small_ice(file):
    return cv2.resize(cv2.imread(package.__file__.replace('corruptions.py', f'frost/{file}')),
                      (0, 0), fx=.2, fy=.2)[..., ::-1]/255


def slow_frost(image, c, rng):
    "A crop of one of five pictures of ice, at a fifth of their size; image (H,W,3) in [0,1]"
    ice = small_ice(('frost1.png', 'frost2.png', 'frost3.png', 'frost4.jpg',
                     'frost5.jpg')[rng.integers(5)])
    i, j = (rng.integers(0, n-32) for n in ice.shape[:2])
    return np.clip(c[0]*image + c[1]*ice[i:i+32, j:j+32], 0, 1)


@pytest.mark.parametrize('name, slow, table, limit', [
    ('elastic_transform', slow_warp,
     [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96)], .07),
    ('frost', slow_frost, [(1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)], .1)])
def test_frost_and_warp_of_cifar_agree_with_a_slow_version(name, slow, table, limit):
    rng = np.random.default_rng(0)
    images = x.permute(0, 2, 3, 1).numpy()
    for s,c in enumerate(table, 1):
        other = torch.from_numpy(
            np.stack([slow(o, c, rng) for _ in range(3) for o in images])).permute(0, 3, 1, 2)
        found = moments(name, s, 'cifar10-c', other)
        assert (abs(found-1) < limit).all(), (s, found)


@pytest.mark.parametrize('sigma', [.05, .4, .7, 1.1, 6])
def test_smoothing_matrices_are_scipys(sigma):
    for truncate in (3, 4):
        for mirror in (True, False):
            slow = ndimage.gaussian_filter1d(np.eye(16), sigma, axis=0,
                                             mode='reflect' if mirror else 'nearest',
                                             truncate=truncate)
            assert np.abs(
                corruptions._gauss(16, sigma, truncate, mirror).numpy() - slow).max() < 1e-6


def test_the_warp_equals_the_package_with_the_same_numbers(monkeypatch):
    images = photos(256, 128)[:2, :, :, :100]
    numbers = 2*torch.rand(2, 128, 100, generator=make_generator(1), dtype=torch.float64) - 1
    monkeypatch.setattr(corruptions, '_uniform',
                        lambda like, generator, *shape: numbers.float().expand(shape))
    for s in range(1, 6):
        calls = iter(list(numbers)*6)
        monkeypatch.setattr(np.random, 'uniform', lambda low, high, size: high*next(calls).numpy())
        assert far(run('elastic_transform', s, x=images),
                   theirs('elastic_transform', s, 'imagenet-c', images)) < .002


@both
@pytest.mark.parametrize('name, limit', [('spatter', .15), ('snow', .35), ('fog', .001),
                                         ('gaussian_noise', .001), ('speckle_noise', .001)])
def test_weather_equals_the_package_with_the_same_numbers(monkeypatch, name, limit, table):
    for s in range(1, 6):
        for image in (*x[-12::3, None], photos(256, 128)[-1:]):
            g = make_generator(s)
            calls = []
            for kind,draw in dict(_uniform=lambda *shape: 2*torch.rand(shape, generator=g) - 1,
                                  _normal=lambda *shape: torch.randn(shape, generator=g)).items():
                monkeypatch.setattr(corruptions, kind,
                                    lambda like, generator, *shape, draw=draw: calls.append(
                                        draw(*shape)) or calls[-1])
            out = run(name, s, table, image)
            def numbers(size):
                u = calls.pop(0)[0].double().numpy()
                return np.moveaxis(
                    u, 0, -1) if u.ndim == 3 and len(size or ()) == 3 else u.reshape(size or ())
            monkeypatch.setattr(np.random, 'normal',
                                lambda size, loc=0, scale=1: loc + scale*numbers(size))
            monkeypatch.setattr(
                np.random, 'uniform',
                lambda low, high, size=None: (low+high)/2 + (high-low)/2*numbers(size))
            other = theirs(name, s, table, image)
            if other.isnan().any():
                assert torch.equal(out, image)
            else:
                assert far(out, other) < limit, (s, far(out, other))


@both
def test_snow_without_flakes_whitens_as_in_the_package(monkeypatch, table):
    monkeypatch.setattr(corruptions, '_normal', lambda like, generator, *shape: torch.zeros(shape))
    monkeypatch.setattr(np.random, 'normal', lambda size, loc, scale: np.full(size, loc))
    for s in range(1, 6):
        assert far(run('snow', s, table),
                   theirs('snow', s, table)) < .01 < far(run('snow', s, table), x)


def test_camera_shakes_sideways_and_snow_falls(monkeypatch):
    dot = torch.zeros(300, 3, 32, 32)
    dot[:, :, 16, 16] = 1
    image, _, i, j = run('motion_blur', 1, 'cifar10-c', dot).nonzero().T
    assert (j <= 16).all()
    assert ((i-16).abs() <= 16-j).all()
    assert (i-16).min() < -3
    assert (i-16).max() > 3
    out = []
    monkeypatch.setattr(corruptions, '_motion',
                        lambda like, radius, sigma, angle: out.append(angle) or like)
    run('snow', 1, x=dot)
    assert out[0].min() >= -.75*np.pi
    assert out[0].max() <= -.25*np.pi
    assert out[0].max() - out[0].min() > 1.5


@both
def test_noise_has_the_moments_it_says(table):
    grey = torch.full((40, 3, 32, 32), .5)
    c = corruptions._tables[table]
    for s in (1, 2):
        change = run('gaussian_noise', s, table, grey) - .5
        assert abs(change.std()/c['gaussian_noise'][s-1] - 1) < .01
        assert abs(change.mean()) < .002
        assert abs((change[:, 0]*change[:, 1]).mean()) < 1e-4, 'channels are independent'
        change = run('speckle_noise', s, table, grey/2) - .25
        assert abs(change.std()/(.25*c['speckle_noise'][s-1]) - 1) < .01
        rate = c['shot_noise'][s-1]
        out = run('shot_noise', s, table, grey)
        assert abs(out.std()/(.5/rate)**.5 - 1) < .01
        assert (out*rate - (out*rate).round()).abs().max() < 1e-3
    for s in range(1, 6):
        out = run('impulse_noise', s, table, grey)
        share = c['impulse_noise'][s-1]
        assert set(out.unique().tolist()) == {0, .5, 1}
        assert all(abs((out == o).float().mean()/(share/2) - 1) < .07 for o in (0, 1))


def test_motion_equals_the_package_at_the_same_angle():
    images = photos(128, 64)[:8]
    angles = torch.linspace(-135, 45, 8).double()
    for radius, sigma in ((10, 3), (15, 8), (20, 15)):
        ours = corruptions._motion(images.double(), radius, sigma, angles.deg2rad())
        for image, angle, out in zip(images, angles.tolist(), ours):
            theirs = package._motion_blur(image.permute(1, 2, 0).numpy(), radius, sigma, angle)
            assert np.abs(theirs - out.permute(1, 2, 0).numpy()).max() < 1e-5


@both
def test_a_plain_image_has_nothing_to_blur(table):
    for shape in ((16, 16), (16, 37)):
        plain = torch.full((70, 3, *shape), .6)
        for name in ('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'gaussian_blur',
                     'elastic_transform', 'pixelate', 'contrast'):
            for s in (1, 5):
                assert (run(name, s, table, plain) - .6).abs().max() < (
                    .01 if name == 'defocus_blur' else 1e-5), (name, s)


@pytest.mark.parametrize('reach, rounds', [(1, 1), (2, 3), (4, 2)])
def test_glass_equals_a_loop(reach, rounds):
    images = x[:3, :, :20, :24].clone()
    ours = corruptions._glass_blur(images, (.05, reach, rounds), make_generator(5))
    g = make_generator(5)
    slow = images.clone()
    for _ in range(rounds):
        move = torch.randint(-reach, reach, (2, 20, 24, 3), generator=g)
        for k in range(3):
            for i in range(20-reach, reach, -1):
                for j in range(24-reach, reach, -1):
                    down, right = move[:, i, j, k].tolist()
                    slow[k, :, i, j] = slow[k, :, i+down, j+right].clone()
    assert torch.equal(ours, slow)


def test_glass_loses_as_many_pixels_as_the_package():
    number = torch.arange(1024.).view(1, 1, 32, 32).expand(8, 3, 32, 32)
    for c in ((.05, 1, 1), (.05, 2, 3)):
        ours = corruptions._glass_blur(number, c, make_generator(0))
        left = np.mean([len(o[0].unique()) for o in ours])
        theirs = [package._shuffle_pixels_njit_glass_blur(
            32, 32, number[0].permute(1, 2, 0).double().numpy().copy(), c, s) for s in range(8)]
        assert abs(left/np.mean([len(np.unique(o[..., 0])) for o in theirs]) - 1) < .03
        assert left < 900


def test_fog_has_the_landscape_of_the_package():
    state = np.random.get_state()
    np.random.seed(0)
    for decay in (1.4, 2, 3):
        ours = corruptions._landscape(torch.zeros(400, 1), 32, decay,
                                      make_generator(1))[:, 0].numpy()
        theirs = np.stack([package.plasma_fractal(32, decay) for _ in range(400)])
        assert (ours.min((1, 2)) == 0).all()
        assert (ours.max((1, 2)) == 1).all()
        for f in (np.mean, np.std, lambda o: np.abs(np.diff(o)).mean(),
                  lambda o: np.abs(np.diff(o, axis=1)).mean(),
                  lambda o: np.abs(o[:, :, 16:]-o[:, :, :16]).mean(), lambda o: o[:, 0, 0].std()):
            assert abs(f(ours)/f(theirs) - 1) < .1
    np.random.set_state(state)
    dark = torch.zeros(2, 3, 16, 40)
    assert (run('fog', 5, x=dark) == 0).all(), (
        'a black image stays black: fog is scaled to the brightest pixel')


def test_frost_uses_all_pictures_or_five(monkeypatch):
    monkeypatch.setattr(corruptions, '_frost_pictures', lambda scale, h, w: [
        torch.full((1, 3, 50+20*k, 60+k), k/10) for k in range(6)])
    dark = torch.zeros(200, 3, 32, 32)
    assert {round(o/.4*10) for o in run('frost', 1, x=dark)[:, 0, 0, 0].tolist()} == set(range(6))
    assert {round(o/.2*10)
            for o in run('frost', 1, 'cifar10-c', dark)[:, 0, 0, 0].tolist()} == set(range(5))


def test_frost_is_cut_out_anywhere(monkeypatch):
    i, j = torch.meshgrid(torch.arange(80.), torch.arange(90.), indexing='ij')
    monkeypatch.setattr(corruptions, '_frost_pictures',
                        lambda scale, h, w: [torch.stack([i, j, 0*i])[None]/100]*6)
    out = 100/.4*run('frost', 1, x=torch.zeros(400, 3, 16, 20))
    assert (out.diff(dim=2)[:, 0] - 1).abs().max() < 1e-3
    assert (out.diff(dim=3)[:, 1] - 1).abs().max() < 1e-3
    for k,most in ((0, 64), (1, 70)):
        assert out[:, k, 0, 0].min() < 3
        assert most-3 < out[:, k, 0, 0].max() < most
        assert len(out[:, k, 0, 0].round().unique()) > 50


def test_frost_pictures_fit_any_image(monkeypatch):
    pictures = corruptions._frost_pictures(.2, 32, 32)
    assert [tuple(o.shape[2:]) for o in pictures] == [
        (120, 180), (63, 112), (63, 112), (70, 105), (99, 132), (65, 97)]
    assert all(o.shape[2] > 500 and o.shape[3] > 600 and o.min() >= 0 and o.max() <= 1
               for o in corruptions._frost_pictures(.2, 500, 600))
    assert len({o.numpy().tobytes() for o in run(
        'frost', 3, x=torch.zeros(20, 3, 32, 32))}) == 20, 'every image has its own crop'
    corruptions._frost_pictures.cache_clear()
    monkeypatch.setattr(corruptions.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install imaug'):
        run('frost', 1)


def test_the_affine_part_equals_opencv(monkeypatch):
    jitter = 2*torch.rand(len(x), 3, 2, generator=make_generator(3)) - 1
    monkeypatch.setattr(
        corruptions, '_uniform',
        lambda like, generator, *shape: jitter if shape == jitter.shape else torch.zeros(shape))
    corners = np.float32([[26, 26], [26, 6], [6, 6]])
    for image, move, out in zip(x, jitter, run('elastic_transform', 1, 'cifar10-c')):
        M = cv2.getAffineTransform(corners, corners + .08*32*move.numpy())
        assert far(torch.from_numpy(cv2.warpAffine(
            image.permute(1, 2, 0).numpy(), M, (32, 32),
            borderMode=cv2.BORDER_REFLECT_101)).permute(2, 0, 1),
                   out) < .7


def test_no_drops_no_change_where_the_package_goes_black(monkeypatch):
    monkeypatch.setattr(corruptions, '_normal',
                        lambda like, generator, *shape: torch.full(shape, -1.))
    for t in tables:
        for s in range(1, 6):
            assert torch.equal(run('spatter', s, t), x)


def test_water_brightens_and_mud_covers():
    water = run('spatter', 3) - x
    mud = run('spatter', 5)
    assert (water >= 0).all()
    assert water.mean() > .005
    brown = torch.tensor([63., 42, 20]).view(3, 1, 1)/255
    moved = (mud != x).any(1, keepdim=True)
    assert .01 < moved.float().mean() < .9, 'mud hides at least 80 %'
    assert ((mud-brown).abs() <= .21*(x-brown).abs() + 1e-6)[moved.expand_as(x)].all(), (
        'mud hides at least 80 %')


@both
def test_colour_of_black_and_grey(table):
    black = torch.zeros(1, 3, 16, 16)
    grey = torch.full((1, 3, 16, 16), .5)
    c = corruptions._tables[table]
    for s in range(1, 6):
        assert (run('brightness', s, table, black) == c['brightness'][s-1]).all()
        assert (run('saturate', s, table, black) == 0).all()
        out = run('saturate', s, table, grey)
        add = c['saturate'][s-1][1]
        assert (out[:, 0] == .5).all()
        assert (out[:, 1:] - .5*(1-add)).abs().max() < 1e-6


@both
def test_severity(table):
    odd = {'saturate', 'glass_blur', 'frost', 'elastic_transform', 'snow', 'fog',
           'motion_blur', 'spatter'}
    for name in corruption_names:
        size = [far(run(name, s, table), x) for s in range(1, 6)]
        if name not in odd:
            assert all(a < b for a,b in zip(size, size[1:])), (name, size)
        if (name, table) != ('elastic_transform', 'cifar10-c'):
            assert size[4] > 1.03*size[0], (name, size)
        assert size[0] > .5


@everything
def test_promises(name):
    y = torch.eye(10)[torch.arange(6)]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for t in tables:
        for images in (x[-6:], x[-6:, :, :16, :16].double(), x[-6:, :, :17, :30].half()):
            image = images.clone()
            f = corruption(name, 5, t)
            g = make_generator(0)
            out, labels = f(images, y, g)
            assert labels is y
            assert torch.equal(images, image)
            assert out.shape == images.shape
            assert out.dtype == images.dtype
            assert out.data_ptr() != images.data_ptr()
            assert out.min() >= 0
            assert out.max() <= 1
            assert not out.isnan().any()
            assert not torch.equal(out, images)
            assert torch.equal(f(images, y, make_generator(0))[0], out)
            assert torch.equal(f(images, y, g)[0], out) == torch.equal(
                f(images, y, make_generator(1))[0], out) == (name in exact)
    needs = x[:2].clone().requires_grad_()
    assert not corruption(name, 2)(needs, None, make_generator(0))[0].requires_grad
    copies = run(name, 4, x=x[-3:-2].repeat(80, 1, 1, 1))
    assert (len({o.numpy().tobytes() for o in copies}) == 1) == (name in exact), (
        'chance is drawn for each image')
    if name not in ('jpeg_compression', 'impulse_noise', 'spatter'):
        assert ((out.float()*255) % 1).max() > .1, 'not rounded'
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize('name', exact)
def test_without_chance_no_generator_and_no_batch(name):
    f = corruption(name, 3)
    out = f(x, None, None)[0]
    assert (torch.cat([f(o[None], None, None)[0] for o in x]) - out).abs().max() < 1e-6
    assert torch.equal(reference_corruption(name, 3)(x[:2], None, None)[0],
                       reference_corruption(name, 3)(x[:2], None, make_generator(1))[0])


@everything
def test_the_reference_is_the_package(name):
    from imagecorruptions import corrupt
    y = torch.eye(4)
    f = reference_corruption(name, 2)
    before = np.random.get_state()
    out, labels = f(x[:4], y, make_generator(0))
    assert labels is y
    assert out.dtype == x.dtype
    assert torch.equal(f(x[:4], y, make_generator(0))[0], out)
    assert torch.equal(f(x[:4], y, make_generator(1))[0], out) == (name in exact)
    assert all((a == b).all() if isinstance(a, np.ndarray) else a == b
               for a,b in zip(before, np.random.get_state()))
    seed = torch.randint(2**31, (), generator=make_generator(0)).item()
    if name in ('impulse_noise', 'glass_blur'):
        direct = np.stack(
            [corrupt(o, 2, name, seed=(seed+i) % 2**31) for i,o in enumerate(to_uint8(x[:4]))])
    else:
        np.random.seed(seed)
        direct = np.stack([corrupt(o, 2, name) for o in to_uint8(x[:4])])
        np.random.set_state(before)
    assert torch.equal(to_float(direct), out)


def test_a_failing_reference_leaves_numpy_alone(monkeypatch):
    import imagecorruptions
    def broken(*args): raise RuntimeError('broken')
    monkeypatch.setattr(imagecorruptions, 'corrupt', broken)
    before = np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError):
        reference_corruption('fog', 1)(x, None, make_generator(0))
    assert (np.random.get_state()[1] == before).all()


def test_a_transform_knows_its_name():
    f = corruption('snow', np.int64(2), 'cifar10-c')
    assert repr(f) == "corruption('snow', 2, 'cifar10-c')"
    assert eval(repr(f)) == f
    assert hash(f) == hash(eval(repr(f)))
    assert (f.name, f.severity, f.table) == ('snow', 2, 'cifar10-c')
    assert corruption('snow', 2).table == 'imagenet-c'
    r = reference_corruption('snow', 2)
    assert repr(r) == "reference_corruption('snow', 2)"
    assert eval(repr(r)) == r != corruption('snow', 2)
    for o in (f, r):
        assert torch.equal(pickle.loads(pickle.dumps(o))(x[:2], None, make_generator(0))[0],
                           o(x[:2], None, make_generator(0))[0])


@pytest.mark.parametrize('wrong, error, words', [
    (lambda: corruption('rain', 1), ValueError, "`name` must be one of gaussian_noise.*got 'rain'"),
    (lambda: reference_corruption('Fog', 1), ValueError, '`name` must be one of'),
    *[(lambda s=s: corruption('fog', s), ValueError,
       '`severity` must be an integer from 1 to 5; got')
      for s in (0, 6, -1, 2., float('nan'), True, '3', None)],
    (lambda: reference_corruption('fog', 0), ValueError,
     '`severity` must be an integer from 1 to 5; got 0'),
    (lambda: corruption('fog', 1, 'cifar100-c'), ValueError,
     "`table` must be one of imagenet-c, cifar10-c; got 'cifar100-c'"),
    (lambda: corruption('fog', 1)(x, None, None), TypeError,
     '`generator` must be a torch.Generator, as fog is random; got NoneType'),
    (lambda: reference_corruption('glass_blur', 1)(x, None, 0), TypeError,
     '`generator` must be a torch.Generator, as glass_blur is random; got int'),
    (lambda: corruption('contrast', 1)(255*x, None, None), ValueError,
     r'`x` must hold pixels in \[0, 1\]'),
    (lambda: corruption('contrast', 1)(x[:, :1], None, None), ValueError,
     r'`x` must be RGB images .* at least 16x16 .*got shape \(\d+, 1, 32, 32\)'),
    (lambda: corruption('contrast', 1)(x[..., :15], None, None), ValueError,
     '`x` must be RGB images'),
    (lambda: corruption('contrast', 1)(x[..., :15, :], None, None), ValueError,
     '`x` must be RGB images'),
    (lambda: reference_corruption('contrast', 1)(x[..., :31], None, None), ValueError,
     'at least 32x32'),
])
def test_wrong_uses(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()
