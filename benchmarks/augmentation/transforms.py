"""The augmentation of lyx3911/tianchi-AI-Challenger-sea8 on 50,000 images: this package's batches
beside imgaug, one image at a time and otherwise.

    python benchmarks/augmentation/transforms.py cifar10-images.zip

Rows go to results/transforms.csv with a manifest beside them. The tools take turns within each
repetition, so that a busy minute of the machine hits all of them. imgaug with two processes gets
batches of 1,000 images through its own pool of workers.
"""
import argparse, time
from pathlib import Path

import imgaug.augmenters as iaa
import numpy as np
import pandas as pd
import torch
from imgaug.augmentables.batches import UnnormalizedBatch

from robustnb.core import batches, make_generator, to_float, to_uint8
from robustnb.files import manifest, save_json
from robustnb.data import load_data
from robustnb.augmentation.transforms import fast_pipeline, gaussian_noise


def imgaug_classic():
    blur = iaa.OneOf([iaa.GaussianBlur((0, 3.)), iaa.AverageBlur((2, 7)), iaa.MedianBlur((3, 11))])
    lost = iaa.OneOf([iaa.Dropout((.01, .1), per_channel=.5),
                      iaa.CoarseDropout((.03, .15), size_percent=(.02, .05), per_channel=.2)])
    kinds = [blur, imgaug_noise(), lost, iaa.AddElementwise((-10, -10)),
             iaa.Multiply((.5, 1.5), per_channel=.5), iaa.SaltAndPepper(.1)]
    return iaa.SomeOf((2, 3), kinds, random_order=True)


def imgaug_noise(): return iaa.AdditiveGaussianNoise(loc=0, scale=(0, .05*255), per_channel=.5)


def ours(transform):
    def run(images):
        out = np.empty_like(images)
        for k, s in enumerate(batches(len(images), 1000)):
            x = to_float(images[s])
            x, _ = transform(x, torch.ones(len(x), 2)/2, make_generator(0, k))
            out[s] = to_uint8(x)
        return out
    return run


def one_by_one(augmenter):
    return lambda images: np.stack([augmenter.augment_image(o) for o in images])


def at_once(augmenter):
    return lambda images: np.concatenate([np.stack(augmenter.augment_images(list(images[s])))
                                          for s in batches(len(images), 1000)])


def pooled(augmenter):
    def run(images):
        with augmenter.pool(processes=2, seed=0) as pool:
            done = pool.map_batches(
                [UnnormalizedBatch(images=images[s]) for s in batches(len(images), 1000)])
        return np.concatenate([b.images_aug for b in done])
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder or zip of training images')
    parser.add_argument('--n', type=int, default=50_000)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = load_data(args.data, 'train').images[:args.n]
    rows = []
    for name, fast, slow in (('two or three of seven', fast_pipeline(), imgaug_classic()),
                             ('noise alone', gaussian_noise, imgaug_noise())):
        tools = {'robustnb': ours(fast), 'imgaug, one by one': one_by_one(slow),
                 'imgaug, lists of 1,000': at_once(slow), 'imgaug, two processes': pooled(slow)}
        for run in tools.values():
            run(images[:1000])
        for rep in range(args.repeats):
            for tool, run in tools.items():
                began = time.perf_counter()
                out = run(images)
                rows.append(dict(pipeline=name, repetition=rep, tool=tool, n=len(images),
                                 seconds=round(time.perf_counter()-began, 3),
                                 change=float(np.abs(out.astype(np.int16)-images).mean())))
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    path = Path(args.out)/'transforms.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    save_json(manifest(repeats=args.repeats), path.with_suffix('.json'))
    median = table.pivot_table(index='tool', columns='pipeline', values='seconds', aggfunc='median')
    print(median.assign(**{f'ratio, {c}': median[c]/median.loc['robustnb', c] for c in median})
          .round(2).to_string())


if __name__ == '__main__':
    main()
