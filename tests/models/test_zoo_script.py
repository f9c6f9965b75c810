"benchmarks/models/zoo.py: a training that is stopped ends like one that is not; what the files say"
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robustnb.contract import predict
from robustnb.core import to_float
from robustnb.models.loading import load_model
from robustnb.models.wrapping import last_linear

sys.path.insert(0, str(Path(__file__).parents[2]/'benchmarks'/'models'))
import zoo

pytestmark = pytest.mark.usefixtures('one_thread')
name = 'small-cifar10'


@pytest.fixture
def args(tmp_path, monkeypatch):
    "Folders, and a table with one network of ten steps on a few images"
    rng = np.random.default_rng(0)
    images, y = rng.integers(0, 256, (16, 32, 32, 3), np.uint8), torch.tensor([0, 0, 1, 2]*4)
    monkeypatch.setattr(zoo, 'photographs', lambda *a: (images, y, ['cat', 'dog', 'fox']))
    monkeypatch.setattr(zoo, 'networks', {name: zoo.Network('AlexNet', .125, 'cifar10', 5, .1)})
    monkeypatch.setattr(zoo, 'batch', 8)
    monkeypatch.setattr(zoo, 'every', 1)
    return Namespace(work=tmp_path/'work', zoo=tmp_path/'zoo', out=tmp_path)


def trained(args):
    "A network that says the commonest class"
    model, *rest = zoo.trained(name, args)
    last_linear(model.net).bias.data[0] += 50
    return model, *rest


def test_a_stopped_training_ends_like_one_that_is_not(args, monkeypatch):
    whole, _, _ = zoo.trained(name, args)
    args.work = args.work/'again'
    steps, update = [], zoo.updated
    def stops(*a):
        steps.append(a)
        if len(steps) == 3: raise KeyboardInterrupt
        return update(*a)
    monkeypatch.setattr(zoo, 'updated', stops)
    with pytest.raises(KeyboardInterrupt):
        zoo.trained(name, args)
    again, classes, seconds = zoo.trained(name, args)
    assert len(steps) == 11 and seconds > 0 and len(classes) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    zoo.trained(name, args)
    assert len(steps) == 11


def test_what_the_file_and_the_table_say(args):
    zoo.saved(name, trained(args), args)
    back = load_model(args.zoo/f'{name}.safetensors')
    images, y, _ = zoo.photographs()
    row, = pd.read_csv(args.out/'zoo.csv').to_dict('records')
    right = predict(back, to_float(images)).argmax(1) == y
    assert row['accuracy'] == right.double().mean().item() == .5
    assert row['parameters'] == sum(map(torch.numel, back.parameters()))
    assert (row['smoothing'], row['epochs'], row['n']) == (.1, 5, 16)
    assert all(torch.equal(o, o.half().float()) for o in back.net.state_dict().values())


def test_too_much_for_the_folder_and_for_half_precision(args, monkeypatch):
    model, classes, seconds = trained(args)
    monkeypatch.setattr(zoo, 'most', 1e5)
    with pytest.raises(ValueError, match='more than 0.1 MB'):
        zoo.saved(name, (model, classes, seconds), args)
    assert not [*args.zoo.iterdir()] and not (args.out/'zoo.csv').exists()
    next(model.net.parameters()).data.fill_(1e5)
    with pytest.raises(ValueError, match='too large for half precision'):
        zoo.saved(name, (model, classes, seconds), args)
