"""Mixed precision: noise by hand, budgets never exceeded by an independent count, greedy against
all assignments, formats where they were asked for."""
import copy
import itertools
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.models.complexity import model_complexity
from robustnb.quant.ptq import model_bytes
from robustnb.quant.mixed_precision import (
    allocate_bits, _choices, _greedy, quantize_mixed, weight_noise)
from robustnb.models.zoo import build_model
from robustnb.models.graph import fold_batchnorm
from robustnb.quant.ptq import quantize, FakeQuantize
from robustnb.quant.formats import choose_scale, fake_quantize, levels, number_format, quant_spec
from robustnb.quant.reconstruction import correct_bias, adaround
from robustnb.quant.sensitivity import layer_sensitivity

formats = ('INT8', 'INT6', 'INT4', 'INT3', 'INT2')


def images(n=12, seed=0):
    return torch.rand(n, 3, 32, 32, generator=make_generator(seed, 'test images'))


@pytest.fixture(scope='module')
def model():
    net = build_model('ResNet_18', width=.0625)
    for i, m in enumerate(o for o in net.modules() if isinstance(o, nn.BatchNorm2d)):
        m.bias.data.normal_(0, .3, generator=make_generator(i))
    return net


@pytest.fixture(scope='module')
def noise(model): return weight_noise(model, images(), formats)


@cache
def layers(model):
    return {n: m for n, m in fold_batchnorm(model).named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))}


def size(model, bits):
    "Bytes, counted from the folded model: weights in their bits, biases in 32"
    held = layers(model)
    return sum(held[k].weight.numel()*b for k, b in bits.items())/8 + sum(
        4*m.bias.numel() for m in held.values())


@cache
def macs_of(model): return model_complexity(fold_batchnorm(model)).set_index('name').macs


def bit_operations(model, bits, by):
    macs = macs_of(model)
    return sum(int(macs[k])*b*by for k, b in bits.items())/1e6


def bits_of(table): return dict(zip(table.layer, [number_format(f).bits for f in table.format]))


def one_at_a_time(model, x, names, spec):
    "The slow way: each layer rounded alone, and a pass over the images for each layer and format"
    rows = []
    signal = predict(model, x)
    s = quant_spec(spec)
    for name in layers(model):
        changed = fold_batchnorm(model)
        w = changed.get_submodule(name).weight
        exact = w.detach().clone()
        for f in map(number_format, names):
            with torch.no_grad():
                w.copy_(fake_quantize(exact, f, choose_scale(exact, f, s.rule, s.per_channel)))
            noise = ((predict(changed, x)-signal).square().mean()/signal.var(correction=0)).item()
            rows.append(dict(layer=name, format=str(f), bits=f.bits, params=w.numel(), macs=0, noise=noise))
    return pd.DataFrame(rows)


@pytest.mark.parametrize('name, spec', [('ResNet_18', 'INT8'), ('VGG_16', 'INT8'),
                                        ('ResNet_18', quant_spec('INT8', per_channel=False, rule='minmax'))])
def test_the_noise_is_close_to_that_of_each_layer_rounded_alone(name, spec):
    net = build_model(name, width=.0625)
    before = copy.deepcopy(net.state_dict())
    x = images(6)
    names = 'INT8', 'INT5', 'INT4', 'INT3'
    found = weight_noise(net, x, names, spec)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    slow = one_at_a_time(net, x, names, spec)
    assert found[['layer', 'format', 'params']].equals(slow[['layer', 'format', 'params']])
    assert found.noise.corr(slow.noise, method='spearman') > .95
    macs = model_complexity(fold_batchnorm(net)).set_index('name').macs
    assert found.macs.tolist() == macs[found.layer].tolist()
    kb = size(net, dict.fromkeys(layers(net), 4.5))/1000
    true = slow.set_index(['layer', 'format']).noise
    chosen = [sum(true[r.layer, r.format] for r in allocate_bits(net, x, budget_kb=kb, noise=o).itertuples())
              for o in (found, slow)]
    assert chosen[0] < 1.15*chosen[1], 'what it chooses is nearly as good'


