"Quantised models: weights on the levels, biases untouched, what stays in full precision is named, gradients, ranges, other libraries' networks."
import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from robustnb import ptq
from robustnb.core import make_generator, predict
from robustnb.models import Normalized, build_model, fold_batchnorm, model_names, wrap_model
from robustnb.ptq import Rounder, quantize, rounding_points
from robustnb.quant import choose_scale, fake_quantize, levels, number_format, quant_spec, to_levels

formats = ('INT8', 'INT4', 'INT2', 'POT4', 'POT2', 'FLOAT4', 'FLOAT6_E1', 'FLOAT8_E6', 'FP8_E4M3', 'FP8_E5M2')
layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def images(n=16, size=32, seed=0): return torch.rand(n, 3, size, size, generator=make_generator(seed, 'test images'))


def seeded(make, seed=0, size=32):
    "A module whose weights come from a seed; its batch norm has scales and shifts that are no identity and has seen some images"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, .5, 1.5), nn.init.uniform_(m.bias, -.3, .3)
                m.momentum = None
        with torch.no_grad(): net.train()(images(8, size, 5)*4-2)
    return net.eval()


def model_of(net): return wrap_model(net, (.5,)*3, (.25,)*3)


def small():
    return model_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                                                 nn.LeakyReLU(.1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7))))


@pytest.mark.parametrize('rule', ('mse', 'minmax'))
@pytest.mark.parametrize('per_channel', (True, False), ids=('per channel', 'per tensor'))
@pytest.mark.parametrize('name', formats)
def test_weights_lie_on_the_levels(name, per_channel, rule):
    fmt, model = number_format(name), small()
    q, folded = quantize(model, quant_spec(name, per_channel, rule), images()), fold_batchnorm(model)
    at = levels(fmt)
    at = torch.cat([-at.flip(0), at])
    seen = 0
    for n, layer in q.named_modules():
        if not isinstance(layer, layers): continue
        original = folded.get_submodule(n)
        for w, v in zip(layer.weight, original.weight) if per_channel else [(layer.weight, original.weight)]:
            scale = choose_scale(v, fmt, rule).item()
            nearest = at[(w.double().reshape(-1, 1)/scale - at).abs().argmin(1)].view_as(w)*scale
            assert (nearest-w).abs().max() <= 1e-6*v.abs().max() and (w-v).abs().max() > 0
            if rule == 'minmax': assert w.abs().max() == pytest.approx(v.abs().max().item(), rel=1e-5), 'the largest weight keeps its value'
            seen += 1
        assert torch.equal(layer.bias, original.bias), 'biases stay as they are'
        if per_channel and fmt.kind == 'INT' and rule == 'minmax': assert len(layer.weight.flatten(1).abs().amax(1).unique()) > 1
    assert seen == (8 + 8 + 7 if per_channel else 3) and q.left_float == ()


@pytest.mark.parametrize('name', ('INT8', 'INT3', 'POT4/POT4', 'FLOAT4', 'FP8', 'INT4/INT8'))
def test_stored_tensors_lie_on_the_levels(name):
    q, stored = quantize(small(), name, images()), {}
    for n, m in q.named_modules():
        if isinstance(m, Rounder): m.register_forward_hook(lambda m, a, out, n=n: stored.update({n: (m, out)}))
    predict(q, images(seed=1))
    assert list(stored) == ['round_normalize', 'round_net_2', 'round_net_3', 'round_net_4', 'round_net_5']
    for m, out in stored.values():
        assert m.fmt == q.spec.activations
        at = levels(m.fmt) if m.signed else torch.arange(m.fmt.top(signed=False)+1, dtype=torch.float64)
        v = out.abs().double().flatten()/m.scale
        assert ((v[:, None] - at).abs().amin(1) < 1e-3*at[1] + 1e-6*v).all() and (m.signed or out.min() >= 0)
    assert [m.signed for m, _ in stored.values()] == ([True, False, True, True, True] if q.spec.activations.kind == 'INT' else [True]*5)


@pytest.mark.parametrize('name', model_names)
def test_nothing_of_the_nine_networks_stays_in_full_precision(name):
    model = build_model(name, width=.0625)
    before = copy.deepcopy(model.state_dict())
    x = images(8)
    q = quantize(model, 'INT8', x)
    assert q.left_float == () and str(q.spec) == 'INT8' and not q.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())
    a, b = predict(model, x), predict(q, x)
    assert 0 < (a-b).square().mean() < .03*a.var(), 'INT8 answers nearly as the original does'
    points = [n.name for n in rounding_points(fold_batchnorm(model))]
    assert points[0] == 'normalize' and sum(isinstance(m, Rounder) for m in q.modules()) == len(points)
    sums = sum(hasattr(m, 'body') and bool(len(m.shortcut) or 1) for m in model.modules() if type(m).__name__ == '_Residual')
    joins = sum(type(m).__name__ == '_Branches' for m in model.modules())
    weighted = sum(isinstance(m, layers) for m in q.modules())
    pools = name in ('Inception_BN', 'MobileNetV2') or name.startswith('ResNet')
    assert len(points) == 1 + weighted - 1 + sums + joins + pools, 'input, layers but the last, sums, concatenations, average'


