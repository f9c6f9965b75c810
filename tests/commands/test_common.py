"""The commands that assess a network and score training sets: interrupted, asked again, asked
something else, their files damaged."""
from functools import partial

import pandas as pd
import pytest
from PIL import Image

from robustnb.commands import common as cli
from robustnb.data import load_data
from robustnb.models.zoo import build_model
from robustnb.models.loading import save_model
from robustnb.transfer.study import Study

pytestmark = pytest.mark.usefixtures('one_thread')
assess = cli.assess_command.__wrapped__


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'train_generator', partial(
        cli.train_generator, steps=5, width=16, batch_size=16, device='cpu'))
    save_model(build_model('AlexNet_BN', 10, .0625, seed=0), tmp_path/'weights.pt')
    return str(tmp_path/'weights.pt')


@pytest.fixture
def asked(monkeypatch):
    "The formats that are really assessed, in turn; the power fails at POT4 as long as 'dark' is among them"
    rows = Study.rows
    asked = []
    def watched(self, spec):
        if 'dark' in asked and str(spec) == 'POT4': raise KeyboardInterrupt
        asked.append(str(spec))
        return rows(self, spec)
    monkeypatch.setattr(Study, 'rows', watched)
    return asked


def test_an_interrupted_assessment_goes_on(weights, asked, tmp_path):
    assess(weights, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'whole'))
    asked[:] = ['dark']
    with pytest.raises(KeyboardInterrupt):
        assess(weights, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'cut'))
    assert not (tmp_path/'cut'/'report.html').exists()
    kept = (tmp_path/'cut'/'generator.pt').stat().st_mtime_ns
    asked[:] = []
    assess(weights, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'cut'))
    assert asked == ['POT4', 'INT4/INT8']
    assert (tmp_path/'cut'/'generator.pt').stat().st_mtime_ns == kept
    for name in ('report_table.csv', 'report_layers.csv'):
        pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path/k/name) for k in ('cut', 'whole')))
    table = pd.read_csv(tmp_path/'cut'/'report_table.csv')
    assert list(table.format) == ['INT8', 'POT4', 'INT4/INT8']
    assert table.js[0] < table.js[1]
    asked[:] = []
    assess(weights, formats='INT4/INT8,INT8,FLOAT4', out=str(tmp_path/'cut'))
    assert asked == ['FLOAT4_E2']
    assert list(pd.read_csv(tmp_path/'cut'/'report_table.csv').format) == [
        'INT4/INT8', 'INT8', 'FLOAT4_E2']


def test_an_assessment_keeps_to_its_question(weights, asked, tmp_path):
    out = tmp_path/'out'
    assess(weights, formats='INT8', out=str(out))
    with pytest.raises(SystemExit, match=r"threat is 'Linf\(eps=0.0039.*Name another folder"):
        assess(weights, formats='INT8', eps='2/255', out=str(out))
    with pytest.raises(SystemExit, match='seed is 0 there and 1 here'):
        assess(weights, formats='INT8', seed=1, out=str(out))
    save_model(build_model('AlexNet_BN', 10, .0625, seed=1), weights)
    with pytest.raises(SystemExit, match='network is'):
        assess(weights, formats='INT8', out=str(out))
    with pytest.raises(SystemExit, match='test is None there'):
        assess(str(weights), formats='INT8', test='digits', out=str(out))
    with pytest.raises(SystemExit, match='must not name one twice'):
        assess(weights, formats='INT8,INT8', out=str(tmp_path/'new'))
    assess(weights, formats='INT8', test='digits', n_test=20, out=str(tmp_path/'tested'))
    with pytest.raises(SystemExit, match="test is '.*' there and None here"):
        assess(weights, formats='INT8', out=str(tmp_path/'tested'))
    assert asked == ['INT8', 'INT8']
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('folder, content', [
    ('formats', ''), ('formats', '[1, 2]'), ('formats', '{"row": {}, "layers": []}'),
    ('layers', '[]'), ('layers', '[{"format": ')])
def test_a_damaged_file_is_named(weights, asked, tmp_path, folder, content):
    out = tmp_path/'out'
    assess(weights, formats='INT8', out=str(out))
    (out/folder/'INT8.json').write_text(content)
    with pytest.raises(SystemExit, match='INT8.json is damaged .*Delete it'):
        assess(weights, formats='INT8', out=str(out))
    assert asked == ['INT8']


def test_scores_of_one_folder_are_on_the_same_hidden_images(weights, tmp_path):
    score = partial(cli.score_set_command.__wrapped__, surrogates=weights, data='digits', n=20,
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
                        (dict(data=str(tmp_path/'moved')), 'images is'),
                        (dict(surrogates=str(tmp_path/'other'/'weights.pt')), 'surrogates is')):
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
