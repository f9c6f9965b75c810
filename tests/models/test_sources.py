"Networks by name: timm, torchvision, somebody's module; what cannot be fetched or built"
import sys
import pytest
import torch
import torchvision
from torch import nn

from helpers_models import images
from robustnb.files import save_state
from robustnb.models.loading import load_model
from robustnb.models.sources import build_source, is_source
from robustnb.models.wrapping import model_name

timm = pytest.importorskip('timm', reason='timm is not installed')


def test_timm_network_with_its_weights_states_the_rest(tmp_path):
    net = timm.create_model('resnet10t', num_classes=7).eval()
    save_state(dict(state_dict_ema=net.state_dict(), epoch=1), tmp_path/'w.pt')
    model = load_model('timm:resnet10t', tmp_path/'w.pt')
    assert (model.n_classes, model.image_size, model.channels) == (7, net.pretrained_cfg['input_size'][1], 3)
    assert model_name(model) == 'resnet10t'
    assert model.classes is None
    x = images(2, 64)
    assert torch.equal(model(x), net((x - model.normalize.mean)/model.normalize.std))


def test_classes_of_imagenet_come_with_a_thousand_logits(tmp_path):
    net = timm.create_model('mobilenetv3_small_050')
    save_state(net.state_dict(), tmp_path/'w.pt')
    model = load_model('timm:mobilenetv3_small_050', tmp_path/'w.pt')
    assert model.classes[:2] == ('n01440764', 'n01443537')
    assert len(model.classes) == 1000


def test_a_failed_download_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs): raise OSError('Name or\nservice not known')
    monkeypatch.setattr(timm, 'create_model', fail)
    monkeypatch.setattr(torchvision.models, 'get_model', fail)
    for name in ('timm:resnet10t', 'torchvision:resnet18'):
        with pytest.raises(ValueError, match=rf'those of {name} could not be \(OSError: Name or service'):
            load_model(name)


def test_names_that_do_not_exist():
    for name, text in (('timm:resnet10tt', 'Did you mean timm:resnet10t'), ('timm:nothing_like_it', 'got'),
                       ('torchvision:fasterrcnn_resnet50_fpn', 'must be a classifier'),
                       ('no_such:thing', 'no_such cannot'), ('torch.nn:Conv3', 'Did you mean'),
                       ('torch.nn:Conv2d', 'needs no argument'),
                       ('collections:OrderedDict', 'needs no argument|made a OrderedDict')):
        with pytest.raises((ValueError, TypeError), match=text):
            build_source(name)
    assert not is_source('C:\\net.pt')
    assert not is_source('../nets/a.pt')


def test_torchvision_is_told_unless_the_file_is_a_published_one(tmp_path):
    net = torchvision.models.squeezenet1_1().eval()
    save_state(net.state_dict(), tmp_path/'mine.pth')
    with pytest.raises(ValueError, match='`mean` must be given'):
        load_model('torchvision:squeezenet1_1', tmp_path/'mine.pth')
    published = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition('/')[2]
    save_state(net.state_dict(), tmp_path/published)
    model = load_model('torchvision:squeezenet1_1', tmp_path/published)
    assert (model.image_size, model.crop_pct, model.classes[0]) == (224, 224/256, 'tench')
    assert model_name(model) == 'squeezenet1_1'


def test_somebodys_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path/'my_own_nets.py').write_text('from torch import nn\ndef small():\n'
                                           '    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))\n')
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    save_state({'model.' + k: v for k, v in net.state_dict().items()}, tmp_path/'w.pt')
    given = dict(mean=(127.5,)*3, std=(127.5,)*3, size=4, classes=list('abcd'))
    model = load_model('my_own_nets:small', tmp_path/'w.pt', **given)
    x = images(2, 4)
    assert torch.allclose(model(x), net(2*x - 1), atol=1e-6)
    assert (model.classes, model.image_size, model_name(model)) == (tuple('abcd'), 4, 'Sequential')
    assert sys.path == before
    with pytest.raises(ValueError, match='`mean` must be given'):
        load_model('my_own_nets:small')
    with pytest.raises(ValueError, match='`width` belongs to AlexNet,'):
        load_model('my_own_nets:small', width=.5)
    with pytest.raises(ValueError, match='`n_classes` must agree'):
        load_model('my_own_nets:small', n_classes=3, mean=(.5,)*3, std=(.5,)*3)


def test_a_function_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path/'my_failing_nets.py').write_text("def net(): raise OSError('no such weights')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='`name` .*my_failing_nets:net raised OSError: no such weights'):
        load_model('my_failing_nets:net')
