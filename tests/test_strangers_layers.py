"Layers as other people's networks have them: with hooks, with tensors that two of them share, of odd numbers"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers_quant import images
from robustnb.contract import predict
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.export import export_onnx, run_onnx
from robustnb.quant.formats import choose_scale, fake_quantize, number_format
from robustnb.quant.mixed_precision import allocate_bits
from robustnb.quant.ptq import model_bytes, quantize
from robustnb.quant.reconstruction import adaround, correct_bias
from robustnb.quant.sensitivity import layer_sensitivity
from robustnb.core import make_generator


def chain():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 5)).eval()
    for i, p in enumerate(net.parameters()):
        p.data.normal_(0, .2, generator=make_generator(i))
    with torch.no_grad(): net[0].weight[0] *= 20
    return net


def shifted(net, i): net[i].register_forward_hook(lambda m, args, out: out+1)
def squashed(net, i): net[i].register_forward_hook(lambda m, args, out: out.sigmoid())
def before(net, i): net[i].register_forward_pre_hook(lambda m, args: (args[0]+1,))
def replaced(net, i): net[i].forward = lambda x, old=net[i].forward: old(x).tanh()


@pytest.mark.parametrize('change', [shifted, squashed, before, replaced])
@pytest.mark.parametrize('i', [0, 1, 2])
def test_a_hook_stops_equalisation(change, i):
    net = chain()
    change(net, i)
    a, b = (predict(o, images(8)) for o in (net, cross_layer_equalization(net)))
    assert (a-b).abs().max() < 1e-4*a.std()


@pytest.mark.parametrize('improve', [correct_bias, adaround])
def test_a_layer_with_a_hook_is_left_as_it_is(improve):
    net = chain()
    net[0].register_forward_hook(lambda m, args, out: 2*out)
    q = quantize(net, 'INT4/INT8', images(64))
    better = improve(net, q, images(64))
    for name in ('0.weight', '0.bias'):
        assert torch.equal(better.get_parameter(name), q.get_parameter(name))
    assert not torch.equal(better.state_dict()['2.bias'], q.state_dict()['2.bias']) or improve is adaround


def test_what_a_hook_makes_of_moved_values_is_rounded():
    net = chain()
    net[4].register_forward_hook(lambda m, args, out: out)
    net[5].register_forward_hook(lambda m, args, out: out*.37)
    q = quantize(net, 'INT4', images(64))
    rounders = [n for n, _ in q.named_modules() if n.startswith('round_')]
    assert 'round__5' in rounders


def test_layers_with_one_bias_keep_it():
    net = chain()
    net[2].bias = net[0].bias
    a, b = (predict(o, images(8)) for o in (net, cross_layer_equalization(net)))
    assert (a-b).abs().max() < 1e-4*a.std()


def test_one_bias_of_two_layers_is_in_no_ones_unit():
    net = chain()
    net[2].bias = net[0].bias
    q = quantize(net, 'INT4', images(64))
    assert torch.equal(q.get_parameter('0.bias'), net[0].bias)
    assert q.get_submodule('2').bias is q.get_submodule('0').bias


class Tied(nn.Module):
    "A linear layer or convolution, and the same weight the other way round"
    def __init__(self, layer, back=None, first=False):
        super().__init__()
        self.stem, self.layer, self.back, self.first = nn.Conv2d(3, 8, 3), layer, back, first
        if back is not None: back.weight = layer.weight
        self.head = nn.Linear(8, 5)

    def turned(self, x):
        if self.back is not None: return self.back(x)
        w = self.layer.weight
        return F.linear(x, w.t()) if isinstance(self.layer, nn.Linear) else F.conv_transpose2d(x, w)

    def forward(self, x):
        x = self.stem(x).relu()
        if isinstance(self.layer, nn.Linear): x = x.mean((2, 3))
        for step in ((self.turned, self.layer) if self.first else (self.layer, self.turned)):
            x = step(x).relu()
        return self.head(x if isinstance(self.layer, nn.Linear) else x.mean((2, 3)))


@pytest.mark.parametrize('make', [
    lambda: Tied(nn.Linear(8, 6)), lambda: Tied(nn.Linear(8, 8)), lambda: Tied(nn.Linear(8, 8), first=True),
    lambda: Tied(nn.Conv2d(8, 6, 3)), lambda: Tied(nn.Conv2d(8, 6, 3), nn.ConvTranspose2d(6, 8, 3)),
    lambda: Tied(nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), first=True)])
