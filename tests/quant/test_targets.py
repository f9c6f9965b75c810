"Targets: the engine answers like the row; names read in any case; budgets kept; figures of the file."
import copy
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.models.wrapping import wrap_model
from robustnb.quant import targets
from robustnb.quant.export import check_export, export_onnx
from robustnb.quant.mixed_precision import MixedSpec, mixed_spec, weight_noise
from robustnb.quant.ptq import calibrate, model_bytes, quantize
from robustnb.quant.formats import quant_spec
from robustnb.quant.targets import (
    format_list, kilobytes, measure_engine, network_spec, quantize_as, runs_in_integers, target_formats,
    target_table)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def x(): return torch.rand(50, 3, 12, 12, generator=make_generator(0, 'targets'))


@pytest.fixture(scope='module')
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
                             nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 6))
        body[3].weight.data[:4] *= 30
    return wrap_model(body.eval(), (.5,)*3, (.25,)*3)


@pytest.mark.parametrize('name', target_formats('onnxruntime'))
def test_the_engine_computes_what_the_row_simulates(net, x, name, tmp_path):
    pytest.importorskip('onnxruntime')
    q = quantize(net, name, x)
    assert export_onnx(q, tmp_path/'net.onnx', (3, 12, 12))['integer']
    found = check_export(q, tmp_path/'net.onnx', x)
    assert found['agreement'] >= .98
    assert found['unfused'] == []


def test_per_tensor_is_one_scale_for_each_layer(net, x):
    steps = lambda w: (w/(w.abs().max()/127)).sub((w/(w.abs().max()/127)).round()).abs().max().item()
    graph = quantize(net, quant_spec('INT8 per tensor', rule='minmax'), x)
    channel = quantize(net, quant_spec('INT8', rule='minmax'), x)
    weights = [p for n, p in graph.named_parameters() if n.endswith('weight')]
    assert all(steps(w) < 1e-2 for w in weights)
    assert any(steps(p) > .1 for n, p in channel.named_parameters() if n.endswith('weight'))


@pytest.mark.parametrize('typed', ('INT8 per tensor', 'int8 PER Tensor', ' INT8  per tensor '))
def test_per_tensor_is_read_in_any_case(typed):
    assert quant_spec(typed) == quant_spec('INT8', per_channel=False)
    assert str(quant_spec(typed)) == 'INT8 per tensor'


def test_the_name_of_a_row_is_read_back():
    for spec in (quant_spec('INT4/INT8', per_channel=False), quant_spec('FP8'), quant_spec('POT4')):
        assert quant_spec(str(spec)) == spec
    assert quant_spec('INT8 per channel', per_channel=False).per_channel
    with pytest.raises(ValueError, match='Did you mean INT8 per tensor?'):
        quant_spec('INT8 per tensr')


def test_targets_by_name():
    assert target_formats(' ONNXruntime') == ('INT8', 'INT8 per tensor')
    with pytest.raises(ValueError, match='must be one of onnxruntime; got .onnx-runtime.. Did you mean'):
        target_formats('onnx-runtime')
    with pytest.raises(ValueError, match="got 'tflite'"):
        target_formats('tflite')
    table = target_table().set_index(['format', 'what']).one_scale_per
    assert table['INT8', 'weights'] == 'output channel'
    assert table['INT8 per tensor', 'weights'] == 'layer'


@pytest.mark.parametrize('typed, kb', [('300kB', 300), ('0.3MB', 300), ('300', 300), (' 1.5 mb', 1500),
                                       ('.25M', 250), ('2GB', 2e6), ('12k', 12), ('300B', .3),
                                       ('45000 b', 45)])
def test_sizes_as_they_are_typed(typed, kb): assert kilobytes(typed) == pytest.approx(kb)


@pytest.mark.parametrize('bad', ('', 'kB', '0', '0kB', '-3kB', 'nan', 'inf', '300 bananas', '3,5MB', '1e3kB'))
def test_sizes_that_are_none(bad):
    with pytest.raises(ValueError, match='`budget` must be a size above 0') as e:
        kilobytes(bad)
    assert '\n' not in str(e.value)


