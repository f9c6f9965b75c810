"""How the cost of a full study grows with images, formats and width, and what one pass of each network costs.

    python benchmarks/transfer/scaling.py       # the measurement: an idle machine, ten minutes
    python benchmarks/transfer/scaling.py --width .125 --n 4 --images 4,8 --formats 1,2 \\
        --widths .0625,.125 --repeats 1         # a look, less than a minute

Random weights and random images: what an answer is worth does not change what it costs. Every
image is attacked for all steps (an evaluation stops at images that have fallen, so these are
upper bounds). Seconds are processor time of one thread, the least of --repeats; the generator
without its final match of energy, some seconds per network. Rows go to results/scaling.csv with
a manifest beside them; nbs/results/scaling.ipynb draws them and adds up a full study under stated
assumptions.
"""
import argparse, time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F

from robustnb.attacks.gradient import full_pgd
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.models.complexity import model_complexity
from robustnb.transfer.generator import train_generator
from robustnb.models.zoo import build_model, model_names
from robustnb.quant.ptq import calibrate, quantize
from robustnb.quant.formats import all_formats
from robustnb.attacks.threat_models import Linf
from robustnb.core import memory_layout


def seconds(f, repeats):
    "Processor time of the quickest of some runs, after one that does not count"
    found = []
    for _ in range(repeats + 1):
        start = time.process_time()
        f()
        found.append(time.process_time() - start)
    return min(found[1:])


def images(n, size=32): return torch.rand(n, 3, size, size, generator=make_generator(0, 'images'))
def attacked(model, x): return full_pgd(model, x, predict(model, x).argmax(1), Linf(1/255), steps=10)


def training_step(net, x, targets):
    "Forward, backward and step, as `train` takes them"
    layout = memory_layout(net)
    model = net.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, .9, nesterov=True)
    def step():
        loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def parts(name, width, n, repeats):
    "Seconds of each part of a study on one network; per image where it grows with images"
    net = build_model(name, 10, width, seed=0)
    x = images(n)
    ranges = calibrate(net, x)
    q = quantize(net, 'INT8', ranges)
    timed = partial(seconds, repeats=repeats)
    yield 'forward, original', timed(lambda: predict(net, x))/n
    yield 'forward, copy', timed(lambda: predict(q, x))/n
    yield 'attack, original', timed(lambda: attacked(net, x))/n
    yield 'attack, copy', timed(lambda: attacked(q, x))/n
    yield 'calibrate', timed(lambda: calibrate(net, x))/n
    yield 'quantise', timed(lambda: quantize(net, 'INT8', ranges))
    with patch('robustnb.transfer.generator.match_energy', lambda *args, **kw: None):
        (yield 'generator',
         timed(lambda: train_generator(net, steps=2, batch_size=n, device='cpu'))/2/n)
    (yield 'train',
     timed(training_step(build_model(name, 10, width, seed=0), x, torch.full((n, 10), .1)))/n)


def rows(args):
    macs = lambda name, width: int(model_complexity(build_model(name, 10, width)).macs.sum())
    base = dict(model=args.network, width=args.widths[-1], images=args.images[-1], formats=1)
    for width in args.widths:
        net, x = build_model(args.network, 10, width, seed=0), images(args.images[0])
        q = quantize(net, 'INT8', x)
        for part, model in (('original', net), ('copy', q)):
            yield base | dict(what='width', width=width, images=len(x), part=f'attack, {part}',
                              seconds=seconds(lambda: attacked(model, x), args.repeats),
                              macs=macs(args.network, width))
    for n in args.images:
        x = images(n)
        for part, model in (('original', net), ('copy', q)):
            yield base | dict(what='images', images=n, part=f'attack, {part}',
                              seconds=seconds(lambda: attacked(model, x), args.repeats),
                              macs=macs(args.network, width))
    x, names = images(args.images[0]), all_formats()[:43]
    ranges = calibrate(net, x)
    for k in args.formats:
        some = [names[i*len(names)//k] for i in range(k)]
        def all_of_them():
            for f in some:
                attacked(quantize(net, f, ranges), x)
        yield base | dict(what='formats', images=len(x), formats=k, part='quantise and attack',
                          seconds=seconds(all_of_them, args.repeats),
                          macs=macs(args.network, width))
    for name in args.networks:
        for part, s in parts(name, args.width, args.n, args.repeats):
            yield dict(what='network', model=name, width=args.width, images=args.n, formats=1,
                       part=part, seconds=s, macs=macs(name, args.width), macs_full=macs(name, 1.))
        print(name, flush=True)


if __name__ == '__main__':
    listed = lambda kind: lambda s: [kind(o) for o in s.split(',')]
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', type=listed(str), default=list(model_names))
    p.add_argument('--width', type=float, default=1., help='of the nine networks')
    p.add_argument('--n', type=int, default=16,
                   help='images that the nine networks are measured on')
    p.add_argument('--network', default='ResNet_18', help='that the growth is measured on')
    p.add_argument('--widths', type=listed(float), default=[.0625, .125, .25, .5])
    p.add_argument('--images', type=listed(int), default=[16, 32, 64, 128])
    p.add_argument('--formats', type=listed(int), default=[1, 2, 4, 8, 16])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', default='results')
    args = p.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    table = pd.DataFrame(rows(args))
    path = Path(args.out)/'scaling.csv'
    table.round(7).to_csv(path, index=False)
    print(table[table.what != 'network'].drop(columns=['macs_full']).to_string(index=False))
    save_json(manifest(
        networks=args.networks, width=args.width, n=args.n, growth=args.network,
        widths=args.widths, images=args.images, formats=args.formats, repeats=args.repeats,
        attack='PGD, 10 steps, Linf 1/255', weights='random, seed 0',
        seconds='processor time of one thread, least of the repeats',
        gpu='not measured: no GPU was there', cpu_seconds=round(time.process_time()-start)),
              path.with_suffix('.json'))
