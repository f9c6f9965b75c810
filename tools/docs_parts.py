"""What nbdev does otherwise here: `renderer` and `procs` in settings.ini name this file.

This folder must be on Python's path then: `make docs` and `make docs-check` see to it.
"""
import ast, inspect, re
import nbdev.processors
from fastcore.docments import DocmentText, MarkdownRenderer
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import Processor
from nbdev.showdoc import BasicMarkdownRenderer
from docs_tables import fitted

SIGNATURE = 88        # characters in a line of a signature
EXPORTED = {'export', 'exports', 'exporti', 'exec_doc'}
MARKUP = re.compile(r'[\\*_^~<>$@\[\]|#`]')


class ArgumentsBelow(MarkdownRenderer):
    "A signature without comments, the docstring, and a table of what the arguments mean"
    def _repr_markdown_(self):
        signature = DocmentText(self.sym, maxline=SIGNATURE, docstring=False)
        table = argument_table({signed(name, o): o.copy() for name,o in signature.dm.items()})
        for o in signature.dm.values():
            o['docment'] = None
            if o['anno'] is type(None): o['anno'] = inspect.Parameter.empty     # fastcore's guess
        code = f'```python\n{on_one_line(str(signature))}\n```'
        return '\n\n'.join(filter(None, [code, self.docs, table, method_table(self.sym)]))


class ShowDoc(BasicMarkdownRenderer, ArgumentsBelow):
    "The heading and the link to the source as nbdev makes them, then `ArgumentsBelow`"


def runs(cell, by_nbdev=nbdev.processors._do_eval):
    "Whether a signature needs what a cell does: an example beside its import is for the tests to run"
    if not by_nbdev(cell): return False
    imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in cell.parsed_()]
    return bool(cell.directives_.keys() & EXPORTED) or all(imports) or not any(imports)


nbdev.processors._do_eval = runs


def on_one_line(signature):
    "The signature on one line, where that has room for it"
    short = re.sub(r'\n +(.*)\n\)', r'\1)', signature)
    return short if len(short) <= SIGNATURE and '\n' not in short else signature


def signed(name, argument):
    "The name of an argument as a signature shows it"
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    return stars.get(argument.get('kind'), '') + name


def argument_table(arguments):
    "Markdown of the table, empty if no argument has a comment; nbdev links names in backticks"
    rows = [row(name, o) for name,o in arguments.items() if o.get('docment')]
    if not rows: return ''
    head = ['| Argument | Type | Meaning |', '|:--|:--|:--|']
    return '\n'.join(['::: {.arguments}', '', *head, *rows, '', ':::'])


def method_table(sym):
    "Markdown of the public methods of a class, each with the anchor that nbdev's links to it have"
    if not inspect.isclass(sym): return ''
    functions = [f for f in vars(sym).values() if inspect.isfunction(f) and f.__doc__]
    methods = [f for f in functions if not f.__name__.startswith('_')]
    if not methods: return ''
    rows = [f'| []{{#{f.__qualname__.lower()}}}`{called(f)}` | {comment_md(first_paragraph(f))} |'
            for f in methods]
    return '\n'.join(['::: {.methods}', '', '| Method | Meaning |', '|:--|:--|', *rows, '', ':::'])


def first_paragraph(method):
    "The docstring up to its first empty line"
    return inspect.getdoc(method).split('\n\n')[0]


def called(method):
    "A method with the names of its arguments"
    return f'{method.__name__}({", ".join(list(inspect.signature(method).parameters)[1:])})'


def row(name, argument):
    "One argument, or what is returned, as a line of the table"
    first = '**Returns**' if name == 'return' else f'`{name}`'
    return f'| {first} | {type_md(argument["anno"])} | {comment_md(argument["docment"])} |'


def type_md(annotation):
    "A type in backticks, without names of modules; each member of a union in its own, to be a link"
    if annotation in (inspect.Parameter.empty, type(None)): return ''
    said = re.sub(r'\b(\w+)\.([\w.]+)', short_name, inspect.formatannotation(annotation).strip("'\""))
    members = [said] if '[' in said else said.split('|')
    return ' or '.join(f'`{o.strip()}`' for o in members)


def short_name(m):
    "The last part of a dotted name; after its package where the last part alone would lead to ours"
    package = m[1]
    name = m[2].rpartition('.')[2]
    ours = package in ('__main__', get_config().lib_path.name)
    return name if ours or NbdevLookup().doc(name) is None else f'{package}.{name}'


def comment_md(comment):
    "A comment as text in which backticks are the only markup"
    pieces = re.split(r'(`[^`]+`)', ' '.join(comment.split()))
    return ''.join(o if o.startswith('`') else MARKUP.sub(r'\\\g<0>', o) for o in pieces)


class InOrder(Processor):
    "Show the names that one cell exports in the order of the cell: nbdev inserts them in reverse"
    def __init__(self, nb):
        super().__init__(nb)
        self.names = [name for cell in nb.cells for name in defined(cell)]

    def begin(self):
        cells = self.nb.cells
        for first in range(len(cells)):
            if shown(cells[first]) is None or first and shown(cells[first-1]) is not None: continue
            last = first
            while last < len(cells) and shown(cells[last]) is not None: last += 1
            cells[first:last] = sorted(cells[first:last], key=lambda o: self.names.index(shown(o)))


def exported_statements(cell):
    "What an exported cell adds to its module, none for any other cell"
    if cell.cell_type != 'code' or not cell.directives_.keys() & {'export', 'exports'}: return []
    return ast.parse(cell.source).body


def defined(cell):
    "The functions and classes that an exported cell defines"
    return [o.name for o in exported_statements(cell) if hasattr(o, 'name')]


def shown(cell):
    "The name that a cell inserted by nbdev shows, None for any other cell"
    if cell.cell_type != 'code' or not getattr(cell, 'has_sd', False): return None
    return re.search(r'show_doc\((.*)\)', cell.source)[1]


def html_as_markdown(cell):
    "Keep saved HTML in Markdown: for `text/html` Quarto loads RequireJS and jQuery from a CDN"
    for o in cell.get('outputs', []):
        html = o.get('data', {}).pop('text/html', None)
        if html is None: continue
        html = fitted(''.join(html)).strip()
        o['data']['text/markdown'] = f'```{{=html}}\n{html}\n```\n'.splitlines(True)
