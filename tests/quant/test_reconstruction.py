"""Equalised channels against closed forms, corrected biases against means taken by hooks, learnt
rounding against all choices; what does not belong together is refused."""
import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustnb.quant import reconstruction as refine
from robustnb.core import make_generator, predict
from robustnb.models.wrapping import wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.models.graph import fold_batchnorm, keep_facts
from robustnb.quant.ptq import quantize, FakeQuantize, quantization_points
from robustnb.quant.formats import choose_scale, levels, number_format, quant_spec
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.reconstruction import correct_bias, adaround

layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def images(n=16, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=make_generator(seed, 'test images'))


def seeded(make, seed=0):
    "A module whose weights come from a seed; batch norm is no identity"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                (nn.init.uniform_(m.weight, .2, 2), nn.init.uniform_(m.bias, -.5, .5),
                 nn.init.uniform_(m.running_var, .5, 2), nn.init.normal_(m.running_mean))
        if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()):
            net(images(2))
    return net.eval()


def model_of(make, seed=0): return wrap_model(seeded(make, seed), (.5,)*3, (.25,)*3)


def small():
    "A convolution with batch norm, a depthwise one without a bias, a strided grouped one, two linear layers"
    return model_of(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8),
                                          nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
                                          nn.ReLU6(), nn.Conv2d(8, 12, 3, 2, groups=2),
                                          nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                          nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 7)))


def outputs(model, x):
    "Inputs and outputs of each layer with weights at its first call, in the order of the calls"
    found = {}
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: found.setdefault(
        n, (a[0], out)) and None) for n, m in model.named_modules() if isinstance(m, layers)]
    predict(model, x, batch_size=len(x))
    for h in hooks:
        h.remove()
    return found


def untouched(before, module):
    return (all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
            and before.keys() == module.state_dict().keys())


# ---- equal channels

@pytest.mark.parametrize('name', model_names)
def test_the_nine_networks_answer_as_before(name):
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
               for n, _ in e.equalised)
    convs = sum(isinstance(m, layers) for m in e.modules())
    many = dict(AlexNet=convs-1, AlexNet_BN=convs-1, VGG_16=convs-1, VGG_19=convs-1,
                ResNet_18=8, ResNet_50=32, ResNet_152=100, MobileNetV2=38)
    assert len(e.equalised) == many.get(name, 19)
    assert len(set(e.equalised)) == len(e.equalised)
    again = copy.deepcopy(e)
    assert again.equalised == e.equalised
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
    assert e.equalised == (('net.0', 'net.2'), ('net.2', 'net.4'))
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
    assert e.equalised == (('net.0', 'net.2'), ('net.2', 'net.4')), 'a tanh lets no factor through'
    for i, dims in ((0, (1, 2, 3)), (2, (1, 2, 3)), (4, (0, 2, 3))):
        assert torch.allclose(e.get_submodule(f'net.{i}').weight.abs().amax(dims), third, rtol=2e-3)


class Ways(nn.Module):
    "Where a factor gets through and where it does not, in functions and methods"
    def __init__(self):
        super().__init__()
        for k in 'abcdefg':
            setattr(self, k, nn.Conv2d(4 if k != 'a' else 3, 4, 3, padding=1))
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.g.weight
        self.one = nn.Linear(4*16, 6)
        self.two = nn.Linear(6, 6)
        self.three = nn.Linear(6, 6)
        self.four = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu6(self.a(x))
        x = F.max_pool2d(F.leaky_relu(self.b(x), .1), 2)
        x = self.c(x)
        x = torch.relu(self.d(x)) + x
        x = self.e(self.e(x).relu())
        x = torch.sigmoid(self.f(x))
        x = self.tied(self.g(x).relu())
        x = torch.flatten(F.adaptive_avg_pool2d(F.dropout(x, .5, self.training), 4), 1)
        x = F.relu(self.two(F.hardtanh(self.one(x))))
        return self.four(F.relu(self.three(x))) + self.four.weight.sum()


def test_a_factor_stops_at_sums_shared_layers_and_other_activations():
    model = model_of(Ways).double()
    e = cross_layer_equalization(model)
    x = images(4).double()
    assert e.equalised == (('net.a', 'net.b'), ('net.b', 'net.c'), ('net.two', 'net.three'))
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
    assert ('net.0', 'net.2') not in e.equalised
    assert ('net.0', 'net.3') not in e.equalised
    assert torch.allclose(predict(e, images()), predict(model, images()), atol=1e-5)


