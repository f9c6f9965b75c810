"What is released: the wheel, one version, and workflows that run what exists"
import email, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
workflows = {f.stem: yaml.load(f.read_text(encoding='utf-8'), yaml.BaseLoader)
             for f in sorted((root/'.github/workflows').glob('*.yml'))}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel made by the build backend itself, offline, from a copy of what it needs"
    at = tmp_path_factory.mktemp('tree')
    for f in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(root/f, at)
    shutil.copytree(root/'robustnb', at/'robustnb', ignore=shutil.ignore_patterns('__pycache__'))
    job = 'import setuptools.build_meta as b; print(b.build_wheel("dist"))'
    done = subprocess.run([sys.executable, '-c', job], cwd=at, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return next((at/'dist').glob('*.whl'))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    package = {f.relative_to(root).as_posix() for f in (root/'robustnb').rglob('*')
               if f.suffix in ('.py', '.json') and '__pycache__' not in f.parts}
    assert {o for o in names if '.dist-info/' not in o} == package
    assert wheel.stat().st_size < 1_000_000


def test_wheel_says_what_settings_say(wheel):
    assert wheel.name.startswith(f"robustnb-{settings['version']}-py3-none-any")
    with zipfile.ZipFile(wheel) as z:
        text = {Path(o).name: z.read(o).decode() for o in z.namelist() if '.dist-info/' in o}
    meta = email.message_from_string(text['METADATA'])
    needed = [o for o in meta.get_all('Requires-Dist') if 'extra ==' not in o]
    assert meta['Version'] == settings['version']
    assert meta['Requires-Python'] == '>=' + settings['min_python']
    assert [re.match(r'[\w-]+', o)[0] for o in needed] == [
        re.match(r'[\w-]+', o)[0] for o in settings['requirements'].split()]
    assert 'LICENSE' in text
    assert '# robustnb' in meta.get_payload()
    entries = ConfigParser(delimiters=['='])
    entries.read_string(text['entry_points.txt'])
    scripts = [o.partition('=')[::2] for o in settings['console_scripts'].split()]
    assert dict(entries['console_scripts']) == dict(scripts)


def test_wheel_works_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path/'site')
    job = ('import sys; sys.path.insert(0, "site"); import robustnb; from '
           'robustnb.transfer.predictor import load_predictor; from importlib.metadata import '
           'version;print(robustnb.__file__, version("robustnb"), '
           'load_predictor("loss").spread > 0)')
    done = subprocess.run([sys.executable, '-I', '-c', job], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file, version, links = done.stdout.split()
    assert links == 'True'
    assert Path(file).resolve().is_relative_to(tmp_path.resolve())
    assert version == settings['version']


def test_version_in_one_place():
    written = [f.relative_to(root).as_posix()
               for f in [*root.glob('*.toml'), *root.glob('*.py'), *(root/'robustnb').rglob('*.py')]
               if re.search(r'''version\w*\s*=\s*['"]''' + re.escape(settings['version']),
                            f.read_text(encoding='utf-8'))]
    # nbdev_export writes it there from settings.ini
    assert written == ['robustnb/__init__.py']
    assert re.search(r'^## (\S+)', (root/'CHANGELOG.md').read_text(encoding='utf-8'),
                     re.M)[1] == settings['version']


def steps(name): return [o for job in workflows[name]['jobs'].values() for o in job['steps']]


@pytest.mark.parametrize('name', workflows)
def test_workflow(name):
    flow = workflows[name]
    targets = re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(encoding='utf-8'), re.M)
    assert flow['on']
    assert flow['permissions']
    assert all({'runs-on', 'steps', 'timeout-minutes'} <= set(o) for o in flow['jobs'].values())
    for o in steps(name):
        assert ('run' in o) != ('uses' in o)
        assert 'uses' not in o or re.fullmatch(r'[\w-]+/[\w/-]+@v\d+', o['uses'])
        assert set(re.findall(r'make ([a-z-]+)', o.get('run', ''))) <= set(targets)


def test_ci_runs_what_ci_run_runs():
    runs = [o.get('run') for o in steps('ci')]
    pythons = workflows['ci']['jobs']['checks']['strategy']['matrix']['python']
    assert '.ci/run' in runs
    assert (root/'.ci/run').stat().st_mode & 0o111
    assert settings['min_python'] in pythons
    assert any('python -m build' in (o or '') for o in runs)
    for target in re.findall(r'^step make (\S+)', (root/'.ci/run').read_text(), re.M):
        assert f'\n{target}:' in (root/'Makefile').read_text()


def test_pages_publishes_what_quarto_makes():
    quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    order = [o.get('run') or o['uses'].partition('@')[0] for o in steps('pages')]
    assert order.index('quarto-dev/quarto-actions/setup') < order.index('make docs') < order.index(
        'actions/upload-pages-artifact') < order.index('actions/deploy-pages')
    upload = next(o for o in steps('pages') if o.get('uses', '').startswith('actions/upload-pages'))
    assert upload['with']['path'] == quarto['project']['output-dir'] == settings['doc_path']
    assert {'pages': 'write',
            'id-token': 'write'}.items() <= workflows['pages']['permissions'].items()
