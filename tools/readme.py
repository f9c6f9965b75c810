"Write README.md from nbs/index.ipynb, without Quarto"
import os, re, sys
from posixpath import normpath
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from docs_pages import notebook_md, pandoc

cfg = get_config()


class Stock(FilterDefaults):
    "nbdev's own processors: ours are for pages of the site"
    def xtra_procs(self): return []


def no_picture(data, name):
    sys.exit(f'{cfg.readme_nb}: README.md cannot hold a figure made by code; link to a file')


def readme():
    "README.md as it should be now; relative links are rewritten as seen from the top folder"
    os.environ['IN_TEST'] = '1'                        # as nbdev_docs does
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    Stock()(nb)
    front, md = notebook_md(nb, no_picture)
    md = re.sub(r'<style.*?</style>\n?', '', md, flags=re.S)       # pandas': GitHub would print it
    body = pandoc(md, 'gfm', '--columns=100')

    def from_top(m): return f']({normpath(f"{cfg.nbs_path.name}/{m[1]}")}'
    body = re.sub(r'\]\((?!\w+:|#|/)([^)\s]+)', from_top, body)
    return f'# {front["title"]}\n\n{front.get("description", "")}\n\n{body}'


if __name__ == '__main__': (cfg.config_path/'README.md').write_text(readme(), encoding='utf-8')
