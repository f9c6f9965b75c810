"""Notebooks as a user runs them: top to bottom, in a fresh Jupyter kernel in the notebook's own folder

Only cells marked `#| eval: false` are left out: commands of heavy runs, and what needs a cluster.

By default a few quick ones. `ROBUSTNB_NOTEBOOKS=all` runs every notebook,
`ROBUSTNB_NOTEBOOKS=tutorials/transfer,howto/` those whose path starts like that.
"""
import fcntl, os, pty, struct, subprocess, sys, termios
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

root = Path(__file__).parent.parent
notebooks = {f.relative_to(root/'nbs').with_suffix('').as_posix(): f
             for f in sorted((root/'nbs').rglob('*.ipynb')) if '/.' not in f.as_posix()}
quick = ('api/00_core', 'explain/intervals')
asked = os.environ.get('ROBUSTNB_NOTEBOOKS', ','.join(quick))
chosen = [o for o in notebooks if asked == 'all' or o.startswith(tuple(asked.split(',')))]


def execute(nb, folder):
    "Run all cells in a kernel of its own, as the interpreter of these tests; the notebook with its outputs"
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=str(root), MPLBACKEND='module://matplotlib_inline.backend_inline')
    try:
        return NotebookClient(nb, timeout=600, kernel_name='python3',
                              resources=dict(metadata=dict(path=str(folder)))).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)


def outputs(nb): return [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]


def page(*sources):
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(o) for o in sources],
        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))


def test_some_notebooks_are_chosen(): assert chosen and (asked != 'all' or len(chosen) > 50)


@pytest.mark.parametrize('name', chosen)
def test_notebook_in_a_fresh_kernel(name):
    nb = nbformat.read(notebooks[name], 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| eval: false')]
    said = [o.text for o in outputs(execute(nb, notebooks[name].parent))
            if o.get('name') == 'stderr' and 'IProgress not found' not in o.text]
    # but for what timm says on importing it where there are no widgets
    assert not said, 'a reader sees warnings or a log'


def test_a_failing_cell_is_noticed(tmp_path):
    with pytest.raises(CellExecutionError, match='one is not two'):
        execute(page('1', 'assert 1 == 2, "one is not two"'), tmp_path)


SLOW = ('import time\nfrom robustnb.core import progress\nfor o in progress(range({n}), '
        '"counting"): time.sleep({s})\n')


def test_progress_in_a_notebook_is_one_output_that_ends_empty(tmp_path):
    seen = []

    class Watch(NotebookClient):
        def process_message(self, msg, cell, index):
            if msg['msg_type'] in ('display_data', 'update_display_data', 'stream'):
                seen.append((msg['msg_type'], msg['content'].get('data', msg['content'])))
            return super().process_message(msg, cell, index)
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = str(root)
    try:
        nb = Watch(page(SLOW.format(n=12, s=.15), SLOW.format(n=3, s=.001)), timeout=120,
                   resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    finally:
        os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)
    kinds = [k for k, _ in seen]
    assert kinds[0] == 'display_data'
    assert len(kinds) > 3
    assert set(kinds[1:]) == {'update_display_data'}
    assert all('counting' in d['text/plain'] and '/12' in d['text/plain'] for _, d in seen[:3])
    assert [o.data['text/plain'] for o in nb.cells[0].outputs] == ['']
    assert nb.cells[1].outputs == []


def in_a_script(tmp_path, **kw):
    (tmp_path/'job.py').write_text(SLOW.format(n=8, s=.1))
    return subprocess.Popen([sys.executable, 'job.py'], cwd=tmp_path,
                            env=os.environ | dict(PYTHONPATH=str(root), TERM='xterm'),
                            stdin=subprocess.DEVNULL, **kw)


def test_progress_is_silent_in_a_log(tmp_path):
    with open(tmp_path/'log', 'w') as log:
        assert in_a_script(tmp_path, stdout=log, stderr=log).wait(60) == 0
    assert (tmp_path/'log').read_text() == ''


def test_progress_shows_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    job, said = in_a_script(tmp_path, stdout=subprocess.DEVNULL, stderr=theirs), b''
    os.close(theirs)
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    # the line is wiped at the end
    assert job.wait(60) == 0
    assert b'counting' in said
    assert b'8/8' in said
    assert said.endswith(b'\r')
