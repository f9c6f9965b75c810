"""Images, labels, models, seeds and files at the door: what is wrong is refused by name, and a file
is whole or not there."""
import errno, json, os, pickle, random, resource, signal, subprocess, sys
import numpy as np
import pytest
import torch
from torch import nn
from robustnb.core import (
    batches, check_images, check_labels, check_model, draw, image_generators, make_generator,
    pick_device, predict, progress, subseed, to_float, to_uint8)
from robustnb.files import atomic_path, load_state, manifest, save_json, save_state

good = torch.linspace(0, 1, 2*3*4*4).view(2, 3, 4, 4)


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_images_of_every_float_type_pass(dtype):
    x = good.to(dtype)
    assert check_images(x) is x
    assert check_images(x[:, :1]).shape == (2, 1, 4, 4)


@pytest.mark.parametrize('x, error, words', (
    (good*255, ValueError, r'values in \[0, 255\]'), (good-1e-4, ValueError, 'Divide by 255'),
    (good+1e-4, ValueError, 'undo the normalisation'),
    (good.masked_fill(good == 1, float('nan')), ValueError, 'nan'),
    (good.masked_fill(good == 1, float('inf')), ValueError, 'inf'),
    (good[0], ValueError, r'x\[None\]'), (good[:0], ValueError, 'non-empty'),
    (good[..., :0], ValueError, 'non-empty'), (good.flatten(1), ValueError, 'N,C,H,W'),
    ((good*255).byte(), TypeError, 'to_float'), (good > .5, TypeError, 'floating point'),
    (good.to(torch.complex64), TypeError, 'floating point'),
    (good.numpy(), TypeError, 'ndarray'), (None, TypeError, 'NoneType'),
    ([good], TypeError, 'list')))
def test_images_that_are_refused(x, error, words):
    with pytest.raises(error, match=words) as e:
        check_images(x, 'pictures')
    assert '`pictures`' in str(e.value)


@pytest.mark.parametrize('y, error, words', (
    (torch.tensor([0, 3]), ValueError, r'\[0, 3\); got 3 at position 1 \(1 such'),
    (torch.tensor([-1, -2]), ValueError, r'got -1 at position 0 \(2 such'),
    (torch.tensor([0]), ValueError, '1 labels for 2 images'),
    (torch.tensor([0, 1, 2]), ValueError, '3 labels'),
    (torch.tensor([0., 1.]), TypeError, 'float32'),
    (torch.tensor([0, 1], dtype=torch.int32), TypeError, 'int32'),
    (torch.eye(2), TypeError, 'argmax'), (torch.tensor([[0], [1]]), TypeError, r'\(2, 1\)'),
    (np.array([0, 1]), TypeError, 'as_tensor'), ([0, 1], TypeError, 'list')))
def test_labels_that_are_refused(y, error, words):
    assert check_labels(torch.tensor([0, 2]), 2, 3).tolist() == [0, 2]
    with pytest.raises(error, match=words) as e:
        check_labels(y, 2, 3, 'answers')
    assert '`answers`' in str(e.value)


def test_models_that_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(48, 4), nn.Dropout()))
    with pytest.raises(ValueError, match=r'the model itself is in training mode \(5 parts\)'):
        check_model(net)
    net.eval()[1][1].train()
    with pytest.raises(ValueError, match=r'1\.1 is in training mode \(1 parts\)'):
        check_model(net)
    assert check_model(net.eval()) is net
    for bad in (lambda x: x, nn.Linear, None):
        with pytest.raises(TypeError, match='torch.nn.Module'):
            check_model(bad)


def test_eight_bits_survive_a_round_trip_and_small_errors():
    grey = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    x = to_float(grey)
    assert x.shape == (3, 3, 5, 7)
    assert x.dtype == torch.float32
    assert x[1, 2, 3, 4] == grey[1, 3, 4, 2]/np.float32(255)
    for shift in (-.49, 0, .49):
        assert (to_uint8((x + shift/255).clamp(0, 1)) == grey).all()
    assert (to_uint8(x.double()) == grey).all()
    assert to_uint8(x.requires_grad_()).dtype == np.uint8
    for bad in (grey[0], grey/255, grey.astype(np.int64)):
        with pytest.raises(TypeError, match='uint8'):
            to_float(bad)
    with pytest.raises(ValueError, match='in .0, 1.'):
        to_uint8(x*255)


