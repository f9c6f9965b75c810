"Students that are solved: against the normal equations, apart from each other, and on disk"
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import nn

from robustnb.core import to_float
from robustnb.descriptors import ridge_students
from robustnb.descriptors.ridge_students import (
    FileFeatures, fit_ridge, GaborFeatures, load_student, RidgeStudent, save_student)
from robustnb.descriptors.students import descriptor_model, save_descriptor


class Pixels(nn.Module):
    "Twelve numbers of an image"
    def forward(self, x): return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def faces(n, size=20, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, size, size, 3), dtype=np.uint8)


def answers(n, dim=5, seed=1):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def standardised(student, images):
    return ((student.features(images)-student.mean)/student.deviation).double()


@pytest.mark.parametrize('given, ridge', [({}, .3), (dict(ridge=.2), .2)])
def test_weight_is_the_dual_solution(given, ridge):
    "By the matrix of images, not of features"
    images, d = faces(30), answers(30)
    student = fit_ridge(Pixels(), images, d, **given)
    a = standardised(student, to_float(images))
    b = (d - d.mean(0)).double()
    gram = a @ a.T
    gram.diagonal().add_(ridge*a.square().sum(1).mean())
    assert torch.allclose(student.weight.double(), a.T @ torch.linalg.solve(gram, b), atol=1e-6)
    assert torch.allclose(student.bias, d.mean(0))


