"The command `robustnb`: its help reads well, its examples can be typed, nothing heavy is imported for it"
import importlib.util, json, os, re, resource, shlex, subprocess, sys
from configparser import ConfigParser
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from robustnb.commands import command_line as cli, common

root = Path(__file__).parents[2]
NAMES = ('assess evaluate cost quantize export generate fit-predictor sweep build-set score-set validate-set '
         'train train-descriptor distill attack-descriptors check-submission report-descriptors demo').split()
WORDS = dict(model='--model', weights='--weights', mean='--mean', std='--std', size='--size',
             classes='--classes', device='--device')


def run(*words, folder=None, start=(sys.executable, '-m', 'robustnb')):
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=120, cwd=folder,
                          env=os.environ | dict(COLUMNS='80', PYTHONPATH=str(root), OMP_NUM_THREADS='1'))


def function(name):
    return getattr(import_module(f'robustnb.commands.{cli._HOMES[name]}'), cli._function(name))


def said(capsys, *words):
    "Status, standard output and standard error of a command line"
    try:
        status = cli.main(list(words))
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_one_script_and_its_commands():
    settings = ConfigParser(delimiters=['='])
    settings.read(root/'settings.ini', encoding='utf-8')
    assert settings['DEFAULT']['console_scripts'].split() == ['robustnb=robustnb.commands.command_line:main']
    assert sorted(cli._HOMES) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_the_example_parses(name):
    about, options = cli._options(cli._HOMES[name], cli._function(name))
    lines = [o.strip() for o in about.splitlines() if o.startswith('    ')]
    assert len(lines) == 1
    words = shlex.split(lines[0])
    assert words[:2] == ['robustnb', name]
    given = cli._given(name, words[2:])
    assert len(given) > 2, 'an example gives something'
    assert all(len(text) > 4 for _, _, text, _ in options.values())


@pytest.mark.parametrize('name', NAMES)
def test_what_is_read_from_the_source_is_what_the_function_takes(name):
    _, options = cli._options(cli._HOMES[name], cli._function(name))
    job = signature(function(name)).parameters
    named = {k: o for k, o in job.items() if o.kind is not o.VAR_KEYWORD}
    for k, o in named.items():
        kind, default, _, _ = options[k]
        assert kind is o.annotation
        assert o.default is o.empty if default is cli._REQUIRED else default == o.default
    shared = set(options) - set(named)
    assert bool(shared) == (len(named) < len(job))
    own = [f for f in vars(common).values() if getattr(f, '__module__', '') == common.__name__]
    known = {k for f in own for k in signature(f).parameters}
    assert shared <= known


@pytest.mark.parametrize('name', 'assess evaluate cost quantize export generate sweep'.split())
def test_the_same_words_for_a_model(name, capsys):
    status, help, _ = said(capsys, name, '--help')
    assert status == 0
    assert all(f'  {o} ' in help for o in (*WORDS.values(), '--out'))
    assert all(o in help for o in ('--json', '--quiet', '--version'))
    assert ('--images' in help) == (name in 'assess quantize export sweep'.split())
    assert ('--test' in help) == (name in 'assess evaluate sweep'.split())


@pytest.mark.parametrize('words, says', [
    (['--help'], 'attack-descriptors'), (['--version'], 'robustnb '), (['assess', '--help'], '--images'),
    (['cost', '--version'], 'robustnb '), (['asses'], 'Did you mean assess?'),
    (['quantize', '--fromats', 'INT8'], 'Did you mean --formats?'), (['evaluate', '--n', 'few'], 'few')])
def test_answers_at_once(words, says):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run('-c', 'import sys; from robustnb.commands.command_line import main\n'
               'try: status = main(sys.argv[1:])\nexcept SystemExit as e: status = e.code\n'
               'assert not {"torch", "numpy", "pandas", "fastcore"} & set(sys.modules); sys.exit(status)',
               *words, start=[sys.executable])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert says in done.stdout + done.stderr
    assert 'Error' not in done.stderr
    assert done.returncode == (2 if words[-1] in ('asses', 'INT8', 'few') else 0)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize('words, says', [
    ([], 'a command must be given'), (['tarin'], 'Did you mean train?'), (['zzz'], 'no command'),
    (['train', '--epoch', '3'], 'no --epoch. Did you mean --epochs?'),
    (['train', '--zzzz'], 'no --zzzz. See'),
    (['train', '--epochs', 'x'], '--epochs'), (['train', '--epochs'], '--epochs'),
    (['build-set', 'clean'], '--model must be given'),
    (['assess', 'a.pt', '--model', 'b.pt'], 'given twice'), (['demo', 'a'], 'no a')])
def test_a_command_line_that_is_none(words, says, capsys):
    status, out, err = said(capsys, *words)
    assert status == 2
    assert out == ''
    assert says in err
    assert err.count('\n') == 1
    assert err.startswith('robustnb')


