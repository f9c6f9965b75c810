"""A folder that cannot be written, a full disk, two runs in one folder: commands end well or in one
line, and what is finished is right. All of them: `python benchmarks/reliability/faults.py`."""
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest

from robustnb.commands.common import _continue
from robustnb.evaluation.robust_accuracy import _same_question
from robustnb.files import save_json

root = Path(__file__).parent.parent
try:
    mounts = subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'none', '/mnt'],
                            capture_output=True).returncode == 0
except FileNotFoundError:
    mounts = False


@pytest.mark.skipif(not mounts, reason='small disks cannot be mounted here')
def test_commands_among_faults(tmp_path):
    names = ['train', 'build_set', 'generate', 'quantize', 'distill', 'attack_descriptors']
    said = subprocess.run([sys.executable, '-W', 'ignore', 'benchmarks/reliability/faults.py',
                           '--commands', ','.join(names), '--shares', '.5', '--out',
                           str(tmp_path/'faults.csv')],
                          cwd=root, capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    rows = pd.read_csv(tmp_path/'faults.csv', keep_default_na=False)
    assert rows.command.tolist() == [n for n in names for _ in range(4)]
    assert rows.fault.tolist() == ['read-only', 'full at 50%', 'two at once', 'two at once']*6
    assert (rows['again'] == 0).all(), (
        'with room, and alone in its folder or not, a command makes what it makes undisturbed')
    assert rows.same.all(), (
        'with room, and alone in its folder or not, a command makes what it makes undisturbed')
    assert (rows.rest == '').all(), 'nothing is left half written'
    full = rows[rows.fault == 'full at 50%']
    closed = rows[rows.fault == 'read-only']
    shared = rows[rows.fault == 'two at once']
    assert (shared.status == 0).all(), shared.said.tolist()
    assert (closed.status == 1).all(), 'one line, not a traceback'
    assert (full.status == 1).all(), 'one line, not a traceback'
    assert (rows.lines == rows.status).all(), 'one line, not a traceback'
    assert closed.said.str.match(
        'ValueError: `out` must be a folder that can be written; DISK cannot').all()
    assert full.said.str.contains(r'could not (?:write|save).*DISK/out.*free some space').all()


@pytest.mark.parametrize('begin', (_continue, _same_question))
def test_another_run_begins_while_the_folder_is_looked_at(tmp_path, monkeypatch, begin):
    question = dict(scheme=1, n=5)
    looked = Path.exists
    def exists(path):
        found = looked(path)
        if path.name == 'question.json' and not found:
            save_json(question, path)
            (path.parent/'rows.csv').write_text('a\n1\n')
        return found
    monkeypatch.setattr(Path, 'exists', exists)
    begin(tmp_path/'new', question)
    assert json.loads((tmp_path/'new'/'question.json').read_text()) == question
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'more.csv').write_text('a\n1\n')
    with pytest.raises(ValueError, match='must be a new'):
        begin(tmp_path/'old', question)
