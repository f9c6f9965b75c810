"""Train the adversarially trained network of the benchmarks: three steps of PGD from a random start
for each update.

    python benchmarks/models/adversarial_training.py cifar10-images.zip --out adversarial.pt

Madry et al. 2018 (arXiv:1706.06083), Linf 8/255, steps of 4/255. One step only
(arXiv:2001.03994) is cheaper but collapses on this network: after five epochs its accuracy under
PGD was 0. The images in the zip are those that `load_data` reads.
"""
import argparse, json, time

import torch
import torch.nn.functional as F

from robustnb.core import make_generator
from robustnb.data import load_data
from robustnb.models.zoo import build_model
from robustnb.models.loading import save_model
from robustnb.core import fast_bf16
from robustnb.models.training import crop_and_flip


def attacked(model, x, y, eps, g, bf16):
    "Three steps of PGD from a random start inside Linf `eps`"
    found = (x + eps*(2*torch.rand(x.shape, generator=g)-1)).clamp(0, 1)
    for _ in range(3):
        found.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(found).float(), y)
        grad, = torch.autograd.grad(loss, found)
        found = (x + (found.detach() + eps/2*grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return found


def epoch(model, optimizer, schedule, x, y, eps, g):
    "One pass; the mean loss on the attacked images"
    total, bf16 = 0., fast_bf16('cpu')
    for rows in torch.randperm(len(x), generator=g).split(128):
        xb = crop_and_flip(x[rows], 2, True,
                           g).float().div_(255).contiguous(memory_format=torch.channels_last)
        x_adv = attacked(model, xb, y[rows], eps, g, bf16)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x_adv).float(), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()*len(rows)
    return total/len(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder or zip of training images')
    parser.add_argument('--out', default='adversarial.pt', help='where to save the weights')
    parser.add_argument('--model', default='ResNet_18')
    parser.add_argument('--width', type=float, default=.25)
    parser.add_argument('--epochs', type=int, default=9)
    parser.add_argument('--eps', type=float, default=8, help='grey levels')
    args = parser.parse_args()
    data = load_data(args.data, 'train')
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2)
    y = torch.from_numpy(data.y)
    model = build_model(args.model, n_classes=data.labels.shape[1],
                        width=args.width).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), .1, .9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, .1, total_steps=args.epochs*-(-len(x)//128), pct_start=.3,
        anneal_strategy='linear')
    g = make_generator(0, 'adversarial training')
    for i in range(args.epochs):
        began = time.time()
        loss = epoch(model, optimizer, schedule, x, y, args.eps/255, g)
        save_model(model.eval(), args.out)
        model.train()
        print(json.dumps(dict(epoch=i+1, loss=round(loss, 4), seconds=round(time.time()-began))),
              flush=True)


if __name__ == '__main__':
    main()
