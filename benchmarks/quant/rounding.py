"""What rounding adds to a pass of a network, format by format: the quantised copy beside the
network itself and beside its folded copy.

    python benchmarks/quant/rounding.py

Rows go to results/rounding.csv with a manifest beside them. The networks take turns within each
repetition. Seconds are those of the processor, one thread, so that a busy machine does not
count; `quantize` is the time to make the copy from a calibration on 100 images, `calibrate` that
of the calibration, which serves all formats. To add the rows of another version, run the same
script with that version first in PYTHONPATH and `--version NAME --append`.
"""
import argparse, time
from pathlib import Path

import pandas as pd
import torch

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.models.zoo import build_model
from robustnb.models.graph import fold_batchnorm
from robustnb.quant.ptq import quantize
from robustnb.quant.formats import all_formats
try:
    from robustnb.quant.ptq import calibrate
except ImportError:
    calibrate = lambda model, images: images

formats = ('INT8', 'INT4', 'POT4', 'POT4/POT4', 'FLOAT4', 'FLOAT8', 'FP8', 'APOT4', 'APOT4/APOT4')


def seconds(run):
    began = time.process_time()
    out = run()
    return time.process_time()-began, out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', default='ResNet_18:1,VGG_16:1,ResNet_18:.25,VGG_16:.25',
                        help='names and widths')
    parser.add_argument('--formats', default=','.join(formats))
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--version', default='this')
    parser.add_argument('--append', action='store_true')
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.rand(args.n, 3, 32, 32, generator=make_generator(0, 'rounding'))
    rows = []
    path = Path(args.out)/'rounding.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.append:
        rows = pd.read_csv(path).to_dict('records')
    for network in args.networks.split(','):
        name, width = network.split(':')
        model = build_model(name, width=float(width))
        note = lambda what, rep, s: rows.append(dict(
            version=args.version, model=name, width=float(width), pass_of=what,
            repetition=rep, n=args.n, seconds=round(s, 4)))
        copies = dict(network=model, folded=fold_batchnorm(model))
        s, found = seconds(lambda: calibrate(model, x[:100]))
        if found is not x:
            note('calibrate', 0, s)
        for f in args.formats.split(','):
            if 'APOT' in f and 'APOT4' not in all_formats(): continue
            s, copies[f] = seconds(lambda: quantize(model, f, found))
            note(f'quantize {f}', 0, s)
        for rep in range(args.repeats):
            for what, copy in copies.items():
                note(what, rep, seconds(lambda: predict(copy, x))[0])
            print(network, rep, flush=True)
            pd.DataFrame(rows).to_csv(path, index=False)
    save_json(manifest(n=args.n, repeats=args.repeats, clock='process_time'),
              path.with_suffix('.json'))
    table = pd.DataFrame(rows)
    median = table.pivot_table(index=['version', 'model', 'width'], columns='pass_of',
                               values='seconds', aggfunc='median')
    print(median.div(median.network, axis=0).round(2).T.to_string(), '\n',
          median.div(median.folded, axis=0).round(2).T.to_string())


if __name__ == '__main__':
    main()