def test_the_same_noise_as_the_sensitivity_report(model, noise):
    sensitivity = layer_sensitivity(model, quantize(model, 'INT4', images()), images(), directions=10)
    weights = sensitivity[sensitivity.kind == 'weights'].set_index('layer').logit_noise
    mine = noise[noise.format == 'INT4'].set_index('layer').noise
    assert len(weights) == len(mine)
    assert weights.corr(mine, method='spearman') > .95
    assert (weights/mine).median() == pytest.approx(1, rel=.2)


class Twice(nn.Module):
    "A layer that is called twice"
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x): return self.fc(self.b(self.b(self.a(x)).relu()).relu().mean((2, 3)))


def test_a_layer_called_twice_works_twice_but_is_stored_once():
    net = Twice().eval()
    rows = weight_noise(net, images(), ('INT4',)).set_index('layer')
    assert rows.params.tolist() == [108, 144, 20]
    assert rows.macs['b'] == 2*144*900
    assert rows.macs['a'] == 108*900
    table = allocate_bits(net, images(), budget_kb=model_bytes(net, 4)/1000, formats=('INT4',))
    assert table.kb.sum()*1000 + 4*(4 + 4 + 5) == model_bytes(net, 4)


def test_no_budget_is_exceeded_and_no_room_is_wasted(model, noise):
    floor = size(model, dict.fromkeys(layers(model), 2))/1000
    top = size(model, dict.fromkeys(layers(model), 8))/1000
    wider = {8: None, 6: 8, 4: 6, 3: 4, 2: 3}
    before = np.inf
    for kb in np.linspace(floor, top*1.05, 25):
        table = allocate_bits(model, None, budget_kb=kb, noise=noise)
        bits = bits_of(table)
        used = size(model, bits)/1000
        assert used <= kb + 1e-9
        assert list(bits) == list(layers(model))
        for k, b in bits.items():
            now, more = (noise[(noise.layer == k) & (noise.bits == o)].noise
                         for o in (b, wider[b] or b))
            assert (wider[b] is None or more.item() >= now.item()
                    or size(model, bits | {k: wider[b]})/1000 > kb), 'one more step would fit'
        assert table.kb.sum() + sum(4*m.bias.numel()
                                    for m in layers(model).values())/1000 == pytest.approx(used)
        assert table.noise.sum() <= before*1.3
        before = table.noise.sum()
    assert set(table.format) == {'INT8'}


def test_bit_operations_as_a_budget(model, noise):
    low = bit_operations(model, dict.fromkeys(layers(model), 2), 6)
    high = bit_operations(model, dict.fromkeys(layers(model), 8), 6)
    for budget in np.linspace(low, high, 9):
        table = allocate_bits(model, None, budget_mbops=budget, spec='INT8/INT6', noise=noise)
        used = bit_operations(model, bits_of(table), 6)
        assert used <= budget*(1 + 1e-9)
        assert table.mbops.sum() == pytest.approx(used)
    assert set(table.format) == {'INT8'}
    half = (low+high)/2
    by_size = allocate_bits(model, None, budget_kb=size(model, bits_of(allocate_bits(
        model, None, budget_mbops=half, spec='INT8/INT6', noise=noise)))/1000,
                            noise=noise)
    assert by_size.noise.sum() < allocate_bits(
        model, None, budget_mbops=half, spec='INT8/INT6',
        noise=noise).noise.sum(), 'each budget has its own best answer'
    assert allocate_bits(model, None, budget_mbops=half, spec='INT8/INT6',
                         noise=noise).noise.sum() < noise[noise.format == 'INT4'].noise.sum()


@pytest.mark.parametrize('kind', ('kb', 'mbops'))
def test_the_least_that_is_named_is_accepted_and_less_is_not(model, noise, kind):
    with pytest.raises(ValueError, match=f'`budget_{kind}` must be at least ([0-9.]+), what '
                                         'the narrowest formats take; got 0.1.') as e:
        allocate_bits(model, None, noise=noise, **{f'budget_{kind}': .1})
    least = float(str(e.value).split('at least ')[1].split(',')[0])
    narrowest = dict.fromkeys(layers(model), 2)
    assert least == pytest.approx(
        size(model, narrowest)/1000 if kind == 'kb' else bit_operations(model, narrowest, 8),
        abs=1e-3, rel=1e-9)
    assert set(allocate_bits(model, None, noise=noise,
                             **{f'budget_{kind}': least}).format) == {'INT2'}
    for bad in (least*(1-1e-6), -1., 0, float('nan')):
        with pytest.raises(ValueError, match='must be at least'):
            allocate_bits(model, None, noise=noise, **{f'budget_{kind}': bad})


