"""Exported models: every convolution in integers, the same answers as the simulation, the
arithmetic of an integer machine, refusals by name."""
import ast
import copy
import math
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_models import needs
from robustnb.quant import export
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.quant.export import check_export, engine_ops, export_onnx, OnnxModel, run_onnx
from robustnb.models.wrapping import Normalized, wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.quant.ptq import quantize, FakeQuantize
from robustnb.quant.formats import levels, number_format, quant_spec, to_levels

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.usefixtures('one_thread')


def images(n=64, size=32, seed=0, channels=3):
    "Smooth random pictures that differ much, so that answers do too"
    g = make_generator(seed, 'pictures')
    coarse = torch.rand(n, channels, 3, 3, generator=g)**torch.rand(n, 1, 1, 1, generator=g).mul(4)
    return F.interpolate(coarse, size=size, mode='bicubic', align_corners=True).clamp(0, 1)


def lively(model, x):
    "Statistics of batch normalisation from `x`, with scales and shifts that are no identity"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                nn.init.uniform_(m.weight, .5, 1.5), nn.init.uniform_(m.bias, -.3, .3)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
        model.train()(x)
    return model.eval()


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def model_of(net): return wrap_model(net, (.5,)*3, (.25,)*3)


@pytest.mark.parametrize('name', [n for n in model_names if n != 'ViT'])
def test_nine_networks_in_integers(name, tmp_path):
    x = images(100)
    model = lively(build_model(name, width=.1), x)
    q = quantize(model, 'INT8', x[:32])
    path = tmp_path/'m.onnx'
    facts = export_onnx(q, path)
    convs = sum(isinstance(m, nn.Conv2d) for m in q.modules())
    check = check_export(q, path, x)
    assert facts['integer']
    assert facts['format'] == 'INT8'
    assert facts['rounded'] == sum(isinstance(m, FakeQuantize) for m in q.modules())
    assert facts['layers'] == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in q.modules())
    linear = facts['layers']-convs + (name == 'Inception_BN')
    adds = {'ResNet_18': 8, 'ResNet_50': 16, 'ResNet_152': 50, 'MobileNetV2': 10}.get(name, 0)
    pool = 0 if name.startswith(('Alex', 'VGG')) else 1
    expected = dict(QLinearConv=facts['layers']-linear, QGemm=linear, QLinearAdd=adds,
                    QLinearConcat=9*(name == 'Inception_BN'), QLinearGlobalAveragePool=pool)
    assert check['ops'] == {k: n for k, n in expected.items() if n}
    assert check['unfused'] == []
    assert check['floats'] == {'Sub': 1, 'Div': 1}
    assert check['fused'] == sum(expected.values())
    assert check['convolutions_fused'] == expected['QLinearConv']
    assert check['images'] == 100
    noise = (predict(q, x)-predict(model, x)).abs().mean()
    assert check['agreement'] >= .99, 'closer to its simulation than that is to the network'
    assert check['mean_logit_difference'] < .3*noise, (
        'closer to its simulation than that is to the network')


def test_the_transformer_in_integers(tmp_path):
    x = images(100)
    q = quantize(lively(build_model('ViT', width=.1), x), 'INT8', x[:32])
    facts = export_onnx(q, tmp_path/'m.onnx')
    check = check_export(q, tmp_path/'m.onnx', x)
    assert facts['integer'] and facts['layers'] == 38
    assert check['ops']['QLinearConv'] == 1 and check['ops']['QLinearSoftmax'] == 6
    assert check['agreement'] >= .97


@pytest.mark.parametrize('name', ('AlexNet', 'Inception_BN', 'MobileNetV2', 'ResNet_18', 'ViT'))
def test_full_precision_is_exact(name, tmp_path):
    x = images(8)
    model = lively(build_model(name, width=.1), x)
    facts = export_onnx(model, tmp_path/'m.onnx')
    assert (facts['format'], facts['integer'], facts['rounded']) == ('FP32', False, 0)
    assert 'Full precision' in facts['says']
    expected = predict(model, x)
    torch.testing.assert_close(run_onnx(tmp_path/'m.onnx', x, 3), expected, rtol=1e-4,
                               atol=2e-5*expected.abs().max().item())
    assert 'integers' not in set(engine_ops(tmp_path/'m.onnx').computes)


