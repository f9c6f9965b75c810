"""Training sets judged on kinds of damage that their sources may use, and on kinds that they may not.

    python benchmarks/curation/kinds.py race --data ../shared/data --work kinds_work
    python benchmarks/curation/kinds.py final ...    # and prepare, agreement

`--data` is a folder with `read_images.py`, `cifar10/` and `models/networks.py`: lossless photographs and
networks made by other people. The builder has 4,000 training photographs and builds sets of 4,000 rows;
PreAct-ResNet-18 and WideResNet-28-4, an eighth as wide, are trained on each set for 30 epochs. It may attack
and ask the networks that it trained on its own photographs. Hidden images are test photographs: for the
search those of `search`, attacked through networks that `final` does not use. Everything that is made is
kept in --work, under a name for the numbers behind it, and found again. Rows go to
results/curation_kinds_<part>.csv with a manifest beside them.
"""
import argparse, hashlib, sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from robustnb.attacks.transferable import ensemble
from robustnb.core import make_generator
from robustnb.curation.baselines import baseline_mixture, baseline_names
from robustnb.curation.contest import contest_train
from robustnb.curation.hidden import (
    compare_sets, proxy_networks, rank_training_sets, score_training_sets)
from robustnb.curation.published import published_mixture
from robustnb.curation.recipe import robust_mixture, teaching_mixture
from robustnb.curation.training_sets import build_training_set
from robustnb.curation.unseen import held_out_set
from robustnb.data import ImageSet
from robustnb.files import load_state, manifest, save_json, save_state
from training_sets import kept

# committed before the search began
photographs = rows = 4000
width, epochs, batch = .125, 30, 64
n_hidden, hidden_effort, effort = 4000, .5, .25
hidden_sets = dict(
    search=dict(skip=0, seen=('c10_resnet20_a', 'c10_resnet8_k'), unseen=('c10_resnet20_i',)),
    final=dict(skip=2000, seen=('c10_resnet26_k', 'c10_resnet8_m'),
               unseen=('c10_resnet56_a', 'c10_cnna_v')))
teams = ('lyx3911', 'kanra', 'yoyo', 'hncszyq', 'tenth', 'ciki000')
every = ('public_a', 'public_b', 'final')
# name -> proportions of `builder_sources`, weight of the teachers' labels
some = dict(clean=.35, corrupted=.25, cutmix=.2, noise=.1, linf=.1)
candidates = {
    'mixed': (some, 0.), 'mixed taught': (some, .8), 'clean taught': (dict(clean=1.), .8),
    'pixmix taught': (dict(pixmix=1.), .8),
    'damaged pixmix taught': (dict(pixmix=.6, corrupted=.25, noise=.05, linf=.1), .8),
    'mild taught': (dict(clean=.6, corrupted=.25, noise=.1, linf=.05), .8),
    'strong taught': (dict(clean=.1, corrupted=.4, cutmix=.2, noise=.15, linf=.1, l2=.05), .8)}
finalists = 'pixmix taught', 'mild taught'      # first and second of the race
agreement = ['clean', 'augmix', 'noise', 'mixed', 'clean taught', 'mixed taught']


def keyed(name, *facts):
    "A file name that says what stands behind it: what was made with other numbers is not found again"
    return f"{name.replace(' ', '-')}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def behind():
    "What sets and networks are made with"
    return photographs, rows, width, epochs, batch, effort


def drawn(data, part, n, skip=0):
    "Photographs of a part, as many of each class, in an order drawn once"
    from read_images import read
    x, y, classes = read(data/'cifar10'/f'cifar10-{part}.zip')
    order = torch.randperm(len(x), generator=make_generator(0, part)).numpy()
    rank = pd.Series(y[order]).groupby(y[order]).cumcount().to_numpy()
    at = order[np.argsort(rank, kind='stable')][skip:skip+n]
    return ImageSet(x[at], y[at], classes)


def hidden_images(args, which):
    "Tampered test photographs; networks of others do the tampering"
    from networks import load
    facts = hidden_sets[which]
    together = ensemble([load(k).eval() for k in facts['seen']])
    others = {k: load(k).eval() for k in facts['unseen']}
    test = drawn(args.data, 'test-a', 2000, facts['skip'])
    key = keyed(f'hidden-{which}', facts, n_hidden, hidden_effort)
    return kept(args.work/key, lambda: held_out_set(
        test, {'+'.join(facts['seen']): together}, others, n_hidden, effort=hidden_effort))


class Mixed(nn.Module):
    "A network that is trained in bfloat16 and answers in float32"
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast('cpu', torch.bfloat16, enabled=self.training):
            return self.network(x).float()


def networks_of(args, wide, passes):
    "Networks by seed, and their settings"
    networks, config = proxy_networks(2, wide, passes, batch_size=batch)
    if args.bf16:
        networks = {k: lambda seed, make=make: Mixed(make(seed)) for k, make in networks.items()}
    return networks, config


