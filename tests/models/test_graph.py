"Graphs and folded batch normalisation: other libraries' networks, shared weights, attention"
import copy

import pytest
import torch
import torchvision
from torch import fx, nn

from helpers_models import Fourier, images, imagenet, randomize, same
from robustnb.contract import count_passes
from robustnb.models.graph import fold_batchnorm, stored_tensors, trace
from robustnb.models.wrapping import batchnorms, last_linear, wrap_model
from robustnb.models.zoo import build_model, model_names


@pytest.mark.parametrize('name', model_names)
@torch.no_grad()
def test_folding_keeps_the_logits(name):
    model = randomize(build_model(name, n_classes=5, width=.125))
    x = images()
    before = model(x)
    weights = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    assert same(folded(x), before)
    assert not batchnorms(folded)
    assert not folded.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)
    assert last_linear(folded).weight.shape[0] == 5
    assert same(fx.symbolic_trace(model)(x), before, 1e-6), "the plain tracer must do as well"


@pytest.mark.parametrize('name', ('mobilenet_v2', 'densenet121', 'shufflenet_v2_x0_5'))
@torch.no_grad()
def test_torchvision_networks(name):
    model = randomize(wrap_model(getattr(torchvision.models, name)(weights=None, num_classes=6),
                                 **imagenet))
    folded = fold_batchnorm(model)
    x = images(2, 64)
    assert model.n_classes == 6
    assert same(folded(x), model(x))
    left = len(batchnorms(folded))
    had = len(batchnorms(model))
    assert 0 < left < had if name == 'densenet121' else left == 0 < had


@torch.no_grad()
def test_timm_normalisation_with_activation_is_folded_too():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    model = randomize(
        wrap_model(timm.create_model('mobilenetv3_small_050', pretrained=False, num_classes=4)))
    x = images(2, 64)
    folded = fold_batchnorm(model)
    assert same(trace(model)(x), model(x), 1e-6)
    assert same(folded(x), model(x))
    assert len(batchnorms(model)) == len(batchnorms(trace(model))) == 34
    assert not batchnorms(folded)
    assert same(trace(model.double())(x.double()), model(x.double()), 1e-12)


class Residues(nn.Module):
    "A linear layer with batch normalisation, and one whose weight is read a second time"
    def __init__(self, tied):
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.BatchNorm1d(12)
        self.tied = tied

    def forward(self, x):
        z = self.b(self.a(x.flatten(1)))
        return z + x.flatten(1) @ self.a.weight if self.tied else z


@pytest.mark.parametrize('tied', (False, True))
@torch.no_grad()
def test_linear_pairs_and_tied_weights(tied):
    model = randomize(wrap_model(Residues(tied), (.5,)*3, (.2,)*3))
    x = images(4, 2)
    folded = fold_batchnorm(model)
    assert same(folded(x), model(x))
    assert any(isinstance(m, nn.BatchNorm1d) for m in folded.modules()) == tied


@torch.no_grad()
def test_weights_as_direction_and_length_fold_once_they_are_plain():
    conv = nn.Conv2d(3, 4, 3)
    model = randomize(wrap_model(
        nn.Sequential(nn.utils.parametrizations.weight_norm(conv), nn.BatchNorm2d(4)), (.5,)*3,
        (.2,)*3))
    folded = fold_batchnorm(model)
    assert same(folded(images()), model(images()))
    assert len(batchnorms(folded)) == 0
    no_statistics = wrap_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (.5,)*3, (.2,)*3)
    assert same(fold_batchnorm(no_statistics)(images()), no_statistics(images()))
    assert not batchnorms(no_statistics)


def test_trace_leaves_a_training_model_in_training():
    model = build_model('AlexNet', width=.125).train()
    assert not trace(model).training
    assert model.training
    assert all(m.training for m in model.modules())


class Attending(nn.Module):
    "One attention module called twice"
    def __init__(self, **how):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, **{'batch_first': True, **how})
        self.head = nn.Linear(8, 4)
        self.again = self.attention

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y, weights = self.attention(x, x, x)
        z, each = self.again(y, x, x, average_attn_weights=False)
        assert self.attention.embed_dim == self.attention.num_heads*self.attention.head_dim == 8
        return self.head(z.mean(1)) + weights[:, 0, :4] + each[:, 1, 0, :4]