def test_linear_layers_over_tokens_are_a_pair():
    model = model_of(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(1024, 6), nn.ReLU(),
                                           nn.Linear(6, 4), nn.Flatten(), nn.Linear(12, 3)))
    e = cross_layer_equalization(model)
    assert e.equalised == (('net.1', 'net.3'),)
    assert torch.allclose(predict(e, images()), predict(model, images()), atol=1e-5)


def test_clipping_at_six_is_kept_exactly_and_adds_no_rounding():
    model = small().double()
    x = images().double()
    with torch.no_grad():
        model.net[3].weight.mul_(40)
    depthwise = outputs(fold_batchnorm(model), x)['net.3'][1]
    assert .1 < (depthwise > 6).float().mean() < .9, 'the limit matters'
    e = cross_layer_equalization(model)
    assert e.equalised == (('net.0', 'net.3'), ('net.3', 'net.5'), ('net.5', 'net.9'),
                           ('net.9', 'net.11'))
    assert (predict(e, x)-predict(model, x)).abs().max() < 1e-6*predict(model, x).std()
    assert len(quantization_points(fold_batchnorm(e))) == len(
        quantization_points(fold_batchnorm(model)))
    a = predict(quantize(model, 'INT12', x), x)
    b = predict(quantize(e, 'INT12', x), x)
    assert quantize(e, 'INT12', x).left_float == ()
    assert (a-b).abs().max() < .05*a.std()
    assert cross_layer_equalization(e).equalised == (('net.0', 'net.3'), ('net.5', 'net.9'), (
        'net.9', 'net.11')), 'a limit for each channel is a limit that stays'


def test_dead_channels_stay_and_nothing_overflows():
    model = small()
    with torch.no_grad():
        model.net[1].weight[2], model.net[3].weight[4], model.net[1].weight[5] = 0, 0, 1e-30
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
    assert e.equalised == ()
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
        (model.net[1].weight.mul_(s), model.net[1].bias.mul_(s),
         model.net[3].weight.div_(s.view(-1, 1, 1, 1)))
    error = lambda m: (predict(quantize(m, quant_spec('INT6/INT16', per_channel=False), x),
                               x)-predict(model, x)).square().mean()
    assert error(cross_layer_equalization(model)) < .1*error(model)


# ---- corrected biases

@pytest.mark.parametrize('name', ('INT3', 'POT4', 'FLOAT4/INT8', 'INT2/INT6'))
def test_the_means_of_all_layers_become_those_of_the_original(name):
    model = small()
    x = images(40)**2
    q = quantize(model, name, x)
    before = copy.deepcopy(q.state_dict())
    original = copy.deepcopy(model.state_dict())
    c = correct_bias(model, q, x)
    assert untouched(before, q)
    assert untouched(original, model)
    assert all(p.requires_grad for p in model.parameters())
    goal, now, then = (outputs(m, x) for m in (fold_batchnorm(model), c, q))
    assert list(goal) == ['net.0', 'net.3', 'net.5', 'net.9', 'net.11']
    for n in goal:
        a = goal[n][1].transpose(0, 1).flatten(1).mean(1)
        b = now[n][1].transpose(0, 1).flatten(1).mean(1)
        old = then[n][1].transpose(0, 1).flatten(1).mean(1)
        assert torch.allclose(a, b, atol=1e-5*a.abs().max().item())
        assert (a-old).abs().max() > 1e-3*a.abs().max()
    assert {k for k, v in c.state_dict().items()
            if not torch.equal(v, before.get(k, v[..., None]))} == {f'{n}.bias' for n in goal}
    assert c.get_submodule('net.3').bias.shape == (8,)
    assert not any(p.requires_grad for p in c.parameters())
    assert not c.training
    assert (str(c.spec), c.left_float, c.n_classes) == (str(q.spec), (), 7)
    for again in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert torch.equal(predict(again, x), predict(c, x))
        assert str(again.spec) == str(c.spec)


