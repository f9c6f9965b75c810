"""Training follows its recipe to the letter, and a run that dies, runs out of disk or is continued
wrongly loses nothing and mixes nothing."""
import errno, math, os, random, resource, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from robustnb.models import training as T
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import load_state, save_state
from robustnb.data import digits, ImageSet, subset
from robustnb.models.zoo import build_model
from robustnb.models.loading import save_model
from robustnb.models.training import crop_and_flip, Recipe, train


pytestmark = pytest.mark.usefixtures('one_thread')


def job(epochs=12):
    "A small job with dropout and batch norm, the same in every process"
    data = subset(digits('train'), 60, seed=0)
    return Recipe(flip=False, batch_size=16,
                  lr=.02).shortened(epochs), build_model('AlexNet_BN', width=.0625, seed=1), data


def same(a, b):
    return (a.state_dict().keys() == b.state_dict().keys()
            and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()))


def facts(history): return history.drop(columns='seconds')


@pytest.fixture(scope='module')
def undisturbed(one_thread):
    recipe, model, data = job()
    return train(recipe, model, data, val=data, seed=3, device='cpu')


child = f'''
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
import test_training as t
recipe, model, data = t.job()
{{before}}
t.train(recipe, model, data, val=data, seed=3, checkpoint={{path!r}}, resume=True, device='cpu')
'''


def slow_job(path):
    "In a child that was forked: the job, with a pause after each epoch; never returns"
    def paused(*args):
        time.sleep(1)
        return predict(*args)
    try:
        T.predict = paused
        recipe, model, data = job()
        train(recipe, model, data, val=data, seed=3, checkpoint=path, resume=True, device='cpu')
    finally:
        os._exit(0)


def test_a_run_that_is_killed_again_and_again_ends_like_the_undisturbed_one(tmp_path, undisturbed):
    f = tmp_path/'run.pt'
    rng = random.Random(0)
    seen = []
    for _ in range(2):
        start = time.time()
        pid = os.fork()
        if not pid: slow_job(f)
        begun = lambda: f.exists() and (not seen or f.stat().st_mtime > start)
        while not begun() and time.time() < start + 60:
            time.sleep(.01)
        time.sleep(rng.uniform(0, .5))
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended == -signal.SIGKILL, 'killed, not finished'
        seen.append(load_state(f)['epoch'])
    assert 1 <= seen[0] < seen[1] < 12, f'killed after epochs {seen}'
    recipe, model, data = job()
    model, history = train(recipe, model, data, val=data, seed=3, checkpoint=f, resume=True,
                           device='cpu')
    assert same(model, undisturbed[0])
    assert facts(history).equals(facts(undisturbed[1]))


def test_a_run_that_is_killed_while_it_writes_keeps_the_last_whole_checkpoint(
        tmp_path, undisturbed):
    f = tmp_path/'run.pt'
    die = '''
import os, signal
save, t.core_save = torch.save, []
def half(state, path):
    save(state, path)
    t.core_save.append(1)
    if len(t.core_save) == 4:
        os.truncate(path, os.path.getsize(path)//2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
'''
    assert subprocess.run([sys.executable, '-c', child.format(path=str(f), before=die)], env={
        **os.environ, 'CUDA_VISIBLE_DEVICES': ''}).returncode == -signal.SIGKILL
    assert load_state(f)['epoch'] == 3
    recipe, model, data = job()
    model, history = train(recipe, model, data, val=data, seed=3, checkpoint=f, resume=True,
                           device='cpu')
    assert same(model, undisturbed[0]) and facts(history).equals(facts(undisturbed[1]))


def test_a_finished_run_is_not_trained_further(tmp_path):
    recipe, model, data = job(2)
    one, history = train(recipe, model, data, checkpoint=tmp_path/'run.pt', device='cpu')
    written = (tmp_path/'run.pt').read_bytes()
    two, again = train(recipe, model, data, checkpoint=tmp_path/'run.pt', resume=True, device='cpu')
    assert same(one, two)
    assert history.equals(again)
    assert (tmp_path/'run.pt').read_bytes() == written