def test_integer_machine(tmp_path):
    "Bytes, whole sums and one rounding per layer, in numpy, give every logit of the file"
    x = images(32, 8)
    q = quantize(model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6)))),
                 'INT8', x)
    export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    s = {n: m.scale.item() for n, m in q.named_modules() if isinstance(m, FakeQuantize)}
    first = s['round_normalize']
    hidden = s['round_net_1']
    def whole(layer, unit):
        w = layer.weight.double().flatten(1)
        scale = w.abs().amax(1)/127
        return (torch.round(w/scale[:, None]).view_as(layer.weight),
                torch.round(layer.bias.double()/(scale*unit)), scale*unit)
    steps = (q.normalize(x).double()/first).round().clamp(-127, 127)
    w, b, unit = whole(q.net.get_submodule('0'), first)
    sums = F.conv2d(steps, w, b, stride=2, padding=1)
    steps = (sums*(unit/hidden)[:, None, None]).round().clamp(0, 255)
    w, b, unit = whole(q.net.get_submodule('3'), hidden)
    logits = (steps.flatten(1) @ w.T + b)*unit
    off = (run_onnx(tmp_path/'m.onnx', x).double()-logits).abs()
    assert (off < 1e-5*logits.abs().max()).double().mean() > .98, (
        'but for values within a last digit of the middle of two levels')
    assert off.max() < 2*(w*unit[:, None]).abs().max()


def test_bytes_do_not_saturate(tmp_path):
    "255*127 twice is more than 16 bits hold"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        net[1].weight.fill_(1), net[1].bias.zero_()
    x = torch.ones(4, 1, 8, 8)
    q = quantize(net.eval(), quant_spec('INT8', rule='minmax'), x)
    export_onnx(q, tmp_path/'m.onnx', (1, 8, 8))
    assert (run_onnx(tmp_path/'m.onnx', x)-64).abs().max() < 1e-3
    assert engine_ops(tmp_path/'m.onnx').computes.tolist().count('integers') == 1


names = ('INT2', 'INT4', 'INT8', 'INT12', 'POT2', 'POT4', 'POT6', 'POT8', 'FLOAT3',
         'FLOAT4_E1', 'FLOAT6', 'FLOAT8_E1', 'FLOAT8_E6', 'FP8_E4M3', 'FP8_E5M2',
         'APOT3', 'APOT4', 'APOT5', 'APOT8')


@pytest.mark.parametrize('signed', (True, False), ids=('signed', 'unsigned'))
@pytest.mark.parametrize('name', names)
def test_rounding_in_float(name, signed, tmp_path):
    "Each rounding, operator by operator, is that of the levels"
    fmt = number_format(name)
    if fmt.kind != 'INT' and not signed:
        pytest.skip('only INT has levels without a sign')
    scale = .37
    middle = levels(fmt) if signed else torch.arange(fmt.top(False)+1, dtype=torch.float64)
    between = (middle[1:]+middle[:-1])/2
    v = torch.cat([middle, between*.999, between*1.001, torch.linspace(0, 1.5*fmt.top(signed), 999),
                   torch.logspace(-8, 0, 999)*fmt.top(signed)]).float()
    v = torch.cat([-v, v])
    x = v[:len(v)//2*2].reshape(1, 1, 2, -1)*scale
    linear = nn.Sequential(nn.Flatten(), nn.Identity())
    w = export._Writer(seeded(lambda: linear), set(), False)
    rounder = FakeQuantize(quant_spec(f'INT8/{name}'), v if signed else v.abs())
    rounder.scale.fill_(scale)
    assert rounder.signed == signed
    out = export._round_in_float(w, 'r', 'images', rounder)
    h = onnx.helper
    value = lambda n: h.make_tensor_value_info(n, 1, list(x.shape))
    graph = h.make_graph(w.nodes, 'g', [value('images')], [value(out)],
                         [onnx.numpy_helper.from_array(v, k) for k, v in w.constants.items()])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8),
              tmp_path/'r.onnx')
    got = torch.from_numpy(
        ort.InferenceSession(tmp_path/'r.onnx').run(None, {'images': x.numpy()})[0])
    assert torch.equal(got, to_levels(x/rounder.scale, fmt, signed)*rounder.scale)


@pytest.mark.parametrize(
    'name', ('INT4', 'INT12', 'POT4', 'POT8/POT8', 'FLOAT4', 'FP8', 'INT8/INT4', 'INT12/INT8', 'APOT4/APOT4',
             'INT8/APOT4'))
def test_formats_without_an_engine(name, tmp_path):
    "The file computes in the format, in float, and says so"
    x = images(32, 8)
    q = quantize(model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 6)))),
                 name, x)
    facts = export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'m.onnx', x)
    assert not facts['integer']
    assert facts['says'] == check['says']
    assert f'No engine computes in {q.spec}:' in facts['says']
    assert 'only the accuracy is real' in facts['says'].lower()
    assert check['fused'] == 0
    assert check['agreement'] == 1
    assert check['mean_logit_difference'] < 1e-3
    assert len(check['unfused']) == 2


