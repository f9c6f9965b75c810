"""Files are whole or not there, reading them runs no code, and what is damaged or from another run is
refused by name."""
import errno, hashlib, json, os, pickle, random, resource, signal, subprocess, sys
import numpy as np
import pytest
import torch
from torch import nn
from robustnb.core import make_generator
from robustnb.files import (
    atomic_path, checkpoint_mark, explain_errors, fill, fingerprint, load_state, manifest,
    resume_state, save_json, save_state)


class Payload:
    "What a hostile file would hold"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


@pytest.mark.parametrize('wrap', (lambda o: o, lambda o: dict(w=torch.ones(2), extra=o),
                                  lambda o: [o], lambda o: {o: 1}),
                         ids=('bare', 'in a dict', 'in a list', 'as a key'))
@pytest.mark.parametrize('write', (
    torch.save, lambda o, f: torch.save(o, f, _use_new_zipfile_serialization=False),
    lambda o, f: f.write_bytes(pickle.dumps(o, 2))),
                         ids=('zip', 'legacy', 'pickle'))
def test_reading_weights_never_runs_code(tmp_path, write, wrap):
    mark = tmp_path/'ran'
    write(wrap(Payload(mark)), tmp_path/'w.pt')
    with pytest.raises(ValueError, match='w.pt is damaged or holds other objects'):
        load_state(tmp_path/'w.pt')
    assert not mark.exists()
    (torch.load(tmp_path/'w.pt', weights_only=False) if write is torch.save
     else pickle.loads(pickle.dumps(Payload(mark))))
    assert mark.exists(), 'the payload would have worked'


def test_whole_modules_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path/'w.pt')
    with pytest.raises(ValueError, match='Save `model.state_dict'):
        load_state(tmp_path/'w.pt')


@pytest.mark.parametrize('kind', ('zip', 'legacy'))
@pytest.mark.filterwarnings('ignore')
def test_damaged_files_are_named_whatever_the_damage(tmp_path, kind):
    state = dict(w=torch.randn(50, 20, generator=make_generator(0)), names=['a', 'b'], epoch=3)
    f = tmp_path/'w.pt'
    rng = random.Random(0)
    torch.save(state, f, _use_new_zipfile_serialization=kind == 'zip')
    whole, refused = f.read_bytes(), 0
    damaged = ([whole[:n] for n in (0, 1, 3, 10, 100, len(whole)//2, len(whole)-30, len(whole)-1)]
               + [b'PK\x03\x04' + bytes(100), b'hello', bytes(5000)])
    for _ in range(1500):
        b = bytearray(whole)
        i = rng.randrange(len(b))
        b[i:i + rng.choice((1, 1, 40))] = bytes([rng.randrange(256)])
        damaged.append(bytes(b))
    for b in damaged:
        f.write_bytes(b)
        try:
            load_state(f)
        except ValueError as e:
            assert 'w.pt is damaged' in str(e)
            refused += 1
    assert refused > 500
    f.write_bytes(whole)
    back = load_state(f)
    assert torch.equal(back['w'], state['w'])
    assert back['names'] == ['a', 'b']
    assert back['epoch'] == 3


def test_what_is_not_a_file_is_named(tmp_path):
    for path in (tmp_path/'none.pt', tmp_path):
        with pytest.raises(FileNotFoundError, match='there is none at'):
            load_state(path)


@pytest.mark.parametrize('fault', (OSError(errno.ENOSPC, 'No space left on device'),
                                   ValueError('a bug'), KeyboardInterrupt(), SystemExit(1)),
                         ids=repr)
def test_a_failed_write_changes_nothing(tmp_path, fault):
    f = tmp_path/'deep/er/table.csv'
    with atomic_path(f) as tmp:
        assert tmp.parent == f.parent
        tmp.write_text('old')
    with pytest.raises(type(fault)) as e:
        with atomic_path(f) as tmp:
            tmp.write_text('new and half')
            raise fault
    assert f.read_text() == 'old'
    assert [o.name for o in f.parent.iterdir()] == ['table.csv']
    if isinstance(fault, OSError):
        assert e.value.errno == errno.ENOSPC
        assert str(f) in str(e.value)
        assert 'Nothing was left half written' in str(e.value)


def test_whoever_is_reading_keeps_the_old_file(tmp_path):
    f = tmp_path/'table.csv'
    f.write_text('old'*100_000)
    with open(f) as reader:
        assert reader.read(3) == 'old'
        with atomic_path(f) as tmp:
            tmp.write_text('new')
        assert reader.read() == 'old'*99_999
        assert f.read_text() == 'new'


def test_a_write_cut_off_by_the_system_changes_nothing(tmp_path):
    f = tmp_path/'w.pt'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_state(dict(w=torch.zeros(10)), f)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match='w.pt.*Nothing was left half written'):
            save_state(dict(w=torch.zeros(100_000)), f)
        with pytest.raises(OSError, match='facts.json'):
            save_json(dict(text='x'*50_000), tmp_path/'facts.json')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [o.name for o in tmp_path.iterdir()] == ['w.pt']
    assert load_state(f)['w'].shape == (10,)


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    f = tmp_path/'table.csv'
    f.write_text('old')
    script = ('import os, signal\nfrom robustnb.files import atomic_path\nwith '
              f'atomic_path({str(f)!r}) as tmp:\n    tmp.write_text("half"); '
              'os.kill(os.getpid(), signal.SIGKILL)')
    assert subprocess.run([sys.executable, '-c', script]).returncode == -signal.SIGKILL
    assert f.read_text() == 'old'
    with atomic_path(f) as tmp:
        tmp.write_text('new')
    assert f.read_text() == 'new'


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='could not write .*file/table.csv'):
        with atomic_path(tmp_path/'file/table.csv') as tmp:
            tmp.write_text('')
    (tmp_path/'folder/inner').mkdir(parents=True)
    with pytest.raises(OSError, match='could not write .*folder'):
        with atomic_path(tmp_path/'folder') as tmp:
            tmp.write_text('')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['file', 'folder']


