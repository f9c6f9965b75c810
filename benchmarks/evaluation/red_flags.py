"""How often `red_flags` sees a number that is too high, and how often it accuses one that is not.

    python benchmarks/evaluation/red_flags.py digits
    python benchmarks/evaluation/red_flags.py cnn --data FOLDER
    python benchmarks/evaluation/red_flags.py resnet8 --data FOLDER

A zoo of defended, broken and honest models, each made around one base network. For each the number in
doubt is the accuracy under `pgd` (20 steps of one length, random start); the truth is the accuracy under
the union of what fools the base network (Auto-PGD on the margin from two starts, `cascade`) and of the same
attacks on the model itself and Square. Above the union by more than two points, a number is overstated; once
it is ten points too high, no more is tried. Models that answer at random are judged by the mean of 16 fresh
answers, and attacked by the mean of 8; their number in doubt is the mean of five runs, and of several
attacked images the worst is judged once more.

`digits` trains its base in seconds and was used to tune the thresholds; `cnn` and `resnet8` judge them.
FOLDER holds `cifar10/cifar10-test-a.zip` with `read_images.py` (lossless CIFAR-10 test photographs) and
`models/` with `networks.py` and `c10_cnna_v`, `c10_resnet8_m` (weights of the verification benchmark of
alpha-beta-CROWN and of MLCommons Tiny, both public). They are not part of this package.

Rows go to results/red_flags.csv, one at a time; what is there already is not made again. A manifest
stands beside it.
"""
import argparse, copy, sys, time
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.attacks.adaptive_pgd import apgd
from robustnb.attacks.gradient import margin, pgd
from robustnb.attacks.score_based import random_search, square
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.standard import cascade
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.core import make_generator
from robustnb.data import digits, subset
from robustnb.evaluation.checks import red_flags
from robustnb.files import manifest, save_json
from robustnb.models.blocks import he_init
from robustnb.models.graph import fold_batchnorm
from robustnb.models.training import Recipe, train
from robustnb.quant.ptq import quantize


class Around(nn.Module):
    "A network with something before and after it"
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
    def forward(self, x): return self.after(self.net(self.before(x)))


class MeanOf(nn.Module):
    "The mean of several answers"
    def __init__(self, net, n):
        super().__init__()
        self.net, self.n = net, n
    def forward(self, x): return sum(self.net(x) for _ in range(self.n))/self.n


class Flips(nn.Module):
    "Turns its answers round where a gradient is wanted"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        z = self.net(x)
        return 2*z.detach()-z if torch.is_grad_enabled() else z


class Shifts(nn.Module):
    "Moves the image by a pixel more with each call"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))
    def forward(self, x):
        self.calls += 1
        return self.net(x.roll((int(self.calls) % 3)-1, 3))


class OfTheBatch(nn.Module):
    "Subtracts a part of the mean image of the batch"
    def __init__(self, net, part):
        super().__init__()
        self.net, self.part = net, part
    def forward(self, x): return self.net(x - self.part*(x.mean(0)-.5) if len(x) > 1 else x)


def straight(f): return lambda x: x + (f(x)-x).detach()


def levels(n): return lambda x: (n*x).round()/n


def blur(x): return F.avg_pool2d(F.pad(x, [1]*4, mode='replicate'), 3, 1)


def median(x):
    patches = F.unfold(F.pad(x, [1]*4, mode='replicate'), 3).view(len(x), x.shape[1], 9, *x.shape[2:])
    return patches.median(2).values


