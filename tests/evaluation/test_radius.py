"""Radii against closed forms, finite differences and the attack that is exact; operator norms
against dense matrices, Fourier transforms and the kernel alone."""
import copy, math, random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustnb.attacks.gradient import fgsm
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.evaluation.robust_accuracy import plot_curve, quantized_attacks, robustness_curve
from robustnb.attacks.gradient import multi_attack, pgd
from robustnb.models.wrapping import Normalize, Normalized, wrap_model
from robustnb.models.zoo import build_model
from robustnb.models.graph import fold_batchnorm
from robustnb.quant.ptq import quantize
from robustnb.evaluation.radius import (
    first_order_radius, _largest_singular_value, radius_curve, spectral_norms)
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM

lengths = {Linf: lambda w: w.abs().sum(), L2: lambda w: w.square().sum().sqrt(),
           L1: lambda w: w.abs().max()}


def noise(*shape, seed=0): return torch.randn(*shape, generator=make_generator(seed, 'test'))
def pixels(n, *shape, seed=0):
    return torch.rand(n, *(shape or (3, 8, 8)), generator=make_generator(seed, 'pixels'))


def linear(k=5, shape=(3, 4, 4), seed=0):
    "A linear classifier whose rows have very different lengths"
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), k)).eval()
    with torch.no_grad():
        net[1].weight.copy_(noise(k, math.prod(shape), seed=seed)*torch.linspace(.2, 3, k)[:, None])
        net[1].bias.copy_(noise(k, seed=seed+1))
    return net


def smooth(k=4, seed=0):
    "A small network without kinks, in double precision"
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 3, stride=2),
                        nn.Softplus(), nn.Flatten(), nn.Linear(36, k)).double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(noise(*p.shape, seed=seed+i).double()*.4)
    return net


def slow_radius(net, x, y, family, others=None):
    "One image, one class, one number at a time; the gradient by central differences"
    out = []
    for xi, yi in zip(x, y):
        logits = net(xi[None])[0]
        ranked = [j for j in logits.argsort(descending=True).tolist() if j != yi]
        ratios = []
        for j in ranked[:others]:
            margin = lambda at: (net(at)[:, yi]-net(at)[:, j])
            step = torch.eye(xi.numel(), dtype=xi.dtype).view(-1, *xi.shape)*1e-4
            grad = (margin(xi+step)-margin(xi-step))/2e-4
            ratios.append((margin(xi[None])[0]/lengths[family](grad)).item())
        out.append(min(ratios))
    return torch.tensor(out, dtype=x.dtype)


@pytest.mark.parametrize('others', (1, 2, 9))
@pytest.mark.parametrize('family', (Linf, L2, L1))
@torch.no_grad()    # the radius turns gradients on for itself
def test_radius_is_margin_over_the_dual_norm(family, others):
    net = smooth()
    x = pixels(6, 3, 8, 8).double()
    y = net(x).argmax(1)
    y[:2] = (y[:2]+1) % 4
    got = first_order_radius(net, x, y, family, others=others)
    torch.testing.assert_close(got, slow_radius(net, x, y, family, others), rtol=1e-5, atol=1e-9)
    assert (got[:2] < 0).all()
    assert (got[2:] > 0).all()
    assert got.dtype == torch.float64


@pytest.mark.parametrize('family', (Linf, L2, L1))
def test_one_step_of_that_length_ends_on_the_boundary_of_a_linear_model(family):
    net = linear()
    x = .4+.2*pixels(30, 3, 4, 4)
    y = predict(net, x).argmax(1)
    radius = first_order_radius(net, x, y, family)
    w = net[1].weight.detach()
    logits = predict(net, x)
    reached = 0
    for xi, yi, r, l in zip(x, y, radius, logits):
        margins = []
        for j in range(5):
            if j == yi: continue
            step = family(1.).steepest(-(w[yi]-w[j]).view(1, 3, 4, 4))
            moved = predict_anywhere(net, xi[None]+r*step)[0]
            margins.append((moved[yi]-moved[j]).item())
        assert min(margins) == pytest.approx(
            0, abs=2e-4), 'the nearest class is reached, and no other is passed'
        reached += int(np.argmin(margins)) != [j for j in range(5) if j != yi].index(
            int(l.masked_fill(torch.arange(5) == yi, -9e9).argmax()))
    assert reached > 0, 'the nearest class is not always the runner-up'


