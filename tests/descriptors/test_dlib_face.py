"dlib's face network: the file, the twin against the library, alignment"
import importlib.util

import numpy as np
import pytest
import torch
from skimage.data import astronaut

from robustnb.core import to_float
from robustnb.descriptors import dlib_face
from robustnb.descriptors.dlib_face import align_faces, dlib_box, DlibTwin, read_dlib

installed = all(importlib.util.find_spec(o) for o in ('dlib', 'face_recognition_models'))
needs_dlib = pytest.mark.skipif(not installed, reason='needs robustnb[faces]')


def number(value):
    size = max(1, (abs(value).bit_length()+7)//8)
    return bytes([size | (0x80 if value < 0 else 0)]) + abs(value).to_bytes(size, 'little')


def matrix(values, shape, version=2):
    head = number(2) + number(3)     # outputs, inputs
    tensor = b''.join(map(number, (version, *shape)))
    return b'\x01\x04fc_2' + head + tensor + np.asarray(values, '<f4').tobytes()


@pytest.mark.parametrize('value', [0, 1, 15, 16, 127, 128, 255, 256, 70000, -1, -128, -300])
def test_a_number_comes_back(value):
    raw = b'xx' + number(value) + b'yy'
    assert dlib_face._integer(raw, 2) == (value, len(raw)-2)


def test_a_matrix_is_read_and_a_damaged_one_refused(tmp_path):
    values = np.arange(6)+.5
    good = matrix(values, (2, 1, 1, 3))
    (tmp_path/'a').write_bytes(b'before' + good + b'after')
    (name, read, numbers), = read_dlib(tmp_path/'a')
    assert (name, numbers) == ('fc_2', [])
    assert read.tolist() == values.tolist()
    for bad in (good[:-1], good[:12], matrix(values, (2, 1, 1, 3), version=3), b'', b'text'):
        (tmp_path/'b').write_bytes(bad)
        with pytest.raises(ValueError, match='`path` must be a network written by dlib'):
            read_dlib(tmp_path/'b')


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'robustnb\[faces\]'):
        DlibTwin()


@needs_dlib
def test_twin_is_the_library():
    "On noise and smooth images too, where a wrong border or pooling would show"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 10, 10, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(150, 150), mode='bilinear')
    x = to_float((255*torch.cat([smooth, torch.rand(4, 3, 150, 150, generator=generator)]))
                 .round().byte().permute(0, 2, 3, 1).numpy())
    difference = (DlibTwin()(x) - dlib_box()(x)).abs().max()
    assert difference < 1e-5


@needs_dlib
def test_twin_has_a_gradient():
    x = torch.rand(1, 3, 150, 150, generator=torch.Generator().manual_seed(1)).double()
    twin = DlibTwin().double()
    step = torch.zeros_like(x)
    step[0, 1, 70:80, 60:80] = 1e-6
    x.requires_grad_(True)
    slope, = torch.autograd.grad(twin(x)[0, :5].sum(), x)
    with torch.no_grad():
        change = (twin(x + step) - twin(x - step))[0, :5].sum()/2
    assert change.abs() > 1e-8
    assert torch.allclose((slope*step).sum(), change, rtol=1e-3)


@needs_dlib
@pytest.mark.parametrize('shape', [(1, 3, 112, 112), (1, 1, 150, 150)])
def test_box_wants_chips(shape):
    with pytest.raises(ValueError, match='`x` must be'):
        dlib_box()(torch.rand(shape))


@needs_dlib
def test_alignment_undoes_a_turn_and_a_move():
    photo = astronaut()
    turned = np.rot90(photo, 2)       # upside down: no face
    moved = np.pad(photo, ((60, 0), (40, 0), (0, 0)))[:512, :512]
    chips, found = align_faces([photo, turned, moved, photo[::2, ::2]])
    assert found.tolist() == [0, 2, 3]
    twin = DlibTwin()
    d = twin(to_float(chips))
    assert (d[1:]-d[0]).norm(dim=1).max() < .25
    assert align_faces([np.zeros((50, 50, 3), np.uint8)])[0].shape == (0, 150, 150, 3)
    with pytest.raises((TypeError, ValueError)):
        align_faces([photo.astype(np.float32)])
