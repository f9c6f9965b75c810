"The report: what is recommended and what refutes it, the advice, a screen that fits, the engine's columns."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.core import make_generator
from robustnb.attacks.gradient import fgsm
from robustnb.attacks.threat_models import Linf
from robustnb.quant import targets
from robustnb.transfer import study as module
from robustnb.transfer.report import plot_losses, Report
from robustnb.transfer.study import assess, default_formats, Probes, Study

pytestmark = pytest.mark.usefixtures('one_thread')


def table(**columns):
    made = pd.DataFrame(dict(format=['INT8', 'INT6', 'INT4'], size_kb=[80., 60., 40.],
                             predicted_loss=[0, .01, .2],
                             predicted_loss_lo=[0, 0, .1], predicted_loss_hi=[.005, .02, .4],
                             predicted_robust_loss=[.01, .02, .4], predicted_robust_loss_lo=[0, 0, .2],
                             predicted_robust_loss_hi=[.03, .04, .6]))
    return made.assign(**columns)


def report(rows, **facts):
    facts = dict(model='net', threat='Linf 1/255') | facts
    return Report(rows, pd.DataFrame(), torch.zeros(1, 3, 4, 4), facts)


@pytest.mark.parametrize('most, robust, best', [
    (.004, False, None), (.005, False, 'INT8'), (.019, False, 'INT8'), (.02, False, 'INT6'),
    (.4, False, 'INT4'),
    (.02, True, None), (.03, True, 'INT8'), (.04, True, 'INT6'), (1, True, 'INT4')])
def test_the_smallest_whose_whole_interval_is_low_enough(most, robust, best):
    assert report(table()).recommend(most, robust) == best
    assert report(table()[::-1]).recommend(most, robust) == best, 'the order of the rows says nothing'


def test_what_was_measured_refutes():
    rows = table(measured_loss=[0, .03, .1], measured_robust_loss=[0, 0, np.nan])
    assert report(rows).recommend(.02) == 'INT8'
    assert report(rows).recommend(.03) == 'INT6'
    assert report(rows).recommend(.4) == 'INT4'
    unknown = report(table(measured_loss=[np.nan]*3))
    assert unknown.recommend(.02) == 'INT6', 'what was not measured refutes nothing'
    rows = table(measured_loss=0., measured_robust_loss=[0, .1, .1])
    assert report(rows).recommend(.04) == 'INT6'
    assert report(rows).recommend(.04, robust=True) == 'INT8'


@pytest.mark.parametrize('bad', (-.1, 1.1, float('nan'), 'x', None))
def test_a_share_that_is_none(bad):
    with pytest.raises(ValueError, match='`max_loss` must be a share'):
        report(table()).recommend(bad)


def test_the_advice_is_the_first_that_is_said():
    assert 'INT6 is the smallest format' in str(report(table())).splitlines()[1]
    assert 'INT8 is the smallest format' in str(report(table(), max_loss=.01)).splitlines()[1]
    said = str(report(table(), max_loss=.04, max_loss_robust=True)).splitlines()[1]
    assert said.startswith('INT6 is the smallest')
    assert 'robust accuracy below 4 %' in str(report(table(), max_loss=.04, max_loss_robust=True))
    assert 'No format keeps' in str(report(table(), max_loss=.001))


def test_no_robust_loss_is_said_and_drawn():
    none = {f'predicted_robust_loss{end}': np.nan for end in ('', '_lo', '_hi')}
    found = report(table(**none), max_loss_robust=True)
    assert found.recommend(robust=True) is None
    assert str(found).splitlines()[1].startswith('No robust loss could be predicted')
    assert 'INT6 is the smallest' in str(report(table(**none)))
    words = [[o.get_text() for o in ax.texts] for ax in plot_losses(found.table).axes]
    assert words == [[], ['none predicted']]


