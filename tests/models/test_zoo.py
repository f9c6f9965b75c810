"Deeper checks of the models and their cost: other libraries as reference, all nine networks, damaged files."
import copy
import pickle

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from robustnb.core import make_generator
from robustnb.files import load_state, save_state
from robustnb.models.complexity import model_complexity
from robustnb.quant.ptq import model_bytes
from robustnb.models.wrapping import batchnorms, last_linear, wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.models.loading import load_model, save_model
from robustnb.models.graph import fold_batchnorm, trace

imagenet = dict(mean=(.485, .456, .406), std=(.229, .224, .225))
fixed = ('AlexNet', 'AlexNet_BN', 'VGG_16', 'VGG_19')


def images(n=4, size=32):
    return torch.rand(n, 3, size, size, generator=make_generator(0, 'test images'))


def randomise(net, seed=0):
    g = make_generator(seed, 'randomise')
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, low, high in ((m.running_mean, -.5, .5), (m.running_var, .5, 2.),
                                 (m.weight.data, .5, 1.), (m.bias.data, -.5, .5)):
                t.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return net


def same(a, b, tol=1e-4):
    return (float((a - b).detach().abs().max()) <= tol*float(b.detach().abs().max())
            and float(b.detach().std()) > 0)


@pytest.mark.parametrize('name', model_names)
def test_gradients_reach_every_weight_and_the_pixels(name):
    model = build_model(name, n_classes=4, width=.125).train()
    x = images(8).requires_grad_()
    logits = model(x)
    assert logits.shape == (8, 4)
    F.cross_entropy(logits, torch.arange(8) % 4).backward()
    assert x.grad.abs().sum() > 0
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert torch.isfinite(p.grad).all(), n


@pytest.mark.parametrize('name', model_names)
@pytest.mark.parametrize('width', (.01, .25))
def test_widths(name, width):
    model = build_model(name, n_classes=3, width=width)
    with torch.no_grad():
        out = model(images(2))
    assert out.shape == (2, 3)
    assert torch.isfinite(out).all()
    assert last_linear(model).weight.shape[0] == 3
    assert model.net.features[0].in_channels == 3


@pytest.mark.parametrize('name', model_names)
@torch.no_grad()
def test_folding_keeps_the_logits(name):
    model = randomise(build_model(name, n_classes=5, width=.125))
    x = images()
    before = model(x)
    weights = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    assert same(folded(x), before)
    assert not batchnorms(folded)
    assert not folded.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)
    assert last_linear(folded).weight.shape[0] == 5
    assert same(fx.symbolic_trace(model)(x), before, 1e-6), "the plain tracer must do as well"


@pytest.mark.parametrize('name', model_names)
def test_macs_against_torch(name):
    model = build_model(name, width=.125)
    with FlopCounterMode(display=False) as counter:
        model(images(1))
    table = model_complexity(model)
    assert counter.get_total_flops() == 2*table[table.kind.isin(['conv', 'linear'])].macs.sum()
    assert table.params.sum() == sum(p.numel() for p in model.parameters())
    assert set(table.kind[table.macs == 0]) <= {'other'}


def small_inputs(net, kind):
    "torchvision's network with the changes for 32x32 that the papers' CIFAR versions have"
    if kind == 'resnet':
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    else:
        net.avgpool = nn.Identity()
        net.classifier[0] = nn.Linear(512, 4096)
    return net.eval()


@pytest.mark.parametrize('name, reference, kind',
                         [('ResNet_18', 'resnet18', 'resnet'),
                          ('ResNet_50', 'resnet50', 'resnet'), ('VGG_16', 'vgg16_bn', 'vgg')])
@torch.no_grad()
def test_same_function_as_torchvision(name, reference, kind):
    ours = randomise(build_model(name, mean=(0, 0, 0), std=(1, 1, 1)))
    theirs = small_inputs(getattr(torchvision.models, reference)(weights=None, num_classes=10),
                          kind)
    state = theirs.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in ours.net.state_dict().values()]
    theirs.load_state_dict(dict(zip(state, ours.net.state_dict().values())))
    assert same(ours(images()), theirs(images()), 1e-5)


@pytest.mark.parametrize('name', [n for n in model_names if n not in fixed])
@torch.no_grad()
def test_other_sizes(name):
    for size in (28, 64):
        assert build_model(name, width=.125)(images(1, size)).shape == (1, 10)


@pytest.mark.parametrize('name', fixed)
def test_fixed_size_is_named_also_after_folding(name):
    model = build_model(name, width=.125)
    for m in (model, fold_batchnorm(model)):
        with pytest.raises(ValueError, match='32x32'):
            m(images(1, 40))


