"""Sweeps on this machine: what runs, what runs again, what is refused; kill -9 at any moment loses
nothing. The jobs mark each call, so that calls can be counted."""
import importlib, json, os, signal, subprocess, sys, time, warnings
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robustnb import sweeps
from robustnb.jobs import read_row, worker_command
from robustnb.sweeps import _cores, _environment, grid, sweep, sweep_rows

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A module of jobs beside a folder for their marks"
    folder = tmp_path_factory.mktemp('lab')
    (folder/'marks').mkdir()
    (folder/'sweep_lab.py').write_text(f"""
import math, os, sys, time
import numpy as np
def mark(x):
    with open(f'{folder}/marks/{{x}}', 'a') as f: f.write('*')
    return os.path.getsize(f'{folder}/marks/{{x}}')
def root(x, wait=0.):
    times = mark(x)
    print('root of', x)
    if x == 'kill': os.kill(os.getpid(), 9)
    if x == 'exit': sys.exit('enough')
    if x == 'leave':
        print('the memory is full', file=sys.stderr)
        os._exit(3)
    if x == 'flaky' and times == 1: raise OSError('the disk was away')
    time.sleep(wait)
    return dict(root=math.sqrt(len(x) if isinstance(x, str) else x), process=os.getpid(),
                wide=np.float32(.1), threads=os.environ['OMP_NUM_THREADS'],
                group=os.environ.get('WORLD_SIZE', ''))
def returns(kind):
    return dict(a_list=[1], taken={{'kind': 1}}, reserved={{'status': 1}}, large={{'x': [1]}},
                nothing=None, nan={{'x': math.nan}})[kind]
def default(x, y=7): return dict(both=f'{{x}}{{y}}')
class Holder:
    def method(self): return dict()
""")
    sys.path.insert(0, str(folder))
    import sweep_lab
    yield folder, sweep_lab
    sys.path.remove(str(folder))


@pytest.fixture
def calls(lab):
    "Calls of each job since the last question"
    folder, _ = lab
    for f in (folder/'marks').iterdir():
        f.unlink()
    return lambda: {f.name: f.stat().st_size for f in sorted((folder/'marks').iterdir())}


def test_grid_is_every_combination():
    table = grid(a=(1, 2), b=['x'], c=range(3), d=.5)
    assert table.to_dict('records') == [dict(a=a, b='x', c=c, d=.5) for a in (1, 2)
                                        for c in range(3)]
    assert grid(a=np.arange(2), b=pd.Series(['u', 'v'])).shape == (4, 2)
    assert grid(name='word').name.tolist() == ['word']
    for bad in (dict(a=[]), dict(a=1, b=()), {}):
        with pytest.raises(ValueError, match='at least one value'):
            grid(**bad)


@pytest.mark.parametrize('workers', (1, 3))
def test_each_job_has_its_row(lab, calls, tmp_path, workers):
    _, jobs = lab
    found = sweep(jobs.root, grid(x=[4, 'kill', 'flaky', 'exit', 9, 'leave', 16]), tmp_path,
                  workers=workers)
    assert found.x.tolist() == [4, 'kill', 'flaky', 'exit', 9, 'leave',
                                16], 'in the order of the table'
    assert found.status.tolist() == ['done', 'failed', 'done', 'failed', 'done', 'failed', 'done']
    assert found.tries.tolist() == [1, 2, 2, 2, 1, 2, 1]
    assert calls() == {'4': 1, 'kill': 2, 'flaky': 2, 'exit': 2, '9': 1, 'leave': 2, '16': 1}
    assert found.root[[0, 4, 6]].tolist() == [2, 3, 4]
    assert found.error[0] == ''
    assert found.wide[0] == float(np.float32(.1))
    assert 'SIGKILL' in found.error[1]
    assert found.error[3] == 'SystemExit: enough'
    assert 'exit code 3; its last words: the memory is full' in found.error[5]
    assert (found.seconds.dropna() >= 0).all()
    assert found.host.nunique() == 1
    assert found.threads[0] == os.environ.get('OMP_NUM_THREADS', '1')
    if workers == 1:
        assert found.process[0] != found.process[2] == found.process[4], (
            'a worker lives until a job kills it')
    row = next(r for r in map(read_row, (tmp_path/'rows').iterdir())
               if r['arguments']['x'] == 'exit')
    assert 'Traceback' in row['traceback']
    assert row['job'] == 'sweep_lab:root'
    assert 'root of' in ''.join(f.read_text() for f in (tmp_path/'logs').iterdir()), (
        'what jobs print is in the logs')
    assert not [f for f in (tmp_path/'rows').iterdir() if f.name.startswith('.')]
    kept = sweep_rows(tmp_path).set_index('x').loc[found.x].reset_index()
    pd.testing.assert_frame_equal(kept[sorted(kept)], found[sorted(found)])


