"Layers by what they compute: other people's normalisation, padding and weights as the plain ones"
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import v2

from helpers_models import images, randomize, same
from robustnb.models.graph import fold_batchnorm, image_preparation, stored_tensors, trace
from robustnb.models.plain import PaddedConv2d, copy_model, plain_layers, scales_with_weight
from robustnb.models.wrapping import Normalize


def small(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                            nn.LazyLinear(4))
        net(images())
    return randomize(net).eval()


def frozen(bn):
    new = FrozenBatchNorm2d(bn.num_features, bn.eps)
    new.load_state_dict({k: v for k, v in bn.state_dict().items() if k in new.state_dict()})
    return new


class Affine(nn.Module):
    "Scale and shift without statistics"
    def __init__(self, bn):
        super().__init__()
        scale = bn.weight.detach()*(bn.running_var + bn.eps).rsqrt()
        self.register_buffer('scale', scale[:, None, None])
        self.register_buffer('shift', (bn.bias.detach() - bn.running_mean*scale)[:, None, None])
    def forward(self, x): return x*self.scale + self.shift


class Renamed(nn.BatchNorm2d):
    "A class of its own"


class Act(nn.BatchNorm2d):
    "With an activation inside"
    def __init__(self, n):
        super().__init__(n)
        self.act = nn.SiLU()
    def forward(self, x): return self.act(super().forward(x))


def taken(kind):
    def make(bn):
        new = kind(bn.num_features)
        new.load_state_dict(bn.state_dict())
        return new
    return make


guises = dict(sync=taken(nn.SyncBatchNorm), frozen=frozen, affine=Affine, renamed=taken(Renamed),
              act=taken(Act))


@pytest.mark.parametrize('guise', guises)
@torch.no_grad()
def test_batch_norm_folds_in_every_guise(guise):
    net = small()
    net[1] = guises[guise](net[1])
    net.eval()
    folded = fold_batchnorm(net)
    assert same(folded(images()), net(images()))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


@pytest.mark.parametrize('norm', (nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6),
                                  nn.BatchNorm2d(6, track_running_stats=False)))
def test_what_is_no_scale_per_channel_is_left(norm):
    class Own(nn.Module):
        "Of another module than torch's"
        def __init__(self):
            super().__init__()
            for k, v in norm.named_parameters():
                self.register_parameter(k, v)
        def forward(self, x): return norm(x)
    with torch.no_grad():
        assert type(plain_layers(nn.Sequential(Own()).eval())[0]) is Own


