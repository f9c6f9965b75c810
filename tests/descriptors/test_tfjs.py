"""Graph models of TensorFlow.js and frozen graphs, written here with numbers that are known and
computed again by loops and by plain numpy."""
import base64, json, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robustnb.descriptors.ridge_students import FileFeatures
from robustnb.descriptors.tfjs import load_frozen, load_tfjs, tfjs_weights

rng = np.random.default_rng(0)


def text(s): return {'s': base64.b64encode(s.encode()).decode()}
def numbers(*v): return {'list': {'i': [str(o) for o in v]}}
def texts(*v): return {'list': {'s': [text(o)['s'] for o in v]}}
def strides(s): return numbers(1, s, s, 1)
def node(op, name, *inputs, **attr): return dict(op=op, name=name, input=list(inputs), attr=attr)
def normal(*shape): return rng.normal(size=shape).astype(np.float32)


def image(side=4):
    dims = [dict(size=str(o)) for o in (-1, side, side, 3)]
    return node('Placeholder', 'image', shape={'shape': {'dim': dims}})


def write(folder, nodes, weights=(), side=4, groups=None):
    weights = dict(weights)
    entries = [dict(name=k, shape=list(v.shape), dtype=str(v.dtype)) for k, v in weights.items()]
    groups = groups or [dict(paths=['w.bin'], weights=entries)]
    (folder/'w.bin').write_bytes(b''.join(v.tobytes() for v in weights.values()))
    nodes = [node('Const', k) for k in weights] + list(nodes) + [image(side)]
    said = dict(modelTopology=dict(node=nodes), weightsManifest=groups)
    (folder/'model.json').write_text(json.dumps(said))
    return folder/'model.json'


def answers(folder, x, nodes, **weights):
    return load_tfjs(write(folder, nodes, weights, x.shape[-1]), nodes[-1]['name'])(x).numpy()


def photos(side=4, n=2): return torch.from_numpy(rng.random((n, 3, side, side))).float()
def last(x): return 255*x.permute(0, 2, 3, 1).numpy()


def slow_conv(x, kernel, stride, same, depthwise=False):
    "Images (N,H,W,C), one output pixel after the other, on zeros that are laid around first"
    h, w, n_in, n_out = kernel.shape
    side = x.shape[1]
    rows = math.ceil(side/stride) if same else (side-h)//stride + 1
    before = max((rows-1)*stride + h - side, 0)//2 if same else 0
    wide = np.zeros((len(x), side + 20, side + 20, n_in))
    wide[:, before:before+side, before:before+side] = x
    out = np.zeros((len(x), rows, rows, n_in*n_out if depthwise else n_out))
    for i, j in np.ndindex(rows, rows):
        seen = wide[:, i*stride:i*stride+h, j*stride:j*stride+w]
        if depthwise:
            out[:, i, j] = np.einsum('nabc,abcm->ncm', seen, kernel).reshape(len(x), -1)
        else:
            out[:, i, j] = np.einsum('nabc,abco->no', seen, kernel)
    return out


@pytest.mark.parametrize('side', [5, 6, 7, 8])
@pytest.mark.parametrize('size, stride', [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (5, 2)])
@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize('op, n_out', [('Conv2D', 4), ('DepthwiseConv2dNative', 2)])
def test_convolutions_are_those_of_loops(tmp_path, side, size, stride, padding, op, n_out):
    x = photos(side)
    kernel = normal(size, size, 3, n_out)
    conv = node(op, 'y', 'image', 'k', padding=text(padding), strides=strides(stride),
                data_format=text('NHWC'), dilations=numbers(1, 1, 1, 1))
    expected = slow_conv(last(x), kernel, stride, padding == 'SAME', op[0] == 'D')
    got = answers(tmp_path, x, [conv], k=kernel)
    np.testing.assert_allclose(got, expected.reshape(2, -1), rtol=1e-4, atol=1e-3)


def test_a_filter_that_is_not_square_is_padded_per_direction(tmp_path):
    x = photos(5)
    conv = node('Conv2D', 'y', 'image', 'k', padding=text('SAME'), strides=strides(1))
    kernel = normal(1, 3, 3, 1)
    square = np.zeros((3, 3, 3, 1), np.float32)
    square[1] = kernel[0]
    np.testing.assert_allclose(answers(tmp_path, x, [conv], k=kernel),
                               answers(tmp_path, x, [conv], k=square), atol=1e-3)