def fail_at(call, error, monkeypatch):
    "torch.save writes some bytes and then fails, at its `call`-th use"
    save = torch.save
    calls = []
    def failing(state, path):
        calls.append(path)
        if len(calls) != call: return save(state, path)
        Path(path).write_bytes(b'half a checkpoint')
        raise error
    monkeypatch.setattr(torch, 'save', failing)


@pytest.mark.parametrize('error', (OSError(errno.ENOSPC, 'No space left on device'),
                                   RuntimeError('PytorchStreamWriter failed writing file data/3')),
                         ids=('OSError', 'RuntimeError'))
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
        tmp_path, monkeypatch, undisturbed, error):
    recipe, model, data = job()
    f = tmp_path/'run.pt'
    with monkeypatch.context() as m:
        fail_at(3, error, m)
        with pytest.raises(OSError, match='could not write .*run.pt.*free some space') as e:
            train(recipe, model, data, val=data, seed=3, checkpoint=f, device='cpu')
    assert e.value.errno == errno.ENOSPC
    assert [o.name for o in tmp_path.iterdir()] == ['run.pt']
    assert load_state(f)['epoch'] == 2
    resumed, history = train(recipe, model, data, val=data, seed=3, checkpoint=f, resume=True,
                             device='cpu')
    assert same(resumed, undisturbed[0])
    assert facts(history).equals(facts(undisturbed[1]))


def test_a_disk_that_fills_up_for_real(tmp_path):
    recipe, model, data = job(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match='run.pt'):
            train(recipe, model, data, checkpoint=tmp_path/'run.pt', device='cpu')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def checkpoint(one_thread, tmp_path_factory):
    f = tmp_path_factory.mktemp('run')/'run.pt'
    recipe, model, data = job(1)
    train(recipe, model, data, checkpoint=f, device='cpu')
    return f


others = dict(
    network=lambda r, m, d, s: (r, build_model('AlexNet_BN', width=.125), d, s),
    recipe=lambda r, m, d, s: (Recipe(flip=False, batch_size=16, lr=.03).shortened(1), m, d, s),
    images=lambda r, m, d, s: (r, m, ImageSet(255-d.images, d.labels, d.classes), s),
    seed=lambda r, m, d, s: (r, m, d, 4),
    weights=lambda r, m, d, s: (r, build_model('AlexNet_BN', width=.0625, seed=2), d, s))


@pytest.mark.parametrize('what', others)
def test_a_checkpoint_of_another_run_is_refused_by_name(checkpoint, what):
    before = checkpoint.read_bytes()
    recipe, model, data, seed = others[what](*job(1), 0)
    with pytest.raises(
            ValueError,
            match=f'belongs to another run: its {what} is .*run.pt.*Give the same {what}'):
        train(recipe, model, data, seed=seed, checkpoint=checkpoint, resume=True, device='cpu')
    with pytest.raises(ValueError, match='already exists.*resume=True'):
        train(recipe, model, data, seed=seed, checkpoint=checkpoint, device='cpu')
    assert checkpoint.read_bytes() == before


def test_other_labels_are_other_images(checkpoint):
    recipe, model, data = job(1)
    data = ImageSet(data.images, np.roll(data.labels, 1, 1), data.classes)
    with pytest.raises(ValueError, match='its images is'):
        train(recipe, model, data, checkpoint=checkpoint, resume=True, device='cpu')


def test_a_file_of_another_kind_is_refused(tmp_path):
    recipe, model, data = job(1)
    f = tmp_path/'run.pt'
    save_model(model, f)
    with pytest.raises(ValueError, match='run.pt is something else.*load_model'):
        train(recipe, model, data, checkpoint=f, resume=True, device='cpu')
    save_state([1, 2], f)
    with pytest.raises(ValueError, match='something else'):
        train(recipe, model, data, checkpoint=f, resume=True, device='cpu')
    f.write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='run.pt is damaged'):
        train(recipe, model, data, checkpoint=f, resume=True, device='cpu')


