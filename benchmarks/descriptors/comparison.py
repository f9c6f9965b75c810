"""Attacks on a black box that answers with descriptors, side by side on the same images, with the
same number of queries.

    robustnb train-descriptor PHOTOS:train[0:12000] --width .25 --epochs 8 --out cifar/teacher
    robustnb distill cifar/teacher/descriptor.pt PHOTOS:train[12000:24000] --models ResNet_18,... \\
        --width .25 --epochs 12 --copies 2 --noise 0 --out cifar/students
    python benchmarks/descriptors/comparison.py compare PHOTOS:test --name cifar10 \\
        --teacher cifar/teacher/descriptor.pt --students cifar/students/ResNet_18.pt,...
    python benchmarks/descriptors/comparison.py ablation ...
    python benchmarks/descriptors/comparison.py pixels ...

Images are named as for the commands. Each pair has five images to change and five to imitate, of
two identities or classes. `compare` has one row per attack, budget and image; `ablation` switches
each part of this project's attack off, `pixels` counts the calls of scipy's differential
evolution beside ours. Rows go to results/descriptors_<part>_<name>.csv with a manifest beside
them; finished groups are kept in --work.
"""
import argparse, time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustnb.core import make_generator, to_float
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.commands.descriptors import _named
from robustnb.descriptors.query_attacks import nes_descriptor, pixel_evolution, square_descriptor
from robustnb.descriptors.attack import (
    allows_saved, attack_descriptor, baseline, fgsm_masked, fgvm, fit_8bit, Plan, student_gradient)
from robustnb.attacks.transferable import mean_normalized
from robustnb.descriptors.blackbox import descriptor_distance, BlackBox
from robustnb.descriptors.students import load_descriptor, WeightedEnsemble
from robustnb.attacks.ssim_rule import SSIM
from robustnb.descriptors.pairs import make_pairs
from robustnb.descriptors.comparison import ablation, attack_table, attacked_images, compare_attacks

rule = SSIM(.95 + 2e-6)     # a hair inside, so that the organiser's own arithmetic agrees