def test_learning_is_a_ridge_around_what_was_known():
    "(100 C)^-1 + rows: the normal equations, solved from scratch"
    student = fit_ridge(Pixels(), faces(30), answers(30)).fork()
    known = student.weight.double()
    before = to_float(faces(4, seed=2))
    asked = (before + .1*torch.randn(before.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    said_before, said = answers(4, seed=4), answers(4, seed=5)
    for k in (slice(0, 3), slice(3, 4)):      # in two lessons
        student.learn(asked[k], said[k], before[k], said_before[k])
    change = (said-said_before).double()
    part = 2*student.spread.double()/change.norm(dim=1, keepdim=True)
    a = torch.cat([standardised(student, asked),
                   part*(standardised(student, asked)-standardised(student, before))])
    b = torch.cat([(said-student.bias).double(), part*change])
    prior = torch.linalg.inv(100*student.covariance.double())
    wanted = torch.linalg.solve(prior + a.T @ a, prior @ known + a.T @ b)
    assert torch.allclose(student.weight.double(), wanted, atol=1e-4)
    assert not torch.allclose(known, wanted, atol=1e-2)


def test_forks_learn_apart():
    parent = fit_ridge(Pixels(), faces(30), answers(30))
    kept = parent.weight.clone()
    one, two = parent.fork(), parent.fork()
    x = to_float(faces(6, seed=6))
    one.learn(x[:3], answers(3), x[3:], answers(3, seed=8))
    assert torch.equal(parent.weight, kept) and torch.equal(two.weight, kept)
    assert not torch.allclose(one.weight, kept)
    assert one.fork().rows[0].shape[0] == 0


def test_an_answer_that_did_not_change_is_no_step():
    student = fit_ridge(Pixels(), faces(30), answers(30)).fork()
    x = to_float(faces(2, seed=6))
    student.learn(x, answers(2), x, answers(2))
    assert len(student.rows[0]) == 2 and student.weight.isfinite().all()


def test_old_rows_are_forgotten():
    student = fit_ridge(Pixels(), faces(30), answers(30)).fork()
    x = to_float(faces(200, seed=6))
    student.learn(x, answers(200), x.flip(0), answers(200, seed=9))
    assert [len(o) for o in student.rows] == [ridge_students._MOST]*3


@pytest.mark.parametrize('size', [32, 75, 112, 150])
def test_filters_see_grey_images_of_any_size(size):
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    features = GaborFeatures()
    got = features(x)
    assert got.shape == (2, 3681)
    assert torch.allclose(got, features(x[:, [2, 0, 1]]), atol=1e-5)      # colours do not matter
    slope, = torch.autograd.grad(got.sum(), x)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_filters_are_slow_sums():
    "One place of one filter, as a double sum"
    x = torch.rand(1, 1, 75, 75, generator=torch.Generator().manual_seed(0))
    features = GaborFeatures()
    k, row, column = 21, 30, 41
    even, odd = (sum(features.filters[2*k+o, 0, i, j]*x[0, 0, row-7+i, column-7+j]
                     for i in range(15) for j in range(15)) for o in (0, 1))
    pairs = nn.functional.conv2d(x, features.filters, padding=7)[0, :, row, column]
    assert torch.allclose(pairs[2*k:2*k+2], torch.stack([even, odd]), atol=1e-5)
    assert features.filters.sum((1, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(features.filters.flatten(1).norm(dim=1), torch.ones(48))


def gabor(wavelength, angle):
    "A wave under a bell of .4 wavelengths, 15 pixels high and wide; no mean is left"
    at = np.arange(15)-7
    row, column = np.meshgrid(at, at, indexing='ij')
    bell = np.exp(-np.abs(row + 1j*column)**2/(2*(.4*wavelength)**2))
    wave = bell*np.exp(2j*np.pi/wavelength*(column*np.cos(angle) + row*np.sin(angle)))
    wave -= bell*wave.sum()/bell.sum()
    return [o/(o**2).sum()**.5 for o in (wave.real, wave.imag)]


def test_features_by_hand():
    "Square roots of the amplitudes, averaged over patches, then the image itself, averaged too"
    x = np.random.default_rng(0).random((75, 75))
    got = GaborFeatures()(torch.tensor(x, dtype=torch.float32).expand(1, 3, -1, -1))[0].double().numpy()
    bands = [(int(k*75/12), int(np.ceil((k+1)*75/12))) for k in range(12)]
    amplitudes = iter(got[:24*144].reshape(24, 12, 12))
    for wavelength in (4.4, 7., 11.):
        for k in range(8):
            even, odd = (correlate(x, o, mode='constant') for o in gabor(wavelength, np.pi*k/8))
            roots = (even**2 + odd**2 + 1e-4)**.25
            patches = [[roots[a:b, c:d].mean() for c, d in bands] for a, b in bands]
            assert next(amplitudes) == pytest.approx(np.array(patches), abs=1e-4)
    assert got[24*144:].reshape(15, 15) == pytest.approx(x.reshape(15, 5, 15, 5).mean((1, 3)), abs=1e-5)


def test_a_number_that_never_changes_counts_for_nothing():
    class Flat(nn.Module):
        def forward(self, x): return torch.cat([Pixels()(x), 1e-9*x[:, 0, :1, 0] + .1], 1)
    plain, more = (fit_ridge(o, faces(30), answers(30)) for o in (Pixels(), Flat()))
    other = .3 + .5*to_float(faces(9, seed=3))
    assert torch.allclose(more(other), plain(other), atol=1e-3)


def exported(path, size=16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4*7*7, 6)).eval()
    x = torch.rand(2, 3, size, size)
    shapes = ({0: torch.export.Dim('n')},)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(shapes[0],)), path)
    return net, x


def test_a_network_in_a_file(tmp_path):
    net, x = exported(tmp_path/'net.pt2')
    features = FileFeatures(tmp_path/'net.pt2', 16, mean=100, std=50)
    assert torch.allclose(features(x), net((255*x-100)/50), atol=1e-5)
    student = fit_ridge(features, faces(30), answers(30))
    again = load_student(save_student(student, tmp_path/'student.pt'))
    (tmp_path/'net.pt2').unlink()
    y = to_float(faces(3, seed=7))
    assert torch.allclose(again(y), student(y), atol=1e-5)
    kept = again.fork()
    kept.learn(y[:1], answers(1), y[1:2], answers(1, seed=3))
    assert not torch.allclose(kept(y), again(y), atol=1e-3)


def test_a_descriptor_network_is_a_student_too(tmp_path):
    model = descriptor_model('ResNet_18', 8, .125, 32)
    again = load_student(save_descriptor(model, tmp_path/'model.pt'))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(again(x), model(x))


@pytest.mark.parametrize('call, text', [
    (lambda d: fit_ridge(Pixels(), faces(5), answers(5), ridge=-1), '`ridge` must be positive'),
    (lambda d: fit_ridge(Pixels(), faces(5), answers(4)), '`descriptors` must have one row'),
    (lambda d: fit_ridge(nn.Identity(), faces(5), answers(5)), '`features` must answer with'),
    (lambda d: fit_ridge(Pixels(), 0*faces(5), answers(5)), 'differ between images; those of the 5'),
    (lambda d: FileFeatures(d/'net.bin'), '`path` must be a network'),
    (lambda d: FileFeatures(d/'net.onnx', size=0), '`size` must be at least 1'),
    (lambda d: save_student(RidgeStudent(Pixels(), 12, 5), d/'a.pt'), 'FileFeatures')])
def test_refusals(call, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
