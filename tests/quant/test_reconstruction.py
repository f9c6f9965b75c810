"""Corrected biases against means taken by hooks, learnt rounding against all choices; what does not belong
together is refused."""
import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_quant import images, layers, model_of, outputs, small, untouched, Ways
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.models.graph import fold_batchnorm, keep_facts
from robustnb.models.wrapping import wrap_model
from robustnb.models.zoo import build_model
from robustnb.quant import reconstruction
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.formats import choose_scale, levels, number_format, quant_spec
from robustnb.quant.ptq import quantize
from robustnb.quant.reconstruction import adaround, correct_bias


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
        at = reconstruction._places(layer, out, 20, make_generator(1))
        assert len(at) == len(at.unique()) == min(20, out.numel()//len(layer.weight))
        patches = reconstruction._patches(layer, x, out.shape[2:], at)
        target = reconstruction._outputs(layer, out, at)
        w = layer.weight.view(len(patches), len(layer.weight)//len(patches), -1)
        bias = 0 if layer.bias is None else layer.bias
        assert torch.allclose((patches @ w.transpose(1, 2)).movedim(0, 1).flatten(1) + bias,
                              target, atol=1e-5)
        assert reconstruction._errors(layer, patches, target, lambda v: v)(w, slice(None)).max() < 1e-10
        off = reconstruction._errors(layer, patches, target+2, lambda v: v)(w, slice(1, 3))
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
    """Weights 3, .4 and .45, whose scale is 1 in INT3 by min-max, with equal inputs of the last two; a second
    logit is that of the first input"""
    model = wrap_model(nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)), (0.,), (1.,))
    with torch.no_grad():
        model.net[1].weight.copy_(torch.tensor([[3., .4, .45], [3., 0., 0.]]))
    common = torch.rand(300, 1, 1, 1, generator=make_generator(0))
    return model, torch.cat([0*common, common, common], 3)


def test_errors_of_equal_inputs_cancel_where_the_sum_is_nearer_to_another_level():
    spec = quant_spec('INT3/INT16', rule='minmax')
    model, x = pair()
    learnt = adaround(model, quantize(model, spec, x), x).get_submodule('net.1').weight[0]
    assert sorted(learnt.round(decimals=4).tolist()) == [
        0, 1, 3], '.85 of the common input is nearer to 1 than to 0'
    with torch.no_grad():
        model.net[1].weight[0, 1:] = torch.tensor([.2, .15])
    learnt = adaround(model, quantize(model, spec, x), x).get_submodule('net.1').weight[0]
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
    low, high, _ = reconstruction._around(w, number_format(fmt), q.spec)
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
    find = lambda make: reconstruction._after(fold_batchnorm(model_of(make)),
                                      'net.0')(torch.tensor([-1., 3., 9.])).tolist()
    flat = lambda *o: lambda: nn.Sequential(nn.Conv2d(3, 2, 1), *o, nn.Flatten(), nn.LazyLinear(2))
    assert find(flat(nn.ReLU())) == [0, 3, 9]
    assert find(flat(nn.ReLU6())) == [0, 3, 6]
    assert find(flat(nn.Tanh())) == find(flat()) == [-1, 3, 9]
    two = fold_batchnorm(model_of(Ways))
    v = torch.tensor([-1., 9.])
    assert reconstruction._after(two, 'net.a')(v).tolist() == [0, 6]
    assert reconstruction._after(two, 'net.d')(v).tolist() == [0, 9]
    assert reconstruction._after(two, 'net.c')(v).tolist() == [-1, 9]


def test_formats_of_single_layers_are_followed():
    model, x = small(), images(24)
    q = quantize(model, 'INT8', x)
    with pytest.raises(ValueError, match='in net.9 .* of 480 weights'):
        correct_bias(model, keep_facts(q, layer_formats={'net.9': number_format('INT3')}), x)
    q.get_submodule('net.9').weight.copy_(quantize(model, 'INT3', x).get_submodule('net.9').weight)
    r = adaround(model, q, x, steps=30)
    assert all(len(w.unique()) <= 7 for w in r.get_submodule('net.9').weight)
    assert len(r.get_submodule('net.11').weight[0].unique()) > 7


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
    with pytest.raises(ValueError, match='`steps` must be a whole number, at least 0'):
        adaround(model, q, x, steps=-1)
    with pytest.raises(ValueError, match='`places` must be a whole number, at least 8; got 4'):
        adaround(model, q, x, places=4)
