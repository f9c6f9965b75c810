"Fractals and what images are mixed with: sizes as published, weights by hand, a walk of one point"
import numpy as np
import pytest
import torch

from robustnb.augmentation import mixing as M
from robustnb.augmentation.transforms import describe
from robustnb.augmentation.history import apply_noted
from robustnb.core import make_generator

rng = np.random.default_rng(0)
pictures = rng.integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)
x = torch.from_numpy(rng.random((400, 3, 8, 8), np.float32))
y = torch.eye(4)[torch.arange(400) % 4]


def seeded(): return make_generator(0)


@pytest.mark.parametrize('k', range(2, 9))
def test_sizes_of_the_maps_are_those_of_the_paper(k):
    sizes = M._singular_values(500, k, np.random.default_rng(k))
    total = (sizes[..., 0] + 2*sizes[..., 1]).sum(1)
    assert sizes.min() >= 0
    assert sizes.max() <= 1
    assert (sizes[..., 0] >= sizes[..., 1] - 1e-12).all()
    assert total.min() >= (5+k)/2 - 1e-9
    assert total.max() <= (6+k)/2 + 1e-9
    assert total.std() > .1, 'they are drawn, not fixed'
    matrices, shifts = M._maps(500, k, np.random.default_rng(k))
    same = np.linalg.svd(matrices, compute_uv=False)
    assert np.allclose(same, sizes, atol=1e-6)
    assert abs(shifts).max() <= 1


def test_points_follow_the_maps_of_their_own_picture():
    "Two pictures whose two maps are the same: one halves, one stands still"
    matrices = np.stack([[np.eye(2)/2]*2, [np.zeros((2, 2))]*2])
    shifts = np.stack([np.zeros((2, 2)), [[.25, -.5]]*2])
    colors = np.stack([np.ones((2, 3)), np.zeros((2, 3))])
    places, tints = M._paths(matrices, shifts, colors, 5, 6, np.random.default_rng(0))
    assert np.allclose(places[0, 1:], places[0, :-1]/2)
    assert np.allclose(places[1], [.25, -.5])
    assert np.allclose(tints[0, :, 0, 0], 1 - .5**np.arange(2, 8))
    assert np.allclose(tints[1, :, 0, 0], .5**np.arange(2, 8))


def test_a_pixel_is_the_mean_colour_of_its_points_over_the_ground():
    "All points in the corners of the picture, twice as many in one of them"
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [1, 1]], np.float32)
    places = np.tile(corners, (1, 40, 1))[:, None]
    tints = np.ones((1, 1, 200, 3), np.float32)*(.2, .4, .6)
    out = M._drawn(places, tints.astype(np.float32), 8, np.array([[1., 0, 0]]))[0]
    assert np.allclose(out[7, 7], (.2, .4, .6), atol=1e-6)
    assert np.allclose(out[4, 4], (1, 0, 0))
    light = np.sqrt(np.log1p(40)/np.log1p(80))
    assert np.allclose(out[0, 0], light*np.array((.2, .4, .6)) + (1-light)*np.array((1, 0, 0)), atol=1e-6)


def test_fractals_are_pictures():
    made = M.fractals(40, 16, seed=3)
    assert (made == M.fractals(40, 16, seed=3)).all()
    assert len({o.tobytes() for o in np.concatenate([made, M.fractals(40, 16, seed=4)])}) == 80
    float_made = made.astype(float)
    assert np.median(float_made.std((1, 2))) > 10
    inside = abs(np.diff(float_made, axis=2)).mean()
    shuffled = np.random.default_rng(0).permuted(float_made.reshape(40, 256, 3), axis=1)
    assert inside < .7*abs(np.diff(shuffled.reshape(float_made.shape), axis=2)).mean(), 'noise is no picture'
    assert M.fractals(3, 40).shape == (3, 40, 40, 3)
    for n, size in ((0, 32), (3, 4)):
        with pytest.raises(ValueError, match='`n`'):
            M.fractals(n, size)


def test_pictures_are_cut_anywhere_and_mirrored():
    marked = np.arange(12*12, dtype=np.uint8).reshape(1, 12, 12, 1).repeat(3, 3)
    cut = (M._cut(marked, 3000, 8, 8, seeded())*255).round().long()[:, 0]
    mirrored = cut[:, 0, 0] > cut[:, 0, 1]
    assert .45 < mirrored.double().mean() < .55
    plain = torch.where(mirrored[:, None, None], cut.flip(2), cut)
    assert (plain[:, 1] - plain[:, 0] == 12).all()
    assert set(plain[:, 0, 0].tolist()) == {12*i + j for i in range(5) for j in range(5)}


def test_weights_of_a_combination():
    "Means over many draws of Beta(b,1) and Beta(1,b): b/(b+1) and 1/(b+1)"
    n, beta = 200_000, 3.
    a = torch.full((n, 1, 1, 1), .9)
    b = torch.full((n, 1, 1, 1), .6)
    out = M._combined(a, b, beta, seeded()).double().flatten()
    g = seeded()
    chance = torch.rand(3, n, 1, 1, 1, generator=g).flatten(1).double()
    is_sum = chance[2] < .5
    assert abs(is_sum.double().mean() - .5) < .01
    expected = (beta/(beta+1)*.8 + 1/(beta+1)*.2 + 1)/2
    assert abs(out[is_sum].mean() - expected) < .003
    # E of a^p for p ~ Beta(b,1) is the integral of b p^(b-1) a^p
    p = (torch.arange(100_000).double() + .5)/100_000
    first = (beta*p**(beta-1)*1.8**p).mean()
    second = (beta*(1-p)**(beta-1)*1.2**p).mean()
    assert abs(out[~is_sum].clamp_max(1).mean() - (first*second/2).clamp_max(1)) < .02


