"The command that sweeps networks, formats, attacks and seeds, and the job that it runs."
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robustnb.attacks.gradient import fgsm
from robustnb.attacks.threat_models import Linf
from robustnb.commands import sweep as sweep_cli
from robustnb.data import load_data, subset
from robustnb.evaluation.robust_accuracy import evaluate, summarize
from robustnb.models.loading import load_model, save_model
from robustnb.models.training import Recipe, train
from robustnb.models.zoo import build_model
from robustnb.quant.ptq import quantize
from robustnb.transfer.study import measure_one, study_of

run_sweep = partial(sweep_cli.sweep_command, test='digits')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    data = subset(load_data('digits', 'train'), 900, seed=0)
    std, mean = torch.std_mean(data.x, (0, 2, 3))
    net, _ = train(Recipe(flip=False, batch_size=25, lr=.02).shortened(10),
                   build_model('AlexNet_BN', 10, .125, mean.tolist(), std.tolist()), data,
                   device='cpu')
    path = tmp_path_factory.mktemp('net')/'digits.pt'
    save_model(net, path)
    return str(path)


def test_a_file_that_was_written_anew_is_read_anew(weights, tmp_path):
    path = tmp_path/'net.pt'
    made = []
    for net in (build_model('AlexNet_BN', 10, .125), load_model(weights)):
        save_model(net.eval(), path)
        made.append(measure_one(str(path), 'INT8', 'fgsm', n=40)['original_accuracy'])
        assert study_of(str(path), 'fgsm', n=40) is study_of(str(path), 'fgsm', n=40)
    assert made[0] < .3 and made[1] > .5


def test_one_job(weights):
    row = measure_one(weights, 'INT4', 'fgsm', seed=3, n=80, eps=4/255)
    model = load_model(weights)
    study = study_of(weights, 'fgsm', 3, 'digits', 80, 4/255)
    test = study.test
    x = study.probes.x
    pool = load_data('digits', 'train').x
    assert len(x) == 300
    assert all((pool == o).flatten(1).all(1).any() for o in x[:5])
    assert len(test) == 80
    assert np.bincount(test.y).tolist() == [8]*10
    other = study_of(weights, 'fgsm', 4, 'digits', 80, 4/255)
    assert torch.equal(other.test.x, test.x), 'the seed does not choose the test images'
    assert not torch.equal(other.probes.x, x), 'the seed chooses the calibration images'
    q = quantize(model, 'INT4', x)
    y = torch.as_tensor(test.y)
    of = lambda m: summarize(evaluate(m, test.x, y, dict(fgsm=fgsm),
                                      Linf(4/255))).set_index('attack').accuracy
    assert row['accuracy'] == of(q)['clean']
    assert row['original_accuracy'] == pytest.approx(of(model)['clean'], abs=1e-4)
    assert row['original_robust_accuracy'] == pytest.approx(of(model)['worst'], abs=1e-4)
    assert row['robust_accuracy'] <= of(q)['worst']
    assert row['measured_loss'] == pytest.approx(1 - row['accuracy']/of(model)['clean'], abs=1e-9)
    assert row['n_test'] == 80
    assert 0 < row['js']
    assert 0 <= row['predicted_loss'] <= row['predicted_loss_hi'] <= 1
    assert -.02 < row['predicted_loss_lo'] <= row['predicted_loss'], 'a copy may win a little by luck'
    assert repr(row) == repr(measure_one(weights, 'INT4', 'fgsm', seed=3, n=80,
                                         eps=4/255)), 'the same question has the same answer'
    with pytest.raises(ValueError, match='`attack` must be one of'):
        measure_one(weights, 'INT4', 'PGD')
    with pytest.raises(ValueError, match='`n` must be a whole number, at least 1'):
        measure_one(weights, 'INT4', n=0)


def test_the_command(weights, tmp_path, capsys):
    out = tmp_path/'out'
    run_sweep(weights, 'INT8,POT3', 'fgsm', seeds=2, measure='n=40,eps=2/255', where='1',
              out=str(out))
    rows = pd.read_csv(out/'sweep.csv')
    assert rows[['format', 'seed', 'status']].to_numpy().tolist() == [
        [f, s, 'done'] for f in ('INT8', 'POT3') for s in (0, 1)]
    assert rows.eps.to_numpy() == pytest.approx(2/255, rel=1e-12)
    assert (rows.n == 40).all()
    assert rows.model.unique().tolist() == [weights]
    assert {'measured_robust_loss', 'predicted_loss', 'size_kb'} <= set(rows)
    said = capsys.readouterr().out
    assert '4 of 4 jobs done' in said
    assert 'POT3' in said
    facts = json.loads((out/'manifest.json').read_text())
    assert facts['jobs'] == 4
    assert facts['failed'] == 0
    assert facts['eps'] == 2/255
    assert {'command', 'torch'} <= facts.keys()
    files = {f: f.stat().st_mtime_ns for f in (out/'rows').iterdir()}
    run_sweep(weights, 'INT8', 'fgsm', seeds=1, measure='n=40,eps=2/255', out=str(out))
    assert {f: f.stat().st_mtime_ns for f in (out/'rows').iterdir()} == files
    assert len(pd.read_csv(out/'sweep.csv')) == 1


