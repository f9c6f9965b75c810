"""What every number format costs every trained network, and what could be seen of it without its data.

    robustnb train --data PHOTOS --model ResNet_18 --width .25 --epochs 10 --out runs/ResNet_18
    ... and so each network
    python benchmarks/transfer/study.py runs/ResNet_18/weights.pt ... --data PHOTOS --work transfer_work
    robustnb fit-predictor transfer_work/AlexNet,transfer_work/AlexNet_BN,... --out results

Ranges come from generated images, and the features from their answers: `measured_*` columns are
what 1,000 labelled test photographs say, and are never used for a prediction of the same
network. `accuracy` and `robust_accuracy` are those of the original, `all_seconds` those of one
format, its attacks included. Finished formats stay in --work, one file each, and are found
again. A network's report_table.csv has a row for each format and budget, and all of them
together are --out.
"""
import argparse, json, time
from pathlib import Path

import pandas as pd
import torch

from robustnb.contract import predict
from robustnb.files import atomic_path, manifest, save_json
from robustnb.data import load_data, subset
from robustnb.models.loading import load_model
from robustnb.transfer.features import relative_margin, softmax_js
from robustnb.quant.sensitivity import output_change
from robustnb.transfer.study import Probes, Study
from robustnb.attacks.threat_models import Linf

integers = [f'INT{b}' for b in range(2, 17)]
powers = [f'POT{b}' for b in range(2, 9)]
floats = [f'FLOAT{b}_E{e}' for b in range(3, 9) for e in range(1, b-1)]
formats = integers + powers + floats
columns = ['model', 'dataset', 'format', 'n_classes', 'js', 'flips', 'js_real', 'flips_real',
           'noise', 'activation_noise', 'margin', 'softmax_js_flops', 'softmax_js_params',
           'eps', 'robust_flips', 'accuracy', 'measured_loss', 'robust_accuracy',
           'measured_robust_loss', 'all_seconds']


def tabulate(folder):
    "report_table.csv of one network, from its files"
    about = json.loads((folder/'manifest.json').read_text())
    named = dict(model=folder.name, dataset=about['dataset'])
    files = [folder/f'{f}.json' for f in formats]
    rows = [named | row for f in files if f.exists() for row in json.loads(f.read_text())]
    table = pd.DataFrame(rows)[columns].round(6)
    with atomic_path(folder/'report_table.csv') as tmp:
        table.to_csv(tmp, index=False)
    return table


def begin(path, args):
    "The study of one network"
    model = load_model(path)
    threats = tuple(Linf(float(e)/255) for e in args.eps.split(','))
    probes = Probes.generated(model, args.probes, seed=args.seed)
    return Study(model, probes, threats, args.test, attacked=args.attacked, seed=args.seed)


def measured(study, format, photographs, answers):
    "Rows of one format, one a budget; `answers` are those of the original to the photographs"
    began = time.perf_counter()
    copy = study.copy(format)
    divergence = softmax_js(study.model, copy, tuple(study.test.x.shape[1:]))
    real = output_change(answers, predict(copy, photographs))
    more = {f'softmax_js_{k}': v for k, v in divergence.items()}
    more |= dict(js_real=float(real.js.mean()), flips_real=float(real.flip.mean()))
    more |= dict(margin=relative_margin(study.answers))
    rows = [row | more | own for row, own in zip(study.rows(format), study.original)]
    seconds = time.perf_counter() - began
    return [row | dict(all_seconds=seconds) for row in rows]


def assess(path, args):
    "Measure the formats of one network that have no file yet"
    folder = args.work/Path(path).parent.name
    left = [f for f in args.formats.split(',') if not (folder/f'{f}.json').exists()]
    if not left: return
    folder.mkdir(parents=True, exist_ok=True)
    study = begin(path, args)
    answers = predict(study.model, args.unlabelled)
    accuracy = study.original[0]['accuracy']
    asked = {k: getattr(args, k) for k in ('probes', 'attacked', 'n_test', 'seed')}
    facts = dict(network=folder.name, width=study.model.width, dataset=Path(args.data).stem)
    facts = manifest(**facts, **asked, accuracy=accuracy)
    save_json(facts, folder/'manifest.json')
    for format in left:
        rows = measured(study, format, args.unlabelled, answers)
        save_json(rows, folder/f'{format}.json')
        lost = [round(100*r['measured_robust_loss'], 1) for r in rows]
        clean = f"lost {100*rows[0]['measured_loss']:.1f} % of {accuracy:.3f}"
        print(folder.name, format, f"{clean}, robust {lost} %, {rows[0]['all_seconds']:.1f} s",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', nargs='+', help='files of robustnb train')
    parser.add_argument('--data', required=True, help='photographs, as for robustnb train')
    parser.add_argument('--formats', default=','.join(formats))
    parser.add_argument('--eps', default='.25,.5,1,2', help='Linf budgets, grey levels')
    parser.add_argument('--probes', type=int, default=500)
    parser.add_argument('--attacked', type=int, default=250,
                        help='probes and test photographs that are attacked')
    parser.add_argument('--n_test', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--work', type=Path, default=Path('transfer_work'))
    parser.add_argument('--out', type=Path, default=Path('results/transfer_cifar10.csv'))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.test = subset(load_data(args.data, 'test'), args.n_test, seed=args.seed)
    args.unlabelled = subset(load_data(args.data, 'train'), args.probes, seed=args.seed).x
    for path in args.weights:
        assess(path, args)
    tables = [tabulate(args.work/Path(path).parent.name) for path in args.weights]
    with atomic_path(args.out) as tmp:
        pd.concat(tables).to_csv(tmp, index=False)


if __name__ == '__main__':
    main()