def begin(args):
    "Teacher, students, images and the descriptors that each is to come close to"
    teacher = load_descriptor(args.teacher)
    students = [load_descriptor(o) for o in args.students.split(',')]
    images = _named(args.data, students[0].made['size'])
    pairs = make_pairs(images, seed=args.seed, limit=args.n_pairs)
    answers = lambda names: predict(teacher, to_float(
        images.images[images.at(names).ravel()])).view(len(pairs), -1, teacher.dim)
    x = images.x[images.at(pairs.sources).ravel()]
    targets = answers(pairs.targets)
    return teacher, students, x, targets.repeat_interleave(len(x)//len(pairs), 0)


def noise(oracle, x, targets, threat, generator=None):
    "Random noise, as much as the rule allows"
    return fit_8bit(x, x + torch.randn(x.shape, generator=generator), threat)


def second_place(oracle, x, targets, threat, generator=None, students=(), queries=500):
    "Its gradient stage, then one-pixel stages for the queries that are left"
    now = fgvm(oracle, x, targets, threat, students=students, queries=queries)
    for _ in range(21):         # its four stages changed no more
        if oracle.left >= 750*len(x):
            now = pixel_evolution(oracle, x, targets, threat, generator, now, pixels=1)
    return now


def white_box(oracle, x, targets, threat, generator=None, box=None, steps=300):
    "The box's own gradient, followed with momentum in ever shorter steps"
    now, total = x, torch.zeros_like(x)
    for k in range(steps):
        grad = student_gradient([box], now, lambda d: descriptor_distance(d, targets))
        total = .9*total + mean_normalized(grad)
        now = threat.project(x, now - .2*.05**(k/steps)*threat.eps*threat.steepest(total, x, now))
    return fit_8bit(x, now, threat)


def deliver(args, rows, **facts):
    path = Path(args.out)/f'descriptors_{args.part}_{args.name}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)
    said = {k: getattr(args, k) for k in ('name', 'n_pairs', 'seed', 'budgets')} | dict(
        data=Path(args.data).name, students=[Path(o).stem for o in args.students.split(',')])
    save_json(manifest(**said) | facts, path.with_suffix('.json'))


def compare(args, attacks, queries, teacher, x, targets):
    rows = compare_attacks(attacks, lambda: BlackBox(teacher, queries*len(x)), x, targets,
                           rule, args.seed, args.work/args.name/str(queries), len(x))
    return rows.assign(budget=queries, group=rows.image//5)     # intervals over pairs


def ours(args, q, students, *data):
    "This project's attack; squares, which need no training, for more queries than it is worth"
    if q <= args.learned:
        return compare(args,
                       {'robustnb': partial(attack_descriptor, students=students, plan=Plan(q))},
                       q, *data)
    first = ours(args, args.learned, students, *data)
    start = to_float(
        torch.from_numpy(attacked_images(args.work/args.name/str(args.learned), 'robustnb')))
    more = compare(
        args, {'robustnb': partial(square_descriptor, start=start, queries=q-args.learned, p=.05)},
        q, *data)
    return more.assign(queries=more.queries + first.queries, seconds=more.seconds + first.seconds)


def part_compare(args):
    teacher, students, x, targets = begin(args)
    free = {'noise': noise,
            'baseline, fault': partial(baseline, students=students[:1], range_fault=True),
            'baseline': partial(baseline, students=students[:1])}
    parts = [compare(args, free, 2, teacher, x, targets)]
    for q in args.budgets:
        attacks = {'second place': partial(second_place, students=students, queries=min(q, 500)),
                   'masked signs': partial(fgsm_masked, students=students, queries=min(q, 500)),
                   'square': partial(square_descriptor, queries=q),
                   'nes': partial(nes_descriptor, queries=q)}
        parts += [compare(args, attacks, q, teacher, x, targets),
                  ours(args, q, students, teacher, x, targets)]
        print(q, attack_table(pd.concat(parts[-2:]), 'second place').round(4).to_string(),
              flush=True)
    parts.append(compare(args, {'white box': partial(white_box, box=teacher)}, 300, teacher, x,
                         targets))
    deliver(args, pd.concat(parts))


def part_ablation(args):
    teacher, students, x, targets = begin(args)
    q = args.budgets[0]
    plan = lambda **o: dict(plan=Plan(q, **o))
    off = {'learning': plan(refresh=0), 'differences': plan(differences=0.),
           'momentum': plan(decay=0.), 'the shape of the rule': plan(shaped=False),
           'pulling back': plan(pulled_back=False)}
    if students[1:]:
        off['several students'] = dict(students=students[:1])
    attack = partial(attack_descriptor, students=students)
    more = {'with residual': partial(attack, plan=Plan(q, residual=True)),
            'with Nesterov': partial(attack, plan=Plan(q, nesterov=True)), 'with mirrors': partial(
                attack, students=[WeightedEnsemble([s], mirror=True) for s in students],
                plan=Plan(q))}
    rows = compare(args, ablation(partial(attack, plan=Plan(q)), off) | more, q, teacher, x,
                   targets)
    print(attack_table(rows).round(4).to_string())
    deliver(args, rows)


def part_pixels(args):
    "One pixel by scipy's evolution, an image at a time, and by ours, all at once"
    from scipy.optimize import differential_evolution
    teacher, students, x, targets = begin(args)
    rows = []
    h, w = x.shape[2:]
    for i in range(len(x)):
        oracle, began = BlackBox(teacher, 10**6), time.perf_counter()
        def far(v):
            image = x[i:i+1].clone()
            image[0, :, min(int(v[0]), h-1), min(int(v[1]), w-1)] = (
                torch.tensor(np.clip(v[2:], 0, 255)).round().float()/255)
            calls[0] += 1
            return descriptor_distance(oracle(image), targets[i:i+1]).item() if allows_saved(
                x[i:i+1], image, rule) else 1e6
        calls, start = [0], descriptor_distance(oracle(x[i:i+1]), targets[i:i+1]).item()
        found = differential_evolution(far, [(0, h), (0, w)] + [(0, 256)]*3, popsize=30,
                                       maxiter=4, recombination=1, atol=-1, polish=False, seed=42)
        rows.append(dict(tool='scipy', image=i, before=start, after=min(start, found.fun),
                         calls=calls[0], images=oracle.used, seconds=time.perf_counter()-began))
    class Counted:
        used = calls = 0
        def __call__(self, x):
            self.calls += 1
            self.used += len(x)
            return predict(teacher, x)
    oracle, began = Counted(), time.perf_counter()
    after = descriptor_distance(predict(
        teacher, pixel_evolution(oracle, x, targets, rule, make_generator(args.seed), pixels=1)),
                                targets)
    rows += [dict(tool='robustnb', image=i, before=rows[i]['before'], after=after[i].item(),
                  calls=oracle.calls/len(x), images=oracle.used/len(x),
                  seconds=(time.perf_counter()-began)/len(x)) for i in range(len(x))]
    rows = pd.DataFrame(rows)
    print(rows.groupby('tool').mean().round(4).to_string())
    deliver(args, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('compare', 'ablation', 'pixels'))
    parser.add_argument('data',
                        help='images of the pairs, e.g. faces.zip[30:40] or photos.zip:test')
    parser.add_argument('--name', required=True, help='of the table, e.g. cifar10')
    parser.add_argument('--teacher', required=True, help='the black box')
    parser.add_argument('--students', required=True,
                        help='files of robustnb distill, separated by commas')
    parser.add_argument('--n_pairs', type=int, default=6)
    parser.add_argument('--budgets', type=lambda s: [int(o) for o in s.split(',')],
                        default=[50, 100, 500, 5000])
    parser.add_argument('--learned', type=int, default=500,
                        help="queries of this project's attack; more go to squares")
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--work', type=Path, default=Path('descriptors_work'))
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    globals()[f'part_{args.part}'](args)


if __name__ == '__main__':
    main()
