"Equalised channels against closed forms; where a factor gets through and where it stops"
import copy

import pytest
import torch
from torch import nn

from helpers_quant import images, layers, model_of, outputs, small, untouched, Ways
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.models.graph import fold_batchnorm
from robustnb.models.zoo import build_model, model_names
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.formats import quant_spec
from robustnb.quant.ptq import FakeQuantize, quantization_points, quantize
from robustnb.quant.reconstruction import adaround, correct_bias


@pytest.mark.parametrize('name', model_names)
def test_the_networks_answer_as_before(name):
    model = build_model(name, width=.0625).double()
    for i, m in enumerate(model.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.mul_(10**(torch.rand(len(m.weight), generator=make_generator(i)) - .5))
    before = copy.deepcopy(model.state_dict())
    x = images(4).double()
    e = cross_layer_equalization(model)
    assert untouched(before, model)
    assert not e.training
    assert (e.name, e.n_classes) == (name, 10)
    a = predict(model, x)
    b = predict(e, x)
    assert (a-b).abs().max() < 1e-5*a.std()
    folded = fold_batchnorm(model)
    assert all((e.get_submodule(n).weight - folded.get_submodule(n).weight).abs().max() > 1e-3
               for n, _ in e.equalized)
    convs = sum(isinstance(m, layers) for m in e.modules())
    many = dict(AlexNet=convs-1, AlexNet_BN=convs-1, VGG_16=convs-1, VGG_19=convs-1,
                ResNet_18=8, ResNet_50=32, ResNet_152=100, MobileNetV2=38, ViT=0)
    assert len(e.equalized) == many.get(name, 19)
    assert len(set(e.equalized)) == len(e.equalized)
    again = copy.deepcopy(e)
    assert again.equalized == e.equalized
    assert torch.equal(predict(again, x), b)


def test_two_layers_meet_at_the_geometric_mean():
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3),
                                           nn.Flatten(), nn.Linear(5*900, 2)))
    a = model.net[0]
    b = model.net[2]
    made = a.weight.detach().abs().amax((1, 2, 3))
    read = b.weight.detach().abs().amax((0, 2, 3))
    e = cross_layer_equalization(model, rounds=1)
    first = e.get_submodule(f'net.{0}')
    second = e.get_submodule(f'net.{2}')
    assert e.equalized == (('net.0', 'net.2'), ('net.2', 'net.4'))
    assert torch.allclose(first.weight.abs().amax((1, 2, 3)), (made*read).sqrt())
    assert torch.allclose(first.bias, a.bias*(read/made).sqrt())
    linear = e.get_submodule('net.4').weight.view(2, 5, -1).abs().amax((0, 2))
    assert torch.allclose(second.weight.abs().amax((1, 2, 3)),
                          linear), 'a channel is all its places in the linear layer'


def test_three_layers_with_a_depthwise_one_share_one_range():
    model = model_of(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(),
        nn.Conv2d(4, 5, 1), nn.Tanh(), nn.Flatten(), nn.Linear(5*900, 2)))
    a = model.net[0].weight.detach()
    b = model.net[2].weight.detach()
    c = model.net[4].weight.detach()
    third = (a.abs().amax((1, 2, 3))*b.abs().amax((1, 2, 3))*c.abs().amax((0, 2, 3)))**(1/3)
    e = cross_layer_equalization(model)
    assert e.equalized == (('net.0', 'net.2'), ('net.2', 'net.4')), 'a tanh lets no factor through'
    for i, dims in ((0, (1, 2, 3)), (2, (1, 2, 3)), (4, (0, 2, 3))):
        assert torch.allclose(e.get_submodule(f'net.{i}').weight.abs().amax(dims), third, rtol=2e-3)


def test_a_factor_stops_at_sums_shared_layers_and_other_activations():
    model = model_of(Ways).double()
    e = cross_layer_equalization(model)
    x = images(4).double()
    assert e.equalized == (('net.a', 'net.b'), ('net.b', 'net.c'), ('net.two', 'net.three'))
    assert (predict(e, x)-predict(model, x)).abs().max() < 1e-6*predict(model, x).std()


@pytest.mark.parametrize('end', (
    (lambda: nn.Flatten(2), lambda: nn.Linear(36, 5), lambda: nn.Flatten(1),
     lambda: nn.LazyLinear(3)),
    (lambda: nn.Linear(6, 5), lambda: nn.Flatten(), lambda: nn.LazyLinear(3)),
    (lambda: nn.Flatten(0, 1), lambda: nn.Flatten(1), lambda: nn.Linear(36, 3),
     lambda: nn.Unflatten(0, (-1, 8)), lambda: nn.Flatten(), lambda: nn.LazyLinear(3))),
                         ids=('from 2', 'along a row', 'with the batch'))
def test_flattening_something_else_stops_it(end):
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(6),
                                           *[o() for o in end]))
    e = cross_layer_equalization(model)
    assert ('net.0', 'net.2') not in e.equalized
    assert ('net.0', 'net.3') not in e.equalized
    assert torch.allclose(predict(e, images()), predict(model, images()), atol=1e-5)


def test_linear_layers_over_tokens_are_a_pair():
    model = model_of(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(1024, 6), nn.ReLU(),
                                           nn.Linear(6, 4), nn.Flatten(), nn.Linear(12, 3)))
    e = cross_layer_equalization(model)
    assert e.equalized == (('net.1', 'net.3'),)
    assert torch.allclose(predict(e, images()), predict(model, images()), atol=1e-5)