@pytest.mark.parametrize('name', ('INT16', 'INT8', 'POT4', 'FLOAT4'))
def test_gradients_reach_the_pixels(name):
    model, y = build_model('ResNet_18', width=.125), torch.arange(4)
    x = images(4).requires_grad_()
    q = quantize(model, name, x.detach())
    grads = [torch.autograd.grad(F.cross_entropy(m(x), y), x)[0] for m in (model, q)]
    assert grads[1].isfinite().all() and (grads[1].flatten(1).abs().amax(1) > 0).all()
    assert F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > dict(INT16=.99, INT8=.8).get(name, .1)
    assert not any(p.requires_grad for p in q.parameters())


class Attention(nn.Module):
    "A convolution, attention with its four matrices, a layer norm and a free parameter"
    def __init__(self):
        super().__init__()
        self.patches, self.attention, self.norm = nn.Conv2d(3, 8, 8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.shift, self.head = nn.Parameter(torch.full((8,), .1)), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0]) + self.shift
        return self.head(x.mean(1))


def test_what_is_not_rounded_is_named():
    q = quantize(model_of(seeded(Attention)), 'INT8', images())
    assert q.left_float == ('net', 'net.attention', 'net.norm')
    assert 'round_getitem' in dict(q.named_modules()), 'what the attention returns is rounded although it comes in a tuple'
    assert len(q.net.attention.in_proj_weight.unique()) == q.net.attention.in_proj_weight.numel()
    assert all(len(w.unique()) <= 255 for w in q.net.patches.weight) and predict(q, images()).isfinite().all()


@pytest.mark.parametrize('layer, name', ((lambda: nn.ConvTranspose2d(4, 4, 2, 2), 'net.1'), (lambda: nn.GroupNorm(2, 4), 'net.1'),
    (lambda: nn.PReLU(4), 'net.1'), (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), 'net.1.1')), ids=('transposed', 'group norm', 'prelu', 'unfolded batch norm'))
def test_other_layers_with_weights_are_named(layer, name):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layer(), nn.Flatten(), nn.LazyLinear(5)))
    with torch.no_grad(): net(images(1))
    assert quantize(model_of(net), 'INT8', images()).left_float == (name,)


@pytest.mark.parametrize('name', ('mobilenet_v2', 'resnet18', 'shufflenet_v2_x0_5', 'squeezenet1_0'))
def test_torchvision_networks(name):
    model, x = model_of(seeded(lambda: getattr(torchvision.models, name)(weights=None, num_classes=6), size=64)), images(6, 64)
    q = quantize(model, 'INT12', x)
    a, b = predict(model, x), predict(q, x)
    assert q.left_float == () and 0 < (a-b).square().mean() < .05*(a-a.mean(0)).square().mean()


@pytest.mark.parametrize('name, left', (('resnet18', False), ('mobilenetv3_small_050', False), ('convnext_atto', True), ('vit_tiny_patch16_224', True)))
def test_timm_networks(name, left):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    extra = dict(img_size=64) if name.startswith('vit') else {}
    model, x = wrap_model(seeded(lambda: timm.create_model(name, pretrained=False, num_classes=4, **extra), size=64)), images(6, 64)
    q = quantize(model, 'INT12', x)
    a, b = predict(model, x), predict(q, x)
    assert bool(q.left_float) == left and 0 < (a-b).square().mean() < .05*(a-a.mean(0)).square().mean()
    assert not any(isinstance(q.get_submodule(n), layers) for n in q.left_float), 'every convolution and linear layer is rounded'


def test_a_network_without_normalisation_inside_gets_its_input_rounded():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*30*30, 5)))
    q = quantize(net, 'INT2', images())
    stored = []
    rounders = {n: m for n, m in q.named_modules() if isinstance(m, Rounder)}
    assert list(rounders) == ['round_input_1', 'round__1']
    rounders['round_input_1'].register_forward_hook(lambda m, a, out: stored.append(out))
    predict(q, images())
    assert not rounders['round_input_1'].signed and len(stored[0].unique()) == 4


class Shapes(nn.Module):
    "Numbers that are not tensors, a tensor used twice, a layer called twice, functions and methods"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(8*16*16, 5)

    def forward(self, x):
        n = x.size(0)
        x = F.max_pool2d(self.a(x), 2)
        left, right = torch.chunk(self.b(self.b(x).relu()) + x, 2, 1)
        x = torch.cat([left, right.clamp(min=0), x], 1)
        return F.dropout(self.fc(x.reshape(n, -1)), .5, self.training)


def test_every_computed_tensor_is_rounded_once_and_nothing_else():
    model, x = model_of(seeded(Shapes)), images()
    assert [n.name for n in rounding_points(fold_batchnorm(model))] == ['normalize', 'net_a', 'relu', 'net_b_1', 'add', 'cat']
    q = quantize(model, 'INT16', x)
    assert q.left_float == () and (predict(q, x)-predict(model, x)).abs().max() < 1e-2*predict(model, x).std()
    calls = [n.target for n in q.graph.nodes if n.op == 'call_module' and str(n.target).startswith('round_')]
    assert len(calls) == len(set(calls)) == 6
    for n in q.graph.nodes:
        if n.name == 'round_cat': assert n.args[0].name == 'cat' and [u.name for u in n.users] == ['reshape']


