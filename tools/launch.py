"""Put links to Colab and Binder, and a cell that installs the package there, on top of tutorials.

`python tools/launch.py nbs/tutorials/*.ipynb` writes into notebooks that have none.
"""
import json, sys
from pathlib import Path
from nbdev.config import get_config
from docs_pages import text

cfg = get_config()
INSTALL = f'''#| hide
import sys
if 'google.colab' in sys.modules:
    get_ipython().run_line_magic('pip', 'install -q git+{cfg.git_url}')'''


def launch_links(path):
    "Markdown of the links that open the notebook at `path`, relative to the top folder"
    where = f'{cfg.user}/{cfg.repo}'
    colab = f'https://colab.research.google.com/github/{where}/blob/{cfg.branch}/{path}'
    binder = f'https://mybinder.org/v2/gh/{where}/{cfg.branch}?urlpath=lab/tree/{path}'
    return f'Run it: [in Colab]({colab}), [on Binder]({binder}).'


def launchable(book, path):
    "The notebook with both, after its title; as it is if it has them"
    links = launch_links(path)
    cells = book['cells']
    if any(links in text(o['source']) for o in cells): return book
    made = [dict(cell_type='markdown', id='launch01', metadata={}, source=[links]),
            dict(cell_type='code', execution_count=None, id='launch02', metadata={}, outputs=[],
                 source=INSTALL.splitlines(True))]
    return book | dict(cells=[*cells[:1], *made, *cells[1:]])


if __name__ == '__main__':
    for name in sys.argv[1:]:
        file = Path(name).resolve()
        book = json.loads(file.read_text(encoding='utf-8'))
        done = launchable(book, file.relative_to(cfg.config_path).as_posix())
        file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
