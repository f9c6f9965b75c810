"Networks from files of ONNX and torch.export: their logits, their layers, what is refused"
import json
import warnings
import zipfile
import pytest
import torch
import torchvision
from torch import nn

from helpers_models import images, needs
from robustnb.models.exchange import read_exported, read_onnx
from robustnb.models.loading import load_model
from robustnb.models.wrapping import model_name
from robustnb.quant.ptq import quantize

any_batch = ({0: torch.export.Dim('batch')},)


class Odd(nn.Module):
    "Operations that classifiers use, one after the other"
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(),
                                   nn.ConvTranspose2d(8, 8, 2, 2), nn.GroupNorm(2, 8), nn.SiLU(),
                                   nn.AvgPool2d(2), nn.PReLU(8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        x = x * x.mean((2, 3), keepdim=True).sigmoid()
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.mix(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(nn.functional.gelu(x[:, 0]))


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Odd() if kind is Odd else kind(num_classes=5)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(.5, 2)
    return net.eval()


def write(net, path, form, x):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if form == 'pt2':
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=any_batch), path)
        elif form == 'onnx':
            torch.onnx.export(net, (x,), path, dynamic_shapes=any_batch, verbose=False)
        else:
            torch.onnx.export(net, (x[:1],), path, dynamo=False, input_names=['x'],
                              dynamic_axes=dict(x={0: 'n'}))


@pytest.mark.parametrize('kind, form', (pytest.param(Odd, 'pt2', marks=needs('torch', 2, 9)),
                                        (Odd, 'onnx'), (Odd, 'old.onnx'),
                                        (torchvision.models.resnet18, 'old.onnx')))
def test_the_same_logits_from_layers_that_can_be_rounded(tmp_path, kind, form):
    net = made(kind)
    x = images(3, 32)
    path = tmp_path/f'net.{form}'
    write(net, path, form, x)
    model = load_model(path, mean=(0, 0, 0), std=(1, 1, 1))
    right = net(x)
    assert (model(x) - right).abs().max() < 1e-5*max(1, right.abs().max())
    assert (model(x[:1]) - right[:1]).abs().max() < 1e-5*max(1, right.abs().max())
    assert (model.n_classes, model.image_size, model_name(model)) == (5, 32, path.stem)
    copy = quantize(model, 'INT8', x)
    assert not copy.opaque
    assert (copy(x) - right).square().mean() < .05*right.var()
    if kind is torchvision.models.resnet18:
        assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20
    with pytest.raises(ValueError, match='`mean` must be given'):
        load_model(path)
    with pytest.raises(ValueError, match='`name` must be left out'):
        load_model('timm:resnet18', path)