@pytest.mark.parametrize('bits', (3, 4, 6))
def test_the_size_of_a_uniform_model_buys_less_noise(model, noise, bits):
    table = allocate_bits(model, None, budget_kb=model_bytes(fold_batchnorm(model), bits)/1000,
                          noise=noise)
    assert table.noise.sum() < .8*noise[noise.bits == bits].noise.sum()
    assert len(set(table.bits)) > 1


def made_up(rows):
    return pd.DataFrame([dict(layer=k, format=f'INT{b}', bits=b, params=p, macs=p, noise=n)
                         for k, p, at in rows for b, n in at.items()])


def test_the_order_of_the_steps_by_hand():
    table = made_up([('a', 100, {8: 0., 4: 1., 2: 10.}), ('b', 100, {8: 0., 4: 8., 2: 9.}),
                     ('c', 10, {8: 0., 4: .5, 2: 5.})])
    choose = lambda budget: [table.bits[table.layer == k].tolist()[i]
                             for k, i in _greedy(_choices(table, 'params'), budget).items()]
    assert choose(1680) == [8, 8, 8], 'a to 4 bits costs .0025 a bit, the least'
    assert choose(1679) == [4, 8, 8], 'a to 4 bits costs .0025 a bit, the least'
    assert choose(1280) == [4, 8, 8], 'then c at .0125'
    assert choose(1279) == [4, 8, 4], 'then c at .0125'
    assert choose(879) == [4, 2, 8], (
        'then b, straight to 2 bits at .015 rather than 4 at .02; and c has room for 8 again')
    assert choose(1239) == [4, 4, 8], 'and where there is more room, b for 4'
    assert choose(679) == [4, 2, 4]
    assert choose(620) == [2, 2, 8]
    assert choose(420) == [2, 2, 2]


def test_room_is_not_used_to_add_noise():
    table = made_up([('a', 10, {8: .2, 4: .1}), ('b', 100, {8: 0., 4: 1.})])
    assert list(_greedy(_choices(table, 'params'), 480).values()) == [1, 1]
    assert list(_greedy(_choices(table, 'params'), 880).values()) == [0, 0]


def test_the_least_is_rounded_up_to_whole_bytes():
    net = nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).eval()
    x = torch.rand(4, 1, 1, 7, generator=make_generator(0))
    with pytest.raises(ValueError, match='at least 0.02, '):
        allocate_bits(net, x, budget_kb=.0199, formats=('INT3',))
    table = allocate_bits(net, x, budget_kb=.02, formats=('INT3',))
    assert table.kb.item()*1000 == 63/8
    assert model_bytes(net, 3) == 20


def test_close_to_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        rows = [(k, int(rng.integers(5, 200)),
                 {b: s*4.**-b*np.exp(rng.normal(0, .3)) for b in (8, 6, 4, 3, 2)})
                for k, s in zip('abcd', 10**rng.uniform(-2, 2, 4))]
        choices = _choices(made_up(rows), 'params')
        least, most = (sum(o[i]['use'] for o in choices.values()) for i in (-1, 0))
        budget = rng.uniform(least, most)
        total = lambda at, key: sum(choices[k][i][key] for k, i in zip(choices, at))
        everything = itertools.product(*(range(len(o)) for o in choices.values()))
        best = min(total(at, 'noise') for at in everything if total(at, 'use') <= budget)
        mine = _greedy(choices, budget).values()
        assert total(mine, 'use') <= budget
        ratios.append(total(mine, 'noise')/best)
    assert min(ratios) >= 1 - 1e-12
    assert np.median(ratios) < 1.1
    assert np.mean(ratios) < 1.5


def test_of_equally_wide_formats_the_quieter_one():
    table = pd.DataFrame([dict(layer=k, format=f, bits=b, params=10, macs=10, noise=n)
                          for k, f, b, n in (('a', 'INT8', 8, .1), ('a', 'INT4', 4, .3),
                                             ('a', 'FLOAT4_E2', 4, .2), ('b', 'FLOAT4_E2', 4, .5),
                                             ('b', 'INT8', 8, .0), ('b', 'INT4', 4, .4))])
    assert [[o['format'] for o in rows] for rows in _choices(table, 'params').values()] == [
        ['INT8', 'FLOAT4_E2'], ['INT8', 'INT4']]