def trained(args, path, name, wide, data, passes, seed):
    "A network trained on a set, kept in a file"
    networks, config = networks_of(args, wide, passes)
    net = networks[name](seed)
    path = path.with_stem(keyed(path.stem, name, wide, len(data), passes, seed, args.bf16,
                                behind()))
    if path.exists():
        net.load_state_dict(load_state(path))
        return net.eval()
    net, _ = contest_train(net, data.images, data.labels, config[name], seed=seed,
                           checkpoint=path.with_suffix('.part'))
    save_state(net.state_dict(), path)
    path.with_suffix('.part').unlink()
    return net


def builders(args, pool):
    "The networks that the builder attacks and asks, trained on its photographs"
    return {k: trained(args, args.work/f'builder-{k}.pt', k, width, pool, 30, 100)
            for k in ('preactresnet18', 'wideresnet')}


def teachers(args, pool, nets):
    "The network that labels: wider, trained on ten tampered versions of each photograph"
    key = keyed('lessons', teaching_mixture(nets)['proportions'], args.bf16, behind())
    lessons = kept(args.work/key, lambda: build_training_set(
        pool, **teaching_mixture(nets), n=10*photographs, seed=1))
    return [trained(args, args.work/'teacher.pt', 'preactresnet18', .1875, lessons, 8, 200)]


def plan_of(name, nets, taught):
    if name in baseline_names: return baseline_mixture(name)
    if name in teams: return published_mixture(name, nets, effort=effort)
    proportions, weight = candidates[name]
    return robust_mixture(nets, taught if weight else (), proportions, weight, effort)


def sets_of(args, names):
    "Name -> training set"
    pool = drawn(args.data, 'train', photographs)
    nets = builders(args, pool)
    taught = teachers(args, pool, nets) if any(n in candidates for n in names) else ()
    make = lambda name: build_training_set(pool, **plan_of(name, nets, taught), n=rows)
    return {k: kept(args.work/'sets'/keyed(k, candidates.get(k), args.bf16, behind()), partial(make, k))
            for k in names}


def judged(args, sets, which, seeds, passes=epochs):
    "Rows of `score_training_sets` in the regime"
    networks, config = networks_of(args, width, passes)
    networks = {k: v for k, v in networks.items() if k in args.networks}
    return score_training_sets(sets, hidden_images(args, which), networks, config, seeds,
                               args.work/'runs')


def deliver(args, table, **facts):
    path = Path(args.out)/f'curation_kinds_{args.part}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    save_json(manifest(photographs=photographs, rows=rows, width=width, epochs=epochs, batch=batch,
                       n_hidden=n_hidden, hidden_effort=hidden_effort, effort=effort,
                       bf16=args.bf16, hidden=hidden_sets, **facts),
              path.with_suffix('.json'))


def part_prepare(args):
    "Everything but the trainings that are judged"
    sets = sets_of(args, args.sets or [*baseline_names, *teams, *candidates])
    print({k: len(v) for k, v in sets.items()})


def part_agreement(args):
    "The sets of the race that differ most, trained as in the race and four times as long"
    sets = sets_of(args, args.sets or agreement)
    parts = [judged(args, sets, 'search', (0,), passes).assign(epochs=passes)
             for passes in (epochs, 4*epochs)]
    scores = pd.concat({p.epochs.iloc[0]: rank_training_sets(p, every).score for p in parts}, axis=1)
    print(scores.round(3), '\nSpearman', scores.corr('spearman').iloc[0, 1])
    deliver(args, pd.concat(parts))


def part_race(args):
    "Baselines, published sets and candidates on the hidden images of the search, one training each"
    found = judged(args, sets_of(args, args.sets or [*baseline_names, *teams, *candidates]), 'search', (0,))
    deliver(args, found, candidates=candidates)
    print(rank_training_sets(found, every).round(3).to_string())


def part_final(args):
    "Baselines, published sets and the finalists on images and through networks that no choice has seen"
    sets = sets_of(args, args.sets or [*baseline_names, *teams, *finalists])
    found = judged(args, sets, 'final', args.seeds)
    deliver(args, found, proportions={k: candidates[k][0] for k in finalists})
    print(rank_training_sets(found, every).round(3).to_string())
    if found.seed.nunique()*found.model.nunique() == 1: return
    for one, other in product(finalists, sets):
        if one in sets and one != other:
            print(f'\n{one} - {other}\n{compare_sets(found, one, other, every).round(3)}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('prepare', 'race', 'agreement', 'final'))
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--sets', type=lambda s: s.split(','), help='names; None takes those of the part')
    parser.add_argument('--seeds', type=lambda s: tuple(map(int, s.split(','))), default=(0, 1, 2))
    parser.add_argument('--networks', type=lambda s: s.split(','),
                        default=['preactresnet18', 'wideresnet'])
    parser.add_argument('--bf16', action='store_true', help='train in bfloat16 (where the processor has AMX)')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--work', type=Path, default=Path('kinds_work'))
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    args.work.mkdir(parents=True, exist_ok=True)
    globals()[f'part_{args.part}'](args)


if __name__ == '__main__':
    main()
