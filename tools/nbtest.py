"Run `nbdev_test` on every notebook, each in a process of its own, and count what passed, failed and was left out"
import os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor
from nbrun import is_skipped


def test(path, flags, timeout=600):
    "Whether the notebook at `path` passes; one line about it, and what it said if it failed"
    start, cmd = time.time(), [Path(sys.executable).with_name('nbdev_test'), '--path', path, '--flags', flags, '--n_workers', '0']
    try: p = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    except subprocess.TimeoutExpired: ok, said = False, f'still running after {timeout} s\n'
    else: ok, said = p.returncode == 0 and 'Success.' in p.stdout, p.stdout     # a path without notebooks exits with 0
    print(f'{"passed" if ok else "FAILED"} {time.time()-start:6.1f} s  {os.path.relpath(path)}', '' if ok else f'\n{said}', flush=True)
    return ok


@call_parse
def main(
    path:str=None,    # A notebook or a folder; all notebooks by default
    flags:str='',     # Flags whose cells run too, for example "slow"
    n_workers:int=2,  # Notebooks at a time
):
    "Run `nbdev_test` and print the counts"
    files = sorted(nbglob(path))
    if not files: sys.exit(f'No notebook found in {path or get_config().nbs_path}')
    with ThreadPoolExecutor(max(1, n_workers)) as pool: passed = list(pool.map(lambda f: test(f, flags), files))
    cells = [c for f in files for c in NBProcessor(f).nb.cells if c.cell_type == 'code' and c.source.strip()]
    left = sum(is_skipped(c, flags) for c in cells)
    print(f'code cells: {len(cells)-left} to run, {left} left out by flags')
    print(f'notebooks: {sum(passed)} passed, {len(passed)-sum(passed)} failed')
    sys.exit(not all(passed))
