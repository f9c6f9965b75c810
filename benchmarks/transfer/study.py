"""What every number format costs every trained network, and what could be seen of it without its data.

    robustnb_train --data PHOTOS --model ResNet_18 --width .25 --epochs 10 --out runs/ResNet_18        (one run per network)
    python benchmarks/transfer/study.py runs/ResNet_18/weights.pt ... --data PHOTOS --work transfer_work
    robustnb_fit_predictor transfer_work/AlexNet,transfer_work/AlexNet_BN,... --out results

Ranges come from generated images, and the features from their answers: `measured_*` columns are
what 1,000 labelled test photographs say, and are never used for a prediction of the same
network. Finished formats stay in --work, one file each, and are found again. A network's
report_table.csv has a row for each format and budget, and all of them together are --out.
"""
import argparse, json, time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.attacks.gradient import multi_attack, pgd
from robustnb.core import predict
from robustnb.files import atomic_path, manifest, save_json
from robustnb.data import load_data, subset
from robustnb.evaluation.robust_accuracy import transfer_attack, robustness_curve
from robustnb.transfer.generator import generate, train_generator
from robustnb.models.loading import load_model
from robustnb.transfer.features import noise_sum, relative_margin, softmax_js
from robustnb.quant.ptq import calibrate, quantize, FakeQuantize
from robustnb.quant.sensitivity import output_change
from robustnb.attacks.threat_models import Linf

formats = [f'INT{b}' for b in range(2, 17)] + [f'POT{b}' for b in range(2, 9)] + [
    f'FLOAT{b}_E{e}' for b in range(3, 9) for e in range(1, b-1)]


def standing(rows):
    "Images that are still right at each eps (budgets, images)"
    return rows.sort_values(['eps', 'image']).correct.to_numpy().reshape(rows.eps.nunique(), -1)


def row(original, made, i):
    "What the copy of one format does under budget number `i`, in the columns of `assess`"
    change = {k: output_change(torch.tensor(original[a]), torch.tensor(made[b]))
              for k, a, b in (('', 'logits', 'answers'), ('_real', 'real', 'real'))}
    margin = relative_margin(torch.tensor(original['logits']))
    stood, stands, right, left = (o[f'{k}_standing'][i] for k in ('probes', 'test')
                                  for o in (original, made))
    return ({f'{m}{k}': float(c[n].mean()) for k, c in change.items()
             for m, n in (('js', 'js'), ('flips', 'flip'))} | dict(
                 noise=float(made['noise_weights'] + made['noise_activations'])/margin,
                 activation_noise=float(made['noise_activations']/original['tensors'])/margin,
                 margin=margin, softmax_js_flops=float(made['softmax_js_flops']),
                 softmax_js_params=float(made['softmax_js_params']),
                 eps=float(original['eps'][i-1]),
                 robust_flips=1 - stands[stood].mean() if stood.sum() >= 20 else np.nan,
                 accuracy=original['right'].mean(),
                 measured_loss=1 - made['right'].mean()/original['right'].mean(),
                 robust_accuracy=right.mean(),
                 measured_robust_loss=1 - left.mean()/right.mean()
                                      if right.sum() >= 20
                                         and right.mean() >= 2/original['logits'].shape[1]
                                      else np.nan,
                 seconds=float(made['seconds'])))


def tabulate(folder):
    "report_table.csv of one network, from its files"
    original = dict(np.load(folder/'original.npz'))
    about = json.loads((folder/'manifest.json').read_text())
    done = [f for f in formats if (folder/f'{f}.npz').exists()]
    rows = [dict(network=folder.name, dataset=about['dataset'], format=f,
                 n_classes=original['logits'].shape[1]) | row(original, made, i)
            for f in done for made in [dict(np.load(folder/f'{f}.npz'))]
            for i in range(1, len(original['eps'])+1)]
    table = pd.DataFrame(rows).round(6)
    with atomic_path(folder/'report_table.csv') as tmp:
        table.to_csv(tmp, index=False)
    return table


