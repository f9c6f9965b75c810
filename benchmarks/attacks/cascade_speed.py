"""Seconds of the cascade and of `pgd` beside an earlier version of the package and foolbox, in one run.

    git worktree add ../before 797baaf
    pip install foolbox
    python benchmarks/attacks/cascade_speed.py --data ../shared/data --before ../before

`--data`, networks and threats as for union.py; a copy (`name:FORMAT`) has no row of the earlier version,
whose copies are others. Tools run in turn within each repetition, on one thread, after a run on ten images
that is not counted. `seconds` are of the processor. PGD of foolbox takes 40 steps from a random start, of an
eighth of the budget (L2: 2.5 budgets in all); `pgd` is this package's as it comes, from a random start. A row
per network, threat, repetition and tool, in results/attacks_speed.csv; tools whose rows are there with as
many photographs are not measured again: delete rows to have them measured anew.
"""
import argparse, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from peers import foolbox_pgd, in_batches
from robustnb.attacks.gradient import is_correct, pgd
from robustnb.attacks.standard import cascade
from robustnb.attacks.threat_models import Linf
from robustnb.core import make_generator
from union import network, photographs, record, threat_of

asked = ('c10_resnet20_a,linf_1 c10_resnet8_m,linf_1 c100_resnet8_k,linf_1 c10_resnet8_m,l2_.1 '
         'c10_resnet8_m:INT8,linf_1 c10_resnet8_m:INT4,linf_1')


def earlier(version, name, threat, data, x, y):
    "Images and seconds of the cascade of another version, in a process of its own"
    name, _, file = name.partition('=')
    case = dict(network=name, weights=file or None, folders=[str(data), str(data/'models')],
                kind=type(threat).__name__, size=threat.eps, x=x, y=y)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case, f'{folder}/case.pt')
        script = Path(__file__).with_name('one_cascade.py')
        subprocess.run([sys.executable, script, version, f'{folder}/case.pt', f'{folder}/result.pt'],
                       check=True)
        found = torch.load(f'{folder}/result.pt')
    return found['x_adv'], found['seconds']


def timed(attack, model, x, y, threat):
    "Images and seconds, once everything is loaded"
    attack(model, x[:10], y[:10], threat)
    began = time.process_time()
    x_adv = attack(model, x, y, threat)
    return x_adv, time.process_time()-began


def tools_of(name, threat, args):
    "Name -> (model, images, labels, threat) -> images and seconds"
    def before(model, x, y, threat): return earlier(args.before, name, threat, args.data, x, y)
    step = threat.eps/8 if isinstance(threat, Linf) else 2.5*threat.eps/40
    def own_pgd(*case): return pgd(*case, make_generator(0))
    every = {'cascade': cascade, 'fast cascade': partial(cascade, targets=0), 'pgd': own_pgd,
            'foolbox PGD-40': in_batches(partial(foolbox_pgd, step_size=step))}
    tools = {k: partial(timed, attack) for k, attack in every.items()}
    if args.before and ':' not in name:
        tools['earlier cascade'] = before
    return {k: run for k, run in tools.items() if k in args.tools.split(',')}


def compare(name, threat, args, there):
    "Rows of a network and a threat, for the tools that are not `there`"
    tools = {k: run for k, run in tools_of(name, threat, args).items() if k not in there}
    if not tools: return []
    model = network(name, args.data)
    x, y = photographs(args.data, name, 'test-a', args.n)
    rows = []
    for repetition in range(args.repeats):
        for tool, run in tools.items():
            x_adv, seconds = run(model, x, y, threat)
            clean = is_correct(model, x, y)[0]
            stands = is_correct(model, x_adv[clean], y[clean])[0]
            assert threat.allows(x, x_adv).float().mean() > .99, tool
            rows.append(dict(repetition=repetition, tool=tool, seconds=seconds, clean=100*len(clean)/len(x),
                             robust=100*len(stands)/len(x)))
            print(name, rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--before', help='folder of the earlier version')
    parser.add_argument('--rows', default=asked, help='network,threat separated by spaces')
    parser.add_argument('--tools', default='cascade,fast cascade,pgd,earlier cascade,foolbox PGD-40',
                        help='separated by commas')
    parser.add_argument('--n', type=int, default=250)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    path = args.out/'attacks_speed.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    for name, threat in (o.split(',') for o in args.rows.split()):
        case = dict(network=name.partition('=')[0], threat=threat, n=args.n)
        there = {row['tool'] for row in rows if case.items() <= row.items()}
        rows += [case | row for row in compare(name, threat_of(threat), args, there)]
        pd.DataFrame(rows).round(3).to_csv(path, index=False)
        record(path, n=args.n, repeats=args.repeats, clock='process_time')


if __name__ == '__main__':
    main()
