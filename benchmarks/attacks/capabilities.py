"""What each attack takes, needs and costs, tried on two small images.

    python benchmarks/attacks/capabilities.py       # about a minute of one core

An attack is any public function of `robustnb.attacks` that begins with `model, x, y, threat`, but for the
adapters of foolbox. Three things are tried on a network of one convolution on digits of 8x8 pixels.
*Threats*: with a budget so large that nearly every attack succeeds, does it run, stay inside, and fool the
network (yes), only stay inside (found nothing), or refuse? *Access*: does it refuse a network whose logits
have no gradient (gradient), or get along without (scores)? *Passes*: of one image with a budget so small
that it stands. A row per attack and threat, in results/attack_capabilities.csv.
"""
import argparse, importlib, inspect, pkgutil, time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import robustnb.attacks
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.threat_models import L0, L1, L2, Linf
from robustnb.contract import count_passes
from robustnb.core import make_generator
from robustnb.data import digits
from robustnb.files import manifest, save_json

large = dict(Linf=Linf(.4), L2=L2(3.), L1=L1(60.), L0=L0(120), SSIM=SSIM(.3))
small = dict(Linf=Linf(1e-3), L2=L2(1e-2), L1=L1(.1), L0=L0(1), SSIM=SSIM(.9999))
helpers = 'check_attack', 'run_cascade'      # they take the same arguments and are no attacks


def attacks():
    "Module and function of each attack but those of foolbox, which take minutes"
    for m in pkgutil.iter_modules(robustnb.attacks.__path__):
        if m.name == 'adapters': continue
        module = importlib.import_module(f'robustnb.attacks.{m.name}')
        for name in getattr(module, '__all__', []):
            f = getattr(module, name)
            if not inspect.isfunction(f) or name in helpers: continue
            if list(inspect.signature(f).parameters)[:4] == ['model', 'x', 'y', 'threat']: yield m.name, f


class Blunt(nn.Module):
    "Logits without a gradient"
    def __init__(self, net):
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, x): return self.net(x)


def case(n=2):
    "A network of one convolution, and images that it answers rightly"
    data = digits('train', 8)[:600]
    x, y = data.x, torch.as_tensor(data.y)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    right = net(x).argmax(1) == y
    return net.eval(), x[right][:n], y[right][:n]


def tried(attack, net, x, y, threat):
    "What comes of an attack under a threat: yes, found nothing, refused; and the images"
    try:
        x_adv = attack(net, x, y, threat, generator=make_generator(0))
    except (TypeError, ValueError):
        return 'refused', None
    if not threat.allows(x, x_adv).all(): raise AssertionError(f'{attack.__name__} left {threat}')
    return 'yes' if (net(x_adv).argmax(1) != y).any() else 'found nothing', x_adv


def rows_of(room, attack, net, x, y):
    "A row for each threat; access and passes under the first threat that is not refused"
    found = {name: tried(attack, net, x, y, threat) for name,threat in large.items()}
    first = next(name for name,(said,_) in found.items() if said != 'refused')
    needs = tried(attack, Blunt(net).eval(), x, y, large[first])[0] == 'refused'
    with count_passes() as passes:
        attack(net, x[:1], y[:1], small[first], generator=make_generator(0))
    access = 'gradient' if needs else 'scores'
    for name,(said,_) in found.items():
        yield dict(attack=attack.__name__, module=room, threat=name, outcome=said, access=access,
                   follows_gradient=passes.backward > 0, counted_under=first, forward=passes.forward,
                   backward=passes.backward)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    net, x, y = case()
    rows = []
    for room,attack in attacks():
        rows += rows_of(room, attack, net, x, y)
        print(attack.__name__, f'{time.process_time()-began:.0f} s', flush=True)
    path = Path(args.out)/'attack_capabilities.csv'
    pd.DataFrame(rows).to_csv(path, index=False)
    save_json(manifest(rows=len(rows), seconds=round(time.process_time()-began)), path.with_suffix('.json'))


if __name__ == '__main__': main()
