"What the tests of the models share: images, batch norm that is no identity, closeness of logits"
import re
from importlib.metadata import version

import pytest
import torch
from torch import nn

from robustnb.core import make_generator

imagenet = dict(mean=(.485, .456, .406), std=(.229, .224, .225))


def needs(package, *least):
    "Skips a test of what releases of a package before this one do otherwise"
    now = tuple(map(int, re.findall(r'\d+', version(package))[:2]))
    return pytest.mark.skipif(now < least, reason=f'{package} {version(package)} does it otherwise')


def images(n=4, size=32):
    return torch.rand(n, 3, size, size, generator=make_generator(0, 'test images'))


def randomize(net, seed=0):
    "Random statistics, scales and shifts in every batch normalisation layer, in place"
    g = make_generator(seed, 'randomise')
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, low, high in ((m.running_mean, -.5, .5), (m.running_var, .5, 2.),
                                 (m.weight.data, .5, 1.), (m.bias.data, -.5, .5)):
                t.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return net


def same(a, b, tol=1e-4):
    "Are the logits alike, and more than constants?"
    gap = float((a - b).detach().abs().max())
    return gap <= tol*float(b.detach().abs().max()) and float(b.detach().std()) > 0


class Fourier(nn.Module):
    "Weights that are complex numbers"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64))
        self.head = nn.Linear(192, 4)
    def forward(self, x):
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x)*self.w, s=(8, 8)).flatten(1))