def test_the_correction_of_one_layer_in_closed_form():
    model = model_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*64, 4)))
    x = images(50, size=8)
    q = quantize(model, 'INT3', x)
    c = correct_bias(model, q, x)
    stored = outputs(q, x)['net.1'][0]
    w = model.net[1].weight.detach()
    rounded = q.get_submodule('net.1').weight
    moved = (model.normalize(x).flatten(1) @ w.T - stored @ rounded.T).mean(0)
    assert torch.allclose(c.get_submodule('net.1').bias - model.net[1].bias, moved, atol=1e-5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x): return self.fc(self.b(self.b(self.a(x)).relu()).relu().mean((2, 3)))


def test_a_layer_called_twice_is_corrected_at_its_first_call():
    model = model_of(Twice)
    x = images(30)
    c = correct_bias(model, quantize(model, 'INT3', x), x)
    goal = outputs(fold_batchnorm(model), x)
    now = outputs(c, x)
    for n in goal:
        assert torch.allclose(goal[n][1].transpose(0, 1).flatten(1).mean(1),
                              now[n][1].transpose(0, 1).flatten(1).mean(1), atol=1e-5)


# ---- learnt rounding

@pytest.mark.parametrize('layer, shape', (
    (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), (2, 3), padding=(1, 2), groups=2), (4, 9, 8)),
    (nn.Conv2d(4, 4, 3, dilation=2, padding='same', groups=4, bias=False), (4, 9, 8)),
    (nn.Conv2d(4, 6, 2, padding='same', padding_mode='circular'), (4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode='reflect', stride=2), (4, 9, 8)),
    (nn.Conv1d(4, 6, 3, 2, padding=1, dilation=2, groups=2), (4, 11)),
    (nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), groups=2), (4, 5, 6, 4)), (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (7, 5))))
def test_patches_make_the_outputs(layer, shape):
    x = torch.randn(3, *shape, generator=make_generator(0))
    with torch.no_grad():
        out = layer(x)
        at = refine._places(layer, out, 20, make_generator(1))
        assert len(at) == len(at.unique()) == min(20, out.numel()//len(layer.weight))
        patches = refine._patches(layer, x, out.shape[2:], at)
        target = refine._outputs(layer, out, at)
        w = layer.weight.view(len(patches), len(layer.weight)//len(patches), -1)
        bias = 0 if layer.bias is None else layer.bias
        assert torch.allclose((patches @ w.transpose(1, 2)).movedim(0, 1).flatten(1) + bias,
                              target, atol=1e-5)
        assert refine._errors(layer, patches, target, lambda v: v)(w, slice(None)).max() < 1e-10
        off = refine._errors(layer, patches, target+2, lambda v: v)(w, slice(1, 3))
        assert off.shape == w.shape[:2]
        assert torch.allclose(off, torch.full_like(off, 4.), atol=1e-3)


@pytest.mark.parametrize('name, per_channel', (('INT3', True), ('INT4', False), ('POT4', True),
                                               ('FLOAT4', False), ('FP8', True), ('INT2', True)))
def test_every_weight_is_on_one_of_its_two_levels(name, per_channel):
    model = small()
    x = images(24)
    q = quantize(model, quant_spec(name, per_channel), x)
    before = copy.deepcopy(q.state_dict())
    r = adaround(model, q, x, steps=30)
    assert untouched(before, q)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in r.parameters())
    assert not r.training
    assert {k for k, v in r.state_dict().items()
            if not torch.equal(v, before[k])} <= {f'net.{i}.weight' for i in (0, 3, 5, 9, 11)}
    assert r.left_float == ()
    assert r.spec == q.spec
    at, moved = levels(number_format(name)), 0
    at = torch.cat([-at[1:].flip(0), at])
    for n, layer in fold_batchnorm(model).named_modules():
        if not isinstance(layer, layers): continue
        scale = choose_scale(layer.weight, number_format(name), 'mse', per_channel)
        v = (layer.weight.detach()/scale).double().flatten()
        now = (r.get_submodule(n).weight/scale).double().flatten()
        for a, b in zip(v.tolist(), now.tolist()):
            below = at[at <= a + 1e-6]
            above = at[at >= a - 1e-6]
            near = [below[-1].item() if len(below) else at[0].item(),
                    above[0].item() if len(above) else at[-1].item()]
            if a > at[-1]:
                near.append(at[-2].item())
            if a < at[0]:
                near.append(at[1].item())
            assert min(abs(b-o) for o in near) < 1e-4*max(1, abs(b)), (n, a, b, near)
        moved += (r.get_submodule(n).weight != q.get_submodule(n).weight).sum().item()
    assert moved > 0


def pair():
    "Weights 3, .4 and .45, whose scale is 1 in INT3 by min-max; equal inputs of the last two"
    model = wrap_model(nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False)), (0.,), (1.,))
    with torch.no_grad():
        model.net[1].weight.copy_(torch.tensor([[3., .4, .45]]))
    common = torch.rand(300, 1, 1, 1, generator=make_generator(0))
    return model, torch.cat([0*common, common, common], 3)