def test_vgg_19_learns():
    model = build_model('VGG_19', n_classes=4, width=.125, seed=1).train()
    x = images(32)
    y = torch.arange(32) % 4
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.
    opt = torch.optim.SGD(model.parameters(), .02, momentum=.9)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < .5*losses[0], losses
    assert losses[-1] < .7, losses


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    a = build_model('AlexNet', width=.125, seed=2)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    b = build_model('AlexNet', width=.125, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_he_initialisation_keeps_the_variance():
    model = build_model('VGG_16', width=.5)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert abs(m.weight.var().item()*m.weight[0].numel()/2 - 1) < .15
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize('name', ('mobilenet_v2', 'densenet121', 'shufflenet_v2_x0_5'))
@torch.no_grad()
def test_torchvision_networks(name):
    model = randomise(wrap_model(getattr(torchvision.models, name)(weights=None, num_classes=6),
                                 **imagenet))
    folded = fold_batchnorm(model)
    x = images(2, 64)
    assert model.n_classes == 6
    assert same(folded(x), model(x))
    left = len(batchnorms(folded))
    had = len(batchnorms(model))
    assert 0 < left < had if name == 'densenet121' else left == 0 < had


@torch.no_grad()
def test_timm_network_brings_its_own_normalisation():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    net = timm.create_model('resnet18', pretrained=False, num_classes=7)
    model = randomise(wrap_model(net))
    assert torch.allclose(model.normalize.mean.flatten(), torch.tensor(imagenet['mean']))
    assert torch.allclose(model.normalize.std.flatten(), torch.tensor(imagenet['std']))
    x = images(2, 64)
    assert same(model(x), net((x - model.normalize.mean)/model.normalize.std), 1e-6)
    folded = fold_batchnorm(model)
    assert same(folded(x), model(x))
    assert not batchnorms(folded)
    assert last_linear(model).out_features == 7
    assert torch.allclose(wrap_model(net, (.5,)*3, (.5,)*3).normalize.mean, torch.tensor(.5))


@torch.no_grad()
def test_timm_normalisation_with_activation_is_folded_too():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    model = randomise(
        wrap_model(timm.create_model('mobilenetv3_small_050', pretrained=False, num_classes=4)))
    x = images(2, 64)
    folded = fold_batchnorm(model)
    assert same(trace(model)(x), model(x), 1e-6)
    assert same(folded(x), model(x))
    assert len(batchnorms(model)) == len(batchnorms(trace(model))) == 34
    assert not batchnorms(folded)
    assert same(trace(model.double())(x.double()), model(x.double()), 1e-12)


def test_wrap_refuses():
    with pytest.raises(ValueError, match='torchvision ones do not'):
        wrap_model(torchvision.models.resnet18(weights=None))
    with pytest.raises(ValueError, match='takes 3 channels; got 1 values'):
        wrap_model(nn.Conv2d(3, 2, 1), .5, .5)
    with pytest.raises(ValueError, match='one value per channel'):
        wrap_model(nn.Conv2d(3, 2, 1), (.5,)*3, (.5,)*2)
    with pytest.raises(TypeError, match='nn.Module'):
        wrap_model(lambda x: x, (.5,)*3, (.5,)*3)
    with pytest.raises(TypeError, match='as it is'):
        wrap_model(build_model('AlexNet', width=.125), (.5,)*3, (.5,)*3)


@pytest.mark.parametrize('kw, text', [
    (dict(name='ResNet_19'), 'ResNet_1'), (dict(n_classes=1), 'n_classes'),
    (dict(n_classes=True), 'n_classes'), (dict(n_classes=2.5), 'n_classes'),
    (dict(width=0), 'width'), (dict(width=float('inf')), 'width'),
    (dict(width='wide'), 'width'), (dict(std=(1, 1)), 'one value per channel'),
    (dict(mean=(0, 0, float('nan'))), '`mean` must be finite')])
def test_build_refuses(kw, text):
    with pytest.raises(ValueError, match=text):
        build_model(**{**dict(name='AlexNet', width=.125), **kw})


def test_inception_has_the_channels_of_googlenet():
    convs = lambda m: [(o.in_channels, o.out_channels) for o in m.modules()
                       if isinstance(o, nn.Conv2d)]
    theirs = [m for m in torchvision.models.googlenet(weights=None, init_weights=False).modules()
              if type(m).__name__ == 'Inception']
    ours = [m for m in build_model('Inception_BN').modules() if type(m).__name__ == '_Branches']
    assert len(ours) == 9
    assert [convs(m) for m in ours[1:]] == [convs(m) for m in theirs[1:]]
    # what comes in is 64 channels here, 192 there
    assert [o for _, o in convs(ours[0])] == [o for _, o in convs(theirs[0])]
    biases = [m.bias is not None for m in build_model('Inception_BN').modules()
              if isinstance(m, nn.Conv2d)]
    assert biases == [True]*2 + [False]*54 + [True], 'where no batch norm follows'


def test_copies_and_pickles():
    model = build_model('MobileNetV2', width=.125)
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert m.name == 'MobileNetV2'
        assert torch.equal(m(images()), model(images()))
    folded = fold_batchnorm(model)
    assert same(copy.deepcopy(folded)(images()), model(images()))
    assert folded.n_classes == 10


@pytest.mark.parametrize('name', ('AlexNet', 'Inception_BN', 'ResNet_18'))
@pytest.mark.parametrize('form',
                         ('plain', 'module', 'nested', 'compiled', 'normalized', 'no counters'))
def test_state_dicts_of_all_kinds(tmp_path, name, form):
    model = randomise(build_model(name, n_classes=6, width=.125, mean=(.1, .2, .3),
                                  std=(.4, .5, .6), seed=3))
    state = (model if form == 'normalized' else model.net).state_dict()
    state = {dict(module='module.', compiled='_orig_mod.').get(form, '') + k: v
             for k, v in state.items()}
    if form == 'no counters':
        state = {k: v for k, v in state.items() if 'num_batches' not in k}
    save_state(dict(epoch=3, model=state) if form == 'nested' else state, tmp_path/'w.pt')
    given = {} if form == 'normalized' else dict(mean=(.1, .2, .3), std=(.4, .5, .6))
    back = load_model(name, tmp_path/'w.pt', width=.125, **given)
    assert back.n_classes == 6
    assert not back.training
    assert torch.equal(back(images()), model(images()))


def test_files_of_something_else(tmp_path):
    path = tmp_path/'w.pt'
    model = build_model('ResNet_18', width=.125)
    save_model(model, path)
    for kw, text in ((dict(name='VGG_16'), '`name` must agree with the file: got \'VGG_16\''),
                     (dict(width=.25), 'holds ResNet_18 with 10 classes and width 0.125')):
        with pytest.raises(ValueError, match=text):
            load_model(**{**dict(name='ResNet_18', path=path), **kw})
    assert load_model('ResNet_18', path, mean=(0, 0, 0)).normalize.mean.abs().sum() == 0
    save_state(model.net.state_dict(), path)
    with pytest.raises(ValueError, match=r'does not fit ResNet_18 .*width 1 \(.*other shapes: '
                                         r'features.0.weight \(8, 3, 3, 3\) instead of \(64'):
        load_model('ResNet_18', path)
    with pytest.raises(ValueError, match='does not fit ResNet_18 with 4 classes'):
        load_model('ResNet_18', path, n_classes=4, width=.125)
    with pytest.raises(ValueError, match='does not fit AlexNet.*missing.*unexpected'):
        load_model('AlexNet', path, width=.125)
    save_state(dict(epoch=1, history=[1, 2]), path)
    with pytest.raises(ValueError, match="holds a dict with .'epoch', 'history'."):
        load_model('ResNet_18', path)
    save_state(dict(), path)
    with pytest.raises(ValueError, match='state_dict'):
        load_model('ResNet_18', path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='w.pt'):
        load_model('ResNet_18', path)
    with pytest.raises(FileNotFoundError, match='none.pt'):
        load_model('ResNet_18', tmp_path/'none.pt')


def test_save_refuses_what_it_could_not_read_back(tmp_path):
    model = build_model('AlexNet', n_classes=2, width=.125)
    with pytest.raises(ValueError, match='must hold 2 names'):
        save_model(model, tmp_path/'w.pt', classes=('a', 'b', 'c'))
    with pytest.raises(ValueError, match='got a Conv2d'):
        save_model(wrap_model(nn.Conv2d(3, 2, 1), (.5,)*3, (.5,)*3), tmp_path/'w.pt')
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path/'w.pt', classes=('a', 'b'))
    save_model(load_model(tmp_path/'w.pt'), tmp_path/'again.pt')
    assert load_model(path=tmp_path/'again.pt').classes == ('a', 'b')
    assert set(load_state(tmp_path/'w.pt')) == {'format', 'name', 'n_classes', 'width', 'mean',
                                                'std', 'classes', 'state_dict'}


