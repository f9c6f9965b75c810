"""Quantised models: weights on the levels, biases in whole multiples where an engine keeps them so,
what stays in full precision is named, gradients, ranges, other libraries' networks."""
import copy
import math
import operator
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from helpers_models import Fourier
from robustnb.quant import ptq
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.data import digits
from robustnb.models.wrapping import Normalized, wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.models.graph import calls, fold_batchnorm
from robustnb.quant.ptq import calibrate, FakeQuantize, model_bytes, quantization_points, quantize
from robustnb.models.complexity import model_complexity
from robustnb.quant.formats import (
    choose_scale, fake_quantize, levels, number_format, quant_spec, to_levels)
from robustnb.quant.sensitivity import layer_sensitivity

formats = ('INT8', 'INT4', 'INT2', 'POT4', 'POT2', 'APOT4', 'APOT5', 'FLOAT4', 'FLOAT6_E1',
           'FLOAT8_E6', 'FP8_E4M3', 'FP8_E5M2')
layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def images(n=16, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=make_generator(seed, 'test images'))


def seeded(make, seed=0, size=32, shape=None):
    """A module whose weights come from a seed; its batch norm has scales and shifts that are no
    identity and has seen some images"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, .5, 1.5), nn.init.uniform_(m.bias, -.3, .3)
                m.momentum = None
        with torch.no_grad():
            net.train()(images(8, size, 5)*4-2 if shape is None else torch.rand(8, *shape)*4-2)
    return net.eval()


def model_of(net): return wrap_model(net, (.5,)*3, (.25,)*3)


def small():
    return model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.LeakyReLU(.1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7))))


@pytest.mark.parametrize('rule', ('mse', 'minmax', 'percentile'))
@pytest.mark.parametrize('per_channel', (True, False), ids=('per channel', 'per tensor'))
@pytest.mark.parametrize('name', formats)
def test_weights_lie_on_the_levels(name, per_channel, rule):
    fmt = number_format(name)
    model = small()
    q = quantize(model, quant_spec(name, per_channel, rule), images())
    folded = fold_batchnorm(model)
    at = levels(fmt)
    at = torch.cat([-at.flip(0), at])
    seen = 0
    for n, layer in q.named_modules():
        if not isinstance(layer, layers): continue
        original = folded.get_submodule(n)
        for w, v in zip(layer.weight,
                        original.weight) if per_channel else [(layer.weight, original.weight)]:
            scale = choose_scale(v, fmt, rule).item()
            nearest = at[(w.double().reshape(-1, 1)/scale - at).abs().argmin(1)].view_as(w)*scale
            assert (nearest-w).abs().max() <= 1e-6*v.abs().max()
            assert (w-v).abs().max() > 0
            if rule == 'minmax':
                assert w.abs().max() == pytest.approx(
                    v.abs().max().item(), rel=1e-5), 'the largest weight keeps its value'
            seen += 1
        if fmt.kind != 'INT':
            assert torch.equal(layer.bias, original.bias), 'biases stay as they are'
        if per_channel and fmt.kind == 'INT' and rule == 'minmax':
            assert len(layer.weight.flatten(1).abs().amax(1).unique()) > 1
    assert seen == (8 + 8 + 7 if per_channel else 3)
    assert q.left_float == ()


@pytest.mark.parametrize('per_channel', (True, False), ids=('per channel', 'per tensor'))
@pytest.mark.parametrize('name', ('INT8', 'INT3', 'INT4/INT8', 'INT8/INT5'))
def test_biases_are_whole_multiples(name, per_channel):
    """Of the input's step times the weight's, for each channel; pooling and flattening before the
    layer change no step"""
    model = model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 8, 3),
        nn.Flatten(), nn.Linear(8*13**2, 7))))
    spec = quant_spec(name, per_channel)
    q = quantize(model, spec, images())
    folded = fold_batchnorm(model)
    moved = 0
    for n, before in (('0', 'normalize'), ('4', 'net_1'), ('6', 'net_4')):
        layer = q.net.get_submodule(n)
        exact = folded.net.get_submodule(n)
        unit = choose_scale(exact.weight, spec.weights, spec.rule,
                            per_channel).flatten()*q.get_submodule(f'round_{before}').scale
        whole = layer.bias.double()/unit
        assert (whole-whole.round()).abs().max() < 1e-3
        assert ((layer.bias-exact.bias).abs() <= unit/2*1.001).all()
        moved += not torch.equal(layer.bias, exact.bias)
    assert moved == 3


@pytest.mark.parametrize('name', ('POT4', 'INT8/FLOAT8', 'FLOAT8/INT8', 'APOT4'))
def test_biases_without_whole_sums_stay(name):
    q = quantize(small(), name, images())
    folded = fold_batchnorm(small())
    assert all(torch.equal(q.get_submodule(n).bias, m.bias) for n, m in folded.named_modules()
               if isinstance(m, layers))


def test_a_layer_with_two_inputs_keeps_its_bias():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.once = nn.Conv2d(3, 3, 3)
        def forward(self, x): return self.once(self.conv(self.conv(x).relu())).flatten(1)
    model = model_of(seeded(Twice))
    q = quantize(model, 'INT4', images())
    assert torch.equal(q.net.conv.bias, model.net.conv.bias)
    assert not torch.equal(q.net.once.bias, model.net.once.bias)


@pytest.mark.parametrize(
    'name', ('INT8', 'INT3', 'POT4/POT4', 'FLOAT4', 'FP8', 'INT4/INT8', 'APOT4', 'APOT4/APOT4'))
def test_stored_tensors_lie_on_the_levels(name):
    q = quantize(small(), name, images())
    stored = {}
    for n, m in q.named_modules():
        if isinstance(m, FakeQuantize):
            m.register_forward_hook(lambda m, a, out, n=n: stored.update({n: (m, out)}))
    predict(q, images(seed=1))
    assert list(stored) == ['round_normalize', 'round_net_2', 'round_net_3', 'round_net_4',
                            'round_net_5']
    for m, out in stored.values():
        assert m.fmt == q.spec.activations
        at = levels(m.fmt) if m.signed else torch.arange(
            m.fmt.top(signed=False)+1, dtype=torch.float64)
        v = out.abs().double().flatten()/m.scale
        assert ((v[:, None] - at).abs().amin(1) < 1e-3*at[1] + 1e-6*v).all()
        assert m.signed or out.min() >= 0
    assert [m.signed for m, _ in stored.values()] == (
        [True, False, True, True, True] if q.spec.activations.kind == 'INT' else [True]*5)


@pytest.mark.parametrize('name', [n for n in model_names if n != 'ViT'])
def test_nothing_of_the_nine_networks_stays_in_full_precision(name):
    model = build_model(name, width=.0625)
    before = copy.deepcopy(model.state_dict())
    x = images(8)
    q = quantize(model, 'INT8', x)
    assert q.left_float == ()
    assert str(q.spec) == 'INT8'
    assert not q.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    a = predict(model, x)
    b = predict(q, x)
    assert 0 < (a-b).square().mean() < .03*a.var(), 'INT8 answers nearly as the original does'
    points = [n.name for n in quantization_points(fold_batchnorm(model))]
    assert points[0] == 'normalize'
    assert sum(isinstance(m, FakeQuantize) for m in q.modules()) == len(points)
    sums = sum(hasattr(m, 'body') and bool(len(m.shortcut) or 1) for m in model.modules()
               if type(m).__name__ == 'Residual')
    joins = sum(type(m).__name__ == '_Branches' for m in model.modules())
    weighted = sum(isinstance(m, layers) for m in q.modules())
    pools = name in ('Inception_BN', 'MobileNetV2') or name.startswith('ResNet')
    assert len(points) == 1 + weighted - 1 + sums + joins + pools, (
        'input, layers but the last, sums, concatenations, average')


def test_all_products_of_the_transformer_are_rounded():
    net = build_model('ViT', width=.125)
    x = images(8)
    q = quantize(net, 'INT8', x)
    assert {type(net.get_submodule(n)) for n in q.left_float} == {nn.LayerNorm, nn.Embedding}
    points = [n.args[0] for n in q.graph.nodes if 'round_' in str(n.target)]
    calls = [n for n in q.graph.nodes if n.op == 'call_function']
    products = [n for n in calls if n.target.__name__ in ('matmul', '_scores')]
    assert len(products) == 12 and all(n in points for n in products)
    a, b = predict(net, x), predict(q, x)
    assert 0 < (a-b).square().mean() < .03*a.var()


@pytest.mark.parametrize('name', ('INT16', 'INT8', 'POT4', 'FLOAT4'))
def test_gradients_reach_the_pixels(name):
    model = build_model('ResNet_18', width=.125)
    y = torch.arange(4)
    x = images(4).requires_grad_()
    q = quantize(model, name, x.detach())
    grads = [torch.autograd.grad(F.cross_entropy(m(x), y), x)[0] for m in (model, q)]
    assert grads[1].isfinite().all()
    assert (grads[1].flatten(1).abs().amax(1) > 0).all()
    assert F.cosine_similarity(grads[0].flatten(), grads[1].flatten(),
                               dim=0) > dict(INT16=.99, INT8=.8).get(name, .1)
    assert not any(p.requires_grad for p in q.parameters())


class Attention(nn.Module):
    "A convolution, attention with its four matrices, a layer norm and a free parameter"
    def __init__(self, **how):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, **{'batch_first': True, **how})
        self.norm = nn.LayerNorm(8)
        self.shift = nn.Parameter(torch.full((8,), .1))
        self.head = nn.Linear(8, 4)
        self.first = how.get('batch_first', True)
        self.other = nn.Linear(8, 6)

    def forward(self, x, **call):
        x = self.patches(x).flatten(2).transpose(1, 2)
        z = x if self.first else x.transpose(0, 1)
        key = z if self.attention.kdim == 8 else self.other(z)
        z = self.attention(z, key, key, **{'need_weights': False, **call})[0]
        return self.head(
            (self.norm(x + (z if self.first else z.transpose(0, 1))) + self.shift).mean(1))


def source(node, model):
    "What a tensor was before it was moved or clipped"
    def rounds(node):
        return node.op == 'call_module' and isinstance(model.get_submodule(node.target), FakeQuantize)
    while not rounds(node) and (ptq._keeps_levels(node, model) or calls(node, model, ptq._clips)):
        node = node.all_input_nodes[0]
    return node


def assert_operands_are_rounded(q):
    "Convolutions, linear layers and matrix products take rounded tensors only; how many there are"
    seen = 0
    for n in q.graph.nodes:
        if not (n.target in (torch.matmul, operator.matmul, F.linear, F.conv2d, ptq._scores)
                or n.op == 'call_module'
                   and isinstance(q.get_submodule(n.target), (nn.Conv2d, nn.Linear))):
            continue
        for i in n.all_input_nodes:
            o = source(i, q)
            assert o.op == 'get_attr' or o.op == 'call_module' and isinstance(
                q.get_submodule(o.target), FakeQuantize), f'{i} into {n}'
        seen += 1
    return seen


@pytest.mark.parametrize('how, call',
                         (({}, {}), (dict(bias=False), {}), (dict(batch_first=False), {}),
                          (dict(kdim=6, vdim=6), {}), ({}, dict(need_weights=True))),
                         ids=('usual', 'no bias', 'sequence first', 'other keys', 'weights'))
def test_attention_is_opened(how, call):
    net = seeded(lambda: Attention(**how))
    net.forward = lambda x, f=type(net).forward: f(net, x, **call)
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net
        def forward(self, x): return Attention.forward(self.inner, x, **call)
    model = model_of(Calls().eval())
    x = images()
    assert (predict(fold_batchnorm(model), x)-predict(model, x)).abs().max() < 1e-5
    q = quantize(model, 'INT8', x)
    assert q.left_float == ('net.inner.norm', 'net.inner.shift')
    assert q.opaque == ()
    assert assert_operands_are_rounded(q) == 1 + 4 + 2 + 1 + (how.get('kdim') == 6)
    for n, m in q.named_modules():
        if isinstance(m, nn.Linear):
            assert all(len(w.unique()) <= 255 for w in m.weight)
            assert not torch.equal(m.weight, fold_batchnorm(model).get_submodule(n).weight)
    a, b = predict(model, x), predict(q, x)
    assert 0 < (a-b).square().mean() < .02*(a-a.mean(0)).square().mean()
    softmax = [q.get_submodule(f'round_{n.name}') for n in q.graph.nodes
               if n.target is ptq._attend or n.name == 'softmax']
    assert len(softmax) == 1, 'a softmax is never negative'
    assert not softmax[0].signed, 'a softmax is never negative'
    assert all(n.users for n in q.graph.nodes
               if str(n.target).startswith('round_')), 'what nobody reads is not rounded'
    assert set(layer_sensitivity(model, q, x).kind) == {'weights', 'activations'}


def test_attention_with_a_learned_key_stays_closed_and_is_named():
    q = quantize(model_of(seeded(lambda: Attention(add_bias_kv=True))), 'INT8', images())
    assert q.left_float == ('net.attention.bias_k', 'net.attention.bias_v',
                            'net.attention.in_proj_bias', 'net.attention.in_proj_weight',
                            'net.norm', 'net.shift')
    assert q.opaque == ('net_attention',), 'what it returns is rounded although it comes in a tuple'
    assert 'round_getitem' in dict(q.named_modules()), (
        'what it returns is rounded although it comes in a tuple')


def test_a_transformer_layer_of_torch_is_one_call_and_named():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(16, 8),
                                       nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
                                       nn.Flatten(), nn.Linear(64, 3)))
    q = quantize(model_of(net), 'INT8', images())
    assert q.opaque == ('net_3',)
    assert {'net.3.self_attn.in_proj_weight', 'net.3.norm1'} <= set(q.left_float)
    assert 'net.3.linear1' not in q.left_float


class Masked(Attention):
    "Attention that is told what not to look at"
    def forward(self, x): return super().forward(x, attn_mask=torch.zeros(16, 16))


class Products(nn.Module):
    "Attention by torch's one function, in every way it is called"
    def __init__(self, **how):
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        q, k, v = self.qkv(F.avg_pool2d(x, 4).reshape(-1, 16, 12)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, **self.how).mean(1))


masks = dict(none={}, scaled=dict(scale=.7), dropped=dict(dropout_p=0.),
             added=dict(attn_mask=torch.linspace(-2, 2, 256).view(16, 16)),
             forbidden=dict(attn_mask=torch.eye(16) + torch.eye(16).roll(1, 0) > 0))


@pytest.mark.parametrize('how', masks)
def test_torchs_attention_function_is_opened_and_says_the_same(how):
    model = model_of(seeded(lambda: Products(**masks[how])))
    x = images()
    q = quantize(model, 'INT16', x)
    assert F.scaled_dot_product_attention not in [n.target for n in q.graph.nodes]
    assert assert_operands_are_rounded(q) == 4
    a, b = predict(model, x), predict(q, x)
    assert q.left_float == q.opaque == ()
    assert 0 < (a-b).square().mean() < 1e-6*(a-a.mean(0)).square().mean()
    for m in q.modules():
        if isinstance(m, FakeQuantize):
            m.on = False
    assert (predict(q, x)-a).abs().max() < 1e-3*a.std()


@pytest.mark.parametrize('how', (dict(is_causal=True), dict(enable_gqa=True)))
def test_attention_that_is_not_opened_is_named(how):
    q = quantize(model_of(seeded(lambda: Products(**how))), 'INT8', images())
    assert q.opaque == ('scaled_dot_product_attention',)
    assert q.left_float == ()


def test_masked_attention_is_refused_by_name():
    with pytest.raises(TypeError, match=r'net.attention \(_Attention\) is not: '
                                        r'NotImplementedError: attention with a mask'):
        quantize(model_of(seeded(Masked)), 'INT8', images())


class Functional(nn.Module):
    "Weights that no layer holds or that no layer is asked for"
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3)/5)
        self.shift = nn.Parameter(torch.randn(8)/9)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Parameter(torch.randn(4, 8))
        self.table = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, self.shift, stride=2)).mean((2, 3))
        x = F.linear(x, weight=self.linear.weight, bias=self.linear.bias) + (self.table*2).exp()
        return F.linear(x, self.head)


@pytest.mark.parametrize('per_channel', (True, False))
def test_weights_given_to_functions_are_rounded(per_channel):
    model = model_of(seeded(Functional))
    x = images()
    q = quantize(model, quant_spec('INT3', per_channel), x)
    assert q.left_float == ('net.table',)
    assert q.opaque == ()
    assert assert_operands_are_rounded(q) == 3
    for own, other in ((q.net.kernel, model.net.kernel),
                       (q.net.linear.weight, model.net.linear.weight),
                       (q.net.head, model.net.head)):
        assert torch.equal(own, fake_quantize(other.detach(), number_format('INT3'), choose_scale(
            other, number_format('INT3'), 'mse', per_channel)))
    assert torch.equal(q.net.linear.bias, model.net.linear.bias)
    assert torch.equal(q.net.shift, model.net.shift)
    assert [n for n in q.state_dict() if n.startswith('round')] == [f'round_{n}.scale' for n in (
        'normalize', 'relu', 'mean', 'linear',
        'add')], 'numbers made of weights alone are not rounded'
    assert {'net.kernel', 'net.linear', 'net.head'} <= set(layer_sensitivity(model, q, x).layer)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, (self.weight-self.weight.mean())/self.weight.std(), self.bias)


class Padded(nn.Conv2d):
    def forward(self, x): return super().forward(F.pad(x, (0, 1, 0, 1)))


class Looking(nn.Conv2d):
    def forward(self, x): return self._conv_forward(x, self.weight.tanh()*x.amax(), self.bias)


def test_the_weight_that_is_computed_with_is_rounded_or_named():
    net = seeded(lambda: nn.Sequential(Padded(3, 4, 3), nn.ReLU(), Standardized(4, 4, 3), nn.ReLU(),
                                       nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
                                       nn.ReLU(), Looking(4, 4, 1), nn.Flatten(), nn.Linear(4*27*27, 5)))
    q = quantize(model_of(net), 'INT2', images(4))
    assert q.left_float == ('net.6',)
    assert all(len(w.unique()) <= 3 for n in (0, 2, 4) for w in q.get_submodule(f'net.{n}').weight)
    assert torch.equal(q.get_submodule('net.6').weight, net[6].weight)


@torch.fx.wrap
def hidden_products(x, w): return (x @ w) @ w.T


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        return self.head(hidden_products(self.conv(x).flatten(2).transpose(1, 2),
                                         self.inner.weight).mean(1))


def test_calls_that_hide_their_steps_are_named():
    model = model_of(seeded(Hiding))
    q = quantize(model, 'INT2', images())
    assert q.opaque == ('hidden_products',)
    assert q.left_float == ()
    assert all(len(w.unique()) <= 3 for w in q.net.inner.weight), (
        'the weight of a linear layer is rounded whoever takes it')
    assert 'round_hidden_products' in dict(q.named_modules())


@pytest.mark.parametrize('layer, name',
                         ((lambda: nn.GroupNorm(2, 4), 'net.1'), (lambda: nn.PReLU(4), 'net.1'),
                          (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), 'net.1.1')),
                         ids=('group norm', 'prelu', 'unfolded batch norm'))
def test_other_layers_with_weights_are_named(layer, name):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layer(), nn.Flatten(), nn.LazyLinear(5)))
    with torch.no_grad():
        net(images(1))
    assert quantize(model_of(net), 'INT8', images()).left_float == (name,)


@pytest.mark.parametrize('name',
                         ('mobilenet_v2', 'resnet18', 'shufflenet_v2_x0_5', 'squeezenet1_0'))
def test_torchvision_networks(name):
    model = model_of(seeded(
        lambda: getattr(torchvision.models, name)(weights=None, num_classes=6), size=64))
    x = images(6, 64)
    q = quantize(model, 'INT12', x)
    a, b = predict(model, x), predict(q, x)
    assert q.left_float == ()
    assert 0 < (a-b).square().mean() < .05*(a-a.mean(0)).square().mean()


@pytest.mark.parametrize('name, left', (('resnet18', False), ('mobilenetv3_small_050', False),
                                        ('convnext_atto', True), ('vit_tiny_patch16_224', True)))
def test_timm_networks(name, left):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    extra = dict(img_size=64) if name.startswith('vit') else {}
    model = wrap_model(seeded(
        lambda: timm.create_model(name, pretrained=False, num_classes=4, **extra), size=64))
    x = images(6, 64)
    q = quantize(model, 'INT12', x)
    a, b = predict(model, x), predict(q, x)
    assert bool(q.left_float) == left
    assert 0 < (a-b).square().mean() < .05*(a-a.mean(0)).square().mean()
    modules = dict(q.named_modules())
    assert not any(isinstance(modules.get(n), layers)
                   for n in q.left_float), 'every convolution and linear layer is rounded'
    assert q.opaque == (), 'every convolution and linear layer is rounded'
    if name.startswith('vit'):
        assert {'net.cls_token', 'net.pos_embed', 'net.norm'} <= set(q.left_float)
    assert assert_operands_are_rounded(q) > 10


def test_a_network_without_normalisation_inside_gets_its_input_rounded():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(4*30*30, 5)))
    q = quantize(net, 'INT2', images())
    stored = []
    points = {n: m for n, m in q.named_modules() if isinstance(m, FakeQuantize)}
    assert list(points) == ['round_input_1', 'round__1']
    points['round_input_1'].register_forward_hook(lambda m, a, out: stored.append(out))
    predict(q, images())
    assert not points['round_input_1'].signed
    assert len(stored[0].unique()) == 4


class Shapes(nn.Module):
    "Numbers that are not tensors, a tensor used twice, a layer called twice, functions and methods"
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8*16*16, 5)

    def forward(self, x):
        n = x.size(0)
        x = F.max_pool2d(self.a(x), 2)
        left, right = torch.chunk(self.b(self.b(x).relu()) + x, 2, 1)
        x = torch.cat([left, right.clamp(min=0), x], 1)
        return F.dropout(self.fc(x.reshape(n, -1)), .5, self.training)


def test_every_computed_tensor_is_rounded_once_and_nothing_else():
    model = model_of(seeded(Shapes))
    x = images()
    assert [n.name for n in quantization_points(fold_batchnorm(model))] == [
        'normalize', 'net_a', 'relu', 'net_b_1', 'add', 'cat']
    q = quantize(model, 'INT16', x)
    assert q.left_float == ()
    assert (predict(q, x)-predict(model, x)).abs().max() < 1e-2*predict(model, x).std()
    calls = [n.target for n in q.graph.nodes
             if n.op == 'call_module' and str(n.target).startswith('round_')]
    assert len(calls) == len(set(calls)) == 6
    for n in q.graph.nodes:
        if n.name == 'round_cat':
            assert n.args[0].name == 'cat'
            assert [u.name for u in n.users] == ['reshape']


class Framed(nn.Module):
    "A convolution, what pads it, and a linear layer"
    def __init__(self, pad):
        super().__init__()
        self.conv, self.pad, self.fc = nn.Conv2d(3, 4, 3), pad, nn.LazyLinear(5)
    def forward(self, x): return self.fc(self.pad(self.conv(x)).flatten(1))


passed_over = lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2)
pads = {'number': (lambda x: F.pad(x, (1, 2, 0, 1), value=-2.), True),
        'number by place': (lambda x: F.pad(x, (1, 2, 0, 1), 'constant', .3), True),
        'layer': (nn.ConstantPad2d(1, .3), True),
        'zeros': (lambda x: F.pad(x, (1, 2, 0, 1)), False),
        'layer of zeros': (nn.ConstantPad2d(1, 0.), False), 'zero layer': (nn.ZeroPad2d(1), False),
        'mirror': (lambda x: F.pad(x, (1, 1, 1, 1), 'reflect'), False),
        'infinite': (passed_over, False)}


@pytest.mark.parametrize('name', pads)
def test_a_number_to_pad_with_lies_on_the_levels(name):
    "Zeros do on any, and pools pass over infinite ones; another number is rounded with the map around it"
    pad, rounded = pads[name]
    net = seeded(lambda: Framed(pad))
    x = images(8)
    assert len(quantization_points(fold_batchnorm(net, x))) == 2 + rounded
    q = quantize(net, 'INT4', x)
    fc = next(n for n in q.graph.nodes if n.target == 'fc')
    seen = []
    q.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    q(x)
    steps = seen[0]/q.get_submodule(source(fc.args[0], q).target).scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_calibration_reads_all_images_and_only_the_extremes_matter_to_minmax():
    model = small()
    x = .4 + .2*images(250)
    x[-1] = images(1, seed=1)
    spec = quant_spec('INT8', rule='minmax')
    scales = [m.scale.item() for m in quantize(model, spec, x).modules()
              if isinstance(m, FakeQuantize)]
    again = [m.scale.item() for m in quantize(model, spec, x.flip(0)).modules()
             if isinstance(m, FakeQuantize)]
    without = [m.scale.item() for m in quantize(model, spec, x[:-1]).modules()
               if isinstance(m, FakeQuantize)]
    assert scales == pytest.approx(again, rel=1e-5)
    assert scales != pytest.approx(without, rel=1e-3)
    values = {}
    seen = fold_batchnorm(model)
    for n, m in seen.named_modules():
        if n in ('normalize', 'net.2', 'net.3', 'net.4', 'net.5'):
            m.register_forward_hook(lambda m, a, out, n=n: values.update(
                {n: max(values.get(n, 0), out.abs().max().item())}))
    predict(seen, x)
    assert scales == pytest.approx([v/(255 if n == 'net.2' else 127) for n, v in values.items()],
                                   rel=1e-5)


def test_every_calibration_image_counts_the_same(monkeypatch):
    seen = {}
    monkeypatch.setattr(ptq, '_sample_size', 30_000)
    monkeypatch.setattr(ptq, 'choose_scale', lambda x, *args, **kw: seen.setdefault(
        x.numel(), x).new_ones(()) if x.ndim == 1 else choose_scale(x, *args, **kw))
    x = .5 + 0*images(230)
    x[200:] = 1.
    quantize(small(), 'INT8', x)
    first = next(iter(seen.values()))
    assert 29_000 < len(first) < 33_000, (
        'the sample is as large as it is said to be, whatever the number of batches')
    assert abs((first == 2).float().mean() - 30/230) < .005


def test_values_between_the_extremes_decide_the_mse_scale():
    model = small()
    x = images(250)
    x[0, :, :4, :4] = 1000/255 % 1
    one = next(m for m in quantize(model, quant_spec('INT4', rule='mse'), x).modules()
               if isinstance(m, FakeQuantize)).scale
    two = next(m for m in quantize(model, quant_spec('INT4', rule='minmax'), x).modules()
               if isinstance(m, FakeQuantize)).scale
    normalised = model.normalize(x)
    assert one == pytest.approx(choose_scale(normalised, number_format('INT4')).item(), rel=.05)
    assert one <= two


@pytest.mark.parametrize('name', ('INT4', 'INT8', 'POT4', 'FLOAT5_E2', 'FP8'))
def test_the_chosen_scale_is_the_best_of_a_search(name):
    fmt = number_format(name)
    x = torch.randn(3, 2000, generator=make_generator(0))
    error = lambda s: (to_levels(x/s, fmt)*s - x).square().mean()
    full = x.abs().max()/fmt.top()
    best = min(error(full*s).item() for s in torch.linspace(.2, 1, 33))
    assert error(choose_scale(x, fmt)).item() == pytest.approx(best, rel=1e-5)
    rows = choose_scale(x, fmt, per_channel=True)
    assert rows.shape == (3, 1)
    assert all(r.item() == pytest.approx(choose_scale(v, fmt).item(), rel=1e-6)
               for r, v in zip(rows, x))
    assert choose_scale(torch.zeros(4), fmt) > 0
    assert torch.equal(fake_quantize(torch.zeros(4), fmt, choose_scale(torch.zeros(4), fmt)),
                       torch.zeros(4))


def test_calibration_refuses_what_is_not_finite():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2*32*32, 3)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1e38)
    with pytest.raises(ValueError, match='must be finite.*overflow on the calibration images'):
        quantize(model_of(net), 'INT8', images())


def test_the_copy_is_the_models_own():
    model = small()
    q = quantize(model, 'INT4', images())
    with torch.no_grad():
        model.net[7].weight.zero_()
    assert q.get_submodule('net.7').weight.abs().sum() > 0
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(predict(again, images()), predict(q, images()))
        assert (str(again.spec), again.left_float, again.n_classes) == ('INT4', (), 7)
    again.load_state_dict(q.state_dict())
    assert {n for n in q.state_dict() if 'round_' in n} == {
        f'round_{n}.scale' for n in ('normalize', 'net_2', 'net_3', 'net_4', 'net_5')}


def test_answers_do_not_depend_on_the_batch():
    q = quantize(small(), 'INT4', images())
    x = images(9, seed=2)
    whole = predict(q, x)
    one = torch.cat([predict(q, o[None]) for o in x])
    assert (whole-one).abs().max() < .05*whole.std()
    assert torch.equal(predict(q, x.flip(0)).flip(0), whole)
    assert isinstance(q.get_submodule('normalize'),
                      type(Normalized(nn.Identity(), (0,), (1,)).normalize))


def test_one_calibration_serves_all_formats():
    model = small()
    x = images()
    before = calibrate(model, x)
    kept = {k: v.clone() for k, v in before.values.items()}
    for name in ('INT8', 'POT4/POT4', 'APOT4', 'FP8'):
        a = quantize(model, name, before)
        b = quantize(model, name, x)
        assert torch.equal(predict(a, x), predict(b, x))
        assert [n.name for n in a.graph.nodes] == [n.name for n in b.graph.nodes]
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in before.values.items())
    assert torch.equal(predict(before.graph, x), predict(fold_batchnorm(model), x))
    assert torch.equal(predict(quantize(model, 'INT8', before), x),
                       predict(quantize(model, 'INT8', calibrate(model, x, batch_size=len(x))), x))
    with pytest.raises(ValueError, match='of this very `model`; got that of another'):
        quantize(small(), 'INT8', before)


@pytest.mark.parametrize('shape', ((64, 64, 8, 8), (3, 6, 7, 5), (1, 12, 32, 32), (50, 10)))
@pytest.mark.parametrize('last', (True, False))
def test_the_sample_comes_from_every_channel_row_and_column(shape, last):
    for axis in range(1, len(shape)):
        x = (torch.arange(shape[axis], dtype=torch.float32)
             .view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
             .contiguous(memory_format=torch.channels_last if last and len(shape) == 4
                                       else torch.contiguous_format))
        sample = ptq._sample(x, x.numel()//4)
        assert sample[:2].tolist() == [0, shape[axis]-1]
        counts = torch.bincount(sample[2:].long(), minlength=shape[axis]).float()
        assert counts.min() > .6*counts.mean()
        assert .08*x.numel() < len(sample) < .5*x.numel()
    assert torch.equal(ptq._sample(x, 10**9)[2:].sort().values,
                       x.flatten().sort().values), 'a small tensor is kept whole'


def test_the_memory_format_is_kept():
    q = quantize(small(), 'POT4/POT4', images())
    seen = []
    for m in q.modules():
        if isinstance(m, FakeQuantize):
            m.register_forward_hook(lambda m, a, out: seen.append((
                a[0].stride(), out.stride(),
                a[0].is_contiguous(memory_format=torch.channels_last) if a[0].ndim == 4 else None)))
    predict(q, images())
    assert all(a == b for a, b, _ in seen)
    assert seen[0][2]
    assert seen[1][2]


def spoil(model, name, value):
    t = dict((*model.named_parameters(), *model.named_buffers()))[name]
    with torch.no_grad():
        t.view(-1)[3] = value
    return model


@pytest.mark.parametrize('value', (float('nan'), float('inf'), -float('inf')))
@pytest.mark.parametrize('name', ('net.0.weight', 'net.3.bias', 'net.1.running_var',
                                  'net.1.running_mean', 'net.1.weight', 'net.7.weight'))
def test_weights_that_are_no_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match='`model` must have finite weights; 1 of the [0-9]+ '
                                         f'values of {name} are NaN or infinite'):
        quantize(spoil(small(), name, value), 'INT8', images())


def test_a_mask_may_be_infinite():
    model = small()
    model.register_buffer('mask', torch.tensor([0., -torch.inf]))
    assert quantize(model, 'INT8', images()).left_float == ()


def plain(*modules): return model_of(seeded(lambda: nn.Sequential(*modules)))


@pytest.mark.parametrize('spec', ('INT8', 'POT4/POT4', 'APOT4/APOT4', 'FLOAT4', 'FP8'))
@pytest.mark.parametrize('per_channel', (True, False))
def test_a_layer_of_one_channel(spec, per_channel):
    model = plain(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1),
                  nn.Flatten(), nn.Linear(900, 1), nn.Linear(1, 3))
    q = quantize(model, quant_spec(spec, per_channel), images())
    a = predict(model, images())
    b = predict(q, images())
    assert b.isfinite().all()
    assert q.left_float == ()
    assert (a-b).abs().max() < 3*a.std() + .5


@pytest.mark.parametrize('spec', ('INT8', 'POT4/POT4', 'APOT4/APOT4', 'FLOAT4', 'FP8'))
@pytest.mark.parametrize('rule', ('mse', 'minmax', 'percentile'))
@pytest.mark.parametrize('bias', (0., -1., 2.))
def test_constant_activations(spec, rule, bias):
    model = plain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3))
    with torch.no_grad():
        model.net[0].weight.zero_(), model.net[0].bias.fill_(bias)
    x = images(2)*0 + .5
    q = quantize(model, quant_spec(spec, rule=rule), x)
    a, b = predict(model, x), predict(q, x)
    assert torch.equal(a, b) if bias <= 0 and spec[:3] != 'INT' else (a-b).abs().max() < (
        .05 if spec == 'INT8' else 1.), 'all values alike, all zero too'
    assert all(m.scale > 0 for m in q.modules() if isinstance(m, FakeQuantize))


def test_no_linear_layer_at_the_end():
    model = plain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1),
                  nn.Flatten())
    q = quantize(model, 'INT8', images())
    x = images()
    assert q.left_float == ()
    assert 'round_net_2' in dict(q.named_modules())
    assert 'round_net_3' not in dict(q.named_modules())
    assert 0 < (predict(model, x)-predict(q, x)).square().mean() < .02*predict(model, x).var()


def test_no_batch_norm_and_one_colour():
    data = digits('test')
    grey = data.x[:, :1]
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(),
                                       nn.Flatten(), nn.Linear(6*(data.x.shape[-1]-4)**2, 10)),
                 shape=grey.shape[1:])
    model = wrap_model(net, (.5,), (.5,))
    x = grey[:20]
    q = quantize(model, 'INT8', x)
    assert q.left_float == ()
    assert 0 < (predict(model, x)-predict(q, x)).square().mean() < .02*predict(model, x).var()


def test_large_images_and_many_classes():
    model = model_of(seeded(lambda: torchvision.models.shufflenet_v2_x0_5(weights=None), size=64))
    x = images(2, 224)
    q = quantize(model, 'INT8', x)
    assert predict(q, x).shape == (2, 1000)
    assert q.left_float == q.opaque == ()
    assert q.n_classes == 1000
    assert model_complexity(model, (3, 224, 224)).macs.sum() > 3e7


def test_a_network_without_weights():
    q = quantize(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()).eval(), 'INT8', images())
    assert q.left_float == q.opaque == ()
    assert (predict(q, images())-F.avg_pool2d(images(), 8).flatten(1)).abs().max() < 1/255


@pytest.mark.parametrize('name, left, opaque',
                         (('densenet121', True, 0), ('vit_b_16', True, 0), ('swin_t', True, 15)))
def test_larger_torchvision_networks_are_rounded_or_say_what_is_not(name, left, opaque):
    shrink = dict(densenet121=dict(block_config=(2, 2, 2, 2)), vit_b_16=dict(
        image_size=32, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32),
                  swin_t=dict(depths=[2, 2, 6, 2], embed_dim=12, num_heads=[1, 2, 2, 2]))
    make = {'vit_b_16': lambda **k: torchvision.models.VisionTransformer(
        patch_size=16, num_classes=6, **k),
            'densenet121': lambda **k: torchvision.models.DenseNet(8, num_classes=6, **k),
            'swin_t': lambda **k: torchvision.models.SwinTransformer(
                [4, 4], mlp_ratio=4., window_size=[7, 7], num_classes=6, **k)}[name]
    model = model_of(seeded(lambda: make(**shrink[name]), size=32))
    x = images(4, 32)
    if name == 'vit_b_16':
        nn.init.normal_(model.net.heads.head.weight, generator=make_generator(0))
    q = quantize(model, 'INT12', x)
    a, b = predict(model, x), predict(q, x)
    assert 0 < (a-b).square().mean() < .05*(a-a.mean(0)).square().mean()
    assert bool(q.left_float) == left
    assert len(q.opaque) == opaque
    assert all('shifted_window' in n or 'merging_pad' in n for n in q.opaque)
    modules = dict(q.named_modules())
    assert not any(isinstance(modules.get(n), layers) for n in q.left_float)
    assert assert_operands_are_rounded(q) > 8
    assert not any(n.endswith(('qkv', 'proj', 'in_proj_weight')) for n in q.left_float)
    if name == 'vit_b_16':
        assert {'net.class_token', 'net.encoder.pos_embedding',
                'net.encoder.ln'} <= set(q.left_float)
        assert layer_sensitivity(model, q, x).logit_noise.max() < .1


def test_a_copy_is_not_rounded_again():
    for make in (lambda q: quantize(q, 'INT4', images()), lambda q: calibrate(q, images())):
        with pytest.raises(ValueError,
                           match='`model` must be in full precision.*Give the original'):
            make(quantize(small(), 'INT8', images()))


def test_the_bytes_of_a_shared_layer_are_counted_once():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    assert model_bytes(nn.Sequential(conv, conv), 4) == -(-81*4//8)


class Tied(nn.Module):
    "A weight under two names, a transposed convolution, a matrix in a buffer, a loose parameter nobody reads"
    def __init__(self, unused=1.):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.up = nn.ConvTranspose2d(3, 4, 2, 2)
        self.register_buffer('head', torch.randn(4, 5))
        self.gain = nn.Parameter(torch.ones(4))
        self.aux = nn.Linear(7, 7)
        self.loose = nn.Parameter(torch.full((9,), unused))
    def forward(self, x): return (self.up(self.b(F.relu(self.a(x)))).mean((2, 3))*self.gain) @ self.head


def test_one_table_decides_what_is_rounded_listed_and_counted():
    model = model_of(seeded(Tied))
    x = images()
    q = quantize(model, 'INT2', x)
    assert q.left_float == ('net.gain',)
    assert q.net.a.weight is q.net.b.weight
    for rows in (q.net.a.weight, q.net.up.weight.transpose(0, 1), q.net.head.T):
        assert all(len(row.unique()) <= 3 for row in rows)
    bits = 2*(9 + 3*4*4 + 20) + 32*(3 + 3 + 4 + 4)
    assert ptq.model_bytes(q, 2) == ptq.model_bytes(fold_batchnorm(model), 2) == -(-bits//8)


def test_weights_that_no_image_reaches_may_be_anything():
    a, b = (model_of(seeded(lambda v=v: Tied(v))) for v in (1., math.nan))
    x = images()
    assert torch.equal(predict(quantize(a, 'INT4', x), x), predict(quantize(b, 'INT4', x), x))
    b.net.gain.data[0] = math.nan
    with pytest.raises(ValueError, match='net.gain are NaN'):
        quantize(b, 'INT4', x)


@pytest.mark.parametrize('mode, pad', (('reflect', nn.ReflectionPad2d), ('replicate', nn.ReplicationPad2d),
                                       ('circular', nn.CircularPad2d)))
def test_a_padding_layer_rounds_nothing(mode, pad):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1, padding_mode=mode),
                          nn.Flatten()).eval()
    apart = nn.Sequential(whole[0], pad(1), nn.Conv2d(4, 5, 3), whole[2]).eval()
    apart[2].load_state_dict(whole[1].state_dict())
    x = torch.rand(8, 3, 6, 6)
    assert torch.equal(predict(quantize(whole, 'INT3', x), x), predict(quantize(apart, 'INT3', x), x))


@pytest.mark.filterwarnings('ignore')    # torch is about to move it
def test_a_network_that_rounds_already_is_refused():
    tq = pytest.importorskip('torch.ao.quantization')
    parts = lambda: (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x = images(4, 8)
    quantizable = nn.Sequential(tq.QuantStub(), *parts(), tq.DeQuantStub()).eval()
    assert not quantize(quantizable, 'INT8', x).left_float, 'stubs do nothing'
    trained = nn.Sequential(tq.QuantStub(), *parts()).train()
    trained.qconfig = tq.get_default_qat_qconfig('fbgemm')
    trained = tq.prepare_qat(trained)
    trained(x)
    dynamic = tq.quantize_dynamic(nn.Sequential(*parts()), {nn.Linear}, torch.qint8)
    for net, word in ((trained, 'FakeQuantize'), (dynamic, 'quantized.dynamic')):
        with pytest.raises(ValueError, match=f'{word}.*rounds already. Give the network as it was'):
            quantize(net.eval(), 'INT4', x)


def test_complex_weights_count_and_are_named():
    q = quantize(Fourier().eval(), 'INT8', images(4, 8))
    assert q.left_float == ('w',)
    assert model_bytes(q, 8) == 8*3*8*5 + 192*4 + 4*4


def test_the_bias_of_a_channel_of_zeros_is_rounded_as_finely_as_the_others():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 4)
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        net[2].weight[1::2] = 0
    x = torch.rand(30, 3, 4, 4)
    off = (quantize(net, 'INT2', x).get_parameter('2.bias') - net[2].bias).abs()
    assert off[1::2].max() <= off[::2].max()