def test_what_the_command_refuses(weights, tmp_path, capsys):
    out = str(tmp_path/'out')
    def refused(said, *args, **kw):
        with pytest.raises(SystemExit) as e:
            run_sweep(*args, **dict(out=out) | kw)
        assert said in str(e.value), e.value
        assert '\n' not in str(e.value), e.value
    refused('no', 'nowhere.pt')
    refused('`name` must be', weights, 'INT99')
    refused('got \'pgd20\'', weights, attacks='pgd20')
    refused('`seeds` must be a whole number, at least 1', weights, seeds=0)
    refused('`where` must be a number of jobs', weights, where='many')
    refused('`where` must be names and values', weights, where='timeout_min=3,gpu')
    refused("got 'steps'", weights, measure='steps=3')
    refused('a number for eps', weights, measure='eps=small')
    refused('a whole number of at least 1 for n', weights, measure='n=1.5')
    refused('a whole number of at least 1 for n', weights, measure='n=0')
    refused('`eps` must be in', weights, measure='eps=2')
    refused('`workers` must be a whole number', weights, where='0')
    assert (not (tmp_path/'out').exists()
            or not [*(tmp_path/'out').iterdir()]), 'a question that was refused is not kept'
    sweep_cli._same_files(tmp_path/'q', dict(n=1), {'a': '1'})
    sweep_cli._same_files(tmp_path/'q', dict(n=1), {'b': '2'})
    assert json.loads((tmp_path/'q'/'question.json').read_text()) == dict(
        facts=dict(n=1), files=dict(a='1', b='2'))
    for facts, files, said in ((dict(n=2), {}, 'n is 1 there and 2 here'),
                               (dict(n=1), {'a': '3'}, 'a has changed since')):
        with pytest.raises(ValueError, match=said):
            sweep_cli._same_files(tmp_path/'q', facts, files)
    (tmp_path/'q'/'question.json').write_text('{')
    with pytest.raises(ValueError, match='is damaged'):
        sweep_cli._same_files(tmp_path/'q', dict(n=1), {})


def test_a_command_with_failures_names_them(tmp_path, capsys):
    rows = pd.DataFrame([dict(model='a.pt', format='INT8', attack='pgd', seed=0,
                              status='done', error='', measured_loss=.1),
                         dict(model='a.pt', format='INT4', attack='pgd', seed=1,
                              status='failed', error='OSError: gone')])
    sweep_cli._tell(rows, rows[rows.status == 'failed'], tmp_path)
    said = capsys.readouterr().out
    assert 'failed: a.pt INT4 pgd seed 1: OSError: gone' in said and 'not divided' not in said
    sweep_cli._tell(rows.assign(data='photos', images='photos'), rows[:0], tmp_path)
    assert 'photos is not divided: the images that test also calibrate' in capsys.readouterr().out
    assert (sweep_cli._place(''), sweep_cli._place('3'),
            sweep_cli._place('mem_gb=1.5,slurm_partition=gpu')) == (
                dict(workers=None), dict(workers=3),
                dict(slurm=dict(mem_gb=1.5, slurm_partition='gpu')))
    settings = (Path(__file__).parents[2]/'settings.ini').read_text()
    assert 'slurm_requirements' in settings
    assert 'accelerate_requirements' in settings


def test_images_that_test_and_calibrate_are_named(tmp_path, capsys):
    said = 'is not divided: the images that test also calibrate. Give others by --images.'
    save_model(build_model('AlexNet', 2, .0625), tmp_path/'net.pt')
    rng = np.random.default_rng(0)
    for folder in ('flat', 'cut/train', 'cut/test'):
        for k in range(24):
            path = tmp_path/folder/'ab'[k % 2]/f'{k}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    for test, images, doubted in (('flat', '', True), ('cut', '', False), ('flat', 'cut', False)):
        given = dict(images=str(tmp_path/images)) if images else {}
        sweep_cli.sweep_command(str(tmp_path/'net.pt'), 'INT8', 'fgsm', where='1', test=str(tmp_path/test),
                                out=str(tmp_path/f'out {test} {images}'), measure='n=8', **given)
        assert (said in capsys.readouterr().out) == doubted
