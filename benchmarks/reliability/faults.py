"""A folder that cannot be written, a disk that is full, and two runs in one folder: what does every
command do?

    python benchmarks/reliability/faults.py

Needs Linux and user namespaces: the program starts itself again in one of its own, where it may
mount small disks. Every command runs once undisturbed; then into a read-only disk; into a disk
with room for a share of what it writes, and once more after there is room; and twice at the same
time into one folder. A command must end well, or in one line that says what was wrong. What is
finished in the end must be what the undisturbed run made. Rows go to results/faults.csv:
command, fault, status, said, rest (files left half written), same.
"""
import argparse, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from kills import contents, forked, net, short_generator
from robustnb.commands import (
    curation, demo, descriptors, evaluation, fit_predictor, sweep, train, transfer)
from robustnb.files import manifest, save_json
from robustnb.data import digits, subset
from robustnb.models.loading import save_model


def inputs(folder):
    "Everything the commands read"
    save_model(net, folder/'weights.pt')
    for split, n in (('train', 40), ('test', 20)):
        part = subset(digits(split), n, seed=0)
        for i, (image, y) in enumerate(zip(part.images, part.y)):
            (folder/'digits'/split/str(y)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder/'digits'/split/str(y)/f'{i}.png')
    measured = dict(format=['INT8', 'INT4'], n_classes=10, js=[.1, .2], flips=[.1, .2],
                    noise=[.1, .2], activation_noise=[.1, .2], robust_flips=[.1, .2],
                    measured_loss=[.1, .2], measured_robust_loss=[.1, .2], eps=1/255)
    for k in 'ab':
        (folder/'measured'/k).mkdir(parents=True)
        pd.DataFrame(measured).to_csv(folder/'measured'/k/'report_table.csv', index=False)
    photos = 'digits:train[0:20]'
    box = str(folder/'teacher'/'descriptor.pt')
    descriptors.train_descriptor_command(photos, 'Caffe34', str(folder/'teacher'), .0625, 1)
    descriptors.distill_command(box, photos, 'Caffe34', str(folder/'students'), .0625, 1, 1)
    curation.build_set_command('clean', str(folder/'weights.pt'), data='digits', n=40,
                               out=str(folder/'set'))


def commands(at):
    "Name -> what is called with the folder to write into; `at` holds the inputs"
    weights = str(at/'weights.pt')
    box = str(at/'teacher'/'descriptor.pt')
    photos = str(at/'digits')
    return dict(
        train=partial(train.train_command, 'AlexNet_BN', data=photos, width=.0625, epochs=2, lr=.05),
        assess=partial(transfer.assess_command, weights, formats='INT8'),
        build_set=partial(curation.build_set_command, 'augmented', weights, 'digits', n=40),
        score_set=partial(curation.score_set_command, str(at/'set'), weights, 20, .0625, 1, 1,
                          test='digits'),
        demo=partial(demo.demo_command, epochs=1, steps=2, n=20),
        cost=partial(transfer.cost_command, 'AlexNet,ResNet_18'),
        generate=partial(transfer.generate_command, weights, 20, steps=3, width=8),
        quantize=partial(transfer.quantize_command, weights, 'INT8,POT4', images=photos, n=20),
        export=partial(transfer.export_command, weights, images=photos, n=20),
        evaluate=partial(evaluation.evaluate_command, weights, 'fgsm', n=20, test=photos),
        fit_predictor=partial(fit_predictor.fit_predictor_command,
                              f"{at/'measured'/'a'},{at/'measured'/'b'}"),
        train_descriptor=partial(descriptors.train_descriptor_command, 'digits:train[0:20]',
                                 'Caffe34', width=.0625, epochs=2),
        distill=partial(descriptors.distill_command, box, 'digits:train[0:20]', 'Caffe34',
                        width=.0625, epochs=1, copies=1),
        attack_descriptors=partial(descriptors.attack_descriptors_command, box,
                                   str(at/'students'/'Caffe34.pt'), 'digits:test[0:250]',
                                   n_pairs=1, queries=6),
        sweep=partial(sweep.sweep_command, weights, 'INT8', test=photos, measure='n=10',
                      where='1'))


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def mount(*words): subprocess.run(['mount', *words], check=True)
def size(folder): return sum(-(-f.stat().st_size//4096)*4 for f in folder.rglob('*') if f.is_file())


def trials(name, command, folder, shares):
    "The rows of one command"
    whole = folder/'whole'/name
    run = lambda out, log: forked(lambda out: command(out=str(out)), out,
                                  folder/'logs'/f'{name} {log}')
    (folder/'logs').mkdir(exist_ok=True)
    if ended(run(whole, 'whole')):
        raise AssertionError(
            f"{name} fails undisturbed: {(folder/'logs'/f'{name} whole').read_text()}")
    wanted = contents(whole)
    def row(fault, status, log, out):
        lines = (folder/'logs'/f'{name} {log}').read_text().strip().splitlines() if status else []
        return dict(command=name, fault=fault, status=status,
                    said=lines[-1].replace(str(out), 'DISK') if lines else '',
                    lines=len(lines), rest=' '.join(f.name for f in out.rglob('*.tmp')))
    for fault, room in [('read-only', None)] + [
            (f'full at {s:.0%}', max(8, int(size(whole)*s))) for s in shares]:
        disk = folder/'disk'/f'{name} {fault}'
        disk.mkdir(parents=True)
        mount('-t', 'tmpfs', '-o', 'ro' if room is None else f'size={room}k', 'none', str(disk))
        start = time.monotonic()
        found = row(fault, ended(run(disk/'out', fault)), fault,
                    disk) | dict(seconds=round(time.monotonic()-start, 2))
        mount('-o', 'remount,rw,size=1g', str(disk))
        again = ended(run(disk/'out', 'again'))
        now = contents(disk/'out')
        yield found | dict(again=again, same=again == 0 and now == wanted, differ=' '.join(
            k for k in wanted.keys() | now.keys() if wanted.get(k) != now.get(k)))
        subprocess.run(['umount', str(disk)], check=True)
    out = folder/'both'/name
    both = {k: run(out, k) for k in ('first', 'second')}
    statuses = {k: ended(pid) for k, pid in both.items()}
    for k, status in statuses.items():
        yield row('two at once', status, k,
                  out) | dict(again=min(statuses.values()), same=contents(out) == wanted)


def main(args):
    torch.set_num_threads(1)
    for module in (transfer, demo):
        module.train_generator = partial(short_generator, width=8, batch_size=16, device='cpu')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inputs(folder)
        every = commands(folder)
        rows = pd.DataFrame([r for name in (args.commands.split(',') if args.commands else every)
                             for r in trials(name, every[name], folder, args.shares)])
    rows.to_csv(args.out, index=False)
    save_json(manifest(), args.out.with_suffix('.json'))
    print(rows.to_string(index=False))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--commands', default='', help='all unless named, separated by commas')
    p.add_argument('--shares', type=float, nargs='*', default=[.1, .5, .9],
                   help='room on the full disks, shares of what the command writes')
    p.add_argument('--out', type=Path, default=Path('results/faults.csv'))
    p.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        main(args)
    else:
        sys.exit(subprocess.run(['unshare', '-rm', sys.executable, *sys.argv,
                                 '--inside']).returncode)
