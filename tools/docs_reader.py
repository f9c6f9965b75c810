"""What disturbs a reader of a page although nothing on it is broken, one line for each fault."""
import os, re
from pathlib import PurePath
from docs_pages import text

# Praise, what talks a difficulty away, and what only makers know
FORBIDDEN = '''utili[sz]\\w*  leverag(es?|ed|ing)  simply  obviously  trivially  easily  easy\\s+to
    state-of-the-art  cutting-edge  novel  seamless\\w*  effortless\\w*  powerful  delve\\w*
    in\\s+order\\s+to  as\\s+everyone\\s+knows  TODO  FIXME  (/work|/tmp|/root|/home)/\\w+  issue\\s+\\d+'''
WORDS = re.compile(rf'(?<![\w/])({"|".join(FORBIDDEN.split())})(?!\w)', re.I)
LINK = re.compile(r'\[[^\]\n]*\]\((\w+:|#|[\w./-]*\.(ipynb|html|md)\b)[^)\s]*\)')
NAN = re.compile(r'(?<!\w)nan(?!\w)', re.I)
EXPLAINED = re.compile(r'\bNaN\b|\bnot measured\b')
LEADS_ON = 'tutorials', 'howto', 'explain', 'results'       # pages that a reader leaves for another


def reader_faults(name, nb, parts):
    "All of them, for a notebook as it is saved and the parts of its page"
    yield from code_faults(parts)
    yield from picture_faults(parts)
    yield from word_faults(parts)
    yield from nan_faults(nb)
    yield from next_faults(name, nb)


def code_faults(parts):
    "Links that stand in code within a line, where they show as they are written"
    for o in parts.codes:
        if m := LINK.search(o): yield f'code shows Markdown: {m[0]}'


def picture_faults(parts):
    "Pictures that say nothing to a reader who does not see them"
    for o in parts.unnamed: yield f'a picture without alt text: {o}; give its cell `#| fig-alt: "..."`'


def word_faults(parts):
    "Words of `FORBIDDEN` outside of code"
    for m in WORDS.finditer(parts.prose):
        around = parts.prose[max(0, m.start()-30):m.end()+30]
        yield f'the text says {m[0]!r}: {" ".join(around.split())}'


def nan_faults(nb):
    "Outputs with a cell of NaN on a page that says neither `NaN` nor `not measured`"
    prose = ' '.join(text(o['source']) for o in nb['cells'] if o['cell_type'] == 'markdown')
    if EXPLAINED.search(prose): return
    for i,cell in enumerate(nb['cells']):
        if any(map(has_nan, cell.get('outputs', []))):
            yield f'cell {i} shows NaN, and no sentence of the page says what NaN means there'


def has_nan(output):
    "Whether NaN stands in a cell of an output's table, or anywhere in one without tables"
    data = output.get('data', {})
    if 'text/html' in data: return bool(re.search(r'>\s*nan\s*<', text(data['text/html']), re.I))
    return bool(NAN.search(text(output.get('text', '')) + text(data.get('text/plain', ''))))


def next_faults(name, nb):
    "A page to be read through whose last text leads to no other page"
    if PurePath(name).parts[0] not in LEADS_ON: return
    last = [text(o['source']) for o in nb['cells'] if o['cell_type'] == 'markdown'][-1]
    links = re.findall(r'\]\(([^)\s#]+\.ipynb)', last)
    here = PurePath(name).parent
    if all(os.path.normpath(here/o) == os.path.normpath(name) for o in links):
        yield 'no next step: the last text has no link to another page'
