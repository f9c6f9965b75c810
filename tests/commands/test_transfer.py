"""Each command is run for real on the digits, with a tiny network: what it writes, what it refuses,
and what an interrupted run finds again."""
import json, os, re, shutil, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robustnb.commands import transfer
from robustnb.commands.train import train_command
from robustnb.core import to_float, to_uint8
from robustnb.contract import predict
from robustnb.files import load_state, save_state
from robustnb.models.complexity import model_complexity
from robustnb.quant.ptq import model_bytes
from robustnb.data import digits, load_data
from robustnb.transfer.generator import generate
from robustnb.models.zoo import build_model
from robustnb.models.loading import load_model, save_model
from robustnb.models.graph import fold_batchnorm
from robustnb.quant.ptq import quantize
from robustnb.quant.checkpoints import load_quantized
from robustnb.transfer.generator import load_generator
from robustnb.transfer.probes import load_crops, Probes
from robustnb.transfer.study import Study
from robustnb.commands.common import named_model, unlabelled_images
from robustnb.commands.transfer import (
    assess_command, cost_command, export_command, generate_command, quantize_command)

run_assess = partial(assess_command, n=100)
run_cost = cost_command
run_quantize = quantize_command
run_generate = generate_command
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A network that two epochs of digits have shown what digits are"
    out = tmp_path_factory.mktemp('net')/'run'
    train_command(model='AlexNet_BN', width=.125, epochs=2, lr=.05, no_flip=True,
                              out=str(out))
    return str(out/'weights.pt')


def names(folder): return sorted(o.name for o in folder.iterdir())
def refused(capsys, said, job, *args, **kwargs):
    "One line on standard error, status 1, nothing of the traceback"
    with pytest.raises(SystemExit) as e:
        job(*args, **kwargs)
    text = str(e.value)
    assert re.search(said, text), text
    assert '\n' not in text, text
    assert re.match(r'\w+Error: ', text), text


def test_from_a_shell(weights, tmp_path):
    "The command line itself: arguments, help, exit status"
    def shell(*args):
        return subprocess.run([sys.executable, '-m', 'robustnb', *args], cwd=tmp_path,
                              capture_output=True, text=True,
                              env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2])))
    done = shell('cost', weights, '--formats', 'int4', '--out', 'sizes', '--json')
    assert done.returncode == 0
    assert names(tmp_path/'sizes') == ['layers.csv', 'manifest.json', 'networks.csv']
    told = json.loads(done.stdout)
    assert told['rows'][0]['kb_INT4'] < told['rows'][0]['kb_float32']
    assert not done.stderr
    failed = shell('quantize', weights, '--formats', 'INT44', '--images', 'digits', '--json')
    assert failed.returncode == 1
    assert failed.stdout == ''
    assert failed.stderr.startswith('ValueError: `name` must be INT2')
    assert failed.stderr.count('\n') == 1
    assert not (tmp_path/'quantized').exists()


def untrained(folder):
    "A file of a network that was never trained"
    save_model(build_model('AlexNet_BN', 10, .0625, seed=0), folder/'weights.pt')
    return str(folder/'weights.pt')


@pytest.fixture
def narrow(tmp_path): return untrained(tmp_path)


@pytest.fixture(scope='module')
def assessed_once(tmp_path_factory):
    "A folder where the network of `narrow` was assessed in INT8"
    folder = tmp_path_factory.mktemp('assessed')
    run_assess(untrained(folder), formats='INT8', out=str(folder/'out'))
    return folder/'out'


@pytest.fixture
def assessed(assessed_once, tmp_path):
    "A copy of it, to be spoilt"
    return Path(shutil.copytree(assessed_once, tmp_path/'out'))


@pytest.fixture
def asked(monkeypatch):
    """The formats that are really assessed, in turn; the power fails at POT4 as long as 'dark' is
    among them"""
    rows = Study.rows
    asked = []
    def watched(self, spec):
        if 'dark' in asked and str(spec) == 'POT4': raise KeyboardInterrupt
        asked.append(str(spec))
        return rows(self, spec)
    monkeypatch.setattr(Study, 'rows', watched)
    return asked