def test_attention_becomes_layers_that_say_the_same():
    torch.manual_seed(0)
    model = wrap_model(Attending().eval(), (.5,)*3, (.25,)*3)
    x = torch.rand(3, 3, 32, 32)
    nn.init.normal_(model.net.attention.in_proj_bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    calls = [n.target for n in graph.graph.nodes if n.op == 'call_module']
    assert not any(isinstance(m, nn.MultiheadAttention)
                   for m in graph.modules()), 'shared as before'
    assert calls.count('net.attention.q') == 2, 'shared as before'
    assert torch.equal(torch.cat([getattr(graph.net.attention, k).weight for k in 'qkv']),
                       model.net.attention.in_proj_weight)
    assert model.state_dict().keys() == before.keys()
    assert isinstance(model.net.attention, nn.MultiheadAttention)
    graph.net.attention.q.weight.data.zero_(), graph.net.attention.out_proj.weight.data.zero_()
    assert all(torch.equal(v, before[k])
               for k, v in model.state_dict().items()), 'the original is left as it is'


@pytest.mark.parametrize('how', (dict(add_bias_kv=True), dict(add_zero_attn=True)))
def test_attention_with_learned_keys_or_zeros_stays_one_call(how):
    model = wrap_model(Attending(**how).eval(), (.5,)*3, (.25,)*3)
    x = torch.rand(2, 3, 32, 32)
    graph = trace(model)
    assert isinstance(graph.net.attention, nn.MultiheadAttention)
    assert torch.allclose(graph(x), model(x), atol=1e-5)


def test_a_transformer_layer_of_torch_keeps_its_own_attention():
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(16, 8),
                        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
                        nn.Linear(64, 3)).eval()
    model = wrap_model(net, (.5,)*3, (.25,)*3)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(trace(model)(x), model(x), atol=1e-5)


def _small(norm, between=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), between, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(8, 5)]
    return randomize(nn.Sequential(*[m for m in layers if m]).eval())


@pytest.mark.parametrize('between', (nn.Identity(), nn.Dropout2d(.5),
                                     torchvision.ops.StochasticDepth(.5, 'row'),
                                     torchvision.ops.DropBlock2d(.3, 3)))
@torch.no_grad()
def test_what_does_nothing_in_evaluation_is_no_wall_before_a_norm(between):
    net = _small(nn.BatchNorm2d(8), between.eval())
    x = images()
    folded = fold_batchnorm(net)
    assert not batchnorms(folded)
    assert same(folded(x), net(x))


@torch.no_grad()
def test_dropout_that_stays_on_is_kept_before_a_norm():
    class Always(nn.Module):
        def forward(self, x): return nn.functional.dropout(x, .5)
    assert batchnorms(fold_batchnorm(_small(nn.BatchNorm2d(8), Always())))


@torch.no_grad()
def test_instance_norm_with_statistics_folds_and_others_do_not():
    x = images()
    with_statistics = _small(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
    with_statistics[1].running_mean.copy_(torch.linspace(-1, 1, 8))
    with_statistics[1].running_var.copy_(torch.linspace(.5, 2, 8))
    folded = fold_batchnorm(with_statistics)
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in folded.modules())
    assert not batchnorms(folded)
    assert same(folded(x), with_statistics(x))
    alone = _small(nn.InstanceNorm2d(8, affine=True))
    kept = fold_batchnorm(alone)
    assert any(isinstance(m, nn.InstanceNorm2d) for m in kept.modules())
    assert same(kept(x), alone(x))


class _Functional(nn.Module):
    def __init__(self, training=False):
        super().__init__()
        self.net, self.on = _small(nn.BatchNorm2d(8)), training

    def forward(self, x):
        conv, bn, *rest = self.net
        x = nn.functional.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.on,
                                     0., bn.eps)
        for m in rest:
            x = m(x)
        return x


