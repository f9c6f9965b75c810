"""The project's own networks, trained one after another.

    python benchmarks/models/zoo.py --data ../shared/data --work work

`--data` is a folder with `read_images.py`, `cifar10/` and `cifar100/`: lossless photographs. Trains the
first `--count` networks of the table below that have no file in zoo/, or those of `--networks`: SGD with
Nesterov momentum (the transformer: AdamW), one cycle of the learning rate, crops and mirrors, label smoothing
or attacked images (Linf, three steps of PGD, `attack` grey levels) where the table says so. A run that is
stopped goes on from its last hundred steps, kept in `--work`.

zoo/NAME.safetensors holds the weights in half precision and, as its metadata, what `load_model('zoo:NAME')`
needs. A row per network in results/zoo.csv: `accuracy` on the `n` test photographs, with those weights, and
of the same answers `sharpness` (where certainty equals accuracy), `growth` (their mean lead over that of
natural crops) and `dispersion` (of the leads, variance over mean), which the package takes as 3.6, 2.06 and
.526; `seconds` of processor time and whether bfloat16 was used. The folder may hold 25 MB.
"""
import argparse, json, sys, time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]/'transfer'))

from adversarial_training import attacked
from others import merged
from robustnb.contract import predict
from robustnb.core import fast_bf16, make_generator, subseed, to_float
from robustnb.files import atomic_path, load_state, manifest, save_json, save_state
from robustnb.models.training import crop_and_flip
from robustnb.models.zoo import build_model
from robustnb.transfer.certainty import known_sharpness
from robustnb.transfer.crops import lead_dispersion, leads, natural_crops

Network = namedtuple('Network', 'architecture width data epochs smoothing attack', defaults=(0., 0))
networks = {
    'AlexNet-cifar10-short': Network('AlexNet', .5, 'cifar10', 4),
    'ResNet_18-cifar10': Network('ResNet_18', .25, 'cifar10', 10),
    'ResNet_18-cifar100': Network('ResNet_18', .25, 'cifar100', 14),
    'VGG_16-cifar100': Network('VGG_16', .125, 'cifar100', 20),
    'MobileNetV2-cifar10-smooth': Network('MobileNetV2', .25, 'cifar10', 10, smoothing=.1),
    'AlexNet_BN-cifar100': Network('AlexNet_BN', .25, 'cifar100', 16),
    'AlexNet_BN-cifar10-adversarial': Network('AlexNet_BN', .25, 'cifar10', 10, attack=4),
    'VGG_19-cifar10-smooth': Network('VGG_19', .125, 'cifar10', 14, smoothing=.1),
    'AlexNet-cifar100': Network('AlexNet', .25, 'cifar100', 20),
    'AlexNet_BN-cifar10': Network('AlexNet_BN', .25, 'cifar10', 10),
    'VGG_16-cifar10-short': Network('VGG_16', .125, 'cifar10', 5),
    'ResNet_50-cifar10': Network('ResNet_50', .125, 'cifar10', 10),
    'Inception_BN-cifar100': Network('Inception_BN', .25, 'cifar100', 14),
    'ResNet_18-cifar10-adversarial': Network('ResNet_18', .25, 'cifar10', 8, attack=4),
    'MobileNetV2-cifar100': Network('MobileNetV2', .25, 'cifar100', 14),
    'VGG_19-cifar100': Network('VGG_19', .125, 'cifar100', 20),
    'ResNet_50-cifar100': Network('ResNet_50', .125, 'cifar100', 14),
    'Inception_BN-cifar10': Network('Inception_BN', .25, 'cifar10', 10),
    'ViT-cifar10': Network('ViT', .5, 'cifar10', 12),
    'ResNet_152-cifar10': Network('ResNet_152', .125, 'cifar10', 8),
    'ResNet_152-cifar100-smooth': Network('ResNet_152', .125, 'cifar100', 12, smoothing=.1),
}
statistics = dict(cifar10=((.4914, .4822, .4465), (.2470, .2435, .2616)),
                  cifar100=((.5071, .4865, .4409), (.2673, .2564, .2762)))
batch, every, most = 128, 100, 25e6


def photographs(args, data, part):
    "Pixels (N,32,32,3), labels (N,), names of the classes"
    from read_images import read
    x, y, classes = read(args.data/data/f'{data}-{part}.zip')
    return x, torch.from_numpy(y), classes


def in_bf16(row): return fast_bf16('cpu') and row.architecture != 'ViT'      # its attention is slower in it