class Residues(nn.Module):
    "A linear layer with batch normalisation, and one whose weight is read a second time"
    def __init__(self, tied):
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.BatchNorm1d(12)
        self.tied = tied

    def forward(self, x):
        z = self.b(self.a(x.flatten(1)))
        return z + x.flatten(1) @ self.a.weight if self.tied else z


@pytest.mark.parametrize('tied', (False, True))
@torch.no_grad()
def test_linear_pairs_and_tied_weights(tied):
    model = randomise(wrap_model(Residues(tied), (.5,)*3, (.2,)*3))
    x = images(4, 2)
    folded = fold_batchnorm(model)
    assert same(folded(x), model(x))
    assert any(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) == tied


@torch.no_grad()
def test_weights_recomputed_at_every_call_are_not_folded():
    conv = nn.Conv2d(3, 4, 3)
    model = randomise(wrap_model(
        nn.Sequential(nn.utils.parametrizations.weight_norm(conv), nn.BatchNorm2d(4)), (.5,)*3,
        (.2,)*3))
    folded = fold_batchnorm(model)
    assert same(folded(images()), model(images()))
    assert len(batchnorms(folded)) == 1
    no_statistics = wrap_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (.5,)*3, (.2,)*3)
    assert same(fold_batchnorm(no_statistics)(images()), no_statistics(images()))
    assert not batchnorms(no_statistics)


