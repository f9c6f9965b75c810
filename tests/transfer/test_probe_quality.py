"""Generated against real images: budgets, features, compositions, what an adjustment aims at, and
that no label is ever asked for."""
import inspect
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr, wasserstein_distance
from torch import nn

from robustnb.transfer import probe_quality as Q
from robustnb.attacks.gradient import margin, pgd
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.data import ImageSet
from robustnb.transfer.generator import bn_distance, bn_inputs, draw_targets, generate, Generator
from robustnb.models.wrapping import batchnorms, last_linear
from robustnb.models.zoo import build_model
from robustnb.transfer.probe_quality import (
    adjust, compose, effective_rank, feature_pca, features, generator_quality, optimize_images,
    plot_features, plot_sources, prediction_error, Composition, is_robust)
from robustnb.attacks.threat_models import Linf
from helpers_transfer import settled


class Painter(Generator):
    "Says what it was asked for: the pixels of row k hold the weight of class k"
    def __init__(self, k=4, strength=.5):
        super().__init__(torch.randn(k, 8, generator=make_generator(0)), torch.full((3,), .5),
                         torch.ones(3), size=k, width=4)
        self.strength = strength
    def forward(self, targets, noise):
        return targets.view(-1, 1, targets.shape[1],
                            1).expand(-1, 3, -1, targets.shape[1])*self.strength + .25


class Reader(nn.Module):
    "The classifier that reads such an image: logit k is ten times the mean of row k"
    def __init__(self, k=4, scale=10.):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.last = nn.Linear(k, k, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(k))
    def forward(self, x): return self.last(self.scale*x.mean((1, 3)))


@pytest.fixture(scope='module')
def pair(): return Painter().eval(), Reader().eval()


@pytest.fixture(scope='module')
def small():
    model = build_model('ResNet_18', width=.0625, n_classes=4)
    return settled(model, 16), model


def test_survivors_of_a_linear_model_and_their_order(pair):
    _, model = pair
    x = .3 + .4*torch.rand(300, 3, 4, 4, generator=make_generator(1))
    y = predict(model, x).argmax(1)
    y[:30] = (y[:30]+1) % 4
    eps = (.002, .01, .03)
    kept = is_robust(model, x, y, eps, steps=10)
    gap = -margin(predict(model, x), y)
    assert torch.equal(kept[0], gap >= 0)
    assert kept[0].sum() == 270
    for e, row in zip(eps, kept[1:]):
        assert torch.equal(row, gap > 20*e), 'one row rises, another falls'
    assert (kept.float().diff(dim=0) <= 0).all()
    assert torch.equal(is_robust(model, x, y, ()), kept[:1])
    for bad in ((.1, .1), (0., .1), (float('nan'),)):
        with pytest.raises(ValueError, match='positive and grow'):
            is_robust(model, x, y, bad)


def test_survivors_withstand_both_losses(small):
    _, model = small
    x = torch.rand(40, 3, 16, 16, generator=make_generator(2))
    y = predict(model, x).argmax(1)
    kept = is_robust(model, x, y, (1/255, 4/255), steps=5)
    alone = predict(model, pgd(model, x, y, Linf(1/255), make_generator(0, 'survivors', 1/255),
                               steps=5)).argmax(1) == y
    assert not (kept[1] & ~alone).any()
    assert kept[2].sum() < kept[1].sum() < 40
    assert torch.equal(is_robust(model, x[:7], y[:7], (1/255,), steps=5)[1], is_robust(
        model, x, y, (1/255,), steps=5)[1][:7]), 'an image does not know its batch'


def test_a_classifier_too_sure_for_the_cross_entropy_falls_to_the_margin():
    model = Reader(scale=1e5).eval()
    x = .3 + .4*torch.rand(50, 3, 4, 4, generator=make_generator(1))
    y = predict(model, x).argmax(1)
    gap = -margin(predict(model, x), y)
    assert gap.median() > 500, 'its softmax is one exactly'
    assert torch.equal(is_robust(model, x, y, (.01,))[1], gap > 2e5*.01)


