"Every command of settings.ini: its help reads well, and its example can be typed"
import os, re, shlex, subprocess, sys
from argparse import ArgumentParser
from configparser import ConfigParser
from importlib import import_module
from inspect import cleandoc, signature
from pathlib import Path
import pytest
from fastcore.script import anno_parser

root = Path(__file__).parents[2]
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')
commands = dict(re.findall(r'^\s*(\w+)=(\S+)$', settings['DEFAULT']['console_scripts'], re.M))
# what pip writes
STUB = 'import sys\nfrom {} import {} as main\nif __name__ == "__main__": sys.exit(main())\n'


def command(name):
    module, function = commands[name].split(':')
    return getattr(import_module(module), function)


def example(name):
    "The words of the example in the docstring of a command"
    found = [o.strip() for o in cleandoc(command(name).__doc__).splitlines()
             if o.startswith('    ')]
    assert len(found) == 1, f'{name} must have one example: {found}'
    assert found[0].startswith(name), f'{name} must have one example: {found}'
    return shlex.split(found[0])[1:]


def run(name, *words, folder, columns=80):
    module, function = commands[name].split(':')
    (folder/name).write_text(STUB.format(module, function))
    return subprocess.run([sys.executable, folder/name, *words], capture_output=True,
                          text=True, timeout=120, cwd=folder,
                          env=os.environ | dict(COLUMNS=str(columns), PYTHONPATH=str(root)))


@pytest.mark.parametrize('name', commands)
def test_example_parses(name, monkeypatch):
    monkeypatch.setattr(ArgumentParser, 'error',
                        lambda self, message: pytest.fail(f'{name}: {message}'))
    given = vars(anno_parser(command(name), name).parse_args(example(name)))
    assert set(signature(command(name)).parameters) <= set(given)


@pytest.mark.parametrize('name', commands)
def test_every_argument_is_explained(name):
    for o in anno_parser(command(name), name)._actions:
        assert o.help, f'{name}: {o.dest} has no help'
        assert len(o.help) > 4, f'{name}: {o.dest} has no help'


def test_an_unknown_option_does_not_parse():
    with pytest.raises(SystemExit):
        anno_parser(command('robustnb_demo')).parse_args(['--epoch_count', '3'])


@pytest.mark.parametrize('name', ['robustnb_train', 'robustnb_check_submission'])
def test_help_in_a_shell(name, tmp_path):
    said = run(name, '--help', folder=tmp_path)
    assert said.returncode == 0
    assert not said.stderr
    lines = said.stdout.splitlines()
    assert lines[0].startswith(f'usage: {name} ')
    assert any(o.startswith(f'    {name} ') for o in lines)
    assert '(default: )' not in said.stdout
    assert 'default: False' not in said.stdout
    # folded, but for the example: it is copied as it stands
    assert all(len(o) <= 80 or o.startswith('    ') for o in lines)
    assert name != 'robustnb_train' or '(default: ResNet_18)' in said.stdout


def test_a_command_runs_and_complains_in_one_line(tmp_path):
    said = run('robustnb_validate_set', 'nowhere', folder=tmp_path)
    assert said.returncode == 1
    assert 'nowhere' in said.stdout + said.stderr
    assert 'Traceback' not in said.stderr
    said = run('robustnb_demo', '--epochs', '0', folder=tmp_path)
    assert said.returncode == 1
    assert said.stderr.strip() == 'ValueError: `epochs` must be at least 1; got 0.'
    said = run('robustnb_demo', '--epoch_count', '0', folder=tmp_path)
    assert said.returncode == 2
    assert 'unrecognized arguments' in said.stderr


@pytest.mark.parametrize('call', [
    'main("nowhere")',
    'def job(): main()\ntry: job()\nexcept TypeError: sys.exit("ValueError: nothing given")'],
                         ids=['with arguments', 'in a function'])
def test_a_script_of_ones_own_keeps_its_command_line(call, tmp_path):
    (tmp_path/'script.py').write_text(
        f'import sys\nfrom robustnb.commands.curation import validate_set_command as main\n{call}\n')
    said = subprocess.run([sys.executable, tmp_path/'script.py', '--help'], capture_output=True,
                          text=True, timeout=120, env=os.environ | dict(PYTHONPATH=str(root)))
    assert 'usage' not in said.stdout
    assert said.returncode == 1
    assert 'Error: ' in said.stderr


def test_from_python_the_arguments_of_the_command_line_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['anything', '--help'])
    with pytest.raises((SystemExit, TypeError), match='weights|path'):
        command('robustnb_validate_set')()
