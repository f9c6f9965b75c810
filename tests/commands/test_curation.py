"Scores of training sets: in one folder, sets are compared on the same hidden images"
from functools import partial

import pandas as pd
import pytest
from PIL import Image

from robustnb.commands.curation import score_set_command
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
    for given, said in ((dict(seeds=0), '`seeds` must be at least 1'),
                        (dict(width=0.), '`width` must be in'),
                        (dict(epochs=0), '`epochs` from 1 to 200')):
        with pytest.raises(SystemExit, match=said):
            score(str(tmp_path/'a'), **given | dict(out=str(tmp_path/'none')))
        assert not (tmp_path/'none').exists(), 'before hidden images are made'