@pytest.mark.parametrize('name', ('Inception_BN', 'AlexNet', 'MobileNetV2'))
def test_features_are_what_makes_the_logits(name):
    model = build_model(name, width=.0625, n_classes=7)
    x = torch.rand(3, 3, 32, 32, generator=make_generator(0))
    f = features(model, x)
    last = last_linear(model)
    assert torch.allclose(f @ last.weight.detach().flatten(1).T + last.bias.detach(),
                          predict(model, x), atol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_effective_rank():
    g = make_generator(0)
    assert effective_rank(torch.randn(4000, 6, generator=g)) == pytest.approx(6, abs=.05)
    assert effective_rank(torch.randn(50, 1, generator=g) @ torch.randn(1, 9, generator=g)
                          + 100) == pytest.approx(1, abs=1e-4)
    f = torch.randn(4000, 2, generator=g)*torch.tensor([3., 1.])
    assert effective_rank(f) == pytest.approx(np.exp(-.9*np.log(.9)-.1*np.log(.1)), abs=.02)
    assert effective_rank(7*f+3) == pytest.approx(effective_rank(f), rel=1e-4)
    assert effective_rank(torch.ones(
        5, 3)) == effective_rank(f[:1]) == effective_rank(torch.zeros(4, 2)) == 0


@pytest.mark.parametrize('bad', (dict(boundary=.7, adversarial=.4), dict(boundary=-.1),
                                 dict(adversarial=-.1), dict(boundary=float('nan')),
                                 dict(adversarial=float('nan'))))
def test_shares_are_shares(bad):
    with pytest.raises(ValueError, match='shares that sum to at most 1'):
        Composition(**bad)


def test_composition_counts_and_pushes(small):
    g, model = small
    shares = Composition(.25, .5, spread=.2, push=2/255)
    x, t = compose(g, model, 40, shares, seed=3)
    plain, same = generate(g, 40, .25, seed=3, spread=.2)
    assert torch.equal(t, same)
    far = (x-plain).abs().flatten(1).amax(1)
    between = (t > 0).sum(1) == 2
    assert between.sum() == 10
    assert (far > 0).sum() == 20
    assert not (far[between] > 0).any()
    assert far.max() <= 2/255+1e-6 < far.max()*1.2
    assert t[between].amax(1).max() < .75
    moved = far > 0
    y = t.argmax(1)
    assert (-margin(predict(model, x[moved]),
                    y[moved])).mean() < (-margin(predict(model, plain[moved]), y[moved])).mean()
    assert torch.equal(compose(g, model, 40, shares, seed=3)[0], x)
    assert not torch.equal(compose(g, model, 40, shares, seed=4)[0], x)
    assert torch.equal(compose(g, model, 40)[0], generate(g, 40, .5)[0])
    all_pushed = compose(g, model, 40, Composition(0., 1.))[0]
    assert (all_pushed != generate(g, 40, 0.)[0]).flatten(1).any(1).all()


def test_best_shares_are_those_of_least_squares():
    s = torch.tensor([1., 1., 0.])
    b = torch.tensor([.5, .2, 0.])
    a = torch.tensor([.7, 0., 0.])
    assert Q._solve(s, b, a, .3*b+.2*a+.5*s) == (.3, .2)
    assert Q._solve(s, b, a, s) == (0., 0.)
    assert Q._solve(s, b, a, b) == (1., 0.)
    assert Q._solve(s, b, a, a) == (0., 1.)
    assert Q._solve(s, s, s, a) == (0., 0.), 'nothing helps: leave the images as they are'
    x, y = Q._solve(s, b, a, torch.tensor([0., 0., 0.]))
    assert x+y <= 1 and (x, y) == (.53, .47) or abs(x+y-1) < 1e-9


def test_unlabelled_images_are_matched_in_their_margins(pair):
    g, model = pair
    real = compose(g, model, 400, Composition(.6, 0., spread=.5), seed=9)[0]
    noise = torch.rand(1000, 3, 4, 4, generator=make_generator(0))
    assert torch.allclose(Q._statistic(model, noise, 1/255, 0)[1], torch.arange(1, 10)/10,
                          atol=2e-3), 'deciles'
    shares, history = adjust(g, model, real, n=300, rounds=8)
    assert shares.boundary == pytest.approx(.6, abs=.1)
    assert shares.adversarial < .1
    assert shares.spread in (.25, .5, 1.)
    kept = history[history.kept]
    assert (kept.miss.diff().dropna() < 0).all()
    assert len(history) <= 8
    assert kept.iloc[-1].spread == shares.spread
    assert history.miss.min() >= kept.miss.iloc[-1] - 1e-3
    assert kept.miss.iloc[-1] < .06
    assert list(history['round']) == list(range(1, len(history)+1))
    again = adjust(g, model, real, n=300, rounds=8)
    other = adjust(g, model, real, n=300, rounds=8, seed=1)
    assert again[0] == shares
    assert again[1].equals(history)
    assert not other[1].equals(history)


@pytest.mark.parametrize('rounds', (1, 2, 3))
def test_rounds_are_bounded(pair, rounds):
    g, model = pair
    real = torch.full((50, 3, 4, 4), .5) + .001*torch.rand(50, 3, 4, 4, generator=make_generator(0))
    shares, history = adjust(g, model, real, rounds=rounds, n=60)
    assert len(history) == rounds
    assert history.kept.iloc[0]


def test_the_strength_grows_until_the_target_is_reached(pair):
    g, model = pair
    real = compose(g, model, 400, Composition(1., 0., spread=.1), seed=9)[0]
    shares, history = adjust(g, model, real, n=200, rounds=10)
    assert shares.spread <= .125
    assert shares.boundary > .7
    assert history.spread.iloc[0] == 1
    assert history.miss[history.kept].iloc[-1] < .3*history.miss.iloc[0]


def test_two_accuracies_are_reached(pair):
    g, model = pair
    shares, history = adjust(g, model, (1., .7), eps=.05, rounds=3, n=200)
    best = history[history.kept].iloc[-1]
    assert best.accuracy == 1
    assert best.robust == pytest.approx(.7, abs=.06)
    assert shares.boundary > .3
    assert best.miss == pytest.approx((((best.accuracy-1)**2+(best.robust-.7)**2)/2)**.5, abs=1e-5)
    easier, _ = adjust(g, model, (1., .7), eps=.02, rounds=1, n=200)
    assert easier.boundary > shares.boundary, (
        'fewer fall at a smaller budget, so more of them are wanted')


def test_a_push_is_lengthened_where_nothing_else_makes_the_classifier_err(pair):
    shares, history = adjust(Painter(strength=3/255).eval(), pair[1], (.8, .8), eps=.0002,
                             rounds=6, n=100)
    assert shares.push == 2/255, 'an image falls at 1.5 grey levels'
    assert shares.adversarial == pytest.approx(.2, abs=.02), 'an image falls at 1.5 grey levels'
    assert history.accuracy.iloc[0] == 1
    assert history[history.kept].accuracy.iloc[-1] == pytest.approx(.8, abs=.02)


def test_batch_norm_is_a_target_of_its_own(small):
    g, model = small
    value, wanted = Q._statistic(model, None, 1/255, 0)
    bns = [bn for _, bn in batchnorms(model)]
    for bn in bns:
        (bn.running_var.uniform_(.3, 3, generator=make_generator(7)),
         bn.running_mean.uniform_(-.3, .3, generator=make_generator(8)))
    x = torch.rand(50, 3, 16, 16, generator=make_generator(0))
    with torch.no_grad(), bn_inputs(model) as seen:
        model(x)
    slow = []
    for bn, o in seen:
        m = bn.running_mean.view(1, -1, 1, 1)
        s = bn.running_var.sqrt().view(1, -1, 1, 1)
        z = (o-m)/s
        slow += [z.mean((0, 2, 3))/len(bn.running_mean)**.5,
                 (z**2).mean((0, 2, 3))/len(bn.running_mean)**.5]
    assert torch.allclose(value(x, None), torch.cat(slow), atol=1e-2)
    assert len(wanted) == len(torch.cat(slow)) == 2*sum(len(b.running_mean) for b in bns)
    assert torch.allclose(value(x[:25], None)/2 + value(x[25:], None)/2, value(x, None),
                          atol=1e-4), 'linear in the shares'
    big = torch.cat([x, x, x[:30]])
    assert torch.allclose(value(big, None), (100*value(x, None)+30*value(x[:30], None))/130,
                          atol=1e-4), 'batches of unequal size'
    assert wanted.count_nonzero() == len(wanted)//2
    shares, history = adjust(g, model, rounds=2, n=40)
    assert len(history) == 2
    assert 'accuracy' not in history


def test_what_is_not_a_target(pair):
    g, model = pair
    labelled = ImageSet(np.zeros((4, 4, 4, 3), np.uint8), np.arange(4), 4)
    with pytest.raises(TypeError, match='give `.x`'):
        adjust(g, model, labelled)
    with pytest.raises(TypeError, match='got tuple'):
        adjust(g, model, (labelled.x, 1))
    for bad in ((.5, .6), (1.1, .5), (.9, float('nan')), (.9, -.1)):
        with pytest.raises(ValueError, match='0 <= robust <= clean <= 1'):
            adjust(g, model, bad)
    with pytest.raises(ValueError, match='without batch norm'):
        adjust(g, model)
    with pytest.raises(ValueError, match='`rounds` must be a whole number, at least 1; got 0'):
        adjust(g, model, (.9, .5), rounds=0)
    with pytest.raises(ValueError, match='`target` must hold pixels'):
        adjust(g, model, 255*labelled.x+2)
    with pytest.raises(ValueError, match='model.eval'):
        adjust(g, Reader().train(), (.9, .5))
    assert not any('y' == k or 'label' in k or 'test' in k
                   for k in inspect.signature(adjust).parameters)


def test_quality_table_against_slow_versions(pair):
    g, model = pair
    x, t = generate(g, 60, .5)
    x = x.clone()
    x[:4], x[4:6] = 0., 1.
    real = ImageSet((torch.rand(50, 4, 4, 3, generator=make_generator(0))*255).byte().numpy(),
                    np.arange(50) % 4, 4)
    table = generator_quality(model, dict(made=(x, t)), real, eps=(.01,)).set_index('set')
    assert list(table.index) == ['made', 'real']
    assert list(table.n) == [60, 50]
    m = -margin(predict(model, x), t.argmax(1))
    r = -margin(predict(model, real.x), torch.as_tensor(real.y))
    row = table.loc['made']
    assert row.margin_distance == pytest.approx(wasserstein_distance(m, r), rel=1e-4)
    assert table.loc['real'].margin_distance == 0
    right = predict(model, x).argmax(1) == t.argmax(1)      # a tie goes to the first class
    assert row.accuracy == pytest.approx(right.float().mean().item())
    assert row['robust_2.55'] == pytest.approx((m > .2).float().mean().item(), abs=.02)
    assert [row.margin_10, row.margin_50,
            row.margin_90] == pytest.approx(np.quantile(m, (.1, .5, .9)).tolist(), abs=1e-4)
    assert row.clip_rate == pytest.approx(.1)
    assert np.isnan(row.bn_distance)
    assert row.effective_rank == pytest.approx(effective_rank(features(model, x)))
    numbers = generator_quality(model, dict(made=(x, t.argmax(1))), eps=())
    assert len(numbers) == 1
    assert np.isnan(numbers.margin_distance[0])
    assert numbers.accuracy[0] == row.accuracy
    with pytest.raises(ValueError, match='`made` must hold class numbers'):
        generator_quality(model, dict(made=(x, t.argmax(1)+9)))
    with pytest.raises(ValueError, match='`made` must hold pixels'):
        generator_quality(model, dict(made=(x+1, t)))


def test_batch_norm_distance_in_the_table(small):
    g, model = small
    x, t = generate(g, 30, 0.)
    with torch.no_grad(), bn_inputs(model) as seen:
        model(x)
    assert generator_quality(model, dict(a=(x, t)), eps=()).bn_distance[0] == pytest.approx(
        bn_distance(seen).item(), rel=.02)


@pytest.mark.parametrize('n,m', ((5, 5), (7, 3), (1, 40)))
def test_wasserstein(n, m):
    g = make_generator(n)
    a = torch.randn(n, generator=g).round(decimals=1)
    b = 2+torch.randn(m, generator=g).round(decimals=1)
    assert Q._wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b), rel=1e-4)
    assert Q._wasserstein(a, a) == 0
    assert Q._wasserstein(a, a+3) == pytest.approx(3, rel=1e-4)


