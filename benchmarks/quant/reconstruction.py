"""What each option around rounding buys: ranges, equalised channels, corrected biases, learnt
rounding, mixed precision.

    robustnb train --data PHOTOS --model ResNet_18 --width .25 --out runs/ResNet_18 ...
    python benchmarks/quant/reconstruction.py PHOTOS \\
        --models runs/ResNet_18/weights.pt,runs/MobileNetV2/weights.pt,...

One row per network, source of the calibration images, format and option: accuracy on test
photographs, and how far the answers are from those of the original there. Calibration, corrected
biases and learnt rounding use the same images: photographs of the training set without their
labels, or images from a generator trained on nothing but the network. Mixed precision changes
the weight formats only, with INT8 activations, and has the size of the uniform model above it.
Rows go to results/refine_<name>.csv with a manifest beside them; finished groups are kept in
--work.
"""
import argparse, time
from pathlib import Path

import pandas as pd
import torch

from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.quant.ptq import model_bytes
from robustnb.data import load_data, subset
from robustnb.transfer.generator import generate, train_generator
from robustnb.metrics import wilson
from robustnb.quant.mixed_precision import allocate_bits, quantize_mixed, weight_noise
from robustnb.models.loading import load_model
from robustnb.models.graph import fold_batchnorm
from robustnb.quant.ptq import quantize
from robustnb.quant.formats import quant_spec
from robustnb.quant.equalization import cross_layer_equalization
from robustnb.quant.reconstruction import correct_bias, adaround
from robustnb.quant.sensitivity import output_change


def options(net, images, fmt):
    "Name and model of each option, one after the other"
    tensor = quant_spec(fmt, per_channel=False)
    channel = quant_spec(fmt, per_channel=True)
    level = quantize(net, channel, images)
    equal = cross_layer_equalization(net)
    minmax = quant_spec(fmt, per_channel=False, rule='minmax')
    yield 'min-max per tensor', lambda: quantize(net, minmax, images)
    yield 'mse per tensor', lambda: quantize(net, tensor, images)
    yield 'mse per tensor, equalised', lambda: quantize(equal, tensor, images)
    yield 'mse per channel', lambda: quantize(net, channel, images)
    yield 'mse per channel, equalised', lambda: quantize(equal, channel, images)
    yield 'mse per channel, biases corrected', lambda: correct_bias(net, level, images)
    rounded = []
    def learnt():
        rounded.append(adaround(net, level, images))
        return rounded[0]
    yield 'mse per channel, learnt rounding', learnt
    both = lambda: correct_bias(net, rounded[0], images)
    yield 'mse per channel, learnt rounding, biases corrected', both


def mixed_options(net, images, fmt, noise):
    "A uniform weight format with INT8 activations, and mixed precision of the same size"
    table = allocate_bits(
        net, images, budget_kb=model_bytes(fold_batchnorm(net), quant_spec(fmt).weights.bits)/1000,
        noise=noise)
    mixed = quantize_mixed(net, table, 'INT8', images)
    yield 'mse per channel', lambda: quantize(net, fmt, images)
    yield 'mixed precision', lambda: quantize_mixed(net, table, 'INT8', images)
    learnt = lambda: adaround(net, quantize(net, fmt, images), images)
    yield 'mse per channel, learnt rounding', learnt
    yield 'mixed precision, learnt rounding', lambda: adaround(net, mixed, images)


def measure(args, net, test, logits, found):
    "A row for each option"
    for option, make in found:
        start = time.process_time()
        model = make()
        seconds = time.process_time() - start
        out = predict(model, test.x)
        change = output_change(logits, out)
        right = int((out.argmax(1).numpy() == test.y).sum())
        lo, hi = wilson(right, len(test))
        yield dict(option=option, accuracy=right/len(test), lo=lo, hi=hi, n=len(test),
                   js=change.js.mean(), flips=change.flip.mean(), seconds=round(seconds, 2))


def run(args):
    started = time.process_time()
    test = subset(load_data(args.data, 'test'), args.n_test, seed=0)
    train = subset(load_data(args.data, 'train'), args.n, seed=1)
    for path in args.models.split(','):
        net = load_model(path)
        logits = predict(net, test.x)
        keep = lambda name: args.work/f'{net.name}-{name}.csv'
        plain = [('full precision', lambda: net)]
        if not keep('full').exists():
            save(keep('full'), measure(args, net, test, logits, plain), model=net.name,
                 source='', format='FP32')
        for source in ('photographs', 'generated'):
            todo = [f for f in args.formats + args.mixed
                    if not keep(f'{source}-{f.replace("/", "_")}').exists()]
            if not todo: continue
            images = train.x if source == 'photographs' else generate(
                train_generator(net, args.steps, seed=0)[0], args.n, seed=0)[0]
            noise = weight_noise(net, images[:64]) if set(todo) & set(args.mixed) else None
            for fmt in todo:
                found = mixed_options(net, images, fmt,
                                      noise) if fmt in args.mixed else options(net, images, fmt)
                save(keep(f'{source}-{fmt.replace("/", "_")}'),
                     measure(args, net, test, logits, found), model=net.name, source=source,
                     format=fmt)
    return time.process_time() - started


def save(path, rows, **facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table = pd.DataFrame(facts, index=table.index).join(table)
    table.to_csv(path, index=False)
    print(table.drop(columns=['lo', 'hi', 'n']).round(4).to_string(header=False, index=False),
          flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', help='images, as for the commands')
    p.add_argument('--models', required=True, help='files of save_model, separated by commas')
    p.add_argument('--name', default='cifar10')
    p.add_argument('--formats', type=lambda s: s.split(','),
                   default=['INT4', 'INT3', 'POT4', 'FLOAT4'])
    p.add_argument('--mixed', type=lambda s: s.split(','), default=['INT4/INT8', 'INT3/INT8'],
                   help='uniform formats that mixed precision is compared with')
    p.add_argument('--n', type=int, default=256,
                   help='images for calibration, correction and learning')
    p.add_argument('--n-test', type=int, default=1000)
    p.add_argument('--steps', type=int, default=300, help='of the generator')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--work', type=Path, default=Path('refine-work'))
    p.add_argument('--out', default='results')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    seconds = run(args)
    rows = pd.concat([pd.read_csv(f, keep_default_na=False)
                      for f in sorted(args.work.glob('*.csv'), key=lambda f: f.stat().st_mtime)])
    path = Path(args.out)/f'refine_{args.name}.csv'
    rows.to_csv(path, index=False)
    said = dict(data=Path(args.data).name, models=[
        f'{n.name}, width {n.width:g}' for n in map(load_model, args.models.split(','))],
                formats=args.formats, mixed=args.mixed, n_calibration=args.n,
                n_test=args.n_test, test_seed=0, calibration_seed=1, generator_steps=args.steps,
                generator_seed=0, rounding_steps=100, rounding_places=2048, noise_images=64,
                interval='95 %, Wilson', cpu_seconds_of_this_call=round(seconds),
                cpu_seconds_of_the_options=round(rows.seconds.sum()))
    save_json(manifest(**said), path.with_suffix('.json'))