@torch.no_grad()
def predict_anywhere(net, x): return net(x)


def test_a_threat_and_its_class_are_one_family_and_eps_does_not_matter():
    net = linear()
    x = pixels(5, 3, 4, 4)
    y = predict(net, x).argmax(1)
    assert torch.equal(first_order_radius(net, x, y, L2), first_order_radius(net, x, y, L2(.3)))
    assert torch.equal(first_order_radius(net, x, y), first_order_radius(net, x, y, Linf(0)))
    assert not torch.allclose(first_order_radius(net, x, y, L2), first_order_radius(net, x, y))


@pytest.mark.parametrize('k', (10, 11, 14))
def test_nine_others_are_all_of_ten_classes_and_the_likeliest_of_more(k):
    net = linear(k)
    x = .49+.02*pixels(40, 3, 4, 4)
    with torch.no_grad():          # the last class is the least likely and the nearest
        net[1].weight[-1] *= 400
        net[1].bias[-1] -= predict(net, x)[:, -1].max() - predict(net, x)[:, :-1].min() + 1
    y = predict(net, x).argmax(1)
    usual, all_of_them, nine = (first_order_radius(net, x, y, **o)
                                for o in ({}, dict(others=99), dict(others=9)))
    assert torch.equal(usual, nine)
    assert torch.equal(all_of_them, first_order_radius(net, x, y, others=k-1))
    assert (predict(net, x).argmin(1) == k-1).all()
    if k == 10:
        assert torch.equal(usual, all_of_them)
        assert (usual < .9*first_order_radius(net, x, y, others=8)).float().mean() > .2
    else:
        assert (all_of_them <= usual).all()
        assert (all_of_them < .9*usual).float().mean() > .2
    torch.testing.assert_close(usual, slow_radius(net.double(), x.double(), y, Linf, 9).float(),
                               rtol=1e-3, atol=1e-6)


