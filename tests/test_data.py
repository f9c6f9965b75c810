"Image sets: what is read is what was written, and damaged or mislabelled input is refused by name."
import io, os, warnings, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from robustnb import data as D
from robustnb.data import (
    cifar10, cifar100, digits, ImageSet, load_data, load_folder, load_npy, load_splits, load_zip,
    split_data, subset)

def random_set(n=12, k=3, size=6, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return ImageSet(rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8),
                    np.arange(n) % k, k)

def encode(image, kind='PNG', **kw):
    f = io.BytesIO()
    Image.fromarray(image).save(f, kind, **kw)
    return f.getvalue()

def tree(data, splits=('test',), kind='PNG', suffix='png'):
    "File names and contents: split/class/number for every split"
    return {f'{s}/{data.classes[k]}/{i:03d}.{suffix}': encode(im, kind) for s in splits
            for i,(im, k) in enumerate(zip(data.images, data.y))}

def write(folder, files):
    for name,content in files.items():
        p = Path(folder)/name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(content)
    return Path(folder)

def pack(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', compression) as z:
        for name,content in files.items():
            z.writestr(name, content)
    return path

def same(a, b):
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.classes == b.classes

# The image set

def test_hard_labels_become_one_hot():
    data = ImageSet(np.zeros((3, 4, 5, 1), np.uint8), [2, 0, 1], ['a', 'b', 'c'])
    assert data.labels.dtype == np.float32
    assert data.y.dtype == np.int64
    np.testing.assert_array_equal(data.labels, [[0,0,1], [1,0,0], [0,1,0]])
    assert repr(data) == 'ImageSet(3 images 4x5x1, 3 classes, 1 a class)'
    assert data.x.shape == (3, 1, 4, 5)
    assert data.x.dtype == torch.float32

def test_pixels_reach_the_model_in_place():
    data = random_set()
    x = data.x
    assert x[2, 1, 3, 4].item() == pytest.approx(data.images[2, 3, 4, 1]/255)
    assert 0 <= x.min()
    assert x.max() <= 1

def test_indexing_by_slice_positions_and_mask():
    data = random_set()
    np.testing.assert_array_equal(data[2:5].images, data.images[2:5])
    np.testing.assert_array_equal(data[np.array([4, 1])].y, data.y[[4, 1]])
    assert len(data[data.y == 2]) == 4
    assert data[data.y == 2].classes == data.classes
    with pytest.raises(TypeError, match=r'\[3:4\]'):
        data[3]
    with pytest.raises(ValueError, match='non-empty'):
        data[data.y > 9]
    with pytest.raises(IndexError):
        data[np.array([12])]

BAD = [
    (np.zeros((2, 4, 4, 3)), [0, 1], 2, TypeError, 'must be uint8; got float64'),
    (torch.zeros(2, 3, 4, 4), [0, 1], 2, TypeError, 'to_uint8'),
    (np.zeros((4, 4, 3), np.uint8), [0, 1], 2, ValueError, r'\(N,H,W,C\).*\(4, 4, 3\)'),
    (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], 2, ValueError, '1 or 3 channels last'),
    (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), 2, ValueError, 'non-empty'),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 1], 2, ValueError, 'got 3 for 2 images'),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, 2], 2, ValueError, r'\[0, 2\); got 2 at position 1'),
    (np.zeros((2, 4, 4, 3), np.uint8), [-1, 0], 2, ValueError, r'got -1 at position 0'),
    (np.zeros((2, 4, 4, 3), np.uint8), [0., 1.], 2, TypeError, 'whole class numbers; got float64'),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, 1], None, ValueError, '`classes` must be given'),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, 1], ['cat', 'cat'], ValueError, "'cat' more than once"),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, 0], ['cat'], ValueError, 'at least 2 classes'),
    (np.zeros((2, 4, 4, 3), np.uint8), [[1., 0], [.5, .4]], None, ValueError,
     r'row 1 is \[0.5, 0.4\] \(1 such'),
    (np.zeros((2, 4, 4, 3), np.uint8), [[1.5, -.5], [1, 0]], None, ValueError, 'row 0'),
    (np.zeros((2, 4, 4, 3), np.uint8), [[np.nan, 1], [1, 0]], None, ValueError, 'row 0 is .nan'),
    (np.zeros((2, 4, 4, 3), np.uint8), [[np.inf, 0], [1, 0]], None, ValueError, 'row 0 is .inf'),
    (np.zeros((2, 4, 4, 3), np.uint8), [[1., 0], [0, 1]], 3, ValueError,
     r'K = 3 classes; got shape \(2, 2\)'),
]