def test_calibration_reads_all_images_and_only_the_extremes_matter_to_minmax():
    model, x = small(), .4 + .2*images(250)
    x[-1] = images(1, seed=1)
    spec = quant_spec('INT8', rule='minmax')
    scales = [m.scale.item() for m in quantize(model, spec, x).modules() if isinstance(m, Rounder)]
    again = [m.scale.item() for m in quantize(model, spec, x.flip(0)).modules() if isinstance(m, Rounder)]
    without = [m.scale.item() for m in quantize(model, spec, x[:-1]).modules() if isinstance(m, Rounder)]
    assert scales == pytest.approx(again, rel=1e-5) and scales != pytest.approx(without, rel=1e-3)
    values, seen = {}, fold_batchnorm(model)
    for n, m in seen.named_modules():
        if n in ('normalize', 'net.2', 'net.3', 'net.4', 'net.5'): m.register_forward_hook(lambda m, a, out, n=n: values.update({n: max(values.get(n, 0), out.abs().max().item())}))
    predict(seen, x)
    assert scales == pytest.approx([v/(255 if n == 'net.2' else 127) for n, v in values.items()], rel=1e-5)


def test_every_calibration_image_counts_the_same(monkeypatch):
    seen = {}
    monkeypatch.setattr(ptq, '_sample_size', 30_000)
    monkeypatch.setattr(ptq, 'choose_scale', lambda x, *args, **kw: seen.setdefault(x.numel(), x).new_ones(()) if x.ndim == 1 else choose_scale(x, *args, **kw))
    x = .5 + 0*images(230)
    x[200:] = 1.
    quantize(small(), 'INT8', x)
    first = next(iter(seen.values()))
    assert 29_000 < len(first) < 33_000, 'the sample is as large as it is said to be, whatever the number of batches'
    assert abs((first == 2).float().mean() - 30/230) < .005


def test_values_between_the_extremes_decide_the_mse_scale():
    model, x = small(), images(250)
    x[0, :, :4, :4] = 1000/255 % 1
    one, two = (next(m for m in quantize(model, quant_spec('INT4', rule=r), x).modules() if isinstance(m, Rounder)).scale for r in ('mse', 'minmax'))
    normalised = model.normalize(x)
    assert one == pytest.approx(choose_scale(normalised, number_format('INT4')).item(), rel=.05) and one <= two


@pytest.mark.parametrize('name', ('INT4', 'INT8', 'POT4', 'FLOAT5_E2', 'FP8'))
def test_the_chosen_scale_is_the_best_of_a_search(name):
    fmt, x = number_format(name), torch.randn(3, 2000, generator=make_generator(0))
    error = lambda s: (to_levels(x/s, fmt)*s - x).square().mean()
    full = x.abs().max()/fmt.top()
    best = min(error(full*s).item() for s in torch.linspace(.2, 1, 33))
    assert error(choose_scale(x, fmt)).item() == pytest.approx(best, rel=1e-5)
    rows = choose_scale(x, fmt, per_channel=True)
    assert rows.shape == (3, 1) and all(r.item() == pytest.approx(choose_scale(v, fmt).item(), rel=1e-6) for r, v in zip(rows, x))
    assert choose_scale(torch.zeros(4), fmt) > 0 and torch.equal(fake_quantize(torch.zeros(4), fmt, choose_scale(torch.zeros(4), fmt)), torch.zeros(4))


def test_calibration_refuses_what_is_not_finite():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2*32*32, 3)).eval()
    with torch.no_grad(): net[0].weight.fill_(1e38)
    with pytest.raises(ValueError, match='must be finite.*overflow on the calibration images'): quantize(model_of(net), 'INT8', images())


def test_the_copy_is_the_models_own():
    model = small()
    q = quantize(model, 'INT4', images())
    with torch.no_grad(): model.net[7].weight.zero_()
    assert q.get_submodule('net.7').weight.abs().sum() > 0
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(predict(again, images()), predict(q, images()))
        assert (str(again.spec), again.left_float, again.n_classes) == ('INT4', (), 7)
    again.load_state_dict(q.state_dict())
    assert {n for n in q.state_dict() if 'round_' in n} == {f'round_{n}.scale' for n in ('normalize', 'net_2', 'net_3', 'net_4', 'net_5')}


def test_answers_do_not_depend_on_the_batch():
    q, x = quantize(small(), 'INT4', images()), images(9, seed=2)
    whole, one = predict(q, x), torch.cat([predict(q, o[None]) for o in x])
    assert (whole-one).abs().max() < .05*whole.std() and torch.equal(predict(q, x.flip(0)).flip(0), whole)
    assert isinstance(q.get_submodule('normalize'), type(Normalized(nn.Identity(), (0,), (1,)).normalize))
