"""Images to probe a quantised copy with: photographs, a generator, its adjusted sets, images
optimised one by one (ZeroQ), noise.

    python benchmarks/transfer/generator.py runs/AlexNet runs/AlexNet_BN runs/VGG_16 \\
        runs/ResNet_18 runs/MobileNetV2 --data cifar10-images.zip

Each network is a folder of `robustnb train`. Every source gives 300 images; they calibrate a
copy of the network in each format and measure how its answers change. The loss of that copy is
measured on 1,000 test photographs. The unlabelled photographs, those that the owner's two
accuracies come from and those 1,000 are different test photographs. Rows go to
results/generator_cifar10.csv (changes and losses), generator_quality_cifar10.csv,
generator_time_cifar10.csv, generator_features_cifar10.csv, with one manifest. Seconds are
processor time of one thread. Finished networks are kept in --work.
"""
import argparse, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import load_state, manifest, save_json, save_state
from robustnb.data import load_data
from robustnb.transfer.generator import draw_targets, Generator, train_generator
from robustnb.models.wrapping import batchnorms
from robustnb.models.loading import load_model
from robustnb.quant.ptq import quantize
from robustnb.transfer.probe_quality import (
    adjust, compose, feature_pca, generator_quality, optimize_images, prediction_error, Composition,
    is_robust)
from robustnb.quant.sensitivity import output_change

formats = ('INT5', 'INT4', 'INT3', 'INT2', 'POT3', 'FLOAT4')


def timed(f, *args, **kw):
    "The result, and the seconds of processor time"
    start = time.process_time()
    return f(*args, **kw), time.process_time()-start


def the_generator(model, path, seed):
    "Trained once, then read from `path`"
    if not path.exists():
        (g, _), seconds = timed(train_generator, model, seed=seed, device='cpu')
        save_state(dict(state=g.state_dict(), size=g.size, width=g.body[2].num_features,
                        knows=g.knows, seconds=seconds),
                   path)
    held = load_state(path)
    s = held['state']
    g = Generator(s['embedding'], s['mean'], s['std'], held['size'], held['width'])
    g.load_state_dict(s)
    g.knows = held['knows']
    return g.eval(), held['seconds']


def all_sources(model, g, trained, unlabelled, known, seed, n=300):
    "Name -> (images, mixtures or None), and one row of time for each"
    noise = (model.normalize.mean + model.normalize.std*torch.randn(
        n, 3, 32, 32, generator=make_generator(seed, 'noise'))).clamp(0, 1)
    found = {'photographs': (unlabelled, None), 'noise': (noise, None)}
    times = []
    def add(name, shares, began):
        found[name], seconds = timed(compose, g, model, n, shares, seed)
        times.append(dict(source=name, seconds=began + seconds, again=seconds) | asdict(shares))
    add('generator', Composition(), trained)
    add('generator, near halfway', Composition(.75, spread=.3), trained)
    for name, target in {'adjusted to photographs': unlabelled, 'adjusted to two accuracies': known,
                         'adjusted to batch norm': None}.items():
        if target is None and not batchnorms(model): continue
        (shares, history), seconds = timed(adjust, g, model, target, rounds=4,
                                           n=100 if target is known else 200, seed=seed)
        print(name, history.round(3).to_string(), sep='\n', flush=True)
        add(name, shares, trained+seconds)
    targets = draw_targets(n, model.n_classes, .5, make_generator(seed, 'direct'))
    (x, steps), seconds = timed(optimize_images, model, targets, seed=seed)
    found['optimised images'] = x, targets
    times.append(dict(source='optimised images', seconds=seconds, again=seconds))
    return found, pd.DataFrame(times)


def one_network(folder, data, work, seed):
    "Tables of one network: changes and losses, quality, time, features"
    model = load_model(Path(folder)/'weights.pt')
    name = Path(folder).name
    order = np.random.default_rng(seed).permutation(len(data))
    test, unlabelled, owner, pictures = (
        data[order[a:b]] for a, b in ((0, 1000), (1000, 1300), (1300, 1600), (1600, 1750)))
    y = torch.as_tensor(test.y)
    right = (predict(model, test.x).argmax(1) == y).float().mean().item()
    known = tuple(is_robust(model, owner.x, torch.as_tensor(owner.y), (1/255,),
                            seed=seed).float().mean(1).tolist())
    g, trained = the_generator(model, work/f'{name}.pt', seed)
    sets, times = all_sources(model, g, trained, unlabelled.x, known, seed)
    rows = []
    for source, (x, _) in sets.items():
        before = predict(model, x)
        for f in formats:
            q = quantize(model, f, x)
            change = output_change(before, predict(q, x))
            loss = (right - (predict(q, test.x).argmax(1) == y).float().mean().item())/right
            rows.append(dict(model=name, format=f, source=source, n_classes=model.n_classes,
                             js=change.js.mean(), flips=change.flip.mean(), measured_loss=loss))
    made = {k: (x[:150], t[:150]) for k, (x, t) in sets.items() if t is not None}
    quality = generator_quality(model, made, pictures, eps=(1/255,), seed=seed)
    points = feature_pca(model, {'real': (pictures.x, torch.as_tensor(pictures.y))} | {
        k: made[k] for k in ('generator', 'adjusted to photographs', 'optimised images')})
    tables = dict(rows=pd.DataFrame(rows), quality=quality.assign(model=name), time=times.assign(
        model=name, accuracy=right, known_accuracy=known[0], known_robust=known[1]),
                  features=points.assign(model=name).round(3))
    for k, t in tables.items():
        t.to_csv(work/f'{name}_{k}.csv', index=False)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('networks', nargs='+')
    p.add_argument('--data', required=True)
    p.add_argument('--out', default='results')
    p.add_argument('--work', type=Path, default=Path('work'))
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(exist_ok=True)
    data = load_data(args.data, 'test')
    names = [Path(o).name for o in args.networks]
    for folder, name in zip(args.networks, names):
        if not (args.work/f'{name}_features.csv').exists():
            print(name, round(timed(one_network, folder, data, args.work, args.seed)[1]), 's',
                  flush=True)
    tables = {k: pd.concat([pd.read_csv(args.work/f'{n}_{k}.csv') for n in names])
              for k in ('rows', 'quality', 'time', 'features')}
    for k, t in tables.items():
        t.round(6).to_csv(Path(args.out)/f"generator{'' if k == 'rows' else '_' + k}_cifar10.csv",
                          index=False)
    if len(names) > 1:
        print(prediction_error(tables['rows']).round(3).to_string())
    print(tables['time'].groupby('source')[['seconds', 'again']].median().round(1).to_string())
    save_json(manifest(networks=names, data=Path(args.data).name, formats=formats, images=300,
                       test_images=1000, seed=args.seed),
              Path(args.out)/'generator_cifar10.json')
