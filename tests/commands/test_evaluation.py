"The command that evaluates a network: rows of `evaluate`, flags judged once, another question refused."
import json

import pandas as pd
import pytest
import torch

from robustnb.attacks.gradient import fgsm, pgd
from robustnb.attacks.threat_models import L2, Linf
from robustnb.commands import evaluation as E
from robustnb.commands.common import labelled_images
from robustnb.commands.evaluation import evaluate_command
from robustnb.commands.transfer import assess_command, quantize_command
from robustnb.evaluation.robust_accuracy import evaluate, summarize
from robustnb.models.loading import load_model, save_model
from robustnb.models.zoo import build_model

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('net')/'digits.pt'
    save_model(build_model('AlexNet_BN', 10, .0625, seed=0), path)
    return str(path)


@pytest.fixture
def judged(monkeypatch):
    "What `red_flags` was asked; it answers with one good check and one bad one"
    asked = []
    def flags(net, x, y, threat, attack, seed):
        asked.append((len(x), threat, attack, seed))
        return pd.DataFrame(dict(check=['a', 'b'], verdict=['ok', 'doubt'], figure='1 of 2',
                                 what_to_do='Look.'))
    monkeypatch.setattr(E, 'red_flags', flags)
    return asked


def test_rows_are_those_of_evaluate(weights, judged, tmp_path, capsys):
    run = lambda **more: E.evaluate_command(**dict(weights=weights, test='digits', attacks='fgsm, PGD', n=104,
                                                   eps='4/255', seed=3, out=tmp_path/'out') | more)
    said = run()
    net = load_model(weights)
    test = labelled_images(net, 104, 3, test='digits')
    x, y = test.x, torch.as_tensor(test.y)
    assert len(x) == 104
    wanted = evaluate(net, x, y, dict(fgsm=fgsm, pgd=pgd), Linf(4/255), seed=3)
    rows = pd.read_csv(tmp_path/'out'/'rows.csv', keep_default_na=False)
    assert rows.attack.unique().tolist() == ['clean', 'fgsm', 'pgd']
    for name in ('image', 'attack', 'threat', 'label', 'prediction', 'correct'):
        assert rows[name].tolist() == wanted[name].tolist(), name
    summary = pd.read_csv(tmp_path/'out'/'summary.csv')
    pd.testing.assert_frame_equal(summary, summarize(wanted), check_dtype=False)
    assert said['summary'] == summary.to_dict('records')
    assert judged == [(100, Linf(4/255), pgd, 3)], 'on the first hundred images'
    assert pd.read_csv(tmp_path/'out'/'flags.csv').verdict.tolist() == ['ok', 'doubt']
    told = capsys.readouterr().out
    assert 'percent of 104 images' in told and '1 of 2 checks speak for the number' in told
    assert 'doubt: b: 1 of 2. Look.' in told and ': a:' not in told
    facts = json.loads((tmp_path/'out'/'manifest.json').read_text())
    assert (facts['n'], facts['flags_for'], facts['attacks']) == (104, 'pgd', ['fgsm', 'pgd'])
    run()
    assert len(judged) == 1, 'what is known is not judged again'
    for other in (dict(seed=4), dict(eps='2/255'), dict(n=100)):
        with pytest.raises(SystemExit, match='answers another question'): run(**other)


def test_the_first_attack_is_judged_where_pgd_is_not_asked_for(weights, judged, tmp_path):
    said = E.evaluate_command(weights=weights, test='digits', attacks='fgsm', norm='L2', eps='.3', n=10,
                              out=tmp_path)
    assert judged == [(10, L2(.3), fgsm, 0)]
    assert said['flags_for'] == 'fgsm'


def test_flags_that_cannot_be_judged_say_why(weights, monkeypatch):
    def refuse(*args): raise ValueError('too few survivors')
    monkeypatch.setattr(E, 'red_flags', refuse)
    test = labelled_images(load_model(weights), 10, 0, test='digits')
    assert E._flag_rows(None, test, 'pgd', Linf(.1), 0) == [
        dict(check='all', verdict='not judged', figure='too few survivors', what_to_do='')]


@pytest.mark.parametrize('command, option', ((evaluate_command, 'test'), (assess_command, 'images'),
                                             (assess_command, 'test'), (quantize_command, 'images')))
def test_a_missing_folder_is_named_before_a_network_is_opened(command, option, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        command('timm:fetched', **{option: str(tmp_path/'none')}, out=str(tmp_path/'out'))
    assert str(e.value).startswith(f'FileNotFoundError: `{option}` must be a folder')
    assert 'none. Check the path' in str(e.value) and not (tmp_path/'out').exists()