def test_a_weight_that_is_used_both_ways(make):
    net = make().eval()
    for i, p in enumerate(net.parameters()):
        p.data.normal_(0, .2, generator=make_generator(i))
    x = images(32, 12)
    q = quantize(net, 'INT12', x)
    a, b = predict(net, x), predict(q, x)
    assert (a-b).abs().max() < .02*a.std()
    assert not q.left_float
    for improve in (correct_bias, adaround):
        assert (predict(improve(net, q, x), x)-a).abs().max() < .05*a.std()
    q = quantize(net, 'INT8', x)
    scale = choose_scale(net.layer.weight.detach(), q.spec.weights, per_channel=True)
    called = next(n for n in q.graph.nodes if n.target == 'layer')
    unit = scale.flatten()*q.get_submodule(called.args[0].target).scale
    whole = q.get_parameter('layer.bias')/unit
    assert (whole-whole.round()).abs().max() < 1e-2


class Named(nn.Module):
    "A linear layer by any name"
    def __init__(self, name):
        super().__init__()
        self.conv, self.name_of_it = nn.Conv2d(3, 8, 3), name
        setattr(self, name, nn.Linear(8, 5))
    def forward(self, x): return getattr(self, self.name_of_it)(self.conv(x).relu().mean((2, 3)))


names = 'graph', 'code', 'meta', 'spec', 'stored', 'opened', 'name', 'classes', 'round_x'

@pytest.mark.parametrize('name', names)
def test_parts_may_be_called_anything(name):
    net = Named(name).eval()
    x = images(16)
    q = quantize(net, 'INT12', x)
    a = predict(net, x)
    for copy in (q, cross_layer_equalization(net), correct_bias(net, q, x)):
        assert (predict(copy, x)-a).abs().max() < .05*a.std()
    assert q.classes is None and str(q.spec) == 'INT12' and len(layer_sensitivity(net, q, x)) == 5
    assert model_bytes(q, 12) == model_bytes(net, 12) == 436


class Clipped(nn.Module):
    "Limits for each channel"
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.low, self.high = torch.full((8, 1, 1), -.2), torch.linspace(.1, .9, 8).view(8, 1, 1)
    def forward(self, x): return self.last(self.conv(x).clamp(self.low, self.high)).mean((2, 3))


def sixes():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),
                         nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize('make', [Clipped, lambda: cross_layer_equalization(sixes().eval())])
def test_limits_for_each_channel_are_exported(make, tmp_path):
    pytest.importorskip('onnxruntime')
    net = make().eval()
    with torch.no_grad():
        for p in net.parameters(): p.mul_(2)
    x = images(16)
    for model in (net, quantize(net, 'INT8', x), quantize(net, 'FP8', x)):
        export_onnx(model, tmp_path/'m.onnx')
        a = predict(model, x)
        assert (run_onnx(tmp_path/'m.onnx', x)-a).abs().max() < .02*a.std()


@pytest.mark.parametrize('name', ['INT8', 'INT16', 'POT4', 'APOT4', 'FLOAT4', 'FP8'])
@pytest.mark.parametrize('size', [1e-44, 1e-41, 1e-38])
def test_scales_of_the_smallest_numbers(name, size):
    w = torch.tensor([[size, -size], [0, size]])
    scale = choose_scale(w, number_format(name), per_channel=True)
    off = (fake_quantize(w, number_format(name), scale)-w).abs().max()
    assert (scale > 0).all() and off <= max(size, 2e-38)


def test_layers_of_the_smallest_numbers_answer_with_numbers():
    net = chain()
    with torch.no_grad():
        for p in net[2].parameters(): p.mul_(1e-40)
    q = quantize(net, 'INT16', images(16))
    assert predict(q, images(16)).isfinite().all() and all(p.isfinite().all() for p in q.parameters())


@pytest.mark.parametrize('size', [1e-18, 1e25])
def test_noise_is_a_share_at_any_size(size):
    net = chain()
    with torch.no_grad():
        for p in net[2].parameters(): p.mul_(size)
        net[6].weight.div_(size)
    table = layer_sensitivity(net, quantize(net, 'INT4', images(16)), images(16)).set_index('layer')
    assert .001 < table.nsr['2'] < .1 and .001 < table.nsr['6'] < .1


def test_a_network_without_layers_has_no_bits_to_allocate():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match='must have a convolution or linear layer'):
        allocate_bits(net, images(8), budget_kb=1)


class Halved(nn.Module):
    "Half precision on the way"
    def __init__(self, dtype):
        super().__init__()
        self.conv, self.last, self.dtype = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), dtype
    def forward(self, x): return self.last(getattr(self.conv(x), self.dtype)().relu().float().mean((2, 3)))


@pytest.mark.parametrize('dtype', ['half', 'bfloat16'])
def test_half_precision_on_the_way_is_named(dtype):
    with pytest.raises(TypeError, match='`model` must compute in float32 .* after relu are torch.b?float16'):
        quantize(Halved(dtype).eval(), 'INT8', images(8))
