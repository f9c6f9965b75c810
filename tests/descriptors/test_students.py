"""Descriptor networks: shapes, losses in closed form, a teacher and students that learn, resumed
runs, and what must be refused."""
import copy, math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import load_state, save_state
from robustnb.data import digits, subset
from robustnb.descriptors.students import (
    cosface, Descriptor, descriptor_losses, descriptor_model, descriptor_names, DescriptorRecipe,
    distill_descriptor, fidelity, load_descriptor, WeightedEnsemble, save_descriptor, split_groups,
    student_recipes, train_teacher, views, tensor_digest)

FAST = DescriptorRecipe(epochs=3, batch_size=16, lr=3e-3)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(): return subset(digits('train'), 60, seed=0)


class Tiny(Descriptor):
    "Linear in 8x8 means"
    def __init__(self, dim=8, seed=0):
        net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, dim))
        for p in net.parameters():
            nn.init.normal_(p, std=.3, generator=make_generator(seed))
        super().__init__(net, dim)
        self.eval()


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---- networks

@pytest.mark.parametrize('name', descriptor_names)
@pytest.mark.parametrize('size', [16, 32, 64])
def test_unit_vectors_at_every_size(name, size):
    net = descriptor_model(name, 24, .125, size)
    x = torch.rand(3, 3, size, size, generator=make_generator(1))
    d = net(x)
    assert d.shape == (3, 24)
    assert not net.training
    assert torch.allclose(d.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(net(x[[2, 0]]), d[[2, 0]],
                          atol=1e-5), 'an image does not depend on its batch'


def test_the_opened_network():
    "Its layers as the organisers published them"
    net = descriptor_model('Caffe34', size=112)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs if m.padding == (0, 0)] == [32, 64, 128, 256, 512]
    assert len(convs) == 5 + 2*(1+2+5+3)
    assert sum(isinstance(m, nn.PReLU) for m in net.modules()) == len(convs)
    assert net.net[-1].in_features == 12800
    assert net.net[-1].out_features == 512
    x = torch.rand(1, 3, 112, 112, generator=make_generator(0))
    block = net.net[7]
    h = net.net[:7](net.normalize(x))
    assert torch.allclose(block(h), h + block.body(h)), 'the sum comes after the activation'


def test_depths():
    count = lambda n: sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
                          for m in descriptor_model(n, 8, .125, 32).modules())
    assert count('ResNet_18') == 1 + 2*8
    assert count('ResNet_34') == 1 + 2*16
    assert sum('denselayer' in n and n.endswith('conv2')
               for n, _ in descriptor_model('DenseNet', 8, .125, 32).named_modules()) == 6+12+24


def test_width_and_channels():
    size = lambda w: sum(p.numel() for p in descriptor_model('ResNet_18', 8, w, 32).parameters())
    assert 3.5 < size(.5)/size(.25) < 4.1


