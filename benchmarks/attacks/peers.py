"""Robust accuracy and time, side by side with foolbox, torchattacks, ART and AutoAttack, in one
process on the same images.

    pip install foolbox torchattacks==3.5.1 adversarial-robustness-toolbox pyautoattack
    python benchmarks/attacks/peers.py pgd --data ../shared/data
    python benchmarks/attacks/peers.py autoattack --data ../shared/data
    python benchmarks/attacks/peers.py growth --data ../shared/data
    python benchmarks/attacks/peers.py memory --data ../shared/data

`--data` is a folder with `read_images.py` and `cifar10/`: lossless photographs. The two networks are those of
zoo/ (benchmarks/models/zoo.py), or files of yours. Rows go to results/attacks_<part>.csv, with a manifest
beside them. Medians of several repetitions, tools in turn within each, so that a busy minute of the machine
hits all of them. `seconds` are on the clock, `cpu_seconds` of the processor: trust these on a busy machine.
"""
import argparse, resource, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.attacks.adaptive_pgd import gradients
from robustnb.attacks.gradient import cross_entropy, pgd
from robustnb.attacks.standard import cascade, search_copy
from robustnb.attacks.threat_models import L2, Linf
from robustnb.core import make_generator, to_float
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.models.loading import load_model
from robustnb.models.zoo import build_model

warnings.filterwarnings('ignore')


def photographs(data, n):
    "Test photographs, evenly from the classes"
    from read_images import read
    x, y, _ = read(data/'cifar10'/'cifar10-test-a.zip')
    some = torch.arange(n)*len(y)//n
    return to_float(x[some.numpy()]), torch.from_numpy(y)[some]


def in_batches(attack, size=250):
    return lambda model, x, y, threat: torch.cat(
        [attack(model, a, b, threat) for a, b in zip(x.split(size), y.split(size))])


def foolbox_pgd(model, x, y, threat, steps=40, step_size=None):
    import foolbox
    kind = foolbox.attacks.LinfPGD if isinstance(threat, Linf) else foolbox.attacks.L2PGD
    step = dict(rel_stepsize=None, abs_stepsize=step_size) if step_size else {}
    torch.manual_seed(0)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    return kind(steps=steps, **step)(bounded, x, y, epsilons=threat.eps)[1]


def torchattacks_pgd(model, x, y, threat, steps=40, step_size=None):
    import torchattacks
    kind = torchattacks.PGD if isinstance(threat, Linf) else torchattacks.PGDL2
    torch.manual_seed(0)
    attack = kind(model, eps=threat.eps, alpha=step_size, steps=steps, random_start=True)
    return attack(x, y).detach()


def art_pgd(model, x, y, threat, steps=40, step_size=None):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier
    classifier = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), x.shape[1:], 10,
                                   clip_values=(0, 1), device_type='cpu')
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm=np.inf if isinstance(threat, Linf) else 2, eps=threat.eps,
        eps_step=step_size, max_iter=steps, num_random_init=1, batch_size=250, verbose=False)
    np.random.seed(0)
    torch.manual_seed(0)
    out = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    model.eval()
    return out


def standard_autoattack(model, x, y, threat):
    from pyautoattack import AutoAttack
    adversary = AutoAttack(model, norm='Linf' if isinstance(threat, Linf) else 'L2',
                           eps=threat.eps, version='standard', seed=0, device='cpu')
    adversary.verbose = False
    out = adversary.run_standard_evaluation(x, y, batch_size=250)
    return out[0] if isinstance(out, tuple) else out


def timed(tool, attack, model, x, y, threat):
    "One run: seconds on the clock and of the processors, robust accuracy, which images survive"
    began = time.perf_counter()
    worked = time.process_time()
    x_adv = attack(model, x, y, threat)
    seconds = time.perf_counter()-began
    cpu = time.process_time()-worked
    before = (predict(model, x).argmax(1) == y).numpy()
    survives = before & (predict(model, x_adv.float()).argmax(1) == y).numpy()
    assert threat.allows(x, x_adv.float()).float().mean() > .99, tool
    return dict(tool=tool, seconds=round(seconds, 3), cpu_seconds=round(cpu, 3), n=len(x),
                robust_accuracy=float(survives.mean())), survives


def compare(nets, x, y, cases, repeats, args, ours='robustnb cascade'):
    """All tools on all models and threats, in turn; `found_by_tool_only` and
    `found_by_cascade_only` count images that one of the two finds alone"""
    rows = []
    for name, model in nets.items():
        for threat, tools in cases:
            if args.threat not in (None, type(threat).__name__): continue
            for attack in tools.values():
                if attack is not standard_autoattack:
                    attack(model, x[:10], y[:10], threat)
            for rep in range(max(repeats.values())):
                for tool, attack in tools.items():
                    if rep >= repeats.get(tool, max(repeats.values())): continue
                    row, survives = timed(tool, attack, model, x, y, threat)
                    if tool == ours:
                        reference = survives
                    alone = dict(found_by_tool_only=int((reference & ~survives).sum()),
                                 found_by_cascade_only=int((survives & ~reference).sum()))
                    where = dict(model=name, threat=repr(threat), repetition=rep)
                    rows.append(where | row | alone)
                    print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def own_pgd(model, x, y, threat): return pgd(model, x, y, threat, make_generator(0))


