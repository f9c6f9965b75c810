"Scores of training sets: in one folder, sets are compared on the same hidden images"
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from robustnb.commands.curation import build_set_command, score_set_command
from robustnb.curation import training_sets
from robustnb.data import load_data
from robustnb.models.zoo import build_model
from robustnb.models.loading import save_model

pytestmark = pytest.mark.usefixtures('one_thread')


def test_scores_of_one_folder_are_on_the_same_hidden_images(tmp_path):
    weights = str(tmp_path/'weights.pt')
    save_model(build_model('AlexNet_BN', 10, .0625, seed=0), weights)
    score = partial(score_set_command, model=weights, test='digits', n=20,
                    width=.0625, epochs=1, seeds=1, out=str(tmp_path/'scores'))
    out = tmp_path/'scores'
    for k in 'ab':
        load_data('digits', 'train')[list(range(ord(k) - 97, 60, 2))].save(tmp_path/k)
    score(str(tmp_path/'a'))
    hidden = (out/'hidden'/'data.npy').read_bytes()
    first = pd.read_csv(out/'answers.csv')
    save_model(build_model('AlexNet_BN', 10, .0625, seed=1), tmp_path/'other'/'weights.pt')
    for k in range(10):
        (tmp_path/'moved'/'test'/str(k)).mkdir(parents=True)
        Image.new('RGB', (32, 32), (k, k, k)).save(tmp_path/'moved'/'test'/str(k)/'a.png')
    for given, said in ((dict(n=30), 'n is 20 there and 30 here'),
                        (dict(test=str(tmp_path/'moved')), 'images is'),
                        (dict(model=str(tmp_path/'other'/'weights.pt')), 'surrogates is')):
        with pytest.raises(SystemExit, match=f'`out` answers another question: {said}'):
            score(str(tmp_path/'a'), **given)
    assert (out/'hidden'/'data.npy').read_bytes() == hidden
    # more sets are the same question
    score(f"{tmp_path/'a'}, {tmp_path/'b'}")
    both = pd.read_csv(out/'answers.csv')
    assert set(both.set) == {'a', 'b'}
    assert both[both.set == 'a'].reset_index(drop=True).equals(first)
    for given, said in ((dict(seeds=0), '`seeds` must be a whole number, at least 1'),
                        (dict(width=0.), '`width` must be in'),
                        (dict(epochs=0), '`epochs` from 1 to 200')):
        with pytest.raises(SystemExit, match=said):
            score(str(tmp_path/'a'), **given | dict(out=str(tmp_path/'none')))
        assert not (tmp_path/'none').exists(), 'before hidden images are made'


def test_a_killed_building_goes_on(tmp_path, monkeypatch):
    save_model(build_model('AlexNet_BN', 10, .0625, seed=0), tmp_path/'weights.pt')
    build = lambda out: build_set_command('noise', str(tmp_path/'weights.pt'), 'digits', n=20, out=str(out))
    saved = []
    def save(*args, whole=training_sets.save_state):
        whole(*args)
        saved.append(args)
        if len(saved) == 1: raise KeyboardInterrupt
    monkeypatch.setattr(training_sets, 'save_state', save)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        build(tmp_path/'made')
    assert len([*(tmp_path/'made'/'sources').iterdir()]) == 1
    build(tmp_path/'made')
    assert len(saved) == 2, 'the first source was found again'
    build(tmp_path/'whole')
    assert not (tmp_path/'made'/'sources').exists()
    for name in ('data.npy', 'label.npy', 'provenance.csv'):
        assert (tmp_path/'made'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()


def test_hidden_images_of_ones_own(tmp_path):
    digits = load_data('digits', 'train')
    digits[list(range(60))].save(tmp_path/'a')
    (tmp_path/'corrupted').mkdir()
    few = digits[list(range(100, 110))]
    for name in ('fog', 'snow'):
        np.save(tmp_path/'corrupted'/f'{name}.npy', np.concatenate([few.images//s for s in (1, 2, 3, 4, 5)]))
    np.save(tmp_path/'corrupted'/'labels.npy', np.tile(few.y, 5))
    score = partial(score_set_command, str(tmp_path/'a'), width=.0625, epochs=1, seeds=1)
    made = score(hidden=str(tmp_path/'corrupted'), each=8, out=str(tmp_path/'out'))
    answers = pd.read_csv(tmp_path/'out'/'answers.csv')
    assert made['n'] == 80
    assert answers.groupby(['family', 'severity', 'model']).n.sum().eq(8).all()
    assert {'fog', 'snow'} <= set(made['rows'][0])
    assert 'seen' not in made['rows'][0]
    with pytest.raises(SystemExit, match='`out` answers another question: hidden is'):
        score(hidden=str(tmp_path/'corrupted'), each=4, out=str(tmp_path/'out'))
    for given, said in (
            (dict(hidden=str(tmp_path/'corrupted'), test='digits'), '`hidden` must stand alone'),
            ({}, '`model` must name networks'),
            (dict(hidden=str(tmp_path/'none')), '`hidden` must be a folder')):
        with pytest.raises(SystemExit, match=said):
            score(**given, out=str(tmp_path/'more'))
        assert not (tmp_path/'more').exists()
