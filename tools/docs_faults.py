"""The faults that a site can have although every link resolves, one line for each."""
import ast, re
from pathlib import Path
from docs_pages import Parts, text

ENTRIES = 15                 # in one section of the menu
# For these Quarto loads RequireJS and jQuery from another host (its src/core/jupyter/widgets.ts)
SCRIPTED = {'text/html', 'application/javascript', 'application/vnd.jupyter.widget-view+json'}


def menu_files(items):
    "The files that the sidebar of `_quarto.yml` names, in order"
    for o in items:
        if isinstance(o, str): yield o
        else:
            if 'href' in o: yield o['href']
            yield from menu_files(o.get('contents', []))


def menu_faults(items, notebooks):
    "Notebooks that the menu lacks or names in vain, and sections too long to be read"
    files = list(menu_files(items))
    for o in sorted(set(notebooks) - set(files)): yield f'_quarto.yml: the menu lacks {o}'
    for o in sorted(set(files) - set(notebooks)): yield f'_quarto.yml: there is no {o}'
    yield from flat_sections(items, 'the menu')


def flat_sections(items, name):
    "Sections of more than `ENTRIES` entries, at any depth, and an API without sections in it"
    sections = [o for o in items if isinstance(o, dict) and 'contents' in o]
    if len(items) > ENTRIES:
        yield f'_quarto.yml: {name} lists {len(items)} entries, at most {ENTRIES} can be read'
    if name == 'API' and not sections: yield '_quarto.yml: API has no sub-sections'
    for o in sections: yield from flat_sections(o['contents'], o['section'])


def exported(nb):
    "Module that a notebook exports, or None, and its public functions and classes, in order"
    module = None
    names = []
    for cell in nb['cells']:
        if cell['cell_type'] != 'code': continue
        source = text(cell['source'])
        head = re.match(r'(\s*#\s*\|.*\n?|\s*\n)*', source)[0]
        directives = dict(re.findall(r'#\s*\|\s*([\w-]+):?[ \t]*(.*)', head))
        module = directives.get('default_exp', module)
        if directives.keys() & {'export', 'exports'}:
            names += [o.name for o in ast.parse(source).body if hasattr(o, 'name')]
    return module, [o for o in names if not o.startswith('_')]


def index_faults(module, names, symbols):
    "Names of a module that nbdev's index, `_modidx.py`, lacks: they have no links and no source"
    known = symbols.get(module, {})
    if not known:
        yield f'{module}: empty in _modidx.py; nbdev skips notebooks with "auto" in their path'
    lost = [o for o in names if f'{module}.{o}' not in known]
    if known and lost: yield f'{module}: not in _modidx.py: {", ".join(lost)}'


def shown(nb):
    "The names that a processed notebook shows, in order"
    code = '\n'.join(text(o['source']) for o in nb['cells'] if o['cell_type'] == 'code')
    return re.findall(r'^show_doc\((\w+)\)', code, re.M)


def order_faults(names, seen):
    "Exported names that a page does not show, or shows in another order"
    lost = [o for o in names if o not in seen]
    order = [o for o in names if o in seen]
    if lost: yield f'not shown: {", ".join(lost)}'
    if order != [o for o in seen if o in names]:
        yield f'not in the order of the notebook: {", ".join(seen)}'


def output_faults(nb):
    "Outputs for which Quarto would load scripts from another host"
    for cell in nb['cells']:
        for o in cell.get('outputs', []):
            for kind in sorted(SCRIPTED & o.get('data', {}).keys()):
                yield f'an output is {kind}: Quarto would load RequireJS and jQuery for it'


def html_faults(parts):
    "Markdown that shows as it is written, in a block or as a link within a link, and scripts of other hosts"
    for o in parts.blocks:
        if m := re.search(r'\[[^\]\n]*\]\(\w+:[^)\s]*\)', o):
            yield f'a block shows Markdown: {m[0]}'
    for o in re.findall(r'\]\(\s*[\w./]+[:/][^)\s]*\)', parts.prose):
        yield f'the text shows Markdown: {o}'
    for o in parts.scripts:
        if re.match(r'(https?:)?//', o): yield f'a script of another host: {o}'


def site_faults(folder):
    "What `html_faults` finds in the pages that Quarto made"
    for f in sorted(Path(folder).rglob('*.html')):
        yield from (f'{f}: {o}' for o in html_faults(Parts(f.read_text(encoding='utf-8'))))