@pytest.mark.parametrize('images,labels,classes,kind,message', BAD)
def test_bad_image_sets_are_refused(images, labels, classes, kind, message):
    with pytest.raises(kind, match=message):
        ImageSet(images, np.asarray(labels), classes)

# Digits, splits and subsets

def test_digits_are_the_real_ones():
    raw = load_digits()
    data = digits(size=8)
    np.testing.assert_array_equal(data.images[..., 0], np.round(raw.images*255/16))
    np.testing.assert_array_equal(data.y, raw.target)
    assert (data.images == data.images[..., :1]).all()
    assert repr(digits()) == 'ImageSet(1797 images 32x32x3, 10 classes, 174-183 a class)'

def test_digits_split_is_fixed_and_disjoint():
    everything = digits(size=8)
    test = digits('test', 8)
    np.testing.assert_array_equal(test.images, split_data(everything, 500/1797, seed=0)[0].images)
    assert (len(digits('train', 8)), len(test)) == (1297, 500)
    with pytest.raises(ValueError, match="'train', 'test' or 'all'.*'val'"):
        digits('val')
    with pytest.raises(ValueError, match='`size`'):
        digits(size=0)

@pytest.mark.parametrize('fraction', [.1, 1/3, .5, .9])
def test_split_is_stratified_and_complete(fraction):
    data = random_set(101, 4, 3)
    a, b = split_data(data, fraction, seed=1)
    rows = lambda d: sorted((im.tobytes(), k) for im,k in zip(d.images, d.y))
    assert rows(data) == sorted(rows(a)+rows(b))
    assert len(a) == round(101*fraction)
    quota = np.bincount(data.y)*fraction
    assert (abs(np.bincount(a.y, minlength=4)-quota) < 1).all()
    same(a, split_data(data, fraction, seed=1)[0])
    assert rows(a) != rows(split_data(data, fraction, seed=2)[0])

def test_split_refuses_fractions_that_leave_nothing():
    for fraction in (0, 1, 1.5, float('nan')):
        with pytest.raises(ValueError, match=r'inside \(0, 1\)'):
            split_data(random_set(), fraction, 0)
    with pytest.raises(ValueError, match='leaves one part empty'):
        split_data(random_set(), .01, 0)

@pytest.mark.parametrize('n', [3, 7, 11, 12])
def test_subset_is_balanced_nested_and_without_replacement(n):
    data = random_set(30, 3)
    some = subset(data, n, seed=0)
    counts = np.bincount(some.y, minlength=3)
    assert len(some) == n
    assert np.ptp(counts) <= 1
    rows = lambda d: {im.tobytes() for im in d.images}
    assert len(rows(some)) == n
    assert rows(some) < rows(subset(data, n+5, seed=0))
    same(some, subset(data, n, seed=0))
    assert rows(some) != rows(subset(data, n, seed=1))

def test_subset_keeps_labels_with_images_and_mixes_classes():
    data = random_set(60, 3)[np.argsort(np.arange(60) % 3, kind='stable')]
    where = {im.tobytes(): k for im,k in zip(data.images, data.y)}
    some = subset(data, 30, 0)
    assert [where[im.tobytes()] for im in some.images] == some.y.tolist()
    assert len(set(some.y[:10])) > 1

def test_subset_names_what_is_missing():
    data = ImageSet(random_set(9, 3).images, [0]*5+[1]*3+[2], ['ant', 'bee', 'cow'])
    with pytest.raises(ValueError, match='fewer images than classes; got 2 for 3'):
        subset(data, 2, 0)
    with pytest.raises(ValueError, match="needs 2 images of class 'cow'; there are 1"):
        subset(data, 6, 0)
    with pytest.raises(ValueError, match="class 'cow'; there are 0"):
        subset(data[:8], 3, 0)