def test_nothing_is_left_behind():
    net = build_model('ResNet_18', width=.07)
    x = pixels(7, 3, 32, 32)
    y = torch.arange(7)
    before = copy.deepcopy(net.state_dict())
    state = (random.getstate(), torch.get_rng_state())
    flags = [p.requires_grad for p in net.parameters()]
    whole = first_order_radius(net, x, y)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not x.requires_grad
    assert not whole.requires_grad
    with torch.no_grad():
        again = first_order_radius(net, x, y, batch_size=3)
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('family', (Linf, L2, L1))
def test_box_leaves_out_what_would_leave_it(family):
    net = linear()
    x = pixels(30, 3, 4, 4).mul(3).sub(1).clamp(0, 1)
    assert .5 < ((x == 0) | (x == 1)).float().mean() < .8
    y = predict(net, x).argmax(1)
    y[:10] = (y[:10]+1) % 5
    w = net[1].weight.detach()
    logits = predict(net, x)
    expected = []
    for xi, yi, l in zip(x, y, logits):
        ratios = []
        for j in range(5):
            if j == yi: continue
            m = l[yi]-l[j]
            kept = []
            for g, v in zip((w[yi]-w[j]).tolist(), xi.flatten().tolist()):
                falls = (g > 0) == (m > 0).item()
                kept.append(g if (v > 0 if falls else v < 1) else 0.)
            ratios.append((m/lengths[family](torch.tensor(kept))).item())
        expected.append(min(ratios))
    torch.testing.assert_close(first_order_radius(net, x, y, family, box=True),
                               torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert (first_order_radius(net, x, y, family, box=True).abs() >= first_order_radius(
        net, x, y, family).abs()-1e-6)[10:].all()


def test_zero_gradients_and_ties():
    net = linear(3)
    nn.init.zeros_(net[1].weight)
    net[1].bias.data = torch.tensor([1., 0, 1])
    x = pixels(3, 3, 4, 4)
    assert first_order_radius(net, x, torch.tensor([0, 1, 2])).tolist() == [0, -math.inf, 0]
    net[1].bias.data = torch.tensor([1., 0, 0])
    assert first_order_radius(
        net, x, torch.tensor([0, 0, 1])).tolist() == [math.inf, math.inf, -math.inf]


def test_rows_are_those_of_an_exact_attack():
    "Two classes and a linear model: one signed gradient step is the worst case at every budget"
    net = linear(2)
    x = .3+.4*pixels(60, 3, 4, 4)
    with torch.no_grad():
        net[1].weight.mul_(.3)
    y = predict(net, x).argmax(1)
    y[::6] = 1-y[::6]
    threats = [Linf(e) for e in (.001, .005, .01, .05, .2)]
    attacked = robustness_curve(net, x, y, fgsm, threats)
    estimated = radius_curve(first_order_radius(net, x, y), y, threats)
    both = attacked.merge(estimated, on=['image', 'eps', 'threat', 'label'],
                          suffixes=('', '_estimated'))
    assert len(both) == len(attacked) == len(estimated) == 60*6
    assert (both.correct == both.correct_estimated).all()
    shares = estimated.groupby('eps').correct.mean()
    assert shares.is_monotonic_decreasing
    assert shares.nunique() >= 4
    assert shares.loc[0] == 50/60
    assert estimated.attack.tolist() == ['clean']*60 + ['first order']*300
    assert estimated.threat[0] == 'none'
    assert estimated.radius[:60].tolist() == first_order_radius(net, x, y).tolist()
    assert estimated.correct.dtype == bool
    for by in (None, 'by'):
        plot_curve(estimated.assign(by='radius'), by)


def test_a_quantised_copy_passes_its_gradient():
    net = wrap_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), (.5,)*3, (.25,)*3)
    x = pixels(20, 3, 4, 4)
    with torch.no_grad():
        net.net[1].weight.copy_(noise(4, 48))
    y = predict(net, x).argmax(1)
    fine, coarse, original = (first_order_radius(m, x, y)
                              for m in (quantize(net, 'INT12', x), quantize(net, 'INT2', x), net))
    assert (fine/original-1).abs().median() < .02
    assert (coarse/original-1).abs().median() > .02
    assert coarse.isfinite().all()


def test_worst_of_three_roads_over_a_curve():
    """The composition that the notebook shows: an image falls if any of the three attacks finds it,
    at this budget or a smaller one"""
    net = build_model('AlexNet_BN', width=.05)
    x = pixels(10, 3, 32, 32)
    q = quantize(net, 'INT4', x)
    y = predict(q, x).argmax(1)
    threats = [Linf(k/255) for k in (.25, .5, 1, 2, 4, 8)]
    roads = quantized_attacks(net, partial(pgd, steps=3), queries=10)
    rows = robustness_curve(q, x, y, multi_attack(*roads.values()), threats)
    again = robustness_curve(
        q, x, y, multi_attack(*quantized_attacks(net, partial(pgd, steps=3), queries=10).values()),
        threats)
    pd.testing.assert_frame_equal(*(o.drop(columns='seconds') for o in (rows, again)))
    alone = {k: robustness_curve(q, x, y, a, threats).groupby('eps').correct.mean()
             for k, a in roads.items()}
    together = rows.groupby('eps').correct.mean()
    assert together.is_monotonic_decreasing
    assert together.loc[0] == 1
    assert len(together) == 7
    assert (together-pd.DataFrame(alone).min(axis=1)).max() <= .1, (
        'at most the starting point of one image makes a difference')


class Detached(nn.Module):
    def forward(self, x): return x.mean((2, 3)).detach()


class Infinite(nn.Module):
    "Finite logits for the first image, infinite ones for bright images"
    def forward(self, x):
        return x.mean((2, 3))*torch.where(x.mean((1, 2, 3)) > .5, torch.inf, 1.)[:, None]


class Steep(nn.Module):
    "A gradient that is infinite where a pixel is zero"
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def forward(self, x):
        return torch.stack([x.flatten(1).sqrt().sum(1)*self.factor+2, x.flatten(1).sum(1)*0], 1)


