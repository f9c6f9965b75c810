"Unlabelled pictures of any layout, and labels in the order of a model's classes."
import warnings, zipfile
import numpy as np
import pytest
import torch
from PIL import Image
from robustnb.data import decode_image, digits, ImageSet, load_data, load_folder
from robustnb.images import load_images, match_classes


def paint(path, colour=(9, 9, 9), size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path, **options)


@pytest.fixture
def flat(tmp_path):
    for i, size in enumerate(((20, 16), (16, 30), (40, 40), (16, 16))):
        paint(tmp_path/f'{i}.png', (40*i, 90, 9), size)
    return tmp_path


def test_flat_folders_and_zips_of_mixed_sizes(flat, tmp_path_factory):
    x = load_images(flat, size=16)
    assert x.shape == (4, 3, 16, 16)
    assert (255*x[:, 0, 0, 0]).round().tolist() == [0, 40, 80, 120]
    file = tmp_path_factory.mktemp('z')/'a.zip'
    with zipfile.ZipFile(file, 'w') as z:
        for p in flat.iterdir():
            z.write(p, p.name)
    assert torch.equal(load_images(file, size=16), x)
    assert load_images(flat, size=16, channels=1).shape == (4, 1, 16, 16)
    with pytest.raises(ValueError, match='one size.*Give `size`'):
        load_images(flat)


def test_a_draw_is_seeded_nested_and_made_before_decoding(flat):
    one = load_images(flat, size=8, n=1, seed=3)
    two = load_images(flat, size=8, n=2, seed=3)
    assert any(torch.equal(one[0], o) for o in two)
    (flat/'4.png').write_bytes(b'no image')
    drawn = [load_images(flat, 8, 1, seed) for seed in range(20) if not damaged(flat, seed)]
    assert drawn, 'a damaged picture that is not drawn is not looked at'


def damaged(folder, seed):
    try:
        load_images(folder, 8, 1, seed)
    except ValueError as e:
        return "'4.png'" in str(e)


def test_names_and_arrays(tmp_path):
    assert load_images('digits', 8, 5).shape == (5, 3, 8, 8)
    ImageSet(np.zeros((4, 6, 8, 1), np.uint8), [0, 1, 0, 1], 2).save(tmp_path)
    assert load_images(tmp_path).shape == (4, 3, 6, 8)
    assert load_images(tmp_path, size=4, channels=1).shape == (4, 1, 4, 4)
    with pytest.raises(ValueError, match='`source` must be a folder'):
        load_images(tmp_path/'nowhere')


def test_what_is_passed_over_is_counted(tmp_path):
    for c in 'ab':
        for end in ('png', 'webp', 'tif', 'TIFF'):
            paint(tmp_path/c/f'0.{end}')
        (tmp_path/c/'1.heic').write_bytes(b'x')
        (tmp_path/c/'Thumbs.db').write_bytes(b'x')
    with pytest.warns(UserWarning, match=r'2 files .* passed over: 2 \.heic'):
        assert len(load_folder(tmp_path)) == 8
    with pytest.warns(UserWarning, match='2 files'):
        assert len(load_images(tmp_path)) == 8
    for p in tmp_path.glob('*/1.heic'):
        p.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_folder(tmp_path)


@pytest.mark.parametrize('fill', ((), ('notes.txt',), ('a.heic', 'b.heic')))
def test_class_folders_without_images_are_named(tmp_path, fill):
    for c in ('ant', 'cow'):
        paint(tmp_path/c/'0.png')
    (tmp_path/'bee').mkdir()
    for name in fill:
        (tmp_path/'bee'/name).write_bytes(b'x')
    with pytest.raises(ValueError, match="`source` must hold.*'bee'"):
        load_data(tmp_path)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for c in ('ant', 'cow'):
            z.write(tmp_path/c/'0.png', f'{c}/0.png')
        z.writestr('bee/', b'')
    with pytest.raises(ValueError, match="'bee'"):
        load_data(tmp_path/'a.zip')


def test_a_folder_that_is_empty_in_one_split_keeps_its_place(tmp_path):
    for name in ('train/ant', 'train/bee', 'train/cow', 'test/ant', 'test/cow'):
        paint(tmp_path/name/'0.png')
    (tmp_path/'test'/'bee').mkdir()
    assert load_data(tmp_path, 'test').y.tolist() == [0, 2]


