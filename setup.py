"All metadata lives in settings.ini: edit it there, not here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'], url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['**/*.json']},
    python_requires='>='+cfg['min_python'],
    install_requires=lines('requirements'),
    extras_require={k: lines(f'{k}_requirements') for k in ('dev', 'export', 'onnx', 'timm', 'faces', 'slurm', 'accelerate')},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
