"""Two processes on the CPU, started by accelerate's launcher for them, must compute what one
computes: the same gradient, the same batch norms, one writer of files."""
import copy, json, os, shutil, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from robustnb import distributed
from robustnb.commands import train as train_cli, transfer as transfer_cli
from robustnb.data import digits, subset
from robustnb.files import load_state
from robustnb.models import training
from robustnb.models.training import Recipe, train
from robustnb.models.wrapping import wrap_model
from robustnb.models.zoo import build_model
from robustnb.transfer import generator
from robustnb.transfer.generator import generate, train_generator

pytestmark = pytest.mark.usefixtures('one_thread')
recipe = Recipe(batch_size=20, lr=.02, flip=False, crop=1).shortened(2)


def data():
    # the last batch of a pass is three images, one and two
    return subset(digits('train', size=16), 43, seed=0)
def network():
    "Small, with batch norms of very different inputs"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return wrap_model(body, (.4, .4, .4), (.3, .3, .3))
def small_generator(net):
    return train_generator(net, steps=4, batch_size=9, size=16, width=8, device='cpu')
def images(made): return {'images': generate(made, 20)[0]}
def largest(a, b): return max((x.float()-b[k].float()).abs().max().item() for k, x in a.items())


def gradients(n):
    """What one step on `n` images adds up to, and what the batch norms remember; of one image, one
    process has none"""
    net = network().train()
    d = data()
    x = d.x[:n]
    y = torch.as_tensor(d.y[:n])
    own = distributed.part(n)
    with distributed.whole_batch(net):
        out = net(x[own])
    (nn.functional.cross_entropy(out, y[own], reduction='sum')/n).backward()
    distributed.all_sum_gradients_(net)
    return {k: p.grad
            for k, p in net.named_parameters()} | {k: b.clone() for k, b in net.named_buffers()}


class Killed(BaseException): pass


