"""Check the house limits on the notebooks, one line per breach.

`python tools/house.py [NOTEBOOK ...]` checks all of nbs/ by default. CONTRIBUTING.md says what
the limits are for.
"""
import ast, io, json, re, sys, tokenize
from collections import namedtuple
from pathlib import Path
import lines
import rooms
from rooms import places, room_of

PACKAGE = 'robustnb'
LINES, PARAMETERS, CELLS, BYTES = 40, 8, 60, 400_000
EXPORTS = {'export', 'exports', 'exporti'}
NO_LESSON = EXPORTS | {'hide', 'notest', 'slow', 'default_exp'}

Cell = namedtuple('Cell', 'kind directives source')


def parse_cell(cell):
    "Directives and source (without them) of a notebook cell; lines of IPython magic are blanked"
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code': return Cell(cell['cell_type'], {}, source)
    head = re.match(r'(\s*#\s*\|.*\n?|\s*\n)*', source)[0]
    directives = dict(re.findall(r'#\s*\|\s*([\w-]+):?[ \t]*(.*)', head))
    return Cell('code', directives, re.sub(r'^\s*[%!].*', '', source[len(head):], flags=re.M))


def imports_of(tree):
    "Modules of the package imported anywhere in `tree`; '' stands for the package itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for o in node.names:
                if o.name.split('.')[0] == PACKAGE:
                    yield o.name.partition('.')[2]
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ''
            if node.level == 0 and name.split('.')[0] != PACKAGE: continue
            yield name if node.level else name.partition('.')[2]


def comments_of(source):
    "Comment by line number, and whether it has the line to itself"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: (t.string.lstrip('# '), not t.line[:t.start[1]].strip())
            for t in tokens if t.type == tokenize.COMMENT}


def is_code(comment):
    "Whether `comment` is a statement that somebody switched off, not a sentence"
    try:
        body = ast.parse(comment).body
    except SyntaxError:
        return False
    def live(o):
        if isinstance(o, ast.Expr): return isinstance(o.value, (ast.Call, ast.Await, ast.Yield))
        return not isinstance(o, ast.AnnAssign) or o.value is not None
    return any(map(live, body))


def undocumented(node, comments):
    "Names of the arguments of `node`, and 'return' unless it is a method, that have no comment to themselves"
    a = node.args
    args = a.posonlyargs + a.args
    starts = {o.arg: o.lineno for o in args + a.kwonlyargs + [o for o in (a.vararg, a.kwarg) if o]}
    ends = dict(starts)
    last = list(zip(args[::-1], a.defaults[::-1]))
    for o, default in last + [(o, d) for o, d in zip(a.kwonlyargs, a.kw_defaults) if d]:
        ends[o.arg] = default.end_lineno
    if args and args[0].arg in ('self', 'cls'):
        ends.pop(args[0].arg)
    elif node.returns and ast.unparse(node.returns) != 'None':
        starts['return'] = node.returns.lineno
        ends['return'] = node.returns.end_lineno

    def has_comment(name):
        above = comments.get(starts[name] - 1, ('', False))
        return ends[name] in comments or above[1]
    return [k for k, line in ends.items()
            if not has_comment(k) or list(ends.values()).count(line) > 1]


def is_decorated(node, name): return any(name in ast.unparse(o) for o in node.decorator_list)


def interface(node):
    "The public functions of a definition (itself, or the methods of a class), with their names"
    if isinstance(node, ast.ClassDef):
        for o in node.body:
            if isinstance(o, ast.FunctionDef) and (not o.name.startswith('_') or o.name in (
                    '__init__', '__call__')) and not is_decorated(o, 'property'):
                yield f'{node.name}.{o.name}', o
    elif isinstance(node, ast.FunctionDef):
        yield node.name, node


def exported_cell(cell, tree):
    "Breaches inside one exported cell"
    n = len(cell.source.rstrip().splitlines())
    comments = comments_of(cell.source)
    if n > LINES:
        yield f'{n} lines, at most {LINES}'
    if not tree.body:
        yield 'an exported cell without code'
    for line,(comment,alone) in comments.items():
        if alone and is_code(comment):
            yield f'code in a comment: {comment}'
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(o.name == '*' for o in node.names):
            yield f'star import of {node.module}'
        if isinstance(node, ast.FunctionDef):
            a = node.args
            names = [o.arg for o in a.posonlyargs + a.args + a.kwonlyargs
                     if o.arg not in ('self', 'cls')]
            n = len(names) + bool(a.vararg) + bool(a.kwarg)
            if n > PARAMETERS:
                yield f'{node.name} has {n} parameters, at most {PARAMETERS}'
    for node in tree.body:
        if getattr(node, 'name', '_').startswith('_'): continue
        for name,f in interface(node):
            for arg in undocumented(f, comments):
                yield f'{name}: {arg} has no comment of its own'
        if isinstance(node, ast.ClassDef) and is_decorated(node, 'dataclass'):
            for o in node.body:
                if not isinstance(o, ast.AnnAssign) or o.target.id.startswith('_'): continue
                above = comments.get(o.lineno - 1, ('', False))
                if o.end_lineno not in comments and not above[1]:
                    yield f'{node.name}: {o.target.id} has no comment of its own'


