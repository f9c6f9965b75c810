"""The cascade against the union of everything tried, on networks and photographs of others.

    python benchmarks/attacks/union.py --data ../shared/data

`--data` is a folder with `read_images.py`, `cifar10/`, `cifar100/` and `models/networks.py`: lossless
photographs and networks made by other people; `name:FORMAT` is a quantised copy of one, its ranges from 100
training photographs; `name=weights.pt` a network saved by this package, for example by
benchmarks/models/adversarial_training.py, and `zoo:NAME` one of the project's own; `lite0` is
EfficientNet-Lite0 on photographs of 224 pixels, whose weights and `imagenet/` are explained by
benchmarks/quant/real_size.py. The union is what stands after the cascade and after, on its
survivors and those of each other: 100 iterations of Auto-PGD on the margin from the image and from a random
point, on the cross-entropy and on the logit ratio from random points, 50 towards each of five
classes, and 1,000 queries of Square. Which of them found what the cascade missed stands in `found_by`. A row
per network and threat, in results/attacks_union.csv; rows that are there are not measured again. `passes` are
images through the network, forward and backward, for each image given. Settings were chosen on c10_resnet20_a
and its INT4 copy at Linf 1/255, those of L1 on c10_resnet8_m and zoo:ResNet_18-cifar10-adversarial; all other
rows judge them.
"""
import argparse, json, sys, time
from pathlib import Path

import pandas as pd
import torch

sys.path.append(str(Path(__file__).parent.parent/'quant'))
from real_size import opened, photographs as imagenet
from robustnb.attacks.adaptive_pgd import climb, gradients
from robustnb.attacks.gradient import cross_entropy, dlr, is_correct, margin, margin_to
from robustnb.attacks.score_based import square
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.standard import run_cascade
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.core import make_generator, to_float
from robustnb.files import manifest, save_json
from robustnb.models.graph import fold_batchnorm
from robustnb.models.loading import load_model
from robustnb.quant.ptq import quantize

asked = ('c10_resnet20_a,linf_1 c10_resnet20_a:INT4,linf_1 c10_resnet20_a,l2_.1 c10_resnet26_k,linf_1 '
         'c100_resnet20_k,linf_1 c10_resnet26_k:INT4,linf_1 c10_resnet20_a:INT8,linf_1 '
         'c10_resnet20_a:FLOAT4,linf_1 c10_resnet8_m,linf_2 c10_resnet8_m,l1_2 '
         'zoo:ResNet_18-cifar10-adversarial,l1_12 zoo:AlexNet_BN-cifar10-adversarial,l1_12')


def threat_of(text):
    "linf_1 is one grey level; l2_.1 and l1_2 are lengths in pixels; ssim_.95 a similarity"
    kind, _, size = text.partition('_')
    size = float(size)
    return dict(linf=lambda: Linf(size/255), l2=lambda: L2(size), l1=lambda: L1(size),
                ssim=lambda: SSIM(size))[kind]()


def photographs(data, name, part, n):
    "As many of each class, in an order drawn once"
    if name == 'lite0': return imagenet(data, n)
    from read_images import read
    of = 'cifar100' if name.startswith('c100') or 'cifar100' in name else 'cifar10'
    per_class = -(-n//(100 if of == 'cifar100' else 10))
    x, y, _ = read(data/of/f'{of}-{part}.zip', per_class)
    order = torch.randperm(len(x), generator=make_generator(5, 'order'))
    return to_float(x)[order][:n], torch.from_numpy(y)[order][:n]


def network(name, data):
    if name == 'lite0': return opened(name)
    from networks import load
    name, _, file = name.partition('=')
    own = 'zoo:' if name.startswith('zoo:') else ''
    name, _, fmt = name.removeprefix('zoo:').partition(':')
    model = load_model(file or own + name) if file or own else load(name).eval()
    return quantize(model, fmt, photographs(data, name, 'train', 100)[0]) if fmt else model


def folded(model, x):
    "The same network in another layout: faster"
    net = fold_batchnorm(model, x[:8]).eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last)


def others(model, x, y, threat, logits):
    "Name -> (rows) -> images, of each attack that the union is made of"
    pace = 12 if isinstance(threat, L1) else 1
    wanted = logits.scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True).indices
    start = lambda rows, seed: (x[rows] if seed is None
                                else threat.sample(x[rows], make_generator(seed)))
    def climbed(loss, steps, seed=None, k=None):
        def run(rows):
            labels = y[rows] if k is None else torch.stack([y[rows], wanted[rows, k]], 1)
            return climb(gradients(model, loss), x[rows], labels, threat, start(rows, seed),
                         pace*steps)[0]
        return run
    tried = dict(margin=climbed(margin, 100), margin_random=climbed(margin, 100, 3),
                 cross_entropy=climbed(cross_entropy, 100, 1), dlr=climbed(dlr, 100, 2))
    for k in range(min(5, logits.shape[1]-1)):
        tried[f'class_{k+1}'] = climbed(margin_to, 50, k=k)
    if not isinstance(threat, SSIM):
        tried['square'] = lambda rows: square(model, x[rows], y[rows], threat, make_generator(0), 1000)
    return tried


def record(path, **facts):
    "The manifest of this run beside its rows, with the commands of earlier runs that rows may come from"
    path = path.with_suffix('.json')
    before = json.loads(path.read_text()) if path.exists() else {}
    facts = manifest(**facts)
    earlier = [*before.get('earlier', []), before.get('command')]
    facts['earlier'] = [o for o in dict.fromkeys(earlier) if o not in (None, facts['command'])]
    save_json(facts, path)


def compare(name, threat, args):
    "A row"
    model = network(name, args.data)
    x, y = photographs(args.data, name, 'test-a', args.n)
    began = time.process_time()
    seen = run_cascade(model, x, y, threat)
    seconds = time.process_time()-began
    left, logits = is_correct(model, x, y)
    left = left[seen.survives[left]]
    exact = model if ':' in name else folded(model, x)
    x = x.contiguous(memory_format=torch.channels_last)
    found_by = []
    for attack, run in others(exact, x, y, threat, logits).items():
        if not len(left): break
        stands = is_correct(model, run(left), y[left])[0]
        found_by += [attack]*(len(left)-len(stands))
        left = left[stands]
    robust = 100*int(seen.survives.sum())/len(x)
    union = 100*len(left)/len(x)
    forward, backward = seen.passes
    return dict(clean=100-100*seen.stages.fallen[0]/len(x), cascade=robust, union=union,
                too_high=robust-union, forward=forward, backward=backward, masked=seen.masked,
                seconds=seconds, found_by=' '.join(found_by))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--rows', default=asked, help='network,threat separated by spaces')
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    path = args.out/'attacks_union.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).to_dict('records') if path.exists() else []
    for name, threat in (o.split(',') for o in args.rows.split()):
        label = name.partition('=')[0]
        if any((row['network'], row['threat'], row['n']) == (label, threat, args.n) for row in rows):
            continue
        rows.append(dict(network=label, threat=threat, n=args.n)
                    | compare(name, threat_of(threat), args))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).round(3).to_csv(path, index=False)
        record(path, n=args.n, clock='process_time')


if __name__ == '__main__':
    main()
