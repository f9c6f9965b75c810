"""The commands on descriptors, interrupted and given again: nothing is trained or asked twice, and
the end is that of the undisturbed run."""
from functools import partial

import pandas as pd
import pytest
import torch

from robustnb.commands import descriptors
from robustnb.descriptors import students
from robustnb.files import load_state
from robustnb.descriptors.students import load_descriptor

pytestmark = pytest.mark.usefixtures('one_thread')
train = descriptors.train_descriptor_command
distill = descriptors.distill_command
attack = descriptors.attack_descriptors_command
photos = 'digits:train[0:24]'


@pytest.fixture
def epochs(monkeypatch):
    """One mark for each epoch that was trained; the power fails after two of them as long as 'dark'
    is among them"""
    save = students.save_state
    trained = []
    def watched(state, path):
        save(state, path)
        if 'mark' in state:
            trained.append(str(path.name))
        if trained[:1] == ['dark'] and len(trained) == 3: raise KeyboardInterrupt
    monkeypatch.setattr(students, 'save_state', watched)
    return trained


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    train(photos, 'ResNet_18', str(out), .0625, 1)
    return str(out/'descriptor.pt')


@pytest.fixture
def questions(monkeypatch):
    "Images that the black box was asked about"
    asked = []
    box = descriptors._box
    def counting(name):
        answer = box(name)
        def ask(x):
            asked.extend(range(len(x)))
            return answer(x)
        return ask
    monkeypatch.setattr(descriptors, '_box', counting)
    return asked


def same(a, b):
    a = load_descriptor(a).state_dict()
    b = load_descriptor(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_descriptor_network_goes_on_where_it_stopped(epochs, tmp_path):
    run = partial(train, photos, 'ResNet_18', width=.0625, epochs=4, copies=2)
    run(out=str(tmp_path/'whole'))
    epochs[:] = ['dark']
    with pytest.raises(KeyboardInterrupt):
        run(out=str(tmp_path/'cut'))
    assert not (tmp_path/'cut'/'descriptor.pt').exists()
    epochs[:] = []
    run(out=str(tmp_path/'cut'))
    assert len(epochs) == 2
    assert same(tmp_path/'cut'/'descriptor.pt', tmp_path/'whole'/'descriptor.pt')
    assert pd.read_csv(
        tmp_path/'cut'/'history.csv').equals(pd.read_csv(tmp_path/'whole'/'history.csv'))
    with pytest.raises(SystemExit, match='belongs to another run: its recipe'):
        train(photos, 'ResNet_18', str(tmp_path/'cut'), .0625, 5, 2)
    assert load_state(tmp_path/'cut'/'checkpoint.pt')['history'][-1]['epoch'] == 4


def test_students_ask_and_learn_once(epochs, questions, teacher, tmp_path):
    run = partial(distill, teacher, photos, 'ResNet_18, Caffe34', width=.0625, epochs=3, copies=2)
    run(out=str(tmp_path/'whole'))
    assert len(questions) == 48
    assert len(epochs) == 6
    epochs[:] = ['dark']
    questions[:] = []
    with pytest.raises(KeyboardInterrupt):
        run(out=str(tmp_path/'cut'))
    epochs[:] = []
    questions[:] = []
    run(out=str(tmp_path/'cut'))
    assert not questions
    assert len(epochs) == 4
    assert all(same(tmp_path/'cut'/f'{k}.pt', tmp_path/'whole'/f'{k}.pt')
               for k in ('ResNet_18', 'Caffe34'))
    assert pd.read_csv(
        tmp_path/'cut'/'fidelity.csv').equals(pd.read_csv(tmp_path/'whole'/'fidelity.csv'))
    questions[:] = []
    for given, said in ((dict(width=0.), '`width` in'), (dict(epochs=0), '`epochs` must be'),
                        (dict(models='ResNet_18,nobody'), "got 'nobody'")):
        with pytest.raises(SystemExit, match=said):
            distill(teacher, photos, **dict(models='ResNet_18', out=str(tmp_path/'none')) | given)
    assert not questions, 'a wrong argument costs no question'


def test_an_attack_asks_once(questions, teacher, tmp_path):
    distill(teacher, photos, 'ResNet_18', str(tmp_path/'students'), .0625, 1, 1)
    questions[:] = []
    run = partial(attack, teacher, str(tmp_path/'students'/'ResNet_18.pt'),
                  'digits:test[0:250]', n_pairs=1, queries=4, out=str(tmp_path/'attacked'))
    run()
    rows = pd.read_csv(tmp_path/'attacked'/'rows.csv')
    zipped = (tmp_path/'attacked'/'submission.zip').read_bytes()
    asked = len(questions)
    assert len(rows) == 5
    assert 0 < asked <= 5*4 + 20
    assert rows.queries.max() <= 4
    assert (rows.ssim >= .95).all()
    questions[:] = []
    run()
    assert not questions
    assert pd.read_csv(tmp_path/'attacked'/'rows.csv').equals(rows)
    assert (tmp_path/'attacked'/'submission.zip').read_bytes() == zipped
    with pytest.raises(SystemExit, match='`queries` must be at least 2'):
        run(queries=0, out=str(tmp_path/'none'))
    assert not questions
    assert not (tmp_path/'none').exists()