def test_rows_by_name(net):
    names = lambda formats: [str(f) for f in format_list(formats, net)]
    assert names('onnxruntime,FP8') == ['INT8', 'INT8 per tensor', 'FP8_E4M3']
    assert names(['Mixed 3kb', 'int4/int8']) == ['mixed 3 kB', 'INT4/INT8']
    assert names('mixed0.1MB') == names(names('mixed0.1MB')) == ['mixed 100 kB']
    for bad, says in (('INT8,onnxruntime', 'INT8 more than once'), ([], 'at least one'),
                      ('', 'INT2 to INT16'),
                      ('mixed 100kB,mixed 0.1MB', 'more than once'), ('mixed', 'such as 300kB'),
                      ('mixed 1kB', 'must leave')):
        with pytest.raises(ValueError, match=says): format_list(bad, net)


def test_the_least_that_is_named_is_enough(net, x):
    with pytest.raises(ValueError) as e:
        format_list('mixed .1kB', net)
    least = str(e.value).split('must leave ')[1].split(' kB')[0]
    with pytest.raises(ValueError, match='must leave'):
        format_list(f'mixed {.99*float(least)}kB', net)
    spec = network_spec(f'mixed {least}kB', net, x)
    assert set(spec.bits.values()) == {2}
    assert model_bytes(quantize_as(net, spec, x), spec.bits)/1000 == pytest.approx(float(least))


@pytest.mark.parametrize('kb', (3, 5))
def test_a_budget_is_kept_and_the_size_counted_by_hand(net, x, kb):
    spec = network_spec(f'mixed {kb}kB', net, x)
    q = quantize_as(net, spec, calibrate(net, x))
    by_hand = sum(p.numel()*(spec.bits[n.removesuffix('.weight')] if n.endswith('weight') else 32)
                  for n, p in q.named_parameters())/8
    assert model_bytes(q, spec.bits) == pytest.approx(by_hand, abs=1)
    assert by_hand/1000 <= kb
    assert len(set(spec.bits.values())) > 1
    other = quantize_as(net, spec, x)
    assert torch.equal(predict(q, x), predict(other, x))


def test_a_table_is_a_row(net, x):
    table = weight_noise(net, x, ('INT4',))
    spec = mixed_spec(table, name='mine')
    assert format_list([spec]) == [spec]
    assert isinstance(network_spec(spec, net, x), MixedSpec)
    assert str(spec) == 'mine'
    assert torch.equal(predict(quantize_as(net, spec, x), x), predict(quantize(net, 'INT4/INT8', x), x))
    with pytest.raises(ValueError, match='must name every layer'):
        model_bytes(quantize(net, 'INT4', x), {k: 4 for k in list(spec.bits)[1:]})


@pytest.mark.parametrize('name, yes', [('INT8', True), ('INT4/INT8', True), ('INT8 per tensor', True),
                                       ('INT4', False), ('FP8', False), ('POT4', False),
                                       ('INT16/INT8', False)])
def test_which_rows_have_an_engine_is_what_the_export_says(net, x, name, yes, tmp_path):
    pytest.importorskip('onnx')
    q = quantize(net, name, x)
    assert runs_in_integers(q) is yes
    assert export_onnx(q, tmp_path/'net.onnx', (3, 12, 12))['integer'] is yes
    assert not runs_in_integers(net)


def test_figures_of_the_engine(net, x):
    pytest.importorskip('onnxruntime')
    before = copy.deepcopy(net.state_dict())
    found = measure_engine(quantize(net, 'INT8', x), x, threads=1, seconds=.01)
    full = measure_engine(net, x[:1], seconds=.01)
    assert 0 < found['engine_ms'] < 1000
    assert 0 < full['engine_ms'] < 1000
    assert found['threads'] == 1
    weights = sum(p.numel() for n, p in net.named_parameters() if n.endswith('weight'))
    assert weights/1000 < found['file_kb'] < full['file_kb']
    assert full['file_kb'] > 4*weights/1000
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_one_image_is_timed_until_the_seconds_are_over(net, x, monkeypatch):
    "By a clock that goes on four thousandths of a second with each look, in an engine that takes no time"
    pytest.importorskip('onnx')
    asked = []
    monkeypatch.setattr(targets, 'OnnxModel', lambda path, threads: lambda images: asked.append(len(images)))
    for seconds, runs in ((.3, 75), (.001, 5), (60, 500)):
        asked.clear()
        monkeypatch.setattr(targets, 'time', SimpleNamespace(perf_counter=count(0, .004).__next__))
        assert measure_engine(net, x, seconds=seconds)['engine_ms'] == pytest.approx(4)
        assert asked == [1]*(3+runs)


def test_without_the_packages(net, monkeypatch):
    monkeypatch.setattr(targets, 'find_spec', lambda name: None)
    assert not targets.engine_installed()
