"""How the lines read: long lines, packed assignments, one-line blocks, long cells, claims.

    python tools/lines.py                    figures for the package, notebooks, tests, tools and benchmarks;
                                             the status is 1 if a limit is broken
    python tools/lines.py --worst 25         also the places to begin with
    python tools/lines.py --files F ...      other files, for comparison: .py and .ipynb

A packed assignment gives two or more names values that are computed, `a, b = f(x), g(y)`, or unpacks a
generator. Names and numbers are not computed, and `a, b = f(x)` is one value. A one-line block is a
loop, a `with` or an `if` whose body stands behind its colon; guards (`if bad: raise ...`, `return`,
`continue`) are left alone. A claim is an operand of `and` in an assert.
"""
import argparse
import ast
import json
import re
import sys
from collections import defaultdict, namedtuple
from pathlib import Path

WIDTH, CELL_LINES, PACKED_SHARE, P90 = 110, 40, .03, 95
GROUPS = dict(package='robustnb/**/*.py', notebooks='nbs/**/*.ipynb', tests='tests/**/*.py',
              tools='tools/**/*.py', benchmarks='benchmarks/**/*.py')
BLOCKS = ast.If, ast.For, ast.While, ast.With
GUARDS = ast.Raise, ast.Return, ast.Continue, ast.Break
WEIGHTS = dict(long=lambda n: (n - WIDTH)/30, packed=lambda n: n - 1,
               one_line=lambda n: .5, several=lambda n: n - 2)

Piece = namedtuple('Piece', 'file where source exported')
Finding = namedtuple('Finding', 'size file where line')


def pieces(path):
    "The code of a file: a script as a whole, a notebook cell by cell, without magics and directives"
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return [Piece(path, '', text, False)]
    found = []
    for i, cell in enumerate(json.loads(text)['cells']):
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        exported = bool(re.match(r'\s*#\s*\|\s*exports?i?\b', source))
        source = re.sub(r'^\s*#\s*\|.*$', '', source, flags=re.M)
        source = re.sub(r'^\s*[%!].*', 'pass', source, flags=re.M)
        found.append(Piece(path, f'cell {i}', source, exported))
    return found


def is_computed(node):
    "Whether a value is more than a name or a number"
    if isinstance(node, ast.UnaryOp): return is_computed(node.operand)
    if isinstance(node, ast.Starred): return is_computed(node.value)
    return not isinstance(node, (ast.Name, ast.Constant))


def computed_values(node):
    "How many values an assignment computes side by side"
    if not isinstance(node.targets[0], (ast.Tuple, ast.List)): return 1
    if isinstance(node.value, ast.Tuple): return sum(map(is_computed, node.value.elts))
    if isinstance(node.value, (ast.GeneratorExp, ast.ListComp)): return len(node.targets[0].elts)
    return 1


def claims(test):
    "How many things the test of an assert says"
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And): return sum(map(claims, test.values))
    return 1


def is_one_line(node):
    "Whether the body of a block stands behind its colon; guards do not count"
    first = node.body[0]
    if isinstance(node, ast.If) and isinstance(first, GUARDS): return False
    if isinstance(node, ast.With):
        head = node.items[-1].context_expr
    elif isinstance(node, ast.For):
        head = node.iter
    else:
        head = node.test
    return first.lineno == head.end_lineno