def begin(path, args):
    "Everything about one network that no format changes"
    model = load_model(path)
    name = Path(path).parent.name
    generator, _ = train_generator(model, seed=args.seed)
    x, targets = generate(generator, args.probes, seed=args.seed)
    ranges = calibrate(model, x)
    logits = predict(model, x)
    threats = [Linf(float(e)/255) for e in args.eps.split(',')]
    few = x[:args.attacked]
    own = logits[:args.attacked].argmax(1)
    images = args.test
    attack = partial(pgd, steps=10)
    roads = dict(probes=transfer_attack(model, attack), test=transfer_attack(model, attack))
    before = dict(probes=robustness_curve(model, few, own, roads['probes'], threats, args.seed),
                  test=robustness_curve(model, images.x[:args.attacked],
                                        images.labels[:args.attacked], roads['test'], threats,
                                        args.seed))
    tensors = sum(isinstance(m, FakeQuantize) for m in quantize(model, 'INT8', ranges).modules())
    return dict(model=model, name=name, tensors=tensors, x=x, ranges=ranges, targets=targets,
                logits=logits, threats=threats, few=few, own=own, roads=roads, attack=attack,
                before={k: standing(v) for k, v in before.items()},
                right=predict(model, images.x).argmax(1) == images.labels)


def measured(net, fmt, args):
    "Answers of one format's copy on probes, unlabelled and labelled photographs, clean and attacked"
    began = time.perf_counter()
    model = net['model']
    test = args.test
    q = quantize(model, fmt, net['ranges'])
    layers = {f'noise_{k}': v for k, v in noise_sum(model, q, net['x'][:100]).items()} | {
        f'softmax_js_{k}': v for k, v in softmax_js(model, q, tuple(test.x.shape[1:])).items()}
    answers = predict(q, net['x'])
    real = predict(q, args.unlabelled)
    right = predict(q, test.x).argmax(1) == test.labels
    seconds = time.perf_counter()-began
    seen = robustness_curve(q, net['few'], net['own'], net['roads']['probes'], net['threats'],
                            args.seed)
    both = multi_attack(net['roads']['test'], net['attack'])
    held = robustness_curve(q, test.x[:args.attacked], test.labels[:args.attacked], both,
                            net['threats'], args.seed)
    return dict(answers=answers.numpy(), real=real.numpy(), right=right.numpy(),
                probes_standing=standing(seen), test_standing=standing(held), seconds=seconds,
                all_seconds=time.perf_counter()-began, **layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', nargs='+', help='files of robustnb_train')
    parser.add_argument('--data', required=True, help='photographs, as for robustnb_train')
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
    args.test.labels = torch.as_tensor(args.test.y)
    args.unlabelled = subset(load_data(args.data, 'train'), args.probes, seed=args.seed).x
    for path in args.weights:
        folder = args.work/Path(path).parent.name
        left = [f for f in args.formats.split(',') if not (folder/f'{f}.npz').exists()]
        if not left: continue
        folder.mkdir(parents=True, exist_ok=True)
        net = begin(path, args)
        with atomic_path(folder/'original.npz') as tmp, open(tmp, 'wb') as f:
            np.savez_compressed(f, logits=net['logits'], targets=net['targets'],
                                real=predict(net['model'], args.unlabelled), right=net['right'],
                                tensors=net['tensors'], eps=[t.eps for t in net['threats']],
                                **{f'{k}_standing': v for k, v in net['before'].items()})
        save_json(manifest(network=net['name'], width=net['model'].width,
                           dataset=Path(args.data).stem, probes=args.probes,
                           attacked=args.attacked, n_test=args.n_test, seed=args.seed,
                           accuracy=net['right'].float().mean().item()),
                  folder/'manifest.json')
        for fmt in left:
            found = measured(net, fmt, args)
            with atomic_path(folder/f'{fmt}.npz') as tmp, open(tmp, 'wb') as f:
                np.savez_compressed(f, **found)
            print(net['name'], fmt,
                  f"right {found['right'].mean():.3f} of {net['right'].float().mean():.3f}, "
                  f"robust {found['test_standing'].mean(1).round(3)} of "
                  f"{net['before']['test'].mean(1).round(3)}, {found['seconds']:.1f} + "
                  f"{found['all_seconds']-found['seconds']:.1f} s",
                  flush=True)
    tables = [tabulate(args.work/Path(path).parent.name) for path in args.weights]
    with atomic_path(args.out) as tmp:
        pd.concat(tables).to_csv(tmp, index=False)


if __name__ == '__main__':
    main()