def test_errors_of_equal_inputs_cancel_where_the_sum_is_nearer_to_another_level():
    spec = quant_spec('INT3/INT16', rule='minmax')
    model, x = pair()
    learnt = adaround(model, quantize(model, spec, x), x).get_submodule('net.1').weight.flatten()
    assert sorted(learnt.round(decimals=4).tolist()) == [
        0, 1, 3], '.85 of the common input is nearer to 1 than to 0'
    with torch.no_grad():
        model.net[1].weight[0, 1:] = torch.tensor([.2, .15])
    learnt = adaround(model, quantize(model, spec, x), x).get_submodule('net.1').weight.flatten()
    assert sorted(learnt.round(decimals=4).tolist()) == [0, 0, 3], '.35 is nearer to 0'


@pytest.mark.parametrize('fmt', ('INT3', 'POT3', 'FLOAT4'))
def test_close_to_the_best_of_all_choices(fmt):
    g = make_generator(5)
    x = torch.rand(400, 1, 2, 4, generator=g)*torch.linspace(.2, 1, 8).view(1, 1, 2, 4)
    model = wrap_model(nn.Sequential(nn.Flatten(), nn.Linear(8, 10)), (0.,), (1.,))
    with torch.no_grad():
        model.net[1].weight.copy_(torch.randn(10, 8, generator=g)), model.net[1].bias.fill_(.3)
    q = quantize(model, f'{fmt}/INT16', x)
    r = adaround(model, q, x, steps=400)
    w = model.net[1].weight.detach()
    flat = x.flatten(1).double()
    low, high, _ = refine._around(w, number_format(fmt), q.spec)
    choices = torch.tensor(list(itertools.product((False, True), repeat=8)))
    error = lambda o, row: ((o-row).double() @ flat.T).square().mean(-1)
    best = torch.stack(
        [error(torch.where(choices, h, l), row).min() for l, h, row in zip(low, high, w)])
    mine = error(r.get_submodule('net.1').weight, w)
    nearest = error(q.get_submodule('net.1').weight, w)
    assert (best <= mine + 1e-9).all()
    assert mine.mean() < .65*nearest.mean()
    assert mine.mean() < best.mean() + .35*(nearest-best).mean()
    assert (mine <= 1.1*nearest).all(), 'a row that would become worse is left'


