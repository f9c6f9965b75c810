"""Names that are safe, photographs cut as torchvision cuts them, and zip files of faces that are
read without trust."""
import io, struct, zipfile, zlib

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms as T

from robustnb.data import NamedSet
from robustnb.descriptors.faces import load_faces, prepare


def pgm(h, w, seed=0, top=255):
    a = np.random.default_rng(seed).integers(256, size=(h, w), dtype=np.uint8)
    pixels = a.tobytes() if top < 256 else a.astype('>u2').tobytes()
    return b'P5\n%d %d\n%d\n' % (w, h, top) + pixels


def zipped(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, raw in files.items():
            z.writestr(name, raw)
    return path


GOOD = {f'faces/{p}/{i}.pgm': pgm(112, 92, int(p[1:])*10 + i) for p in ('s1', 's2', 's10')
        for i in (1, 2)}


def some(n=4, **more):
    return NamedSet(np.arange(n*8*8*3, dtype=np.uint8).reshape(n, 8, 8, 3), np.arange(n) % 2,
                    2, **more)


@pytest.mark.parametrize('name', ['', 'a/b.png', 'a\\b.png', '..', '.hidden', 'a|b', 'c:x',
                                  'a\nb', 'a\0b', ' a', 'a ', 'x'*201, 7, None])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match='plain file names'):
        some(2, names=['ok.png', name])


def test_names_are_different_one_per_image_and_follow_their_images():
    data = some(names=list('dcba'))
    assert data[[2, 0]].names == ('b', 'd')
    assert data[data.y == 1].names == ('c', 'a')
    assert data[1:3].names == ('c', 'b')
    assert (data[[2, 0]].images == data.images[[2, 0]]).all()
    assert type(data[1:2]) is NamedSet
    assert data.at([['a', 'b'], ['d', 'd']]).tolist() == [[3, 2], [0, 0]]
    assert data.at('c').shape == ()
    assert some(11).names[:2] == ('00.png', '01.png')
    assert some(10).names[9] == '9.png'
    with pytest.raises(ValueError, match="more than once: 'a'"):
        some(3, names=['a', 'b', 'a'])
    with pytest.raises(ValueError, match='got 2 for 3 images'):
        some(3, names=['a', 'b'])
    with pytest.raises(TypeError, match='list of names'):
        some(3, names='abc')
    with pytest.raises(ValueError, match="1 of 2 are missing: 'z'. Correct"):
        data.at(['z', 'a', 'z'])
    with pytest.raises(ValueError, match="6 of 7 are missing: '0', '1', '2', '3', '4' and 1 more"):
        data.at(['a', *'012345'])


@pytest.mark.parametrize('shape', [(250, 250), (251, 249), (224, 224), (225, 227), (100, 100),
                                   (101, 300), (223, 221), (1, 500), (300, 92)])
@pytest.mark.parametrize('crop, size', [(224, 112), (112, 112), (113, 50), (40, 112)])
def test_the_cut_is_torchvisions(shape, crop, size):
    a = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    want = np.asarray(T.Compose([T.CenterCrop(crop), T.Resize((size, size))])(Image.fromarray(a)))
    assert np.array_equal(prepare(a, crop, size), want)


def test_grey_is_repeated_and_other_arrays_are_refused():
    a = np.random.default_rng(0).integers(256, size=(112, 92), dtype=np.uint8)
    out = prepare(a, 112)
    assert np.array_equal(out, prepare(a[..., None], 112))
    assert np.array_equal(out, prepare(a))
    assert np.array_equal(out[:, 10:102], np.stack([a]*3, 2))
    assert not out[:, :10].any()
    assert not out[:, 102:].any()
    out[0, 0] = 1                       # the caller may write to it
    for bad in (np.zeros((9, 9, 4), np.uint8), np.zeros((3, 9, 9), np.uint8), np.zeros((9, 9)),
                np.zeros((2, 9, 9, 3), np.uint8), np.zeros((0, 9), np.uint8)):
        with pytest.raises(ValueError, match='channels last'):
            prepare(bad)
    for wrong in (dict(crop=0), dict(size=0), dict(crop=2.5), dict(size=10**9),
                  dict(crop=float('nan'))):
        with pytest.raises(ValueError, match=f'`{list(wrong)[0]}` must be a whole number'):
            prepare(a, **wrong)


@pytest.mark.parametrize('h, w', [(224, 224), (224, 200), (112, 92), (40, 81), (1, 300), (999, 5)])
@pytest.mark.parametrize('size', [112, 224, 33])
def test_without_a_crop_the_whole_picture_is_there(h, w, size):
    a = np.random.default_rng(0).integers(1, 256, size=(h, w, 3), dtype=np.uint8)
    sides = [max(1, round(size*o/max(h, w))) for o in (w, h)]
    left = (size-sides[0])//2
    top = (size-sides[1])//2
    want = np.zeros((size, size, 3), np.uint8)
    want[top:top+sides[1], left:left+sides[0]] = np.asarray(Image.fromarray(a).resize(sides, 2))
    assert np.array_equal(prepare(a, size=size), want)


