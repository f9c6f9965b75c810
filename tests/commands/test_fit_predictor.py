"robustnb fit-predictor: what is written, and each refusal"
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustnb.metrics import r2
from robustnb.commands.fit_predictor import fit_predictor_command as fit
from robustnb.transfer.predictor import load_predictor
from robustnb.transfer.predictor import predict_losses


@pytest.fixture
def runs(tmp_path):
    for k, name in enumerate('abc'):
        js = 10**np.random.default_rng(k).uniform(-3, -.3, 24)
        table = pd.DataFrame(dict(format=np.repeat([f'F{i}' for i in range(12)], 2), n_classes=10,
                                  eps=np.tile([.5, 1], 12)/255, js=np.repeat(js[:12], 2)))
        table = table.assign(flips=table.js**.9, noise=3*table.js, activation_noise=table.js/2,
                             robust_flips=js**.7, measured_loss=table.js/(table.js+.2),
                             measured_robust_loss=js/(js+.1))
        (tmp_path/name).mkdir()
        table.to_csv(tmp_path/name/'report_table.csv', index=False)
    return tmp_path


def test_tables_links_and_scores(runs, capsys):
    fit(','.join(str(runs/o) for o in 'abc'), out=str(runs/'out'), apply=str(runs/'a'))
    loss = pd.read_csv(runs/'out'/'transfer_lomo.csv')
    robust = pd.read_csv(runs/'out'/'robust_lomo.csv')
    # one row a format, not one a budget
    assert list(loss.columns[:7]) == ['model', 'dataset', 'format', 'predicted_loss', 'predicted_loss_lo',
                                      'predicted_loss_hi', 'measured_loss']
    for table, name in ((loss, 'predicted_loss'), (robust, 'predicted_robust_loss')):
        assert (table[f'{name}_lo'] <= table[name]).all() and (table[name] <= table[f'{name}_hi']).all()
        assert (table[f'{name}_lo'] < table[f'{name}_hi']).all()
    assert len(loss) == 36
    assert {'eps', 'predicted_robust_loss', 'measured_robust_loss'} <= set(robust)
    assert len(robust) == 72
    scores = json.loads((runs/'out'/'manifest.json').read_text())['scores']
    assert scores[0]['r2'] == pytest.approx(r2(loss.measured_loss, loss.predicted_loss), abs=1e-3)
    assert scores[1]['rows'] == 72
    assert scores[1]['networks'] == 3
    again = predict_losses(pd.read_csv(runs/'a'/'report_table.csv'), runs/'out'/'predictors.json')
    assert np.allclose(pd.read_csv(runs/'out'/'predicted.csv').predicted_robust_loss,
                       again.predicted_robust_loss)
    assert load_predictor('loss', runs/'out'/'predictors.json').models == ('a', 'b', 'c')
    assert 'mae' in capsys.readouterr().out


@pytest.mark.parametrize('given, said', [
    ('', 'at least one'), ('a,a', 'twice'), ('a', 'at least 2 models'),
    ('a,nowhere', 'robustnb assess with --test'), ('a,deep/a', 'different names')])
def test_refusals(runs, given, said):
    (runs/'deep').mkdir()
    (runs/'deep'/'a').symlink_to(runs/'a')
    with pytest.raises(SystemExit, match=said):
        fit(','.join(str(runs/o) if o else '' for o in given.split(',')), out=str(runs/'out'))
    assert not (runs/'out'/'predictors.json').exists()


def test_what_is_to_be_predicted_must_be_there(runs):
    for words in ('`apply` must name folders with a report_table.csv', 'damaged'):
        with pytest.raises(SystemExit, match=words):
            fit(','.join(str(runs/o) for o in 'abc'), out=str(runs/'out'), apply=str(runs/'mine'))
        assert not (runs/'out').exists(), 'before anything is written'
        (runs/'mine').mkdir(exist_ok=True)
        (runs/'mine'/'report_table.csv').write_text('"format,js\nF1,0\n')


def test_an_assessment_without_measured_losses_is_refused(runs):
    for o in 'ab':
        pd.read_csv(runs/o/'report_table.csv').drop(columns=[
            'measured_loss', 'measured_robust_loss']).to_csv(runs/o/'report_table.csv', index=False)
    with pytest.raises(SystemExit, match='measured_loss, measured_robust_loss are missing'):
        fit(f"{runs/'a'},{runs/'b'}", out=str(runs/'out'))