class Reading(nn.Conv2d):
    "Pads as TensorFlow does"
    def forward(self, x):
        pads = []
        for n, k, s in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride)):
            total = max((-(-n//s)-1)*s + k - n, 0)
            pads += [total//2, total-total//2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Inside(nn.Conv2d):
    "Holds its padding"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 1, 2))
    def forward(self, x): return super().forward(self.static_padding(x))


class Unit(nn.Conv2d):
    "Filters of unit length"
    def forward(self, x): return self._conv_forward(x,
                                                    F.normalize(self.weight.flatten(1)).view_as(self.weight),
                                                    self.bias)


class Shy(nn.Conv2d):
    "Convolves only what is bright: no zeros around, but linear in its weight"
    def forward(self, x): return super().forward(x*(x > 0))


class Squashed(nn.Conv2d):
    "An activation inside: not linear in its weight"
    def forward(self, x): return super().forward(x).relu()


@torch.no_grad()
def test_convolutions_that_pad_or_bake_become_plain():
    torch.manual_seed(0)
    for stride, size in ((1, 9), (2, 9), (2, 8), (3, 10)):
        odd = Reading(3, 4, 3, stride)
        plain = plain_layers(nn.Sequential(odd).eval())[0]
        assert type(plain) is (nn.Conv2d if stride == 1 else PaddedConv2d)
        assert plain.weight.equal(odd.weight)
        x = images(2, size)
        assert torch.allclose(plain(x), odd(x), atol=1e-6)
    for kind in (Inside, Unit):
        odd = kind(4, 6, (3, 2), (2, 1), dilation=2, groups=2)
        plain = plain_layers(nn.Sequential(odd).eval())[0]
        x = torch.rand(2, 4, 13, 14)
        assert type(plain) is (PaddedConv2d if kind is Inside else nn.Conv2d)
        assert torch.allclose(plain(x), odd(x), atol=1e-5)
    for kind, linear in ((Shy, True), (Squashed, False)):
        odd = nn.Sequential(kind(3, 4, 3)).eval()
        assert type(plain_layers(odd)[0]) is kind
        assert scales_with_weight(odd[0]) == linear
        roles = {s.role for s in stored_tensors(trace(odd)).values()}
        assert roles == ({'weight', 'bias'} if linear else {'other'})


@pytest.mark.parametrize('how', (nn.utils.weight_norm, nn.utils.spectral_norm,
                                 nn.utils.parametrizations.weight_norm,
                                 nn.utils.parametrizations.spectral_norm,
                                 lambda m: nn.utils.prune.random_unstructured(m, 'weight', .5)))
def test_weights_that_are_computed_become_plain(how):
    import torch.nn.utils.prune
    net = small()
    how(net[0]), how(net[4])
    net.eval()
    answer = net(images()).detach()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    plain = plain_layers(net)
    assert same(plain(images()), answer)
    assert [k for k, _ in plain[0].named_parameters()] == ['weight']
    assert not plain[0]._forward_pre_hooks
    assert torch.equal(plain[0].weight, net[0].weight)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert same(net(images()).detach(), answer, 1e-7)
    assert len(stored_tensors(fold_batchnorm(net))) == 4


def test_wrappers_are_opened_wherever_they_stand():
    net = small()
    x = images()
    inner = nn.Sequential(nn.DataParallel(net[:3]), torch.compile(net[3:], backend='eager')).eval()
    for odd in (inner, nn.DataParallel(inner), torch.compile(inner, backend='eager')):
        twin = copy_model(odd)
        assert torch.equal(twin(x), net(x))
        assert not any(isinstance(m, nn.DataParallel) or '_orig_mod' in m._modules for m in twin.modules())
        assert len(stored_tensors(fold_batchnorm(odd))) == 4
    assert isinstance(inner[0], nn.DataParallel)


class Own(nn.Module):
    "Normalises in its forward, in place"
    def __init__(self, net, way):
        super().__init__()
        self.net, self.way = net, way
        self.register_buffer('mean', torch.full((3, 1, 1), .4))
        self.register_buffer('sd', torch.full((3, 1, 1), .2))
    def forward(self, x):
        if self.way == 'writes': return self.net(x.sub_(self.mean).div_(self.sd))
        return self.net((x.clone().contiguous() - self.mean)/self.sd)


@pytest.mark.parametrize('way', ('v1', 'v2', 'writes', 'arithmetic'))
@torch.no_grad()
def test_pixels_are_prepared_in_one_step(way):
    given = (.4,)*3, (.2,)*3
    net = small()
    first = dict(v1=transforms.Normalize, v2=v2.Normalize).get(way)
    odd = nn.Sequential(first(*given), net) if first else Own(net, way)
    odd.eval()
    x = images()
    graph = fold_batchnorm(odd)
    before = x.clone()
    assert same(graph(x), nn.Sequential(Normalize(*given), net)(x))
    assert torch.equal(x, before), 'the images of the caller are left alone'
    assert {s.role for s in stored_tensors(graph).values()} == {'image', 'weight', 'bias'}
    assert image_preparation(graph)[-1].name in ('_0', 'div_', 'truediv')


@pytest.mark.parametrize('rows', (True, False))
@torch.no_grad()
def test_a_linear_layer_and_batch_norm_fold_only_on_rows(rows):
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(1 if rows else 2), nn.LazyLinear(8),
                        nn.BatchNorm1d(8),
                        nn.Flatten(), nn.LazyLinear(3))
    x = images(4, 16)
    net(x)
    randomize(net).eval()
    for folded in (fold_batchnorm(net), fold_batchnorm(net, x)):
        assert same(folded(x), net(x))
        assert any(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) != rows


@torch.no_grad()
def test_transposed_convolutions_fold_and_give_rows():
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6))).eval()
    x = torch.rand(2, 4, 5, 6)
    folded = fold_batchnorm(net)
    assert same(folded(x), net(x))
    line = stored_tensors(folded)['0.weight']
    w = folded.get_parameter('0.weight')
    factors = torch.rand(6)
    scaled = copy.deepcopy(folded)
    scaled.get_submodule('0').weight.copy_(line.stored(line.rows(w)*factors[:, None, None, None]))
    scaled.get_submodule('0').bias.zero_()
    alone = copy.deepcopy(folded)
    alone.get_submodule('0').bias.zero_()
    assert torch.allclose(scaled(x), alone(x)*factors[:, None, None], atol=1e-5)