@torch.no_grad()
def test_the_function_for_batch_norm_folds_unless_it_uses_the_batch():
    x = images()
    net = _Functional().eval()
    folded = fold_batchnorm(net)
    assert not any(n.target is nn.functional.batch_norm for n in folded.graph.nodes)
    assert not batchnorms(folded)
    assert same(folded(x), net(x))
    on = trace(_Functional(True).eval())
    assert any(n.target is nn.functional.batch_norm for n in on.graph.nodes)


class Options(nn.Module):
    "A forward with more arguments than the images, as many networks have"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                 nn.LazyLinear(5))

    def forward(self, imgs, mask=None, return_features=False, scale=2., **others):
        if mask is not None: imgs = imgs*mask
        out = scale*self.net(imgs)
        if return_features: return out, imgs
        return out


@torch.no_grad()
def test_other_arguments_have_their_defaults():
    net = Options().eval()
    x = images(3, 8)
    before = net(x)
    randomize(net)
    graph = trace(net)
    assert not torch.equal(net(x), before)
    assert same(graph(x), net(x), 1e-6)
    assert same(fold_batchnorm(net, x)(x), net(x))
    assert [n.name for n in graph.graph.nodes if n.op == 'placeholder'] == ['imgs']
    assert type(net) is Options


@pytest.mark.parametrize('where', ('before', 'behind'))
@torch.no_grad()
def test_hooks_of_the_model_itself_are_traced(where):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = images(3, 8)
    plain = net(x)
    if where == 'before':
        net.register_forward_pre_hook(lambda m, args: ((args[0]-.5)/.2,))
    else:
        net.register_forward_hook(lambda m, args, out: 3*out + 1)
    assert not same(plain, net(x), .1)
    assert same(trace(net)(x), net(x), 1e-6)
    assert same(fold_batchnorm(net, x)(x), net(x))


class Asks(nn.Module):
    "What it does depends on what it is given: no tensor while it is traced"
    def forward(self, x):
        if isinstance(x, torch.Tensor): x = (x-.5)/.2
        return x.mean(3).flatten(1)


def test_a_graph_that_answers_otherwise_is_refused():
    x = images(3, 8)
    net = Asks().eval()
    assert not same(trace(net)(x), net(x), .1), 'the case is worth looking at'
    with pytest.raises(TypeError, match='its graph answers otherwise'):
        fold_batchnorm(net, x)


class Slightly(nn.Module):
    "What it does depends a little on what it is given"
    def __init__(self, asks=True, inner=None, less=.03):
        super().__init__()
        self.less = less
        self.a, self.attention, self.head = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2), nn.Linear(8, 5)
        self.asks, self.inner = asks, inner

    def forward(self, x):
        y = self.a(x).relu().flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y)[0]
        if self.asks and isinstance(x, torch.Tensor): y = y*(1-self.less)
        if self.inner is None: return self.head(y.mean(1))
        with torch.autocast('cpu', self.inner):
            return self.head(self.attention(y, y, y)[0].mean(1)).float()


@pytest.mark.parametrize('less', (.03, .0006))
def test_a_graph_that_answers_a_little_otherwise_is_refused(less):
    torch.manual_seed(0)
    net = Slightly(less=less).eval()
    x = images(8, 8)
    assert same(trace(net)(x), net(x), .05), 'less than a tenth of the largest logit'
    with pytest.raises(TypeError, match='its graph answers otherwise'):
        fold_batchnorm(net, x)


@pytest.mark.parametrize('weights, inner', (
    (torch.float16, None), (torch.bfloat16, None), (torch.float64, None), (torch.float32, torch.bfloat16),
    (torch.float32, None)))
def test_what_rounding_changes_is_no_other_answer(weights, inner):
    torch.manual_seed(0)
    net = Slightly(False, inner).to(weights).eval()
    fold_batchnorm(net, images(8, 8).to(weights))


def _two_names(y):
    z = y
    z += 1.
    return y


def _sizes_are_no_tensors(y):
    n = k = y.shape[1]
    n += 1
    return y*k + n


