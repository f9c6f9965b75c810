"""What an audit of survivors costs, beside the full evaluation that it stands for.

    python benchmarks/evaluation/audit.py --data ../shared/data

`--data` as for benchmarks/attacks/union.py. The cascade attacks `--n` photographs, its survivors are audited
with a sample of 50, and the full evaluation runs on all photographs, as one would without a cascade; its row
says what stands after both. `seconds` are of the processor, on one thread, `forward` and `backward` images
through a network. A row per run in results/audit.csv, with a manifest beside it.
"""
import argparse, sys, time
from pathlib import Path

import pandas as pd
import torch

sys.path.append(str(Path(__file__).parent.parent/'attacks'))
from robustnb.attacks.gradient import is_correct
from robustnb.attacks.standard import autoattack, cascade
from robustnb.contract import count_passes
from robustnb.evaluation.auditing import audit
from robustnb.files import manifest, save_json
from union import network, photographs, threat_of


def counted(run, *case):
    "What `run` returned, and what it took"
    began = time.process_time()
    with count_passes() as passes:
        out = run(*case)
    return out, dict(seconds=time.process_time()-began, forward=passes.forward, backward=passes.backward)


def standing(model, x, images, y):
    "Percent that are classified correctly, clean and in all of `images`"
    left = is_correct(model, x, y)[0]
    for x_adv in images:
        left = left[is_correct(model, x_adv[left], y[left])[0]]
    return 100*len(left)/len(x)


def runs(name, threat, args):
    "Rows of a network, one at a time"
    model = network(name, args.data)
    x, y = photographs(args.data, name, 'test-a', args.n)
    fast, cost = counted(cascade, model, x, y, threat)
    yield dict(run='cascade', robust=standing(model, x, [fast], y)) | cost
    found, cost = counted(audit, model, x, y, fast, threat, args.sample)
    yield dict(run='audit', robust=100*found.robust_accuracy, lower=100*found.lower,
               survivors=found.survivors, attacked=len(found.sampled), fallen=len(found.fallen)) | cost
    full, cost = counted(autoattack, model, x, y, threat)
    yield dict(run='full evaluation', robust=standing(model, x, [fast, full], y)) | cost


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--network', default='c10_cnna_v')
    parser.add_argument('--threat', default='linf_1')
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--sample', type=int, default=50)
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
