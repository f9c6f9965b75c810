"Layers as other people's networks have them: with hooks, with tensors that two of them share, of odd numbers"
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers_quant import images
from robustnb.contract import predict
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.ptq import quantize
from robustnb.quant.reconstruction import adaround, correct_bias
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