def test_streams_are_stable_and_apart():
    assert subseed(0, 'noise') == 7207491209231784873
    assert subseed(3) != subseed(4)
    names = [(), ('a',), ('b',), ('a', 'b'), ('ab',), ('a', 1), ('a', '1'), (1,), ('1',), (1.,)]
    assert len({subseed(s, *n) for s in (0, 1) for n in names}) == 2*len(names)
    assert subseed(np.int64(1), 'a', np.int64(2), np.float64(.5)) == subseed(1, 'a', 2, .5)
    draws = torch.stack([torch.randn(1000, generator=make_generator(0, 'x', i)) for i in range(20)])
    assert (torch.corrcoef(draws) - torch.eye(20)).abs().max() < .15
    for bad in (.5, '1', None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match='`seed` must be an integer'):
            subseed(bad)


@pytest.mark.parametrize('n, size', ((0, 3), (1, 3), (3, 3), (4, 3), (10, 1), (5, 100)))
def test_batches_cover_everything_once(n, size):
    parts = [list(range(n))[s] for s in batches(n, size)]
    assert sum(parts, []) == list(range(n))
    assert all(0 < len(p) <= size for p in parts)
    assert all(s.stop <= n for s in batches(n, size))


def test_devices():
    assert pick_device('cpu') == torch.device('cpu')
    assert pick_device(torch.device('meta')).type == 'meta'
    assert pick_device() == torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cpu'"):
            pick_device('cuda:1')


def test_progress_is_silent_in_logs(capfd):
    assert list(progress(iter('abc'), 'letters', total=3)) == ['a', 'b', 'c']
    assert capfd.readouterr() == ('', '')


def test_predict_keeps_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
    x = good.clone().requires_grad_()
    out = predict(net, x)
    assert not out.requires_grad
    assert x.grad is None
    assert (out-net(x)).abs().max() < 1e-6
    for size in (1, 2, 3):
        assert (predict(net, x, size)-out).abs().max() < 1e-6
    assert predict(net.double(), x.double()).dtype == torch.float32
    assert predict(nn.Flatten().eval(), good).shape == (2, 48), 'a model without parameters'
    with pytest.raises(ValueError, match='Divide by 255'):
        predict(net, good*255)


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
    script = ('import os, signal\nfrom robustnb.core import atomic_path\nwith '
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


def test_random_numbers_belong_to_the_image():
    x = torch.rand(9, 3, 4, 4, generator=make_generator(0))
    numbers = lambda x, seed=5, kind=torch.rand: draw(
        kind, image_generators(None if seed is None else make_generator(seed), x), 2, 3, like=x)
    whole = numbers(x)
    assert whole.shape == (9, 2, 3)
    assert len(whole.unique()) == 54
    assert whole.dtype == torch.float32
    order = torch.randperm(9, generator=make_generator(1))
    assert torch.equal(numbers(x[order]), whole[order])
    assert torch.equal(torch.cat([numbers(x[i:i+1]) for i in range(9)]), whole)
    assert torch.equal(numbers(x.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(numbers(x.double()), whole.double())
    assert torch.equal(numbers(x[[0, 0]])[0],
                       numbers(x[[0, 0]])[1]), 'copies of an image draw the same'
    changed = x.clone()
    changed[3, 0, 0, 0] += 1e-6
    assert (numbers(changed) != whole).flatten(1).any(1).tolist() == [i == 3 for i in range(9)]
    assert not torch.equal(numbers(x, 6), whole)
    assert torch.equal(numbers(x, None), numbers(x, 0))
    one = make_generator(5)
    many = make_generator(5)
    image_generators(one, x[:1]), image_generators(many, x)
    assert torch.equal(one.get_state(), many.get_state()), (
        'the caller\'s generator moves on by one number, whatever the batch')
    assert numbers(x, kind=torch.randn).min() < 0 <= whole.min()