def public_names(cell, tree):
    "Public functions and classes that `cell` exports"
    names = [getattr(o, 'name', '_')
             for o in tree.body] if cell.directives.keys() & {'export', 'exports'} else []
    return [o for o in names if not o.startswith('_')]


def is_prose(cell):
    "Whether a Markdown cell says something besides headings and the subtitle"
    return (cell.kind == 'markdown'
            and any(o.strip() and o.lstrip()[0] not in '#>' for o in cell.source.splitlines()))


def is_lesson(cell, tree):
    "Whether a reader sees `cell`, the tests run it, and it can fail"
    shown = 'false' not in (cell.directives.get(k, '').strip() for k in ('eval', 'echo', 'include'))
    if cell.kind != 'code' or not shown or cell.directives.keys() & NO_LESSON: return False
    called = [ast.unparse(o.func).split('.')[-1] for o in ast.walk(tree) if isinstance(o, ast.Call)]
    return (any(isinstance(o, ast.Assert) for o in ast.walk(tree))
            or any(re.match('test_|expect_fail', o) for o in called))


def teaching(cells, trees):
    "Breaches of: prose before every public export, a lesson after it; exports in a row are one"
    prose = False
    waiting = None
    in_a_row = False
    for i, (cell, tree) in enumerate(zip(cells, trees)):
        names = public_names(cell, tree)
        if names and in_a_row and waiting:
            waiting += ', ' + ', '.join(names)
        elif names:
            if waiting: yield waiting
            if not prose: yield f'cell {i}: no prose before {", ".join(names)}'
            prose = False
            waiting = f'cell {i}: no visible lesson after {", ".join(names)}'
        elif is_prose(cell):
            prose = True
        elif is_lesson(cell, tree):
            waiting = None
        in_a_row = bool(cell.directives.keys() & EXPORTS)
    if waiting: yield waiting


def floor(module, path):
    "Where a module stands: the place of its room, then the number of its notebook"
    number = re.match(r'\d+', path.name)
    return places().get(room_of(module), -1), int(number[0]) if number else -1


def misplaced(path, module):
    "What is wrong with the address of the notebook of `module`"
    if not number_and_name(path): return
    room, _, name = module.rpartition('.')
    if number_and_name(path)[1] != name:
        yield f'its module is called {module}, so the file must be NN_{name}.ipynb'
    if room and path.parent.name != room:
        yield f'its module is {module}, so its folder must be {room}/'


def number_and_name(path):
    "Number and module in the file name of a notebook of nbs/api; None elsewhere"
    found = re.fullmatch(r'(\d+)_(\w+)', path.stem)
    return found.groups() if found and 'api' in path.parts else None


def wrong_imports(tree, module, exported, floors):
    "Modules imported in a cell of the notebook of `module` that do not stand below it"
    here = floors[module]
    for m in imports_of(tree):
        if not m and not exported or m == module: continue
        if floors.get(m, here) >= here:
            yield f'imports {m or "the package itself"}, which is not below it'


def read_books(paths):
    "The cells of each notebook by its path, and the module that each one exports"
    books = {}
    modules = {}
    for path in map(Path, paths):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        books[path] = [parse_cell(c) for c in cells]
        for cell in books[path]:
            if 'default_exp' in cell.directives:
                modules[path] = cell.directives['default_exp'].strip()
    return books, modules


def breaches(paths):
    "One line for each breach of the house limits in the notebooks at `paths`, which are read together"
    books, modules = read_books(paths)
    floors = {m: floor(m, p) for p, m in modules.items()}
    found = []
    for p, cells in books.items():
        def add(*messages): found.extend(f'{p}: {m}' for m in messages)
        if len(cells) > CELLS:
            add(f'{len(cells)} cells, at most {CELLS}')
        if p.stat().st_size > BYTES:
            add(f'{p.stat().st_size//1000} KB, at most {BYTES//1000}')
        try:
            trees = [ast.parse(c.source if c.kind == 'code' else '') for c in cells]
        except SyntaxError as e:
            add(f'not Python: {e.text or e}')
            continue
        add(*teaching(cells, trees))
        if p in modules:
            add(*misplaced(p, modules[p]))
            if list(modules.values()).count(modules[p]) > 1:
                add(f'{modules[p]} is exported by another notebook too')
        for i, (cell, tree) in enumerate(zip(cells, trees)):
            exported = bool(cell.directives.keys() & EXPORTS)
            if exported:
                add(*(f'cell {i}: {m}' for m in exported_cell(cell, tree)))
            if p in modules:
                add(*(f'cell {i}: {m}' for m in wrong_imports(tree, modules[p], exported, floors)))
    return found


def main():
    paths = (sys.argv[1:]
             or [f for f in sorted(Path('nbs').rglob('*.ipynb')) if '/.' not in f.as_posix()])
    found = breaches(paths)
    if not sys.argv[1:]:
        found += rooms.broken_rules(Path(PACKAGE)) + lines.broken_limits()
    for o in found:
        print(o)
    print(f'house: {len(paths)} notebooks, {len(found)} breaches')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