def test_errors_say_what_to_do():
    net = linear()
    x = pixels(4, 3, 4, 4)
    y = torch.zeros(4, dtype=torch.int64)
    for threat in ('Linf', SSIM(.1), SSIM, 3, None):
        with pytest.raises(ValueError, match='Linf, L2 or L1'):
            first_order_radius(net, x, y, threat)
    for others in (0, 2.):
        with pytest.raises((ValueError, TypeError), match=f'`others` must .* got {others}'):
            first_order_radius(net, x, y, others=others)
    with pytest.raises(ValueError, match='straight-through'):
        first_order_radius(Detached().eval(), x, y)
    with pytest.raises(ValueError, match='finite logits'):
        first_order_radius(Infinite().eval(), torch.stack([x[0]*.1, x[0]*0+.9]), y[:2])
    for factor in (0, 1):      # NaN, infinity
        with pytest.raises(ValueError, match='finite gradient'):
            first_order_radius(Steep(factor).eval(), torch.zeros(1, 3, 4, 4), y[:1])
    with pytest.raises(ValueError, match='evaluation mode'):
        first_order_radius(linear().train(), x, y)
    with pytest.raises(ValueError, match='pixels in'):
        first_order_radius(net, x*3, y)
    with pytest.raises(ValueError, match='one label per image'):
        first_order_radius(net, x, y[:3])
    with pytest.raises(ValueError, match=r'class numbers in \[0, 5\)'):
        first_order_radius(net, x, y+5)
    with pytest.raises(TypeError, match='torch.nn.Module'):
        first_order_radius(lambda x: x, x, y)
    r = torch.ones(4)
    for threats in ([], [Linf(.1), L2(.1)]):
        with pytest.raises(ValueError, match='one family'):
            radius_curve(r, y, threats)
    with pytest.raises(ValueError, match='Linf, L2 or L1'):
        radius_curve(r, y, [SSIM(.1)])
    with pytest.raises(ValueError, match='one value per image'):
        radius_curve(r[:3], y, [Linf(.1)])


# operator norms

def dense(layer, shape):
    "Largest singular value of the matrix of a layer, column by column"
    eye = torch.eye(math.prod(shape)).view(-1, *shape).to(next(layer.parameters()).dtype)
    with torch.no_grad():
        columns = torch.cat(
            [layer(e[None])-layer(torch.zeros_like(e[None])) for e in eye]).flatten(1)
    return torch.linalg.svdvals(columns.double())[0].item()


def filled(layer, seed=0):
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(noise(*p.shape, seed=seed+i)*2)
    return layer.eval()


convolutions = dict(valid=dict(), same=dict(padding=1), strided=dict(stride=2, padding=1),
                    uneven=dict(stride=(1, 2), padding=(2, 0)), by_name=dict(padding='same'),
                    groups=dict(groups=2, padding=1), depthwise=dict(groups=4),
                    dilated=dict(dilation=2, padding=1),
                    circular=dict(padding=1, padding_mode='circular'),
                    reflected=dict(padding=1, padding_mode='reflect'), apart=dict(stride=3))


@pytest.mark.parametrize('how', convolutions)
def test_norm_is_that_of_the_dense_matrix(how):
    layer = filled(nn.Conv2d(4, 6 if 'groups' not in convolutions[how] else 8, 3,
                             **convolutions[how]))
    shape = (4, 7, 6)
    row = spectral_norms(nn.Sequential(layer).eval(), shape).iloc[0]
    assert row.norm == pytest.approx(dense(layer, shape), rel=1e-4)
    assert row.kind == 'conv'
    assert row.in_shape == shape
    assert row.out_shape == tuple(layer(torch.zeros(1, *shape)).shape[1:])
    flattened = torch.linalg.svdvals(layer.weight.flatten(1))[0].item()
    if how == 'apart':
        assert row.norm == pytest.approx(
            flattened, rel=1e-4), 'kernels that do not overlap are the one case where both agree'
    else:
        assert abs(row.norm/flattened-1) > .05, 'the flattened kernel is something else'