def test_six_formats_fit_a_screen():
    wide = dict(lo=.123456, hi=.98765)
    rows = pd.concat([table(), table()], ignore_index=True)
    for kind in ('predicted_loss', 'predicted_robust_loss', 'measured_loss', 'measured_robust_loss'):
        rows = rows.assign(**{kind: .5432, f'{kind}_lo': wide['lo'],
                              f'{kind}_hi': wide['hi'], f'{kind}_outside': True})
    rows = rows.assign(format=[*'INT8', 'INT8 per tensor', 'mixed 12345.5 kB'], file_kb=123456.,
                       engine_ms=1234.5, float_ms=[.000123]*3 + [np.nan]*3)
    shown = str(report(rows, accuracy=.91, robust_accuracy=.2, max_loss_robust=True, max_loss=.0001))
    assert max(map(len, shown.splitlines())) <= 110
    assert all(word in shown for word in ('engine, ms', '54.3 (12.3 to 98.8)*', '123456', 'mixed 12345.5 kB'))
    assert len(shown.splitlines()) < 25


@pytest.fixture(scope='module')
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 20),
                             nn.ReLU(), nn.Linear(20, 4)).eval()


@pytest.fixture(scope='module')
def x(): return torch.rand(40, 3, 8, 8, generator=make_generator(0, 'report'))


@pytest.fixture(scope='module')
def found(net, x): return assess(net, 'onnxruntime,FP8,mixed 1.5kB', unlabelled=x)


def test_a_mixed_assignment_is_a_row(found):
    rows = found.table.set_index('format')
    assert list(rows.index) == ['INT8', 'INT8 per tensor', 'FP8_E4M3', 'mixed 1.5 kB']
    assert 1.3 < rows.size_kb['mixed 1.5 kB'] <= 1.5
    assert rows.predicted_loss.notna().all()
    assert set(found.layers.format) == set(rows.index)


def test_rows_with_an_engine_carry_its_figures(found, tmp_path):
    pytest.importorskip('onnxruntime')
    rows = found.table.set_index('format')
    for column in ('file_kb', 'engine_ms', 'float_ms'):
        assert (rows[column].drop('FP8_E4M3') > 0).all()
        assert np.isnan(rows[column]['FP8_E4M3'])
    assert rows.float_ms.nunique() == 1
    assert found.facts['engine_threads'] == torch.get_num_threads()
    found.save(tmp_path/'report.HTML')
    assert sorted(o.name for o in tmp_path.glob('*.csv')) == ['report_layers.csv', 'report_table.csv']
    found.save(tmp_path/'report.html')
    saved = pd.read_csv(tmp_path/'report_table.csv')
    assert {'file_kb', 'engine_ms', 'float_ms'} <= {*saved.columns}
    json.dumps(found.facts, default=str)


def test_off_or_not_installed_there_are_no_columns(net, x, monkeypatch):
    study = Study(net, Probes.of(x), (Linf(1/255),), attack=fgsm)
    off = study.assess('INT8', engine=False)
    assert 'file_kb' not in off.table
    monkeypatch.setattr(module, 'engine_installed', lambda: False)
    without = study.assess('INT8,INT4')
    assert 'file_kb' not in without.table
    assert [o for o in without.facts['notes'] if 'not installed' in o] == [
        "ONNX Runtime is not installed, so no file was written and nothing timed: "
        "pip install 'robustnb[export]'."]


def test_a_model_that_cannot_be_written_is_a_note_with_the_reason(net, x):
    pytest.importorskip('onnxruntime')
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x): return self.net(torch.flip(x, (3,)))
    report = Study(Odd().eval(), Probes.of(x), (Linf(1/255),), attack=fgsm).assess('INT8')
    notes = [o for o in report.facts['notes'] if o.startswith('No file of INT8 for ONNX Runtime:')]
    assert len(notes) == 1
    assert 'flip' in notes[0]


def test_a_budget_below_the_least_is_refused_before_anything(net):
    with pytest.raises(ValueError, match='must leave'):
        assess(net, [*default_formats, 'mixed .1kB'])
