"Faces, pairs, a submission and an oracle that the tests of pairs, submission and comparison share"
import math, random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from robustnb.core import make_generator, to_float, to_uint8
from robustnb.data import NamedSet
from robustnb.attacks.ssim_rule import file_ssim
from robustnb.descriptors.pairs import make_pairs

WEIGHTS = torch.randn(16, 3, 3, 3, generator=make_generator(0))


@pytest.fixture(autouse=True)
def quiet():
    "No function touches the global random numbers"
    torch_state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    py_state = random.getstate()
    yield
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (np_state == np.random.get_state()[1]).all()
    assert py_state == random.getstate()


def box(x): return F.normalize(F.conv2d(x, WEIGHTS, stride=5).flatten(1), dim=1)


class Counted:
    "A small oracle: counts, and says NaN when its budget is spent"
    def __init__(self, limit, lost=()): self.limit, self.used = limit, 0
    left = property(lambda self: self.limit-self.used)

    def __call__(self, x):
        n = min(len(x), self.left)
        self.used += n
        d = box(x)
        d[n:] = math.nan
        return d


@pytest.fixture(scope='module')
def faces():
    "Smooth images, 4 identities x 6"
    soft = torch.rand(24, 3, 4, 5, generator=make_generator(1))
    return NamedSet(to_uint8(F.interpolate(soft, size=(16, 18), mode='bilinear')),
                    np.arange(24)//6, ('ann', 'bob', 'cat', 'dan'),
                    [f'{p}{i}.jpg' for p in 'abcd' for i in range(6)])


@pytest.fixture(scope='module')
def pairs(faces): return make_pairs(faces, 3, 2, identities=('ann', 'bob'))


@pytest.fixture(scope='module')
def entry(faces, pairs):
    "A submission that obeys: x, x_adv, targets (P,T,D)"
    x = faces.x[faces.at(pairs.sources).ravel()]
    x_adv = x.clone()
    x_adv[:, 0, 3, 4] = to_float(to_uint8(1-x[:, 0, 3, 4][:, None, None, None]))[:, 0, 0, 0]
    assert 0 < (1-file_ssim(to_uint8(x), to_uint8(x_adv))).min()
    assert file_ssim(to_uint8(x), to_uint8(x_adv)).min() > .95
    return x, x_adv, box(faces.x)[faces.at(pairs.targets)]


class Evil:
    def __reduce__(self): return exec, ("open('ran', 'w')",)