def test_few_bits_in_bytes(tmp_path):
    x = images(32, 8)
    q = quantize(model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 6)))),
                 'INT3/INT8', x)
    facts = export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'m.onnx', x)
    assert facts['integer']
    assert 'Weights of 3 bits are stored in 8.' in facts['says']
    assert check['ops'] == dict(QLinearConv=1, QGemm=1)
    assert check['agreement'] == 1
    assert check['max_logit_difference'] < .02*predict(q, x).std()


def test_mixed_precision(tmp_path):
    "Layers of several whole formats are computed in integers; one that is not makes the file one of floats"
    x = images(32, 8)
    q = quantize(model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 6)))),
                 'INT4/INT8', x)
    q.layer_formats = {'net.0': number_format('INT4'), 'net.3': number_format('INT8')}
    facts = export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    assert facts['integer']
    assert facts['format'] == 'INT4 and INT8 weights beside INT8'
    assert 'Weights of 4 bits are stored in 8.' in facts['says']
    q.layer_formats['net.3'] = number_format('POT8')
    with torch.no_grad():
        q.get_submodule('net.3').weight.copy_(torch.pow(2., -torch.rand(6, 288).mul(40).round()))
    facts, check = export_onnx(q, tmp_path/'m.onnx',
                               (3, 8, 8)), check_export(q, tmp_path/'m.onnx', x)
    assert not facts['integer']
    assert 'No engine computes in INT4 and POT8 weights beside INT8' in facts['says']
    assert check['fused'] == 0
    assert check['agreement'] == 1


class Net(nn.Module):
    "A convolution, then what is to be tried, then a linear layer"
    def __init__(self, f, features, c=8):
        super().__init__()
        self.conv = nn.Conv2d(3, c, 3, padding=1)
        self.f = f
        self.other = nn.Conv2d(c, c, 3, padding=1, groups=2)
        self.fc = nn.Linear(features, 5)
    def forward(self, x):
        x = self.conv(x)
        return self.fc((self.f(x, self.other(x)) if self.f.__code__.co_argcount == 2
                        else self.f(x)).flatten(1))


operators = dict(
    relu=(lambda a: F.relu(a, inplace=False), 512, None),
    method=(lambda a: a.relu(), 512, None), relu6=(lambda a: F.relu6(a), 512, None),
    clamp=(lambda a: torch.clamp(a, -.25, .5), 512, None),
    clamp_min=(lambda a: a.clamp(min=0), 512, None),
    hardtanh=(lambda a: F.hardtanh(a, -.1, .2), 512, None),
    leaky=(lambda a: F.leaky_relu(a, .3), 512, 'QLinearLeakyRelu'),
    sigmoid=(lambda a: torch.sigmoid(a), 512, 'QLinearSigmoid'), tanh=(nn.Tanh(), 512, None),
    silu=(lambda a: F.silu(a), 512, None), hardswish=(lambda a: F.hardswish(a), 512, None),
    hardsigmoid=(lambda a: F.hardsigmoid(a), 512, None),
    max_pool=(lambda a: F.max_pool2d(a, 3, 2, 1), 128, None),
    ceil=(lambda a: F.max_pool2d(a, 3, stride=2, ceil_mode=True), 128, None),
    dilated=(lambda a: F.max_pool2d(a, 2, 1, 0, 2), 288, None),
    oblong=(lambda a: F.max_pool2d(a, (2, 4), padding=(1, 0)), 80, None),
    avg_pool=(lambda a: F.avg_pool2d(a, 2), 128, 'QLinearAveragePool'),
    padded=(lambda a: F.avg_pool2d(a, 3, 2, 1), 128, 'QLinearAveragePool'),
    uncounted=(lambda a: F.avg_pool2d(a, 3, 2, 1, False, False), 128, 'QLinearAveragePool'),
    adaptive=(lambda a: F.adaptive_avg_pool2d(a, (4, 2)), 64, 'QLinearAveragePool'),
    mean=(lambda a: a.mean((-1, 2)), 8, 'QLinearGlobalAveragePool'),
    kept=(lambda a: torch.mean(a, dim=[2, 3], keepdim=True), 8, 'QLinearGlobalAveragePool'),
    view=(lambda a: a.contiguous().view(a.size(0), -1), 512, None),
    reshape=(lambda a: torch.reshape(a, (-1, 4, 128)), 512, None),
    squeeze=(lambda a: F.max_pool2d(a, 8).squeeze(3).unsqueeze(1), 8, None),
    dropout=(lambda a: F.dropout(a, .5, training=False), 512, None),
    add=(lambda a, b: torch.add(a, b), 512, 'QLinearAdd'),
    iadd=(lambda a, b: a.add(b), 512, 'QLinearAdd'),
    number=(lambda a: a*2 + .5, 512, None), mul=(lambda a, b: a*b, 512, 'QLinearMul'),
    cat=(lambda a, b: torch.cat((a, b, a), dim=1), 1536, 'QLinearConcat'),
    rows=(lambda a, b: torch.cat([a, b], -2), 1024, 'QLinearConcat'),
    norm=(nn.BatchNorm2d(8), 512, None), bare=(nn.BatchNorm2d(8, affine=False), 512, None))