@pytest.mark.parametrize('op, function', [
    ('Abs', np.abs), ('Neg', np.negative), ('Relu', lambda v: np.maximum(v, 0)), ('Square', np.square),
    ('Relu6', lambda v: np.clip(v, 0, 6)), ('Identity', lambda v: v),
    ('Sigmoid', lambda v: 1/(1+np.exp(-v))), ('Sqrt', lambda v: np.sqrt(np.abs(v))),
    ('Rsqrt', lambda v: 1/np.sqrt(np.abs(v))),
    ('Softmax', lambda v: np.exp(v)/np.exp(v).sum(-1, keepdims=True))])
def test_functions_of_one_value(tmp_path, op, function):
    x = photos()
    shift = np.float32([100])
    nodes = [node('Sub', 'a', 'image', 'shift'), node('Mul', 'b', 'a', 'tenth')]
    nodes += [node('Abs', 'c', 'b')] if 'qrt' in op else []
    nodes.append(node(op, 'y', nodes[-1]['name']))
    got = answers(tmp_path, x, nodes, shift=shift, tenth=np.float32([.1]))
    np.testing.assert_allclose(got, function((last(x)-100)*.1).reshape(2, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('op, function', [
    ('Add', np.add), ('AddV2', np.add), ('BiasAdd', np.add), ('Sub', np.subtract),
    ('Mul', np.multiply), ('RealDiv', np.divide), ('Maximum', np.maximum),
    ('Minimum', np.minimum)])
def test_functions_of_two_values_take_one_number_per_channel(tmp_path, op, function):
    x = photos()
    b = np.float32([50, 100, 150])
    got = answers(tmp_path, x, [node(op, 'y', 'image', 'b')], b=b)
    np.testing.assert_allclose(got, function(last(x), b).reshape(2, -1), rtol=1e-5)
    turned = answers(tmp_path, x, [node(op, 'y', 'b', 'image:0')], b=b)
    np.testing.assert_allclose(turned, function(b, last(x)).reshape(2, -1), rtol=1e-5)


def test_prelu_has_one_slope_per_channel(tmp_path):
    x = photos()
    slope = np.float32([0, .5, 2])
    v = last(x) - 100
    got = answers(tmp_path, x, [node('Sub', 'a', 'image', 'b'), node('Prelu', 'y', 'a', 'slope')],
                  b=np.float32([100]), slope=slope)
    np.testing.assert_allclose(got, np.where(v > 0, v, slope*v).reshape(2, -1), rtol=1e-4, atol=1e-4)


def test_axes_shapes_and_order_are_those_of_tensorflow(tmp_path):
    x = photos()
    v = last(x)
    mean = [node('Mean', 'y', 'image', 'axes', keep_dims={'b': False})]
    np.testing.assert_allclose(answers(tmp_path, x, mean, axes=np.int32([1, 2])), v.mean((1, 2)), rtol=1e-5)
    total = [node('Sum', 's', 'image', 'axes', keep_dims={'b': True}), node('RealDiv', 'y', 'image', 's')]
    np.testing.assert_allclose(answers(tmp_path, x, total, axes=np.int32([-1])),
                               (v/v.sum(3, keepdims=True)).reshape(2, -1), rtol=1e-5)
    pad = [node('Pad', 'y', 'image', 'width')]
    width = np.int32([[0, 0], [1, 2], [3, 0], [0, 0]])
    np.testing.assert_allclose(answers(tmp_path, x, pad, width=width), np.pad(v, width).reshape(2, -1))
    shaped = [node('Reshape', 'r', 'image', 'shape'), node('MatMul', 'y', 'r', 'm')]
    m = normal(48, 5)
    np.testing.assert_allclose(answers(tmp_path, x, shaped, shape=np.int32([-1, 48]), m=m),
                               v.reshape(2, 48) @ m, rtol=1e-4, atol=1e-2)
    squeezed = [node('Sum', 's', 'image', 'axes', keep_dims={'b': True}),
                node('Squeeze', 'z', 's', squeeze_dims=numbers(1, 2)),
                node('MatMul', 'y', 'z', 'm', transpose_b={'b': True})]
    m = normal(5, 3)
    np.testing.assert_allclose(answers(tmp_path, x, squeezed, axes=np.int32([1, 2]), m=m),
                               v.sum((1, 2)) @ m.T, rtol=1e-4, atol=1e-2)


def test_what_is_fused_comes_in_the_order_that_is_said(tmp_path):
    x = photos(6)
    kernel = normal(3, 3, 3, 2)
    b = np.float32([300, -300])
    slope = np.float32([.5, 2])
    plain = slow_conv(last(x), kernel, 2, True) + b
    said = dict(padding=text('SAME'), strides=strides(2))
    def got(*fused, **weights):
        conv = node('_FusedConv2D', 'y', 'image', *weights, fused_ops=texts(*fused), **said)
        return answers(tmp_path, x, [conv], **weights)
    np.testing.assert_allclose(got('BiasAdd', k=kernel, b=b), plain.reshape(2, -1), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(got('BiasAdd', 'Relu6', k=kernel, b=b), plain.clip(0, 6).reshape(2, -1),
                               rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(got('BiasAdd', 'Prelu', k=kernel, b=b, slope=slope),
                               np.where(plain > 0, plain, slope*plain).reshape(2, -1), rtol=1e-4, atol=1e-2)
    deep = node('FusedDepthwiseConv2dNative', 'y', 'image', 'k', 'b', fused_ops=texts('BiasAdd', 'Relu'),
                **said)
    slow = np.maximum(slow_conv(last(x), kernel, 2, True, True) + np.tile(b, 3), 0)
    np.testing.assert_allclose(answers(tmp_path, x, [deep], k=kernel, b=np.tile(b, 3)), slow.reshape(2, -1),
                               rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('dtype, kind', [('uint8', np.uint8), ('uint16', np.uint16)])
def test_rounded_weights_are_steps_from_a_least_value(tmp_path, dtype, kind):
    raw = rng.integers(200, size=(3, 2)).astype(kind)
    rounded = dict(dtype=dtype, scale=.25, min=-7.)
    entries = [dict(name='a', shape=[3, 2], dtype='float32', quantization=rounded),
               dict(name='b', shape=[3, 2], dtype='int32', quantization=rounded | dict(min=0.))]
    groups = [dict(paths=['w.bin'], weights=entries)]
    read = tfjs_weights(write(tmp_path, [], dict(a=raw, b=raw), groups=groups))
    np.testing.assert_array_equal(read['a'].numpy(), (-7 + raw/4).astype(np.float32))
    assert read['b'].dtype == torch.int32
    np.testing.assert_array_equal(read['b'].numpy(), np.round(raw/4))


def test_half_precision_and_weights_over_several_files(tmp_path):
    a = rng.normal(size=5).astype(np.float16)
    b = normal(2, 2)
    raw = a.tobytes() + b.tobytes()
    for k, part in enumerate((raw[:7], raw[7:])):
        (tmp_path/f'{k}.bin').write_bytes(part)
    half = dict(name='a', shape=[5], dtype='float32', quantization=dict(dtype='float16'))
    groups = [dict(paths=['0.bin', '1.bin'], weights=[half, dict(name='b', shape=[2, 2], dtype='float32')]),
              dict(paths=['w.bin'], weights=[dict(name='c', shape=[], dtype='int32')])]
    read = tfjs_weights(write(tmp_path, [], dict(c=np.array(7, np.int32)), groups=groups))
    np.testing.assert_array_equal(read['a'].numpy(), a.astype(np.float32))
    np.testing.assert_array_equal(read['b'].numpy(), b)
    assert read['c'] == 7


@pytest.mark.parametrize('paths, dtype, problem', [
    (['../w.bin'], 'float32', r"beside it; got '\.\./w\.bin'"), (['w.bin'], 'string', "'a' is string"),
    (['w.bin'], 'int32', 'w.bin have 16 bytes for 8'), (['w.bin', 'w.bin'], 'float32', '32 bytes')])
def test_weights_that_are_wrong(tmp_path, paths, dtype, problem):
    groups = [dict(paths=paths, weights=[dict(name='a', shape=[2], dtype=dtype)])]
    path = write(tmp_path, [], dict(a=normal(4)), groups=groups)
    with pytest.raises(ValueError, match=problem):
        tfjs_weights(path)


def test_images_are_resized_turned_and_scaled_as_said(tmp_path):
    x = photos(9)
    path = write(tmp_path, [node('Identity', 'y', 'image')])
    small = F.interpolate(x, (4, 4), mode='bilinear', antialias=True)
    said = dict(mean=[10., 20., 30.], std=2.)
    turned = load_tfjs(path, bgr=True, **said)
    np.testing.assert_allclose(turned(x).numpy(), (last(small[:, [2, 1, 0]]) - np.float32(said['mean']))
                               .reshape(2, -1)/2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_tfjs(path, **said)(x), turned(x))
    assert not turned.training


def test_gradients_reach_the_pixels_and_only_those(tmp_path):
    conv = node('Conv2D', 'c', 'image', 'k', padding=text('SAME'), strides=strides(2))
    nodes = [node('Square', 'd', 'c'), node('Mean', 'y', 'd', 'axes'), conv]
    path = write(tmp_path, nodes, dict(k=normal(3, 3, 3, 2), axes=np.int32([1, 2])))
    net = load_tfjs(path).double()
    assert not list(net.parameters())
    x = photos(7, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(net, x)


def test_only_what_the_output_needs_is_read(tmp_path):
    nodes = [node('Roll', 'z', 'y'), node('Abs', 'y', 'a'), node('Neg', 'a', 'image', '^w'),
             node('Square', 'w', 'image')]
    x = photos()
    path = write(tmp_path, nodes)
    np.testing.assert_array_equal(load_tfjs(path, 'y')(x).numpy(), last(x).reshape(2, -1))
    with pytest.raises(ValueError, match="'z' is a Roll. Known are .*black box"):
        load_tfjs(path, 'z')
    with pytest.raises(ValueError, match="got 'image'"):
        load_tfjs(path, 'image')
    with pytest.raises(ValueError, match='got None. The graph ends in z, v;'):
        load_tfjs(write(tmp_path, [*nodes, node('Abs', 'v', 'w')]))


@pytest.mark.parametrize('nodes, problem', [
    ([node('Conv2D', 'y', 'image', 'k', padding=text('EXPLICIT'))], 'has padding EXPLICIT'),
    ([node('Conv2D', 'y', 'image', 'k', data_format=text('NCHW'))], 'has data_format NCHW'),
    ([node('Conv2D', 'y', 'image', 'k', dilations=numbers(1, 2, 2, 1))], 'has dilations 2'),
    ([node('_FusedConv2D', 'y', 'image', 'k', fused_ops=texts('BiasAdd', 'Elu'))], 'has fused_ops Elu'),
    ([node('Squeeze', 'y', 'image')], 'squeezes no axes'),
    ([node('Abs', 'y', 'nowhere')], "'nowhere' is missing"),
    ([node('Add', 'y', 'image', 'two'), image() | dict(name='two')], 'inputs .*4.*4'),
    ([node('Add', 'y', 'image', 'c'), node('Const', 'c')], "'c' has none"),
    ([node('Abs', 'y', 'k')], r'inputs \[\]')])
def test_a_graph_that_cannot_be_followed_is_refused(tmp_path, nodes, problem):
    with pytest.raises(ValueError, match=problem):
        load_tfjs(write(tmp_path, nodes, dict(k=normal(1, 1, 3, 1))), 'y')


def test_a_layers_model_is_refused(tmp_path):
    path = write(tmp_path, [])
    path.write_text(json.dumps(dict(modelTopology=dict(model_config={}), weightsManifest=[])))
    with pytest.raises(ValueError, match='tensorflowjs_converter'):
        load_tfjs(path)


def varint(n):
    out = []
    n %= 2**64
    while n > 127:
        out.append(n % 128 + 128)
        n //= 128
    return bytes(out + [n])


def field(number, value):
    "One field of a protocol buffer: bytes and words with their length, numbers as they are"
    if isinstance(value, int): return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape(*dims): return b''.join(field(2, field(1, o)) for o in dims)
def whole(*v): return field(1, b''.join(field(3, o) for o in v))
def packed(*v): return field(1, field(3, b''.join(map(varint, v))))


def frozen(op, name, *inputs, **attr):
    entries = b''.join(field(5, field(1, k) + field(2, v)) for k, v in attr.items())
    return field(1, field(1, name) + field(2, op) + b''.join(field(3, o) for o in inputs) + entries)


def constant(name, v):
    content = field(1, {'f': 1, 'i': 3}[v.dtype.kind]) + field(2, shape(*v.shape)) + field(4, v.tobytes())
    return frozen('Const', name, value=field(8, content), dtype=field(6, 1))


def taken(batch=-1, side=6):
    return frozen('Placeholder', 'image', shape=field(7, shape(batch, side, side, 3)))


@pytest.mark.parametrize('listed', [whole, packed])
def test_a_frozen_graph_of_the_layers_that_facenet_has(tmp_path, listed):
    kernel = normal(3, 3, 3, 4)
    gain, shift, mean = normal(3, 4)
    var = rng.random(4).astype(np.float32)
    pool = dict(ksize=listed(1, 2, 2, 1), strides=listed(1, 2, 2, 1), padding=field(2, 'VALID'))
    raw = b''.join([
        frozen('ConcatV2', 'both', 'most', 'mean', 'axis'),
        frozen('Conv2D', 'c', 'image:0', 'k', strides=listed(1, 1, 1, 1), padding=field(2, 'SAME')),
        frozen('FusedBatchNorm', 'n', 'c', 'gain', 'shift', 'center', 'var', is_training=field(5, 0),
               epsilon=varint(4 << 3 | 5) + np.float32([.01]).tobytes()),
        frozen('MaxPool', 'most', 'n', **pool), frozen('AvgPool', 'mean', 'n', **pool),
        frozen('Sum', 'sum', 'both', 'axes', keep_dims=field(5, 1)), frozen('RealDiv', 'y', 'both', 'sum'),
        constant('k', kernel), constant('gain', gain), constant('shift', shift), constant('center', mean),
        constant('var', var), constant('axis', np.array(3, '<i4')), constant('axes', np.int32([3])), taken()])
    (tmp_path/'g.pb').write_bytes(raw)
    x = photos(6)
    v = (slow_conv(last(x), kernel, 1, True)-mean)/np.sqrt(var + .01)*gain + shift
    blocks = v.reshape(2, 3, 2, 3, 2, 4)
    both = np.concatenate([blocks.max((2, 4)), blocks.mean((2, 4))], 3)
    expected = both/both.sum(3, keepdims=True)
    np.testing.assert_allclose(load_frozen(tmp_path/'g.pb')(x).numpy(), expected.reshape(2, -1), rtol=.01,
                               atol=1e-3)


def test_a_file_made_for_one_image_takes_several(tmp_path):
    raw = [taken(1), constant('shape', np.int32([1, -1])), frozen('Reshape', 'y', 'image', 'shape')]
    (tmp_path/'g.pb').write_bytes(b''.join(raw))
    x = photos(6, 3)
    np.testing.assert_array_equal(load_frozen(tmp_path/'g.pb')(x).numpy(), last(x).reshape(3, -1))


def test_constants_said_in_other_ways(tmp_path):
    few = field(1, 1) + field(2, shape(3)) + varint(5 << 3 | 5) + np.float32([2]).tobytes()
    axes = field(1, 3) + field(2, shape(2)) + field(7, varint(1) + varint(-2))
    raw = [taken(), frozen('Const', 'two', value=field(8, few)),
           frozen('Const', 'axes', value=field(8, axes)),
           frozen('Mul', 'm', 'image', 'two'), frozen('Mean', 'y', 'm', 'axes')]
    (tmp_path/'g.pb').write_bytes(b''.join(raw))
    x = photos(6)
    np.testing.assert_allclose(load_frozen(tmp_path/'g.pb')(x).numpy(), 2*last(x).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize('raw', [b'', b'no graph at all', bytes(50), b'\xff'*50,
                                 (taken() + frozen('Abs', 'y', 'image'))[:-3],
                                 taken() + frozen('Const', 'c', value=field(8, field(1, 7) + field(2, b'')))])
def test_what_is_no_frozen_graph(tmp_path, raw):
    (tmp_path/'g.pb').write_bytes(raw)
    with pytest.raises(ValueError, match='g.pb cannot be read'):
        load_frozen(tmp_path/'g.pb')


def test_pools_that_are_padded_are_refused(tmp_path):
    pool = frozen('MaxPool', 'y', 'image', ksize=whole(1, 2, 2, 1), strides=whole(1, 2, 2, 1),
                  padding=field(2, 'SAME'))
    (tmp_path/'g.pb').write_bytes(taken() + pool)
    with pytest.raises(ValueError, match="'y' has padding SAME. Known are VALID"):
        load_frozen(tmp_path/'g.pb')


def test_a_frozen_graph_as_features_sees_the_pixels_that_were_meant(tmp_path):
    raw = [taken(1), constant('shape', np.int32([1, -1])), frozen('Reshape', 'y', 'image', 'shape')]
    (tmp_path/'g.pb').write_bytes(b''.join(raw))
    x = photos(6, 3)
    theirs = load_frozen(tmp_path/'g.pb', mean=127.5, std=128.)(x)
    ours = FileFeatures(tmp_path/'g.pb', 6, mean=127.5, std=128.)(x)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)
    assert ours.abs().max() <= 1
