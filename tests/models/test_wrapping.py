"Any network behind its normalisation: timm's own values, the last layer, what is refused"
import pytest
import torch
import torchvision
from torch import nn

from helpers_models import images, imagenet, randomize, same
from robustnb.models.graph import fold_batchnorm
from robustnb.models.wrapping import batchnorms, last_linear, read_classes, wrap_model
from robustnb.models.zoo import build_model, model_names


@pytest.mark.parametrize('name', model_names)
def test_the_last_layer_makes_the_logits_of_all_nine(name):
    model = build_model(name, 7, width=.125)
    layer = last_linear(model)
    layer.weight.data.zero_()
    layer.bias.data.copy_(torch.arange(7.))
    assert model(images(1)).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert isinstance(layer, nn.Conv2d if name == 'Inception_BN' else nn.Linear)


norms = dict(AlexNet=0, AlexNet_BN=5, VGG_16=13, VGG_19=16, Inception_BN=54, MobileNetV2=53, ResNet_18=20,
             ResNet_50=53, ResNet_152=155)


@pytest.mark.parametrize('name, n', norms.items())
def test_batch_norms_of_all_nine_are_found(name, n):
    assert len(batchnorms(build_model(name, 7, width=.125))) == n


@torch.no_grad()
def test_timm_network_brings_its_own_normalisation():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    net = timm.create_model('resnet18', pretrained=False, num_classes=7)
    model = randomize(wrap_model(net))
    assert torch.allclose(model.normalize.mean.flatten(), torch.tensor(imagenet['mean']))
    assert torch.allclose(model.normalize.std.flatten(), torch.tensor(imagenet['std']))
    x = images(2, 64)
    assert same(model(x), net((x - model.normalize.mean)/model.normalize.std), 1e-6)
    folded = fold_batchnorm(model)
    assert same(folded(x), model(x))
    assert not batchnorms(folded)
    assert last_linear(model).out_features == 7
    assert torch.allclose(wrap_model(net, (.5,)*3, (.5,)*3).normalize.mean, torch.tensor(.5))


def test_wrap_refuses():
    with pytest.raises(ValueError, match='torchvision ones do not'):
        wrap_model(torchvision.models.resnet18(weights=None))
    with pytest.raises(ValueError, match='takes 3 channels; got 1 values'):
        wrap_model(nn.Conv2d(3, 2, 1), .5, .5)
    with pytest.raises(ValueError, match='one value per channel'):
        wrap_model(nn.Conv2d(3, 2, 1), (.5,)*3, (.5,)*2)
    with pytest.raises(TypeError, match='nn.Module'):
        wrap_model(lambda x: x, (.5,)*3, (.5,)*3)
    with pytest.raises(TypeError, match='as it is'):
        wrap_model(build_model('AlexNet', width=.125), (.5,)*3, (.5,)*3)


@pytest.mark.parametrize('text, names', (
    ('{"0": "a", "1": "b"}', 'ab'), ('{"b": 1, "a": 0}', 'ab'), ('["b", "a"]', 'ba'),
    ('{"0": ["n01", "a"], "1": ["n02", "b"]}', ('n01', 'n02'))))
def test_class_names_in_json(tmp_path, text, names):
    (tmp_path/'c.json').write_text(text)
    assert read_classes(tmp_path/'c.json', 2) == tuple(names)


@pytest.mark.parametrize('text, words', (
    ('{"a": ', 'is damaged'), ('{"a": 0, "b": 2}', 'a dict that is none'),
    ('{"a": 0, "b": 0}', 'a dict that is none')))
def test_class_names_that_cannot_be_put_in_order(tmp_path, text, words):
    (tmp_path/'c.json').write_text(text)
    with pytest.raises((ValueError, TypeError), match=f'`classes` must .*{words}'):
        read_classes(tmp_path/'c.json')