def test_every_layer_gets_its_format(model):
    x = images()
    table = pd.DataFrame(dict(layer=list(layers(model)), format=list(itertools.islice(
        itertools.cycle(('INT3', 'POT4', 'FLOAT4', 'INT8', 'INT2')), len(layers(model))))))
    before = copy.deepcopy(model.state_dict())
    q = quantize_mixed(model, table.sample(frac=1, random_state=0), 'INT6/INT7', x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert q.left_float == ()
    assert not q.training
    assert not any(p.requires_grad for p in q.parameters())
    assert {m.fmt for m in q.modules() if isinstance(m, FakeQuantize)} == {number_format('INT7')}
    plain = quantize(model, 'INT6/INT7', x)
    assert all(torch.equal(m.scale, plain.get_submodule(n).scale) for n, m in q.named_modules()
               if isinstance(m, FakeQuantize))
    same = {f: quantize(model, f'{f}/INT7', x) for f in set(table.format)}
    for name, f in zip(table.layer, table.format):
        assert torch.equal(same[f].get_submodule(name).weight, q.get_submodule(name).weight)
        assert all(len(w.unique()) <= 2*len(levels(number_format(f))) - 1
                   for w in q.get_submodule(name).weight)
        assert q.layer_formats[name] == number_format(f)
    again = copy.deepcopy(q)
    assert again.layer_formats == q.layer_formats
    assert torch.equal(predict(again, x), predict(q, x))
    for f in (correct_bias, lambda *args: adaround(*args, steps=5)):
        better = f(model, q, x)
        assert better.layer_formats == q.layer_formats
        assert all(len(w.unique()) <= 3 for w in better.get_submodule(table.layer[4]).weight)


def test_uniform_is_what_quantize_gives(model):
    table = pd.DataFrame(dict(layer=list(layers(model)), format='INT4'))
    x = images()
    for spec in ('INT4/INT8', quant_spec('INT8', per_channel=False)):
        a = quantize_mixed(model, table, spec, x)
        b = quantize(model, quant_spec('INT4/INT8', per_channel=quant_spec(spec).per_channel), x)
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_what_is_refused(model, noise):
    x = images(4)
    table = pd.DataFrame(dict(layer=list(layers(model)), format='INT4'))
    with pytest.raises(ValueError, match='20 rows for 21 layers, .*net.features.0'):
        quantize_mixed(model, table[1:], 'INT8', x)
    with pytest.raises(ValueError, match='22 rows for 21 layers, some twice'):
        quantize_mixed(model, pd.concat([table, table[:1]]), 'INT8', x)
    with pytest.raises(ValueError, match="got 'INT1'"):
        quantize_mixed(model, table.assign(format='INT1'), 'INT8', x)
    with pytest.raises(TypeError, match='`images` must be a torch tensor'):
        quantize_mixed(model, table, 'INT8', None)
    with pytest.raises(TypeError, match='`images` must be a torch tensor'):
        allocate_bits(model, None, budget_kb=10)
    with pytest.raises(ValueError, match='must name at least one number format'):
        weight_noise(model, x, ())
    with pytest.raises(ValueError, match='got neither'):
        allocate_bits(model, x, noise=noise)
    with pytest.raises(ValueError, match="must be given; got {'budget_kb': 1, 'budget_mbops': 2}"):
        allocate_bits(model, x, 1, 2, noise=noise)
    with pytest.raises(ValueError, match='`noise` must be that of `model`'):
        allocate_bits(model, x, 100, noise=noise[noise.layer != 'net.features.0'])
    with pytest.raises(ValueError, match='pixels in'):
        weight_noise(model, x*torch.nan)
    broken = copy.deepcopy(model)
    next(broken.parameters()).data[0] = torch.inf
    for f in (lambda: weight_noise(broken, x), lambda: quantize_mixed(broken, table, 'INT8', x)):
        with pytest.raises(ValueError, match='must have finite weights'):
            f()
    with pytest.raises(ValueError, match='evaluation mode'):
        allocate_bits(copy.deepcopy(model).train(), x, 100, noise=noise)