def test_finished_jobs_never_run_again(lab, calls, tmp_path):
    _, jobs = lab
    first = sweep(jobs.root, grid(x=[4, 9, 'exit']), tmp_path, workers=1, tries=1)
    assert calls() == {'4': 1, '9': 1, 'exit': 1}
    again = sweep(jobs.root, [dict(x=9), dict(x=25), dict(x='exit'), dict(x=4)], tmp_path,
                  workers=2, tries=3)
    assert calls() == {'25': 1, '4': 1, '9': 1, 'exit': 4}
    assert again.root[[0, 1, 3]].tolist() == [3, 5, 2]
    assert again.process[3] == first.process[0], 'the row is the one that was written'
    assert again.seconds[0] == first.seconds[1], 'the row is the one that was written'
    before = calls()
    sweep(jobs.root, grid(x=[4, 9]), tmp_path, slurm=None)
    assert calls() == before
    assert not (tmp_path/'slurm').exists()
    sweep(jobs.root, [dict(x=4, wait=0.)], tmp_path, workers=1)
    assert calls()['4'] == 2, 'another table of arguments is another job'
    sweep(jobs.default, [dict(x=4)], tmp_path, workers=1)
    assert len(sweep_rows(tmp_path)) == 6


@pytest.mark.parametrize('damage',
                         (lambda t: t[:-3], lambda t: '', lambda t: t.replace('2.0', '2.5'),
                          lambda t: t.partition('\n')[2], lambda t: '\x00'*len(t),
                          lambda t: '[]', lambda t: 'null\n'*2))
def test_a_damaged_row_is_computed_again(lab, calls, tmp_path, damage):
    _, jobs = lab
    sweep(jobs.root, [dict(x=4)], tmp_path, workers=1)
    file, = (tmp_path/'rows').iterdir()
    file.write_text(damage(file.read_text()))
    assert read_row(file) is None
    assert len(sweep_rows(tmp_path)) == 0
    assert sweep(jobs.root, [dict(x=4)], tmp_path, workers=1).root[0] == 2
    assert calls() == {'4': 2}


