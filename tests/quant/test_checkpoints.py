"What is read back answers to the last bit; what cannot be built again is refused; nothing is half written."
import copy

import pytest
import torch
from torch import nn

from robustnb.quant import checkpoints as store
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import load_state, save_state
from robustnb.models.wrapping import wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.models.loading import load_model, save_model
from robustnb.quant.ptq import quantize, FakeQuantize
from robustnb.quant.formats import quant_spec
from robustnb.quant.sensitivity import layer_sensitivity
from robustnb.quant.checkpoints import load_quantized, save_quantized
from robustnb.transfer.generator import Generator, save_generator


def images(n=6, seed=0):
    return torch.rand(n, 3, 32, 32, generator=make_generator(seed, 'store test'))


def net_of(name, **kwargs):
    "Random weights, batch norm that is no identity, a normalisation and names of its own"
    net = build_model(name, 7, .06, (.4, .5, .6), (.2, .25, .3), seed=3)
    g = make_generator(1, name)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, lo in ((m.running_var, .5), (m.weight.data, .6), (m.running_mean, -.2),
                          (m.bias.data, -.2)):
                t.copy_(lo+torch.rand(t.shape, generator=g))
    net.classes = tuple('abcdefg')
    return net


def gradient(net, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(net(x).square().sum(), x)[0]


@pytest.mark.parametrize('name', model_names)
def test_every_network_answers_to_the_last_bit(name, tmp_path):
    net = net_of(name)
    x = images()
    q = quantize(net, 'INT5', x)
    save_quantized(q, tmp_path/'q.pt')
    again = load_quantized(tmp_path/'q.pt')
    assert torch.equal(predict(again, x), predict(q, x))
    assert torch.equal(gradient(again, x), gradient(q, x))
    assert not torch.equal(predict(again, x), predict(net, x))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert [again.name, again.n_classes, again.width, again.classes] == [name, 7, .06, net.classes]
    assert torch.equal(again.normalize.mean, net.normalize.mean)
    assert torch.equal(again.normalize.std, net.normalize.std)


@pytest.mark.parametrize('spec', ('INT2', 'INT16', 'POT4', 'POT3/FLOAT5_E2', 'FLOAT6_E1',
                                  'FP8_E5M2', quant_spec('INT4', per_channel=False, rule='minmax')),
                         ids=str)
def test_every_format(spec, tmp_path):
    net = net_of('AlexNet_BN')
    x = images()
    q = quantize(net, spec, x)
    save_quantized(q, tmp_path/'q.pt')
    again = load_quantized(tmp_path/'q.pt')
    assert torch.equal(predict(again, x), predict(q, x))
    assert again.spec == q.spec
    assert (again.left_float, again.opaque) == (q.left_float, q.opaque)
    points = [(n, m.fmt, m.signed, m.on, m.scale) for n, m in again.named_modules()
                if isinstance(m, FakeQuantize)]
    assert points == [(n, m.fmt, m.signed, m.on, m.scale) for n, m in q.named_modules()
                        if isinstance(m, FakeQuantize)]
    assert q.spec.activations.kind != 'INT' or {r[2] for r in points} == {True, False}


def test_mixed_formats_come_back(tmp_path):
    "Rounded tensors may differ from the specification, one by one"
    q = quantize(net_of('AlexNet'), 'INT8', images())
    x = images()
    points = [m for m in q.modules() if isinstance(m, FakeQuantize)]
    points[2].fmt, points[3].on, points[4].signed = (quant_spec('INT4').activations,
                                                           False, True)
    save_quantized(q, tmp_path/'q.pt')
    again = load_quantized(tmp_path/'q.pt')
    assert torch.equal(predict(again, x), predict(q, x))
    found = [m for m in again.modules() if isinstance(m, FakeQuantize)]
    assert [str(found[2].fmt), found[3].on, found[4].signed,
            str(found[5].fmt)] == ['INT4', False, True, 'INT8']


def test_memory_layout_and_a_second_round(tmp_path):
    net = net_of('VGG_16').to(memory_format=torch.channels_last)
    x = images()
    q = quantize(net, 'INT6', x)
    save_quantized(q, tmp_path/'q.pt')
    save_quantized(load_quantized(tmp_path/'q.pt'), tmp_path/'r.pt')
    again = load_quantized(tmp_path/'r.pt')
    assert torch.equal(predict(again, x), predict(q, x))
    assert torch.equal(predict(copy.deepcopy(again), x), predict(q, x))
    assert all(a.stride() == b.stride()
               for a, b in zip(q.state_dict().values(), again.state_dict().values()))


def test_a_copy_of_a_model_from_a_file(tmp_path):
    save_model(net_of('AlexNet_BN'), tmp_path/'net.pt')
    q = quantize(load_model(tmp_path/'net.pt'), 'INT8', images())
    save_quantized(q, tmp_path/'q.pt')
    again = load_quantized(tmp_path/'q.pt')
    assert torch.equal(predict(again, images(3, 1)), predict(q, images(3, 1)))
    assert layer_sensitivity(net_of('AlexNet_BN'), again, images()).equals(layer_sensitivity(
        net_of('AlexNet_BN'), q,
        images())), 'a copy that was read can be examined like one that was made'


def test_what_cannot_be_built_again_is_refused(tmp_path):
    x = images()
    path = tmp_path/'q.pt'
    foreign = quantize(wrap_model(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
                                  (.5,)*3, (.2,)*3),
                       'INT8', x)
    with pytest.raises(ValueError, match='one of the networks of `build_model`'):
        save_quantized(foreign, path)
    with pytest.raises(TypeError, match='made by `quantize`'):
        save_quantized(net_of('AlexNet'), path)
    q = quantize(net_of('AlexNet'), 'INT8', x)
    altered = copy.deepcopy(q)
    node = next(n for n in altered.graph.nodes if n.op == 'call_module' and isinstance(
        altered.get_submodule(n.target), FakeQuantize))
    node.replace_all_uses_with(node.args[0])
    altered.graph.erase_node(node)
    altered.recompile()
    with pytest.raises(ValueError, match='Save before changing it'):
        save_quantized(altered, path)  # its state still has the scale
    altered.delete_all_unused_submodules()
    save_quantized(altered, path)
    assert torch.equal(predict(load_quantized(path), x),
                       predict(altered, x)), 'with a rounded tensor fewer it can be built again'
    path.unlink()
    last = next(n for n in altered.graph.nodes if n.op == 'output')
    with altered.graph.inserting_before(last):
        last.args = (altered.graph.call_function(torch.neg, last.args),)
    altered.recompile()
    with pytest.raises(ValueError, match='Save before changing it'):
        save_quantized(altered, path)
    renamed = copy.deepcopy(q)
    renamed.name = 'ResNet_18'
    with pytest.raises(ValueError, match='Save before changing it'):
        save_quantized(renamed, path)
    assert not list(tmp_path.iterdir())


def test_files_that_are_something_else(tmp_path):
    q = quantize(net_of('AlexNet'), 'INT8', images())
    good = tmp_path/'q.pt'
    bad = tmp_path/'bad.pt'
    save_quantized(q, good)
    held = load_state(good)
    with pytest.raises(FileNotFoundError, match='there is none'):
        load_quantized(tmp_path/'none.pt')
    bad.write_bytes(good.read_bytes()[:2000])
    with pytest.raises(ValueError, match='damaged'):
        load_quantized(bad)
    for state in (held['state_dict'], [1], dict(format='robustnb.model/1')):
        save_state(state, bad)
        with pytest.raises(ValueError, match='file of `save_quantized`'):
            load_quantized(bad)
    save_state(held | dict(code=held['code']+' '), bad)
    with pytest.raises(ValueError, match='quantise again'):
        load_quantized(bad)
    for change in (lambda s: s.pop('normalize.mean'), lambda s: s.update(more=torch.ones(1)),
                   lambda s: s.update({'normalize.mean': torch.ones(1, 2, 1, 1)})):
        state = dict(held['state_dict'])
        change(state)
        save_state(held | dict(state_dict=state), bad)
        with pytest.raises(ValueError, match='do not fit'):
            load_quantized(bad)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    q = quantize(net_of('AlexNet'), 'INT8', images())
    path = tmp_path/'q.pt'
    save_quantized(q, path)
    before = path.read_bytes()
    def half(state, tmp):
        open(tmp, 'wb').write(b'half')
        raise RuntimeError('no space')
    monkeypatch.setattr(torch, 'save', half)
    for save, thing in ((save_quantized, q), (
            save_generator, Generator(torch.randn(5, 8), torch.zeros(3), torch.ones(3), width=8))):
        with pytest.raises(OSError, match='no space'):
            save(thing, path)
    assert path.read_bytes() == before
    assert [o.name for o in tmp_path.iterdir()] == ['q.pt']
