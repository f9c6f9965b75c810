"""Published training sets compared on stand-in hidden images: the ladder, and the teams' sets.

    # surrogates of the hidden set, which no builder sees
    robustnb train --data DATA --model VGG_16 --width .15 --out vgg ...
    python benchmarks/curation/training_sets.py ladder cifar10-images.zip \\
        --hidden vgg/weights.pt,mobilenet/weights.pt
    python benchmarks/curation/training_sets.py proxy ...      # and teams

The sets called lyx3911 are those of lyx3911/tianchi-AI-Challenger-sea8.

Everything is scaled by one factor (1/25 by default): test images, training images, images in a
set. Two regimes: `leaky`, where the pool of the builder is the clean test images, and
`held-out`, where it is training images; the hidden images are the same. Networks are the
competition's, narrow and shortly trained (`--width`, `--epochs`). Finished trainings are kept in
--work and found again. To share the work between processes give each its --seeds or --networks,
then call once more without. Rows go to results/curation_<part>.csv with a manifest beside them.
"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.curation.contest import contest_train
from robustnb.files import load_state, manifest, save_json, save_state
from robustnb.curation.training_sets import build_training_set, load_training_set
from robustnb.data import ImageSet, load_data, subset
from robustnb.curation.hidden import (hidden_set, proxy_networks, score_training_sets,
                                      rank_training_sets)
from robustnb.models.loading import load_model
from robustnb.curation.published import published_mixture

# published scores of stage I
rungs = dict(all_clean=.60, test_only=.78, noise=.92, augmented=.93, fgsm_l2=.95, lyx3911=.9743)
teams = ('lyx3911', 'lyx3911_last', 'lyx3911_smoothed', 'lyx3911_mixup', 'kanra', 'second', 'yoyo',
         'hncszyq', 'eighth', 'tenth', 'ciki000', 'lz_ch')


def together(*sets):
    return ImageSet(np.concatenate([s.images for s in sets]),
                    np.concatenate([s.labels for s in sets]), sets[0].classes)


def kept(path, make):
    "A training set from its folder, made first if it is not there"
    if not (path/'provenance.csv').exists():
        make().save(path)
    return load_training_set(path)


def builders(args, pools, regime):
    "The two networks trained on the clean pool of the regime: those that the builder attacks and asks"
    networks, config = proxy_networks(2, args.width, args.builder_epochs, batch_size=args.batch)
    out = {}
    for name, build in networks.items():
        path = args.work/f'builder-{regime}-{name}.pt'
        net = build(100)
        if path.exists():
            net.load_state_dict(load_state(path))
        else:
            net, _ = contest_train(net, pools[regime].images, pools[regime].labels,
                                   config[name], seed=100)
            save_state(net.state_dict(), path)
        out[name] = net.eval()
    return out


def begin(args):
    "Pools, hidden images, and a function that scores sets"
    test, train = (subset(load_data(args.data, s), round(n*args.scale), seed=0)
                   for s, n in (('test', 10_000), ('train', 50_000)))
    pools = {'leaky': test, 'held-out': train}
    n = round(50_000*args.scale)
    surrogates = {f'{Path(p).parent.name}/{Path(p).stem}': load_model(p)
                  for p in args.hidden.split(',')}
    hidden = kept(args.work/'hidden', lambda: hidden_set(test, surrogates, args.n_hidden))
    networks, config = proxy_networks(2, args.width, args.epochs, batch_size=args.batch)
    networks = {k: v for k, v in networks.items() if k in args.networks}
    def score(sets, seeds=args.seeds, config=config, networks=networks):
        return score_training_sets(sets, hidden, networks, config, seeds, args.work/'runs')
    return pools, n, score


def deliver(args, rows, **facts):
    path = Path(args.out)/f'curation_{args.part}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)
    save_json(manifest(
        scale=args.scale, width=args.width, epochs=args.epochs, batch=args.batch,
        n_hidden=args.n_hidden, seeds=list(args.seeds),
        hidden=[f'{Path(p).parent.name}/{Path(p).name}' for p in args.hidden.split(',')]) | facts,
              path.with_suffix('.json'))


def ladder(args, pools, n):
    "The training sets of the six rungs"
    nets = builders(args, pools, 'leaky')
    make = lambda k: build_training_set(pools['leaky'], **published_mixture(k, nets), n=n)
    sets = dict(all_clean=subset(together(*pools.values()), n, seed=1), test_only=pools['leaky'])
    return sets | {k: kept(args.work/f'leaky-{k}', partial(make, k)) for k in rungs
                   if k not in sets}


def part_ladder(args):
    pools, n, score = begin(args)
    rows = score(ladder(args, pools, n))
    table = rank_training_sets(rows, ('public_a', 'public_b', 'final'))
    table['published'] = pd.Series(rungs)
    print(table.round(3).to_string(), '\nSpearman',
          table.score.corr(table.published, method='spearman'))
    deliver(args, rows)


def part_proxy(args):
    "The sets of the ladder with shorter trainings"
    pools, n, score = begin(args)
    sets = ladder(args, pools, n)
    parts = []
    for width, epochs in ((args.width, round(.4*args.epochs)), (args.width/2, args.epochs//4)):
        networks, config = proxy_networks(2, width, epochs, batch_size=args.batch)
        parts.append(score(sets, config=config, networks={
            k: networks[k] for k in args.networks}).assign(width=width, epochs=epochs))
    deliver(args, pd.concat(parts))


def part_teams(args):
    pools, n, score = begin(args)
    parts = []
    for regime in args.regimes:
        nets = builders(args, pools, regime)
        make = lambda k: build_training_set(
            pools[regime], **published_mixture(k, nets, effort=args.effort), n=n)
        rows = score({k: kept(args.work/f'{regime}-{k}', partial(make, k)) for k in teams})
        parts.append(rows.assign(regime=regime))
        print(regime, rank_training_sets(rows).round(3).to_string())
    deliver(args, pd.concat(parts), effort=args.effort)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('ladder', 'proxy', 'teams'))
    parser.add_argument('data', help='folder or zip with the splits train and test')
    parser.add_argument(
        '--hidden', required=True,
        help='weights of the networks that make the hidden images, separated by commas')
    parser.add_argument('--scale', type=float, default=.04)
    parser.add_argument('--n_hidden', type=int, default=4000)
    parser.add_argument('--width', type=float, default=.25)
    parser.add_argument('--epochs', type=int, default=40)
    parser.add_argument('--builder_epochs', type=int, default=60)
    parser.add_argument('--batch', type=int, default=64, help='images in a step')
    parser.add_argument('--effort', type=float, default=.25,
                        help='share of the published attack steps, for the teams')
    parser.add_argument('--seeds', type=lambda s: tuple(map(int, s.split(','))), default=(0, 1, 2))
    parser.add_argument('--networks', type=lambda s: s.split(','),
                        default=['preactresnet18', 'wideresnet'])
    parser.add_argument('--regimes', type=lambda s: s.split(','), default=['leaky', 'held-out'])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--work', type=Path, default=Path('curation_work'))
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    globals()[f'part_{args.part}'](args)


if __name__ == '__main__':
    main()