def test_clipping_at_six_is_kept_exactly_and_adds_no_rounding():
    model = small().double()
    x = images().double()
    with torch.no_grad():
        model.net[3].weight.mul_(40)
    depthwise = outputs(fold_batchnorm(model), x)['net.3'][1]
    assert .1 < (depthwise > 6).float().mean() < .9, 'the limit matters'
    e = cross_layer_equalization(model)
    assert e.equalized == (('net.0', 'net.3'), ('net.3', 'net.5'), ('net.5', 'net.9'),
                           ('net.9', 'net.11'))
    assert (predict(e, x)-predict(model, x)).abs().max() < 1e-6*predict(model, x).std()
    assert len(quantization_points(fold_batchnorm(e))) == len(
        quantization_points(fold_batchnorm(model)))
    a = predict(quantize(model, 'INT12', x), x)
    b = predict(quantize(e, 'INT12', x), x)
    assert all(n.startswith('clip_') for n in quantize(e, 'INT12',
                                                       x).left_float), 'limits are kept as they are'
    assert (a-b).abs().max() < .05*a.std()
    assert cross_layer_equalization(e).equalized == (('net.0', 'net.3'), ('net.5', 'net.9'), (
        'net.9', 'net.11')), 'a limit for each channel is a limit that stays'


def test_dead_channels_stay_and_nothing_overflows():
    model = small()
    with torch.no_grad():
        model.net[1].weight[2] = 0
        model.net[3].weight[4] = 0
        model.net[1].weight[5] = 1e-30
    e = cross_layer_equalization(model)
    assert all(p.isfinite().all() for p in e.parameters())
    assert torch.allclose(predict(e, images()), predict(model, images()), atol=1e-4)
    assert torch.equal(e.get_submodule('net.0').bias[2],
                       fold_batchnorm(model).get_submodule('net.0').bias[2])


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.six = nn.ReLU6()
        self.b = nn.Conv2d(4, 4, 3)
        self.c = nn.Conv2d(4, 4, 3)
        self.d = nn.Linear(4, 3)

    def forward(self, x):
        return self.d(self.c(input=self.b(self.six(input=self.a(x))).relu()).mean((2, 3)))


def test_inputs_given_by_name_stop_it():
    model = model_of(ByName)
    x = images()
    e = cross_layer_equalization(model)
    assert e.equalized == ()
    assert torch.equal(predict(e, x), predict(fold_batchnorm(model), x))
    q = quantize(model, 'INT3', x)
    assert predict(adaround(model, q, x, steps=5), x).isfinite().all()
    assert predict(correct_bias(model, q, x), x).isfinite().all()


def test_a_dead_channel_with_a_bias_does_not_take_the_range():
    model = small()
    x = images()
    with torch.no_grad():
        model.net[1].weight[3], model.net[1].bias[3] = 1e-8, .5
    e = cross_layer_equalization(model)
    assert e.get_submodule('net.0').bias[3] == .5
    assert e.get_submodule('net.0').bias.abs().max() < 10
    error = lambda m: (predict(quantize(m, 'INT8', x), x)-predict(model, x)).square().mean()
    assert error(e) < 2*error(model)


def test_equal_channels_help_one_scale_for_all():
    model = small()
    x = images(64)
    with torch.no_grad():
        s = 10**torch.linspace(-1.5, 1.5, 8)
        model.net[1].weight.mul_(s)
        model.net[1].bias.mul_(s)
        model.net[3].weight.div_(s.view(-1, 1, 1, 1))
    spec = quant_spec('INT6/INT16', per_channel=False)
    error = lambda m: (predict(quantize(m, spec, x), x)-predict(model, x)).square().mean()
    assert error(cross_layer_equalization(model)) < .1*error(model)


def test_equalization_refuses_what_it_cannot_do():
    model = small()
    with pytest.raises(ValueError, match='at least 1; got 0'):
        cross_layer_equalization(model, rounds=0)
    with pytest.raises(ValueError, match='evaluation mode'):
        cross_layer_equalization(model.train())
    model.eval()
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model.net[9].weight[0, 1] = bad
        with pytest.raises(ValueError, match='finite weights; 1 of the 480 values of net.9.weight'):
            cross_layer_equalization(model)
        with pytest.raises(ValueError, match='finite weights'):
            correct_bias(model, quantize(small(), 'INT4', images(4)), images(4))
    plain = model_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)))
    assert cross_layer_equalization(plain).equalized == ()
    assert torch.equal(predict(cross_layer_equalization(plain), images()), predict(plain, images()))
    assert not any(isinstance(m, FakeQuantize) for m in cross_layer_equalization(small()).modules())


class Statements(nn.Module):
    "The usual network of two layers, whose activations write into what they are given"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        y = self.a(x)
        nn.functional.relu(y, inplace=True)
        y = self.b(y)
        nn.functional.relu(y, inplace=True)
        return self.head(y.mean((2, 3)))


def test_activations_whose_answer_is_not_kept_are_kept():
    torch.manual_seed(0)
    net = Statements().eval()
    x = images(20)
    said = predict(net, x)
    spread = said.std(0).mean()
    e = cross_layer_equalization(net)
    assert len(e.equalized) == 1
    assert (predict(e, x) - said).abs().max() < 1e-3*spread
    assert (predict(quantize(net, 'INT16', x), x) - said).abs().max() < .05*spread
