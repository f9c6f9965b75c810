"""How well losses of robust accuracy are predicted without labels, on networks and photographs of others.

    python benchmarks/transfer/robust_loss.py --data ../shared/data --work work

`--data` is as for quantization_loss.py, whose photographs these are. A row per network, format and eps in
results/robust_loss.csv. Measured on `--n` labelled photographs: what stands after `cascade` of the
original, and of the copy also after the original's adversarial images; no loss where the original keeps
fewer than 20. Foreseen on the same photographs without labels, the original's answers in their place:
`attacked` is the certainty of what the copy holds over that of what the original holds, as `Study` does it.
The others leave the copy in peace: `transferred` asks it about the original's adversarial images; `taken`
compares its lead on the clean image with what the attack took from the original's; `uneven` adds one
standard deviation of how rounding moves leads between clean and adversarial images; `chances` are
`flip_chances` of the original's answers to its adversarial images, where the copy holds those. `expected` is
the robust accuracy of the original by certainty, `expected_known` with its accuracy known. In 20 divisions,
`attacked_other_half` and `measured_other_half` are how far what is foreseen from one half, and what is
measured on it, lie from what is measured on the other. Half a minute to
a minute and a half for each network and copy on one thread. Answers are kept in `--work`, a file for each,
so that an interrupted run goes on.
"""
import pandas as pd
import torch

from others import cifar, kept, loaded, parsed
from robustnb.attacks.gradient import margin
from robustnb.attacks.standard import run_cascade
from robustnb.attacks.threat_models import Linf
from robustnb.contract import predict
from robustnb.core import make_generator
from robustnb.files import manifest, save_json
from robustnb.quant.ptq import quantize
from robustnb.transfer.certainty import foreseen_accuracy, granted, known_sharpness, shifted
from robustnb.transfer.noise import flip_chances, rounding_noise

networks = 'c10_resnet8_k c10_cnna_v c100_resnet8_k c10_resnet8_m'
formats = 'INT8 INT4 POT4 FLOAT4 INT3'.split()
budgets = (.25, .5, 1., 2.)     # grey levels


def surviving(model, x, y, transferred=()):
    "(E,N) which images stand at each budget, those that fell at a smaller one not; the images (E,N,C,H,W)"
    stands = predict(model, x).argmax(1) == y
    rows, images = [], []
    now = x.clone()
    for k, eps in enumerate(budgets):
        if transferred:
            stands &= predict(model, transferred[k]).argmax(1) == y
        i = stands.nonzero().flatten()
        if len(i):
            found = run_cascade(model, x[i], y[i], Linf(eps/255))
            now[i] = found.x_adv
            stands = stands.index_fill(0, i[~found.survives], False)
        rows.append(stands.clone())
        images.append(now.clone())
    return torch.stack(rows), images


def original(model, x):
    "The original, attacked on its own answers"
    logits = predict(model, x)
    said = logits.argmax(1)
    stood, images = surviving(model, x, said)
    return dict(logits=logits, stood=stood, images=images, attacked=[predict(model, o) for o in images])


def of_copy(copy, x, y, first):
    "The same of a copy: on the original's answers, and on labels where only the copy knows them"
    logits = predict(copy, x)
    said = first['logits'].argmax(1)
    stands = surviving(copy, x, said, first['images'])[0]
    right = stands & (said == y)
    i = ((logits.argmax(1) == y) & (said != y)).nonzero().flatten()
    if len(i):
        right[:, i] = surviving(copy, x[i], y[i], [o[i] for o in first['images']])[0]
    return dict(logits=logits, stands=stands, right=right,
                transferred=[predict(copy, o) for o in first['images']])