def test_no_steps_is_the_nearest_and_the_seed_decides_the_rest():
    model, x = small(), images(24)
    q = quantize(model, 'INT3', x)
    assert untouched(q.state_dict(), adaround(model, q, x, steps=0))
    state = torch.random.get_rng_state()
    a = adaround(model, q, x, steps=40, places=300, seed=0)
    b = adaround(model, q, x, steps=40, places=300, seed=0)
    c = adaround(model, q, x, steps=40, places=300, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert untouched(a.state_dict(), b)
    assert not untouched(a.state_dict(), c)
    with torch.no_grad():
        assert untouched(a.state_dict(), adaround(model, q, x, steps=40, places=300))


@pytest.mark.parametrize('name', ('INT3', 'POT4', 'FLOAT4'))
def test_learnt_rounding_brings_the_logits_closer(name):
    model = small()
    x = images(64)
    others = images(64, seed=1)
    error = lambda m: (predict(m, others)-predict(model, others)).square().mean()
    q = quantize(model, f'{name}/INT8', x)
    r = adaround(model, q, x)
    assert error(r) < .7*error(q)
    assert error(correct_bias(model, r, x)) < error(q)


def test_the_activation_behind_a_layer():
    find = lambda make: refine._after(fold_batchnorm(model_of(make)),
                                      'net.0')(torch.tensor([-1., 3., 9.])).tolist()
    flat = lambda *o: lambda: nn.Sequential(nn.Conv2d(3, 2, 1), *o, nn.Flatten(), nn.LazyLinear(2))
    assert find(flat(nn.ReLU())) == [0, 3, 9]
    assert find(flat(nn.ReLU6())) == [0, 3, 6]
    assert find(flat(nn.Tanh())) == find(flat()) == [-1, 3, 9]
    two = fold_batchnorm(model_of(Ways))
    v = torch.tensor([-1., 9.])
    assert refine._after(two, 'net.a')(v).tolist() == [0, 6]
    assert refine._after(two, 'net.d')(v).tolist() == [0, 9]
    assert refine._after(two, 'net.c')(v).tolist() == [-1, 9]


def test_formats_of_single_layers_are_followed():
    model, x = small(), images(24)
    q = quantize(model, 'INT8', x)
    with pytest.raises(ValueError, match='in net.9 .* of 480 weights'):
        correct_bias(model, keep_facts(q, layer_formats={'net.9': number_format('INT3')}), x)
    q.get_submodule('net.9').weight.copy_(quantize(model, 'INT3', x).get_submodule('net.9').weight)
    r = adaround(model, q, x, steps=30)
    assert all(len(w.unique()) <= 7 for w in r.get_submodule('net.9').weight)
    assert len(r.get_submodule('net.11').weight[0].unique()) > 7


# ---- what is refused

def test_what_does_not_belong_together():
    model = small()
    x = images(8)
    q = quantize(model, 'INT4', x)
    other = small()
    with torch.no_grad():
        other.net[9].weight[0, 0] += 1
    for f in (correct_bias, adaround):
        with pytest.raises(ValueError,
                           match=r'must be a rounded copy of `model`; in net.9 \d+ of 480 weights'):
            f(other, q, x)
        with pytest.raises(ValueError, match='must have the layers of `model`; net.0 is .8, '
                                             '3, 3, 3. there and .4, 3, 1, 1. here'):
            f(model_of(lambda: nn.Sequential(nn.Conv2d(3, 4, (1, 1)), nn.Flatten(),
                                             nn.LazyLinear(2))),
              q, x)
        with pytest.raises(ValueError, match='net.features.0 is None there'):
            f(build_model('VGG_16', width=.1), q, x)
        with pytest.raises(ValueError, match='rounded copy'):
            f(cross_layer_equalization(model), q, x)
        with pytest.raises(TypeError, match='must come from `quantize`; got Normalized'):
            f(model, model, x)
        with pytest.raises(TypeError, match='must come from `quantize`'):
            f(model, fold_batchnorm(model), x)
        with pytest.raises(TypeError, match='`images` must be a torch tensor'):
            f(model, q, None)
        with pytest.raises(ValueError, match='non-empty'):
            f(model, q, x[:0])
        with pytest.raises(ValueError, match=r'pixels in \[0, 1\]'):
            f(model, q, x*torch.nan)
        with pytest.raises(ValueError, match='evaluation mode'):
            f(copy.deepcopy(model).train(), q, x)
    with pytest.raises(ValueError, match='`steps` must be at least 0'):
        adaround(model, q, x, steps=-1)
    with pytest.raises(ValueError, match='`places` at least 8; got 100 and 4'):
        adaround(model, q, x, places=4)


def test_equalise_refuses_what_it_cannot_do():
    model = small()
    with pytest.raises(ValueError, match='at least 1; got 0'):
        cross_layer_equalization(model, rounds=0)
    with pytest.raises(ValueError, match='evaluation mode'):
        cross_layer_equalization(model.train())
    model.eval()
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model.net[9].weight[0, 1] = bad
        with pytest.raises(ValueError, match='finite weights; 1 of 480 in net.net.9|finite '
                                             'weights; 1 of 480 in net.9.weight'):
            cross_layer_equalization(model)
        with pytest.raises(ValueError, match='finite weights'):
            correct_bias(model, quantize(small(), 'INT4', images(4)), images(4))
    plain = model_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)))
    assert cross_layer_equalization(plain).equalised == ()
    assert torch.equal(predict(cross_layer_equalization(plain), images()), predict(plain, images()))
    assert not any(isinstance(m, FakeQuantize) for m in cross_layer_equalization(small()).modules())
