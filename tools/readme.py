"Write README.md from nbs/index.ipynb, without Quarto"
import os, re, sys
from posixpath import normpath
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
from docs_check import cfg, notebook_md, pandoc


def no_picture(data, name): sys.exit(f'{cfg.readme_nb}: README.md cannot hold a figure made by code; link to a picture file instead')


def readme():
    "README.md as it should be now; relative links are rewritten as seen from the top folder"
    os.environ['IN_TEST'] = '1'                        # as nbdev_docs does
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    FilterDefaults()(nb)
    front, md = notebook_md(nb, no_picture)
    md = re.sub(r'<style.*?</style>\n?', '', md, flags=re.S)       # pandas': GitHub would print it
    body = pandoc(md, 'gfm', '--columns=100')
    body = re.sub(r'\]\((?!\w+:|#|/)([^)\s]+)', lambda m: f']({normpath(f"{cfg.nbs_path.name}/{m[1]}")}', body)
    return f'# {front["title"]}\n\n{front.get("description", "")}\n\n{body}'


if __name__ == '__main__': (cfg.config_path/'README.md').write_text(readme(), encoding='utf-8')
