"""Write nbs/llms.txt from the menu: what the site holds, for language models (llmstxt.org)."""
import json
from pathlib import Path
import yaml
from nbdev.config import get_config
from docs_faults import exported, menu_files
from docs_pages import text

cfg = get_config()
FILE = cfg.nbs_path/'llms.txt'


def facts(file):
    "Title, description and address of the page of a notebook"
    book = json.loads((cfg.nbs_path/file).read_text(encoding='utf-8'))
    title, _, rest = text(book['cells'][0]['source']).partition('\n')
    said = [o[1:].strip() for o in rest.splitlines() if o.startswith('>')]
    module = exported(book)[0]
    name = module.rpartition('.')[2] if module else Path(file).stem
    page = Path(file).with_name(f'{name}.html').as_posix()
    return title.strip('# '), ' '.join(said), f'{cfg.doc_host}{cfg.doc_baseurl}/{page}'


def entry(file):
    title, said, page = facts(file)
    return f'- [{title}]({page}): {said}'


def sections(items, above=''):
    "A heading and its links for each section of the menu that lists pages"
    for o in items:
        if isinstance(o, str): continue
        name = above + o['section']
        pages = [entry(file) for file in o['contents'] if isinstance(file, str)]
        if pages: yield '\n'.join([f'## {name}', '', *pages])
        yield from sections(o['contents'], f'{name}: ')


def llms():
    "The file as it should be now"
    quarto = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))
    menu = quarto['website']['sidebar']['contents']
    title, said, page = facts(next(menu_files(menu)))
    start = (f'# {title}\n\n> {said}.\n\nA Python library on PyTorch, version {cfg.version}. Start at the '
             f'[front page]({page}); source and changes are in [the repository]({cfg.git_url}).')
    return '\n\n'.join([start, *sections(menu)]) + '\n'


if __name__ == '__main__': FILE.write_text(llms(), encoding='utf-8')