def test_an_interrupted_assessment_goes_on(narrow, asked, tmp_path):
    run_assess(narrow, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'whole'))
    asked[:] = ['dark']
    with pytest.raises(KeyboardInterrupt):
        run_assess(narrow, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'cut'))
    assert not (tmp_path/'cut'/'report.html').exists()
    kept = (tmp_path/'cut'/'crops.pt').stat().st_mtime_ns
    asked[:] = []
    run_assess(narrow, formats='INT8,POT4,INT4/INT8', out=str(tmp_path/'cut'))
    assert asked == ['POT4', 'INT4/INT8']
    assert (tmp_path/'cut'/'crops.pt').stat().st_mtime_ns == kept
    timed = ['engine_ms', 'float_ms']
    for name in ('report_table.csv', 'report_layers.csv'):
        pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path/k/name).drop(columns=timed, errors='ignore')
                                        for k in ('cut', 'whole')))
    table = pd.read_csv(tmp_path/'cut'/'report_table.csv')
    assert list(table.format) == ['INT8', 'POT4', 'INT4/INT8']
    assert table.js[0] < table.js[1]
    asked[:] = []
    run_assess(narrow, formats='INT4/INT8,INT8,FLOAT4', out=str(tmp_path/'cut'))
    assert asked == ['FLOAT4_E2']
    assert list(pd.read_csv(tmp_path/'cut'/'report_table.csv').format) == [
        'INT4/INT8', 'INT8', 'FLOAT4_E2']


def test_what_may_be_deployed(narrow, asked, tmp_path, capsys):
    out = tmp_path/'deploy'
    run_assess(narrow, target='onnxruntime', budget='0.02MB', max_loss=1., robust=True, out=str(out))
    assert asked == ['INT8', 'INT8 per tensor', 'mixed 20 kB']
    said = capsys.readouterr().out.splitlines()
    table = pd.read_csv(out/'report_table.csv').set_index('format')
    assert said[1].startswith(f'{table.size_kb.idxmin()} is the smallest format that keeps the losses of')
    assert table.size_kb['mixed 20 kB'] <= 20
    found = run_assess(narrow, formats='int8', target='onnxruntime', max_loss=1., out=str(out))
    assert asked == ['INT8', 'INT8 per tensor', 'mixed 20 kB'], 'what is known is not computed again'
    assert found['recommended'] == 'INT8'
    assert [r['format'] for r in found['rows']] == ['INT8', 'INT8 per tensor']


@pytest.mark.parametrize('said, given', [
    ('Did you mean onnxruntime?', dict(target='onxruntime')),
    ('such as 300kB or 0.3MB', dict(budget='small')),
    ('such as 300kB or 0.3MB', dict(budget='-3kB')), ('must leave', dict(budget='.1kB')),
    ('`max_loss` must be a share', dict(max_loss=3.)),
    ('none with `--norm none`. Leave out one', dict(norm='none', robust=True)),
    ('`norm` must be one of Linf, L2, L1; got', dict(norm='nothing')),
    ('more than once', dict(formats='INT8,mixed 30kB', budget='30'))])
def test_what_cannot_be_deployed_is_one_sentence(narrow, asked, tmp_path, said, given):
    with pytest.raises(SystemExit) as e:
        run_assess(narrow, **given, out=str(tmp_path/'no'))
    assert said in str(e.value)
    assert '\n' not in str(e.value)
    assert asked == []
    assert not (tmp_path/'no').exists()


def test_the_accuracy_alone(narrow, assessed, asked, tmp_path, capsys):
    "No attack, no column about one, the rest as with a threat; and another question than with one"
    out = tmp_path/'alone'
    run_assess(narrow, formats='INT8', norm='None', out=str(out))
    table = pd.read_csv(out/'report_table.csv')
    whole = pd.read_csv(assessed/'report_table.csv')
    assert not any('robust' in c for c in table) and any('robust' in c for c in whole)
    timed = {'engine_ms', 'float_ms'}
    same = [c for c in table if c not in timed]
    pd.testing.assert_frame_equal(table[same], whole[same])
    page = (out/'report.html').read_text(encoding='utf-8').partition('What was run')[0]
    assert 'robust' not in page.lower() and 'accuracy lost' in page
    assert 'robust' not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"threat is '' there and 'Linf.*Name another folder"):
        run_assess(narrow, formats='INT8', out=str(out))