def test_one_projection_for_all(pair):
    _, model = pair
    g = make_generator(0)
    real = torch.rand(30, 3, 4, 4, generator=g)
    made = torch.rand(20, 3, 4, 4, generator=g)
    y = lambda x: torch.arange(len(x)) % 4
    table = feature_pca(model, dict(made=(made, y(made)), real=(real, torch.eye(4)[y(real)])))
    f = features(model, real).double().numpy()
    u, s, v = np.linalg.svd(f-f.mean(0), full_matrices=False)
    for name, x in dict(real=real, made=made).items():
        rows = table[table.set == name]
        slow = (features(model, x).double().numpy()-f.mean(0)) @ v[:2].T
        for k in (0, 1):
            assert min(abs(rows[f'pc{k+1}']-o).max() for o in (slow[:, k], -slow[:, k])) < 1e-5
        assert list(rows.label) == y(x).tolist()
    assert table.explained1[0] == pytest.approx(s[0]**2/(s**2).sum())
    assert table.explained2[0] == pytest.approx(s[1]**2/(s**2).sum())
    first = feature_pca(model, dict(made=(made, y(made)), other=(real, y(real))))
    assert abs(first[first.set == 'made'].pc1.mean()) < 1e-6 < abs(
        first[first.set == 'other'].pc1.mean())
    for name in ('explained1', 'explained2'):
        assert first[name].nunique() == 1
    fig = plot_features(table, 'n')
    assert [ax.get_title() for ax in fig.axes] == ['made', 'real']
    assert fig.axes[0].get_xlim() == fig.axes[1].get_xlim()
    with pytest.raises(ValueError, match='at least one set'):
        feature_pca(model, {})
    with pytest.raises(ValueError, match='at least 2 images'):
        feature_pca(model, dict(one=(made[:1], y(made[:1]))))


