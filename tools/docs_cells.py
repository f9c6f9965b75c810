"""What a page shows of its cells: the import first, then what a reader runs; what only asserts is folded.

`procs` in settings.ini names this file.
"""
import ast, textwrap
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.processors import Processor
from docs_parts import SIGNATURE, exported_statements

UNTOUCHED = {'export', 'exports', 'hide', 'code-fold:', 'echo:', 'include:'}     # not shown, or folded
FOLDED = '#| code-fold: true\n#| code-summary: Test\n'


class ReaderFirst(Processor):
    "Begin with the import of what the page describes, and fold what is there for machines"
    def __init__(self, nb):
        super().__init__(nb)
        self.module = next((c.directives_['default_exp'][0] for c in nb.cells
                            if c.cell_type == 'code' and 'default_exp' in c.directives_), None)
        self.names = [o for c in nb.cells for o in public_names(c)]

    def begin(self):
        cells = [o for c in self.nb.cells for o in folded(c)]
        if self.module and self.names:
            head = mk_cell(import_md(f'{get_config().lib_path.name}.{self.module}', self.names), 'markdown')
            first = sum(c.cell_type == 'raw' for c in cells[:1])
            cells.insert(first, with_directives(head))
        self.nb.cells[:] = cells


def with_directives(cell):
    "A new cell, as nbdev's processors expect it"
    cell.directives_ = {}
    return cell


def public_names(cell):
    "What an exported cell adds to the module, without private names"
    found = []
    for o in exported_statements(cell):
        if hasattr(o, 'name'): found.append(o.name)
        elif isinstance(o, ast.Assign): found += [t.id for t in o.targets if isinstance(t, ast.Name)]
    return [o for o in found if not o.startswith('_')]


def import_md(module, names):
    "The import of `names` as Markdown, on as many lines as it needs"
    line = f'from {module} import {", ".join(names)}'
    if len(line) > SIGNATURE:
        listed = textwrap.fill(', '.join(names), SIGNATURE, initial_indent='    ', subsequent_indent='    ')
        line = f'from {module} import (\n{listed})'
    return f'```python\n{line}\n```'


def only_checks(node):
    "Whether a statement has no other purpose than to fail where something is wrong"
    if isinstance(node, ast.Assert): return True
    call = None
    if isinstance(node, ast.Expr): call = node.value
    if isinstance(node, ast.With): call = node.items[0].context_expr
    if not isinstance(call, ast.Call): return False
    name = getattr(call.func, 'id', getattr(call.func, 'attr', ''))
    return name.startswith('test_') or name in ('expect_fail', 'raises', 'assert_close')


def folded(cell):
    "The cells that stand for one: what a reader runs with its output, then what only asserts, folded"
    if cell.cell_type != 'code' or cell.directives_.keys() & UNTOUCHED: return [cell]
    try: body = ast.parse(cell.source).body
    except SyntaxError: return [cell]             # a magic
    checks = [o for o in body if only_checks(o)]
    if not checks: return [cell]
    lines = cell.source.splitlines()
    taken = {n for o in checks for n in range(o.lineno-1, o.end_lineno)}
    rest = '\n'.join(o for n,o in enumerate(lines) if n not in taken).strip()
    if len(checks) == len(body):
        cell.source = FOLDED + cell.source
        return [cell]
    test = mk_cell(FOLDED + '\n'.join(lines[n] for n in sorted(taken)), 'code')
    cell.source = rest
    return [cell, with_directives(test)]