def test_an_assessment_keeps_to_its_question(narrow, assessed, asked, tmp_path):
    out = assessed
    with pytest.raises(SystemExit, match=r"threat is 'Linf\(eps=0.0039.*Name another folder"):
        run_assess(narrow, formats='INT8', eps='2/255', out=str(out))
    with pytest.raises(SystemExit, match='seed is 0 there and 1 here'):
        run_assess(narrow, formats='INT8', seed=1, out=str(out))
    save_model(build_model('AlexNet_BN', 10, .0625, seed=1), narrow)
    with pytest.raises(SystemExit, match='network is'):
        run_assess(narrow, formats='INT8', out=str(out))
    with pytest.raises(SystemExit, match='test is None there'):
        run_assess(narrow, formats='INT8', test='digits', out=str(out))
    with pytest.raises(SystemExit, match='must not name one twice'):
        run_assess(narrow, formats='INT8,INT8', out=str(tmp_path/'new'))
    run_assess(narrow, formats='INT8', test='digits', n=20, out=str(tmp_path/'tested'))
    with pytest.raises(SystemExit, match="test is '.*' there and None here"):
        run_assess(narrow, formats='INT8', out=str(tmp_path/'tested'))
    assert asked == ['INT8'], 'only the one with test images'
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('folder, content', [
    ('formats', ''), ('formats', '[1, 2]'), ('formats', '{"row": {}, "layers": []}'),
    ('layers', '[]'), ('layers', '[{"format": ')])
def test_a_damaged_file_is_named(narrow, assessed, asked, folder, content):
    (assessed/folder/'INT8.json').write_text(content)
    with pytest.raises(SystemExit, match='INT8.json is damaged .*Delete it'):
        run_assess(narrow, formats='INT8', out=str(assessed))
    assert asked == []


def test_a_finished_assessment_is_not_computed_again(narrow, assessed, asked):
    run_assess(narrow, formats='INT8', out=str(assessed))
    assert asked == []