@pytest.mark.parametrize('name', operators)
def test_operators(name, tmp_path):
    "Each operator computes what torch does, in float and in integers"
    f, features, fused = operators[name]
    module = isinstance(f, nn.Module)
    net = seeded(lambda: Net((lambda a: a) if module else f, features))
    if module:
        net = nn.Sequential(net.conv, nn.ReLU() if 'Norm' in type(f).__name__ else nn.Identity(),
                            copy.deepcopy(f), nn.Flatten(), net.fc)
    x = images(64, 8)
    model = lively(model_of(net), x)
    export_onnx(model, tmp_path/'f.onnx', (3, 8, 8))
    torch.testing.assert_close(run_onnx(tmp_path/'f.onnx', x), predict(model, x), rtol=1e-4,
                               atol=1e-5)
    q = quantize(model, 'INT8', x)
    facts = export_onnx(q, tmp_path/'q.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'q.onnx', x)
    assert check['unfused'] == []
    assert check['agreement'] >= .98
    assert facts['integer']
    assert 'In float' not in facts['says']
    assert check['max_logit_difference'] < .1*predict(model, x).std()
    assert fused is None or check['ops'][fused] == 1
    if fused is None:
        assert set(check['ops']) <= {'QLinearConv', 'QGemm'}


end = lambda *last: lambda: nn.Sequential(nn.Conv2d(3, 8, 8), nn.ReLU(), *last, nn.Flatten())
convolutions = dict(
    logits=(end(nn.Conv2d(8, 4, 1)), dict(QLinearConv=1, QGemm=1), 0),
    groups=(end(nn.Conv2d(8, 4, 1, groups=2)), dict(QLinearConv=1), 1),
    padded=(end(nn.Conv2d(8, 4, 1, padding=1)), dict(QLinearConv=1), 1), squeezed=(
        end(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)), dict(QLinearConv=2, QGemm=1), 0),
    oblong=(lambda: nn.Sequential(nn.Conv2d(3, 8, (3, 5), (2, 1), (0, 3), (1, 2)), nn.ReLU(),
                                  nn.Flatten(), nn.Linear(144, 4)),
            dict(QLinearConv=1, QGemm=1), 0),
    same=(lambda: nn.Sequential(nn.Conv2d(3, 8, (2, 4), padding='same'), nn.ReLU(),
                                nn.Flatten(), nn.Linear(512, 4)),
          dict(QLinearConv=1, QGemm=1), 0),
    valid=(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding='valid'), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(288, 4)),
           dict(QLinearConv=1, QGemm=1), 0),
    depthwise=(lambda: nn.Sequential(nn.Conv2d(3, 9, 3, 2, groups=3), nn.ReLU(), nn.Flatten(),
                                     nn.Linear(81, 4)),
               dict(QLinearConv=1, QGemm=1), 0))