@pytest.mark.parametrize('n', [1, 2, 3, 6, 8, 9, 50])
def test_subset_at_most_takes_what_there_is(n):
    "By hand: classes of 5, 3 and 1 images are taken from in turn"
    data = ImageSet(random_set(9, 3).images, [0]*5+[1]*3+[2], ['ant', 'bee', 'cow'])
    some = subset(data, n, 0, at_most=True)
    taken = {1: [0, 0, 1], 2: [0, 1, 1], 3: [1, 1, 1], 6: [2, 3, 1], 8: [3, 4, 1], 9: [1, 3, 5]}
    counts = np.bincount(some.y, minlength=3)
    assert sorted(counts) == sorted(taken.get(n, taken[9]))
    assert len({im.tobytes() for im in some.images}) == min(n, 9)

@pytest.mark.parametrize('n', [3, 7, 12])
def test_subset_at_most_is_the_subset_where_there_are_enough(n):
    data = random_set(60, 3)
    same(subset(data, n, 0), subset(data, n, 0, at_most=True))

# Folders and zip files

def test_folder_and_zip_agree(tmp_path):
    data = random_set()
    files = tree(data, ('train', 'test'))
    loose = load_folder(write(tmp_path/'a', files), 'test')
    packed = load_zip(pack(tmp_path/'a.zip', files), 'test')
    same(loose, packed)
    order = np.argsort(data.y, kind='stable')
    np.testing.assert_array_equal(packed.images, data.images[order])
    np.testing.assert_array_equal(packed.y, data.y[order])
    same(packed, load_data(tmp_path/'a.zip', 'test'))
    same(loose, load_data(str(tmp_path/'a'), 'test'))

def test_trees_without_splits_and_with_a_folder_around(tmp_path):
    files = tree(random_set())
    bare = {o.removeprefix('test/'): c for o,c in files.items()}
    want = load_zip(pack(tmp_path/'a.zip', files), 'test')
    same(want, load_zip(pack(tmp_path/'b.zip', bare)))
    same(want, load_folder(write(tmp_path/'b', bare)))
    same(want,
         load_zip(pack(tmp_path/'c.zip', {f'around/{o}': c for o,c in files.items()}), 'test'))
    same(want, load_zip(pack(tmp_path/'d.zip', {f'around/{o}': c for o,c in bare.items()})))
    with pytest.raises(ValueError, match=r"`split` must be None.*'test'"):
        load_zip(tmp_path/'b.zip', 'test')

def test_litter_is_left_out(tmp_path):
    files = tree(random_set())
    litter = {'__MACOSX/test/0/._000.png': b'x', 'test/0/.hidden.png': b'x',
              'test/0/notes.txt': b'x', 'README.md': b'x'}
    same(load_zip(pack(tmp_path/'a.zip', files | litter), 'test'),
         load_zip(pack(tmp_path/'b.zip', files), 'test'))

def test_a_class_missing_from_one_split_does_not_shift_the_others(tmp_path):
    files = {o: c for o,c in tree(random_set(), ('train', 'test')).items()
             if not o.startswith('test/1/')}
    test = load_zip(pack(tmp_path/'a.zip', files), 'test')
    assert test.classes == ('0', '1', '2')
    assert set(test.y) == {0, 2}

@pytest.mark.parametrize('kind,suffix,exact',
                         [('PNG', 'PNG', True), ('BMP', 'bmp', True), ('JPEG', 'jpeg', False)])
def test_formats(tmp_path, kind, suffix, exact):
    data = ImageSet(np.repeat(np.arange(6, dtype=np.uint8)[:, None, None, None]*40, 8,
                              1).repeat(8, 2).repeat(3, 3),
                    [0, 1]*3, 2)
    back = load_zip(pack(tmp_path/'a.zip', tree(data, kind=kind, suffix=suffix)), 'test')
    off = abs(back.images.astype(int) - data.images[np.argsort(data.y, kind='stable')])
    assert off.max() <= (0 if exact else 2)