def answers(name, args):
    "What original and copies answer, kept in files"
    model = loaded(name)
    x, y = cifar(args.data, name, 'test-a', args.n)
    calibration, _ = cifar(args.data, name, 'train', 100)
    first = kept(args.work/f'{name}.pt', lambda: original(model, x))
    agreed = foreseen_accuracy(first['logits'], [predict(model, o) for o in shifted(x)])
    first['certain'] = granted(first['logits'], known_sharpness(first['logits'], agreed)).max(1).values
    for f in args.formats.split():
        yield f, y, first, kept(args.work/f'{name}-{f.replace("/", "_")}.pt',
                                lambda: of_copy(quantize(model, f, calibration), x, y, first))


def share_lost(certain, stood, stands): return 1 - float((certain*stands).sum()/(certain*stood).sum())


def foreseen(first, copy, k):
    "Robust losses without labels at budget k: the first with the copy attacked, the others without"
    L, Q = first['logits'], copy['logits']
    said = L.argmax(1)
    certain = first['certain']
    stood = first['stood'][k]
    holds = stood & (Q.argmax(1) == said)
    carried = holds & (copy['transferred'][k].argmax(1) == said)
    lead = lambda o: -margin(o.double(), said)
    taken = rounding_noise(L, Q).gain*(lead(L) - lead(first['attacked'][k]))
    # how unevenly the noise of rounding moves a lead within the ball
    uneven = (lead(copy['transferred'][k]) - lead(Q) + taken)[stood].std()
    calm = 1 - flip_chances(first['attacked'][k], L, Q)
    lost = lambda stands: share_lost(certain, stood, stands)
    return dict(attacked=lost(copy['stands'][k]), transferred=lost(carried),
                taken=lost(holds & (lead(Q) > taken)), uneven=lost(holds & (lead(Q) > taken + uneven)),
                chances=lost(carried*calm))


def halves(first, copy, y, k):
    "Mean absolute distance from what one half measures, of what the other foresees and of what it measures"
    certain = first['certain']
    right = (first['logits'].argmax(1) == y).double()
    stood, stands, kept = first['stood'][k], copy['stands'][k], copy['right'][k]
    apart = []
    for seed in range(20):
        order = torch.randperm(len(y), generator=make_generator(seed, 'halves'))
        for i, j in (order.chunk(2), order.chunk(2)[::-1]):
            true = [1 - float(kept[o].sum()/(right*stood)[o].sum()) for o in (i, j)]
            apart.append((abs(share_lost(certain[i], stood[i], stands[i]) - true[1]), abs(true[0] - true[1])))
    return dict(zip(('attacked_other_half', 'measured_other_half'), torch.tensor(apart).mean(0).tolist()))


def rows_of(name, args):
    "A row per format and budget; no loss where the original keeps fewer than 20 photographs"
    for f, y, first, copy in answers(name, args):
        L = first['logits']
        right = L.argmax(1) == y
        certain = first['certain']
        known = granted(L, known_sharpness(L, right.double().mean().item())).max(1).values
        for k, eps in enumerate(budgets):
            stood = first['stood'][k]
            before = int((stood & right).sum())
            row = dict(network=name, format=f, eps=eps, n=len(y), accuracy=right.double().mean().item(),
                       robust_accuracy=before/len(y), expected=float((certain*stood).mean()),
                       expected_known=float((known*stood).mean()), survivors=before)
            if before >= 20:
                row['measured'] = 1 - int(copy['right'][k].sum())/before
                row |= foreseen(first, copy, k) | halves(first, copy, y, k)
            yield row


def more_arguments(parser):
    parser.add_argument('--networks', default=networks)
    parser.add_argument('--formats', default=' '.join(formats))
    parser.add_argument('--n', type=int, default=125)


def main():
    args = parsed(__doc__, 'robust_loss', more_arguments)
    rows = []
    for name in args.networks.split():
        rows += rows_of(name, args)
    pd.DataFrame(rows).round(4).to_csv(args.out/'robust_loss.csv', index=False)
    save_json(manifest(n=args.n, budgets=budgets, attack='cascade'), args.out/'robust_loss.json')


if __name__ == '__main__':
    main()