@pytest.mark.parametrize('name', convolutions)
def test_convolutions(name, tmp_path):
    "Padding, stride, groups; the last one in integers where it is a linear layer, else in float and reported"
    make, ops, unfused = convolutions[name]
    x = images(64, 8)
    model = model_of(seeded(make))
    facts = export_onnx(model, tmp_path/'f.onnx', (3, 8, 8))
    assert facts['layers'] == sum(ops.values())+unfused
    torch.testing.assert_close(run_onnx(tmp_path/'f.onnx', x), predict(model, x), rtol=1e-4,
                               atol=1e-5)
    q = quantize(model, 'INT8', x)
    export_onnx(q, tmp_path/'q.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'q.onnx', x)
    assert check['ops'] == ops
    assert len(check['unfused']) == unfused
    assert check['agreement'] >= .98
    assert check['max_logit_difference'] < .1*predict(q, x).std()


def test_a_clip_goes_only_where_levels_end(tmp_path):
    "A ReLU6 stays in front of levels that reach beyond 6, a ReLU in front of levels with a sign"
    x = images(32, 8)
    net = lambda act: model_of(
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Flatten(), nn.Linear(288, 6))))
    def kinds(q):
        export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
        off = (run_onnx(tmp_path/'m.onnx', x)-predict(q, x)).abs().max()
        assert off < .05*predict(q, x).std()
        return {n.op_type for n in onnx.load(tmp_path/'m.onnx').graph.node}
    q = quantize(net(nn.ReLU6()), 'INT8', x)
    assert 'Clip' not in kinds(q)
    assert check_export(q, tmp_path/'m.onnx', x)['floats'] == {'Sub': 1, 'Div': 1}
    q.get_submodule('net.0').bias += 4
    q.round_net_1.scale.fill_(6.3/255)
    assert 'Clip' in kinds(q)
    q.round_net_1.scale.fill_(6/255)
    assert 'Clip' not in kinds(q)
    q = quantize(net(nn.ReLU()), 'INT8', x)
    assert 'Relu' not in kinds(q)
    q.round_net_1.signed = True
    assert 'Relu' in kinds(q)
    q = quantize(net(nn.Hardtanh(-.5, 9)), 'INT8', x)
    assert q.round_net_1.signed
    assert ('Clip' in kinds(q)) == (127*q.round_net_1.scale.item() > .5)


def test_levels_survive_a_clip_in_the_middle(tmp_path):
    """A convolution with two readers is rounded before its ReLU, whose output keeps the levels and
    feeds integer convolutions"""
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(512, 5)
        def forward(self, x):
            a = self.a(x)
            return self.fc((self.b(F.relu(a)) + a).flatten(1))
    x = images(32, 8)
    q = quantize(model_of(seeded(Two)), 'INT8', x)
    export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'m.onnx', x)
    assert check['unfused'] == []
    assert check['ops'] == dict(QLinearConv=2, QLinearAdd=1, QGemm=1)
    assert check['max_logit_difference'] < .05*predict(q, x).std()


def test_a_fallback_to_float_is_seen(tmp_path):
    "Rounding switched off, the layers behind them are computed in float, and the report names them"
    x = images(32, 8)
    q = quantize(model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6)))),
                 'INT8', x)
    q.round_net_1.on = False
    facts = export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    check = check_export(q, tmp_path/'m.onnx', x)
    assert 'net.2' in facts['says'].split('In float')[1]
    assert facts['rounded'] == 2
    assert check['convolutions_fused'] == 0
    assert any('net_2' in n for n in check['unfused']), 'float agrees best of all'
    assert check['agreement'] == 1, 'float agrees best of all'


@pytest.mark.parametrize('bias', (0., 3e3, -3e5))
def test_large_biases_of_small_weights(bias, tmp_path):
    "32 bits do not hold them in units of the weights; coarser weights do"
    x = images(16, 8)
    model = model_of(seeded(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))))
    conv = model.net[0]
    with torch.no_grad():
        conv.weight[0] *= 1e-9
        conv.weight[1] = 0
        conv.bias[:2] = bias
        model.net[3].weight[:, 1] = 1e-3
    q = quantize(model, 'INT8', x)
    export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    there = run_onnx(tmp_path/'m.onnx', x)
    assert (there-predict(q, x)).abs().max() <= .02*predict(q, x).abs().max()
    held = {o.name: onnx.numpy_helper.to_array(o)
            for o in onnx.load(tmp_path/'m.onnx').graph.initializer}
    assert held['net_0.weight.levels'][0].any() == (bias == 0)
    assert not held['net_0.weight.levels'][1].any()
    assert abs(held['net_0.weight.levels'][2:]).max((1, 2, 3)).tolist() == [127, 127]
    assert {o.item() for k, o in held.items() if o.dtype == 'uint8'} == {
        0, 128}, 'level 0 stands at 0, or at 128 where values may be negative'


def test_weights_are_found_again():
    g = make_generator(0)
    for bits in (2, 3, 5, 8):
        top = 2**(bits-1)-1
        steps = torch.randint(-top, top+1, (20, 3, 3, 3), generator=g).double()
        steps[0], steps[1] = 0, steps[1].clamp(-1, 1)
        scale = torch.rand(20, 1, 1, 1, generator=g).double()*3
        scale_found, found = export._whole_weights((steps*scale).float())
        assert found.abs().max() <= 127
        assert torch.equal(found, found.round())
        torch.testing.assert_close(found.view_as(steps)*scale_found.view(-1, 1, 1, 1),
                                   steps*scale, rtol=1e-6, atol=1e-6)
    assert export._whole_weights(torch.randn(4, 30, generator=g)) is None
    assert export._whole_weights(torch.tensor([[127., 126.5], [1, 0]])) is None