def test_torchscript_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match='TorchScript.*ONNX'):
        trace(torch.jit.trace(small(), images()))


class Bounded(nn.Module):
    "A layer whose input or answer is clipped, by class and limit"
    def __init__(self, kind, *shape, before=float('inf'), behind=float('inf')):
        super().__init__()
        self.layer = type('Bounded', (kind,), dict(forward=lambda m, x: kind.forward(
            m, x.clamp(-before, before)).clamp(-behind, behind)))(*shape)

    def forward(self, x): return self.layer(x)


class Tanh(nn.Module):
    "In proportion to its input as long as that is small"
    def __init__(self, n, gain):
        super().__init__()
        self.register_buffer('gain', torch.full((n, 1, 1), gain))
    def forward(self, x): return (x*self.gain).tanh()


class Shrunk(nn.Linear):
    "Takes what is near zero for zero"
    def forward(self, x): return super().forward(F.hardshrink(x, .01))


@pytest.mark.parametrize('net', (
    Bounded(nn.Conv2d, 6, 6, 3, before=6.), Bounded(nn.Conv2d, 6, 6, 3, behind=40.), Tanh(6, 1e-3),
    Bounded(nn.Linear, 6, 6, before=8.), Bounded(nn.Linear, 6, 6, behind=30.), Shrunk(6, 6),
    Bounded(nn.BatchNorm2d, 6, behind=30.)))
@torch.no_grad()
def test_what_saturates_or_shrinks_is_no_plain_layer(net):
    rows = any(isinstance(m, nn.Linear) for m in net.modules())
    x = torch.randn(4, 6) if rows else torch.randn(4, 6, 9, 9)
    net = nn.Sequential(net).eval()
    plain = plain_layers(net)
    assert all(torch.equal(plain(s*x), net(s*x)) for s in (1e-3, 1, 100))
    assert type(getattr(plain[0], 'layer', plain[0])) is type(getattr(net[0], 'layer', net[0]))


def test_a_layer_that_clips_its_answer_is_not_in_proportion_to_its_weight():
    assert not scales_with_weight(Bounded(nn.Conv2d, 6, 6, 3, behind=40.).layer)
    assert not scales_with_weight(Bounded(nn.Linear, 6, 6, behind=40.).layer)
    assert scales_with_weight(Bounded(nn.Linear, 6, 6, before=8.).layer)
    for bias in (True, False):
        assert scales_with_weight(type('Own', (nn.Conv2d,), dict(
            forward=lambda m, x: nn.Conv2d.forward(m, x.flip(3))))(6, 6, 3, bias=bias))


@torch.no_grad()
def test_the_shift_of_a_large_statistic_hides_no_scale():
    bn = nn.BatchNorm2d(6).eval()
    bn.running_mean.fill_(3e4)
    bn.running_var.fill_(1e4)
    new = plain_layers(nn.Sequential(frozen(bn)))[0]
    assert isinstance(new, nn.BatchNorm2d)
    assert torch.equal(new.running_mean, bn.running_mean)


class Shifts(nn.Module):
    "Powers of two by channel, kept as whole numbers"
    def __init__(self):
        super().__init__()
        self.register_buffer('by', torch.tensor([1, 2, 0, 3]))

    def forward(self, x): return x*2.**-self.by.view(-1, 1, 1)


def test_channels_scaled_by_whole_numbers_are_read():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Shifts(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    x = torch.rand(2, 3, 8, 8)
    made = plain_layers(net)
    assert isinstance(made[1], nn.BatchNorm2d)
    torch.testing.assert_close(made(x), net(x))
