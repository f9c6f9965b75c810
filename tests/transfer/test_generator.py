"""The generator: what it asks for, what it measures, and that the model comes back as it was, also
after an interrupt."""
import pytest
import torch
from torch import nn

from robustnb.transfer import generator as G
from robustnb.core import make_generator
from robustnb.files import load_state, save_state
from robustnb.transfer.generator import (
    bn_distance, bn_inputs, draw_targets, energy, generate, Generator, load_generator,
    match_energy, save_generator, train_generator)
from robustnb.models.wrapping import batchnorms, last_linear, wrap_model
from robustnb.models.zoo import build_model, model_names
from robustnb.quant.checkpoints import load_quantized, save_quantized
from robustnb.quant.ptq import quantize
from helpers_transfer import settled

tiny = dict(steps=2, batch_size=8, size=16, width=8, device='cpu')


@pytest.mark.parametrize('boundary', (0., .25, 1.))
@pytest.mark.parametrize('k', (2, 10, 100))
def test_targets_are_one_class_or_two_different_ones(k, boundary):
    t = draw_targets(4000, k, boundary, make_generator(0))
    assert (t.sum(1)-1).abs().max() < 1e-6
    assert t.min() >= 0
    assert (t > 0).sum(1).bincount(minlength=3).tolist() == [0, 4000-4000*boundary, 4000*boundary]
    assert (t.sum(0)*k/4000 - 1).abs().max() < (.16 if k < 50 else .8), 'all classes alike'
    mixed = t[(t > 0).sum(1) == 2].amax(1)
    if boundary:
        assert .5 <= mixed.min() < .55
        assert mixed.max() > .95
    assert torch.equal(t, draw_targets(4000, k, boundary, make_generator(0)))


@pytest.mark.parametrize('bad', (-.1, 1.1, float('nan')))
def test_shares_that_make_no_sense(bad):
    with pytest.raises(ValueError, match='share in .0, 1.'):
        draw_targets(10, 10, bad, make_generator(0))


def test_generated_images_are_shuffled_and_come_from_the_seed():
    net = settled(build_model('ResNet_18', width=.0625))
    x, t = generate(net, 300, boundary=.5)
    assert x.min() >= 0
    assert x.max() <= 1
    assert not x.requires_grad
    assert x.std() > 0
    two = (t > 0).sum(1) == 2
    assert two.sum() == 150, 'mixtures are not all at the front'
    assert 50 < two[:150].sum() < 100, 'mixtures are not all at the front'
    again = generate(net, 300, boundary=.5)
    other = generate(net, 300, boundary=.5, seed=1)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], t)
    assert not torch.equal(other[1], t)
    assert not torch.equal(other[0], x)


def test_a_class_is_asked_for_by_its_row():
    net = settled(build_model('ResNet_18', width=.0625, n_classes=4))
    noise = torch.zeros(4, net.embedding.shape[1])
    alone = net(torch.eye(4), noise)
    mixed = net(torch.full((1, 4), .25), noise[:1])
    assert len({tuple(o.flatten()[:50].tolist()) for o in (*alone, *mixed)}) == 5
    assert (net.embedding.mean(1)).abs().max() < 1e-5
    assert (net.embedding.std(1)-1).abs().max() < 1e-5


def test_seeds_reach_weights_and_draws():
    model = build_model('ResNet_18', width=.0625)
    a = train_generator(model, **{**tiny, 'steps': 0}, seed=0)[0]
    b = train_generator(model, **{**tiny, 'steps': 0}, seed=1)[0]
    weights = [m.weight for m in (a.body[0], b.body[0])]
    assert not torch.equal(*weights)
    assert abs(torch.corrcoef(torch.stack([w.flatten() for w in weights]))[0, 1]) < .1