def test_a_fixed_batch_is_named(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval()
    torch.export.save(torch.export.export(net, (torch.rand(2, 3, 5, 5),)), tmp_path/'a.pt2')
    with pytest.raises(ValueError, match='for a batch of 2 only'):
        read_exported(tmp_path/'a.pt2')

    class Row(nn.Module):
        def forward(self, x): return x.sum((2, 3)).reshape(1, 3)
    torch.onnx.export(Row(), (torch.rand(1, 3, 5, 5),), tmp_path/'a.onnx', dynamo=False)
    with pytest.raises(ValueError, match='batches of any length'):
        read_onnx(tmp_path/'a.onnx')


@needs('torch', 2, 9)
def test_formulas_in_a_program_are_not_evaluated(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval()
    path = tmp_path/'a.pt2'
    write(net, path, 'pt2', torch.rand(3, 3, 5, 5))
    with zipfile.ZipFile(path) as z:
        held = {o: z.read(o) for o in z.namelist()}
    name = next(o for o in held if o.endswith('model.json'))
    hostile = json.dumps("__import__('os').system('true')")[1:-1].encode()
    held[name] = held[name].replace(b"Symbol('", hostile + b" + Symbol('")
    with zipfile.ZipFile(path, 'w') as z:
        for o, v in held.items():
            z.writestr(o, v)
    with pytest.raises(ValueError, match='plain arithmetic'):
        read_exported(path)


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path/'a.onnx'
    path.write_bytes(b'\x08\x07damaged')
    with pytest.raises(ValueError, match='sound ONNX model'):
        load_model(path, mean=.5, std=.5)
    path.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='must be an ONNX model'):
        load_model(path, mean=.5, std=.5)
    torch.jit.trace(nn.Conv2d(3, 2, 1).eval(), torch.rand(1, 3, 4, 4)).save(str(tmp_path/'t.pt'))
    with pytest.raises(ValueError, match='is TorchScript'):
        load_model('ResNet_18', tmp_path/'t.pt')


def onnx_file(path, opset, *middle, **held):
    "A convolution, the nodes (from 'c' to 'm'), and a head over the mean of each channel"
    onnx = pytest.importorskip('onnx', reason='onnx is not installed')
    draw = torch.Generator().manual_seed(0)
    held |= dict(w=torch.randn(6, 3, 3, 3, generator=draw), head=torch.randn(6, 5, generator=draw))
    node = onnx.helper.make_node
    nodes = [node('Conv', ['x', 'w'], ['c'], pads=[1]*4),
             *(node(kind, inputs, [out], **how) for kind, inputs, out, how in middle),
             node('GlobalAveragePool', ['m'], ['p']), node('Flatten', ['p'], ['f']),
             node('MatMul', ['f', 'head'], ['y'])]
    told = lambda name, *shape: onnx.helper.make_tensor_value_info(name, 1, shape)
    arrays = [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in held.items()]
    graph = onnx.helper.make_graph(nodes, 'g', [told('x', 'n', 3, 8, 8)], [told('y', 'n', 5)], arrays)
    onnx.save(onnx.helper.make_model(graph, ir_version=8,
                                     opset_imports=[onnx.helper.make_opsetid('', opset)]), path)
    return path


def engine(path, x):
    ort = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


@pytest.mark.parametrize('opset, how', ((11, dict(axis=1)), (11, {}), (12, dict(axis=2)), (11, dict(axis=3)),
                                        (13, dict(axis=1)), (13, {})))
def test_the_axis_of_a_softmax_means_what_it_did_in_the_version_of_the_file(tmp_path, opset, how):
    x = images(3, 8)
    path = onnx_file(tmp_path/'net.onnx', opset, ('Softmax', ['c'], 's', how), ('Mul', ['s', 'c'], 'm', {}))
    net = read_onnx(path)[0]
    assert (net(x)-engine(path, x)).abs().max() < 1e-5
    z = torch.nn.functional.conv2d(x, net.get_submodule('Conv2d_1').weight, padding=1)
    axis = how.get('axis', 1 if opset < 13 else -1)
    flat = z.flatten(axis) if opset < 13 else z
    by_hand = flat.softmax(axis).view_as(z)*z
    head = next(m for m in net.modules() if isinstance(m, nn.Linear)).weight
    assert (net(x)-by_hand.mean((2, 3)) @ head.T).abs().max() < 1e-5


@pytest.mark.parametrize('how, sizes', ((dict(antialias=1), (4, 4)), (dict(scale=1.3), None),
                                        (dict(axes=[2, 3], keep_aspect_ratio_policy='not_larger'), (4, 2))))
def test_a_resize_that_torch_does_otherwise_is_refused(tmp_path, how, sizes):
    how = dict(how)
    scale = torch.tensor([1, 1] + [how.pop('scale', .5)]*2)
    by_size = [torch.tensor(sizes if 'axes' in how else (1, 6, *sizes))] if sizes else []
    inputs, held = (['c', '', '', 'k'], dict(k=by_size[0])) if sizes else (['c', '', 'k'], dict(k=scale))
    path = onnx_file(tmp_path/'net.onnx', 18, ('Resize', inputs, 'r', dict(how, mode='linear')),
                     ('Relu', ['r'], 'm', {}), **held)
    with pytest.raises(ValueError, match='has Resize'):
        read_onnx(path)


@needs('onnxruntime', 1, 24)
def test_a_resize_of_some_axes_is_read(tmp_path):
    x = images(3, 8)
    resize = 'Resize', ['c', '', '', 'k'], 'r', dict(mode='linear', axes=[-2, 3])
    path = onnx_file(tmp_path/'net.onnx', 18, resize, ('Relu', ['r'], 'm', {}), k=torch.tensor([4, 16]))
    assert (read_onnx(path)[0](x)-engine(path, x)).abs().max() < 1e-5


def test_what_is_misread_is_an_error_and_no_network(tmp_path, monkeypatch):
    from robustnb.models import exchange
    path = onnx_file(tmp_path/'net.onnx', 13, ('Relu', ['c'], 'm', {}))
    engine(path, images(2, 8))
    read_onnx(path)
    monkeypatch.setitem(exchange._operations, 'Relu', lambda at, said, x: at.layer(nn.Hardtanh(), x))
    with pytest.raises(ValueError, match='answers otherwise, by up to'):
        read_onnx(path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    torch.export.save(torch.export.export(net, (images(2, 8),), dynamic_shapes=any_batch), tmp_path/'net.pt2')
    read_exported(tmp_path/'net.pt2')
    monkeypatch.setitem(exchange._F, 'relu', torch.nn.functional.hardtanh)
    with pytest.raises(ValueError, match='answers otherwise, by up to'):
        read_exported(tmp_path/'net.pt2')


def test_what_is_misread_by_a_little_is_an_error_too(tmp_path, monkeypatch):
    from robustnb.models import exchange
    path = onnx_file(tmp_path/'net.onnx', 13, ('Relu', ['c'], 'm', {}))
    engine(path, images(2, 8))
    monkeypatch.setitem(exchange._operations, 'Relu', lambda at, said, x: at.layer(nn.LeakyReLU(2e-3), x))
    with pytest.raises(ValueError, match='answers otherwise, by up to'):
        read_onnx(path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    torch.export.save(torch.export.export(net, (images(2, 8),), dynamic_shapes=any_batch), tmp_path/'net.pt2')
    monkeypatch.setitem(exchange._F, 'relu', lambda x: torch.nn.functional.leaky_relu(x, 2e-3))
    with pytest.raises(ValueError, match='answers otherwise, by up to'):
        read_exported(tmp_path/'net.pt2')


class Casts(nn.Module):
    "Sixteen grey levels, by way of whole numbers"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)
    def forward(self, x): return self.head((x.float()*16).to(torch.uint8).float().flatten(1)/16)


def test_a_cast_to_whole_numbers_is_read_as_one(tmp_path):
    net = Casts().eval()
    x = images(3, 8)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=any_batch), tmp_path/'net.pt2')
    assert (read_exported(tmp_path/'net.pt2')[0](x)-net(x)).abs().max() < 1e-6
    assert (net(x)-net.head(x.flatten(1))).abs().max() > 1e-3, 'the case is worth looking at'


def test_the_largest_of_a_map_in_a_program(tmp_path):
    "The program returns places too, and takes the first of both"
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    write(net, tmp_path/'net.pt2', 'pt2', images(3, 16))
    x = images(4, 16)
    assert (read_exported(tmp_path/'net.pt2')[0](x) - net(x)).abs().max() < 1e-5
