"""kill -9 at random moments: does a rerun end like a run that nobody disturbed?

    python benchmarks/reliability/kills.py --kills 20

Each job runs once undisturbed. Then it is started again and again in one other folder, and
killed after a random share of the time it takes, until it has been killed --kills times; a run
that ends before its kill is compared, and the next begins in a new folder. At last it may
finish. Every finished folder must hold the same results, times aside. Jobs are forked from a
process that has imported everything, so a kill costs no start. Rows go to results/kills.csv:
job, kills, finished, same, seconds (of the undisturbed run).
"""
import argparse, hashlib, json, os, signal, sys, tempfile, time, traceback
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.augmentation.transforms import imgaug_augmenters
from robustnb.commands import transfer
from robustnb.commands.train import train_command
from robustnb.attacks.gradient import pgd
from robustnb.files import load_state, manifest, save_json
from robustnb.curation.training_sets import build_training_set
from robustnb.data import digits, subset
from robustnb.descriptors.attack import attack_descriptor, Plan
from robustnb.evaluation.robust_accuracy import evaluate
from robustnb.curation.hidden import hidden_set, proxy_networks, score_training_sets
from robustnb.models.zoo import build_model
from robustnb.models.loading import save_model
from robustnb.descriptors.blackbox import BlackBox
from robustnb.curation.published import published_mixture
from robustnb.descriptors.students import descriptor_model
from robustnb.attacks.threat_models import Linf
from robustnb.attacks.ssim_rule import SSIM

imgaug_augmenters()                     # the library imports it on first use, and these
for package in ('onnx', 'onnxruntime'):
    if find_spec(package):
        import_module(package)
net = build_model('AlexNet_BN', 10, .0625, seed=0)
data = subset(digits('train'), 60, seed=0)


def train(out):
    train_command(data='digits', model='AlexNet_BN', width=.0625, epochs=4, lr=.05,
                              no_flip=True, out=str(out))


def with_weights(command, out, **given):
    command(str(out.parent/'weights.pt'), out=str(out/'out'), **given)


def generate(out): with_weights(transfer.generate_command, out, n=20, steps=12, width=8)


def quantize(out):
    with_weights(transfer.quantize_command, out, formats='INT8,POT4', images='digits', n=20)


def assess(out):
    transfer.train_generator = partial(short_generator, steps=5, width=16, batch_size=16,
                                       device='cpu')
    with_weights(transfer.assess_command, out, formats='INT8,POT4')


def evaluated(out):
    evaluate(net, data.x, torch.as_tensor(data.y), dict(pgd=partial(pgd, steps=5)),
             Linf(8/255), batch_size=5, save=out/'rows').to_csv(out/'all.csv', index=False)


def curate(out):
    pool = subset(digits('train'), 40, seed=1)
    made = build_training_set(pool, **published_mixture('augmented', dict(net=net), teacher=net),
                              n=40, seed=0)
    made.save(out/'set')
    networks, config = proxy_networks(2, .0625, 1)
    hidden = hidden_set(subset(digits('test'), 20, seed=0), dict(net=net), 20)
    score_training_sets(dict(a=made), hidden, networks, config, seeds=(0, 1),
                        folder=out/'runs').to_csv(out/'answers.csv', index=False)


def attack(out):
    out.mkdir(parents=True, exist_ok=True)
    box = descriptor_model('Caffe34', width=.0625, size=32, seed=0)
    student = descriptor_model('Caffe34', width=.0625, size=32, seed=1)
    x = data.x[:4].mul(255).round().div(255)
    oracle = BlackBox(box, limit=1000, cache=out/'asked.db')
    targets = oracle(data.x[4:8])[:, None]
    x_adv = attack_descriptor(oracle, x, targets, SSIM(.95), students=[student],
                              plan=Plan(queries=8))
    np.save(out/'attacked.npy', x_adv.numpy())