def test_kill_9_at_any_moment(lab, calls, tmp_path):
    """The sweep is killed again and again; no job that had its row is called again, no worker is
    left, and the table is that of an undisturbed sweep"""
    _, jobs = lab
    xs = list(range(100, 140))
    rng = np.random.default_rng(0)
    finished = {}
    kills = 0
    for _ in range(4):
        before = len(list(tmp_path.glob('rows/*.json')))
        with warnings.catch_warnings():
            # of forking beside threads; this child only waits for others
            warnings.simplefilter('ignore', DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                sweep(jobs.root, grid(x=xs, wait=.05), tmp_path, workers=2)
            finally:
                os._exit(0)
        end = time.time() + 30
        while len(list(tmp_path.glob('rows/*.json'))) < before + 2 and time.time() < end:
            time.sleep(.002)
        time.sleep(rng.uniform(0, .05))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        time.sleep(.2)
        done = {read_row(f)['arguments']['x'] for f in tmp_path.glob('rows/*.json')}
        made = calls()
        kills += 0 < len(done) < len(xs)
        time.sleep(.2)
        assert calls() == made, 'the workers ended with their sweep'
        assert {k: made[k] for k in finished} == finished, 'what had its row was not called again'
        finished = {str(x): made[str(x)] for x in done}
    found = sweep(jobs.root, grid(x=xs, wait=.05), tmp_path, workers=2)
    assert kills > 1, 'the kill came in the middle'
    assert found.root.tolist() == [x**.5 for x in xs]
    assert (found.status == 'done').all()
    assert {k: calls()[k] for k in finished} == finished, 'what had its row was not called again'
    assert not list(tmp_path.glob('rows/.*.json'))


def test_a_sweep_that_is_interrupted_stops_its_workers(lab, calls, tmp_path, monkeypatch):
    _, jobs = lab
    def interrupt(bar_of, row): raise KeyboardInterrupt
    from contextlib import contextmanager
    @contextmanager
    def board(jobs): yield interrupt
    monkeypatch.setattr(sweeps, '_board', board)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        sweep(jobs.root, [dict(x=1), dict(x=2, wait=60.), dict(x=3, wait=60.)], tmp_path, workers=2)
    assert time.time() - began < 20
    assert '1' in calls()
    assert all(r is None or r['status'] == 'done' for r in map(
        read_row, tmp_path.glob('rows/*.json'))), 'a job that was stopped has not failed'


def test_cells_that_are_empty_take_the_default(lab, tmp_path):
    _, jobs = lab
    table = pd.DataFrame([dict(x='a', y=None), dict(x='b', y='z'), dict(x='c', y=np.nan),
                          dict(x='d', y=pd.NA)])
    found = sweep(jobs.default, table, tmp_path, workers=1)
    assert found.both.tolist() == ['a7', 'bz', 'c7', 'd7']


def test_what_a_job_may_return(lab, tmp_path):
    _, jobs = lab
    found = sweep(jobs.returns,
                  grid(kind=['a_list', 'taken', 'reserved', 'large', 'nothing', 'nan']),
                  tmp_path, workers=1, tries=1)
    assert found.status.tolist() == ['failed']*5 + ['done']
    assert found.isna().x.all()
    for said, error in zip(('must return a dict .* got list',
                            "not those of its arguments, .* got 'kind'", "got 'status'",
                            "'x', which must be a number, .* got list", 'got NoneType'),
                           found.error):
        assert pd.Series([error]).str.contains(said)[0], error


def test_tables_that_are_refused(lab, tmp_path):
    _, jobs = lab
    ok = [dict(x=1)]
    _refused(TypeError, '`job` must be a function', 'root', ok, tmp_path/'o')
    for f in (lambda x: dict(), jobs.Holder().method):
        _refused(ValueError, '`job` must be a function at the top level', f, ok, tmp_path/'o')
    _refused(ValueError, '`job` must be a function at the top level',
             wraps(jobs.root)(lambda x: dict()), ok, tmp_path/'o')
    for t in ([], pd.DataFrame(), {}, 'abc', [1], None):
        _refused(TypeError, '`table` must be a DataFrame with at least one row', jobs.root, t,
                 tmp_path/'o')
    _refused(TypeError, 'row 1: missing a required argument', jobs.root,
             [dict(x=1), dict(wait=1.)], tmp_path/'o')
    _refused(TypeError, "row 0: got an unexpected keyword argument 'z'", jobs.root,
             [dict(x=1, z=2)], tmp_path/'o')
    _refused(TypeError, 'row 0: x must be a number, a string', jobs.root, [dict(x=(1, 2))],
             tmp_path/'o')
    _refused(ValueError, 'must not hold a job twice; row 2', jobs.root, grid(x=[1, 2, 1]),
             tmp_path/'o')
    for kw in (dict(workers=0), dict(tries=0), dict(chunk=0), dict(tries=1.5),
               dict(workers=True), dict(tries=float('nan'))):
        _refused((ValueError, TypeError), f'`{[*kw][0]}` must be a whole number', jobs.root, ok,
                 tmp_path/'o', **kw)
    _refused(TypeError, '`slurm` must be a dict', jobs.root, ok, tmp_path/'o', slurm='gpu')
    (tmp_path/'file').write_text('')
    _refused(ValueError, '`out` must be a folder', jobs.root, ok, tmp_path/'file')
    _refused(FileNotFoundError, 'there are no rows', None, None, tmp_path/'o',
             call=lambda job, table, out: sweep_rows(out))
    assert not (tmp_path/'o').exists(), 'nothing is written before the table is understood'


def _refused(kind, said, *args, call=sweep, **kw):
    with pytest.raises(kind, match=said):
        call(*args, **kw)


def test_slurm_is_refused_where_there_is_none(lab, tmp_path, monkeypatch):
    _, jobs = lab
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(ImportError, match=r"pip install 'robustnb\[slurm\]'"):
        sweep(jobs.root, [dict(x=1)], tmp_path, slurm={})
    monkeypatch.undo()
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ValueError, match='on a machine with Slurm; submitit says: .*srun'):
        sweep(jobs.root, [dict(x=1)], tmp_path, slurm={})


