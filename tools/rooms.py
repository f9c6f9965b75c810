"""Does the package keep to its rooms? Arrows, floors, circles, private names, hidden modules.

    python tools/rooms.py robustnb             figures and broken rules; the status is 1 if there are any
    python tools/rooms.py robustnb --table     also how many arrows lead from room to room

A room is a folder of the package; the modules beside the folders are the room `ground`. A room uses only
rooms before it in ROOMS; those joined by `|` do not use each other. No room uses a private name of
another one, and no module defines a name equal to its own, because `from .apgd import apgd` in a package
hides the module.
"""
import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOMS = 'ground augmentation models quant attacks evaluation transfer|curation|descriptors commands'
SKIPPED = '__init__', '__main__', '_modidx'
HINT = 'private names of another module'            # allowed inside a room


def places():
    "Room -> its place; rooms side by side have the same"
    return {name: i for i, part in enumerate(ROOMS.split()) for name in part.split('|')}


def room_of(module):
    "The folder of a module"
    return module.partition('.')[0] if '.' in module else 'ground'


def defined_by(node):
    "The names that a top-level statement defines"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return [node.name]
    if isinstance(node, ast.Assign):
        left = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        left = [node.target]
    else:
        left = []
    return [o.id for part in left for o in ast.walk(part) if isinstance(o, ast.Name)]


class Module:
    "What one file defines, and what it imports from its own package"

    def __init__(self, path, root):
        self.name = '.'.join(path.relative_to(root).with_suffix('').parts)
        self.package = root.name
        self.tree = ast.parse(path.read_text(encoding='utf-8'))
        self.defined = {name for node in self.tree.body for name in defined_by(node)}

    def source(self, node):
        "The module, relative to the package, from which a statement imports; None for other packages"
        if node.level:
            folders = self.name.split('.')[:-node.level]
            return '.'.join(folders + (node.module.split('.') if node.module else []))
        first, _, rest = (node.module or '').partition('.')
        return rest if first == self.package else None

    def imported(self, modules):
        "Pairs of a module of the package and the name imported from it; `(module)` for the module itself"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for o in node.names:
                    first, _, rest = o.name.partition('.')
                    if first == self.package:
                        yield rest, '(module)'
            elif isinstance(node, ast.ImportFrom) and (source := self.source(node)) is not None:
                for o in node.names:
                    inner = f'{source}.{o.name}'.lstrip('.')
                    yield (inner, '(module)') if inner in modules else (source, o.name)


def read_package(root):
    "Modules of the package by name; faces of folders and the index are left out"
    files = [f for f in sorted(root.rglob('*.py')) if f.stem not in SKIPPED]
    return {m.name: m for m in (Module(f, root) for f in files)}


def read_uses(modules):
    "(module that uses, module used) -> names"
    uses = defaultdict(set)
    for m in modules.values():
        for module, name in m.imported(modules):
            if module != m.name:
                uses[m.name, module].add(name)
    return uses


def in_circles(nodes, arrows):
    "The nodes from which arrows lead back to themselves"
    ahead = defaultdict(set)
    for a, b in arrows:
        ahead[a].add(b)

    def leads_back(start):
        seen = set()
        left = [*ahead[start]]
        while left:
            node = left.pop()
            if node == start: return True
            if node in seen: continue
            seen.add(node)
            left += ahead[node]
        return False
    return sorted(n for n in nodes if leads_back(n))


def count_floors(nodes, arrows):
    "How many stand on one another: 1 for nodes without arrows; 0 if there is a circle"
    left = set(nodes)
    n = 0
    while left:
        held_up = {a for a, b in arrows if a in left and b in left}
        if held_up == left: return 0
        left = held_up
        n += 1
    return n


def count_between(uses):
    "(room, room) -> how many arrows between modules lead from one to the other"
    between = defaultdict(int)
    for a, b in uses:
        if room_of(a) != room_of(b):
            between[room_of(a), room_of(b)] += 1
    return between


def hidden_modules(root):
    "Names that the face of a folder imports and that are modules or folders in it"
    for face in sorted(root.rglob('__init__.py')):
        inside = {o.stem for o in face.parent.glob('*.py')}
        inside |= {o.parent.name for o in face.parent.glob('*/*.py')}
        for node in ast.walk(ast.parse(face.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom): continue
            for o in node.names:
                if (o.asname or o.name) in inside:
                    yield f'{face}: {o.asname or o.name}'


def wrong_arrows(uses):
    "Kind -> sentences about arrows that lead where none may lead"
    height = places()
    found = defaultdict(list)
    for (a, b), names in sorted(uses.items()):
        here = room_of(a)
        there = room_of(b)
        private = sorted(n for n in names if n.startswith('_'))
        if private:
            found[HINT].append(f"{a} -> {b} ({', '.join(private)})")
        if here == there or not {here, there} <= height.keys(): continue
        said = f"{a} -> {b} ({', '.join(sorted(names))})"
        if private:
            found['private names of another room'].append(f"{a} -> {b} ({', '.join(private)})")
        if height[there] > height[here]:
            found['arrows that go up'].append(said)
        if height[there] == height[here]:
            found['arrows between rooms side by side'].append(said)
    return found


def breaches(root):
    "Kind of breach -> sentences; the hint is one of the kinds"
    modules = read_package(root)
    uses = read_uses(modules)
    rooms = {room_of(m) for m in modules}
    found = wrong_arrows(uses)
    found['rooms that are not in the list'] = sorted(rooms - places().keys())
    own = [m.name for m in modules.values() if m.name.rpartition('.')[2] in m.defined]
    found['modules with a definition of their own name'] = own
    found['modules in a circle'] = in_circles(modules, uses)
    found['rooms in a circle'] = in_circles(rooms, count_between(uses))
    found['modules hidden by a name of their package'] = [*hidden_modules(root)]
    return found


def broken_rules(root):
    "One line for each breach of a rule"
    return [f'{kind}: {line}' for kind, lines in breaches(root).items() if kind != HINT
            for line in lines]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('package', type=Path)
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    modules = read_package(args.package)
    uses = read_uses(modules)
    rooms = {room_of(m) for m in modules}
    between = count_between(uses)
    print(f'{len(modules)} modules in {len(rooms)} rooms; '
          f'{len(uses)} arrows on {count_floors(modules, uses)} floors, '
          f'{sum(between.values())} of them between rooms '
          f'({len(between)} pairs, {count_floors(rooms, between)} floors)')
    if args.table:
        for (a, b), n in sorted(between.items()):
            print(f'  {a:>12} -> {b:<12} {n}')
    for kind, lines in breaches(args.package).items():
        if lines:
            print(f'{kind}: {len(lines)}')
        for line in lines:
            print(f'  {line}')
    sys.exit(bool(broken_rules(args.package)))


if __name__ == '__main__':
    main()