def test_trace_leaves_a_training_model_in_training():
    model = build_model('AlexNet', width=.125).train()
    assert not trace(model).training
    assert model.training
    assert all(m.training for m in model.modules())


def test_cost_leaves_no_hooks_even_after_a_failure():
    model = build_model('AlexNet_BN', width=.125)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        model_complexity(model, (3, 16, 16))
    model_complexity(model)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_cost_of_shared_and_transposed_layers():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    table = model_complexity(nn.Sequential(conv, conv, nn.ConvTranspose2d(3, 5, 2, 2)).eval(),
                             (3, 4, 4))
    assert table.params.tolist() == [81, 0, 3*5*4 + 5]
    assert table.macs.tolist() == [16*81, 16*81, 16*3*5*4]
    assert model_bytes(nn.Sequential(conv, conv), 4) == -(-81*4//8)


class Attending(nn.Module):
    "One attention module called twice"
    def __init__(self, **how):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, **{'batch_first': True, **how})
        self.head = nn.Linear(8, 4)
        self.again = self.attention

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y, shares = self.attention(x, x, x)
        z, each = self.again(y, x, x, average_attn_weights=False)
        assert self.attention.embed_dim == self.attention.num_heads*self.attention.head_dim == 8
        return self.head(z.mean(1)) + shares[:, 0, :4] + each[:, 1, 0, :4]


def test_attention_becomes_layers_that_say_the_same():
    torch.manual_seed(0)
    model = wrap_model(Attending().eval(), (.5,)*3, (.25,)*3)
    x = torch.rand(3, 3, 32, 32)
    nn.init.normal_(model.net.attention.in_proj_bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    calls = [n.target for n in graph.graph.nodes if n.op == 'call_module']
    assert not any(isinstance(m, nn.MultiheadAttention)
                   for m in graph.modules()), 'shared as before'
    assert calls.count('net.attention.q') == 2, 'shared as before'
    assert torch.equal(torch.cat([getattr(graph.net.attention, k).weight for k in 'qkv']),
                       model.net.attention.in_proj_weight)
    assert model.state_dict().keys() == before.keys()
    assert isinstance(model.net.attention, nn.MultiheadAttention)
    graph.net.attention.q.weight.data.zero_(), graph.net.attention.out_proj.weight.data.zero_()
    assert all(torch.equal(v, before[k])
               for k, v in model.state_dict().items()), 'the original is left as it is'


@pytest.mark.parametrize('how', (dict(add_bias_kv=True), dict(add_zero_attn=True)))
def test_attention_with_learned_keys_or_zeros_stays_one_call(how):
    model = wrap_model(Attending(**how).eval(), (.5,)*3, (.25,)*3)
    x = torch.rand(2, 3, 32, 32)
    graph = trace(model)
    assert isinstance(graph.net.attention, nn.MultiheadAttention)
    assert torch.allclose(graph(x), model(x), atol=1e-5)


def test_a_transformer_layer_of_torch_keeps_its_own_attention():
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(16, 8),
                        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
                        nn.Linear(64, 3)).eval()
    model = wrap_model(net, (.5,)*3, (.25,)*3)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(trace(model)(x), model(x), atol=1e-5)
