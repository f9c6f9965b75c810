"Rows of jobs are whole or not there, whatever a job does; a worker starts without the package."
import os, subprocess
import pytest
from robustnb.jobs import digest, read_row, run_job, worker_command, write_row


def test_rows_and_workers(tmp_path):
    assert digest(dict(a=1, b=2)) == digest(dict(b=2, a=1)) != digest(dict(a=1, b=3))
    write_row(dict(x=float('nan'), y='ü'), tmp_path/'deep'/'row.json')
    assert read_row(tmp_path/'deep'/'row.json')['y'] == 'ü'
    assert read_row(tmp_path/'none.json') is None
    run_job('nowhere:f', {}, tmp_path/'a.json', 3)
    assert read_row(tmp_path/'a.json')['error'].startswith('ModuleNotFoundError')
    assert read_row(tmp_path/'a.json')['tries'] == 3
    run_job('math:nothing', {}, tmp_path/'a.json')
    assert read_row(tmp_path/'a.json')['error'].startswith('AttributeError')
    said = subprocess.run([*worker_command()[:-1], worker_command()[-1].replace(
        'm.serve()', 'import sys; print("torch" in sys.modules, "numpy" in sys.modules)')],
                          capture_output=True, text=True)
    assert said.stdout == 'False False\n', 'a worker starts without what a job may not need'


def test_a_row_is_whole_or_not_there(tmp_path, monkeypatch):
    write_row(dict(x=1), tmp_path/'row.json')
    with pytest.raises(TypeError):
        write_row(dict(x=object()), tmp_path/'row.json')
    def full(*args): raise OSError(28, 'No space left on device')
    for name in ('replace', 'fsync'):
        with monkeypatch.context() as m:
            m.setattr(os, name, full)
            with pytest.raises(OSError):
                write_row(dict(x=2), tmp_path/'row.json')
    assert read_row(tmp_path/'row.json') == dict(x=1)
    assert [f.name for f in tmp_path.iterdir()] == ['row.json']
