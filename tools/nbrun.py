"""Run notebooks in place, with the skip rules of `nbdev_test`, and save their cleaned outputs.

`python tools/nbrun.py [NOTEBOOK ...]` runs all of them by default, each in a process of its own. FLAGS="slow" in the
environment runs the cells marked `#| slow` too. A notebook with a failing cell is left as it was.
"""
import os, subprocess, sys, time
from pathlib import Path
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor


def is_skipped(cell, flags=''):
    "Whether `nbdev_test --flags FLAGS` leaves out code `cell`"
    given = cell.directives_ or {}
    never = given.get('eval:', [''])[0].lower() == 'false'
    return never or bool((set(get_config().tst_flags.split()) - set(flags.split())) & given.keys())


def run_notebook(path, flags=''):
    "Execute the notebook at `path` in place; the number of cells that ran"
    path, ran = Path(path).resolve(), []
    os.environ['IN_TEST'] = '1'                         # as in nbdev_test
    sys.path.insert(0, str(get_config().config_path))
    nb = NBProcessor(path, rm_directives=False).nb

    def leave(cell):
        if cell.cell_type != 'code' or is_skipped(cell, flags): return True
        cell.outputs = []                               # execnb keeps the old output of a cell that is now silent
        ran.append(cell)

    shell = CaptureShell(path, mpl_format='png')        # the default, retina, doubles the size of a plot
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=leave)
    except Exception: sys.exit(shell.prettytb(fname=path))
    clean_nb(nb, clean_ids=get_config().clean_ids)
    write_nb(nb, path)
    return len(ran)


if __name__ == '__main__':
    files = sys.argv[1:] or sorted(nbglob())
    if len(files) > 1: sys.exit(max(subprocess.call([sys.executable, __file__, f]) for f in files))
    start = time.time()
    n = run_notebook(files[0], os.environ.get('FLAGS', ''))
    print(f'{files[0]}: {n} cells, {time.time()-start:.1f} s, {Path(files[0]).stat().st_size/1000:.0f} KB', flush=True)
