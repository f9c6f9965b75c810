"""The ledger of masking: does a quantised copy withstand more than its original, or does the attack see less?

    python benchmarks/attacks/masking.py --data ../shared/data

`--data` as for union.py. A row per network, format (`float` is the original, batch norms folded) and threat;
all columns of attacks are robust accuracies in percent of the same `n` photographs of the test part:
`white_box` is PGD-20 on the cross-entropy from a random start, straight through all that rounds;
`temperature` the same PGD with the logits divided by their mean margin on these photographs (after Gupta and
Ajanthan, arXiv:2003.13511, who choose the number by the Jacobian or the Hessian); `transfer` the PGD images
of the original, judged on the copy; `square` as many queries as `--queries`; `cascade` the library's. `union`
is what stands after all of these, after the images that they gave for the original and the other copies
(`by_siblings` fell to those), and after the attacks of union.py on what is left (Square apart). `won_` and
`lost_` count photographs that stand on the copy and not on the original, and the reverse. `flagged` names
the checks of `red_flags` that are in doubt about `white_box` on the first `--n_flags` photographs, or, where
fewer than 20 of those are classified correctly, on the first 40 that are. Rows in results/masking.csv; the
groups of a network and threat that are there with as many photographs are not measured again.
"""
import argparse, sys, time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from robustnb.attacks.gradient import full_pgd, is_correct, margin
from robustnb.attacks.score_based import square
from robustnb.attacks.standard import run_cascade
from robustnb.core import make_generator
from robustnb.evaluation.checks import red_flags
from union import folded, network, others, photographs, record, threat_of


class Divided(nn.Module):
    "A network whose logits are divided by a number"
    def __init__(self, net, by):
        super().__init__()
        self.net = net
        self.by = by
    def forward(self, x): return self.net(x)/self.by


def right(model, x, y, rows):
    "Those of `rows` that are still classified correctly"
    return rows[is_correct(model, x[rows], y[rows])[0]] if len(rows) else rows


def share(rows, n): return 100*len(rows)/n


def flags(model, x, y, threat, n):
    "Names of the checks in doubt"
    clean = is_correct(model, x, y)[0]
    rows = torch.arange(n) if (clean < n).sum() >= 20 else clean[:40]
    if len(rows) < 20: return 'too few right'
    table = red_flags(model, x[rows], y[rows], threat)
    return ', '.join(table.check[table.verdict == 'doubt'])


def attacked(model, x, y, threat, original, queries):
    """Images of each attack by its name; `original` are those of PGD on the original, None where this is it.
    PGD leaves alone what a copy gets wrong anyway"""
    clean, logits = is_correct(model, x, y)
    rows = torch.arange(len(x)) if original is None else clean
    scale = margin(logits, y).abs().mean().item()
    start = partial(make_generator, 0)
    def descended(net):
        x_adv = x.clone()
        x_adv[rows] = full_pgd(net, x[rows], y[rows], threat, start(), steps=20)
        return x_adv
    images = dict(white_box=descended(model), temperature=descended(Divided(model, scale).eval()))
    images['transfer'] = images['white_box'] if original is None else original
    images['square'] = square(model, x, y, threat, start(), queries)
    images['cascade'] = run_cascade(model, x, y, threat).x_adv
    return images


def all_else(model, x, y, threat, left):
    "Those of `left` that stand after the attacks of the union, Square apart"
    tried = others(model, x, y, threat, is_correct(model, x, y)[1])
    tried.pop('square')
    for run in tried.values():
        if not len(left): break
        best = x.clone()
        best[left] = run(left)
        left = right(model, best, y, left)
    return left


def group(name, threat, args):
    "The rows of a network and a threat"
    n = args.n
    x, y = photographs(args.data, name, 'test-a', n)
    x = x.contiguous(memory_format=torch.channels_last)
    models = {o: network(f'{name}:{o}', args.data) for o in args.formats.split()}
    models = {'float': folded(network(name, args.data), x)} | models
    found = {}
    seconds = {}
    for kind, model in models.items():
        began = time.process_time()
        found[kind] = attacked(model, x, y, threat, found['float']['white_box'] if found else None,
                               args.queries)
        seconds[kind] = time.process_time()-began
        print(name, kind, threat, seconds[kind], flush=True)
    rows = []
    original = None
    for kind, model in models.items():
        began = time.process_time()
        clean = is_correct(model, x, y)[0]
        stand = {k: right(model, o, y, clean) for k, o in found[kind].items()}
        left = clean
        for x_adv in found[kind].values():
            left = right(model, x_adv, y, left)
        own = len(left)
        for other in found.keys() - {kind}:
            for x_adv in found[other].values():
                left = right(model, x_adv, y, left)
        stand['union'] = all_else(model, x, y, threat, left)
        flagged = flags(model, x, y, threat, args.n_flags)
        seconds[kind] += time.process_time()-began
        rows.append(dict(format=kind, n=n, clean=share(clean, n)) | {k: share(o, n) for k, o in stand.items()}
                    | dict(flagged=flagged, by_siblings=own-len(left), seconds=seconds[kind]))
        original = original or stand
        for k in ('white_box', 'union'):
            mine = set(stand[k].tolist())
            theirs = set(original[k].tolist())
            rows[-1] |= {f'won_{k}': len(mine-theirs), f'lost_{k}': len(theirs-mine)}
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--networks', default='c10_resnet8_m c10_resnet8_k c100_resnet8_k')
    parser.add_argument('--formats', default='INT8 INT4 POT4 FLOAT4')
    parser.add_argument('--threats', default='linf_1 linf_2')
    parser.add_argument('--n', type=int, default=250)
    parser.add_argument('--n_flags', type=int, default=50)
    parser.add_argument('--queries', type=int, default=100, help='of Square')
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    path = args.out/'masking.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path, keep_default_na=False).to_dict('records') if path.exists() else []
    for threat in args.threats.split():
        for name in args.networks.split():
            there = [row for row in rows if (row['network'], row['threat']) == (name, threat)]
            if any(row['n'] >= args.n for row in there): continue
            rows = [row for row in rows if row not in there]
            rows += [dict(network=name, threat=threat) | row for row in group(name, threat_of(threat), args)]
            pd.DataFrame(rows).round(3).to_csv(path, index=False)
            record(path, n=args.n, n_flags=args.n_flags, queries=args.queries, clock='process_time')


if __name__ == '__main__':
    main()
