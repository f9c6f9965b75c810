"Notebooks are compared with what is saved in them: a made project of good and bad ones, tested once"
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from nbtest import agree

root = Path(__file__).parent.parent
TABLE = 'import pandas as pd\npd.DataFrame(dict(loss=[.5, {}]))'
PLOT = 'import matplotlib.pyplot as plt\nplt.plot([1, {}]);'
ADDRESS = '[object()], {!r}'
RANDOM = 'import numpy as np\nprint(np.random.rand(), file=open("../random", "a"))'
GOOD = {                                # what ran when a notebook was saved, and what stands in it now
    'equal': ('print("a loss of", 1.5)\n3*[7.25]', 'print("a loss of", 1.5)\n3*[7.25]'),
    'within': ('"accuracy", .800', '"accuracy", .803'),
    'times': ('#| times\n"1.5 s"', '#| times\n"9.5 s"'),
    'picture': (PLOT.format(2), PLOT.format(3)),
    'slow': ('#| slow\n1', '#| slow\n2'),
    'never': ('#| eval: false\n1', '#| eval: false\n2'),
    'address': (ADDRESS.format('/tmp/a 2026-01-31'), ADDRESS.format('/tmp/b 2027-02-28')),
    'warning': ('"text"', 'import warnings\nwarnings.warn("beware")\n"text"'),
    'random 1': ('pass', RANDOM),
    'random 2': ('pass', RANDOM),
}
BAD = {                                 # and what the tool says about it
    'beyond': ('"accuracy", .8', '"accuracy", .6', "-('accuracy', 0.8)\n+('accuracy', 0.6)"),
    'stream': ('print("loss", 2.5)', 'print("loss", 3.5)', '-loss 2.5\n+loss 3.5'),
    'word': ('"first is best"', '"second is best"', "-'first is best'\n+'second is best'"),
    'table': (TABLE.format(.7), TABLE.format(.9), '0 0.5\n-1 0.7\n+1 0.9'),
    'missing': ('.5', 'pass', '-execute_result  text/plain'),
    'new': ('pass', '.5', '+execute_result  text/plain'),
    'timeless': ('#| times\n"1.5 s"', '#| times\npass', '-execute_result  text/plain'),
    'no picture': (PLOT.format(2), 'pass', '-display_data  image/png text/plain'),
    'failing': ('1', 'a = 1\nassert a == 2, "one is not two"', 'AssertionError: one is not two'),
    'leaving': ('1', 'import sys\nsys.exit(0)', 'SystemExit: 0'),
    'dying': ('1', 'import os\nos._exit(0)', 'left before its end'),
    'crashing': ('1', 'import os\nos.kill(os.getpid(), 11)', 'ended by SIGSEGV'),
    'hanging': ('1', 'import time\ntime.sleep(600)', 'still running after 20 s'),
}


def book(source):
    "A notebook of a title, a silent cell and `source`"
    cells = [dict(cell_type='markdown', metadata={}, source='# Title')]
    for o in ('x = 1', source):
        cells.append(dict(cell_type='code', metadata={}, source=o, outputs=[], execution_count=None))
    return dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)


def run(tool, folder, *options):
    "What a tool says in the project at `folder`, and its exit code"
    command = [sys.executable, root/'tools'/f'{tool}.py', *options]
    p = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return p.stdout + p.stderr, p.returncode


@pytest.fixture(scope='module')
def tested(tmp_path_factory):
    "The project, what nbtest says, and its exit code"
    folder = tmp_path_factory.mktemp('project')
    shutil.copy(root/'settings.ini', folder)
    (folder/'nbs').mkdir()
    for name, (saved, *_) in (GOOD | BAD).items():
        (folder/'nbs'/f'{name}.ipynb').write_text(json.dumps(book(saved)))
    said, code = run('nbrun', folder)
    assert code == 0, said
    for name, (_, now, *_) in (GOOD | BAD).items():
        path = folder/'nbs'/f'{name}.ipynb'
        nb = json.loads(path.read_text())
        nb['cells'][-1]['source'] = now
        path.write_text(json.dumps(nb))
    return folder, *run('nbtest', folder, '--timeout', '20')


def about(said, name):
    "What is said about a notebook, ahead of the next one and of the counts"
    return re.split(r'\n(?=passed|FAILED|code cells)', said.split(f'nbs/{name}.ipynb\n')[1])[0]


@pytest.mark.parametrize('name', GOOD)
def test_good(tested, name):
    assert re.search(rf'^passed .* nbs/{name}.ipynb$', tested[1], re.M), about(tested[1], name)


@pytest.mark.parametrize('name', BAD)
def test_bad(tested, name):
    assert re.search(rf'^FAILED .* nbs/{name}.ipynb$', tested[1], re.M)
    assert BAD[name][2] in about(tested[1], name)


@pytest.mark.parametrize('name', ['beyond', 'missing', 'failing'])
def test_the_cell_is_named(tested, name):
    assert 'Cell #3' in about(tested[1], name)


def test_a_failing_cell_is_shown(tested):
    assert about(tested[1], 'failing').rstrip().endswith(BAD['failing'][1])


def test_counts(tested):
    assert f'notebooks: {len(GOOD)} passed, {len(BAD)} failed\n' in tested[1]


def test_exit_code(tested):
    assert tested[2] == 1


def test_randomness_is_not_shared(tested):
    drawn = (tested[0]/'random').read_text().split()
    assert len(set(drawn)) == 2


def test_a_good_notebook_alone_ends_well(tested):
    said, code = run('nbtest', tested[0], '--path', 'nbs/equal.ipynb')
    assert code == 0, said


def test_flags_run_what_is_left_out(tested):
    said, code = run('nbtest', tested[0], '--path', 'nbs/slow.ipynb', '--flags', 'slow')
    assert '-1\n+2' not in said


@pytest.mark.parametrize('old, new', [
    ('1.00 of 300 images', '0.99 of  310\nimages'),
    ('[-0.5, 1e-3]', '[-0.51, 1.01e-03]'),
    ('<a at 0x7f12ab>', '<a at 0x7f34cd>'),
])
def test_agree(old, new):
    assert agree(old, new)


@pytest.mark.parametrize('old, new', [
    ('INT8 0.5', 'INT4 0.5'),
    ('0.5 0.5', '0.5'),
    ('-0.5', '0.5'),
    ('300 images', '330 images'),
    ('1.5', 'nan'),
])
def test_disagree(old, new):
    assert not agree(old, new)