def dct_rounding(step, like):
    "Coefficients of 8 x 8 blocks rounded to multiples of `step`, as JPEG does"
    k = torch.arange(8.)
    basis = torch.cos(torch.pi*(2*k+1)*k[:, None]/16)*.5
    basis[0] /= 2**.5
    def rounded(x):
        n, c, h, w = x.shape
        blocks = x.view(n, c, h//8, 8, w//8, 8).transpose(3, 4)
        coefficients = ((basis@blocks@basis.T)/step).round()*step
        return (basis.T@coefficients@basis).transpose(3, 4).reshape(n, c, h, w).clamp(0, 1)
    return rounded


def resized_and_padded(x):
    "A smaller image at a random place, for all images of a call"
    side = x.shape[2]
    small = int(torch.randint(side-side//8, side+1, ()))
    left, top = torch.randint(0, side-small+1, (2,)).tolist()
    image = F.interpolate(x, size=(small, small), mode='bilinear', align_corners=False)
    return F.pad(image, (left, side-small-left, top, side-small-top))


def noise(size): return lambda x: x + size*torch.randn_like(x)


def strongest(share):
    "Keeps the largest inner activations alone (k-WTA)"
    def kept(module, args, out):
        flat = out.flatten(1)
        least = flat.topk(max(1, int(share*flat.shape[1])), 1).values[:, -1]
        return out*(out >= least.view(-1, *[1]*(out.ndim-1)))
    return kept


def with_k_wta(net, share):
    net = copy.deepcopy(net)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for m in convolutions[:2]:
        m.register_forward_hook(strongest(share))
    return net


def no_number_near_the_border(least):
    def masked(z):
        top = z.topk(2, 1).values
        return z.masked_fill((top[:, 0]-top[:, 1] < least)[:, None], torch.nan)
    return masked


def decision(z): return 3*F.one_hot(z.argmax(1), z.shape[1]).to(z)


def with_reject(least):
    "One more class, chosen where the two largest logits are near each other"
    def answered(z):
        top = z.topk(2, 1).values
        return torch.cat([z, top[:, 1:]+least], 1)
    return answered


def defended(net, x, eps, calibration, spread):
    "Name -> (model, does it draw?); `spread` is the median lead of the largest logit"
    a = partial(Around, net)
    q = partial(quantize, net, images=calibration)
    return {
        'rounding to 16 levels': (a(levels(15)), False),
        'rounding to 8 levels': (a(levels(7)), False),
        'rounding to 16 levels, straight-through': (a(straight(levels(15))), False),
        'rounding to 256 levels, straight-through': (a(straight(levels(255))), False),
        'DCT rounded': (a(dct_rounding(.1, x)), False),
        'DCT rounded, straight-through': (a(straight(dct_rounding(.1, x))), False),
        'median': (a(median), False),
        'median, gradient detached': (a(straight(median)), False),
        'resize and pad at random': (a(resized_and_padded), True),
        'noise of eps': (a(noise(eps)), True),
        'noise of 4 eps': (a(noise(4*eps)), True),
        'vote of 5 with noise': (MeanOf(a(noise(4*eps)), 5), True),
        'noisy logits': (a(after=lambda z: z + .3*spread*torch.randn_like(z)), True),
        'k-WTA .1': (with_k_wta(net, .1), False),
        'k-WTA .3': (with_k_wta(net, .3), False),
        'logits x 100': (a(after=lambda z: 100*z), False),
        'logits x 1000': (a(after=lambda z: 1000*z), False),
        'tanh head': (a(after=lambda z: torch.tanh(3*z/spread)), False),
        'bfloat16 logits': (a(after=lambda z: z.bfloat16().float()), False),
        'logits on a coarse grid': (a(after=straight(lambda z: (z*4/spread).round()*spread/4)), False),
        'reject class': (a(after=with_reject(.2*spread)), False),
        'fine gradient detached': (a(lambda x: blur(x) + (x-blur(x)).detach()), False),
        'coarse gradient detached': (a(lambda x: x-blur(x) + blur(x).detach()), False),
        'gradient flipped': (Flips(net), False),
        'mean of the batch': (OfTheBatch(net, .05), False),
        'shift by call number': (Shifts(net), False),
        'NaN near the border': (a(after=no_number_near_the_border(.2*spread)), False),
        'decision only': (a(after=straight(decision)), False),
        'decision without gradient': (a(after=lambda z: 0*z + decision(z)), False),
        **{f'{f} copy': (q(spec=f), False) for f in ('INT8', 'INT4', 'POT4', 'FLOAT4')},
    }


KINDS = {
    'no gradient': ('rounding to 16 levels', 'rounding to 8 levels', 'DCT rounded',
                    'decision without gradient'),
    'wrong gradient': ('fine gradient detached', 'coarse gradient detached', 'median, gradient detached',
                       'gradient flipped', 'decision only'),
    'straight-through': ('rounding to 16 levels, straight-through', 'median', 'DCT rounded, straight-through',
                         'rounding to 256 levels, straight-through'),
    'random': ('resize and pad at random', 'noise of eps', 'noise of 4 eps', 'vote of 5 with noise',
               'noisy logits'),
    'saturated': ('logits x 100', 'logits x 1000', 'tanh head'),
    'k-WTA': ('k-WTA .1', 'k-WTA .3'),
    'coarse or missing logits': ('bfloat16 logits', 'logits on a coarse grid', 'NaN near the border',
                                 'reject class'),
    'batch or state': ('mean of the batch', 'shift by call number'),
    '8-bit copy': ('INT8 copy',),
    '4-bit copy': ('INT4 copy', 'POT4 copy', 'FLOAT4 copy')}


def kind_of(label):
    "The kind of a model in the table of the page"
    return next((k for k, labels in KINDS.items() if label in labels), 'honest')


def base_of(name, data):
    "Base network, images, labels, 100 images to calibrate with, the honest threats"
    if name == 'digits':
        part = subset(digits('test', size=16), 200, seed=0)
        pool = subset(digits('train', size=16), 400, seed=0)
        fresh = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                              nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                              nn.Flatten(), nn.Linear(512, 10))
        he_init(fresh, make_generator(0))
        net, _ = train(Recipe(flip=False, batch_size=20, lr=.05, crop=1).shortened(8), fresh.eval(),
                       pool, device='cpu')
        return net, part.x, torch.as_tensor(part.y), [16/255, 24/255], [L2(1.), L1(8.), SSIM(.9)]
    sys.path[:0] = [str(data), str(data/'models')]
    import networks, read_images
    pixels, labels, _ = read_images.read(data/'cifar10'/'cifar10-test-a.zip', per_class=40)
    order = torch.randperm(len(pixels), generator=make_generator(0))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float()/255)[order]
    y = torch.from_numpy(labels)[order]
    file = dict(cnn='c10_cnna_v', resnet8='c10_resnet8_m')[name]
    net = fold_batchnorm(networks.load(file), x[:2]).eval().to(memory_format=torch.channels_last)
    eps = dict(cnn=[2/255, 4/255], resnet8=[1/255, .5/255])[name]
    return net, x, y, eps, [L2(eps[0]*25), L2(eps[0]*10), SSIM(.995)]


def zoo(name, data, n):
    "Rows to make: name, model, base, images, labels, threat, does it draw?"
    net, x, y, eps, others = base_of(name, data)
    calibration = x[n:n+100]
    x = x[:n].contiguous()
    y = y[:n]
    with torch.no_grad():
        top = net(x).topk(2, 1).values
    spread = (top[:, 0]-top[:, 1]).median().item()
    for label, (model, draws) in defended(net, x, eps[0], calibration, spread).items():
        yield label, model.eval(), net, x, y, Linf(eps[0]), draws
    honest = {'plain': net, 'scaled by 3': Around(net, after=lambda z: 3*z),
              'shifted logits': Around(net, after=lambda z: z+5),
              'blurred input': Around(net, lambda x: .7*x + .3*blur(x)),
              'mean of two views': MeanOf(net, 2),
              'in float64': Around(copy.deepcopy(net).double(), torch.Tensor.double, torch.Tensor.float)}
    for label, model in honest.items():
        yield f'honest: {label}', model.eval(), net, x, y, Linf(eps[0]), False
    for threat in (Linf(eps[1]), *others):
        yield f'honest: plain, {threat}', net, net, x, y, threat, False
    for f in ('INT8', 'POT4/INT8'):
        yield (f'honest: {f}, {others[0]}', quantize(net, f, calibration), net, x, y, others[0], False)


def stands(model, x, y, draws):
    "Which images are classified correctly, by the mean of 16 answers where they are drawn"
    with torch.no_grad():
        logits = sum(model(x) for _ in range(16 if draws else 1))
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def from_x(*args, generator, steps=60): return apgd(*args, steps=steps, loss=margin)


@lru_cache(maxsize=2)
def made_on_base(base, x, y, threat):
    "Images that fool the base network: every model around it is asked about them"
    attacks = (from_x, partial(apgd, steps=60, loss=margin), partial(cascade, targets=3))
    return [a(base, x, y, threat, generator=make_generator(0, 'base')) for a in attacks]


def union(threat, queries):
    "The attacks on the model itself that decide what is true"
    normed = not isinstance(threat, SSIM)
    blind = partial(square, queries=queries) if normed else partial(random_search, tries=queries)
    return {'margin from x': from_x, 'margin': partial(apgd, steps=60, loss=margin),
            'cascade': partial(cascade, targets=3), 'square': blind}


def truth(model, base, x, y, threat, queries, naive):
    "What stands against all attacks, until the number is 10 points too high and nothing can change that"
    left = naive.clone()
    failed = []
    for found in made_on_base(base, x, y, threat):
        left &= stands(model, found, y, False)
    for name, attack in union(threat, queries).items():
        at = left.nonzero().flatten()
        if not len(at) or naive.sum()-len(at) > .1*len(x): break
        try:
            found = attack(model, x[at], y[at], threat, generator=make_generator(0, name))
        except Exception as e:
            failed.append(f'{name}: {type(e).__name__}')
            continue
        assert threat.allows(x[at], found).all(), name
        left[at] = stands(model, found, y[at], False)
    return left, failed


def truth_of_draws(model, base, x, y, threat, clean, runs):
    """What stands where answers are drawn: of each image the worst of several by the mean of 16 answers,
    judged by 16 fresh ones, for the least of many draws is low by chance"""
    own = from_x(MeanOf(model, 8).eval(), x, y, threat, generator=None, steps=40)
    several = [*runs, own, *made_on_base(base, x, y, threat)]
    with torch.no_grad():
        height = torch.stack([margin(MeanOf(model, 16)(o), y) for o in several])
    worst = torch.stack(several)[height.argmax(0), torch.arange(len(x))]
    return clean & stands(model, worst, y, True), []


twenty_steps = partial(pgd, steps=20)    # of one length


def judged(model, x, y, threat):
    "Verdict -> checks; a refusal counts as a doubt"
    try:
        table = red_flags(model, x, y, threat, attack=twenty_steps)
    except ValueError as e:
        return dict(doubt=[f'refused: {e}'], note=[], see=[], figures='')
    of = lambda kind: table.check[table.verdict.str.startswith(kind)].tolist()
    odd = table[table.verdict.ne('ok')]
    return dict(doubt=of('doubt'), note=of('note'), see=of('see'),
                figures='; '.join(f'{o.check}: {o.figure}' for o in odd.itertuples()))


def measured(label, model, base, x, y, threat, draws, queries):
    "One row: the number in doubt, the truth, what the flags say"
    torch.manual_seed(0)
    clean = stands(model, x, y, draws)
    began = time.process_time()
    runs = [twenty_steps(model, x, y, threat, generator=make_generator(0, 'red flags'))
            for _ in range(5 if draws else 1)]
    stood = [clean & stands(model, o, y, draws) for o in runs]
    naive = torch.stack(stood).float().mean(0)
    left, failed = (truth_of_draws(model, base, x, y, threat, clean, runs) if draws else
                    truth(model, base, x, y, threat, queries, stood[0]))
    between = time.process_time()
    said = judged(model, x, y, threat)
    points = lambda mask: round(100*mask.float().mean().item(), 1)
    return dict(model=label, kind=kind_of(label), threat=repr(threat), n=len(x),
                clean=points(clean), naive=points(naive), union=points(left),
                overstated=(naive.sum()-left.sum()).item() > .02*len(x) + 1e-3,
                flagged=bool(said['doubt']), checks='; '.join(said['doubt']),
                notes='; '.join(said['note']), explained='; '.join(said['see']),
                failed='; '.join(failed), queries=queries, seconds_union=round(between-began, 1),
                seconds_flags=round(time.process_time()-between, 1), figures=said['figures'])


def rates(table):
    "Detected of the overstated, accused of the others, for each base"
    def one(g):
        high = g[g.overstated]
        fair = g[~g.overstated]
        return pd.Series(dict(overstated=len(high), detected=int(high.flagged.sum()), others=len(fair),
                              accused=int(fair.flagged.sum())))
    return table.groupby('base').apply(one, include_groups=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('base', choices=('digits', 'cnn', 'resnet8'))
    parser.add_argument('--data', type=Path, help='folder of photographs and networks, see above')
    parser.add_argument('--n', type=int, default=100)
    parser.add_argument('--queries', type=int, default=300, help='of Square, an image')
    parser.add_argument('--only', help='names of models that hold this')
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    if args.base != 'digits' and args.data is None:
        parser.error('--data must name the folder of photographs and networks')
    torch.set_num_threads(1)
    path = args.out/'red_flags.csv'
    rows = pd.read_csv(path, keep_default_na=False).to_dict('records') if path.exists() else []
    done = {(o['base'], o['model']) for o in rows}
    cases = list(zoo(args.base, args.data, args.n))
    for label, *case in [o for k in range(3) for o in cases[k::3]]:    # a run that is cut short has all kinds
        if (args.base, label) in done or args.only and args.only not in label: continue
        try:
            row = measured(label, *case, args.queries)
        except ValueError as e:
            print(f'{label}: no number to doubt, the attack refuses: {e}', flush=True)
            continue
        rows.append(dict(base=args.base) | row)
        pd.DataFrame(rows).to_csv(path, index=False)
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(rates(table).to_string())
    seconds = int(table.seconds_union.sum()+table.seconds_flags.sum())
    facts = manifest(rows=len(table), seconds=seconds,
                     tuned_on='digits', judged_on=', '.join(sorted({*table.base} - {'digits'})),
                     rates=rates(table).reset_index().to_dict('records'))
    save_json(facts, path.with_suffix('.json'))


if __name__ == '__main__':
    main()