class Tiny(nn.Module):
    "One linear layer on pixels"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 3)
        with torch.no_grad():
            (self.fc.weight.copy_(.1*torch.randn(3, 192, generator=make_generator(0))),
             self.fc.bias.zero_())

    def forward(self, x): return self.fc(x.flatten(1))


def soft_set(n=30):
    rng = np.random.default_rng(0)
    labels = rng.random((n, 3)).astype(np.float32)
    return ImageSet(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8),
                    labels/labels.sum(1, keepdims=True), ('a', 'b', 'c'))


def test_against_the_formulas_of_the_recipe(monkeypatch):
    monkeypatch.setattr(T, 'fast_bf16', lambda device: False)
    recipe = Recipe(epochs=5, batch_size=7, lr=.05, momentum=.8, weight_decay=.01,
                    milestones=(2, 4), gamma=.3, warmup=1, crop=0, flip=False)
    data = soft_set()
    seed = 5
    trained, history = train(recipe, Tiny(), data, seed=seed, device='cpu')
    x = data.x.flatten(1).double()
    t = torch.from_numpy(data.labels).double()
    w = Tiny().fc.weight.detach().double()
    b = torch.zeros(3, dtype=torch.float64)
    vw = torch.zeros_like(w)
    vb = torch.zeros_like(b)
    losses = []
    for epoch in range(5):
        order, total = torch.randperm(30, generator=make_generator(seed, 'epoch', epoch)), 0
        for step in range(5):
            rate = .05*(step+1)/5 if epoch == 0 else .05*.3**((epoch >= 2) + (epoch >= 4))
            rows = order[7*step:7*step+7]
            p = (x[rows] @ w.T + b).softmax(1)
            total -= (t[rows]*p.log()).sum().item()
            d = (p-t[rows])/len(rows)
            gw = d.T @ x[rows] + .01*w
            gb = d.sum(0) + .01*b
            vw = .8*vw + gw
            vb = .8*vb + gb
            w = w - rate*(gw + .8*vw)
            b = b - rate*(gb + .8*vb)
        losses.append(total/30)
    assert (trained.fc.weight-w).abs().max() < 1e-5
    assert (trained.fc.bias-b).abs().max() < 1e-5
    assert history.loss.tolist() == pytest.approx(losses, rel=1e-5)
    assert history.lr.tolist() == pytest.approx([.05, .05, .015, .015, .0045])
    assert history.epoch.tolist() == [1, 2, 3, 4, 5]
    assert 'val_accuracy' not in history


def test_the_rate_at_every_moment():
    recipe = Recipe()
    for epoch, rate in ((0, 0), (.25, .025), (1, .1), (59.99, .1), (60, .02), (119, .02),
                        (120, .004), (160, .0008), (199, .0008)):
        assert recipe.rate(epoch) == pytest.approx(rate)
    assert Recipe(warmup=0).rate(0) == .1
    assert recipe.shortened(100).milestones == (30, 60, 80)
    assert recipe.shortened(100).epochs == 100
    assert recipe == Recipe(milestones=[60, 120, 160])
    assert hash(recipe)
    assert recipe.shortened(200) == recipe


@pytest.mark.parametrize('bad', (dict(epochs=0), dict(batch_size=0), dict(lr=0), dict(lr=-1),
                                 dict(lr=math.nan), dict(gamma=0), dict(weight_decay=-1e-4),
                                 dict(weight_decay=math.nan), dict(warmup=-1), dict(crop=-1),
                                 dict(momentum=-.1), dict(epochs=math.nan)),
                         ids=str)
def test_recipes_that_make_no_sense(bad):
    kind = TypeError if bad.get('epochs', 0) != 0 else ValueError    # a count that is none
    with pytest.raises(kind, match=f'`{next(iter(bad))}` must'):
        Recipe(**bad)