def test_a_model_may_stand_without_its_option_and_words_may_have_lines_below():
    assert cli._given('cost', ['a.pt', '--size=64']) == dict(
        model='a.pt', size=64, json=False, quiet=False)
    assert cli._given('train', ['--no_flip'])['no_flip'] is True
    assert cli._given('attack-descriptors', ['b', 's', 'd', '--n_pairs', '3'])['n_pairs'] == 3
    assert cli._given('score-set', ['a,b', '--model', 'w.pt'])['model'] == 'w.pt'
    assert 'formats' not in cli._given('assess', []), 'defaults are those of the function'


def test_help_is_folded_but_for_the_example():
    done = run('train', '--help')
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert not done.stderr
    assert lines[0] == 'usage: robustnb train [MODEL] [options]'
    assert '(default: ResNet_18)' in done.stdout
    assert '(default: )' not in done.stdout
    assert 'default: False' not in done.stdout
    assert all(len(o) <= 80 or o.startswith('    ') for o in lines)


def test_a_command_runs_and_complains_in_one_line(tmp_path, capsys):
    done = run('validate-set', 'nowhere', folder=tmp_path)
    assert done.returncode == 1
    assert 'nowhere' in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    status, out, err = said(capsys, 'demo', '--epochs', '0', '--json', '--out', str(tmp_path/'demo'))
    if isinstance(status, str): status, err = 1, err + status   # sys.exit prints its words at the end
    assert status == 1
    assert out == ''
    assert err.strip() == 'ValueError: `epochs` must be a whole number, at least 1; got 0.'


@pytest.fixture
def pretended(monkeypatch):
    "A command that says what the test wants and returns what it wants"
    import robustnb.commands.demo as demo
    def with_result(result):
        def job(**given):
            print('a table')
            print('a bar' if sys.stderr.isatty() else 'no bar', file=sys.stderr)
            if isinstance(result, BaseException): raise result
            return result
        monkeypatch.setattr(demo, 'demo_command', job)
    return with_result


def test_json_is_one_document_and_nothing_else(pretended, capsys):
    import numpy as np
    pretended(dict(a=np.float32(.5), b=float('nan'), c=[np.int64(3)], d=np.array([1., np.inf]),
                   e=Path('x')))
    status, out, _ = said(capsys, 'demo', '--json')
    assert status == 0
    assert json.loads(out) == dict(a=.5, b=None, c=[3], d=[1., None], e='x')
    assert 'NaN' not in out
    assert said(capsys, 'demo')[1] == 'a table\n'
    assert said(capsys, 'demo', '--quiet')[1] == ''


def test_quiet_draws_no_bar(pretended, capsys, monkeypatch):
    pretended(dict())
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    assert said(capsys, 'demo')[2] == 'a bar\n'
    assert said(capsys, 'demo', '--quiet')[2] == 'no bar\n'


def test_exit_statuses(pretended, capsys):
    pretended(dict(failed=2))
    assert said(capsys, 'demo')[0] == 1
    pretended(KeyboardInterrupt())
    status, _, err = said(capsys, 'demo')
    assert status == 130
    assert 'goes on where it was' in err
    pretended(None)
    assert said(capsys, 'demo', '--json')[:2] == (0, '')


def test_every_page_types_commands_that_exist():
    "In README, notebooks, docstrings and messages none of the fifteen scripts"
    old = re.compile(r'\brobustnb_(?:train|assess|cost|quantize|generate|fit_predictor|build_set|score_set|'
                     r'validate_set|distill|attack_descriptors|check_submission|sweep|demo)\b')
    files = [*root.glob('*.md'), root/'Makefile', *root.glob('nbs/**/*.ipynb'),
             *root.glob('robustnb/**/*.py'), *root.glob('benchmarks/**/*.py'), *root.glob('tools/*.py')]
    held = {f: f.read_text(encoding='utf-8') for f in files if '.ipynb_checkpoints' not in str(f)}
    assert not [f.name for f, text in held.items() if old.search(text) and f.name != 'CHANGELOG.md']
    typed = set()
    for f, text in held.items():
        typed |= set(re.findall(r'robustnb ([a-z]+(?:-[a-z]+)*) (?:--?[a-z]|[\w./]+\.pt|timm:)', text))
    assert typed <= set(NAMES), typed - set(NAMES)
    assert 'assess' in typed


def test_help_for_a_reader_who_has_gone():
    read, write = os.pipe()
    os.close(read)
    said = subprocess.run([sys.executable, '-m', 'robustnb', '--help'], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert said.returncode == 0
    assert said.stderr == b''


NET = '''
from torch import nn, ones
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(12, 4)
        self.f.weight.data = ones(4, 12)
        self.f.bias.data = ones(4)
    def forward(self, x): return '''


def test_a_network_is_known_by_its_code_too(tmp_path):
    "A folder with results of a network is not continued with another `forward` of the same layers"
    marks = []
    for i, body in enumerate(('self.f(x.flatten(1))', 'self.f(x.flatten(1)).sin()', 'self.f(x.flatten(1))')):
        (tmp_path/f'nets{i}.py').write_text(NET + body)
        spec = importlib.util.spec_from_file_location('nets', tmp_path/f'nets{i}.py')
        module = importlib.util.module_from_spec(spec)
        sys.modules['nets'] = module
        spec.loader.exec_module(module)
        marks.append(common._mark_model(module.Net()))
    del sys.modules['nets']
    assert marks[0] == marks[2] != marks[1]