def _in_both(out):
    "What each of the two processes runs; the rest of the file reads what it leaves"
    training.fast_bf16 = generator.fast_bf16 = lambda device: False
    saved = []
    save = training.save_state
    def counted(state, path):
        saved.append(state['epoch'])
        return save(state, path)
    def then_killed(state, path):
        save(state, path)
        raise Killed
    def then_gone():
        distributed.wait()
        raise Killed
    start = network()
    # the main process's start is everybody's
    if distributed.init_distributed('cpu') and distributed.rank():
        for t in (start.normalize.mean, start.net[0].weight):
            nn.init.constant_(t, .3)
    with patch.object(training, 'save_state', counted):
        net, history = train(recipe, start, data(), val=data(), checkpoint=out/'whole.pt',
                             device='cpu')
    try:
        with (patch.object(training, 'save_state', then_killed),
              patch.object(training, 'wait', then_gone) if distributed.rank() else nullcontext()):
            train(recipe, network(), data(), checkpoint=out/'cut.pt', device='cpu')
    except Killed:
        pass
    if distributed.rank() == 0:
        distributed.wait()       # the barrier that the kill left out
        shutil.copy(out/'cut.pt', out/'half.pt')
    resumed, _ = train(recipe, network(), data(), checkpoint=out/'cut.pt', resume=True,
                       device='cpu')
    with patch.object(training, 'whole_batch', nullcontext):
        apart, _ = train(recipe, network(), data(), device='cpu')
    with patch.object(training, 'all_sum_gradients_', lambda m: None):
        alone, _ = train(recipe, network(), data(), device='cpu')
    made, steps = small_generator(network())
    try:
        train_generator(net, steps=1, batch_size=1)
    except ValueError as e:
        refused = str(e)
    torch.save(dict(saved=saved, size=distributed.world_size(), part=str(distributed.part(5)),
                    net=net.state_dict(), resumed=resumed.state_dict(),
                    apart=apart.state_dict(), alone=alone.state_dict(),
                    history=history.to_json(), gradients=[gradients(n) for n in (1, 3, 20)],
                    generator=images(made), steps=steps.to_json(), refused=refused),
               out/f'{distributed.rank()}.pt')
    with patch.object(train_cli, 'train',
                      lambda *args, **kw: (build_model('ResNet_18', width=.0625).eval(), history)):
        train_cli.train_command(model='ResNet_18', width=.0625, epochs=2, out=str(out/'run'))
    distributed.wait()
    with patch.object(transfer_cli, 'train_generator', lambda net, **kw: (made, steps)):
        try:
            transfer_cli.generate_command(
                str(out/'run'/'weights.pt'), n=8, size=16, out=str(out/'images'))
        except SystemExit as e:
            assert distributed.rank() == 1
            assert not e.code
        else:
            assert distributed.rank() == 0


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What the two processes found, what they said, and where"
    pytest.importorskip('accelerate',
                        reason="accelerate is not installed: pip install 'robustnb[accelerate]'")
    out = tmp_path_factory.mktemp('both')
    env = ({k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
           | dict(OMP_NUM_THREADS='1',
                  PYTHONPATH=os.pathsep.join(o or os.getcwd() for o in sys.path), HF_HOME=str(out)))
    said = subprocess.run([sys.executable, __file__, str(out)], env=env, cwd=out,
                          capture_output=True, text=True, timeout=500)
    assert said.returncode == 0, said.stderr[-3000:]
    return *(torch.load(out/f'{r}.pt') for r in (0, 1)), said, out


@pytest.fixture(scope='module')
def one(one_thread):
    with (patch.object(training, 'fast_bf16', lambda device: False),
          patch.object(generator, 'fast_bf16', lambda device: False)):
        net, history = train(recipe, network(), data(), val=data(), device='cpu')
        return net, history, *small_generator(network())


def test_gradients_are_those_of_the_whole_batch(both):
    for n, found in zip((1, 3, 20), both[0]['gradients']):
        whole = gradients(n)
        for k, v in whole.items():
            assert torch.allclose(found[k].float(), v.float(), rtol=1e-3, atol=2e-4), (n, k)
        assert max(v.abs().max() for v in whole.values()) > .1


def test_two_processes_train_what_one_trains(both, one):
    main, other, _, _ = both
    net, history, _, _ = one
    assert main['size'] == other['size'] == 2
    assert {main['part'], other['part']} == {'slice(0, 2, None)', 'slice(2, 5, None)'}
    moved = largest(net.state_dict(), network().state_dict())
    assert largest(main['net'], net.state_dict()) < 2e-4 < .1 < moved
    assert largest(main['net'], other['net']) == 0, 'all processes hold the same network'
    for k in ('loss', 'accuracy', 'val_accuracy', 'lr'):
        assert list(json.loads(main['history'])[k].values()) == pytest.approx(
            history[k].tolist(), rel=1e-3), k


def test_without_the_exchange_it_would_be_another_network(both, one):
    "Batch norms that see half of a batch, and gradients of one part, are not small differences"
    main, other, _, _ = both
    assert largest(main['apart'],
                   one[0].state_dict()) > .002 < largest(main['alone'], other['alone'])


def test_one_writes_and_a_killed_run_goes_on(both):
    main, other, _, out = both
    assert main['saved'] == [1, 2]
    assert other['saved'] == []
    assert largest(main['resumed'], main['net']) == 0 == largest(other['resumed'], main['net'])
    assert load_state(out/'cut.pt')['epoch'] == 2


def test_another_number_of_processes_goes_on(both, monkeypatch):
    "One process continues what two have begun"
    main, _, _, out = both
    monkeypatch.setattr(training, 'fast_bf16', lambda device: False)
    net, history = train(recipe, network(), data(), checkpoint=out/'half.pt', resume=True,
                         device='cpu')
    assert load_state(out/'half.pt')['epoch'] == len(history) == 2
    assert largest(net.state_dict(), main['net']) < 2e-4


def test_two_processes_make_the_generator_of_one(both, one):
    main, other, _, _ = both
    _, _, made, steps = one
    assert largest(main['generator'], images(made)) < 1e-2
    assert largest(main['generator'], other['generator']) == 0
    for k in ('cross_entropy', 'bn_distance', 'agreement'):
        assert list(json.loads(main['steps'])[k].values()) == pytest.approx(
            steps[k].tolist(), rel=1e-3, abs=1e-3), k
    assert main['refused'] == '`batch_size` must be at least the number of processes, 2; got 1.'


def test_a_command_speaks_once(both):
    _, _, said, out = both
    assert said.stdout.count('ResNet_18: test accuracy') == 1 == said.stdout.count('8 images in')
    assert sorted(o.name for o in (out/'run').iterdir()) == [
        'history.csv', 'manifest.json', 'weights.pt']


def test_nothing_is_looked_for_without_a_launcher(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main(), distributed.part(7),
            str(distributed.init_distributed('cpu'))) == (1, 0, True, slice(0, 7), 'cpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ImportError, match=r'robustnb\[accelerate\]'):
        train(recipe, network(), data(), device='cpu')


@pytest.mark.parametrize('n', (0, 1, 2, 5, 64))
@pytest.mark.parametrize('processes', (1, 2, 3, 8))
def test_parts_cover_a_batch(n, processes, monkeypatch):
    parts = []
    for r in range(processes):
        monkeypatch.setattr(distributed, 'world_size', lambda: processes)
        monkeypatch.setattr(distributed, 'rank', lambda: r)
        parts.append(range(n)[distributed.part(n)])
    assert [i for p in parts for i in p] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('layer, shape', (
    (nn.BatchNorm2d(3), (6, 3, 4, 4)), (nn.BatchNorm1d(3, affine=False), (6, 3)),
    (nn.BatchNorm2d(3, momentum=None), (2, 3, 2, 2)),
    (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2))))
def test_whole_batch_norm_is_batch_norm(layer, shape, monkeypatch):
    "Three passes, one far from zero, one hardly varying, against torch's layer; in evaluation too"
    monkeypatch.setattr(distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(distributed, 'all_sum', lambda x: x)
    ours = copy.deepcopy(layer)
    theirs = copy.deepcopy(layer)
    g = torch.Generator().manual_seed(0)
    for shift, scale in ((0, 1), (50, 1), (0, 3e-3)):
        x = (scale*torch.randn(shape, generator=g) + shift).requires_grad_()
        w = torch.randn(shape, generator=g)
        with distributed.whole_batch(ours):
            a = ours(x)
        b = theirs(x)
        ga = torch.autograd.grad((a*w).sum(), x)[0]
        gb = torch.autograd.grad((b*w).sum(), x)[0]
        assert torch.allclose(a, b, atol=1e-4)
        assert torch.allclose(ga, gb, rtol=1e-3, atol=1e-4)
    for k, v in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[k].float(), v.float(), atol=1e-4), k
    with distributed.whole_batch(ours.eval()):
        assert torch.allclose(ours(x), theirs.eval()(x), atol=1e-4)
    assert 'forward' not in vars(ours)
    if len(shape) == 2:
        with pytest.raises(ValueError, match='more than one value'), distributed.whole_batch(ours.train()):
            ours(torch.zeros(1, 3))


if __name__ == '__main__':
    torch.set_num_threads(1)
    from accelerate import debug_launcher
    debug_launcher(_in_both, (Path(sys.argv[1]),), 2)
