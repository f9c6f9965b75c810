"Sensitivity in a few passes against the slow way, a pass for each tensor; the change of the answers"
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_quant import images, model_of, one_at_a_time, small, Ways
from robustnb.models.zoo import build_model
from robustnb.quant import sensitivity
from robustnb.quant.ptq import quantize
from robustnb.quant.sensitivity import layer_sensitivity, noise_ratio, output_change, RunningNoise


class Shared(nn.Module):
    "One layer called twice, another with the weights of a third, weights that a function takes, all in place"
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 4, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 1)
        self.second = nn.Conv2d(6, 6, 1)
        self.second.weight = self.first.weight
        self.kernel = nn.Parameter(torch.randn(6, 6, 1, 1)/3)
        self.head = nn.Parameter(torch.randn(5, 6)/2)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        x = F.relu(self.twice(self.twice(x)), inplace=True)
        y = self.first(x)
        y += x
        y = F.relu_(self.second(y))
        y = F.conv2d(y, self.kernel).mul_(.5)
        return F.linear(y.mean((2, 3)), self.head)


class Tokens(nn.Module):
    "Attention, of torch's module with the tokens first and of torch's function"
    def __init__(self, attention):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.attention = nn.MultiheadAttention(12, 3) if attention == 'module' else None
        self.qkv = nn.Linear(12, 36)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2)
        if self.attention is not None:
            x = x.permute(2, 0, 1)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.norm(x).mean(0))
        q, k, v = self.qkv(x.transpose(1, 2)).chunk(3, -1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v)).mean(1))


class Steps(nn.Module):
    "No gradient gets through the first part"
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, 2)
        self.b = nn.Linear(4, 3)

    def forward(self, x): return self.b((8*self.a(x)).round().mean((2, 3)))


networks = dict(small=small, ways=lambda: model_of(Ways), shared=lambda: model_of(Shared),
                tokens_first=lambda: model_of(lambda: Tokens('module')),
                attention=lambda: model_of(lambda: Tokens('function')))


@pytest.fixture
def never_alone(monkeypatch):
    "The estimate, for networks that are too small to need it"
    monkeypatch.setattr(sensitivity, '_passes', 0)


@pytest.mark.parametrize('name', networks)
def test_fine_roundings_arrive_as_if_each_was_rounded_alone(name, never_alone):
    model = networks[name]()
    x = images(6)
    q = quantize(model, 'INT12', x)
    found = layer_sensitivity(model, q, x, directions=10)
    slow = one_at_a_time(model, q, x)
    assert found.columns.tolist() == ['layer', 'kind', 'nsr', 'logit_noise']
    assert found[['layer', 'kind']].equals(slow[['layer', 'kind']])
    assert found.logit_noise.tolist() == pytest.approx(slow.logit_noise.tolist(), rel=.15)


def test_where_logits_are_linear_in_a_tensor_nothing_is_left_to_chance(never_alone):
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.Flatten(), nn.Linear(400, 6)))
    x = images(3)
    q = quantize(model, 'INT3', x)
    slow = one_at_a_time(model, q, x).logit_noise
    found = layer_sensitivity(model, q, x, directions=6)
    assert found.logit_noise.tolist() == pytest.approx(slow.tolist(), rel=1e-3)
    by_chance = layer_sensitivity(model, q, x, directions=1).logit_noise
    assert by_chance.tolist() != pytest.approx(slow.tolist(), rel=1e-3)
    tries = sum(layer_sensitivity(model, q, x, directions=1, seed=s).logit_noise for s in range(40))
    assert (tries/40).tolist() == pytest.approx(slow.tolist(), rel=.4)


@pytest.mark.parametrize('format', ('INT8', 'INT4', 'POT4'))
def test_the_order_of_the_layers_is_that_of_the_slow_way(format):
    model = build_model('ResNet_18', width=.0625)
    x = images(12)
    q = quantize(model, format, x)
    found = layer_sensitivity(model, q, x).logit_noise
    assert found.corr(one_at_a_time(model, q, x).logit_noise, method='spearman') > .95