class Count:
    "What is found in some pieces of code"

    def __init__(self, group):
        self.lengths = []
        self.of = defaultdict(int)              # kind -> how many there are
        self.found = defaultdict(list)          # kind -> those that are counted against it
        for piece in group:
            self.add(piece)

    def add(self, piece):
        "Count one piece"
        def note(kind, size, line):
            self.found[kind].append(Finding(size, piece.file, piece.where, line))
        rows = piece.source.strip().splitlines()
        self.lengths += [len(row) for row in rows if row.strip()]
        for i, row in enumerate(rows, 1):
            if len(row) > WIDTH:
                note('long', len(row), i)
        self.of['cells'] += piece.exported
        if piece.exported and len(rows) > CELL_LINES:
            note('cells', len(rows), 1)
        try:
            tree = ast.parse(piece.source)
        except SyntaxError:
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                self.of['packed'] += 1
                if computed_values(node) > 1:
                    note('packed', computed_values(node), node.lineno)
            elif isinstance(node, ast.Assert):
                self.of['several'] += 1
                if claims(node.test) > 2:
                    note('several', claims(node.test), node.lineno)
            elif isinstance(node, BLOCKS):
                self.of['one_line'] += 1
                if is_one_line(node):
                    note('one_line', 1, node.lineno)

    def percentile(self, share):
        "The length that a share of the lines does not exceed"
        ordered = sorted(self.lengths) or [0]
        return ordered[min(int(share*len(ordered)), len(ordered) - 1)]

    def share(self, kind):
        "How many of a kind are counted against it, and what part of all that is"
        n = len(self.found[kind])
        return f'{n} ({100*n/max(self.of[kind], 1):.0f} %)'

    def has_too_many(self, kind, limit):
        "Whether more than a share of a kind is counted against it"
        return len(self.found[kind]) > limit*self.of[kind]

    def __str__(self):
        return (f"{len(self.lengths)} lines, 90th percentile {self.percentile(.9)}, "
                f"{len(self.found['long'])} over {WIDTH} | packed assignments "
                f"{self.share('packed')} | one-line blocks {self.share('one_line')} | "
                f"exported cells over {CELL_LINES} lines {len(self.found['cells'])} of "
                f"{self.of['cells']} | asserts with three claims or more "
                f"{self.share('several')}")


def worst(counts, n):
    "The places with most against them: notebook cells, and scripts by 50 lines"
    places = defaultdict(lambda: defaultdict(int))
    for count in counts:
        for kind, weight in WEIGHTS.items():
            for o in count.found[kind]:
                first = (o.line - 1)//50*50 + 1
                place = places[f"{o.file} {o.where or f'lines {first}-{first + 49}'}"]
                place['score'] += weight(o.size)
                place[kind] += 1
    return sorted(places.items(), key=lambda item: -item[1]['score'])[:n]


def read_groups():
    "What is found in each group of files"
    counts = {}
    for name, pattern in GROUPS.items():
        paths = [f for f in sorted(Path().glob(pattern))
                 if '/.' not in f.as_posix() and f.stem != '_modidx']
        counts[name] = Count([piece for f in paths for piece in pieces(f)])
    return counts


def broken_limits():
    "One line for each place or group that breaks a limit; the package is made from the notebooks"
    found = []
    for name, count in read_groups().items():
        if name == 'package': continue
        found += [f'{o.file} {o.where} line {o.line}: {o.size} columns, at most {WIDTH}'
                  for o in count.found['long']]
        if count.percentile(.9) > P90:
            found.append(
                f'{name}: 90th percentile of line length {count.percentile(.9)}, at most {P90}')
        if count.has_too_many('packed', PACKED_SHARE):
            found.append(
                f"{name}: packed assignments {count.share('packed')}, at most {PACKED_SHARE:.0%}")
    return found


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--files', nargs='*', type=Path)
    parser.add_argument('--worst', type=int, default=0)
    args = parser.parse_args()
    counts = read_groups()
    if args.files:
        counts = dict(files=Count([piece for f in args.files for piece in pieces(f)]))
    for name, count in counts.items():
        print(f'{name}: {count}')
    written = [count for name, count in counts.items() if name != 'package']
    for place, n in worst(written, args.worst):
        print(f"  {place}: {n['long']} long, {n['packed']} packed, "
              f"{n['one_line']} one-line, {n['several']} asserts")
    if not args.files:
        sys.exit(bool(broken_limits()))


if __name__ == '__main__':
    main()