def test_the_engine_is_a_model(tmp_path):
    x = images(10, 8, channels=1)
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(144, 6)))
    before = copy.deepcopy(net.state_dict())
    q = quantize(net, 'INT8', x)
    state = {k: v.clone() for k, v in q.state_dict().items()}
    facts = export_onnx(q, tmp_path/'sub'/'m.onnx', (1, 8, 8))
    engine = OnnxModel(tmp_path/'sub'/'m.onnx', threads=1)
    assert engine.shape == (1, 8, 8)
    assert engine.n_classes == 6
    assert not engine.training
    assert facts['megabytes'] == (tmp_path/'sub'/'m.onnx').stat().st_size/1e6
    whole = engine(x)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([engine(o[None]) for o in x]))
    assert torch.equal(predict(engine, x, 3), whole)
    assert torch.equal(engine(x.double()), whole)
    assert torch.equal(engine(x.requires_grad_()), whole)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in q.state_dict().items())
    assert not any(n.meta.get('tensor_meta')
                   for n in q.graph.nodes), 'the graph of the caller is left alone'


def test_how_the_engine_is_asked(tmp_path, monkeypatch, one_thread):
    """As many threads as torch unless told, and no multiplication of bytes that saturates, whatever
    the processor"""
    export_onnx(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval(), tmp_path/'m.onnx',
                (3, 8, 8))
    seen = []
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort, 'InferenceSession',
        lambda path, options, **kw: seen.append(options) or real(path, options, **kw))
    run_onnx(tmp_path/'m.onnx', images(2, 8)), run_onnx(tmp_path/'m.onnx', images(2, 8), threads=2)
    assert [o.intra_op_num_threads for o in seen] == [1, 2]
    assert all(o.get_session_config_entry('session.x64quantprecision') == '1' for o in seen)


class Calls(nn.Module):
    def __init__(self, f, layer=None):
        super().__init__()
        self.conv, self.f, self.layer = nn.Conv2d(3, 4, 3, padding=1), f, layer
    def forward(self, x): return self.f(self.conv(x))


class Twice(nn.Module):
    "A transposed convolution that is told its size, which only its call holds"
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, 2, 1)
    def forward(self, x): return self.up(x, output_size=(16, 16))


class Bent(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x).relu()


class Odd(nn.Conv2d):
    def forward(self, x): return super().forward(x)*x.mean()


class Mixed(nn.Module):
    "What a transformer does to its tokens, by functions"
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 12))
        self.place = nn.Parameter(torch.linspace(-1, 1, 60).view(1, 5, 12))
        self.qkv = nn.Linear(12, 36)
        self.register_buffer('head', torch.randn(12, 6, generator=make_generator(3)))

    def forward(self, x):
        n = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.place
        q, k, v = self.qkv(F.layer_norm(x, (12,))).reshape(n, 5, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 5, 12)
        a, b = F.gelu(x).chunk(2, -1)
        return torch.cat([1 - a, b/2], -1)[:, 0] @ self.head


usual = dict(pool=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((4, 5))),
             narrow=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 4)),
             bilinear=lambda: nn.Sequential(nn.Upsample(size=(11, 13), mode='bilinear'), nn.Conv2d(3, 4, 3)),
             gates=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 1), nn.Mish()),
             groups=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU('tanh'),
                                          nn.PReLU(4)),
             up=lambda: nn.Sequential(nn.Conv2d(3, 4, 3),
                                      nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.ELU()),
             tokens=Mixed)
