"Notebooks are compared with what is saved in them: a made project of good and bad ones"
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from nbtest import agree

root = Path(__file__).parent.parent
TABLE = 'import pandas as pd\npd.DataFrame(dict(loss=[.5, {}]))'
PLOT = 'import matplotlib.pyplot as plt\nplt.plot([1, {}]);'
RANDOM = 'import numpy as np\nprint(np.random.rand(), file=open("../random", "a"))'
SAME = {                                # what ran when a cell was saved, and what stands in it now
    'equal': ('print("a loss of", 1.5)\n3*[7.25]', 'print("a loss of", 1.5)\n3*[7.25]'),
    'within': ('"accuracy", .800', '"accuracy", .803'),
    'times': ('#| times\n"1.5 s"', '#| times\n"9.5 s"'),
    'varies': ('#| varies\n"loss", .5', '#| varies\n"loss", -9e9'),
    'picture': (PLOT.format(2), PLOT.format(3)),
    'slow': ('#| slow\n1', '#| slow\n2'),
    'never': ('#| eval: false\n1', '#| eval: false\n2'),
    'passing': ('"at 0x12 /tmp/a 2026-01-31"', '"at 0xab /tmp/b 2027-02-28"'),
    'warning': ('"text"', 'import warnings\nwarnings.warn("beware")\n"text"'),
}
OTHER = {                               # and what is said about it
    'beyond': ('"accuracy", .8', '"accuracy", .6', "-('accuracy', 0.8)\n+('accuracy', 0.6)"),
    'stream': ('print("loss", 2.5)', 'print("loss", 3.5)', '-loss 2.5\n+loss 3.5'),
    'word': ('"first is best"', '"second is best"', "-'first is best'\n+'second is best'"),
    'table': (TABLE.format(.7), TABLE.format(.9), ' 0 0.5\n-1 0.7\n+1 0.9'),
    'missing': ('.5', 'pass', '-execute_result  text/plain'),
    'new': ('pass', '.5', '+execute_result  text/plain'),
    'other words in seconds': ('#| times\n"1.5 s"', '#| times\n"1.5 ms"', "-'1.5 s'\n+'1.5 ms'"),
    'timeless': ('#| times\n"1.5 s"', '#| times\npass', '-execute_result  text/plain'),
    'no picture': (PLOT.format(2), 'pass', '-display_data  image/png text/plain'),
}
ENDS = {                                # a cell that does not come to its end, and what is said
    'failing': ('a = 1\nassert a == 2, "one is not two"', 'AssertionError: one is not two'),
    'leaving': ('import sys\nsys.exit(0)', 'SystemExit: 0'),
    'dying': ('import os\nos._exit(0)', 'left before its end'),
    'crashing': ('import os\nos.kill(os.getpid(), 11)', 'ended by SIGSEGV'),
    'hanging': ('import time\ntime.sleep(600)', 'still running after 10 s'),
}
CELLS = SAME | OTHER


def write(path, sources, saved=()):
    "Write a notebook of code cells, with the outputs of the cells `saved`"
    outputs = [o['outputs'] for o in saved] or [[] for _ in sources]
    cells = [dict(cell_type='code', metadata={}, source=source, outputs=out, execution_count=None)
             for source, out in zip(sources, outputs)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


def run(tool, folder, *options):
    "What a tool says in the project at `folder`, and its exit code"
    command = [sys.executable, root/'tools'/f'{tool}.py', *options]
    p = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return p.stdout + p.stderr, p.returncode


@pytest.fixture(scope='module')
def tested(tmp_path_factory):
    "The folder of the project, what nbtest says, and its exit code"
    folder = tmp_path_factory.mktemp('project')
    shutil.copy(root/'settings.ini', folder)
    nbs = folder/'nbs'
    nbs.mkdir()
    write(nbs/'cells.ipynb', [o[0] for o in CELLS.values()])
    said, code = run('nbrun', folder, '--flags', 'slow')
    assert code == 0, said
    saved = json.loads((nbs/'cells.ipynb').read_text())['cells']
    write(nbs/'cells.ipynb', [o[1] for o in CELLS.values()], saved)
    write(nbs/'good.ipynb', [CELLS['equal'][0], RANDOM], [saved[0], dict(outputs=[])])
    write(nbs/'random.ipynb', [RANDOM])
    for name, (source, _) in ENDS.items():
        write(nbs/f'{name}.ipynb', ['x = 1', source])
    return folder, *run('nbtest', folder, '--timeout', '10')


def about(said, name):
    "What is said about a notebook: up to the next one, or to the counts"
    return re.split(r'\n(?=passed|FAILED|code cells)', said.split(f'nbs/{name}.ipynb\n')[1])[0]


def about_cell(said, name):
    "What is said about a cell of the notebook of cells, empty if nothing is"
    number = list(CELLS).index(name) + 1
    found = about(said, 'cells').partition(f'Cell #{number} ')[2]
    return found.partition('\nCell #')[0]


@pytest.mark.parametrize('name', SAME)
def test_cell_that_shows_what_is_saved(tested, name):
    assert about_cell(tested[1], name) == ''


@pytest.mark.parametrize('name', OTHER)
def test_cell_that_shows_something_else(tested, name):
    assert OTHER[name][2] in about_cell(tested[1], name)


@pytest.mark.parametrize('name', ENDS)
def test_notebook_that_does_not_end(tested, name):
    assert ENDS[name][1] in about(tested[1], name)


@pytest.mark.parametrize('name', ['cells', *ENDS])
def test_bad_notebook_fails(tested, name):
    assert re.search(rf'^FAILED .* nbs/{name}.ipynb$', tested[1], re.M)


@pytest.mark.parametrize('name', ['good', 'random'])
def test_good_notebook_passes(tested, name):
    assert re.search(rf'^passed .* nbs/{name}.ipynb$', tested[1], re.M)


def test_failing_cell_is_named(tested):
    assert 'While Executing Cell #2' in about(tested[1], 'failing')


def test_failing_cell_is_shown(tested):
    assert about(tested[1], 'failing').rstrip().endswith(ENDS['failing'][0])


def test_cells_are_counted(tested):
    assert f'\ncode cells: {len(CELLS)+3+2*len(ENDS)-2} to run, 2 left out by flags\n' in tested[1]


def test_notebooks_are_counted(tested):
    assert f'\nnotebooks: 2 passed, {len(ENDS)+1} failed\n' in tested[1]


def test_exit_code(tested):
    assert tested[2] == 1


def test_randomness_is_not_shared(tested):
    drawn = (tested[0]/'random').read_text().split()
    assert len(set(drawn)) == 2


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