def _chunks(y):
    a, b = y.chunk(2, 1)
    a.relu_(), b.mul_(2)
    return torch.cat([a, b], 1)


def _rows_first(y):
    rows = y.flatten(2)
    rows.relu_()
    return rows.view(y.shape[0], 4, -1, 1)


F = nn.functional
followed = dict(
    function=lambda y: (F.relu(y, inplace=True), y)[1], place=lambda y: (F.leaky_relu(y, .1, True), y)[1],
    torch_relu=lambda y: (torch.relu_(y), y)[1], named=lambda y: (F.hardtanh_(y, -.1, .1), y)[1],
    clamp=lambda y: (torch.clamp_(y, 0., .1), y)[1], method=lambda y: (y.relu_().mul_(2.), y)[1],
    out=lambda y: (torch.mul(y, .3, out=y), y)[1], read_again=lambda y: F.relu(y, inplace=True).mul_(.3) + y,
    new=lambda y: y*torch.empty_like(y).fill_(.5), alias=_two_names, number=_sizes_are_no_tensors,
    chunks=_chunks, rows=_rows_first)


class Between(nn.Module):
    "A network with a step between two layers"
    def __init__(self, step):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
        self.relu, self.step = nn.ReLU(inplace=True), step
        self.register_buffer('seen', torch.zeros(4))

    def forward(self, x):
        y = self.a(x)
        self.relu(y)
        y = self.b(y)
        self.relu(y)
        y = self.step(y - .1)
        self.seen.copy_(y.mean((0, 2, 3)))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize('how', followed)
@torch.no_grad()
def test_a_statement_that_writes_is_followed(how):
    torch.manual_seed(0)
    net = Between(followed[how]).eval()
    x = images()
    for graph in (trace(net), fold_batchnorm(net), trace(torch.export.export(net, (x,)).module())):
        assert torch.allclose(graph(x), net(x), atol=1e-6)


refused = dict(
    view=lambda y: (y.flatten(2), y.relu_())[0].unsqueeze(3), data=lambda y: (y.data.mul_(2.), y)[1],
    part=lambda y: (y[:, :2].mul_(3.), y)[1], before=lambda y: (y[:, :2], y.mul_(3.))[0].repeat(1, 2, 1, 1),
    more=lambda y: (y.unsqueeze(1).mul_(2.), y)[1], less=lambda y: (y.squeeze().clamp_(0, .1), y)[1],
    zero=lambda y: (y.zero_(), y)[1])


@pytest.mark.parametrize('how', refused)
def test_a_write_that_another_name_reads_is_refused_with_its_line(how):
    net = Between(refused[how]).eval()
    with pytest.raises(TypeError, match=r'line \d+ of test_graph.py is not: `\w+_` writes into'):
        trace(net)


class Remembers(Between):
    "Its answer depends on its last answer"
    def forward(self, x):
        y = self.a(x).mean((2, 3)) + self.seen
        self.seen.copy_(y.mean(0))
        return self.head(y)


class Assigns(Between):
    def forward(self, x):
        y = self.a(x)
        y.data = y.data*2
        return self.head(y.mean((2, 3)))


def test_what_a_call_leaves_for_the_next_is_refused():
    with pytest.raises(TypeError, match='as an earlier call left it'):
        trace(Remembers(torch.relu).eval())
    with pytest.raises(TypeError, match='assignment to `data`'):
        trace(Assigns(torch.relu).eval())


def test_complex_weights_are_stored_tensors():
    stored = stored_tensors(trace(Fourier().eval()))
    assert {k: v.role for k, v in stored.items()} == {
        'w': 'other', 'head.weight': 'weight', 'head.bias': 'bias'}


class Padded(nn.Conv2d):
    "A convolution of somebody else, whose layers are found out by asking it"
    def forward(self, x): return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_looking_at_layers_is_not_asking_the_model():
    net = nn.Sequential(Padded(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = torch.rand(2, 3, 8, 8)
    with count_passes() as passes:
        trace(net)
        fold_batchnorm(net, x)
        net(x)
    assert (passes.forward, passes.backward) == (2, 0)
