"Networks by name: torchvision as reference, sizes and widths, weights from the seed"
import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from helpers_models import images, randomize, same
from robustnb.models.graph import fold_batchnorm
from robustnb.models.wrapping import last_linear
from robustnb.models.zoo import build_model, model_names

fixed = ('AlexNet', 'AlexNet_BN', 'VGG_16', 'VGG_19', 'ViT')


@pytest.mark.parametrize('name', model_names)
def test_gradients_reach_every_weight_and_the_pixels(name):
    model = build_model(name, n_classes=4, width=.125).train()
    x = images(8).requires_grad_()
    logits = model(x)
    assert logits.shape == (8, 4)
    F.cross_entropy(logits, torch.arange(8) % 4).backward()
    assert x.grad.abs().sum() > 0
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert torch.isfinite(p.grad).all(), n


@pytest.mark.parametrize('name', model_names)
@pytest.mark.parametrize('width', (.01, .25))
def test_widths(name, width):
    model = build_model(name, n_classes=3, width=width)
    with torch.no_grad():
        out = model(images(2))
    assert out.shape == (2, 3)
    assert torch.isfinite(out).all()
    assert last_linear(model).weight.shape[0] == 3
    assert model.net.features[0].in_channels == 3


def small_inputs(net, kind):
    "torchvision's network with the changes for 32x32 that the papers' CIFAR versions have"
    if kind == 'resnet':
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    else:
        net.avgpool = nn.Identity()
        net.classifier[0] = nn.Linear(512, 4096)
    return net.eval()


@pytest.mark.parametrize('name, reference, kind',
                         [('ResNet_18', 'resnet18', 'resnet'),
                          ('ResNet_50', 'resnet50', 'resnet'), ('VGG_16', 'vgg16_bn', 'vgg')])
@torch.no_grad()
def test_same_function_as_torchvision(name, reference, kind):
    ours = randomize(build_model(name, mean=(0, 0, 0), std=(1, 1, 1)))
    theirs = small_inputs(getattr(torchvision.models, reference)(weights=None, num_classes=10),
                          kind)
    state = theirs.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in ours.net.state_dict().values()]
    theirs.load_state_dict(dict(zip(state, ours.net.state_dict().values())))
    assert same(ours(images()), theirs(images()), 1e-5)


@pytest.mark.parametrize('name', [n for n in model_names if n not in fixed])
@torch.no_grad()
def test_other_sizes(name):
    for size in (28, 64):
        assert build_model(name, width=.125)(images(1, size)).shape == (1, 10)


@pytest.mark.parametrize('name', fixed)
def test_fixed_size_is_named_also_after_folding(name):
    model = build_model(name, width=.125)
    for m in (model, fold_batchnorm(model)):
        with pytest.raises(ValueError, match='32x32'):
            m(images(1, 40))


def test_vgg_19_learns():
    model = build_model('VGG_19', n_classes=4, width=.125, seed=1).train()
    x = images(32)
    y = torch.arange(32) % 4
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.
    opt = torch.optim.SGD(model.parameters(), .02, momentum=.9)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < .5*losses[0], losses
    assert losses[-1] < .7, losses


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    a = build_model('AlexNet', width=.125, seed=2)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    b = build_model('AlexNet', width=.125, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_he_initialisation_keeps_the_variance():
    model = build_model('VGG_16', width=.5)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert abs(m.weight.var().item()*m.weight[0].numel()/2 - 1) < .15
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize('kw, text', [
    (dict(name='ResNet_19'), 'ResNet_1'), (dict(n_classes=1), 'n_classes'),
    (dict(n_classes=True), 'n_classes'), (dict(n_classes=2.5), 'n_classes'),
    (dict(width=0), 'width'), (dict(width=float('inf')), 'width'),
    (dict(width='wide'), 'width'), (dict(std=(1, 1)), 'one value per channel'),
    (dict(mean=(0, 0, float('nan'))), '`mean` must be finite')])
def test_build_refuses(kw, text):
    with pytest.raises(ValueError, match=text):
        build_model(**{**dict(name='AlexNet', width=.125), **kw})


def test_inception_has_the_channels_of_googlenet():
    convs = lambda m: [(o.in_channels, o.out_channels) for o in m.modules()
                       if isinstance(o, nn.Conv2d)]
    theirs = [m for m in torchvision.models.googlenet(weights=None, init_weights=False).modules()
              if type(m).__name__ == 'Inception']
    ours = [m for m in build_model('Inception_BN').modules() if type(m).__name__ == '_Branches']
    assert len(ours) == 9
    assert [convs(m) for m in ours[1:]] == [convs(m) for m in theirs[1:]]
    # what comes in is 64 channels here, 192 there
    assert [o for _, o in convs(ours[0])] == [o for _, o in convs(theirs[0])]
    biases = [m.bias is not None for m in build_model('Inception_BN').modules()
              if isinstance(m, nn.Conv2d)]
    assert biases == [True]*2 + [False]*54 + [True], 'where no batch norm follows'


def test_copies_and_pickles():
    model = build_model('MobileNetV2', width=.125)
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert m.name == 'MobileNetV2'
        assert torch.equal(m(images()), model(images()))
    folded = fold_batchnorm(model)
    assert same(copy.deepcopy(folded)(images()), model(images()))
    assert folded.n_classes == 10
