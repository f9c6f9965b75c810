"""Layer sensitivity in a few passes beside the slow way, a pass for each tensor rounded alone.

    python benchmarks/quant/sensitivity.py --data ../shared/data

`--data` is a folder with `read_images.py`, `cifar10/`, `cifar100/` and `models/networks.py`: lossless
photographs and networks made by other people. A row per network and format: tensors, Spearman's rank
correlation of `logit_noise` with that of the slow way, the middle and the extremes of their ratio, the
largest noise, and the seconds of the processor, one thread, that either way takes. Rows go to
results/layer_sensitivity.csv with a manifest beside them; rows that are there are not measured again.
"""
import argparse, sys, time
from pathlib import Path

import pandas as pd
import torch

from robustnb.core import to_float
from robustnb.files import manifest, save_json
from robustnb.quant.ptq import calibrate, quantize
from robustnb.quant.sensitivity import layer_sensitivity

sys.path.append(str(Path(__file__).resolve().parents[2]/'tests'))
from helpers_quant import one_at_a_time

networks = 'c10_resnet20_a,c10_resnet8_m,c10_cnna_v,c100_micronet_t,c100_resnet56_c'


def photographs(data, name, n):
    "The first of each class, then the second, until there are `n`"
    from read_images import read
    of = 'cifar100' if name.startswith('c100') else 'cifar10'
    per_class = -(-n//(100 if of == 'cifar100' else 10))
    x, _, classes = read(data/of/f'{of}-test-a.zip', per_class)
    return to_float(x.reshape(len(classes), per_class, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)[:n])


def seconds(run):
    began = time.process_time()
    out = run()
    return time.process_time()-began, out


def compare(model, seen, fmt, x, directions):
    copy = quantize(model, fmt, seen)
    slow_s, slow = seconds(lambda: one_at_a_time(model, copy, x))
    fast_s, fast = seconds(lambda: layer_sensitivity(model, copy, x, directions))
    ratio = fast.logit_noise/slow.logit_noise
    return dict(tensors=len(slow), spearman=fast.logit_noise.corr(slow.logit_noise, method='spearman'),
                ratio_low=ratio.min(), ratio_median=ratio.median(), ratio_high=ratio.max(),
                most_noise=slow.logit_noise.max(), seconds_slow=slow_s, seconds=fast_s)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--networks', default=networks)
    parser.add_argument('--formats', default='INT8,INT4,POT4,INT3')
    parser.add_argument('--n', type=int, default=50)
    parser.add_argument('--directions', type=int, default=4)
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    from networks import load
    path = args.out/'layer_sensitivity.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    key = lambda row: [row[k] for k in ('network', 'format', 'n', 'directions')]
    for name in args.networks.split(','):
        model = load(name).eval()
        x = photographs(args.data, name, args.n)
        seen = calibrate(model, x)
        for fmt in args.formats.split(','):
            row = dict(network=name, format=fmt, n=args.n, directions=args.directions)
            if key(row) in map(key, rows): continue
            found = compare(model, seen, fmt, x, args.directions)
            rows.append(row | {k: round(v, 4) for k, v in found.items()})
            pd.DataFrame(rows).to_csv(path, index=False)
            faster = found['seconds_slow']/found['seconds']
            print(*rows[-1].values(), f'{faster:.1f} times as fast', flush=True)
    save_json(manifest(clock='process_time', networks=args.networks, formats=args.formats),
              path.with_suffix('.json'))


if __name__ == '__main__':
    main()