# what a run costs depends on what it remembers
TIMES = ('seconds', 'engine_ms', 'float_ms', 'forward', 'backward')
short_generator = transfer.train_generator
jobs = dict(training=train, generation=generate, quantisation=quantize, assessment=assess,
            evaluation=evaluated, curation=curate, attack=attack)


def contents(folder):
    """Name -> what the results say, of all files that a reader would open; the rows of a sweep are
    in its table"""
    found = {}
    for f in sorted(folder.rglob('*')):
        name = f.relative_to(folder).as_posix()
        if (not f.is_file() or f.name.startswith('.') or f.suffix in ('.html', '.png')
            or f.name == 'manifest.json'):
            continue
        if f.suffix == '.csv':
            found[name] = pd.read_csv(f, comment='#').drop(columns=list(TIMES), errors='ignore').to_csv()
        elif f.suffix == '.pt' and f.name != 'checkpoint.pt':
            found[name] = repr(flat(load_state(f)))
        elif f.parent.name == 'engine':
            found[name] = repr(flat(json.loads(f.read_text())))
        elif f.suffix in ('.npy', '.json',
                          '.py') and not (f.suffix == '.json' and f.parent.name == 'rows'):
            found[name] = hashlib.sha256(f.read_bytes()).hexdigest()
    return found


def flat(held):
    "A structure with digests in place of tensors, and without times"
    if isinstance(held, dict): return {k: flat(v) for k, v in held.items() if k not in TIMES}
    if isinstance(held, (list, tuple)): return [flat(v) for v in held]
    return hashlib.sha256(held.contiguous().numpy().tobytes()).hexdigest() if isinstance(
        held, torch.Tensor) else held


def forked(job, out, log):
    "The number of a process that does the job; what it says goes to a file"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        with open(log, 'a') as f:
            os.dup2(f.fileno(), 2)
        with open(os.devnull, 'w') as f:
            os.dup2(f.fileno(), 1)
        job(out)
        code = 0
    except SystemExit as e:
        print(e, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid, seconds):
    "Exit status of a process; None if it ran longer and was killed"
    limit = time.monotonic() + seconds
    while not (over := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < limit:
        time.sleep(.002)
    if over[0]: return over[1]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def disturbed(job, folder, seconds, kills, rng):
    "Folders that were finished in the end, and the number of kills"
    finished, done = [], 0
    while done < kills or not finished:
        out = folder/f'disturbed{len(finished)}'
        while (status := ended(forked(job, out, folder/'log'),
                               rng.uniform(0, seconds) if done < kills else float('inf'))) is None:
            done += 1
        if status:
            raise AssertionError(
                f'the job failed after {done} kills: {(folder/"log").read_text()[-500:]}')
        finished.append(out)
    return finished, done


def trial(name, kills, seed=0):
    "A row of the table"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rng = np.random.default_rng(seed)
        save_model(net, folder/'weights.pt')
        start = time.monotonic()
        pid = forked(jobs[name], folder/'whole', folder/'log')
        if os.waitpid(pid, 0)[1]:
            raise AssertionError(f'{name} fails undisturbed: {(folder/"log").read_text()[-500:]}')
        seconds = time.monotonic()-start
        finished, done = disturbed(jobs[name], folder, seconds, kills, rng)
        whole = contents(folder/'whole')
        differ = [f'{o.name}/{k}' for o in finished for k in whole.keys() | contents(o).keys()
                  if whole.get(k) != contents(o).get(k)]
        return dict(job=name, kills=done, finished=len(finished), files=len(whole),
                    same=not differ, differ=' '.join(differ[:5]), seconds=round(seconds, 2))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--jobs', default=','.join(jobs))
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('results/kills.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = pd.DataFrame([trial(name, args.kills, args.seed) for name in args.jobs.split(',')])
    rows.to_csv(args.out, index=False)
    save_json(manifest(kills=int(rows.kills.sum()), seed=args.seed), args.out.with_suffix('.json'))
    print(rows.to_string(index=False))
    if not rows.same.all():
        sys.exit(1)