def test_white_at_the_edge_is_lost_by_a_crop_alone():
    a = np.full((224, 224, 3), 60, np.uint8)
    a[:, :56] = a[:, -56:] = 255
    assert (prepare(a, size=224) == 255).mean() == .5
    assert not (prepare(a, 112, 224) == 255).any()


def test_faces_of_several_sizes_from_a_folder_or_a_zip_file(tmp_path):
    files = {'a/1.pgm': pgm(224, 224), 'a/2.pgm': pgm(224, 200), 'b/1.pgm': pgm(50, 300)}
    for name, raw in files.items():
        (tmp_path/'loose'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'loose'/name).write_bytes(raw)
    packed = zipped(tmp_path/'f.zip', files)
    for given in (packed, tmp_path/'loose'):
        faces = load_faces(given, size=64)
        assert faces.names == ('a_1.png', 'a_2.png', 'b_1.png')
        assert faces.classes == ('a', 'b')
        for raw, image in zip(files.values(), faces.images):
            assert np.array_equal(image, prepare(np.asarray(Image.open(io.BytesIO(raw))), size=64))
    assert np.array_equal(load_faces(packed, 200, 64).images, load_faces(tmp_path/'loose', 200, 64).images)
    assert not np.array_equal(load_faces(packed, 200, 64).images[0], load_faces(packed, size=64).images[0])


def test_faces_are_read_by_identity(tmp_path):
    faces = load_faces(zipped(tmp_path/'f.zip',
                              GOOD | {'faces/README': b'hello', 'faces/.x.pgm': b''}))
    assert faces.classes == ('s1', 's10', 's2')
    assert faces.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert faces.names == ('s1_1.png', 's1_2.png', 's10_1.png', 's10_2.png', 's2_1.png', 's2_2.png')
    assert faces.images.shape == (6, 112, 112, 3)
    for path, a in zip(('s1/1', 's1/2', 's10/1', 's10/2', 's2/1', 's2/2'), faces.images):
        assert a[:, 10:102, 1].tobytes() == GOOD[f'faces/{path}.pgm'][-112*92:]
    bare = load_faces(zipped(tmp_path/'g.zip', {k[6:]: v for k, v in GOOD.items()}), crop=90,
                      size=30)
    assert bare.names == faces.names
    assert np.array_equal(bare.images[3], prepare(faces.images[3, :, 10:102], 90, 30))


def png_claiming(width, height):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack('>I', len(data)) + checked + struct.pack('>I', zlib.crc32(checked))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b'IDAT', zlib.compress(bytes(1000)))
    return b'\x89PNG\r\n\x1a\n' + header + pixels + chunk(b'IEND', b'')


@pytest.mark.parametrize('more, problem', [
    ({'../s2/3.pgm': pgm(112, 92)}, 'points outside'),
    ({'/s2/3.pgm': pgm(112, 92)}, 'points outside'),
    ({'..\\s2\\3.pgm': pgm(112, 92)}, 'points outside'),
    ({'C:\\s2\\3.pgm': pgm(112, 92)}, 'points outside'),
    ({'faces/s2/3.pgm': pgm(112, 92)[:-9]}, 's2/3.pgm. .*cannot be read'),
    ({'faces/s2/3.pgm': pgm(112, 92, top=65535)}, 'more than 8 bits'),
    ({'faces/s2/3.png': png_claiming(9000, 9000)}, 'over the limit'),
    ({'faces/s2/3.pgm': b'x'}, 'cannot be read'),
    ({'faces/s2/3.pgm': bytes(2**26+1)}, 'over the limit'),
    ({'faces/s2/1.bmp': GOOD['faces/s2/1.pgm']}, "more than once: 's2_1.png'"),
    ({'faces/x/y/3.pgm': b''}, 'one depth')])
def test_a_zip_file_that_is_wrong_is_refused_by_name(tmp_path, more, problem):
    with pytest.raises(ValueError, match=problem):
        load_faces(zipped(tmp_path/'f.zip', GOOD | more))
    assert [o.name for o in tmp_path.iterdir()] == ['f.zip']


def test_a_zip_file_that_is_none(tmp_path):
    raw = zipped(tmp_path/'f.zip', GOOD).read_bytes()
    (tmp_path/'f.zip').write_bytes(raw[:len(raw)//2])
    with pytest.raises(ValueError, match='damaged'):
        load_faces(tmp_path/'f.zip')
    with pytest.raises(FileNotFoundError):
        load_faces(tmp_path/'none.zip')
    with pytest.raises(ValueError, match='2 classes'):
        load_faces(zipped(tmp_path/'one.zip', {'s1/1.pgm': pgm(9, 9)}))
    with pytest.raises(ValueError, match='must hold images'):
        load_faces(zipped(tmp_path/'empty.zip', {}))
    twice = zipped(tmp_path/'t.zip', GOOD)
    with zipfile.ZipFile(twice, 'a') as z, pytest.warns(UserWarning):
        z.writestr('faces/s1/1.pgm', pgm(112, 92, 5))
    with pytest.raises(ValueError, match="'faces/s1/1.pgm' twice"):
        load_faces(twice)
