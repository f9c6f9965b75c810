"""Old and new versions of what the package stands on: does it install, run its demonstration and
pass its unit tests?

    python benchmarks/reliability/versions.py
    python benchmarks/reliability/versions.py "python3.12 torch==2.9.1 numpy<2" --tests tests/test_core.py

Without arguments python3.10 to python3.13 must be on the path; it takes about two hours and 6 GB
at a time, with `--quick`, which leaves out the tests that are marked slow, half as long. Each
argument is an interpreter and what pip is to hold. Every one gets a clone and a virtual environment
of its own, which are deleted afterwards. Left out are the tests of the project itself: they need
the tools of its developers, who keep to one version of each. Rows go to
results/versions.csv with a manifest beside them.
"""
import argparse, os, re, subprocess, tempfile, time
from pathlib import Path

import pandas as pd

from robustnb.files import manifest, save_json

root = Path(__file__).resolve().parents[2]
sets = ('python3.10 torch==2.6.0 numpy==1.26.4 fastcore<1.13',
        'python3.11 torch==2.9.1 numpy<2.4 fastcore<2', 'python3.12 torch numpy>=2 fastcore>=2',
        'python3.13 torch numpy>=2 fastcore<2', 'python3.13 torch==2.6.0 numpy>=2 fastcore>=2')
beside = ('pytest pytest-xdist hypothesis scikit-image timm onnx onnxscript onnxruntime '
          'submitit accelerate setuptools wheel'.split())
of_the_project = ('browser', 'docs_cells', 'docs_check', 'house', 'lines', 'nbtest', 'notebooks',
                  'release', 'repo', 'rooms')
named = ('torch', 'torchvision', 'numpy', 'fastcore', 'pandas', 'timm', 'onnxruntime')


def measure(wanted, chosen, folder):
    "A row: what was installed, and how it did; `chosen` is what pytest is told"
    python, *held = wanted.split()
    clone = folder/'clone'
    env = folder/'env'
    said = lambda *command: subprocess.run(
        [str(o) for o in command], cwd=clone, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
            | dict(OMP_NUM_THREADS='1'))
    subprocess.run(['git', 'clone', '-q', str(root), str(clone)], check=True)
    for command in ((python, '-m', 'venv', env),
                    (env/'bin/python', '-m', 'pip', 'install', '-q', '.', *beside, *held)):
        if (made := said(*command)).returncode:
            return dict(wanted=wanted, installed=False, said=made.stderr.strip()[-300:])
    version = lambda name: said(
        env/'bin/python', '-c',
        f"from importlib.metadata import version; print(version('{name}'), end='')").stdout
    start = time.monotonic()
    demo = said(env/'bin/robustnb', 'demo').returncode == 0
    demo_seconds = time.monotonic()-start
    start = time.monotonic()
    run = said(env/'bin/python', '-m', 'pytest', '-rfE', '-p', 'no:cacheprovider', '-n', '2',
               '--dist', 'loadfile', *chosen)
    passed, failures = map(int,
                           re.findall(r'unit tests: (\d+) passed, (\d+) failed', run.stdout)[-1])
    failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', run.stdout, re.M)
    print(run.stdout[-6000:], flush=True)
    return dict(wanted=wanted, installed=True,
                python=said(env/'bin/python', '-V').stdout.split()[-1],
                **{k: version(k) for k in named}, demo=demo, demo_seconds=round(demo_seconds),
                passed=passed, failed=failures, seconds=round(time.monotonic()-start),
                said=' '.join(failed)[:500])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=sets)
    p.add_argument('--tests', nargs='*', help='what pytest is given; all but those of the project')
    p.add_argument('--quick', action='store_true', help='leave out the tests that are marked slow')
    p.add_argument('--out', type=Path, default=root/'results/versions.csv')
    args = p.parse_args()
    chosen = args.tests or [f'--ignore=tests/test_{o}.py' for o in of_the_project]
    if args.quick:
        chosen += ['-m', 'not slow']
    rows = []
    for wanted in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(wanted, chosen, Path(folder)))
        pd.DataFrame(rows).to_csv(args.out, index=False)
    save_json(manifest(), args.out.with_suffix('.json'))
    print(pd.DataFrame(rows).T.to_string())