def test_norms_of_other_layers():
    for layer, shape in ((nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 4, 5)),
                         (nn.ConvTranspose2d(4, 4, 2, groups=2, stride=2), (4, 4, 4)),
                         (nn.Conv1d(3, 4, 3), (3, 9)), (nn.Conv3d(2, 3, 2), (2, 4, 3, 3))):
        assert spectral_norms(nn.Sequential(filled(layer)).eval(),
                              shape).norm[0] == pytest.approx(dense(layer, shape), rel=1e-4)
    tokens = filled(nn.Linear(5, 7))
    assert spectral_norms(nn.Sequential(tokens).eval(),
                          (6, 5)).norm[0] == pytest.approx(dense(tokens, (6, 5)), rel=1e-5)
    point = filled(nn.Conv2d(5, 7, 1))
    assert spectral_norms(nn.Sequential(point).eval(), (5, 4, 4)).norm[0] == pytest.approx(
        torch.linalg.svdvals(point.weight.detach().flatten(1))[0].item(), rel=1e-4)


def test_periodic_convolution_has_the_peak_of_its_transfer_function():
    "Singular values of a circular convolution are the moduli of the Fourier transform of its kernel"
    layer = filled(nn.Conv2d(1, 1, 3, padding=1, padding_mode='circular'))
    peak = torch.fft.fft2(F.pad(layer.weight.detach()[0, 0], (0, 13, 0, 13))).abs().max().item()
    assert spectral_norms(nn.Sequential(layer).eval(), (1, 16, 16),
                          steps=80).norm[0] == pytest.approx(peak, rel=1e-4)


def test_identity_zero_and_an_average():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    for weight, norm in ((torch.eye(3)[:, :, None, None], 1), (torch.zeros(3, 3, 1, 1), 0),
                         (torch.ones(3, 3, 1, 1)/3, 1), (-2*torch.eye(3)[:, :, None, None], 2)):
        conv.weight.data = weight.contiguous()
        table = spectral_norms(nn.Sequential(conv).eval(), (3, 5, 5))
        assert table.norm[0] == pytest.approx(norm, abs=1e-6)
        assert table.log10_product[0] == -math.inf if norm == 0 else True


def test_more_steps_come_nearer_and_never_pass():
    layer = filled(nn.Conv2d(2, 3, 3, padding=1))
    shape = (2, 10, 10)
    exact = dense(layer, shape)
    found = [spectral_norms(nn.Sequential(layer).eval(), shape, steps=k).norm[0]
             for k in (1, 2, 4, 8, 16, 300)]
    assert all(b >= a-1e-5 for a, b in zip(found, found[1:]))
    assert found[0] < .8*exact
    assert found[-1] == pytest.approx(exact, rel=1e-5)
    assert max(found) <= exact*(1+1e-5)
    v = noise(1, *shape, seed=9)
    for _ in range(8):
        v = F.conv_transpose2d(F.conv2d(v, layer.weight, padding=1), layer.weight,
                               padding=1).detach()
        v /= v.norm()
    power = F.conv2d(v, layer.weight, padding=1).norm().item()
    assert _largest_singular_value(lambda u: F.conv2d(u, layer.weight, padding=1),
                                   noise(1, *shape, seed=9), 9) > power


def chain():
    "Batch norm that folds, batch norm that does not, a layer that is called twice"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre = nn.BatchNorm2d(3)
            self.a = nn.Conv2d(3, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4)
            self.twice = nn.Conv2d(4, 4, 3, padding=1)
            self.out = nn.Linear(4, 5)
        def forward(self, x):
            return self.out(self.twice(
                self.twice(self.bn(self.a(F.relu(self.pre(x)))).relu()).relu()).mean((2, 3)))
    net = filled(Net())
    for bn in (net.pre, net.bn):
        bn.running_var.copy_(torch.linspace(.5, 4, bn.num_features)), bn.running_mean.fill_(.3)
    return wrap_model(net, (.5,)*3, (.25, .2, .5))