def test_new_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        save_json({}, tmp_path/'a.json')
    finally:
        os.umask(old)
    assert (tmp_path/'a.json').stat().st_mode & 0o777 == 0o640


def test_manifest_is_readable_json(tmp_path):
    read = json.loads(save_json(manifest(seed=0, torch='mine', path=tmp_path),
                                tmp_path/'m.json').read_text())
    assert read['seed'] == 0
    assert read['torch'] == 'mine'
    assert read['path'] == str(tmp_path)
    assert read['python'] == sys.version.split()[0]
    assert read['numpy'] == np.__version__
    assert read['threads'] == torch.get_num_threads()
    assert '/' not in read['command'].split()[0], 'the name of the program, not where it lies'


# What a file belongs to

def test_fingerprints_are_those_of_old_checkpoints():
    "The bytes that training and the contest have always hashed"
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    labels = np.eye(5, 3, dtype=np.float32)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    shapes = [(k, tuple(v.shape)) for k, v in net.state_dict().items()]
    sha = lambda content: hashlib.sha256(content).hexdigest()[:16]
    assert checkpoint_mark(net, images, labels, dict(lr=.1), np.int64(3)) == dict(
        network=sha(repr(shapes).encode()), recipe="{'lr': 0.1}", seed=3,
        images=sha(images.tobytes() + labels.tobytes()),
        weights=sha(b''.join(v.numpy().tobytes() for v in net.state_dict().values())))
    described = b''.join(repr((o.dtype, tuple(o.shape))).encode() + o.numpy().tobytes()
                         for o in net.state_dict().values())
    parts = [p for o in net.state_dict().values() for p in ((o.dtype, tuple(o.shape)), o)]
    assert fingerprint(*parts) == sha(described)


@pytest.mark.parametrize('x', (
    torch.arange(6.).view(2, 3), torch.arange(6.).view(2, 3).T, torch.tensor(2.5),
    torch.zeros(0, 3), torch.tensor([True, False]), torch.arange(4), torch.ones(2, 3)[:, 1:]))
def test_tensors_count_by_their_values(x):
    assert fingerprint(x) == fingerprint(x.numpy()) == fingerprint(x.numpy().tobytes())
    assert fingerprint(x.clone().float().requires_grad_()) == fingerprint(x.float())