def test_augmentation_moves_whole_pixels_and_draws_from_its_generator_alone():
    x = torch.rand(64, 3, 6, 5, generator=make_generator(0))
    state = torch.get_rng_state()
    out = crop_and_flip(x, 2, True, make_generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, crop_and_flip(x, 2, True, make_generator(1)))
    padded = F.pad(x, [2]*4)
    found = torch.zeros(5, 5, 2)
    for i, o in enumerate(out):
        hits = [(dy, dx, m) for dy in range(5) for dx in range(5) for m in (0, 1) if torch.equal(
            o, padded[i, :, dy:dy+6, dx:dx+5].flip(2) if m else padded[i, :, dy:dy+6, dx:dx+5])]
        assert len(hits) == 1
        found[hits[0]] += 1
    assert (found.sum((1, 2)) > 0).all()
    assert (found.sum((0, 2)) > 0).all()
    assert 15 < found.sum((0, 1))[1] < 49
    plain = crop_and_flip(x, 0, True, make_generator(2))
    mirrored = (plain != x).flatten(1).any(1)
    assert 15 < mirrored.sum() < 49
    assert torch.equal(plain[mirrored], x.flip(3)[mirrored])
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_crops_and_mirrors_follow_the_recipe(monkeypatch):
    asked = []
    monkeypatch.setattr(
        T, 'crop_and_flip',
        lambda x, crop, flip, g: asked.append((crop, flip)) or crop_and_flip(x, crop, flip, g))
    train(Recipe(epochs=1, crop=1, flip=True, batch_size=10), Tiny(), soft_set(), device='cpu')
    assert asked == [(1, True)]*3


def test_dropout_and_order_come_from_the_seed_alone(monkeypatch):
    recipe, model, data = job(1)
    def forbidden(*args): raise AssertionError('the generators of all devices were seeded')
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', forbidden)
    torch.random.default_generator.manual_seed(1)
    before = torch.get_rng_state()
    one, _ = train(recipe, model, data, device='cpu')
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training
    assert not model.training
    torch.random.default_generator.manual_seed(2)
    assert same(one, train(recipe, model, data, device='cpu')[0])
    assert not same(one, train(recipe, model, data, seed=1, device='cpu')[0])
    assert same(model, job(1)[1]), 'the network that was passed in keeps its weights'


def test_validation_is_only_measured(undisturbed):
    recipe, model, data = job()
    blind, history = train(recipe, model, data, seed=3, device='cpu')
    assert same(blind, undisturbed[0])
    assert 'val_accuracy' not in history
    right = (predict(blind, data.x).argmax(1).numpy() == data.y).mean()
    assert undisturbed[1].val_accuracy.iloc[-1] == right
    assert history.loss.tolist() == undisturbed[1].loss.tolist()
    many = subset(digits('test'), 300, seed=0)
    watched, history = train(recipe, model, data, val=many, seed=3, device='cpu')
    assert same(watched, blind)
    assert history.val_accuracy.nunique() > 3


def test_a_run_that_diverges_says_so():
    with pytest.raises(FloatingPointError,
                       match=r'not finite in epoch \d.*Lower `lr` \(now 1e\+30\)'):
        train(Recipe(epochs=3, lr=1e30, warmup=0), Tiny(), soft_set(), device='cpu')


def test_too_few_images_are_refused():
    with pytest.raises(ValueError,
                       match='at least one image per class; got 2 images for 3 classes'):
        train(Recipe(epochs=1), Tiny(), soft_set()[:2], device='cpu')


def test_a_network_of_other_classes_is_refused():
    with pytest.raises(ValueError,
                       match='got 7 logits for 10 classes. Build it with `n_classes=10`'):
        train(job(1)[0], build_model('AlexNet', 7, width=.0625), job(1)[2], device='cpu')


def test_narrow_networks_and_odd_batches_do_not_corrupt_memory():
    "torch 2.15 did, in channels-last memory with two threads: a crash, so it runs in a process of its own"
    code = ("import numpy as np, torch; torch.set_num_threads(2)\n"
            "from robustnb import ImageSet, Recipe, build_model, train\n"
            "images = np.random.default_rng(0).integers(0, 256, (99, 32, 32, 3), dtype=np.uint8)\n"
            "train(Recipe(batch_size=33, flip=False).shortened(6), build_model('ResNet_18', "
            "width=.125), ImageSet(images, np.arange(99) % 10, 10), device='cpu')")
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-500:]