def updated(model, optimizer, x, y, row, g):
    "One step on crops and mirrors, attacked where the table says so; the loss"
    bf16 = in_bf16(row)
    x = crop_and_flip(x, 4, True, g).float().div_(255).contiguous(memory_format=torch.channels_last)
    if row.attack:
        x = attacked(model, x, y, row.attack/255, g, bf16)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=row.smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.)
    optimizer.step()
    return loss.item()


def trained(name, args):
    "The network and its seconds of processor time; goes on from what `--work` holds"
    row, path = networks[name], args.work/f'{name}.pt'
    images, y, classes = photographs(args, row.data, 'train')
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    model = build_model(row.architecture, len(classes), row.width, *statistics[row.data])
    model = model.to(memory_format=torch.channels_last).train()
    rate = {'AlexNet': .02, 'ViT': .002}.get(row.architecture, .1)      # less without batch norm
    if row.architecture == 'ViT':
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, .9, weight_decay=5e-4, nesterov=True)
    each = len(x)//batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, row.epochs*each, pct_start=.25)
    state = dict(model=model, optimizer=optimizer, schedule=schedule)
    step, spent, loss, began = 0, 0., 0., time.process_time()
    if path.exists():
        held = load_state(path)
        for k, v in state.items():
            v.load_state_dict(held[k])
        step, spent = held['step'], held['seconds']
    while step < row.epochs*each:
        g = make_generator(0, name, step)
        order = torch.randperm(len(x), generator=make_generator(0, name, 'epoch', step//each))
        rows = order[step % each*batch:][:batch]
        torch.manual_seed(subseed(0, name, 'dropout', step))
        loss += updated(model, optimizer, x[rows], y[rows], row, g)
        schedule.step()
        step += 1
        if step % every == 0 or step == row.epochs*each:
            seconds = spent + time.process_time() - began
            held = {k: v.state_dict() for k, v in state.items()}
            save_state(held | dict(step=step, seconds=seconds), path)
            print(f'{name}: step {step} of {row.epochs*each}, {seconds:.0f} s, loss {loss/every:.3f}',
                  flush=True)
            loss = 0.
    return model.eval(), classes, load_state(path)['seconds']


def saved(name, trained, args):
    "The file of zoo/, and the row of the table"
    model, classes, seconds = trained
    row = networks[name]
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.net.state_dict().items()}
    if not all(v.isfinite().all() for v in state.values()):
        raise ValueError(f'{name}: some weights are too large for half precision.')
    model.net.load_state_dict(state)
    x, y, _ = photographs(args, row.data, 'test-a')
    logits = predict(model, to_float(x))
    accuracy = (logits.argmax(1) == y).double().mean().item()
    facts = dict(network=name) | row._asdict() | dict(
        parameters=sum(o.numel() for o in model.parameters()), n=len(y), accuracy=round(accuracy, 4),
        sharpness=known_sharpness(logits, accuracy), dispersion=lead_dispersion(logits)[0],
        growth=float(leads(logits).mean()/leads(predict(model, natural_crops(200, 32))).mean()),
        seconds=round(seconds), bf16=in_bf16(row))
    told = dict(name=row.architecture, n_classes=len(classes), width=row.width, classes=classes,
                mean=statistics[row.data][0], std=statistics[row.data][1], trained=facts,
                command=manifest()['command'])
    path = args.zoo/f'{name}.safetensors'
    with atomic_path(path) as tmp:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp, {'robustnb.model': json.dumps(told)})
    if sum(o.stat().st_size for o in args.zoo.iterdir()) > most:
        path.unlink()
        raise ValueError(f'{name}: zoo/ would hold more than {most/1e6:g} MB. Train it narrower.')
    merged([facts], args.out/'zoo.csv').to_csv(args.out/'zoo.csv', index=False)
    save_json(manifest(batch=batch), args.out/'zoo.json')
    print(facts, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--networks', nargs='*', help='names of the table; none: the first that are missing')
    parser.add_argument('--count', type=int, default=1, help='of the missing ones, how many')
    parser.add_argument('--work', type=Path, default=Path('work/zoo'))
    parser.add_argument('--zoo', type=Path, default=Path('zoo'))
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(args.data))
    missing = [k for k in networks if not (args.zoo/f'{k}.safetensors').exists()]
    for name in args.networks or missing[:args.count]:
        saved(name, trained(name, args), args)


if __name__ == '__main__':
    main()