def test_fingerprints_of_half_precision_and_words():
    x = torch.tensor([1.5, 2, 3], dtype=torch.bfloat16)
    assert fingerprint(x) == fingerprint(x.view(torch.int16))
    assert fingerprint('ab', 'c') == fingerprint('abc') == fingerprint(b'abc')
    assert fingerprint('ab', 3) == fingerprint('ab3')
    assert fingerprint(None) != fingerprint('')
    assert re_hex(fingerprint())


def re_hex(name): return len(name) == 16 and not set(name) - set('0123456789abcdef')


@pytest.mark.parametrize('kind, other', (
    ('network', dict(model=nn.Linear(2, 3))), ('weights', dict(model=nn.Linear(2, 2))),
    ('images', dict(images=np.ones((2, 2), np.uint8))),
    ('images', dict(labels=np.ones(2))), ('recipe', dict(recipe='Adam')), ('seed', dict(seed=1))))
def test_what_differs_is_named(tmp_path, kind, other):
    this = dict(model=nn.Linear(2, 2), images=np.zeros((2, 2), np.uint8), labels=np.zeros(2),
                recipe='SGD', seed=0)
    mark = checkpoint_mark(**this)
    f = save_state(dict(format='robustnb.training/1', mark=mark, epoch=7), tmp_path/'run.pt')
    assert resume_state(f, mark)['epoch'] == 7
    with pytest.raises(ValueError, match=f'another run: its {kind} is .*run.pt'):
        resume_state(f, checkpoint_mark(**this | other))


def test_checkpoints_that_do_not_say_their_first_weights(tmp_path):
    mark = checkpoint_mark(nn.Linear(2, 2), np.zeros((2, 2), np.uint8), np.zeros(2), 'SGD', 0)
    old = {k: v for k, v in mark.items() if k != 'weights'}
    f = save_state(dict(format='robustnb.training/1', mark=old, epoch=7), tmp_path/'run.pt')
    assert resume_state(f, mark)['epoch'] == 7


def test_checkpoints_of_another_kind(tmp_path):
    f = tmp_path/'run.pt'
    for state in (dict(w=torch.ones(2)), [1], dict(format='robustnb.descriptor/1', mark={})):
        save_state(state, f)
        with pytest.raises(ValueError, match='must be a training checkpoint'):
            resume_state(f, {})
    assert resume_state(f, {}, kind=None)['mark'] == {}
    assert resume_state(f, {}, kind='robustnb.descriptor/1')['mark'] == {}
    save_state(dict(w=torch.ones(2)), f)
    with pytest.raises(ValueError, match='its seed is None'):
        resume_state(f, dict(seed=0), kind=None)


def test_errors_about_a_file_name_it(tmp_path):
    for error in (OSError('gone'), MemoryError(), ValueError('`n` must be 3'),
                  TypeError(f'odd file {tmp_path}')):
        with pytest.raises(type(error)) as e, explain_errors(tmp_path, 'a network'):
            raise error
        assert e.value is error
    for error in (KeyError('weights'), ValueError('too short'), ZeroDivisionError(),
                  RuntimeError('`lr` must be 1')):
        with pytest.raises(ValueError, match='`path` must be a network; .* is damaged') as e:
            with explain_errors(tmp_path, 'a network'):
                raise error
        assert type(error).__name__ in str(e.value)
        assert e.value.__cause__ is error


def test_a_network_is_filled_whole_or_refused():
    state = nn.Linear(3, 2).state_dict()
    net = nn.Linear(3, 2)
    fill(net, state, 'a.pt')
    assert torch.equal(net.weight, state['weight'])
    for bad in (dict(weight=state['weight']), state | dict(more=torch.ones(1)),
                state | dict(bias=torch.ones(3))):
        with pytest.raises(ValueError, match='the tensors in a.pt do not fit'):
            fill(nn.Linear(3, 2), bad, 'a.pt')


def test_packed_files_are_told_to_be_unpacked(tmp_path):
    import gzip, zipfile
    (tmp_path/'a.pt.gz').write_bytes(gzip.compress(b'x'))
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('a.pt', b'x')
    with pytest.raises(ValueError, match='packed by gzip. Unpack it'):
        load_state(tmp_path/'a.pt.gz')
    with pytest.raises(ValueError, match='a zip archive of other files: unpack it'):
        load_state(tmp_path/'a.zip')
