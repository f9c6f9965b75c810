"Parameters and multiply-accumulates against torch's own counter, shared layers, hooks that go again"
import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers_models import images
from robustnb.models.complexity import model_complexity
from robustnb.models.zoo import build_model, model_names


@pytest.mark.parametrize('name', model_names)
def test_macs_against_torch(name):
    model = build_model(name, width=.125)
    with FlopCounterMode(display=False) as counter:
        model(images(1))
    table = model_complexity(model)
    assert counter.get_total_flops() == 2*table[table.kind.isin(['conv', 'linear'])].macs.sum()
    assert table.params.sum() == sum(p.numel() for p in model.parameters())
    assert set(table.kind[table.macs == 0]) <= {'other'}


def test_complexity_leaves_no_hooks_even_after_a_failure():
    model = build_model('AlexNet_BN', width=.125)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        model_complexity(model, (3, 16, 16))
    model_complexity(model)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_complexity_of_shared_and_transposed_layers():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    table = model_complexity(nn.Sequential(conv, conv, nn.ConvTranspose2d(3, 5, 2, 2)).eval(),
                             (3, 4, 4))
    assert table.params.tolist() == [81, 0, 3*5*4 + 5]
    assert table.macs.tolist() == [16*81, 16*81, 16*3*5*4]


def test_complexity_without_autograd_and_of_computed_weights():
    class Inside(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        @torch.inference_mode()
        def forward(self, x): return self.net(x)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    right = model_complexity(plain, (3, 4, 4)).macs.sum()
    assert right == 4*27*4 + 80
    assert model_complexity(Inside(plain).eval(), (3, 4, 4)).macs.sum() == right
    turned = copy.deepcopy(plain)
    nn.utils.parametrizations.orthogonal(turned[2]).eval()
    assert model_complexity(turned, (3, 4, 4)).macs.sum() == right
    assert nn.utils.parametrize.is_parametrized(turned[2])


def test_shapes_are_enough():
    here = model_complexity(build_model('AlexNet_BN', width=.25))
    assert model_complexity(build_model('AlexNet_BN', width=.25).to('meta')).equals(here)