def test_as_many_workers_as_cores_that_may_be_used(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 3, 5}, raising=False)
    assert _cores() == 3
    monkeypatch.delattr(os, 'sched_getaffinity')                 # as on macOS and Windows
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    assert _cores() == 2
    assert (sweep(lab[1].root, [dict(x=i) for i in range(71, 74)], tmp_path).status == 'done').all()
    assert len(list((tmp_path/'logs').iterdir())) == 2
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert _cores() == 1


def test_a_worker_is_like_its_parent_but_alone(monkeypatch):
    for k, v in dict(WORLD_SIZE='4', RANK='1', CUDA_VISIBLE_DEVICES='2,5', OTHER='kept').items():
        monkeypatch.setenv(k, v)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    found = [_environment(i) for i in range(3)]
    assert [e['CUDA_VISIBLE_DEVICES'] for e in found] == ['2', '5', '2']
    assert {e['OMP_NUM_THREADS'] for e in found} == {'1'}
    assert 'WORLD_SIZE' not in found[0]
    assert 'RANK' not in found[0]
    assert found[0]['OTHER'] == 'kept'
    assert '' not in found[0]['PYTHONPATH'].split(os.pathsep)
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '7')
    assert _environment(1)['OMP_NUM_THREADS'] == '3'
    assert _environment(1)['CUDA_VISIBLE_DEVICES'] == '7'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [_environment(i)['CUDA_VISIBLE_DEVICES'] for i in range(3)] == ['0', '1', '0']


def test_the_live_table(lab, calls, tmp_path, monkeypatch):
    "A line per value of the first column, or one line where there would be too many"
    _, jobs = lab
    class Bar:
        def __init__(self, items, desc, total):
            self.desc, self.total, self.n, self.said, self.open = desc, total, 0, {}, True
            bars.append(self)
        def update(self): self.n += 1
        def set_postfix(self, refresh, **said): self.said = said
        def close(self): self.open = False
    bars = []
    monkeypatch.setattr(sweeps, 'progress', Bar)
    sweep(jobs.root, [dict(x='exit'), dict(x=4), dict(x=4, wait=.0)], tmp_path, workers=1, tries=1)
    assert [(b.desc, b.total, b.n, b.said, b.open) for b in bars] == [
        ('exit', 1, 1, dict(failed=1), False), ('4', 2, 2, {}, False)]
    bars.clear()
    sweep(jobs.root, [dict(x=4), dict(x=4, wait=.0), dict(x=9)], tmp_path, workers=1)
    assert [(b.desc, b.total, b.n) for b in bars] == [
        ('4', 2, 2), ('9', 1, 1)], 'what was finished before counts'
    bars.clear()
    with sweeps._board({str(i): dict(x=i) for i in range(25)}) as tell:
        tell('3', dict(status='failed'))
    assert [(b.desc, b.total, b.n, b.said) for b in bars] == [('jobs', 25, 1, dict(failed=1))]


def test_a_worker_ends_with_the_one_that_feeds_it(lab, tmp_path):
    "In the middle of a job, and when it has none"
    for orders in ([], [['sweep_lab:root', dict(x=64, wait=600.), str(tmp_path/'row.json')]]):
        worker = subprocess.Popen(worker_command(), stdin=subprocess.PIPE,
                                  stdout=subprocess.DEVNULL, text=True, env=_environment(0))
        for o in orders:
            worker.stdin.write(json.dumps(o) + '\n')
        worker.stdin.flush()
        time.sleep(.3)
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait(20) == 0
        assert not (tmp_path/'row.json').exists()


def test_rows_are_those_of_the_code(tmp_path, monkeypatch):
    file = tmp_path/'lab_of_code.py'
    monkeypatch.syspath_prepend(str(tmp_path))
    def found(factor):
        file.write_text(f'def times(x): return x*{factor}\ndef job(x): return dict(y=times(x))\n')
        sys.modules.pop('lab_of_code', None)
        importlib.invalidate_caches()
        job = importlib.import_module('lab_of_code').job
        return sweep(job, [dict(x=2)], tmp_path/'out', workers=1).y.tolist()
    assert found(3) == [6]
    assert found(55) == [110]
    assert sweep_rows(tmp_path/'out').y.tolist() == [110]
    (tmp_path/'out'/'code.json').unlink()
    with pytest.raises(ValueError, match='`out` must be.*another version of this library'):
        found(3)
