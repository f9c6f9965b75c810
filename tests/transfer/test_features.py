"Predictors from weights: a network whose noise is known by hand, and shares that are computed another way"
import numpy as np
import pytest
import torch
from torch import nn

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.models.zoo import build_model
from robustnb.transfer.features import noise_sum, relative_margin, softmax_js
from robustnb.quant.ptq import quantize
from robustnb.transfer.study import Probes, Study
from robustnb.attacks.threat_models import Linf

x = torch.rand(12, 3, 8, 8, generator=make_generator(0, 'x'))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def test_the_sum_is_that_of_the_layers():
    net = two_layers()
    q = quantize(net, 'INT4', x)
    by_hand = sum(((q.get_parameter(f'{k}.weight')-net[k].weight)**2).sum()/(net[k].weight**2).sum()
                  for k in (0, 3)).item()
    rounders = {n: m for n, m in q.named_modules() if n.startswith('round_')}
    assert len(rounders) == 2
    inside = x
    first = (rounders['round_x' if 'round_x' in rounders else 'round_input_1']
             if len(rounders) == 2 else None)
    given = first(inside)
    hidden = q.get_submodule('0')(given).relu()
    second = next(m for m in rounders.values() if m is not first)
    ratio = lambda a, b: ((b-a)**2).mean().item()/a.var(correction=0).item()
    found = noise_sum(net, q, x)
    assert found['weights'] == pytest.approx(by_hand, rel=1e-5)
    assert found['activations'] == pytest.approx(
        ratio(inside, given) + ratio(hidden, second(hidden)), rel=1e-4)


def test_nothing_stays_behind_and_bad_images_are_refused():
    net = two_layers()
    q = quantize(net, 'INT4', x)
    hooks = lambda: sum(len(m._forward_hooks) for m in q.modules())
    noise_sum(net, q, x)
    assert hooks() == 0
    with pytest.raises(Exception):
        noise_sum(net, q, x[:, :2])
    assert hooks() == 0
    with pytest.raises(ValueError, match='pixels in'):
        noise_sum(net, q, x*float('nan'))


def test_softmax_js_by_scipy_and_its_weights():
    from scipy.spatial.distance import jensenshannon
    from scipy.special import softmax
    net = two_layers()
    q = quantize(net, 'INT3', x)
    each = []
    for k in (0, 3):
        a = net[k].weight.detach().double().numpy()
        b = q.get_parameter(f'{k}.weight').detach().double().numpy()
        each.append(np.nansum(jensenshannon(softmax(a, 1), softmax(b, 1), axis=1)**2))
    macs = np.array([36*4*27, 144*5])
    params = np.array([4*27, 144*5])
    found = softmax_js(net, q, (3, 8, 8))
    assert found['flops'] == pytest.approx((each*macs).sum()/macs.sum(), rel=1e-6)
    assert found['params'] == pytest.approx((each*params).sum()/params.sum(), rel=1e-6)


def test_batch_norm_is_folded_before_the_comparison():
    net = build_model('ResNet_18', width=.1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.fill_(.25)
            m.weight.data.fill_(2.)
    q = quantize(net, 'INT16', torch.rand(4, 3, 32, 32))
    assert noise_sum(net, q, torch.rand(4, 3, 32, 32))['weights'] < 1e-6
    assert softmax_js(net, q)['flops'] < 1e-7


def test_the_margin_is_that_of_numpy():
    logits = torch.randn(40, 7, generator=make_generator(1))
    ranked = np.sort(logits.double().numpy(), 1)
    assert relative_margin(logits) == pytest.approx(
        (ranked[:, -1]-ranked[:, -2]).mean()/ranked.std(), rel=1e-12)
    assert relative_margin(7*logits + 3) == pytest.approx(relative_margin(logits), rel=1e-5)
    assert relative_margin(torch.zeros(3, 2)) == 1e-3


def test_a_report_puts_noise_over_the_margin():
    net = two_layers()
    q = quantize(net, 'INT4', x)
    def stay(model, x, y, threat, generator=None): return x
    found = Study(net, Probes.of(x), (Linf(1/255),), attack=stay).change('INT4')[0]
    noise = noise_sum(net, q, x)
    margin = relative_margin(predict(net, x))
    assert margin != pytest.approx(1, abs=.05)
    assert found['noise'] == pytest.approx((noise['weights']+noise['activations'])/margin)
    assert found['activation_noise'] == pytest.approx(noise['activations']/2/margin)