def test_the_same_numbers_twice_and_nothing_is_changed(never_alone):
    model = small()
    x = images(4)
    q = quantize(model, 'INT6', x)
    before = {k: v.clone() for k, v in (model.state_dict() | q.state_dict()).items()}
    answers = q(x)
    a = layer_sensitivity(model, q, x, seed=3)
    assert a.equals(layer_sensitivity(model, q, x, seed=3))
    assert not a.equals(layer_sensitivity(model, q, x, seed=4))
    assert layer_sensitivity(model, q, x, 7).equals(layer_sensitivity(model, q, x, 99))
    assert all(torch.equal(v, before[k]) for k, v in (model.state_dict() | q.state_dict()).items())
    assert torch.equal(answers, q(x))


def test_what_no_gradient_reaches_is_rounded_alone(never_alone):
    model = model_of(Steps)
    x = images(5)
    q = quantize(model, 'INT5', x)
    found = layer_sensitivity(model, q, x).set_index(['layer', 'kind']).logit_noise
    slow = one_at_a_time(model, q, x).set_index(['layer', 'kind']).logit_noise
    first = slow.index[slow.index.get_level_values(0) != 'net.b'][:1]
    assert first.tolist() == [('net.a', 'weights')]
    assert found[first].tolist() == pytest.approx(slow[first].tolist(), rel=1e-5)
    assert (found > 0).all()


def test_logits_that_no_gradient_reaches_at_all(never_alone):
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Sign()))
    x = images(5)
    q = quantize(model, 'INT2', x)
    assert layer_sensitivity(model, q, x).logit_noise.tolist() == pytest.approx(
        one_at_a_time(model, q, x).logit_noise.tolist(), rel=1e-5)


class Sign(nn.Module):
    def forward(self, x): return (x > 0).float()


@pytest.mark.parametrize('name', networks)
def test_a_few_tensors_are_rounded_alone_where_first_order_errs(name, monkeypatch):
    model = networks[name]()
    x = images(6)
    q = quantize(model, 'INT3', x)
    slow = one_at_a_time(model, q, x)
    found = layer_sensitivity(model, q, x, directions=-(-len(slow)//3))
    assert found[['layer', 'kind']].equals(slow[['layer', 'kind']])
    assert found.logit_noise.tolist() == pytest.approx(slow.logit_noise.tolist(), rel=1e-3, abs=1e-6)
    monkeypatch.setattr(sensitivity, '_passes', 0)
    estimated = layer_sensitivity(model, q, x, directions=10).logit_noise
    assert estimated.tolist() != pytest.approx(slow.logit_noise.tolist(), rel=1e-3, abs=1e-6)


def test_a_copy_of_another_network_is_refused():
    q = quantize(small(), 'INT8', images(4))
    other = model_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)))
    with pytest.raises(ValueError, match='`quantized` must be a copy'):
        layer_sensitivity(other, q, images(4))
    with pytest.raises(ValueError, match='`directions` must be a whole number, at least 1; got 0'):
        layer_sensitivity(small(), q, images(4), directions=0)


@pytest.mark.parametrize('before, after', ((torch.zeros(3, 2), torch.zeros(4, 2)),
                                           (torch.zeros(3), torch.zeros(3))))
def test_logits_of_other_images_are_refused(before, after):
    with pytest.raises(ValueError, match='must be logits .* of the same images'):
        output_change(before, after)


def test_noise_is_counted_over_the_variance_and_a_constant_signal_divides_nothing():
    a = torch.tensor([1., 3.])
    assert noise_ratio(a, a+2) == 4
    assert noise_ratio(a, a) == 0
    assert noise_ratio(torch.ones(3), torch.ones(3)) == 0


def test_noise_in_parts_is_that_of_the_whole():
    a = 100 + torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    b = a.round()
    for sizes in ((5,), (1, 4), (2, 2, 1)):
        parts = RunningNoise()
        for one, other in zip(a.split(sizes), b.split(sizes)):
            parts.add(one, other)
        assert parts.ratio() == pytest.approx(noise_ratio(a, b), rel=1e-4)
    same = RunningNoise()
    same.add(torch.ones(3), torch.ones(3))
    assert same.ratio() == 0


def test_images_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r'pixels in \[0, 1\]'):
        layer_sensitivity(None, None, torch.full((1, 3, 8, 8), 2.))