def test_what_pixmix_leaves():
    kept = lambda **o: (M.pixmix(pictures, **o)(x, y, seeded())[0] == x).flatten(1).all(1).double().mean()
    same = lambda x, y, generator: (x, y)
    assert kept(operations=[same], rounds=0) == 1
    assert abs(kept(operations=[same], rounds=4) - 1/5) < .06, 'the number of rounds is 0 to 4'
    assert kept(rounds=0) > kept(rounds=4)
    out, labels = M.pixmix(pictures)(x, y, seeded())
    assert labels is y
    assert out.min() >= 0
    assert out.max() <= 1
    assert (M.pixmix(pictures)(x, y, make_generator(1))[0] != out).any()
    near = M.pixmix(pictures, beta=1e6, operations=[same])(x, y, seeded())[0]
    assert (near - x).abs().max() < 1e-3, 'with a large beta the image is left'


def test_the_history_has_the_number_of_rounds():
    same = lambda x, y, generator: (x, y)
    out, _, notes = apply_noted(M.pixmix(pictures, operations=[same]), x, y, seeded())
    assert set(notes) == {f'rounds={k}' for k in range(5)}
    kept = (out == x).flatten(1).all(1)
    assert all(kept[i] for i, o in enumerate(notes) if o == 'rounds=0')
    assert not any(kept[i] for i, o in enumerate(notes) if o == 'rounds=4')
    _, _, notes = apply_noted(M.pixmix(pictures), x, y, seeded())
    assert set(notes) == {f'rounds={k}' for k in range(5)}, 'not what copies went through that were dropped'


@pytest.mark.parametrize('bad', (dict(rounds=-1), dict(beta=0), dict(beta=float('nan'))))
def test_pixmix_refuses(bad):
    with pytest.raises(ValueError, match=f'`{[*bad][0]}`'):
        M.pixmix(pictures, **bad)


@pytest.mark.parametrize('make, name', (
    (lambda: M.pixmix(operations=[]), 'operations'), (lambda: M.pixmix(pictures[:0]), 'pictures'),
    (lambda: M.pixmix(pictures/255), 'pictures'), (lambda: M.augmix(0), 'severity'),
    (lambda: M.augmix(3, 0), 'width')))
def test_options_are_refused_when_they_are_given(make, name):
    with pytest.raises(ValueError, match=f'`{name}`'):
        make()


@pytest.mark.parametrize('wrong', (pictures[:, :7], pictures[..., :1]))
def test_pictures_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match='`pictures`'):
        M.pixmix(wrong)(x, y, seeded())


def test_pictures_are_made_at_the_first_image_once_and_are_the_same_as_given(monkeypatch):
    asked = []
    def few(n, size):
        asked.append((n, size))
        return np.random.default_rng(size).integers(0, 256, (7, size, size, 3), dtype=np.uint8)
    monkeypatch.setattr(M, 'fractals', few)
    M._thousand.cache_clear()
    lazy, again = M.pixmix(), M.pixmix(rounds=4)
    assert not asked
    assert describe(lazy) == describe(M.pixmix(np.zeros((1000, 8, 8, 3), np.uint8)))
    out = lazy(x, y, seeded())[0]
    assert (again(x, y, seeded())[0] == out).all()
    assert asked == [(1000, 32)]
    assert (M.pixmix(few(1000, 32))(x, y, seeded())[0] == out).all()
    large = torch.rand(2, 3, 40, 36, generator=seeded())
    assert lazy(large, y[:2], seeded())[0].shape == large.shape
    assert asked[-1] == (1000, 40)
    with pytest.raises(ValueError, match='`pictures` must have 1 channels'):
        lazy(x[:, :1], y, seeded())
    M._thousand.cache_clear()


def test_every_augmentation_has_its_name():
    names = [describe(o) for o in (M.augmix(1, 2), M.trivial_augment(), M.auto_augment())]
    assert names == ['augmix(1, 2)', 'trivial_augment()', 'auto_augment()']
    assert describe(M.pixmix(pictures, 2)).startswith("pixmix(7 pictures, 2, 3, posterize(")
    few = x[:20].repeat(1, 1, 4, 4)
    for make in (M.augmix, M.trivial_augment, M.auto_augment):
        out = make()(few, y[:20], seeded())[0]
        assert (out == make()(few, y[:20], seeded())[0]).all()
        assert (out != few).any()
    stronger = [(M.augmix(s)(few, y[:20], seeded())[0] - few).abs().mean() for s in (1, 10)]
    assert stronger[0] < stronger[1]


def test_pictures_of_other_channels_say_the_way_out():
    grey = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r'must have 1 channels.*fractals\(1000\)\[..., :1\]'):
        M.pixmix(np.zeros((3, 16, 16, 3), np.uint8), operations=[lambda x, y, g: (x, y)])(
            grey, torch.eye(2), torch.Generator().manual_seed(0))
