"What the tests of curation share: small images, and networks whose answers can be computed by hand"
import numpy as np
import torch
from torch import nn

from robustnb.core import make_generator
from robustnb.data import ImageSet

rng = np.random.default_rng(0)
pool = ImageSet(rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8), np.arange(90) % 3, 3)


def seeded(): return make_generator(0)


class Brightness(nn.Module):
    "Says class 0 for dark images, 1 for middling ones, 2 for bright ones, from the pixel in the corner"
    def __init__(self, at=0):
        super().__init__()
        self.at = at
    def forward(self, x):
        v = x[:, :, self.at, self.at].mean(1, keepdim=True)
        return 8*torch.cat([1-2*v, .5-0*v, 2*v-1], 1)


nets = [Brightness(0).eval(), Brightness(7).eval()]


def probabilities(images, k=0):
    "What network `k` says of 8-bit images"
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()/255
    return nets[k](x).softmax(1).double().numpy()


def is_wrong(images, y):
    "Which images each of the two networks gets wrong"
    return np.stack([probabilities(images, k).argmax(1) != y for k in (0, 1)])


def marking(k):
    "A transform that makes every pixel `k`"
    def mark(x, y, generator): return (x*0 + k/255), y
    mark.__name__ = f'mark{k}'
    return mark