def test_rows_follow_the_calls():
    model = chain()
    before = copy.deepcopy(model.state_dict())
    table = spectral_norms(model, (3, 6, 6))
    assert table.name.tolist() == ['normalize', 'net.pre', 'net.a', 'net.twice', 'net.twice',
                                   'net.out']
    assert table.kind.tolist() == ['normalize', 'bn', 'conv', 'conv', 'conv', 'linear']
    assert list(table) == ['name', 'kind', 'in_shape', 'out_shape', 'norm', 'log10_product']
    assert table.norm[0] == pytest.approx(5)
    assert table.norm[1] == pytest.approx(
        (model.net.pre.weight.abs()/(torch.tensor([.5, 2.25, 4])+1e-5).sqrt()).max().item())
    folded = fold_batchnorm(model)
    assert table.norm[2] == pytest.approx(dense(folded.net.a, (3, 6, 6)), rel=1e-4)
    assert table.norm[2] != pytest.approx(dense(model.net.a, (3, 6, 6)), rel=1e-2)
    assert table.norm[3] == pytest.approx(table.norm[4], rel=1e-3)
    assert table.log10_product.to_numpy() == pytest.approx(np.log10(table.norm).cumsum())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.tensor(spectral_norms(model, (3, 6, 6), seed=0).norm.to_numpy()),
                       torch.tensor(table.norm.to_numpy()))
    assert (spectral_norms(model, (3, 6, 6), steps=3,
                           seed=1).norm != spectral_norms(model, (3, 6, 6), steps=3).norm).any()


def test_a_model_that_cannot_be_traced_shows_its_batch_norm():
    class Branches(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, x): return self.inner(x) if x.sum() > -1 else x
    model = Branches(chain()).eval()
    table = spectral_norms(model, (3, 6, 6))
    assert table.kind.tolist() == ['normalize', 'bn', 'conv', 'bn', 'conv', 'conv', 'linear']
    assert table.norm[2] == pytest.approx(dense(model.inner.net.a, (3, 6, 6)), rel=1e-4)


def test_a_plain_chain_stretches_less_than_the_product():
    net = wrap_model(filled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
                                          nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(),
                                          nn.Flatten(), nn.Linear(12, 4))),
                     (.5,)*3, (.25,)*3)
    product = 10**spectral_norms(net, (3, 6, 6), steps=200).log10_product.iloc[-1]
    slopes = [torch.linalg.matrix_norm(
        torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x).flatten(1),
        2).item() for x in pixels(10, 3, 6, 6)]
    assert max(slopes) < product
    assert min(slopes) > product/1e4


def test_a_quantised_copy_has_the_norms_of_its_rounded_weights():
    model = chain()
    x = pixels(8, 3, 6, 6)
    q = quantize(model, 'INT3', x)
    table = spectral_norms(q, (3, 6, 6))
    original = spectral_norms(model, (3, 6, 6))
    assert table.name.tolist() == original.name.tolist()
    assert table.norm[2] == pytest.approx(dense(q.net.a, (3, 6, 6)), rel=1e-4)
    assert abs(table.norm[2]/original.norm[2]-1) > 1e-3
    assert not any(m._forward_hooks for m in q.modules())


def test_norms_of_unusable_models():
    with pytest.raises(ValueError, match='steps'):
        spectral_norms(chain(), (3, 6, 6), steps=0)
    with pytest.raises(ValueError, match='evaluation mode'):
        spectral_norms(chain().train(), (3, 6, 6))
    broken = chain()
    broken.net.out.weight.data[1, 1] = torch.inf
    with pytest.raises(ValueError, match='net.out holds NaN or infinity'):
        spectral_norms(broken, (3, 6, 6))
    failing = wrap_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(9, 2)),
                         (.5,)*3, (.25,)*3)
    with pytest.raises(RuntimeError):
        spectral_norms(failing, (3, 6, 6))
    no_statistics = nn.Sequential(nn.Conv2d(3, 4, 3),
                                  nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert spectral_norms(no_statistics, (3, 6, 6)).kind.tolist() == ['conv']
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=False, eps=0)).eval()
    plain[0].running_var.fill_(.25)
    assert spectral_norms(plain, (3, 6, 6)).norm[0] == pytest.approx(2)
    assert len(spectral_norms(nn.Sequential(nn.ReLU()).eval(), (3, 6, 6))) == 0
