"""What an audit of survivors costs, beside the full evaluation that it stands for.

    python benchmarks/evaluation/audit.py --data ../shared/data

`--data` as for benchmarks/attacks/union.py. The cascade attacks `--n` photographs; its survivors are audited
with samples of 50 and 100, then with all of them (the full evaluation of the survivors), and the full
evaluation runs on all photographs, as one would without a cascade. `seconds` are of the processor, on one
thread. A row per run in results/audit.csv, with a manifest beside it.
"""
import argparse, sys, time
from pathlib import Path

import pandas as pd
import torch

sys.path.append(str(Path(__file__).parent.parent/'attacks'))
from robustnb.attacks.gradient import is_correct
from robustnb.attacks.standard import autoattack, cascade
from robustnb.evaluation.auditing import audit
from robustnb.files import manifest, save_json
from union import network, photographs, threat_of


def counted(run, *case, **more):
    "What `run` returned, and seconds of the processor"
    began = time.process_time()
    out = run(*case, **more)
    return out, time.process_time()-began


def robust_share(model, x, x_adv, y):
    "Percent that are classified correctly before and after"
    clean = is_correct(model, x, y)[0]
    return 100*len(is_correct(model, x_adv[clean], y[clean])[0])/len(x)


def runs(name, threat, args):
    "Rows of a network, one at a time"
    model = network(name, args.data)
    x, y = photographs(args.data, name, 'test-a', args.n)
    x_adv, seconds = counted(cascade, model, x, y, threat)
    yield dict(run='cascade', seconds=seconds, robust=robust_share(model, x, x_adv, y))
    for n in (50, 100, len(x)):
        found, seconds = counted(audit, model, x, y, x_adv, threat, n)
        kind = 'all survivors' if n == len(x) else f'audit of {n}'
        yield dict(run=kind, seconds=seconds, robust=100*found.robust_accuracy, lower=100*found.lower,
                   survivors=found.survivors, attacked=len(found.sampled), fallen=len(found.fallen))
    x_adv, seconds = counted(autoattack, model, x, y, threat)
    yield dict(run='full evaluation', seconds=seconds, robust=robust_share(model, x, x_adv, y))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--network', default='c10_cnna_v')
    parser.add_argument('--threat', default='linf_1')
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    path = args.out/'audit.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in runs(args.network, threat_of(args.threat), args):
        rows.append(dict(network=args.network.partition('=')[0], threat=args.threat, n=args.n) | row)
        print(rows[-1], flush=True)
        pd.DataFrame(rows).round(3).to_csv(path, index=False)
    save_json(manifest(n=args.n, clock='process_time'), path.with_suffix('.json'))


if __name__ == '__main__':
    main()