def test_numbered_folders_are_numbers(tmp_path):
    for k in range(12):
        paint(tmp_path/str(k)/'0.png', (k, k, k))
    data = load_data(tmp_path)
    assert data.classes == tuple(map(str, range(12)))
    assert data.images[:, 0, 0, 0].tolist() == data.y.tolist() == list(range(12))


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('end', ('jpg', 'png', 'webp', 'tif'))
def test_photographs_stand_upright(tmp_path, turn, end):
    lies = np.zeros((16, 24, 3), np.uint8)
    lies[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(lies).save(tmp_path/f'0.{end}', exif=exif)
    right = dict(enumerate((lies, lies[:, ::-1], lies[::-1, ::-1], lies[::-1], lies.swapaxes(0, 1),
                            np.rot90(lies, -1), lies[::-1, ::-1].swapaxes(0, 1),
                            np.rot90(lies)), 1))[turn]
    found = decode_image(tmp_path/f'0.{end}')
    assert found.shape == right.shape
    assert abs(found.astype(int) - right).mean() < 12


def test_resizing_is_that_of_torchvision(tmp_path):
    from torchvision.transforms import v2
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 77, 3), dtype=np.uint8))
    image.save(tmp_path/'0.png')
    for size, pct in ((16, 1.), (24, .875), (60, .9)):
        want = v2.CenterCrop(size)(v2.Resize(int(size/pct), v2.InterpolationMode.BICUBIC)(image))
        found = decode_image(tmp_path/'0.png', size, crop_pct=pct)
        assert (found == np.asarray(want)).all()
    for bad in (0, 1.5, float('nan')):
        with pytest.raises(ValueError, match='`crop_pct` must lie'):
            decode_image(tmp_path/'0.png', 8, crop_pct=bad)


def some(*classes):
    n = len(classes)
    return ImageSet(np.zeros((n, 2, 2, 3), np.uint8), range(n), classes)


MATCHES = [
    (('ant', 'cat', 'dog'), ('cat', 'dog', 'ant'), [2, 0, 1]),
    (('sea_lion', 'T shirt'), ('t-Shirt', 'Sea Lion', 'bee'), [1, 0]),
    (('n01440764', 'n01443537_goldfish'), ('goldfish, Carassius auratus', 'n01440764 tench'), [1, 0]),
    (('tench', 'goldfish'), ('n01443537_goldfish', 'n01440764_tench'), [1, 0]),
    (('0', '2', '10'), tuple('abcdefghijk'), [0, 2, 10]),
    (('2', '10'), ('10', '2'), [1, 0]),
]


@pytest.mark.parametrize('folders, model, right', MATCHES)
def test_labels_follow_names(folders, model, right):
    data = some(*folders)
    matched = match_classes(data, model)
    assert matched.y.tolist() == right
    assert matched.classes == model
    assert data.y.tolist() == list(range(len(folders))), 'the set itself stays as it is'


@pytest.mark.parametrize('folders, model, words', (
    (('cat', 'dog'), ('cats', 'dog'), "Did you mean 'cats' for 'cat'"),
    (('crane', 'dog'), ('crane, bird', 'crane, machine', 'dog'), "'crane' may be"),
    (('Cat', 'c a t'), ('cat', 'dog'), '`classes` must have'),
    (('Cat', 'CAT'), ('cat', 'dog'), '`data` must have one folder'),
    (('1', '2'), ('cat', 'dog'), "'1', '2'"),
    (('a', 'b'), 3, 'nobody knows which is which')))
def test_names_that_fit_nothing_are_refused(folders, model, words):
    with pytest.raises(ValueError, match=words):
        match_classes(some(*folders), **{'n_classes' if model == 3 else 'classes': model})


def test_a_model_without_names():
    assert match_classes(some('0', '3'), n_classes=5).y.tolist() == [0, 3]
    assert match_classes(some('0', '3'), n_classes=5).matched == 'by number'
    assert match_classes(some('a', 'b'), n_classes=2).matched == 'by position'
    assert match_classes(some('a', 'b'), ('b', 'a')).matched == 'by name'
    assert match_classes(digits('test', 8), n_classes=10).y.tolist() == digits('test', 8).y.tolist()


@pytest.mark.parametrize('classes', (None, [f'c{i}' for i in range(10)]))
def test_folders_that_may_count_from_nought_or_from_one(classes):
    ask = lambda *folders: match_classes(some(*folders), classes, 10)
    with pytest.raises(ValueError, match='the folders 1 to 9 may count the 10 classes .* from 0 or from 1'):
        ask(*map(str, range(1, 10)))
    with pytest.raises(ValueError, match='the folders 1 to 2 may count'):
        ask('1', '2')
    assert ask('0', '1').y.tolist() == [0, 1]
    assert ask('3', '5').y.tolist() == [3, 5]
    for names, y in ((range(10), [1, 2]), (range(1, 11), [0, 1])):
        assert match_classes(some('1', '2'), [*map(str, names)]).y.tolist() == y


def test_an_accent_is_the_same_in_one_sign_or_two():
    names = 'caf\u00e9', 'cafe\u0301'
    for mine, theirs in (names, names[::-1]):
        assert match_classes(some('bar', mine), (theirs, 'bar')).y.tolist() == [1, 0]


@pytest.mark.parametrize('kind', ('png', 'webp', 'tiff'))
def test_a_file_of_several_pictures_is_no_picture(kind, tmp_path):
    one, two = (Image.new('RGB', (8, 8), (o, 0, 0)) for o in (10, 200))
    one.save(tmp_path/f'a.{kind}', save_all=True, append_images=[two])
    with open(tmp_path/f'a.{kind}', 'rb') as f:
        with pytest.raises(ValueError, match='2 pictures in one file'):
            decode_image(f)