def test_grey_becomes_three_channels(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    back = load_zip(pack(tmp_path/'a.zip', {f'{k}/0.pgm': encode(grey, 'PPM') for k in 'ab'}))
    np.testing.assert_array_equal(back.images[1], grey[..., None].repeat(3, -1))

@pytest.mark.parametrize('held', (1, 3))
def test_arrays_come_in_the_channels_that_are_asked_for(tmp_path, held):
    data = random_set(channels=held)
    np.save(tmp_path/'data.npy', data.images)
    np.save(tmp_path/'label.npy', data.labels)
    as_held, grey, colour = (load_data(tmp_path, channels=o).images for o in (None, 1, 3))
    np.testing.assert_array_equal(as_held, data.images)
    np.testing.assert_array_equal(colour, data.images.repeat(3//held, -1))
    if held == 1:
        return np.testing.assert_array_equal(grey, data.images)
    by_hand = data.images @ np.array([.299, .587, .114])
    assert abs(grey[..., 0] - by_hand).max() <= 1

def test_sizes(tmp_path):
    files = {f'{k}/0.png': encode(np.full((s, s, 3), 90, np.uint8))
             for k,s in (('a', 8), ('b', 16))}
    path = pack(tmp_path/'a.zip', files)
    with pytest.raises(ValueError, match=r"'a/0.png' is 8x8 and 'b/0.png' is 16x16. Give `size`"):
        load_zip(path)
    back = load_zip(path, size=12)
    assert back.images.shape == (2, 12, 12, 3)
    assert (back.images == 90).all()
    with pytest.raises(ValueError, match='`size` must be at least 1'):
        load_zip(path, size=0)

def test_what_prepare_brings_to_one_size_is_taken(tmp_path):
    files = {'a/1.png': encode(np.full((6, 9, 3), 7, np.uint8)),
             'b/2.png': encode(np.full((8, 5, 3), 9, np.uint8))}
    for load, source in ((load_zip, pack(tmp_path/'mixed.zip', files)),
                         (load_folder, write(tmp_path/'loose', files))):
        corner = load(source, prepare=lambda image, name: image[:5, :5])
        assert corner.images.shape == (2, 5, 5, 3)
        assert corner.images[:, 0, 0, 0].tolist() == [7, 9]
        with pytest.raises(ValueError, match="'b/2.png' is 5x8. Let `prepare` bring them"):
            load(source, prepare=lambda image, name: image)

def test_large_jpegs_keep_their_detail_when_resized(tmp_path):
    blocks = np.kron(np.random.default_rng(0).integers(60, 200, (64, 64)),
                     np.ones((8, 8))).astype(np.uint8)[..., None].repeat(3, -1)
    jpeg = encode(blocks, 'JPEG', quality=95)
    back = load_zip(pack(tmp_path/'a.zip', {f'{k}/0.jpg': jpeg for k in 'ab'}), size=128)
    want = np.asarray(Image.open(io.BytesIO(jpeg)).resize((128, 128), Image.BICUBIC)).astype(int)
    assert abs(back.images[0]-want).mean() < 2
    assert want.std() > 30

@pytest.mark.parametrize('name', ['../evil.png', 'test/../../evil.png', '/etc/evil.png',
                                  '//host/evil.png', 'C:/evil.png', 'test\\..\\..\\evil.png', '..'])
def test_zip_entries_that_leave_their_folder_are_refused(tmp_path, monkeypatch, name):
    path = pack(tmp_path/'a.zip',
                tree(random_set()) | {name: encode(np.zeros((6, 6, 3), np.uint8))})
    monkeypatch.setattr(D, 'decode_image', lambda *_: pytest.fail('an image was read'))
    with pytest.raises(ValueError, match='points outside its folder. Nothing was read') as e:
        load_zip(path, 'test')
    assert repr(name) in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ['a.zip']

def test_zip_entries_twice_or_too_large(tmp_path, monkeypatch):
    files = tree(random_set())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with zipfile.ZipFile(pack(tmp_path/'a.zip', files), 'a') as z:
            z.writestr('test/0/000.png', files['test/0/000.png'])
    with pytest.raises(ValueError, match="'test/0/000.png' twice"):
        load_zip(tmp_path/'a.zip', 'test')
    path = pack(tmp_path/'b.zip', files | {'test/0/bomb.png': bytes(2**26+1)})
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="'test/0/bomb.png'.*unpacks to 67108865 bytes"):
        load_zip(path, 'test')

@pytest.mark.parametrize('side', [9000, 16000])
def test_decompression_bombs_are_refused(tmp_path, side):
    bomb = encode(np.zeros((side, side), np.uint8))
    assert len(bomb) < 2**20
    with pytest.raises(ValueError, match="'test/0/bomb.png'.*limit"):
        load_zip(pack(tmp_path/'a.zip', {'test/0/bomb.png': bomb, 'test/1/a.png': bomb}), 'test')

def test_sets_that_do_not_fit_ask_for_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(D, '_MAX_SET', 1000)
    with pytest.raises(ValueError, match='`size` must be given: 12 images of 6x6'):
        load_zip(pack(tmp_path/'a.zip', tree(random_set())), 'test')

@pytest.mark.parametrize('kind,suffix',
                         [('PNG', 'png'), ('JPEG', 'jpg'), ('BMP', 'bmp'), ('PPM', 'pgm')])
@pytest.mark.parametrize('keep', [0, .05, .5, .9])
def test_truncated_images_are_named(tmp_path, kind, suffix, keep):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    whole = encode(noise, kind)
    files = {f'test/a/0.{suffix}': whole, f'test/b/1.{suffix}': whole[:int(keep*len(whole))]}
    for load, source in ((load_zip, pack(tmp_path/'a.zip', files)),
                         (load_folder, write(tmp_path/'a', files))):
        with pytest.raises(ValueError,
                           match=f"'test/b/1.{suffix}' in .*a.* cannot be read as an image"):
            load(source, 'test')

def test_other_content_under_an_image_name(tmp_path):
    good = encode(np.zeros((4, 4, 3), np.uint8))
    deep = encode(np.full((4, 4), 40_000, np.uint16))
    gif = encode(np.zeros((4, 4), np.uint8), 'GIF')
    for bad, why in ((b'%!PS-Adobe', 'cannot identify'), (gif, 'cannot identify'),
                     (deep, 'more than 8 bits')):
        with pytest.raises(ValueError, match=f"'b/0.png'.*{why}"):
            load_zip(pack(tmp_path/'a.zip', {'a/0.png': good, 'b/0.png': bad}))

def test_damaged_zip_files(tmp_path):
    path = pack(tmp_path/'a.zip', tree(random_set()), zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:len(raw)//2])
    with pytest.raises(ValueError, match='is not one or is damaged'):
        load_zip(path, 'test')
    raw[60] ^= 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="'test/0/000.png'.*CRC"):
        load_zip(path, 'test')
    with pytest.raises(FileNotFoundError, match='none at'):
        load_zip(tmp_path/'b.zip', 'test')

def test_trees_that_make_no_sense(tmp_path):
    files = tree(random_set(), ('train', 'test'))
    path = pack(tmp_path/'a.zip', files)
    with pytest.raises(ValueError, match=r'found test \(12\), train \(12\)'):
        load_zip(path)
    with pytest.raises(ValueError, match=r"'val' has none.*test \(12\), train \(12\)"):
        load_zip(path, 'val')
    with pytest.raises(ValueError, match='at one depth.*stray.png'):
        load_zip(pack(tmp_path/'b.zip', files | {'test/stray.png': b''}), 'test')
    with pytest.raises(ValueError, match='split/class/image or class/image'):
        load_zip(pack(tmp_path/'c.zip', {'x.png': b'', 'y.png': b''}))
    with pytest.raises(ValueError, match='a/b/c/d'):
        load_zip(pack(tmp_path/'d.zip', {'a/b/c/d/0.png': b''}), 'a')
    with pytest.raises(ValueError, match="only '0'"):
        load_zip(pack(tmp_path/'e.zip', {o: c for o,c in files.items() if '/0/' in o}), 'test')
    with pytest.raises(ValueError, match='must hold images'):
        load_zip(pack(tmp_path/'f.zip', {'a.txt': b''}))
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='must hold images'):
        load_folder(tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='none at'):
        load_folder(tmp_path/'nowhere')

# npy pairs

def test_npy_round_trip(tmp_path):
    data = random_set()
    soft = ImageSet(data.images, np.random.default_rng(0).dirichlet(np.ones(3), 12),
                    ['ä', 'b', 'c'])
    same(soft, load_npy(soft.save(tmp_path/'new/folder')))
    same(soft, load_data(tmp_path/'new/folder'))
    (tmp_path/'new/folder/classes.json').unlink()
    assert load_npy(tmp_path/'new/folder').classes == ('0', '1', '2')
    assert np.load(tmp_path/'new/folder/data.npy').dtype == np.uint8

def test_npy_class_numbers_need_a_count(tmp_path):
    data = random_set().save(tmp_path)
    np.save(data/'label.npy', np.arange(12) % 3)
    assert len(load_npy(data).classes) == 3
    (data/'classes.json').unlink()
    with pytest.raises(ValueError, match='`classes` must be given'):
        load_npy(data)
    assert len(load_npy(data, n_classes=5).classes) == 5
    with pytest.raises(ValueError, match='got 2 at position 2'):
        load_npy(data, n_classes=2)

def test_npy_refuses_pickles_and_damage(tmp_path):
    data = random_set().save(tmp_path)
    np.save(data/'label.npy', np.array([{}]*12, object))
    with pytest.raises(ValueError, match='label.npy must be a plain numpy array'):
        load_npy(data)
    (data/'label.npy').write_bytes(b'\x93NUMPY')
    with pytest.raises(ValueError, match='label.npy'):
        load_npy(data)
    (data/'label.npy').unlink()
    with pytest.raises(FileNotFoundError, match='data.npy and label.npy'):
        load_npy(data)
    np.savez(tmp_path/'two.npz', a=np.zeros(3))
    os.replace(tmp_path/'two.npz', data/'label.npy')
    with pytest.raises(ValueError, match='label.npy must be a plain numpy array'):
        load_npy(data)
    random_set().save(data)
    (data/'classes.json').write_text('{"a": 1}')
    with pytest.raises(ValueError, match='list of class names'):
        load_npy(data)
    (data/'classes.json').write_text('[')
    with pytest.raises(ValueError, match='list of class names'):
        load_npy(data)

def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    old = random_set(seed=0)
    new = random_set(seed=1)
    write_array = np.save
    old.save(tmp_path)
    def full_disk(f, a, **kw):
        if a.dtype == np.float32:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        write_array(f, a, **kw)
    monkeypatch.setattr(np, 'save', full_disk)
    with pytest.raises(OSError, match='No space left on device') as e:
        new.save(tmp_path)
    assert e.value.errno == 28
    assert str(e.value).count('could not') == 1
    monkeypatch.undo()
    same(old, load_npy(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['classes.json', 'data.npy', 'label.npy']

# CIFAR and names

class FakeCIFAR:
    classes = [str(i) for i in range(10)]
    def __init__(self, root, train, download):
        if download: raise OSError('no route to host')
        self.data = np.zeros((10, 32, 32, 3), np.uint8)
        self.targets = list(range(10)) if train else [3]*10

def test_cifar_reads_what_torchvision_has(monkeypatch, tmp_path):
    monkeypatch.setattr('torchvision.datasets.CIFAR10', FakeCIFAR)
    assert cifar10('train').y.tolist() == list(range(10))
    assert cifar10('test').y.tolist() == [3]*10
    same(load_data('cifar10', 'test'), cifar10('test', tmp_path))
    with pytest.raises(OSError, match='could not fetch CIFAR10 into .*no route to host'):
        cifar10('train', tmp_path, download=True)

def test_cifar_is_downloaded_on_request_only(tmp_path):
    for load in (cifar10, cifar100):
        with pytest.raises(FileNotFoundError, match='missing or damaged.*download=True'):
            load('train', tmp_path)
        with pytest.raises(ValueError, match="'train' or 'test'"):
            load(None, tmp_path)
    assert not os.listdir(tmp_path)

def test_load_data_says_what_it_accepts(tmp_path):
    same(load_data('digits', size=8), digits(size=8))
    with pytest.raises(ValueError,
                       match="'digits', 'cifar10', 'cifar100'.*'imagenet' .nothing there"):
        load_data('imagenet')
    (tmp_path/'a.txt').write_text('x')
    with pytest.raises(ValueError, match='a file that is not a zip file'):
        load_data(tmp_path/'a.txt')
    random_set().save(tmp_path/'pair')
    with pytest.raises(ValueError, match="`split` must be None.*'test'"):
        load_data(tmp_path/'pair', 'test')
    with pytest.raises(ValueError, match='`size` cannot be changed'):
        load_data(tmp_path/'pair', size=8)
    with pytest.raises(ValueError, match='`size` cannot be changed'):
        load_data('cifar10', 'test', size=8)
    ImageSet(np.zeros((4, 8, 12, 3), np.uint8), [0, 1, 0, 1], 2).save(tmp_path/'wide')
    with pytest.raises(ValueError, match='whose images have 8x12 pixels; got 8'):
        load_data(tmp_path/'wide', size=8)

@pytest.mark.parametrize('around', ['', 'photos/'])
@pytest.mark.parametrize('test', ['test', 'val', 'valid', 'validation'])
@pytest.mark.parametrize('kind', [write, pack])
def test_splits_are_found(tmp_path, around, test, kind):
    data = random_set(30)
    files = {around+k: v for k, v in tree(data, ('train', test)).items()}
    for k in list(files)[:6]:
        del files[k]
    source = kind(tmp_path/'a', files)
    train, found = load_splits(source)
    assert (len(train), len(found)) == (24, 30)
    rows = lambda d: sorted((im.tobytes(), k) for im, k in zip(d.images, d.y))
    assert rows(train) == rows(data[6:])
    assert len(set(train.y[:6])) == 3                         # class after class in the source
    same(load_splits(source)[0], train)
    assert len(load_splits(source, n_test=4)[1]) == 4

@pytest.mark.parametrize('around', ['', 'photos/', 'train/'])
def test_class_folders_are_divided(tmp_path, around):
    data = random_set(40, 2)
    files = {around+k.removeprefix('test/'): v for k, v in tree(data).items()}
    train, test = load_splits(write(tmp_path/'a', files), 6, fraction=.3)
    assert (len(train), len(test)) == (28, 12)
    assert np.bincount(test.y).tolist() == [6, 6]
    assert len({im.tobytes() for im in [*train.images, *test.images]}) == 40
    assert len(set(train.y[:8])) == 2

def test_splits_of_arrays(tmp_path):
    train, test = load_splits(random_set(20, 2).save(tmp_path/'pair'), 6)
    assert (len(train), len(test)) == (15, 5)
    train, test = load_splits('digits', 8, n_test=50)
    same(train, digits('train', 8))
    same(test, subset(digits('test', 8), 50, 0))

def test_class_named_train_is_no_split(tmp_path):
    write(tmp_path/'a', {f'{k}/{i}.png': encode(im) for k in ('car', 'test', 'train')
                         for i, im in enumerate(random_set(8).images)})
    train, test = load_splits(tmp_path/'a')
    assert train.classes == ('car', 'test', 'train')
    assert (len(train), len(test)) == (18, 6)

def test_splits_of_other_names_are_named(tmp_path):
    write(tmp_path/'a', tree(random_set(), ('train', 'query')))
    with pytest.raises(ValueError, match='`source` must hold folders train and test.*has query, train'):
        load_splits(tmp_path/'a')
    with pytest.raises(ValueError, match='nothing there'):
        load_splits(tmp_path/'none')

def cifar_zip():
    path = Path(os.environ.get('ROBUSTNB_CIFAR_ZIP')
                or Path(__file__).parents[1]/'../shared/data/cifar10-images.zip')
    if not path.is_file():
        pytest.skip(f'no CIFAR-10 images at {path}: set ROBUSTNB_CIFAR_ZIP')
    return path

def test_real_images():
    data = load_data(cifar_zip(), 'test')
    assert repr(data) == 'ImageSet(5000 images 32x32x3, 10 classes, 500 a class)'
    assert data.classes[0] == 'airplane'
    assert data.classes[9] == 'truck'
    # CIFAR-10's test means
    np.testing.assert_allclose(data.images.mean((0, 1, 2))/255, [.494, .485, .450], atol=.01)
    np.testing.assert_allclose(data.images.std((0, 1, 2))/255, [.247, .243, .262], atol=.01)


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path):
    data = random_set()
    for name, content in tree(data).items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(content)
    os.symlink(tmp_path, tmp_path/'test'/data.classes[0]/'loop')
    assert len(load_folder(tmp_path)) == len(data)
    os.symlink(tmp_path/'test'/data.classes[0], tmp_path/'test'/'z')
    assert len(load_folder(tmp_path)) == len(data) + int((data.y == 0).sum())


def test_a_column_of_class_numbers_says_the_way_out():
    with pytest.raises(ValueError, match=r'got shape \(4, 1\).*labels.ravel'):
        ImageSet(np.zeros((4, 8, 8, 3), np.uint8), np.array([[0], [1], [0], [1]]), 2)
