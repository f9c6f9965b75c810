"""kill -9 at random moments, twice for each kind of run: the rerun ends like the run that nobody
disturbed. And a job that forgets what it had done is found out. A training and an evaluation are
killed in their own tests. All of them, twenty times each: `python benchmarks/reliability/kills.py`."""
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest

root = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='jobs are forked')


def run(code, *words):
    return subprocess.run([sys.executable, '-W', 'ignore', *code, *words], cwd=root,
                          capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))


JOBS = 'generation', 'quantisation', 'assessment', 'curation', 'attack'


def test_every_kind_of_run_survives(tmp_path):
    said = run(['benchmarks/reliability/kills.py'], '--kills', '2', '--jobs', ','.join(JOBS),
               '--out', str(tmp_path/'kills.csv'))
    assert said.returncode == 0, said.stdout + said.stderr[-2000:]
    rows = pd.read_csv(tmp_path/'kills.csv')
    assert tuple(rows.job) == JOBS
    assert (rows.kills >= 2).all()
    assert rows.same.all()
    assert (rows.files > 0).all()
    assert json.loads((tmp_path/'kills.json').read_text())['kills'] == rows.kills.sum()


forgets = '''
import sys, time
sys.path.insert(0, 'benchmarks/reliability')
import kills
def job(out):
    out.mkdir(exist_ok=True)
    with open(out/'log.csv', 'a') as f: f.write('a,b\\n')
    time.sleep(.2)
kills.jobs['forgets'] = job
row = kills.trial('forgets', 3)
sys.exit(0 if not row['same'] and row['kills'] == 3 else 1)
'''


def test_a_run_that_differs_is_seen(): assert run(['-c', forgets]).returncode == 0
