"""Zip files, folders and arrays from strangers: nothing is extracted or run, nothing is read that points
elsewhere or is too large, and damage is named."""
import io, pickle, zipfile
from pathlib import Path
import numpy as np
import pytest
from robustnb import archives
from robustnb.archives import check_entry, open_members, open_zip, read_array, verdict_row

OUTSIDE = ['../evil', 'a/../../evil', '/etc/evil', '//host/evil', 'C:/evil', 'C:evil', 'C:\\evil',
           'a\\..\\..\\evil', '..\\evil', '..', '']


class Boom:
    "What an array of objects would run"
    def __reduce__(self): return Path.touch, (Path('ran'),)


def packed(path, entries, **options):
    with zipfile.ZipFile(path, 'w', **options) as z:
        for name, content in entries:
            z.writestr(name, content)
    return path


def members(path):
    "Name and content of all files that `open_members` gives"
    with open_members(path) as files:
        return {name: open_file().read() for name, open_file in files.items()}


def entry(name, size=1):
    e = zipfile.ZipInfo()
    e.filename = name
    e.file_size = size
    return e


def npy(header, body=b''):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(fortran_order=False) | header)
    return f.getvalue() + body


@pytest.mark.parametrize('name', OUTSIDE)
def test_names_that_leave_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match='of sets/a.zip points outside its folder. Nothing was'):
        check_entry(entry(name), 'sets/a.zip')


@pytest.mark.parametrize('name', [o for o in OUTSIDE if o])
def test_members_that_leave_the_folder(name, tmp_path):
    path = packed(tmp_path/'a.zip', [('good', b'1'), (name, b'2')])
    with pytest.raises(ValueError, match='points outside its folder') as e:
        members(path)
    assert repr(name) in str(e.value)
    assert [o.name for o in tmp_path.iterdir()] == ['a.zip']


@pytest.mark.parametrize('name', ['a', 'a/b.png', 'a/..b/c', '...', 'a b', './a', 'café.png'])
def test_names_that_stay(name, tmp_path):
    check_entry(entry(name), 'a.zip')
    assert members(packed(tmp_path/'a.zip', [(name, b'1')])) == {name: b'1'}


def test_sizes_are_judged_before_anything_is_read(tmp_path, monkeypatch):
    check_entry(entry('a', 2**26), 'a.zip')
    with pytest.raises(ValueError, match=f'unpacks to {2**26+1} bytes, over the limit of {2**26}'):
        check_entry(entry('a', 2**26+1), 'a.zip')
    path = packed(tmp_path/'a.zip', [('bomb', bytes(10**6))], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert len(members(path)['bomb']) == 10**6
    monkeypatch.setattr(archives, '_max_entry', 10**6-1)
    with pytest.raises(ValueError, match="'bomb' unpacks to 1000000 bytes"):
        members(path)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_that_is_there_twice(tmp_path):
    with pytest.raises(ValueError, match="entry 'a' is there twice"):
        members(packed(tmp_path/'a.zip', [('a', b'1'), ('b', b'2'), ('a', b'3')]))


def test_folders_and_zip_files_hold_the_same_members(tmp_path):
    (tmp_path/'set'/'inner').mkdir(parents=True)
    (tmp_path/'set'/'inner'/'c').write_bytes(b'3')
    content = dict(a=b'1', b=b'22')
    for name, o in content.items():
        (tmp_path/'set'/name).write_bytes(o)
    assert members(tmp_path/'set') == members(packed(tmp_path/'a.zip', content.items())) == content
    assert members(str(tmp_path/'set')) == content


@pytest.mark.parametrize('reader', (open_zip, open_members))
def test_what_is_not_there_or_not_a_zip_file(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is none at .*nowhere'):
        with reader(tmp_path/'nowhere'):
            pass
    whole = packed(tmp_path/'a.zip', [('a', b'1'*500)]).read_bytes()
    for damaged in (b'', b'not a zip file', whole[:len(whole)//2], whole[:-5]):
        (tmp_path/'a.zip').write_bytes(damaged)
        with pytest.raises(ValueError, match='zip file.*damaged'):
            with reader(tmp_path/'a.zip'):
                pass


def test_open_zip_wants_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='must be a zip file of images'):
        with open_zip(tmp_path):
            pass


@pytest.mark.parametrize('array', (
    np.arange(6, dtype=np.uint8).reshape(1, 2, 3), np.ones((3, 10)), np.zeros((0, 10)),
    np.asfortranarray(np.arange(6.).reshape(2, 3)), np.float32(3)))
def test_arrays_are_read_back(array, tmp_path):
    np.save(tmp_path/'a.npy', array)
    with open_members(tmp_path) as files:
        back = read_array(files, 'a.npy')
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize('raw', [
    pickle.dumps(Boom()), b'', b'PK\x03\x04', b'\x93NUMPY\x03\x00\x00\x00\x00\x00', b'\x93NUMPY',
    npy(dict(descr='|u1', shape=(2, 32, 32, 3)), b'12')])
def test_what_is_no_array_is_refused_and_never_run(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='not a plain numpy array'):
        read_array({'a.npy': lambda: io.BytesIO(raw)}, 'a.npy')
    assert not (tmp_path/'ran').exists()
    pickle.loads(pickle.dumps(Boom()))
    assert (tmp_path/'ran').exists(), 'the object would have run'


@pytest.mark.parametrize('header', [
    dict(descr='|O', shape=(2,)), dict(descr='|u1', shape=(10**15, 32, 32, 3)),
    dict(descr='|u1', shape=(50_001, 32, 32, 3))])
def test_objects_and_giants_are_seen_by_their_header_alone(header, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr(np.lib.format, 'read_array', lambda *a, **k: read.append(a))
    raw = npy(header, pickle.dumps(Boom()))
    found = read_array({'a.npy': lambda: io.BytesIO(raw)}, 'a.npy')
    assert found.shape == header['shape']
    assert found.dtype == np.dtype(header['descr'])
    assert not hasattr(found, '__array__')
    assert read == []
    assert not (tmp_path/'ran').exists()


def test_a_missing_array_is_told_with_what_is_there():
    files = dict.fromkeys('hgfedcba')
    with pytest.raises(ValueError, match='missing, there are only a, b, c, d, e, f$'):
        read_array(files, 'data.npy')
    with pytest.raises(ValueError, match='there are only no files'):
        read_array({}, 'data.npy')


def test_verdicts():
    assert verdict_row('r', True, 5, 'mend it') == dict(rule='r', verdict='ok', found='5',
                                                        what_to_do='')
    assert verdict_row('r', False, ValueError('e'), 'mend it') == dict(
        rule='r', verdict='broken', found='e', what_to_do='mend it')
    assert verdict_row('r', None, '', 'first the rest', 'not checked')['verdict'] == 'not checked'
