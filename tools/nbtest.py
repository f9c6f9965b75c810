"""Run every notebook, and compare what its cells show now with what is saved in it.

Each notebook runs in a process of its own, forked from this one. Texts must agree but for white
space, addresses, paths of temporary files and dates, and numbers within a tolerance. The numbers of
a cell marked `#| times` (they are seconds) or `#| varies` (they follow a training, which goes another
way on another processor) are free, its words are not. Of pictures only the presence is compared.
"""
import difflib, json, os, re, sys
from pathlib import Path
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbrun import execute, forked, is_skipped, read

SLOWEST = Path(__file__).with_name('slowest.json')  # seconds of the notebooks that start first, over 15
RELATIVE = .05          # tolerances of numbers: another processor adds in another order
ABSOLUTE = .02
FREE = {'times', 'varies'}                          # marks of cells whose numbers are not compared
NUMBER = re.compile(r'(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?(?!\w)', re.I)
ADDRESS = '0x[0-9a-f]+'
TEMPORARY = r'/(?:tmp|var/folders)/[\w./-]+'
DATE = r'\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d(?:\.\d+)?'
PASSING = re.compile(f'{ADDRESS}|{TEMPORARY}|{DATE}', re.I)


def kind(output):
    "What sort of output it is, with its formats"
    formats = sorted(output.get('data', {}))
    return ' '.join([output['output_type'], output.get('name', ''), *formats])


def text(output):
    "What a reader sees of an output: the rows of its table without tags, or its plain text"
    data = output.get('data', {})
    if 'text/html' not in data: return ''.join(output.get('text') or data.get('text/plain', ''))
    html = re.sub(r'(?s)<style.*?</style>', '', ''.join(data['text/html']))
    rows = [re.sub('<[^>]*>', ' ', o).split() for o in html.split('</tr>')]
    return '\n'.join(' '.join(o) for o in rows if o)


def agree(old, new, free=False):
    "Whether two texts agree, numbers within the tolerance, or not at all if they are `free`"
    old, new = (PASSING.sub('~', o) for o in (old, new))
    words = [[' '.join(o.split()) for o in NUMBER.split(t)] for t in (old, new)]
    numbers = zip(*(map(float, NUMBER.findall(t)) for t in (old, new)))
    near = free or all(abs(a-b) <= ABSOLUTE + RELATIVE*abs(a) for a, b in numbers)
    return words[0] == words[1] and near


def difference(old, new, free=False, length=20):
    "The lines of two texts that do not agree, as a unified diff"
    old = old.splitlines()
    new = new.splitlines()
    if len(old) == len(new): new = [a if agree(a, b, free) else b for a, b in zip(old, new)]
    lines = list(difflib.unified_diff(old, new, 'saved', 'now', lineterm='', n=1))
    return '\n'.join(lines[:length])


def compared(old, new):
    "What is wrong with the outputs of a code cell, beside those saved in `old`; empty if nothing"
    saved, now = ([o for o in cell.outputs if o.get('name') != 'stderr'] for cell in (old, new))
    kinds = ['\n'.join(map(kind, outputs)) for outputs in (saved, now)]
    if kinds[0] != kinds[1]: return difference(*kinds)
    free = bool((old.directives_ or {}).keys() & FREE)
    texts = [(text(a), text(b)) for a, b in zip(saved, now)]
    return '\n'.join(difference(*o, free) for o in texts if not agree(*o, free))


def test(path, flags=''):
    "Run the notebook at `path`: whether every cell shows what is saved; the others are printed"
    same = True
    for i, (old, new) in enumerate(zip(read(path).cells, execute(path, flags).cells)):
        if old.cell_type != 'code' or is_skipped(old, flags): continue
        if said := compared(old, new):
            same = False
            print(f'Cell #{i+1} shows something else than is saved:\n{said}\n')
    return same


def name(path):
    "The path of a notebook in the project"
    return path.resolve().relative_to(get_config().config_path.resolve()).as_posix()


@call_parse
def main(
    path:str=None,          # A notebook or a folder; all notebooks by default
    flags:str='',           # Flags whose cells run too, for example "slow"
    n_workers:int=2,        # Notebooks at a time
    timeout:int=600,        # Seconds that a notebook may take
    quick:bool=False,       # Whether those that take longest are left out
    keep_times:bool=False,  # Write which notebooks are the slowest: they start first from now on
):
    "Test notebooks and print the counts"
    files = sorted(nbglob(path, as_path=True))
    if not files: sys.exit(f'No notebook found in {path or get_config().nbs_path}')
    slowest = json.loads(SLOWEST.read_text())
    files.sort(key=lambda f: -slowest.get(name(f), 0))
    if quick: files = [f for f in files if name(f) not in slowest]
    seconds = {}
    failed = 0
    for file, done, took, said in forked(lambda o: test(o, flags), files, n_workers, timeout):
        seconds[name(file)] = round(took)
        failed += not done
        print(f'{"passed" if done else "FAILED"} {took:6.1f} s  {name(file)}', flush=True)
        if not done: print(said, flush=True)
    if keep_times:
        slowest = {k: v for k, v in sorted(seconds.items(), key=lambda o: -o[1]) if v > 15}
        SLOWEST.write_text(json.dumps(slowest, indent=1) + '\n')
    cells = [c for f in files for c in read(f).cells if c.cell_type == 'code' and c.source.strip()]
    left = sum(is_skipped(c, flags) for c in cells)
    print(f'code cells: {len(cells)-left} to run, {left} left out by flags')
    print(f'notebooks: {len(files)-failed} passed, {failed} failed')
    sys.exit(failed > 0)