layers = lambda *after: lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *copy.deepcopy(after))
resize = lambda *size, **how: lambda: Calls(lambda a: F.interpolate(a, *size, **how))
call = lambda f: lambda: Calls(f)
usual |= {
    'softplus': layers(nn.Softplus(2., .5), nn.Conv2d(4, 4, 1)),
    'softplus function': call(lambda a: F.softplus(a, 3.)),
    'softmax of no dimension': layers(nn.Softmax()),
    'softmax function': call(lambda a: F.softmax(a)),
    'scale': layers(nn.Upsample(scale_factor=1.3)),
    'two scales': resize(scale_factor=(1.3, .6)),
    'fewer places': layers(nn.Upsample(size=(4, 5))),
    'linear scale': resize(scale_factor=.6, mode='bilinear'),
    'scale anew': resize(scale_factor=.6, mode='bilinear', recompute_scale_factor=True),
    'corners': resize((5, 11), mode='bicubic', align_corners=True),
    'cubic': resize(scale_factor=1.7, mode='bicubic'),
    'exact': resize((5, 11), mode='nearest-exact'),
    'area': layers(nn.Upsample(scale_factor=1.5, mode='area')),
    'antialias': resize((5, 3), mode='bilinear', antialias=True),
    'resized rows': call(lambda a: F.interpolate(a.flatten(2), scale_factor=.7, mode='linear')),
    'pad with a number': call(lambda a: F.pad(a, (1, 2, 0, 1), value=-2.)),
    'pad layer': layers(nn.ConstantPad2d(1, 3.)),
    'pad less': call(lambda a: F.pad(a, (-1, 2, 0, -1))),
    'pad channels': call(lambda a: F.pad(a, (0, 0, 0, 0, 1, 2))),
    'pad for a pool': call(lambda a: F.max_pool2d(F.pad(a, (0, 1, 0, 1), value=-math.inf), 2)),
    'parts turned round': call(lambda a: torch.cat(a.split([1, 3], 1)[::-1], 1)),
    'some parts': call(lambda a: torch.cat(a.chunk(4, 1)[1:], 1)),
    'one part of some': call(lambda a: a.chunk(4, 1)[1:][-1]*2),
    'every second': call(lambda a: torch.cat(a.unbind(1)[::2], 1)),
    'item behind a turn': call(lambda a: a.permute(1, 0, 2, 3)[0]*2),
    'turn by name': call(lambda a: a.permute(dims=(0, 2, 3, 1)).transpose(1, dim1=2)),
    'clamp to one value': call(lambda a: a.clamp(.3, .1)),
    'written into': call(lambda a: F.elu(a, .4, inplace=True) + a),
    'mean up to the edge': layers(nn.AvgPool2d(4, 4, ceil_mode=True))}


# torch 2.6 cannot trace a part of a tuple that is joined; the engine of Python 3.10 rounds softmax otherwise
newer = dict.fromkeys(('parts turned round', 'some parts', 'every second'), needs('torch', 2, 9))
newer |= dict.fromkeys(('tokens', 'softmax of no dimension'), needs('onnxruntime', 1, 24))