def test_the_sign_of_an_axis_does_not_hang_on_the_library(pair, monkeypatch):
    _, model = pair
    x = torch.rand(30, 3, 4, 4, generator=make_generator(0))
    one = feature_pca(model, dict(a=(x, torch.zeros(30).long())))
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, 'svd',
                        lambda *a, **kw: (lambda u, s, v: (-u, s, -v))(*svd(*a, **kw)))
    assert np.allclose(one.pc1, feature_pca(model, dict(a=(x, torch.zeros(30).long()))).pc1)


def test_optimised_images(small):
    _, model = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    t = draw_targets(6, 4, 0., make_generator(0))
    x, history = optimize_images(model, t, steps=12, batch_size=4, size=16)
    start, _ = optimize_images(model, t, steps=0, batch_size=4, size=16)
    assert x.shape == (6, 3, 16, 16)
    assert x.min() >= 0
    assert x.max() <= 1
    assert not x.requires_grad
    assert list(history.batch.unique()) == [0, 1]
    assert len(history) == 24
    assert history.step.max() == 12
    for _, h in history.groupby('batch'):
        assert h.bn_distance.iloc[-1] < .7*h.bn_distance.iloc[0]
        assert h.cross_entropy.iloc[-1] < h.cross_entropy.iloc[0]
    flat = (start-model.normalize.mean)/model.normalize.std
    assert abs(flat.mean()) < .1
    assert .8 < flat.std() < 1.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(optimize_images(model, t, steps=12, batch_size=4, size=16)[0], x)
    assert not torch.equal(optimize_images(model, t, steps=12, batch_size=4, size=16, seed=1)[0], x)
    with pytest.raises(TypeError, match='Use `wrap_model`'):
        optimize_images(model.net, t)
    z = ((start-model.normalize.mean)/model.normalize.std).requires_grad_()
    with bn_inputs(model) as seen:
        logits = model((model.normalize.mean + model.normalize.std*z)[4:])
    loss = nn.functional.cross_entropy(logits, t[4:])
    assert (history[(history.batch == 1) & (history.step == 1)].cross_entropy.item()
            == pytest.approx(loss.item(), rel=1e-3))
    grad, = torch.autograd.grad(loss + bn_distance(seen), z)
    inside = ((start > .03) & (start < .97))[4:]
    moved = (optimize_images(model, t, steps=1, batch_size=4, size=16)[0]-start)[4:]
    assert (moved.sign() == -grad[4:].sign())[inside].float().mean() > .99, (
        'the first step of Adam follows the sign of the whole loss')


