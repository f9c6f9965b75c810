"Networks, images and slow versions that several test files of the room share"
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from robustnb.core import make_generator
from robustnb.attacks.ssim_rule import SSIM


class Net(nn.Module):
    "Random weights and unit descriptors; `error` makes it a poor copy of the one without"
    def __init__(self, error=0., seed=0, dim=12):
        super().__init__()
        g = make_generator(0, 'net')
        h = make_generator(seed, 'copy')
        shapes = ((12, 3, 5, 5), (24, 12, 3, 3), (24, 24, 3, 3), (dim, 24*9))
        draws = [torch.randn(s, generator=g)*(2/math.prod(s[1:]))**.5 for s in shapes]
        self.w = nn.ParameterList(
            [w + error*w.std()*torch.randn(w.shape, generator=h) for w in draws])

    def forward(self, x):
        x = 4*x-2
        for w in self.w[:3]:
            x = F.conv2d(x, w, stride=2, padding=1).relu()
        return F.normalize(F.adaptive_avg_pool2d(x, 3).flatten(1) @ self.w[3].T, dim=1)


class Line(nn.Module):
    def __init__(self, dim, shape=(3, 12, 12)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(math.prod(shape), dim,
                                          generator=make_generator(1))/math.prod(shape)**.5)

    def forward(self, x): return (x-.5).flatten(1) @ self.w


class Same(nn.Module):
    def forward(self, x): return 0*x.flatten(1)[:, :12] + 1


def pictures(n, size=16, seed=0, width=None):
    g = make_generator(seed, 'pictures')
    size = (size, width or size)
    x = sum(part*F.interpolate(torch.rand(n, 3, k, k, generator=g), size=size, mode='bilinear')
            for k, part in ((3, .5), (8, .5)))
    return (x + .05*torch.randn(x.shape, generator=g)).clamp(0, 1)


def distance(d, targets):
    "The score, by loops"
    return torch.tensor([np.mean([math.sqrt(((a-t)**2).sum()) for t in ts])
                         for a, ts in zip(d.detach().double(), targets.double())])


teacher = Net().eval()
students = [Net(.1, i).eval() for i in (1, 2)]
rule = SSIM(.95)


def problem(n=6, seed=0):
    "Sources, images of the wanted identities, their descriptors"
    x = pictures(n, seed=seed)
    people = pictures(2*n, seed=seed+100).unflatten(0, (n, 2))
    return x, people, teacher(people.flatten(0, 1)).detach().unflatten(0, (n, 2))


def windowed(a, b):
    "Structural similarity of two uint8 images (H,W,3), window by window"
    a = a.astype(float)
    b = b.astype(float)
    out = []
    for i in range(a.shape[0]-6):
        for j in range(a.shape[1]-6):
            for c in range(3):
                p = a[i:i+7, j:j+7, c].ravel()
                q = b[i:i+7, j:j+7, c].ravel()
                (vp, cov), (_, vq) = np.cov(p, q)
                out.append((2*p.mean()*q.mean()+6.5025)*(
                    2*cov+58.5225)/((p.mean()**2+q.mean()**2+6.5025)*(vp+vq+58.5225)))
    return np.mean(out)
