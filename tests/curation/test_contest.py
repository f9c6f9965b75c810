"""The contest's trainer against a plain loop, its networks against functional definitions, and a
validator that runs nothing it reads."""
import copy, io, math, pickle, random, zipfile
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustnb import archives
from robustnb.curation import contest as C
from robustnb.curation.contest import (
    contest_network, contest_networks, contest_train, default_config, load_set, read_config,
    validate_set, write_config, pack_training_set)
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import load_state, save_state
from robustnb.data import digits, ImageSet, subset
from robustnb.models.wrapping import Normalized
from robustnb.models.graph import trace

SGD = dict(epochs=4, optimizer_name='SGD', optimizer_hyperparameters=dict(lr=.05, momentum=.9),
           scheduler_name=None, scheduler_hyperparameters={}, batch_size=16)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(): return subset(digits('train'), 50, seed=0)


def tiny():
    "Linear in 4x4 means, so that an epoch takes milliseconds"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Normalized(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)),
                          C._mean, C._std, 32)


def same(a, b):
    return (a.state_dict().keys() == b.state_dict().keys()
            and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()))


def facts(history): return history.drop(columns='seconds')


# ---- networks

def reference(name, x, state):
    "The four networks as formulas; tensors are taken from `state` one after the other"
    left = iter(state)

    def conv(x, stride=1):
        w = next(left)
        return F.conv2d(x, w, stride=stride, padding=w.shape[2]//2)

    def bn(x):
        w, b, mean, var, _ = (next(left) for _ in range(5))
        return ((x-mean[:, None, None])/(var[:, None, None]+1e-5).sqrt()*w[:, None, None]
                + b[:, None, None])

    def preact(x, stride, changed):
        a = bn(x).relu()
        out = conv(bn(conv(a, stride)).relu())
        return out + (conv(a, stride) if changed else x)

    def bottleneck(x, stride, changed):
        out = bn(conv(bn(conv(bn(conv(x)).relu(), stride)).relu()))
        return (out + (bn(conv(x, stride)) if changed else x)).relu()

    mean = torch.tensor([.4914, .4822, .4465]).view(3, 1, 1)
    std = torch.tensor([.2023, .1994, .2010]).view(3, 1, 1)
    x = (x-mean)/std
    x = conv(x)
    if name == 'resnet50':
        x = bn(x).relu()
        for n, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
            for j in range(n):
                x = bottleneck(x, 1 if j else stride, j == 0)
    elif name == 'densenet121':
        for group, n in enumerate((6, 12, 24, 16)):
            if group:
                x = F.avg_pool2d(conv(bn(x).relu()), 2)
            for _ in range(n):
                x = torch.cat([conv(bn(conv(bn(x).relu())).relu()), x], 1)
        x = bn(x).relu()
    elif name == 'preactresnet18':
        for stride in (1, 2, 2, 2):
            for j in range(2):
                x = preact(x, 1 if j else stride, j == 0 and stride > 1)
    else:
        for stride in (1, 2, 2):
            for j in range(4):
                x = preact(x, 1 if j else stride, j == 0)
        x = bn(x).relu()
    out = F.linear(x.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    return out


@pytest.mark.parametrize('name', contest_networks)
def test_a_network_computes_its_formula_in_the_order_of_the_organisers_weights(name):
    net = contest_network(name, width=.125)
    g = make_generator(1)
    with torch.no_grad():
        for k, v in net.net.state_dict().items():
            if v.ndim == 1 and v.is_floating_point():
                v.copy_(torch.rand(v.shape, generator=g) + .5)
        x = torch.rand(3, 3, 32, 32, generator=g)
        want = reference(name, x, net.net.state_dict().values())
        assert want.std() > 0
        assert torch.allclose(net(x), want, rtol=1e-3, atol=1e-4*want.abs().max().item())
        assert torch.allclose(trace(net)(x), net(x))
        assert not net.training


def count(name):
    "Parameters at width 1 by arithmetic"
    bn = lambda c: 2*c
    conv = lambda i, o, k=3: i*o*k*k
    if name == 'resnet50':
        total = conv(3, 64) + bn(64)
        i = 64
        for n, w in ((3, 64), (4, 128), (6, 256), (3, 512)):
            for j in range(n):
                total += conv(i, w, 1) + conv(w, w) + conv(w, 4*w, 1) + bn(w)*2 + bn(4*w)
                total += 0 if j else conv(i, 4*w, 1) + bn(4*w)
                i = 4*w
    elif name == 'densenet121':
        total = conv(3, 24)
        i = 24
        for k, n in enumerate((6, 12, 24, 16)):
            for _ in range(n):
                total = total + bn(i) + conv(i, 48, 1) + bn(48) + conv(48, 12)
                i = i+12
            if k < 3:
                total = total + bn(i) + conv(i, i//2, 1)
                i = i//2
        total += bn(i)
    else:
        wide = name == 'wideresnet'
        stem, *widths = (16, 64, 128, 256) if wide else (64, 64, 128, 256, 512)
        total = conv(3, stem)
        i = stem
        for o in widths:
            for j in range(4 if wide else 2):
                total += bn(i) + conv(i, o) + bn(o) + conv(o, o) + (conv(i, o, 1) if i != o else 0)
                i = o
        total += bn(i) if name == 'wideresnet' else 0
    return total + 10*i + 10


@pytest.mark.parametrize('name, millions', dict(resnet50=23.5, densenet121=1.0,
                                                preactresnet18=11.2, wideresnet=5.85).items())
def test_sizes(name, millions):
    size = sum(p.numel() for p in contest_network(name).parameters())
    assert size == count(name)
    assert round(size/1e6, 2 if millions == 5.85 else 1) == millions


def test_first_weights_are_the_published_ones_and_leave_the_random_state_alone():
    torch_state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    py_state = random.getstate()
    wide = contest_network('wideresnet', .5)
    pre = contest_network('preactresnet18', .25)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (np_state == np.random.get_state()[1]).all()
    assert py_state == random.getstate()
    for conv in [m for m in wide.modules() if isinstance(m, nn.Conv2d)][5:]:
        k = conv.kernel_size[0]
        assert conv.weight.std().item() == pytest.approx((2/(k*k*conv.out_channels))**.5, rel=.1)
    assert not wide.net.classifier[-1].bias.any()
    assert pre.net.classifier[-1].bias.all()
    for conv in [m for m in pre.modules() if isinstance(m, nn.Conv2d)]:
        assert 0 < conv.weight.abs().max() <= conv.weight[0].numel()**-.5
    assert same(pre, contest_network('preactresnet18', .25))
    assert not same(pre, contest_network('preactresnet18', .25, seed=1))


def test_networks_that_are_not_of_the_contest():
    for wrong in (dict(name='ResNet_50'), dict(name='wideresnet', width=0),
                  dict(name='wideresnet', width=math.nan), dict(name='wideresnet', width='1')):
        with pytest.raises(ValueError):
            contest_network(**wrong)
    for name in contest_networks:
        # one channel: sizes change, widths do not
        assert contest_network(name, .01)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match='32x32'):
        contest_network('wideresnet', .125)(torch.rand(1, 3, 28, 28))


# ---- configuration

def written(tmp_path, text):
    f = tmp_path/'config.py'
    f.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f


official = ''.join(
    f'{name} = {{"epochs": 200, "optimizer_name": "SGD", '
    f'"optimizer_hyperparameters": {{"lr": {lr}, "momentum": 0.9, "weight_decay": 1e-4}},\n'
    ' "scheduler_name": "CosineAnnealingLR", '
    '"scheduler_hyperparameters": {"T_max": 200}, "batch_size": 256} # as published\n\n'
    for name, lr in (('args_wideresnet', .1), ('args_preactresnet18', .01)))


def test_the_official_configuration(tmp_path):
    assert read_config(written(tmp_path, official)) == default_config()
    as_windows_writes_it = b'\xef\xbb\xbf' + official.replace('\n', '\r\n').encode()
    assert read_config(written(tmp_path, as_windows_writes_it)) == default_config()
    as_calls = official.replace('{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}',
                                'dict(lr=0.1, momentum=0.9, weight_decay=1e-4)')
    assert as_calls != official
    assert read_config(written(tmp_path, as_calls)) == default_config()
    first = default_config(1)
    assert (first['resnet50']['optimizer_hyperparameters']['lr']
            == first['densenet121']['optimizer_hyperparameters']['lr'] == .1)
    no_schedule = repr(
        {k: v for k, v in first['densenet121'].items() if k != 'scheduler_hyperparameters'})
    got = read_config(written(
        tmp_path, f"args_resnet = {first['resnet50']}\nargs_densenet = {no_schedule}"))
    assert got['resnet50'] == first['resnet50']
    assert got['densenet121']['scheduler_name'] is None
    with pytest.raises(ValueError):
        default_config(3)


other_settings = SGD | dict(
    optimizer_name='AdamW', optimizer_hyperparameters=dict(lr=1e-3, betas=(.9, .99)),
    scheduler_name='MultiStepLR', scheduler_hyperparameters=dict(milestones=[1, -2], gamma=.1))


@pytest.mark.parametrize('config', [
    default_config(1), default_config(2), default_config(1) | default_config(2),
    {n: other_settings for n in C._stages[2]}])
def test_what_is_written_is_read_back_and_means_the_same_to_python(tmp_path, config):
    f = write_config(config, tmp_path/'config.py')
    run = {}
    exec(f.read_text(), run)
    assert read_config(f) == config == {n: run[v] for n, v in contest_networks.items() if v in run}


here = '\nopen("ran", "w").write("x")\n'
hostile = {
    'import': ('import os\n' + official, 1),
    'import from': (official + 'from os import system', official.count('\n')+1),
    'call at the top': (here.strip() + '\n' + official, 1),
    'call as value': (
        official.replace('"batch_size": 256', '"batch_size": open("ran", "w").write("x")', 1), 2),
    'dunder import': ('args_resnet = __import__("os").system("touch ran")', 1),
    'lambda': ('args_resnet = (lambda: open("ran", "w").write("x"))()', 1),
    'function': (f'def f():{here}args_resnet = f()'.replace('open', ' return open'), 1),
    'class body': ('class A:\n open("ran", "w")\n', 1),
    'attribute': ('args_resnet = {}\nargs_resnet.x = 1', 2),
    'comprehension': ('args_resnet = {k: open("ran", "w") for k in "a"}', 1),
    'f-string': ('args_resnet = {"a": f"{open(\'ran\', \'w\')}"}', 1),
    'arithmetic': ('args_resnet = {"epochs": 100+100}', 1),
    'name': ('a = {}\nargs_resnet = a', 1), 'name as value': ('args_resnet = {"lr": lr}', 1),
    'unpacking': ('args_resnet = {**dict(a=1)}', 1),
    'dict with a star': ('args_resnet = dict(**{"a": 1})', 1),
    'dict with a pair': ('args_resnet = dict([("a", 1)])', 1),
    'other method': ('args_resnet = dict.fromkeys("ab", 1)', 1),
    'double target': ('args_resnet = args_densenet = {}', 1),
    'tuple target': ('args_resnet, args_densenet = {}, {}', 1),
    'if': (f'if True:{here}'.replace('\nopen', ' open'), 1),
    'walrus': ('args_resnet = (x := {})', 1), 'decorator': ('@print\nclass A: pass', 2),
    'bytes': ('args_resnet = {"a": b"x"}', 1), 'complex': ('args_resnet = {"a": 1j}', 1),
    'ellipsis': ('args_resnet = {"a": ...}', 1),
    'minus of a call': ('args_resnet = {"a": -print(1)}', 1),
    'not a dictionary': ('args_resnet = 3', 1), 'del': ('args_resnet = {}\ndel args_resnet', 2),
    'annotation': ('args_resnet: open("ran", "w") = {}', 1),
    'syntax': ('args_resnet = {\n "a": 1', 1), 'null byte': (b'args_resnet = {}\x00', 1),
    'not utf-8': (b'args_resnet = {"a": "\xff"}', 1), 'huge': (b'#' * 70_000, None),
    'deep': ('args_resnet = ' + '['*500 + ']'*500, 1),
    'long sum': ('args_resnet = ' + '1+'*900 + '1', 1),
    'longer sum': ('args_resnet = ' + '1+'*20_000 + '1', 1),
    'huge number': ('args_resnet = {"a": ' + '9'*5000 + '}', 1),
    'huge hexadecimal': ('args_resnet = {"a": 0x' + 'f'*50_000 + '}', 1),
    'huge negative': ('args_resnet = {"a": -0xffffffffffffffffff}', 1),
    'minus of a name': ('args_resnet = {"a": -x}', 1),
    'codec': (b'# coding: rot13\nvzcbeg bf', 2), 'a set': ('args_resnet = {1, 2}', 1),
    'key that is a call': ('args_resnet = {open("ran", "w"): 1}', 1)}


@pytest.mark.parametrize('case', hostile)
def test_hostile_configurations_are_refused_by_line_and_never_run(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, line = hostile[case]
    with pytest.raises(ValueError) as e:
        read_config(written(tmp_path, text))
    if line is not None:
        assert f'line {line}:' in str(e.value)
        assert 'no imports, calls' in str(e.value)
    np.save('data.npy', np.zeros((1, 32, 32, 3), np.uint8))
    np.save('label.npy', np.eye(10)[:1])
    table = validate_set('.').set_index('rule').verdict
    assert table['config.py'] == 'broken'
    assert table['epochs'] == table['config networks'] == 'not checked'
    assert not (tmp_path/'ran').exists()


def changed(**k): return {n: c | k for n, c in default_config().items()}


settings = {
    'epochs': ([dict(epochs=o) for o in (301, 201, 0, -1, 200., '200', None, True)],
               [dict(epochs=200), dict(epochs=1)]),
    'batch size': ([dict(batch_size=o) for o in (0, -1, 8., None, 'all')],
                   [dict(batch_size=1), dict(batch_size=256)]),
    'optimizer': ([dict(optimizer_name=o)
                   for o in ('Sgd', 'Optimizer', 'lr_scheduler', '__name__', None, ['SGD'], 3,
                             'LBFGS', 'SparseAdam', 'Muon', 'Adam')]
                  + [dict(optimizer_hyperparameters=o) for o in (
                      dict(learning_rate=.1), dict(lr=-1), dict(lr='.1'), dict(lr=math.nan),
                      dict(lr=1e999), {'params': 1}, [1], None, 3, dict(lr=.1, nesterov=True))]
                  + [dict(batch_size=512, optimizer_hyperparameters=dict(momentum=.9))],
                  [dict(optimizer_name='AdamW', optimizer_hyperparameters={}),
                   dict(optimizer_hyperparameters=dict(lr=.1, momentum=.9, nesterov=True)),
                   dict(batch_size=256, optimizer_hyperparameters=dict(momentum=.9))]),
    'scheduler': (
        [dict(scheduler_name=o) for o in ('Cosine', 'LRScheduler', '_LRScheduler', 'SequentialLR',
                                          'LambdaLR', 'Counter', 3, ['StepLR'], '')]
        + [dict(scheduler_name='ReduceLROnPlateau', scheduler_hyperparameters={}),
           dict(scheduler_hyperparameters={}), dict(scheduler_hyperparameters=dict(T_max=0)),
           dict(scheduler_hyperparameters=None),
           dict(scheduler_name='OneCycleLR',
                scheduler_hyperparameters=dict(max_lr=.1, total_steps=199)),
           dict(scheduler_name='ExponentialLR', scheduler_hyperparameters=dict(gamma=1e10))],
        [dict(scheduler_name=None),
         dict(scheduler_name='OneCycleLR',
              scheduler_hyperparameters=dict(max_lr=.1, total_steps=200)),
         dict(scheduler_name='CosineAnnealingWarmRestarts',
              scheduler_hyperparameters=dict(T_0=10, T_mult=2))]),
    'config keys': ([dict(num_workers=4), {'lr': 1}], [])}


@pytest.mark.parametrize('rule', settings)
def test_settings_that_the_trainer_would_choke_on(rule):
    refused, accepted = settings[rule]
    for case in refused:
        rows = {r['rule']: r for r in C._config_rows(
            default_config() | {'wideresnet': default_config()['wideresnet'] | case})}
        assert {k for k, r in rows.items() if r['verdict'] == 'broken'} == {rule}, (case, rows)
        assert 'args_wideresnet' in rows[rule]['found']
        assert 'args_pre' not in rows[rule]['found']
        assert rows[rule]['what_to_do']
    for case in accepted:
        rows = C._config_rows(changed(**case))
        assert all(r['verdict'] == 'ok' for r in rows), (case, rows)
        assert all(r['what_to_do'] == '' for r in rows), (case, rows)


def test_an_unknown_name_is_told_those_that_are_known():
    known = {k: C._settings_rows('n', SGD | {f'{k}_name': 'x'})[i]['what_to_do']
             for k, i in (('optimizer', 3), ('scheduler', 4))}
    assert 'SGD' in known['optimizer']
    assert ' Optimizer' not in known['optimizer']
    assert 'StepLR' in known['scheduler']
    assert ' LRScheduler' not in known['scheduler']


def test_a_configuration_needs_every_key_and_both_networks(tmp_path):
    whole = default_config()
    for key in C._keys:
        part = whole | {'wideresnet': {k: v for k, v in whole['wideresnet'].items() if k != key}}
        with pytest.raises(ValueError, match=f'config keys: args_wideresnet: no {key}'):
            write_config(part, tmp_path/'config.py')
    for part in ({}, {'wideresnet': whole['wideresnet']},
                 {'wideresnet': whole['wideresnet'], 'resnet50': whole['wideresnet']}):
        with pytest.raises(ValueError,
                           match='config networks: .*args_resnet and args_densenet or '
                                 'args_preactresnet18 and args_wideresnet'):
            write_config(part, tmp_path/'config.py')
    for wrong in (whole | dict(vgg=SGD), changed(epochs=math.inf),
                  changed(optimizer_hyperparameters=dict(lr=torch.tensor(.1)))):
        with pytest.raises(ValueError, match='`config` must'):
            write_config(wrong, tmp_path/'config.py')
    assert not (tmp_path/'config.py').exists()
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path/'config.py')


def test_batches_above_256_are_cut_and_the_rate_with_them():
    for size, want, lr in ((255, 255, .4), (256, 256, .4), (257, 256, .4*256/257), (1024, 256, .1)):
        before = SGD | dict(batch_size=size, optimizer_hyperparameters=dict(lr=.4, momentum=.9))
        config = copy.deepcopy(before)
        got = C._effective(config)
        assert got[0] == want
        assert got[1] == dict(lr=pytest.approx(lr, rel=1e-12), momentum=.9)
        assert config == before
        row = [r for r in C._settings_rows('n', config) if r['rule'] == 'batch size'][0]
        assert row['verdict'] == ('ok' if size <= 256 else 'warning')


# ---- the set

def good_set(folder, data):
    folder.mkdir(exist_ok=True)
    np.save(folder/'data.npy', data.images)
    np.save(folder/'label.npy', data.labels)
    write_config(default_config(), folder/'config.py')
    return folder


def altered(y, at, value):
    y = y.copy()
    y[at] = value
    return y


class Boom:
    def __reduce__(self): return open, ('ran', 'w')


images = {
    'image dtype': lambda x: x.astype(np.int64)[:],
    'image shape': lambda x: x.transpose(0, 3, 1, 2), 'image shape ': lambda x: x[:, :28],
    'image count': lambda x: np.broadcast_to(x[:1], (50_001, 32, 32, 3)),
    'image count lengths': lambda x: x[:0], 'lengths': lambda x: x[:-1],
    'lengths ': lambda x: np.concatenate([x, 255-x[:1]])}
labels = {
    'label dtype': lambda y: y.astype(np.int64), 'label dtype ': lambda y: y > 0,
    'label shape': lambda y: y.argmax(1).astype(float), 'label shape ': lambda y: y[:, :9],
    'labels finite': lambda y: altered(y, (3, 1), np.nan),
    'labels finite ': lambda y: altered(y, (3, 1), np.inf),
    'labels >= 0': lambda y: altered(y, (3, (y[3].argmax()+1) % 10), -.1),
    'row sums': lambda y: altered(y, 3, 0), 'row sums ': lambda y: altered(y, 3, 3e38),
    'labels >= 0 row sums': lambda y: altered(y, 3, -1),
    'labels finite row sums': lambda y: altered(altered(y, 3, 0), 4, np.nan),
    'lengths': lambda y: y[:-1], 'lengths label shape': lambda y: y[:0, :4]}


def broken(path):
    table = validate_set(path)
    return set(table.rule[table.verdict == 'broken'])


@pytest.mark.parametrize('what, case',
                         [('data.npy', k) for k in images] + [('label.npy', k) for k in labels])
def test_every_broken_rule_of_the_arrays_is_named(what, case, data, tmp_path):
    good_set(tmp_path, data)
    array = (images[case](data.images) if what == 'data.npy' else labels[case](data.labels))
    np.save(tmp_path/what, array)
    want = {r for r in C._rules if r in case}
    if case == 'image count':
        want = {'image count', 'lengths'}
    assert broken(tmp_path) == want
    with pytest.raises(ValueError) as e:
        load_set(tmp_path)
    assert all(r in str(e.value) for r in want)
    with pytest.raises(ValueError) as e:
        contest_train(tiny(), array if what == 'data.npy' else data.images,
                      array if what == 'label.npy' else data.labels, SGD, epochs=1)
    assert all(r in str(e.value) for r in want)
    with pytest.raises(ValueError):
        pack_training_set(tmp_path, tmp_path/'x.zip')
    assert not (tmp_path/'x.zip').exists()


def test_a_good_set_passes_in_every_float_and_scale(data, tmp_path):
    good_set(tmp_path, data)
    table = validate_set(tmp_path)
    assert table.verdict.eq('ok').all()
    assert table.what_to_do.eq('').all()
    assert list(table) == ['rule', 'verdict', 'found', 'what_to_do']
    assert list(table.rule) == list(C._rules)
    for dtype in (np.float16, np.float64, '>f8'):
        np.save(tmp_path/'label.npy', np.asfortranarray(data.labels*7).astype(dtype))
        assert validate_set(tmp_path).verdict.eq('ok').all()
        x, y = load_set(tmp_path, normalised=True)
        assert (x == data.images).all()
        assert (y == data.labels).all()
        assert y.dtype == np.float32
        assert (load_set(tmp_path)[1] == 7*data.labels).all()
        assert load_set(tmp_path)[1].dtype == dtype
    raw = np.random.default_rng(0).uniform(.1, 9, (50, 10))
    np.save(tmp_path/'label.npy', raw)
    want = torch.tensor(raw/np.array([[sum(r)] for r in raw.tolist()]))
    assert np.allclose(load_set(tmp_path, True)[1], want, rtol=1e-6)


def test_legal_but_doubtful(data, tmp_path):
    good_set(tmp_path, data)
    few = np.flatnonzero(data.y < 9)
    few = few[[*range(len(few)), 0, 0, 1]]
    np.save(tmp_path/'data.npy', data.images[few])
    np.save(tmp_path/'label.npy', data.labels[few])
    write_config(changed(batch_size=512), tmp_path/'config.py')
    table = validate_set(tmp_path).set_index('rule')
    assert set(table.index[table.verdict == 'warning']) == {
        'duplicates', 'class balance', 'batch size'}
    assert table.verdict.isin(['ok', 'warning']).all()
    assert table.found['duplicates'] == '3'
    assert table.found['class balance'].startswith('0 to ')
    assert '0.5' in table.what_to_do['batch size']
    for n, verdict in ((10, 'ok'), (11, 'warning')):
        y = np.repeat(np.arange(10), [n] + [5]*9)
        rows = C._pair_rows(
            np.random.default_rng(0).integers(0, 256, (len(y), 32, 32, 3), np.uint8), np.eye(10)[y])
        assert rows[-1]['rule'] == 'class balance'
        assert rows[-1]['verdict'] == verdict
        assert rows[1]['verdict'] == 'ok'
    pack_training_set(tmp_path, tmp_path/'x.zip')


def test_several_rules_at_once_and_what_could_not_be_checked(data, tmp_path):
    good_set(tmp_path, data)
    np.save(tmp_path/'label.npy', altered(altered(data.labels, 0, 0), (1, 1), -1))
    (tmp_path/'config.py').write_text(
        official.replace('200', '201', 1).replace('SGD', 'Sgd').replace('Cosine', 'Sine'))
    assert broken(tmp_path) == {'row sums', 'labels >= 0', 'epochs', 'optimizer', 'scheduler'}
    found = validate_set(tmp_path).set_index('rule').found
    assert 'args_wideresnet' in found['epochs']
    assert 'args_pre' not in found['epochs']
    assert 'args_wideresnet' in found['optimizer']
    assert 'args_pre' in found['optimizer']
    for f in ('data.npy', 'label.npy', 'config.py'):
        (tmp_path/f).unlink()
    table = validate_set(tmp_path).set_index('rule').verdict
    assert broken(tmp_path) == {'data.npy', 'label.npy', 'config.py'}
    assert (table == 'not checked').sum() == len(C._rules)-4
    with pytest.raises(FileNotFoundError):
        validate_set(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError):
        load_set(tmp_path/'nowhere')


def npy(header, body=b''):
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, header)
    return held.getvalue() + body


@pytest.mark.parametrize('raw', [
    pickle.dumps(Boom()), b'', b'PK\x03\x04', b'\x93NUMPY\x03\x00\x00\x00\x00\x00',
    npy(dict(descr='|u1', fortran_order=False, shape=(2, 32, 32, 3)), b'12'),
    npy(dict(descr='|O', fortran_order=False, shape=(2,)), pickle.dumps(Boom())),
    npy(dict(descr='|u1', fortran_order=False, shape=(10**15, 32, 32, 3))),
    npy(dict(descr='|u1', fortran_order=False, shape=(10**13, 0))),
    npy(dict(descr='|u1', fortran_order=False, shape=(-2, 32, 32, 3))),
    npy(dict(descr='|u1', fortran_order=False, shape=()), b'1'),
    npy(dict(descr='|S0', fortran_order=False, shape=(10**13, 10)))])
def test_arrays_from_strangers_are_neither_unpickled_nor_believed(raw, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('data.npy', 'label.npy'):
        good_set(tmp_path, data)
        (tmp_path/name).write_bytes(raw)
        assert broken(tmp_path) & {'data.npy', 'image dtype', 'image shape', 'image count',
                                   'label.npy', 'label dtype', 'label shape', 'lengths'}
        with pytest.raises(ValueError):
            load_set(tmp_path)
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('header, rule',
                         [(dict(descr='|O', shape=(50, 32, 32, 3)), 'image dtype'),
                          (dict(descr='|u1', shape=(10**9, 32, 32, 3)), 'image count')])
def test_objects_and_giants_are_judged_by_their_header_alone(
        header, rule, data, tmp_path, monkeypatch):
    good_set(tmp_path, data)
    (tmp_path/'data.npy').write_bytes(npy(header | dict(fortran_order=False), b'x'*100))
    seen = []
    def read_array(f, real=np.lib.format.read_array, **k):
        seen.append(k)
        return real(f, **k)
    monkeypatch.setattr(np.lib.format, 'read_array', read_array)
    assert rule in broken(tmp_path)
    assert 'data.npy' not in broken(tmp_path)
    assert seen == [dict(allow_pickle=False)]*2                    # the labels, twice


# ---- zip files

def packed(path, entries, **k):
    with zipfile.ZipFile(path, 'w', **k) as z:
        for name, raw in entries:
            z.writestr(name, raw)
    return path


@pytest.fixture
def entries(data, tmp_path):
    good_set(tmp_path/'good', data)
    return [(n, (tmp_path/'good'/n).read_bytes()) for n in ('data.npy', 'label.npy', 'config.py')]


@pytest.mark.parametrize('name', ['../evil', '/etc/evil', 'a/../../evil', '..\\evil',
                                  'C:\\evil', 'C:evil', 'data.npy'])
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_entries_that_leave_the_folder_or_come_twice(name, entries, tmp_path):
    z = packed(tmp_path/'x.zip', entries + [(name, b'x')])
    table = validate_set(z).set_index('rule')
    assert broken(z) == {'archive'}
    assert repr(name) in table.found['archive']
    assert (table.verdict == 'not checked').sum() == len(C._rules)-1
    with pytest.raises(ValueError, match='evil|twice'):
        load_set(z)


def test_damaged_and_oversized_zip_files(entries, tmp_path, monkeypatch):
    z = packed(tmp_path/'x.zip', entries)
    assert validate_set(z).verdict.eq('ok').all()
    raw = bytearray(z.read_bytes())
    (tmp_path/'noise.zip').write_bytes(b'not a zip')
    assert broken(tmp_path/'noise.zip') == {'archive'}
    with zipfile.ZipFile(z) as o:
        at = o.getinfo('data.npy').header_offset + 3000
    raw[at] ^= 255
    (tmp_path/'flipped.zip').write_bytes(raw)
    assert broken(tmp_path/'flipped.zip') == {'data.npy'}
    raw = bytearray(z.read_bytes())
    for mark, off in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        raw[raw.index(mark) + off] |= 1
    (tmp_path/'locked.zip').write_bytes(raw)
    assert broken(tmp_path/'locked.zip') == {'data.npy'}
    deep = packed(tmp_path/'deep.zip', [('Dataset/' + n, b) for n, b in entries])
    assert broken(deep) == {'data.npy', 'label.npy', 'config.py'}
    assert 'Dataset/data.npy' in validate_set(deep).found[1]
    big = packed(tmp_path/'big.zip', entries + [('bomb', bytes(10**6))],
                 compression=zipfile.ZIP_DEFLATED)
    assert broken(big) == set()
    monkeypatch.setattr(archives, '_max_entry', 999_999)
    assert broken(big) == {'archive'}
    assert "'bomb' unpacks to 1000000" in validate_set(big).found[0]


def test_a_submission_survives_the_round_trip(data, tmp_path):
    good_set(tmp_path, data)
    f = tmp_path/'wideresnet.pth.tar'
    model, _ = contest_train(contest_network('wideresnet', .0625), data.images, data.labels,
                             SGD, epochs=1, checkpoint=f, device='cpu')
    (tmp_path/'notes.txt').write_text('private')
    z = pack_training_set(tmp_path, tmp_path/'out'/'Dataset.zip')
    assert validate_set(z).verdict.eq('ok').all()
    assert (load_set(z)[0] == data.images).all()
    assert (load_set(z)[1] == data.labels).all()
    with zipfile.ZipFile(z) as o:
        assert o.namelist() == ['config.py', 'data.npy', 'label.npy', 'wideresnet.pth.tar']
        assert o.testzip() is None
        assert all(e.external_attr >> 16 == 0o644 for e in o.infolist())
        held = torch.load(io.BytesIO(o.read('wideresnet.pth.tar')), weights_only=True)
        assert o.read('config.py') == (tmp_path/'config.py').read_bytes()
    fresh = contest_network('wideresnet', .0625, seed=9)
    fresh.net.load_state_dict(held['state_dict'])
    assert list(held) == ['state_dict']
    assert same(fresh, model)
    before = z.read_bytes()
    assert pack_training_set(tmp_path, z).read_bytes() == before
    for bad in (dict(model=1), dict(state_dict={}), dict(state_dict=dict(a=1)), [1]):
        save_state(bad, f)
        with pytest.raises(ValueError, match='state_dict'):
            pack_training_set(tmp_path, z)
    assert z.read_bytes() == before
    assert [o.name for o in z.parent.iterdir()] == ['Dataset.zip']
    with pytest.raises(NotADirectoryError):
        pack_training_set(z, tmp_path/'y.zip')


# ---- training

def plain_training(model, images, labels, config, seed, epochs):
    "The trainer as one reads it: a loop over single images, soft cross-entropy less entropy"
    model = copy.deepcopy(model).train()
    optimizer = getattr(torch.optim, config['optimizer_name'])(
        model.parameters(), **config['optimizer_hyperparameters'])
    scheduler = config['scheduler_name'] and getattr(
        torch.optim.lr_scheduler,
        config['scheduler_name'])(optimizer, **config['scheduler_hyperparameters'])
    t = torch.tensor(labels/labels.sum(1, keepdims=True), dtype=torch.float32)
    rows = []
    for epoch in range(epochs):
        g = make_generator(seed, 'contest epoch', epoch)
        lr = optimizer.param_groups[0]['lr']
        losses = []
        right = 0
        for some in torch.randperm(len(images), generator=g).split(config['batch_size']):
            shifts = torch.randint(0, 9, (2, len(some), 1), generator=g)[..., 0]
            mirror = torch.rand(len(some), 1, generator=g)[:, 0] < .5
            batch = []
            for i, dy, dx, m in zip(some.tolist(), *shifts.tolist(), mirror.tolist()):
                big = np.zeros((40, 40, 3), np.uint8)
                big[4:36, 4:36] = images[i]
                o = big[dy:dy+32, dx:dx+32]
                batch.append(torch.tensor((o[:, ::-1] if m else o).copy()).permute(2, 0, 1)/255)
            out = model(torch.stack(batch))
            entropy = -(t[some]*t[some].clamp_min(1e-30).log()).sum(1)
            loss = (-(t[some]*out.log_softmax(1)).sum(1) - entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()]*len(some)
            right += (out.argmax(1) == t[some].argmax(1)).sum().item()
        if scheduler:
            scheduler.step()
        rows.append((epoch+1, lr, np.mean(losses), right/len(images)))
    return model.eval(), rows


def test_training_is_the_plain_loop(data, monkeypatch):
    monkeypatch.setattr(C, 'fast_bf16', lambda device: False)
    soft = np.random.default_rng(0).uniform(0, 1, (50, 10))*[[3.]] + 5*data.labels
    soft[0, 1:3] = 0
    config = SGD | dict(scheduler_name='CosineAnnealingLR', scheduler_hyperparameters=dict(T_max=3))
    for net in (tiny(), contest_network('preactresnet18', .0625)):
        model, history = contest_train(net, data.images, soft, config, seed=3, epochs=3,
                                       device='cpu')
        want, rows = plain_training(net, data.images, soft, config, 3, 3)
        for (k, a), b in zip(want.state_dict().items(), model.state_dict().values()):
            assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4), k
        got = facts(history).to_numpy()
        assert list(history) == ['epoch', 'lr', 'loss', 'accuracy', 'seconds']
        assert np.allclose(got[:, :3], np.array(rows)[:, :3], rtol=1e-4)
        assert np.allclose(got[:, 3], np.array(rows)[:, 3], atol=.021)
        assert not model.training


schedules = dict(StepLR=dict(step_size=2), MultiStepLR=dict(milestones=[1, 3], gamma=.1),
                 ExponentialLR=dict(gamma=.5), CosineAnnealingLR=dict(T_max=3),
                 LinearLR=dict(total_iters=3), ConstantLR=dict(total_iters=2),
                 PolynomialLR=dict(total_iters=3), CosineAnnealingWarmRestarts=dict(T_0=2),
                 CyclicLR=dict(base_lr=.01, max_lr=.1, step_size_up=2),
                 OneCycleLR=dict(max_lr=.1, total_steps=4))


@pytest.mark.parametrize('name', schedules)
def test_rates_are_torchs_and_a_killed_run_ends_the_same(name, data, tmp_path, monkeypatch):
    config = SGD | dict(scheduler_name=name, scheduler_hyperparameters=schedules[name])
    f = tmp_path/'run.pt'
    run = partial(contest_train, tiny(), data.images, data.labels, config, seed=5, device='cpu')
    model, history = run()
    p = torch.optim.SGD([nn.Parameter(torch.zeros(1))], **config['optimizer_hyperparameters'])
    s = getattr(torch.optim.lr_scheduler, name)(p, **schedules[name])
    rates = []
    for _ in range(4):
        rates.append(p.param_groups[0]['lr'])
        p.step()
        s.step()
    assert history.lr.tolist() == rates
    assert len(set(rates)) > 1
    left = [5]

    def crop(*a, real=C.crop_and_flip):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        return real(*a)
    monkeypatch.setattr(C, 'crop_and_flip', crop)
    kills = 0
    for _ in range(9):
        # an epoch has four steps: dies in the middle of the next one
        left[0] = 5
        try:
            resumed, again = run(checkpoint=f)
        except KeyboardInterrupt:
            kills += 1
        else:
            break
    assert kills == 3
    assert same(resumed, model)
    assert facts(again).equals(facts(history))
    left[0] = 0
    assert same(run(checkpoint=f)[0], model)


@pytest.mark.parametrize('name', ['Adam', 'RMSprop', 'Adagrad', 'NAdam'])
def test_other_optimizers_resume_bit_for_bit(name, data, tmp_path):
    config = SGD | dict(optimizer_name=name, optimizer_hyperparameters=dict(lr=.01))
    run = partial(contest_train, contest_network('preactresnet18', .0625, seed=1),
                  data.images[:20], data.labels[:20], config, device='cpu')
    run(epochs=1, checkpoint=tmp_path/'run.pt')
    assert same(run(epochs=2, checkpoint=tmp_path/'run.pt')[0], run(epochs=2)[0])
    with pytest.raises(ValueError, match='`epochs` must be at least the 2'):
        run(epochs=1, checkpoint=tmp_path/'run.pt')


def test_a_checkpoint_of_another_run_is_refused(data, tmp_path):
    f = tmp_path/'run.pt'
    net = tiny()
    run = lambda net=net, x=data.images, y=data.labels, config=SGD, **k: contest_train(
        net, x, y, config, epochs=1, checkpoint=f, device='cpu', **k)
    run()
    other = tiny()
    with torch.no_grad():
        other.net[-1].bias += 1
    wrong = dict(seed=dict(seed=1), images=dict(x=255-data.images),
                 labels=dict(y=data.labels[::-1].copy()),
                 recipe=dict(config=SGD | dict(batch_size=8)), weights=dict(net=other),
                 network=dict(net=contest_network('wideresnet', .0625)))
    for what, k in wrong.items():
        with pytest.raises(ValueError, match=f"its {dict(labels='images').get(what, what)} is"):
            run(**k)
    run()
    save_state(dict(a=1), f)
    with pytest.raises(ValueError, match='something else'):
        run()


def test_row_scale_order_of_keys_and_large_batches_change_nothing(data):
    run = partial(contest_train, tiny(), data.images, device='cpu', epochs=2)
    model, history = run(data.labels, SGD)
    scale = 2.**np.random.default_rng(0).integers(-3, 4, (50, 1))
    assert same(run(data.labels*scale, SGD)[0], model)
    soft = np.random.default_rng(1).uniform(.01, 1, (50, 10))
    a = run(soft, SGD)[0]
    b = run(soft*np.random.default_rng(2).uniform(.1, 9, (50, 1)), SGD)[0]
    assert all(torch.allclose(v, b.state_dict()[k], atol=1e-6) for k, v in a.state_dict().items())
    assert not same(a, model)
    large = SGD | dict(batch_size=512, optimizer_hyperparameters=dict(lr=.1, momentum=.9))
    assert same(run(data.labels, large)[0], run(data.labels, SGD | dict(batch_size=256))[0])
    assert not same(run(data.labels, large | dict(batch_size=256))[0], run(data.labels, large)[0])
    assert not same(run(data.labels, SGD, seed=1)[0], model)


def test_it_learns_digits_and_changes_nothing_else(data):
    data = subset(digits('train'), 800, seed=0)
    net = contest_network('preactresnet18', .125)
    x = data.images.copy()
    y = data.labels.copy()
    config = SGD | dict(batch_size=8, optimizer_hyperparameters=dict(lr=.02, momentum=.9))
    before = copy.deepcopy(net)
    frozen = copy.deepcopy(config)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model, history = contest_train(net, x, y, config, epochs=2, device='cpu')
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert same(net, before)
    assert config == frozen
    assert (x == data.images).all()
    assert (y == data.labels).all()
    assert not net.training
    assert history.loss[1] < history.loss[0], history
    assert len(history) == 2, history
    assert (predict(model, data.x).argmax(1).numpy() == data.y).mean() > .4
    contest_train(tiny(), x[::-1], y[::-1], config, epochs=1, device='cpu')       # views too


def test_by_name_the_seed_makes_the_weights(monkeypatch, data):
    built = []
    monkeypatch.setattr(C, 'contest_network',
                        lambda name, seed: built.append((name, seed)) or tiny())
    contest_train('wideresnet', data.images, data.labels, SGD, epochs=1, device='cpu')
    contest_train('resnet50', data.images, data.labels, SGD, seed=4, epochs=1, device='cpu')
    assert built == [('wideresnet', 11037), ('resnet50', 4)]


def test_dropout_has_a_stream_of_its_own(data, tmp_path):
    net = tiny()
    net.net = nn.Sequential(nn.Dropout(.5), *net.net)
    run = partial(contest_train, net, data.images, data.labels, SGD, device='cpu')
    whole = run(epochs=2)[0]
    run(epochs=1, checkpoint=tmp_path/'run.pt')
    torch.rand(1)
    assert same(run(epochs=2, checkpoint=tmp_path/'run.pt')[0], whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path):
    f = tmp_path/'run.pt'
    config = SGD | dict(scheduler_name='ExponentialLR', scheduler_hyperparameters=dict(gamma=1e12))
    with pytest.raises(FloatingPointError,
                       match=r'lower `lr` in optimizer_hyperparameters \(now 5e\+\d\d\)'):
        contest_train(contest_network('preactresnet18', .0625), data.images, data.labels,
                      config, epochs=4, checkpoint=f, device='cpu')
    assert load_state(f)['epoch'] < 4
    assert all(v.isfinite().all() for v in load_state(f)['state_dict'].values())


def test_training_refuses_wrong_settings(data):
    for wrong, match in ((dict(epochs=301), '`epochs` .* 1 to 200; got 301'), (dict(epochs=0), '1 to 200'),
                         (dict(config=SGD | dict(optimizer_name='Sgd')), 'optimizer: '),
                         (dict(network='vgg'), '`name` must be one of')):
        k = dict(network=tiny(), config=SGD) | wrong
        with pytest.raises(ValueError, match=match):
            contest_train(k.pop('network'), data.images, data.labels, k.pop('config'),
                          device='cpu', **k)


def test_labels_that_do_not_follow_the_images_and_blank_images(tmp_path):
    "Patches of few colours with a class each: neighbours by hand, shuffles, exchanged names, little data"
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (10, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    y = rng.permutation(np.repeat(np.arange(10), 20))
    x = np.clip(looks[y] + rng.normal(0, 30, (200, 32, 32, 3)), 0, 255).astype(np.uint8)
    good_set(tmp_path, ImageSet(x, y, 10))
    def judged(x, y, **options):
        np.save(tmp_path/'data.npy', x)
        np.save(tmp_path/'label.npy', y)
        table = validate_set(tmp_path, **options).set_index('rule')
        return table.loc['label agreement'], table.loc['blank images']
    labels = np.eye(10, dtype=np.float32)[y]
    agreement, blank = judged(x, labels)
    assert agreement.verdict == blank.verdict == 'ok'
    assert agreement.found.startswith('100.0% of 200 ')
    passed = [judged(x, labels[rng.permutation(200)])[0].verdict for _ in range(10)]
    assert passed.count('warning') >= 9
    assert judged(x, labels[::-1])[0].verdict == 'warning'
    trusted = ImageSet(x[:100], y[:100], 10)
    turned = judged(x, labels[:, ::-1], reference=trusted)[0]
    assert turned.verdict == 'warning'
    assert turned.found.startswith('0.0% of 200 ')
    assert judged(x, labels, reference=trusted)[0].verdict == 'ok'
    assert judged(x[:2], labels[:2])[0].verdict == 'warning'          # nobody could tell
    darkened = x.copy()
    darkened[3:10] = 0
    darkened[10] = (1, 2, 3)
    darkened[11, 0, 0, 0] = 255 - darkened[11, 0, 0, 0]
    agreement, blank = judged(darkened, labels)
    assert blank.verdict == 'warning'
    assert blank.found == '8 of one colour'
    assert judged(x, labels.astype(np.int64))[0].verdict == 'not checked'
    pack_training_set(good_set(tmp_path, ImageSet(darkened, y, 10)), tmp_path/'x.zip')