def made_up(factors, noise=0.):
    change = np.tile([.001, .004, .016, .06, .2, .5], 3)
    loss = (.9*change/(change+.05) + noise*np.cos(np.arange(18))).clip(0, .9)
    return pd.DataFrame(dict(model=np.repeat(['a', 'b', 'c'], 6), n_classes=10,
                             measured_loss=loss, js=change*np.repeat(factors, 6), flips=change))


def test_prediction_error_counts_what_differs_between_networks():
    rows = pd.concat([made_up([1, 1, 1]).assign(source='same'),
                      made_up([30, 30, 30]).assign(source='scaled'),
                      made_up([.05, 1, 20]).assign(source='each its own')])
    table = prediction_error(rows).set_index(['source', 'features'])
    assert len(table) == 9
    assert list(table.index.get_level_values(0).unique()) == ['same', 'scaled', 'each its own']
    js = table.xs('js', level='features')
    assert js.mae['same'] < .02
    assert js.mae['scaled'] < .04
    assert js.mae['each its own'] > .1
    assert (table.mae_worst >= table.mae-1e-12).all()
    assert (js.r2 > js.r2_mid).loc['each its own']
    assert js.r2['same'] > .98
    assert table.mae[('each its own', 'flips')] == pytest.approx(table.mae[('same', 'flips')])
    left = Q.fit_predictor(made_up([.05, 1, 20]), ('js',), 'measured_loss')[1]
    e = left.predicted-left.measured_loss
    row = js.loc['each its own']
    mid = left.measured_loss.between(.02, .8)
    assert row.mae == pytest.approx(e.abs().mean())
    assert row['rank'] == pytest.approx(spearmanr(left.predicted, left.measured_loss)[0])
    assert row.r2_mid == pytest.approx(
        1-(e[mid]**2).sum()/((left.measured_loss[mid]-left.measured_loss[mid].mean())**2).sum())
    assert row.r2 == pytest.approx(
        1-(e**2).sum()/((left.measured_loss-left.measured_loss.mean())**2).sum())
    assert row.mae_worst == pytest.approx(max(e[left.model == k].abs().mean() for k in 'abc'))


def test_figure_of_sources_puts_the_best_on_top():
    table = pd.DataFrame(dict(source=['x', 'y', 'x', 'y'],
                              features=['js', 'js', 'flips', 'flips'], mae=[.2, .1, .3, .25]))
    ax = plot_sources(table, 'three networks')
    assert [o.get_text() for o in ax.get_yticklabels()] == ['y', 'x']
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert {o.get_label(): o.get_xdata().tolist() for o in ax.lines} == {
        'js': [10., 20.], 'flips': [25., 30.]}


def test_random_numbers_of_others_are_left_alone(small):
    g, model = small
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].copy()
    compose(g, model, 8, Composition(.25, .25))
    adjust(g, model, (.9, .5), rounds=1, n=8)
    optimize_images(model, torch.eye(4), steps=1, size=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all()
