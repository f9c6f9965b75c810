"Files of weights: state_dicts of all kinds, files of something else, what is not saved"
import json
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers_models import images, randomize
from robustnb.files import load_state, save_state
from robustnb.models import loading
from robustnb.models.loading import load_model, save_model
from robustnb.models.wrapping import wrap_model
from robustnb.models.zoo import build_model


@pytest.mark.parametrize('name', ('AlexNet', 'Inception_BN', 'ResNet_18'))
@pytest.mark.parametrize('form',
                         ('plain', 'module', 'nested', 'compiled', 'normalized', 'no counters'))
def test_state_dicts_of_all_kinds(tmp_path, name, form):
    model = randomize(build_model(name, n_classes=6, width=.125, mean=(.1, .2, .3),
                                  std=(.4, .5, .6), seed=3))
    state = (model if form == 'normalized' else model.net).state_dict()
    state = {dict(module='module.', compiled='_orig_mod.').get(form, '') + k: v
             for k, v in state.items()}
    if form == 'no counters':
        state = {k: v for k, v in state.items() if 'num_batches' not in k}
    save_state(dict(epoch=3, model=state) if form == 'nested' else state, tmp_path/'w.pt')
    given = {} if form == 'normalized' else dict(mean=(.1, .2, .3), std=(.4, .5, .6))
    back = load_model(name, tmp_path/'w.pt', width=.125, **given)
    assert back.n_classes == 6
    assert not back.training
    assert torch.equal(back(images()), model(images()))


def test_files_of_something_else(tmp_path):
    path = tmp_path/'w.pt'
    model = build_model('ResNet_18', width=.125)
    save_model(model, path)
    for kw, text in ((dict(name='VGG_16'), '`name` must agree with the file: got \'VGG_16\''),
                     (dict(width=.25), 'holds ResNet_18 with 10 classes and width 0.125')):
        with pytest.raises(ValueError, match=text):
            load_model(**{**dict(name='ResNet_18', path=path), **kw})
    assert load_model('ResNet_18', path, mean=(0, 0, 0)).normalize.mean.abs().sum() == 0
    save_state(model.net.state_dict(), path)
    with pytest.raises(ValueError, match=r'does not fit ResNet_18 .*width 1 \(.*other shapes: '
                                         r'features.0.weight \(8, 3, 3, 3\) instead of \(64'):
        load_model('ResNet_18', path)
    with pytest.raises(ValueError, match='does not fit ResNet_18 with 4 classes'):
        load_model('ResNet_18', path, n_classes=4, width=.125)
    with pytest.raises(ValueError, match='does not fit AlexNet.*missing.*unexpected'):
        load_model('AlexNet', path, width=.125)
    save_state(dict(epoch=1, history=[1, 2]), path)
    with pytest.raises(ValueError, match="holds a dict with .'epoch', 'history'."):
        load_model('ResNet_18', path)
    save_state(dict(), path)
    with pytest.raises(ValueError, match='state_dict'):
        load_model('ResNet_18', path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='w.pt'):
        load_model('ResNet_18', path)
    with pytest.raises(FileNotFoundError, match='none.pt'):
        load_model('ResNet_18', tmp_path/'none.pt')


def test_save_refuses_what_it_could_not_read_back(tmp_path):
    model = build_model('AlexNet', n_classes=2, width=.125)
    with pytest.raises(ValueError, match='must hold 2 names'):
        save_model(model, tmp_path/'w.pt', classes=('a', 'b', 'c'))
    with pytest.raises(ValueError, match='got a Conv2d'):
        save_model(wrap_model(nn.Conv2d(3, 2, 1), (.5,)*3, (.5,)*3), tmp_path/'w.pt')
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path/'w.pt', classes=('a', 'b'))
    save_model(load_model(tmp_path/'w.pt'), tmp_path/'again.pt')
    assert load_model(path=tmp_path/'again.pt').classes == ('a', 'b')
    assert set(load_state(tmp_path/'w.pt')) == {'format', 'name', 'n_classes', 'width', 'mean',
                                                'std', 'classes', 'state_dict'}


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    "A zoo/ beside a package elsewhere, and the network in it"
    monkeypatch.setattr(loading.inspect, 'getfile', lambda o: str(tmp_path/'robustnb'/'files.py'))
    (tmp_path/'zoo').mkdir()
    model = randomize(build_model('ResNet_18', 3, .125, (.1, .2, .3), (.4, .5, .6)))
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.net.state_dict().items()}
    told = dict(name='ResNet_18', n_classes=3, width=.125, mean=(.1, .2, .3), std=(.4, .5, .6),
                classes=['cat', 'dog', 'fox'], trained=dict(epochs=3))
    save_file(state, tmp_path/'zoo/small-cifar10.safetensors', {'robustnb.model': json.dumps(told)})
    model.net.load_state_dict(state)
    return model, tmp_path/'zoo/small-cifar10.safetensors', told


def test_zoo_by_name_and_by_file(zoo):
    model, path, _ = zoo
    for back in (load_model('zoo:small-cifar10'), load_model(path), load_model('zoo:other', path)):
        assert torch.equal(back(images()), model(images()))
        assert (back.name, back.width, back.image_size) == ('ResNet_18', .125, 32)
        assert back.classes == ('cat', 'dog', 'fox')
        assert {o.dtype for o in back.parameters()} == {torch.float32}
    save_model(back, path.with_suffix('.pt'))
    assert torch.equal(load_model(path.with_suffix('.pt'))(images()), model(images()))
    with pytest.raises(ValueError, match='holds ResNet_18 with 3 classes'):
        load_model('zoo:small-cifar10', n_classes=10)


def test_zoo_says_what_there_is_or_where(zoo):
    _, path, told = zoo
    with pytest.raises(ValueError, match="zoo: and one of small-cifar10; got 'zoo:large'"):
        load_model('zoo:large')
    save_file({'a': torch.ones(2)}, path, {'robustnb.model': json.dumps(dict(told, name='Other'))})
    with pytest.raises(ValueError, match='Other'):
        load_model('zoo:small-cifar10')
    save_file({'a': torch.ones(2)}, path, {'robustnb.model': '{'})
    with pytest.raises(ValueError, match='small-cifar10.safetensors is damaged'):
        load_model('zoo:small-cifar10')
    path.unlink()
    settings = ConfigParser(delimiters=['='])
    settings.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
    own = settings['DEFAULT']
    where = f"{own['git_url']}/raw/{own['branch']}/zoo/large.safetensors"
    with pytest.raises(FileNotFoundError, match=f'Download {where} and give that file'):
        load_model('zoo:large')