@pytest.mark.parametrize('name', [pytest.param(o, marks=newer.get(o, ())) for o in usual])
def test_usual_layers_are_written(name, tmp_path):
    x = images(16, 8)
    net = seeded(lambda: usual[name]() if name == 'tokens' else nn.Sequential(
        usual[name](), nn.Flatten(), nn.LazyLinear(6)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net(x[:1])
    export_onnx(net, tmp_path/'float.onnx', (3, 8, 8))
    whole = predict(net, x)
    assert (run_onnx(tmp_path/'float.onnx', x)-whole).abs().max() < 1e-4*whole.abs().max()
    q = quantize(net, 'INT8', x)
    export_onnx(q, tmp_path/'m.onnx', (3, 8, 8))
    assert (run_onnx(tmp_path/'m.onnx', x)-predict(q, x)).square().mean() < 1e-4*whole.var()


@pytest.mark.parametrize('net, text', (
    (Calls(lambda a: a.roll(1, 2)), r'roll \(roll\) is not known'),
    (Calls(lambda a: torch.add(a, a, alpha=2)), r'\(add\) is not known'),
    (Calls(lambda a: torch.cat([a, a])), r'cat \(cat\) is not known'),
    (Calls(lambda a: a.mean()), 'mixes the images'),
    (Calls(lambda a: a.transpose(0, 1).mean(1)), 'mixes the images'),
    (Calls(lambda a: a[:2]), 'picks images'),
    (Calls(lambda a: a[..., 0]), 'an index'),
    (Calls(lambda a: F.dropout(a)), 'drops values in evaluation mode too'),
    (Calls(lambda a: F.avg_pool2d(a, 2, divisor_override=3)), 'has a divisor of its own'),
    (nn.MaxPool2d(2, return_indices=True), 'returns places'),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'), "pads with 'reflect'"),
    (Calls(lambda a: torch.add(a, 2, a)), r'\(add\) is not known'),
    (Calls(lambda a: a.softmax(0)), 'mixes the images'),
    (Calls(lambda a: F.softmax(a.flatten(2))), 'mixes the images'),
    (Calls(lambda a: a.softmax(1, dtype=torch.float16)), 'computes in torch.float16'),
    (Calls(lambda a: (9*a).to(torch.int32)), 'computes in torch.int32'),
    (Calls(lambda a: F.pad(a, [0]*6 + [1, 0])), 'adds images to a batch'),
    (Calls(lambda a: a.chunk(2)[0]), 'picks images'),
    (Calls(lambda a: a.permute(1, 0, 2, 3)[:, :1]), 'picks images'),
    (Calls(lambda a: a[:, :a.shape[1]//2]), 'an index'),
    (Calls(lambda a: F.max_pool2d(a.flatten(2), 2)), 'pools maps without channels'),
    (Twice(), 'is called with more than its input'), (Bent(3), r'\(Bent\) is not known'),
    (nn.Softshrink(), r'\(Softshrink\) is not known'), (Odd(3, 4, 3), r'\(Odd\) is not known')))
def test_refused_by_name(net, text, tmp_path):
    (tmp_path/'m.onnx').write_text('what was there')
    with pytest.raises(TypeError, match=text) as e:
        export_onnx(nn.Sequential(net).eval(), tmp_path/'m.onnx', (3, 8, 8))
    assert 'Known are' in str(e.value)
    assert 'AdaptiveAvgPool2d' in str(e.value)
    assert 'FakeQuantize' not in str(e.value)
    assert (tmp_path/'m.onnx').read_text() == 'what was there'
    assert len(list(tmp_path.iterdir())) == 1


@needs('onnxruntime', 1, 24)
def test_means_beyond_a_padding_are_refused_in_integers(tmp_path):
    "ONNX Runtime divides by the places of the whole window there; in float it does what torch does"
    x = images(16, 8)
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(3, 2, 1, ceil_mode=True),
                                       nn.Flatten(), nn.Linear(100, 6)))
    export_onnx(net, tmp_path/'m.onnx', (3, 8, 8))
    torch.testing.assert_close(run_onnx(tmp_path/'m.onnx', x), predict(net, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match='reach beyond a padding that counts'):
        export_onnx(quantize(net, 'INT8', x), tmp_path/'m.onnx', (3, 8, 8))


def test_errors(tmp_path):
    x = images(8, 8)
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6)))
    path = tmp_path/'m.onnx'
    with pytest.raises(ValueError, match='Call `model.eval'):
        export_onnx(copy.deepcopy(net).train(), path, (3, 8, 8))
    for shape in ((1, 8, 8), (3, 9, 9)):
        with pytest.raises(ValueError, match=r'`shape` must be the channels, height and width'):
            export_onnx(net, path, shape)
    with pytest.raises(ValueError, match='3 channels|batch'):
        export_onnx(model_of(net), path, (1, 8, 8))
    with pytest.raises(TypeError, match='one tensor of logits'):
        export_onnx(Calls(lambda a: (a, a)).eval(), path, (3, 8, 8))
    q = quantize(net, 'INT8', x)
    with torch.no_grad():
        q.get_submodule('0').weight[0, 0, 0, 0] += .003
    with pytest.raises(ValueError, match='those of 0 do not lie on 255 levels'):
        export_onnx(q, path, (3, 8, 8))
    bad = copy.deepcopy(net)
    with torch.no_grad():
        bad[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r'finite weights; 2.weight'):
        export_onnx(bad, path, (3, 8, 8))
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match='Write one with `export_onnx`'):
        OnnxModel(path)
    export_onnx(net, path, (3, 8, 8))
    with pytest.raises(ValueError, match=r'images of shape \(3, 8, 8\); got \(3, 9, 9\)'):
        OnnxModel(path)(torch.rand(1, 3, 9, 9))
    with pytest.raises(ValueError, match='the model normalises'):
        run_onnx(path, x*255)
    other = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 7)))
    with pytest.raises(ValueError, match=r'`path` must hold the model that was given: it '
                                         r'gives logits \(8, 6\), the model \(8, 7\)'):
        check_export(other, path, x)
    turned = copy.deepcopy(net)
    with torch.no_grad():
        turned[2].weight *= -1
    assert check_export(turned, path, x)['agreement'] < .9


def test_without_the_packages(tmp_path, monkeypatch):
    "The module imports nothing of them; what needs them says where to get them"
    tree = ast.parse(Path(export.__file__).read_text())
    assert not any('onnx' in ast.unparse(o) for o in ast.walk(tree)
                   if isinstance(o, (ast.Import, ast.ImportFrom)))
    path = tmp_path/'m.onnx'
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    path.write_text('')
    for package, f in (('onnx', lambda: export_onnx(net, path)),
                       ('onnxruntime', lambda: OnnxModel(path))):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"{package}: pip install 'robustnb\[export\]'"):
                f()


def test_the_packages_are_an_extra():
    root = Path(__file__).parents[2]
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    wanted = parser['DEFAULT']['export_requirements'].split()
    dev = parser['DEFAULT']['dev_requirements'].split()
    run = parser['DEFAULT']['requirements'].split()
    assert wanted == ['onnx', 'onnxscript', 'onnxruntime']
    assert set(wanted) <= set(dev)
    assert not set(wanted) & set(run)
    assert "for k in ('dev', 'export', " in (root/'setup.py').read_text()
