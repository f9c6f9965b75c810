"All metadata lives in settings.ini: edit it there, not here."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]


def readme():
    "README.md with links that also lead somewhere on PyPI, which has no files beside it"
    text = (here/'README.md').read_text(encoding='utf-8')
    text = re.sub(r'(!\[[^\]]*\]\()(?!\w+:|#)', rf"\1{cfg['git_url']}/raw/{cfg['branch']}/", text)
    return re.sub(r'\]\((?!\w+:|#)', f"]({cfg['git_url']}/blob/{cfg['branch']}/", text)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'], url=cfg['git_url'],
    long_description=readme(), long_description_content_type='text/markdown',
    project_urls=dict(Documentation=cfg['doc_host']+cfg['doc_baseurl'],
                      Changelog=f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {o}' for o in cfg['pythons'].split()),
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['**/*.json']},
    python_requires='>='+cfg['min_python'],
    install_requires=lines('requirements'),
    extras_require={k: lines(f'{k}_requirements') for k in ('dev', 'export', 'onnx', 'timm', 'faces', 'slurm', 'accelerate')},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
