"""How many adversarial images a training set gets in a second: the adversarial rows of the set lyx3911,
on two narrow networks of the contest, one thread, by this checkout and by another one.

    git worktree add ../before 9e7e038
    python benchmarks/curation/speed.py cifar10-images.zip --before ../before

The two take turns in processes of their own, and seconds are those of the processor, so that a busy
machine hits neither harder. `stop` is the option of `attacked` that leaves an image as soon as it is
fooled; it is this checkout's alone. Rows go to results/curation_speed.csv with a manifest.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path

import torch


def networks(folder):
    "The two networks to attack, from the files of `prepare`"
    from robustnb.curation.contest import contest_network
    nets = {}
    for seed in (0, 1):
        net = contest_network('preactresnet18', .25, seed)
        net.load_state_dict(torch.load(folder/f'{seed}.pt', weights_only=True))
        nets[f'preactresnet18 {seed}'] = net.eval()
    return nets


def prepare(args):
    "Photographs, and two networks trained on them; their accuracy there"
    from robustnb.contract import predict
    from robustnb.curation.contest import contest_network, contest_train, default_config
    from robustnb.data import load_data, subset
    pool = subset(load_data(args.data, 'train'), args.pool, seed=0)
    pool.save(args.work/'pool')
    config = default_config()['preactresnet18'] | dict(batch_size=32)
    config['optimizer_hyperparameters'] |= dict(lr=.05)
    for seed in (0, 1):
        path = args.work/f'{seed}.pt'
        if not path.exists():
            net, _ = contest_train(contest_network('preactresnet18', .25, seed), pool.images,
                                   pool.labels, config, seed=seed, epochs=args.epochs)
            torch.save(net.state_dict(), path)
    return [(predict(net, pool.x).argmax(1).numpy() == pool.y).mean().item()
            for net in networks(args.work).values()]


def measure(folder, n, stop):
    "Build the rows once; a line of JSON"
    from functools import partial
    from robustnb.attacks.gradient import fgsm, pgd
    from robustnb.attacks.threat_models import L2, Linf
    from robustnb.curation import selection
    from robustnb.curation.training_sets import attacked, build_training_set
    from robustnb.data import load_npy
    torch.set_num_threads(1)
    pool = load_npy(folder/'pool')
    options = dict(stop=True) if stop else {}
    kinds = [(partial(pgd, steps=40), Linf(12/255)), (partial(pgd, steps=50), L2(1.5)),
             (fgsm, Linf(12/255)), (fgsm, L2(2.5))]
    source = [attacked(attack, net, threat, name, **options) for attack, threat in kinds
              for name, net in networks(folder).items()]
    if hasattr(selection, 'among'):
        choice = dict(select=selection.among(4, selection.succeeded))
    else:
        choice = dict(select=selection.succeeded, candidates=4)     # of the checkout before
    began = time.process_time()
    wall = time.perf_counter()
    made = build_training_set(pool, dict(adversarial=source), dict(adversarial=1.), n,
                              **choice)
    seconds = time.process_time()-began
    print(json.dumps(dict(images=n, photographs=int(made.rows['image'].nunique()),
                          cpu_seconds=round(seconds, 2), seconds=round(time.perf_counter()-wall, 2),
                          images_per_cpu_second=round(n/seconds, 2))))


def processor():
    "The name of the processor"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    found = {k.strip(): v.strip() for k, _, v in (o.partition(':') for o in lines)}
    return ', '.join(f'{k} {found[k]}' for k in ('model name', 'cpu family', 'model') if k in found)


def run(code, args, stop=False):
    "One measurement by the package in the folder `code`"
    env = os.environ | dict(PYTHONPATH=str(code), OMP_NUM_THREADS='1')
    call = [sys.executable, __file__, args.data, '--work', str(args.work), '--n', str(args.n), '--child']
    done = subprocess.run(call + ['--stop']*stop, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder or zip of training images')
    parser.add_argument('--before', type=Path, help='another checkout of this repository')
    parser.add_argument('--n', type=int, default=320, help='images wanted')
    parser.add_argument('--pool', type=int, default=1000, help='photographs')
    parser.add_argument('--epochs', type=int, default=8, help='that the networks are trained')
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--work', type=Path, default=Path('speed_work'))
    parser.add_argument('--out', default='results')
    parser.add_argument('--child', action='store_true', help='measure in this process')
    parser.add_argument('--stop', action='store_true', help='leave an image as soon as it is fooled')
    args = parser.parse_args()
    if args.child: return measure(args.work, args.n, args.stop)
    import pandas as pd
    from robustnb.core import fast_bf16
    from robustnb.files import manifest, save_json
    torch.set_num_threads(1)
    accuracy = prepare(args)
    here = Path(__file__).resolve().parents[2]
    jobs = [('before', args.before, False)] if args.before else []
    jobs += [('after', here, False), ('after, stop', here, True)]
    rows = []
    for repetition in range(args.repeats):
        for name, code, stop in jobs:
            rows.append(dict(code=name, repetition=repetition) | run(code, args, stop))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    path = Path(args.out)/'curation_speed.csv'
    table.to_csv(path, index=False)
    save_json(manifest(processor=processor(), fast_bf16=fast_bf16('cpu'), n=args.n, pool=args.pool,
                       epochs=args.epochs, repeats=args.repeats,
                       accuracy_of_the_networks=accuracy), path.with_suffix('.json'))
    print(table.groupby('code').images_per_cpu_second.median())


if __name__ == '__main__':
    main()
