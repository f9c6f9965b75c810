"""Networks and photographs of others, as the benchmarks of this folder take them."""
import argparse, io, json, sys, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from robustnb.core import make_generator, to_float


def parsed(about, name, more):
    "The arguments of a benchmark: those of `more(parser)` and where things are; one thread"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--work', type=Path, default=Path('work')/name)
    parser.add_argument('--out', type=Path, default=Path('results'))
    more(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data), str(args.data/'models')]
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def loaded(name):
    "A network of others, in eval mode"
    from networks import load
    return load(name).eval()


def cifar(data, name, part, n):
    "As many of each class, in an order drawn once"
    from read_images import read
    of = 'cifar100' if 'c100' in name or 'cifar100' in name else 'cifar10'
    x, y, _ = read(data/of/f'{of}-{part}.zip', -(-n//(100 if of == 'cifar100' else 10)))
    order = torch.randperm(len(x), generator=make_generator(5, 'order'))[:n]
    return to_float(x)[order], torch.from_numpy(y)[order]


def imagenet(data, rows):
    "The middle 224 pixels; labels"
    names = json.loads((data/'imagenet'/'classes.json').read_text())
    with zipfile.ZipFile(data/'imagenet'/'photographs.zip') as z:
        files = sorted(o for o in z.namelist() if o.endswith('.jpg'))[rows]
        pictures = [Image.open(io.BytesIO(z.read(o))).convert('RGB') for o in files]
    cut = [np.asarray(o.crop(((o.width-224)//2, (o.height-224)//2, (o.width+224)//2, (o.height+224)//2)))
           for o in pictures]
    return to_float(np.stack(cut)), torch.tensor([names.index(Path(o).stem) for o in files])


def kept(path, make):
    "What a file holds, made where there is none"
    if not path.exists():
        held = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(held, path)
    return torch.load(path)


def merged(rows, path):
    "The table of a file, with `rows` in place of those of the same networks, or after the others"
    rows = pd.DataFrame(rows).round(4)
    if not path.exists(): return rows
    old = pd.read_csv(path)
    if {*old} != {*rows}:
        raise ValueError(f"{path} has other columns: {', '.join({*old} ^ {*rows})}. Measure every network "
                         "again, into another folder.")
    both = {name: part for t in (old, rows) for name, part in t.groupby('network', sort=False)}
    return pd.concat(both.values(), ignore_index=True)[list(rows)]