def part_pgd(nets, x, y, args):
    def tools(step):
        return {'robustnb cascade': cascade,
                'robustnb fast cascade': partial(cascade, targets=0),
                'robustnb pgd': own_pgd,
                'foolbox PGD-40': in_batches(partial(foolbox_pgd, step_size=step)),
                'torchattacks PGD-40': in_batches(partial(torchattacks_pgd, step_size=step)),
                'ART PGD-40': partial(art_pgd, step_size=step)}
    return compare(nets, x, y, ((Linf(8/255), tools(1/255)), (L2(.5), tools(2.5*.5/40))),
                   {'': args.repeats}, args)


def part_autoattack(nets, x, y, args):
    tools = {'robustnb cascade': cascade, 'AutoAttack standard': standard_autoattack}
    return compare(nets, x, y, ((Linf(8/255), tools), (L2(.5), tools)),
                   {'robustnb cascade': args.repeats, 'AutoAttack standard': 1}, args)


def part_growth(nets, x, y, args):
    rows = []
    for rep in range(args.repeats):
        for n in (100, 300, 1000):
            row, _ = timed('robustnb cascade', cascade, nets['adversarial'],
                           *photographs(args.data, n), Linf(8/255))
            rows.append(dict(what='images', size=n, **row))
            print(rows[-1], flush=True)
        for width in (.125, .25, .5, 1.):
            model = build_model('ResNet_18', width=width)
            some = x[:125]
            labels = y[:125]
            def backward(*_):
                image = some.clone().requires_grad_()
                cross_entropy(model(image), labels).sum().backward()
                model.zero_grad(set_to_none=True)
            lowered = gradients(search_copy(model, some, labels), cross_entropy)
            for tool, step in (('robustnb search copy', lowered),
                               ('plain backward pass', backward)):
                step(some, labels)
                times = []
                for _ in range(5):
                    began = time.process_time()
                    step(some, labels)
                    times.append(time.process_time()-began)
                rows.append(dict(what='width', size=width, tool=tool,
                                 cpu_seconds=float(np.median(times)), n=125))
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def part_memory(nets, x, y, args):
    "Each tool in a process of its own: peak memory above that of the loaded network and images"
    if args.tool:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        short = dict(steps=3, step_size=1/255)
        def seeded_pgd(*case): return pgd(*case, make_generator(0), **short)
        tools = {'robustnb cascade': cascade,
                 'robustnb pgd': in_batches(seeded_pgd),
                 'foolbox PGD': in_batches(partial(foolbox_pgd, **short)),
                 'torchattacks PGD': in_batches(partial(torchattacks_pgd, **short)),
                 'ART PGD': in_batches(partial(art_pgd, **short))}
        tools[args.tool](nets['adversarial'], x, y, Linf(8/255))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)
        sys.exit()
    def run(tool):
        command = [sys.executable, *sys.argv, '--tool', tool]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    names = ('robustnb cascade', 'robustnb pgd', 'foolbox PGD', 'torchattacks PGD', 'ART PGD')
    return pd.DataFrame([dict(tool=o, megabytes=round(run(o)), n=len(x)) for o in names])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('pgd', 'autoattack', 'growth', 'memory'))
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--standard', default='zoo:ResNet_18-cifar10')
    parser.add_argument('--adversarial', default='zoo:ResNet_18-cifar10-adversarial')
    parser.add_argument('--only', choices=('standard', 'adversarial'),
                        help='one network; rows are added to those of the other')
    parser.add_argument('--threat', choices=('Linf', 'L2'), help='one threat model; as with --only')
    parser.add_argument('--n', type=int, default=500)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--tool', help=argparse.SUPPRESS)
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(args.data))
    x, y = photographs(args.data, args.n)
    nets = {k: load_model(getattr(args, k)) for k in ('adversarial', 'standard') if args.only in (None, k)}
    began = time.time()
    rows = globals()[f'part_{args.part}'](nets, x, y, args)
    path = Path(args.out)/f'attacks_{args.part}.csv'
    if (args.only or args.threat) and path.exists():
        old = pd.read_csv(path)
        case = lambda table: pd.MultiIndex.from_frame(table[['model', 'threat']])
        rows = pd.concat([old[~case(old).isin(case(rows))], rows])
    rows.to_csv(path, index=False)
    clean = {k: (predict(m, x).argmax(1) == y).float().mean().item() for k, m in nets.items()}
    facts = manifest(rows=len(rows), seconds=round(time.time()-began), clean=clean)
    save_json(facts, path.with_suffix('.json'))
    print(rows.to_string())


if __name__ == '__main__':
    main()
