"""INT8 copies in ONNX Runtime: do they answer like their simulation, and does the engine compute in integers?

    python benchmarks/quant/export.py runs/ResNet_18/weights.pt ... --data PHOTOS

Each file of `robustnb train` is quantised with ranges from 300 training photographs, exported,
and run on test photographs. Seconds are wall clock of one thread, the median of --repeats
passes over the same images by the engine, with the full-precision and the INT8 file in turn.
Rows go to results/export_cifar10.csv with a manifest beside them.
"""
import argparse, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.data import load_data, subset
from robustnb.quant.export import check_export, export_onnx, OnnxModel
from robustnb.models.loading import load_model
from robustnb.quant.ptq import quantize


def seconds(models, x, repeats):
    "Median seconds of a pass of each model, in turn"
    def once(model):
        start = time.perf_counter()
        predict(model, x)
        return time.perf_counter()-start
    return np.median([[once(m) for m in models] for _ in range(repeats)], 0)


def measure(path, test, args, folder):
    "One row"
    model = load_model(path)
    name = Path(path).parent.name
    q = quantize(model, args.format, args.calibration)
    facts = {k: export_onnx(m, folder/f'{name}_{k}.onnx') for k, m in (('full', model), ('int', q))}
    found = check_export(q, facts['int']['path'], test.x)
    right = torch.as_tensor(test.y)
    engines = [OnnxModel(f['path'], threads=1) for f in facts.values()]
    correct = lambda m: (predict(m, test.x).argmax(1) == right).float().mean().item()
    full, whole = seconds(engines, test.x, args.repeats)
    return dict(model=name, width=model.width, format=args.format,
                **{k: found[k] for k in ('images', 'agreement', 'max_logit_difference',
                                         'mean_logit_difference', 'fused', 'convolutions_fused')},
                convolutions=sum(isinstance(m, torch.nn.Conv2d) for m in q.modules()),
                unfused=len(found['unfused']), float_operators=sum(found['floats'].values()),
                accuracy=correct(model), accuracy_simulated=correct(q),
                accuracy_engine=correct(engines[1]), megabytes_full=facts['full']['megabytes'],
                megabytes=facts['int']['megabytes'], seconds_full=full, seconds=whole)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('weights', nargs='+')
    p.add_argument('--data', required=True)
    p.add_argument('--format', default='INT8')
    p.add_argument('--n-test', type=int, default=1000)
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--out', type=Path, default=Path('results/export_cifar10.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    test = subset(load_data(args.data, 'test'), args.n_test, seed=0)
    args.calibration = subset(load_data(args.data, 'train'), 300, seed=0).x
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(path, test, args, Path(folder)) for path in args.weights]
    table = pd.DataFrame(rows).round(5)
    table.to_csv(args.out, index=False)
    save_json(manifest(data=Path(args.data).name, n_test=args.n_test, repeats=args.repeats,
                       threads=1, calibration='300 training photographs', seed=0),
              args.out.with_suffix('.json'))
    print(table.T.to_string())