def test_seed_and_global_randomness():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a = descriptor_model('DenseNet', 8, .125, 32, seed=0)
    b = descriptor_model('DenseNet', 8, .125, 32, seed=0)
    c = descriptor_model('DenseNet', 8, .125, 32, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert same(a, b)
    assert not same(a, c)


def test_timm_by_name():
    timm = pytest.importorskip('timm')
    name = 'test_resnet' if 'test_resnet' in timm.list_models() else 'resnet18'
    net = descriptor_model(name, 16, size=32)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    assert same(net, descriptor_model(name, 16, size=32))


@pytest.mark.parametrize('args,words', [(dict(name='ResNet_19'), '`name`'),
                                        (dict(name='ResNet_18', dim=1), '`dim`'),
                                        (dict(name='ResNet_18', width=float('nan')), '`width`'),
                                        (dict(name='ResNet_18', size=8), '`size`')])
def test_bad_networks(args, words):
    with pytest.raises(ValueError, match=words):
        descriptor_model(**args)


def test_saved_and_read_again(tmp_path, data):
    net, _ = train_teacher(descriptor_model('ResNet_18', 12, .125, 32, seed=3), data.images,
                           data.y, DescriptorRecipe(epochs=1, batch_size=30))
    again = load_descriptor(save_descriptor(net, tmp_path/'net.pt'))
    assert same(net, again)
    assert not again.training
    assert again.made == dict(name='ResNet_18', dim=12, width=.125, size=32)
    with pytest.raises(ValueError, match='must come from `descriptor_model`'):
        save_descriptor(Tiny(), tmp_path/'other.pt')
    assert not (tmp_path/'other.pt').exists()
    state = load_state(tmp_path/'net.pt')
    save_state(state | dict(made=state['made'] | dict(dim=13)), tmp_path/'wrong.pt')
    with pytest.raises(ValueError, match='weights of the network it names.*size mismatch'):
        load_descriptor(tmp_path/'wrong.pt')
    save_state(dict(a=1), tmp_path/'else.pt')
    with pytest.raises(ValueError, match='something else'):
        load_descriptor(tmp_path/'else.pt')


# ---- losses

def test_cosface_by_hand():
    g = make_generator(0)
    d = F.normalize(torch.randn(5, 4, generator=g), dim=1)
    w = torch.randn(3, 4, generator=g)
    y = torch.tensor([0, 1, 2, 1, 0])
    total = 0
    for i in range(5):
        cos = [float(d[i] @ w[k]/w[k].norm()) for k in range(3)]
        z = [10*(c - (.3 if k == y[i] else 0)) for k, c in enumerate(cos)]
        total += math.log(sum(math.exp(o) for o in z)) - z[y[i]]
    assert abs(cosface(d, w, y, 10., .3).item() - total/5) < 1e-5


def test_losses_by_hand():
    g = make_generator(0)
    d, t = (F.normalize(torch.randn(6, 5, generator=g), dim=1) for _ in range(2))
    gap = (d-t).numpy()
    huber = np.where(abs(gap) < .05, gap**2/2, .05*(abs(gap)-.025)).mean()
    cosine = 1 - (d*t).sum(1).mean().item()
    wanted = dict(mse=(gap**2).mean(), l2=np.sqrt((gap**2).sum(1)).mean(), huber=huber,
                  cosine=cosine, cosine_huber=cosine + 100*huber)
    for k, f in descriptor_losses.items():
        assert abs(f(d, t).item() - wanted[k]) < 1e-5, k
        assert abs(f(t, t).item()) < 1e-6, k


def test_rates():
    r = DescriptorRecipe(lr=.01)
    assert r.rate(0) == 0
    assert r.rate(1) < 1e-12
    assert abs(r.rate(.05) - .005*(1+math.cos(.05*math.pi))/2) < 1e-12
    assert max(r.rate(t/1000) for t in range(1001)) == r.rate(.1)
    assert set(student_recipes) == set(descriptor_names)


@pytest.mark.parametrize('bad', [dict(epochs=0), dict(batch_size=1), dict(lr=0),
                                 dict(lr=float('nan')), dict(weight_decay=-1), dict(crop=-1)])
def test_bad_recipes(bad):
    with pytest.raises(ValueError, match='got DescriptorRecipe'):
        DescriptorRecipe(**bad)


# ---- training

def test_student_of_a_linear_teacher_learns_and_a_label_does_not_help(data):
    teacher = Tiny(seed=1)
    answers = predict(teacher, data.x)
    start = Tiny(seed=2)
    copy_of_start = copy.deepcopy(start)
    student, history = distill_descriptor(
        start, data.images, answers, recipe=DescriptorRecipe(epochs=60, batch_size=16, lr=1e-2))
    assert same(start, copy_of_start), 'the network given is not changed'
    assert not student.training
    assert history.loss.iloc[-1] < .1*history.loss.iloc[0]
    assert fidelity(student, data.images,
                    answers).cosine > .95 > fidelity(start, data.images, answers).cosine
    shuffled, _ = distill_descriptor(start, data.images, answers.flip(0),
                                     recipe=DescriptorRecipe(epochs=60, batch_size=16, lr=1e-2))
    assert fidelity(shuffled, data.images,
                    answers).cosine < .8, 'answers of other images teach something else'


def test_teacher_learns_classes(data):
    net, history = train_teacher(Tiny(seed=1), data.images, data.y,
                                 DescriptorRecipe(epochs=60, batch_size=16, lr=1e-2))
    d = predict(net, data.x)
    alike = torch.from_numpy(data.y[:, None] == data.y)
    gap = lambda d: ((d@d.T)[alike].mean() - (d@d.T)[~alike].mean()).item()
    assert gap(d) > gap(predict(Tiny(seed=1), data.x)) + .3
    assert list(history.epoch) == list(range(1, 61))


def test_seeds_and_global_randomness(data):
    answers = predict(Tiny(seed=1), data.x)
    start = Tiny()
    before = torch.get_rng_state()
    small = lambda seed: distill_descriptor(start, data.images, answers, recipe=FAST, seed=seed)[0]
    assert same(small(0), small(0))
    assert not same(small(0), small(1))
    assert torch.equal(before, torch.get_rng_state())


def test_crop_and_flip_only_when_asked(data):
    answers = predict(Tiny(seed=1), data.x)
    plain, moved = (distill_descriptor(Tiny(), data.images, answers, recipe=DescriptorRecipe(
        epochs=2, batch_size=16, crop=c, flip=f))[0] for c, f in ((0, False), (0, True)))
    assert not same(plain, moved)


@pytest.mark.parametrize('kind', ['teacher', 'student'])
def test_resumed_run_is_the_same(kind, data, tmp_path, monkeypatch):
    "Killed after the second epoch, then called again"
    import robustnb.descriptors.students as module
    answers = predict(Tiny(seed=1), data.x)
    path = tmp_path/'run.pt'
    go = lambda **kw: (train_teacher(Tiny(), data.images, data.y, FAST, **kw) if kind == 'teacher'
                       else distill_descriptor(Tiny(), data.images, answers, recipe=FAST, **kw))
    whole, history = go()
    real = module.save_state
    calls = []

    def stop(state, where):
        real(state, where)
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(module, 'save_state', stop)
    with pytest.raises(KeyboardInterrupt):
        go(checkpoint=path)
    assert len(load_state(path)['history']) == 2
    monkeypatch.setattr(module, 'save_state', real)
    with pytest.raises(ValueError, match='already exists'):
        go(checkpoint=path)
    again, more = go(checkpoint=path, resume=True)
    assert same(whole, again)
    assert history.equals(more)
    with pytest.raises(ValueError, match='belongs to another run'):
        go(checkpoint=path, resume=True, seed=3)


def test_checkpoint_knows_its_options(data, tmp_path):
    answers = predict(Tiny(seed=1), data.x)
    distill_descriptor(Tiny(), data.images, answers, recipe=FAST, checkpoint=tmp_path/'a.pt')
    for change in (dict(loss='mse'),
                   dict(recipe=DescriptorRecipe(epochs=4, batch_size=16, lr=3e-3))):
        with pytest.raises(ValueError, match='belongs to another run'):
            distill_descriptor(Tiny(), data.images, answers, **{**dict(recipe=FAST), **change},
                               checkpoint=tmp_path/'a.pt', resume=True)
    with pytest.raises(ValueError, match='belongs to another run'):
        distill_descriptor(Tiny(seed=4), data.images, answers, recipe=FAST,
                           checkpoint=tmp_path/'a.pt', resume=True)


def test_what_diverges_is_named(data):
    with pytest.raises(FloatingPointError, match='Lower `lr`'):
        distill_descriptor(Tiny(), data.images, np.full((60, 8), 1e38, np.float32), loss='mse',
                           recipe=DescriptorRecipe(epochs=2, batch_size=16, lr=1e6))


@pytest.mark.parametrize('change,words', [
    (lambda im, d: (im[:5], d), '`descriptors` must have one row'),
    (lambda im, d: (im.astype(float), d), '`images` must be uint8'),
    (lambda im, d: (im[..., :1], d), '`images` must be uint8'),
    (lambda im, d: (im, np.where(np.arange(60)[:, None] == 7, np.nan, d)), 'row 7 is not'),
    (lambda im, d: (im, d[:, :5]), 'must answer with 5 numbers')])
def test_bad_answers(change, words, data):
    images, d = change(data.images, predict(Tiny(), data.x).numpy())
    with pytest.raises((ValueError, TypeError), match=words):
        distill_descriptor(Tiny(), images, d, recipe=FAST)


def test_bad_labels_and_losses(data):
    with pytest.raises(ValueError, match='`y` must be class numbers'):
        train_teacher(Tiny(), data.images, data.labels)
    with pytest.raises(ValueError, match='`y` must be class numbers'):
        train_teacher(Tiny(), data.images, data.y-5)
    with pytest.raises(ValueError, match='`loss` must be one of mse'):
        distill_descriptor(Tiny(), data.images, predict(Tiny(), data.x), loss='triplet')


# ---- fidelity and splits

def test_fidelity_by_hand(data):
    d = predict(Tiny(seed=0), data.x).numpy()
    t = predict(Tiny(seed=1), data.x).numpy()
    f = fidelity(Tiny(seed=0), data.images, t)
    assert abs(f.cosine - (d*t).sum(1).mean()) < 1e-5
    assert abs(f.mse - ((d-t)**2).mean()) < 1e-6
    assert abs(f.distance - np.sqrt(((d-t)**2).sum(1)).mean()) < 1e-5
    assert abs(f['within_0.01'] - (abs(d-t) < .01).mean()) < .003
    near = lambda d: np.array([np.argmin([((a-b)**2).sum() for b in t]) for a in d])
    assert abs(f.nearest - (near(d) == near(t)).mean()) < 1e-6


def test_groups_stay_together():
    groups = np.repeat(np.arange(20), 3)
    fit, out = split_groups(groups, .25, seed=1)
    assert len(out) == 15
    assert sorted([*fit, *out]) == list(range(60))
    assert not set(groups[fit]) & set(groups[out])
    assert list(split_groups(groups, .25, seed=2)[1]) != list(out)
    for bad in (0, 1, float('nan'), .01):
        with pytest.raises(ValueError, match='`fraction`'):
            split_groups(groups, bad)


def test_mixtures():
    nets = [descriptor_model('ResNet_18', 8, .125, 16, seed=k) for k in (0, 1)]
    x = torch.rand(4, 3, 16, 16, generator=make_generator(0))
    with torch.no_grad():
        a, b, ra, rb = *(n(x) for n in nets), *(n(x.flip(3)) for n in nets)
        mix = WeightedEnsemble(nets, [1, 3], mirror=True)
        assert torch.allclose(mix(x), (a + ra + 3*b + 3*rb)/8, atol=1e-6)
        assert torch.allclose(WeightedEnsemble(nets)(x), (a+b)/2, atol=1e-6)
        assert torch.allclose(WeightedEnsemble(nets, [5e3, 5e3])(x), (a+b)/2, atol=1e-6)
    with torch.no_grad():
        mix.weights.mul_(7)
        assert torch.allclose(mix(x), (a + ra + 3*b + 3*rb)/8,
                              atol=1e-6), 'weights are shares, trained or not'
    assert not mix.training
    assert WeightedEnsemble([nets[0].train()]).training
    nets[0].eval()
    mix = WeightedEnsemble(nets)
    (mix(x)[:, 0].sum()).backward()
    assert mix.weights.grad.abs().max() > 0
    assert nets[1].net[0].weight.grad is not None
    for bad in ([], [1], [1, -1], [0, 0], [1, float('nan')], [1, float('inf')]):
        with pytest.raises(ValueError, match='`weights`'):
            WeightedEnsemble(nets, bad)
    with pytest.raises(ValueError, match='`weights`'):
        WeightedEnsemble([])


def test_views_are_altered_one_by_one(data):
    images = data.images[:30]
    asked = views(images, 3, seed=4, noise=0)
    assert asked.dtype == np.uint8
    assert asked.shape == (90, *images.shape[1:])
    assert (asked[:30] == images).all()
    assert (views(images, 3, seed=4, noise=0) == asked).all()
    assert not (views(images, 3, seed=5, noise=0)[30:] == asked[30:]).all()
    assert (views(images, 1) == images).all()
    one = views(np.repeat(images[:1], 30, 0), 2)[30:]
    assert len(np.unique(one, axis=0)) == 30, 'a copy is of its own image'
    assert np.corrcoef(asked[30:60].mean((1, 2, 3)),
                       images.mean((1, 2, 3)))[0, 1] > .5, 'a copy is of its own image'


def test_noisy_views():
    flat = np.full((400, 32, 32, 3), 128, np.uint8)
    plain = views(flat, 2, noise=0)[400:].astype(float)
    noisy = views(flat, 2, noise=.05)[400:].astype(float)
    move = (noisy - plain)/255
    inside = move[:, 6:-6, 6:-6]        # away from what turning brings in
    # five noises whose variances are .05**2 u**4, and the mean of u**4 is a fifth
    assert abs(inside.std() - .05) < .01
    assert abs(inside.mean()) < .01
    coarse = inside.reshape(400, 5, 4, 5, 4, 3).mean((2, 4))
    assert coarse.std() > .5*inside.std()       # fine noise alone would leave a quarter
    half = np.concatenate([np.zeros((200, 32, 32, 3), np.uint8),
                           np.full((200, 32, 32, 3), 200, np.uint8)])
    level = views(half, 2, noise=1e-6)[400:].mean((1, 2, 3))[:200]
    assert .1 < (level > 5).mean() < .4, 'half are blended, half of these with a bright one'
    for bad in (-.1, 2, float('nan')):
        with pytest.raises(ValueError, match='`noise`'):
            views(flat[:2], 2, noise=bad)


def test_xception_halves_maps_as_the_original():
    timm = pytest.importorskip('timm')
    pools = lambda net: {(m.kernel_size, m.stride, m.padding) for m in net.modules()
                         if isinstance(m, torch.nn.MaxPool2d)}
    assert pools(descriptor_model('Xception',
                                  width=.125)) == pools(timm.create_model('legacy_xception'))


def test_a_digest_knows_values_types_and_shapes():
    zeros = torch.zeros(2, 3)
    assert tensor_digest(zeros) == tensor_digest(zeros.clone())
    assert tensor_digest(zeros) != tensor_digest(torch.zeros(3, 2))
    assert tensor_digest(zeros) != tensor_digest(zeros.double())
    assert tensor_digest(zeros) != tensor_digest(zeros + 1)