def test_cost_of_one_file_and_of_all(weights, tmp_path, capsys):
    run_cost(f'{weights},MobileNetV2, VGG_16', 'INT8,FLOAT6,INT3/INT8', out=str(tmp_path/'a'))
    layers = pd.read_csv(tmp_path/'a'/'layers.csv')
    networks = pd.read_csv(tmp_path/'a'/'networks.csv')
    assert set(networks.network) == {'weights', 'MobileNetV2', 'VGG_16'}
    assert 'INT3/INT8' in capsys.readouterr().out
    for name, bits in (('float32', 32), ('INT8', 8), ('FLOAT6_E3', 6), ('INT3/INT8', 3)):
        for row in networks.to_dict('records'):
            net = (load_model(weights) if row['network'] == 'weights'
                   else build_model(row['network']))
            own = layers[layers.network == row['network']]
            table = model_complexity(net)
            assert row[f'kb_{name}']*1000 == model_bytes(fold_batchnorm(net), bits)
            assert 0 <= own[f'bytes_{name}'].sum() - row[f'kb_{name}']*1000 <= len(own), (
                'layers are rounded up to whole bytes')
            assert [row[k] for k in (
                'params', 'macs', 'ptflops')] == table[['params', 'macs', 'ptflops']].sum().tolist()
            assert own.name.tolist() == table.name.tolist()
            assert own.macs.tolist() == table.macs.tolist()
            conv = next((n, m) for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d))
            assert own[own.name == conv[0]][f'bytes_{name}'].item() == -(
                -(bits*conv[1].weight.numel() + 32*conv[1].out_channels)//8)
    assert (layers[layers.kind == 'bn'].bytes_float32 == 0).all()
    assert list(layers)[:2] == ['network', 'name']
    paper = networks.set_index('network')
    assert round(paper.params['MobileNetV2']/1e6, 2) == 2.25
    assert round(paper.ptflops['VGG_16']/1e6, 1) == 333.4
    facts = json.loads((tmp_path/'a'/'manifest.json').read_text())
    assert facts['formats'] == ['INT8', 'FLOAT6_E3', 'INT3/INT8']
    assert facts['layers'] == len(layers)
    assert {'command', 'torch', 'python'} <= set(facts)


def test_cost_follows_the_image_size(weights, tmp_path):
    save_model(build_model('ResNet_18', width=.05), tmp_path/'x'/'weights.pt')
    save_model(build_model('ResNet_18', width=.07), tmp_path/'y'/'weights.pt')
    for size in (32, 64):
        run_cost(f'{tmp_path}/x/weights.pt,{tmp_path}/y/weights.pt', size=size,
                 out=str(tmp_path/str(size)))
    small = pd.read_csv(tmp_path/'32'/'networks.csv').set_index('network')
    large = pd.read_csv(tmp_path/'64'/'networks.csv').set_index('network')
    assert small.index.tolist() == ['x/weights', 'y/weights']
    assert (small.params == large.params).all()
    assert 3.9 < (large.macs/small.macs).iloc[0] < 4.1


def test_cost_errors(weights, tmp_path, capsys):
    out = dict(out=str(tmp_path/'o'))
    refused(capsys, 'there is none at', run_cost, str(tmp_path/'none.pt'), **out)
    refused(capsys, "got 'INT1'", run_cost, weights, 'INT8,INT1', **out)
    for text in ('', ' , '):
        refused(capsys, '`model` must name at least one', run_cost, text, **out)
    refused(capsys, '`formats` must name at least one', run_cost, weights, '', **out)
    refused(capsys, 'must not name one twice', run_cost, f'{weights},{weights}', **out)
    refused(capsys, '`size` must be 32: AlexNet_BN takes images of no other side', run_cost, weights,
            size=48, **out)
    refused(capsys, '`size` must be', run_cost, weights, size=-1, **out)
    for folder in ('a', 'b'):
        save_model(build_model('AlexNet_BN', width=.05), tmp_path/folder/'same'/'w.pt')
    refused(capsys, 'differ in their name', run_cost,
            f'{tmp_path}/a/same/w.pt,{tmp_path}/b/same/w.pt', **out)
    (tmp_path/'junk.pt').write_text('junk')
    refused(capsys, 'damaged', run_cost, str(tmp_path/'junk.pt'), **out)
    assert not (tmp_path/'o').exists()


def test_generated_images(weights, tmp_path, capsys):
    out = tmp_path/'g'
    run_generate(weights, n=30, out=str(out), steps=3, width=8, boundary=.2)
    assert names(out) == ['classes.json', 'data.npy', 'generator.pt', 'history.csv',
                          'label.npy', 'manifest.json', 'question.json', 'sheet.png']
    data = load_data(out)
    net = load_model(weights)
    assert len(data) == 30
    assert tuple(data.classes) == tuple(net.classes)
    x, targets = generate(load_generator(out/'generator.pt'), 30, .2, 0)
    assert (data.images == (x*255).round().byte().permute(0, 2, 3, 1).numpy()).all()
    assert np.allclose(data.labels, targets.numpy(), atol=1e-6)
    assert sorted((data.labels > 0).sum(1)) == [1]*24 + [2]*6
    assert len(pd.read_csv(out/'history.csv')) == 3
    facts = json.loads((out/'manifest.json').read_text())
    share = (predict(net, data.x).argmax(1).numpy() == data.y).mean()
    assert facts['agreement'] == round(float(share), 4)
    assert facts['steps'] == 3
    assert facts['n'] == 30
    assert 0 <= facts['clip_rate'] <= 1
    assert facts['knows'] == 'batch-norm statistics'
    assert f'{share:.1%}' in capsys.readouterr().out
    sheet = np.asarray(Image.open(out/'sheet.png').convert('RGB'))
    assert sheet.shape[1] > 300
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_a_generator_is_trained_once(weights, tmp_path, monkeypatch):
    out = str(tmp_path/'g')
    trained = []
    train = transfer.train_generator
    monkeypatch.setattr(transfer, 'train_generator',
                        lambda *a, **k: trained.append(k) or train(*a, **k))
    draw = transfer.generate
    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(transfer, 'generate', killed)
    with pytest.raises(KeyboardInterrupt):
        run_generate(weights, n=12, out=out, steps=3, width=8, seed=5)
    assert names(tmp_path/'g') == ['generator.pt', 'history.csv', 'question.json']
    monkeypatch.setattr(transfer, 'generate', draw)
    run_generate(weights, n=12, out=out, steps=3, width=8, seed=5)
    assert len(trained) == 1
    assert trained[0] == dict(seed=5, steps=3, size=32, width=8)
    first = load_data(out)
    run_generate(weights, n=12, out=str(tmp_path/'h'), steps=3, width=8, seed=5)
    assert (load_data(tmp_path/'h').images == first.images).all(), (
        'the interrupted run ends where the other does')
    run_generate(weights, n=16, out=out, steps=3, width=8, seed=5, boundary=0.)
    assert len(trained) == 2
    assert len(load_data(out)) == 16
    assert (load_data(out).labels.max(1) == 1).all()
    run_generate(weights, n=12, out=str(tmp_path/'i'), steps=3, width=8, seed=6)
    assert (load_data(tmp_path/'i').images != first.images).any()


def test_generate_errors(weights, tmp_path, capsys):
    out = dict(out=str(tmp_path/'o'))
    refused(capsys, 'there is none at', run_generate, str(tmp_path/'none.pt'), **out)
    refused(capsys, '`n` must be a whole number, at least 1', run_generate, weights, n=0, **out)
    for b in (-.1, 1.1, float('nan')):
        refused(capsys, '`boundary` must be a share', run_generate, weights, boundary=b, **out)
    assert not (tmp_path/'o').exists()
    refused(capsys, '`out` must be a folder; .* is a file', run_generate, weights, out=weights)
    refused(capsys, 'holds other files', run_generate, weights, out=str(Path(weights).parent))
    run_generate(weights, n=10, steps=2, width=8, **out)
    for k, v in dict(steps=3, width=12, seed=1).items():
        refused(capsys, f'another question: {k} is', run_generate, weights,
                **dict(n=10, steps=2, width=8) | {k: v}, **out)
    other = tmp_path/'other.pt'
    save_model(build_model('AlexNet_BN', width=.125), other)
    refused(capsys, 'another question: network is', run_generate, str(other), n=10, steps=2,
            width=8, **out)
    for text in ('{', '[1]', ''):
        (tmp_path/'o'/'question.json').write_text(text)
        refused(capsys, 'question.json is damaged', run_generate, weights, n=10, steps=2,
                width=8, **out)


def test_a_question_that_is_refused_leaves_the_folder_free(weights, tmp_path, capsys):
    out = tmp_path/'out'
    refused(capsys, '`width` must be a whole number, at least 2', run_generate, weights, n=4, width=1,
            out=str(out))
    assert not [*out.iterdir()]
    run_generate(weights, n=4, steps=2, width=8, out=str(out))
    refused(capsys, 'width is 8 there and 1 here', run_generate, weights, n=4, steps=2, width=1,
            out=str(out))
    assert json.loads((out/'question.json').read_text())['width'] == 8, 'an answered question stays'
    kept = tmp_path/'kept'
    kept.mkdir()
    (kept/'question.json').write_text((out/'question.json').read_text())
    refused(capsys, 'width is 8 there', run_generate, weights, n=4, steps=2, width=1, out=str(kept))
    assert names(kept) == ['question.json'], 'nor is that of another run taken away'


def test_quantised_copies(weights, tmp_path, capsys):
    out = tmp_path/'q'
    run_quantize(weights, 'INT8,INT3/INT8,POT4', images='digits', n=60, out=str(out))
    table = pd.read_csv(out/'quantized.csv')
    net = load_model(weights)
    assert names(out) == ['INT3-INT8.pt', 'INT8.pt', 'POT4.pt', 'manifest.json',
                          'quantized.csv', 'question.json']
    assert list(table) == ['format', 'file', 'size_kb', 'agreement', 'n', 'left_float']
    assert table.format.tolist() == ['INT8', 'INT3/INT8', 'POT4']
    pool = digits('train')
    x = unlabelled_images(named_model(weights), 60, 0, 'digits')
    everything = {o.tobytes() for o in pool.images}
    assert len(x) == 60
    assert all(o.tobytes() in everything for o in to_uint8(x))
    for row in table.to_dict('records'):
        q = load_quantized(out/row['file'])
        made = quantize(net, row['format'], x)
        assert torch.equal(predict(q, x), predict(made, x))
        assert str(q.spec) == row['format']
        assert row['agreement'] == pytest.approx(
            (predict(q, x).argmax(1) == predict(net, x).argmax(1)).float().mean().item())
        assert row['size_kb']*1000 == model_bytes(q, q.spec.weights.bits)
        assert row['n'] == 60
    assert table.agreement.nunique() > 1
    facts = json.loads((out/'manifest.json').read_text())
    assert facts['formats'] == ['INT8', 'INT3/INT8', 'POT4']
    assert facts['images'] == 'digits'
    assert facts['n'] == 60
    assert 'INT3-INT8.pt' in capsys.readouterr().out


def test_an_interrupted_run_is_continued(weights, tmp_path, monkeypatch):
    out = tmp_path/'q'
    made = []
    real = transfer.quantize
    def counted(net, spec, x):
        made.append(str(spec))
        return real(net, spec, x)
    def killed(table, path): raise KeyboardInterrupt
    monkeypatch.setattr(transfer, 'quantize', counted)
    def ask(formats): run_quantize(weights, formats, images='digits', n=30, out=str(out))
    def dies(net, spec, x):
        if str(spec) == 'POT4': raise KeyboardInterrupt
        return counted(net, spec, x)
    monkeypatch.setattr(transfer, 'quantize', dies)
    with pytest.raises(KeyboardInterrupt):
        ask('INT8,INT4,POT4,INT2')
    assert names(out) == ['INT4.pt', 'INT8.pt', 'quantized.csv', 'question.json']
    assert made == ['INT8', 'INT4']
    monkeypatch.setattr(transfer, 'quantize', counted)
    first = (out/'INT8.pt').stat().st_mtime_ns
    write = transfer._write
    # the copy is on disk, its row is not
    monkeypatch.setattr(transfer, '_write', killed)
    with pytest.raises(KeyboardInterrupt):
        ask('INT8,INT4,POT4,INT2')
    monkeypatch.setattr(transfer, '_write', write)
    ask('INT8,INT4,POT4,INT2')
    assert made == ['INT8', 'INT4', 'POT4', 'POT4', 'INT2']
    assert (out/'INT8.pt').stat().st_mtime_ns == first
    rows = pd.read_csv(out/'quantized.csv')
    ask('INT2,INT8')
    assert len(made) == 5
    assert pd.read_csv(out/'quantized.csv').equals(rows)
    assert rows.format.tolist() == ['INT8', 'INT4', 'POT4', 'INT2']
    (out/'INT4.pt').unlink()
    ask('INT4')
    assert made[5:] == ['INT4'], 'a file that is gone is made again, the rows of the others stay'
    assert pd.read_csv(out/'quantized.csv').equals(rows), (
        'a file that is gone is made again, the rows of the others stay')
    run_quantize(weights, 'INT8,INT4,POT4,INT2', images='digits', n=30, out=str(tmp_path/'whole'))
    assert pd.read_csv(tmp_path/'whole'/'quantized.csv').equals(rows), (
        'in one go or in pieces, the rows are the same')


def test_images_from_a_folder_and_from_nothing(weights, tmp_path, monkeypatch):
    run_generate(weights, n=24, out=str(tmp_path/'g'), steps=2, width=8)
    run_quantize(weights, 'INT8', images=str(tmp_path/'g'), n=20, out=str(tmp_path/'a'))
    some = unlabelled_images(named_model(weights), 20, 0, str(tmp_path/'g'))
    made = load_data(tmp_path/'g').images
    assert len(some) == 20
    assert {o.tobytes() for o in to_uint8(some)} <= {o.tobytes() for o in made}
    assert torch.equal(predict(load_quantized(tmp_path/'a'/'INT8.pt'), some),
                       predict(quantize(load_model(weights), 'INT8', some), some))
    def forbidden(*args, **kwargs): raise AssertionError('no generator is trained for ranges')
    monkeypatch.setattr(transfer, 'train_generator', forbidden)
    moved = []
    crops = transfer.Probes.crops
    monkeypatch.setattr(transfer.Probes, 'crops', lambda *a: moved.append(a[1:]) or crops(*a))
    for formats in ('INT8', 'INT8,INT4'):
        run_quantize(weights, formats, out=str(tmp_path/'b'), seed=3)
    assert moved == [(32, 3)], 'the crops in the folder are taken again'
    assert names(tmp_path/'b') == ['INT4.pt', 'INT8.pt', 'crops.pt', 'manifest.json',
                                   'quantized.csv', 'question.json']
    x = load_crops(tmp_path/'b'/'crops.pt').x
    assert torch.equal(x, Probes.crops(load_model(weights), 32, 3).x)
    assert torch.equal(predict(load_quantized(tmp_path/'b'/'INT4.pt'), x),
                       predict(quantize(load_model(weights), 'INT4', x), x))
    assert json.loads((tmp_path/'b'/'manifest.json').read_text())['images'] == 'crops'


def test_what_ranges_come_from_is_said(weights, tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    for job, told in ((run_quantize, 'formats'), (export_command, 'format')):
        how = {'model': weights, told: 'INT8'}
        job(**how, out=str(tmp_path/f'{told}-crops'))
        assert ': 200 crops of bundled photographs, moved to' in capsys.readouterr().out
        job(**how, images='digits', n=20, out=str(tmp_path/f'{told}-digits'))
        assert ': 20 images of digits.' in capsys.readouterr().out
    crops, own = ((tmp_path/f'format-{o}'/'INT8.onnx').read_bytes() for o in ('crops', 'digits'))
    assert crops != own


def test_quantize_errors(weights, tmp_path, capsys):
    out = dict(out=str(tmp_path/'o'))
    refused(capsys, 'there is none at', run_quantize, str(tmp_path/'none.pt'), **out)
    refused(capsys, "got 'INT99'", run_quantize, weights, 'INT8,INT99', **out)
    refused(capsys, '`formats` must name at least one', run_quantize, weights, ',', **out)
    refused(capsys, 'must not name one twice', run_quantize, weights, 'INT8,INT8', **out)
    refused(capsys, "`images` must be", run_quantize, weights, 'INT8',
            images=str(tmp_path/'nowhere'), **out)
    refused(capsys, '`n` must be a whole number, at least 1', run_quantize, weights, 'INT8', images='digits',
            n=0, **out)
    assert not (tmp_path/'o').exists()
    refused(capsys, 'holds other files', run_quantize, weights, 'INT8', images='digits', n=20,
            out=str(Path(weights).parent))
    assert not (Path(weights).parent/'question.json').exists()
    run_quantize(weights, 'INT8', images='digits', n=20, **out)
    refused(capsys, 'another question: images is', run_quantize, weights, 'INT8', images='digits', n=21,
            **out)
    refused(capsys, 'another question: images is', run_quantize, weights, 'INT8', **out)
    other = tmp_path/'other.pt'
    save_model(build_model('AlexNet_BN', width=.125), other)
    refused(capsys, 'another question: network is', run_quantize, str(other), 'INT8',
            images='digits', n=20, **out)
    file = tmp_path/'o'/'INT8.pt'
    whole = file.read_bytes()
    file.write_bytes(whole[:3000])
    refused(capsys, 'INT8.pt is damaged', run_quantize, weights, 'INT8', images='digits', n=20, **out)
    file.write_bytes(whole)
    broken = load_state(weights)
    next(iter(broken['state_dict'].values())).fill_(float('nan'))
    save_state(broken, tmp_path/'nan.pt')
    refused(capsys, 'finite', run_quantize, str(tmp_path/'nan.pt'), 'INT8', images='digits', n=20,
            out=str(tmp_path/'nan'))
    assert not list((tmp_path/'nan').glob('*.pt'))
