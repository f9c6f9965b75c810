"""Run notebooks and save their cleaned outputs.

`python tools/nbrun.py [NOTEBOOK ...]` runs all of them by default, each in a process of its own
that is forked from this one, so that torch is imported once. A notebook with a failing cell is left
as it was.
"""
import faulthandler, gc, importlib, os, signal, sys, tempfile, time
from pathlib import Path
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.script import Param, call_parse
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

# What most notebooks import, and takes seconds
HEAVY = ('torch', 'torchvision.models', 'pandas', 'matplotlib.pyplot', 'scipy.stats',
         'sklearn.datasets', 'imgaug.augmenters', 'robustnb.commands.transfer',
         'robustnb.commands.curation', 'robustnb.commands.descriptors')
# One thread, because others do not survive a fork, and instructions that every x86 processor has
COMPUTES = dict(
    OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', DNNL_MAX_CPU_ISA='AVX2', MKL_CBWR='AVX2')
DONE = 23       # the exit code of a child that did what it should: a cell may leave with 0


def is_skipped(cell, flags=''):
    "Whether code `cell` is left out, as by `nbdev_test --flags FLAGS`"
    given = cell.directives_ or {}
    never = given.get('eval:', [''])[0].lower() == 'false'
    return never or bool((set(get_config().tst_flags.split()) - set(flags.split())) & given.keys())


def read(path): return NBProcessor(path, rm_directives=False).nb


def execute(path, flags='', change=None):
    """The notebook at `path` with new outputs, cleaned; a failing cell is shown and ends it all.
    `change` is what a reader does to it before."""
    nb = read(path)
    if change: change(nb)
    last = []
    os.environ.update(IN_TEST='1', COLUMNS='80')    # a wide terminal shall not make wide tables

    def leave(cell):
        if cell.cell_type != 'code' or is_skipped(cell, flags): return True
        cell.outputs = []       # execnb keeps the old output of a cell that is now silent
        last[:] = [cell]

    shell = CaptureShell(path, mpl_format='png')    # retina, the default, doubles its size
    try:
        with working_directory(path.parent):
            shell.run_all(nb, exc_stop=True, preproc=leave)
    except BaseException:       # sys.exit too
        sys.exit(f'{shell.prettytb(fname=path)}\nThe cell:\n{last[0].source}')
    clean_nb(nb, clean_ids=get_config().clean_ids)
    return nb


def forked(task, paths, n_workers=2, timeout=600):
    "In a fresh child for each path, whether `task(path)`; yields path, that, seconds, what it said"
    os.environ.update(COMPUTES | os.environ)
    sys.path.insert(0, str(get_config().config_path))
    for name in HEAVY:
        importlib.import_module(name)
    # trainings go the same way on all processors, also on those with bfloat16 (`core.fast_bf16`)
    sys.modules['torch'].cpu._is_avx512_bf16_supported = lambda: False
    gc.collect()
    gc.freeze()                                     # else each child searches all of it at its end
    waiting = [Path(o).resolve() for o in paths][::-1]
    running = {}
    while waiting or running:
        while waiting and len(running) < n_workers:
            path = waiting.pop()
            said = tempfile.TemporaryFile('w+', errors='replace')
            sys.stdout.flush()                      # else a child writes it too
            pid = os.fork()
            if not pid: _child(task, path, said.fileno(), timeout)
            running[pid] = path, said, time.time()
        try:
            pid, status = os.wait()
        except KeyboardInterrupt:
            for child in running:
                _end_group(child)
            raise
        _end_group(pid)
        path, said, start = running.pop(pid)
        said.seek(0)
        code = os.waitstatus_to_exitcode(status)
        yield path, code == DONE, time.time()-start, said.read() + _reason(code, timeout)


def _child(task, path, said, timeout):
    "A child leads a group of its own, writes to `said`, and is ended by an alarm"
    os.setsid()
    signal.alarm(timeout)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.enable()
    sys.modules['numpy'].random.seed()              # else all children draw the same
    sys.exit(DONE if task(path) else 1)


def _end_group(pid):
    "Kill what a child has started and left behind"
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass


def _reason(code, timeout):
    "Why a child did not come to its end, in words"
    if code == 0: return 'left before its end\n'
    if code > 0: return ''
    if code == -signal.SIGALRM: return f'still running after {timeout} s\n'
    return f'ended by {signal.Signals(-code).name}\n'


def save(path, flags=''):
    "Run the notebook at `path` and save it; always true"
    write_nb(execute(path, flags), path)
    return True


@call_parse
def main(
    paths:Param('Notebooks; all by default', nargs='*'),
    flags:str='',     # Flags whose cells run too, for example "slow"
    n_workers:int=2,  # Notebooks at a time
):
    "Run notebooks in place"
    failed = 0
    files = paths or sorted(nbglob())
    for path, done, seconds, said in forked(lambda o: save(o, flags), files, n_workers):
        failed += not done
        size = path.stat().st_size/1000
        print(f'{os.path.relpath(path)}: {seconds:.1f} s, {size:.0f} KB', said, flush=True)
    sys.exit(failed > 0)