@pytest.mark.parametrize('name', [n for n in model_names if n != 'ResNet_152'])
def test_networks_of_the_zoo(name, monkeypatch):
    monkeypatch.setattr(G, 'match_energy', lambda *args, **kw: None)
    model = build_model(name, n_classes=5, width=.0625)
    net, history = train_generator(model, **{**tiny, 'size': 32})
    assert len(history) == 2
    assert history.notna().all(axis=None)
    assert ('no batch norm' in net.knows) == (not batchnorms(model))
    assert (history.bn_distance > 0).all() == bool(batchnorms(model))
    assert generate(net, 3)[1].shape == (3, 5)
    assert not net.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_comes_back_after_an_interrupt(monkeypatch):
    model = build_model('ResNet_18', width=.0625)
    model.net.features[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    def interrupted(items, desc):
        yield from list(items)[:1]
        raise KeyboardInterrupt
    monkeypatch.setattr(G, 'progress', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_generator(model, **tiny)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_random_numbers_of_others_are_left_alone(monkeypatch):
    def forbidden(*args): raise AssertionError('the generators of all devices were seeded')
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', forbidden)
    before = torch.get_rng_state()
    net, _ = train_generator(build_model('ResNet_18', width=.0625), **tiny)
    generate(net, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_distance_is_the_mean_over_layers_of_the_formula():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    for m in layers:
        m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
    x = 2*torch.randn(50, 3, 6, 6) + 1
    with bn_inputs(layers) as seen:
        layers(x)
    def kl(bn, x):
        v = x.var((0, 2, 3), correction=0)
        m = x.mean((0, 2, 3))
        return .5*(v/bn.running_var + (m-bn.running_mean)**2/bn.running_var - 1
                   - torch.log(v/bn.running_var))
    slow = torch.stack([kl(bn, o) for bn, o in seen]).mean()
    assert len(seen) == 2
    assert bn_distance(seen).item() == pytest.approx(slow.item(), rel=.02)
    assert bn_distance([]) == 0
    x = torch.ones(5, 3, 6, 6).requires_grad_()
    with bn_inputs(layers) as seen:
        layers(x)
    grad, = torch.autograd.grad(bn_distance(seen), x)
    assert bn_distance(seen).isfinite(), 'also where a channel is silent'
    assert grad.isfinite().all(), 'also where a channel is silent'


@pytest.mark.parametrize('name', ('AlexNet', 'ResNet_18'))
def test_energy_is_matched_from_both_sides(name):
    model = build_model(name, width=.0625, mean=(.5,)*3, std=(.05,)*3)
    net = settled(model, 32)
    for bn in batchnorms(model)[:1]:
        with bn_inputs(model) as seen:
            model(generate(net, 100, boundary=0.)[0])
        bn[1].running_var.copy_(seen[0][1].var((0, 2, 3), correction=0)*1.5)
    for contrast in (.3, 3.):
        net.contrast.fill_(contrast)
        assert abs(energy(net, model)['ratio']-1) > .5
        matched = match_energy(net, model)
        assert abs(matched['ratio']-1) < .05
        assert energy(net, model) == matched


def test_energy_is_that_of_the_first_batch_norm_and_no_layer_after_it_runs():
    model = build_model('ResNet_18', width=.0625, mean=(.5,)*3, std=(.05,)*3)
    net = settled(model, 32)
    targets = draw_targets(40, 10, 0., make_generator(3, 'energy'))
    noise = torch.randn(40, net.embedding.shape[1], generator=make_generator(3, 'energy noise'))
    with torch.no_grad(), bn_inputs(model) as seen:
        model(net(targets, noise))
    bn, first = seen[0]
    ratios = first.transpose(0, 1).flatten(1).var(1, correction=0)/bn.running_var
    ran = []
    last_linear(model).register_forward_hook(lambda *_: ran.append(1))
    energy(net, model, 40, seed=3)
    ran.clear()                         # the model is opened before: it answers two black images
    assert energy(net, model, 40, seed=3)['ratio'] == pytest.approx(ratios.median().item(), rel=1e-4)
    assert not ran
    model(net(targets, noise))
    assert ran, 'no hook stays'


def test_wrong_uses():
    model = build_model('ResNet_18', width=.0625)
    with pytest.raises(TypeError, match='Use `wrap_model`'):
        train_generator(model.net, **tiny)
    with pytest.raises(ValueError, match='Call `model.eval'):
        train_generator(build_model('ResNet_18', width=.0625).train(), **tiny)
    with pytest.raises(ValueError, match='`size` must be a whole number, at least 4 pixels; got 3'):
        train_generator(model, **{**tiny, 'size': 3})
    for k, bad, words in (('size', 0, 'at least 4 pixels; got 0'),
                          ('width', 1, 'at least 2 channels; got 1'),
                          ('steps', -1, 'negative; got -1')):
        with pytest.raises(ValueError, match=f'`{k}` must .*{words}'):
            train_generator(model, **{**tiny, k: bad})
    with pytest.raises(ValueError, match='`n` must be a whole number, at least 1; got 0'):
        generate(settled(model), 0)
    with pytest.raises(ValueError, match='generator.eval'):
        generate(settled(model).train(), 3)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('size, width, channels', ((32, 8, 3), (16, 12, 1), (20, 64, 3)))
def test_a_saved_generator_draws_the_same_images(size, width, channels, tmp_path):
    made = Generator(torch.randn(6, 10, generator=make_generator(0)),
                     torch.linspace(.3, .6, channels), torch.full((channels,), .2), size, width)
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.add_(.3)
            m.running_var.mul_(2)
    made.contrast.fill_(.7)
    made.knows = 'something'
    save_generator(made.eval(), tmp_path/'g.pt')
    again = load_generator(tmp_path/'g.pt')
    for a, b in zip(generate(again, 9, .3, seed=4), generate(made, 9, .3, seed=4)):
        assert torch.equal(a, b)
    assert again.size == size
    assert again.knows == 'something'
    assert not again.training
    assert generate(again, 2)[0].shape == (2, channels, size, size)


def test_a_trained_generator_and_wrong_files(tmp_path):
    net = build_model('AlexNet_BN', 7, .06, seed=3)
    x = torch.rand(6, 3, 32, 32, generator=make_generator(0))
    made, _ = train_generator(net, 2, 8, width=8)
    save_generator(made, tmp_path/'g.pt')
    assert torch.equal(generate(load_generator(tmp_path/'g.pt'), 5)[0], generate(made, 5)[0])
    save_quantized(quantize(net, 'INT8', x), tmp_path/'q.pt')
    with pytest.raises(ValueError, match='file of `save_generator`'):
        load_generator(tmp_path/'q.pt')
    with pytest.raises(ValueError, match='file of `save_quantized`'):
        load_quantized(tmp_path/'g.pt')
    held = load_state(tmp_path/'g.pt')
    save_state(held | dict(width=9), tmp_path/'bad.pt')
    with pytest.raises(ValueError, match='do not fit'):
        load_generator(tmp_path/'bad.pt')
    with pytest.raises(TypeError, match='as `train_generator` returns first'):
        save_generator((made, None), tmp_path/'x.pt')


def test_the_size_is_the_models_own_and_never_guessed():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.SyncBatchNorm(4), torch.nn.ReLU(),
                              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    few = dict(steps=0, batch_size=8, width=4)
    with pytest.raises(ValueError, match='`size` must be given'):
        train_generator(wrap_model(net, .5, .25), **few)
    generator = train_generator(wrap_model(net, .5, .25, size=30), **few)[0]
    assert generate(generator, 2)[0].shape == (2, 1, 30, 30)
    assert generator.knows == 'batch-norm statistics'
    assert train_generator(build_model('ResNet_18', width=.0625), **few)[0].size == 32


@pytest.mark.parametrize('mean, std', [((0., 0., 0.), (1/255,)*3), ((.5,)*3, (.5,)*3)])
def test_a_change_of_scale_says_nothing_of_photographs(mean, std):
    net = build_model('AlexNet_BN', width=.0625, mean=mean, std=std)
    generator, _ = train_generator(net, steps=0, width=4)
    assert generator.mean.tolist() == pytest.approx([.485, .456, .406])
    assert generator.std.tolist() == pytest.approx([.229, .224, .225])
    known = build_model('AlexNet_BN', width=.0625, mean=(.4, .5, .6), std=(.2, .25, .3))
    generator, _ = train_generator(known, steps=0, width=4)
    assert generator.mean.tolist() == pytest.approx([.4, .5, .6])
    assert generator.std.tolist() == pytest.approx([.2, .25, .3])


def test_a_grey_network_has_one_mean():
    net = wrap_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), mean=(.5,), std=(.5,), size=8)
    generator, _ = train_generator(net.eval(), steps=0, width=4)
    assert generator.mean.tolist() == pytest.approx([.449])
    assert generator.std.tolist() == pytest.approx([.226])
