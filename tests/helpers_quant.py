"What the tests of equalised and reconstructed networks share: small networks, outputs layer by layer"
import copy

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from robustnb.core import make_generator
from robustnb.contract import open_model, predict
from robustnb.models.graph import fold_batchnorm
from robustnb.models.wrapping import wrap_model
from robustnb.quant.ptq import FakeQuantize
from robustnb.quant.sensitivity import noise_ratio

layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def images(n=16, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=make_generator(seed, 'test images'))


def seeded(make, seed=0):
    "A module whose weights come from a seed; batch norm is no identity"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, .2, 2)
                nn.init.uniform_(m.bias, -.5, .5)
                nn.init.uniform_(m.running_var, .5, 2)
                nn.init.normal_(m.running_mean)
        if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()):
            net(images(2))
    return net.eval()


def model_of(make, seed=0): return wrap_model(seeded(make, seed), (.5,)*3, (.25,)*3)


def small():
    "A convolution with batch norm, a depthwise one without a bias, a strided grouped one, two linear layers"
    return model_of(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8),
                                          nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
                                          nn.ReLU6(), nn.Conv2d(8, 12, 3, 2, groups=2),
                                          nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                          nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 7)))


def outputs(model, x):
    "Inputs and outputs of each layer with weights at its first call, in the order of the calls"
    found = {}
    model = open_model(model, x)    # asked before anybody listens
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: found.setdefault(
        n, (a[0], out)) and None) for n, m in model.named_modules() if isinstance(m, layers)]
    predict(model, x, batch_size=len(x))
    for h in hooks:
        h.remove()
    return found


def untouched(before, module):
    return (all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
            and before.keys() == module.state_dict().keys())


class Ways(nn.Module):
    "Where a factor gets through and where it does not, in functions and methods"
    def __init__(self):
        super().__init__()
        for k in 'abcdefg':
            setattr(self, k, nn.Conv2d(4 if k != 'a' else 3, 4, 3, padding=1))
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.g.weight
        self.one = nn.Linear(4*16, 6)
        self.two = nn.Linear(6, 6)
        self.three = nn.Linear(6, 6)
        self.four = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu6(self.a(x))
        x = F.max_pool2d(F.leaky_relu(self.b(x), .1), 2)
        x = self.c(x)
        x = torch.relu(self.d(x)) + x
        x = self.e(self.e(x).relu())
        x = torch.sigmoid(self.f(x))
        x = self.tied(self.g(x).relu())
        x = torch.flatten(F.adaptive_avg_pool2d(F.dropout(x, .5, self.training), 4), 1)
        x = F.relu(self.two(F.hardtanh(self.one(x))))
        return self.four(F.relu(self.three(x))) + self.four.weight.sum()


def one_at_a_time(model, quantized, x):
    "The slow way to the table of `layer_sensitivity`: a pass for each tensor, rounded alone"
    exact = dict(fold_batchnorm(model).named_parameters())
    signal = predict(model, x)
    partial = copy.deepcopy(quantized)
    points = {n: m for n, m in partial.named_modules() if isinstance(m, FakeQuantize)}
    rounded = {n: p.clone() for n, p in partial.named_parameters()}
    for m in points.values():
        m.on = False
    for n, p in partial.named_parameters():
        p.data.copy_(exact[n])
    rows = []
    for n, p in partial.named_parameters():
        if n.endswith('bias') or torch.equal(rounded[n], exact[n]): continue
        p.data.copy_(rounded[n])
        rows.append((n.removesuffix('.weight'), 'weights', noise_ratio(signal, predict(partial, x))))
        p.data.copy_(exact[n])
    for n, m in points.items():
        m.on = True
        rows.append((n.removeprefix('round_'), 'activations', noise_ratio(signal, predict(partial, x))))
        m.on = False
    return pd.DataFrame(rows, columns=['layer', 'kind', 'logit_noise'])
