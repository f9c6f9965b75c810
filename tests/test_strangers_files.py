"What people keep, put together and give away: copies in files, several pools, folders of their own"
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import foolbox
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from torchvision import transforms

import robustnb as rn
from robustnb.attacks.adapters import from_foolbox
from robustnb.augmentation.transforms import from_torchvision
from robustnb.commands.command_line import main
from robustnb.commands.curation import build_set_command, score_set_command
from robustnb.commands.evaluation import evaluate_command
from robustnb.commands.train import train_command
from robustnb.curation.hidden import (
    hidden_set, load_hidden, proxy_networks, rank_training_sets, score_training_sets)
from robustnb.curation.published import published_mixture
from robustnb.curation.recipe import builder_sources
from robustnb.curation.training_sets import concatenate_sets, unchanged
from robustnb.curation.unseen import unseen_families
from robustnb.files import check_folder
from robustnb.metrics import bootstrap
from robustnb.quant.checkpoints import load_quantized, save_quantized
from robustnb.quant.export import check_export, export_onnx, run_onnx
from robustnb.quant.mixed_precision import quantize_mixed, weight_noise
from robustnb.quant.ptq import calibrate
from robustnb.quant.reconstruction import adaround
from robustnb.quant.targets import runs_in_integers


def pictures(n=8, channels=3, size=16):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def network(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(24, 5)).eval()


def pool(classes, n=20):
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return rn.ImageSet(images, np.arange(n) % len(classes), classes)


def files(root, names, size=32):
    rng = np.random.default_rng(0)
    for name in names:
        path = root/name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return str(root)


def test_a_copy_is_not_saved_as_the_network_it_was_made_of(tmp_path):
    net = rn.build_model('AlexNet', width=.0625, n_classes=4)
    with pytest.raises(TypeError, match='got a copy of AlexNet .* `save_quantized` keeps'):
        rn.save_model(rn.quantize(net, 'INT4', pictures(size=32)), tmp_path/'q.pt')
    with pytest.raises(ValueError, match='`path` must not end in .safetensors'):
        rn.save_model(net, tmp_path/'net.safetensors')
    assert not any(tmp_path.iterdir())


def test_a_mixed_copy_from_a_file_knows_its_formats(tmp_path):
    x = pictures(6, size=32)
    net = rn.build_model('AlexNet', width=.0625, n_classes=4)
    table = weight_noise(net, x, formats=('POT4', 'INT8')).query('format == "POT4"')[['layer', 'format']]
    mixed = quantize_mixed(net, table, 'INT8', x)
    save_quantized(mixed, tmp_path/'q.pt')
    again = load_quantized(tmp_path/'q.pt')
    assert again.layer_formats == mixed.layer_formats
    assert not runs_in_integers(again)
    assert export_onnx(again, tmp_path/'q.onnx', (3, 32, 32))['format'] == 'POT4 weights beside INT8'
    adaround(net, again, x, steps=1)


def test_an_export_holds_all_that_a_layer_does_or_none(tmp_path):
    def hooked(net): net[2].register_forward_hook(lambda m, args, out: 2*out)
    def before(net): net[5].register_forward_pre_hook(lambda m, args: (2*args[0],))
    def replaced(net):
        own = net[0].forward
        net[0].forward = lambda x: 3*own(x)
    for change in (hooked, before, replaced):
        net = network()
        change(net)
        with pytest.raises(TypeError, match='has a hook or a `forward` of its own'):
            export_onnx(net, tmp_path/'f.onnx', (3, 16, 16))
    net = network()
    prune.random_unstructured(net[0], 'weight', .5)
    nn.utils.weight_norm(net[5])
    export_onnx(net, tmp_path/'f.onnx', (3, 16, 16))
    assert check_export(net, tmp_path/'f.onnx', pictures())['max_logit_difference'] < 1e-5
    net[1] = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(TypeError, match='uses the statistics of the batch'):
        export_onnx(net.eval(), tmp_path/'g.onnx', (3, 16, 16))


def test_an_export_draws_no_global_numbers_and_minds_no_default_type(tmp_path):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, 3, 3))
        def forward(self, x): return F.conv2d(x, self.weight).mean((2, 3))
    net = Functional().eval()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        export_onnx(net, tmp_path/'f.onnx', (3, 16, 16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert state.equal(torch.get_rng_state())


def test_images_that_photographs_cannot_stand_in_for():
    few = rn.assess(network(4), 'INT8', None, unlabelled=pictures(8, 4))
    assert not few.table.crops[0]
    double = rn.assess(network().double(), 'INT8', None, unlabelled=pictures(8).double())
    assert double.table.crops[0]
    empty = network()
    for p in empty[5].parameters(): nn.init.zeros_(p)
    with pytest.raises(ValueError, match='`model` must tell its classes apart; its logits are all the same'):
        rn.assess(empty, 'INT8', None, unlabelled=pictures())
    with pytest.raises(ValueError, match=r"`accuracy` must be a share above chance, 1/5, .*got '.7'"):
        rn.assess(network(), 'INT8', None, unlabelled=pictures(), accuracy='.7')
    assert len(rn.assess(network(), 'INT8', None, unlabelled=pictures(), seed=-1).table) == 1


def test_attacks_of_foolbox_take_images_as_they_come():
    net, x = network(), pictures()
    y = rn.predict(net, x).argmax(1)
    attack = from_foolbox(foolbox.attacks.LinfPGD(steps=3, random_start=False))
    expected = attack(net, x, y, rn.Linf(3/255))
    assert not expected.equal(x)
    assert attack(net, x.clone().requires_grad_(), y, rn.Linf(3/255)).equal(expected)
    with torch.inference_mode():
        assert attack(net, x.clone(), y.clone(), rn.Linf(3/255)).equal(expected)


def test_fractions_are_budgets():
    net, x = network(), pictures()
    y = rn.predict(net, x).argmax(1)
    assert rn.pgd(net, x, y, rn.Linf(Fraction(2, 255))).equal(rn.pgd(net, x, y, rn.Linf(2/255)))
    with pytest.raises(TypeError, match='`attacks` must be functions .* one after the other'):
        rn.multi_attack([rn.fgsm, rn.pgd])
    with pytest.raises(ValueError, match='`attacks` must return images of shape .*gave tuple'):
        rn.multi_attack(lambda *args, **kw: (x,))(net, x, y, rn.Linf(.1))
    with pytest.raises(TypeError, match='`targets` must be a whole number, at least 0; got 2.5'):
        rn.cascade(net, x, y, rn.Linf(.1), targets=2.5)


def test_labels_of_several_pools_go_by_name():
    here, there = pool(['cat', 'dog']), pool(['dog', 'cat'])
    made = rn.build_training_set(here, dict(a=unchanged, b=(there, unchanged)), dict(a=.5, b=.5), n=10)
    rows = made.rows[made.rows.source == 'b']
    assert [there.classes[there.y[i]] for i in rows.image] == [made.classes[k] for k in made.y[rows.index]]
    alone = [rn.build_training_set(o, dict(c=unchanged), dict(c=np.float32(1)), n=6) for o in (here, there)]
    both = concatenate_sets(alone)
    assert [both.classes[k] for k in both.y] == [o.classes[k] for o in alone for k in o.y]
    with pytest.raises(ValueError, match="the same classes; got 'cat', 'dog' and 'ant', 'bee', 'cow'"):
        rn.build_training_set(here, dict(a=(pool(['ant', 'bee', 'cow']), unchanged)), dict(a=1.), n=4)
    with pytest.raises(TypeError, match='`parts` must be sets with a history; got ImageSet'):
        concatenate_sets([here, there])


def test_families_called_by_numbers_are_the_same_ones_from_a_file(tmp_path):
    classes = [f'c{k}' for k in range(10)]
    hidden = load_hidden(files(tmp_path/'hidden', [f'{s}/{c}/0.png' for s in '12' for c in classes]))
    rng = np.random.default_rng(0)
    data = rn.ImageSet(rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10, classes)
    nets, config = proxy_networks(width=.0625, epochs=1)
    nets = {'preactresnet18': nets['preactresnet18']}
    score = lambda *seeds: score_training_sets({'s': data}, hidden, nets, config, seeds, tmp_path/'runs')
    score(0)
    rows = score(0, 1)
    assert {*map(type, rows.family)} == {str}
    pd.testing.assert_frame_equal(rows, score(0, 1))
    assert [c for c in rank_training_sets(rows, ('final',)) if c in '12'] == ['1', '2']


def test_folders_are_looked_at_before_the_work(tmp_path):
    worked = []
    def work(x, y, generator):
        worked.append(len(x))
        return x, y
    (tmp_path/'file').write_text('')
    for bad in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(ValueError, match='`folder` must be a folder to keep files in; .*file is a file'):
            rn.build_training_set(pool(['cat', 'dog']), dict(a=work), dict(a=1.), n=4, folder=bad)
    assert not worked
    assert check_folder(None) is None and check_folder(tmp_path/'new'/'one') == tmp_path/'new'/'one'


def test_a_class_may_be_called_train_and_what_is_not_divided_is(tmp_path):
    flat = files(tmp_path/'flat', [f'{c}/{i}.png' for c in ('bus', 'car', 'train') for i in range(8)])
    out = tmp_path/'run'
    facts = train_command(data=flat, model='AlexNet', width=.0625, epochs=1, out=str(out))
    assert facts['images'] == 18, 'a quarter is left to test with'
    assert evaluate_command(weights=str(out/'weights.pt'), test=flat, attacks='fgsm', n=6,
                            out=str(tmp_path/'e'))
    around = [f'all/{s}/{c}/{i}.png' for s in ('train', 'test') for c in ('bus', 'train') for i in range(4)]
    divided = train_command(data=files(tmp_path/'divided', around), model='AlexNet', width=.0625, epochs=1,
                            out=str(tmp_path/'two'))
    assert divided['images'] == 8


def test_a_class_whose_link_leads_nowhere_is_missed(tmp_path):
    root = files(tmp_path/'linked', ['ant/1.png', 'cow/1.png'])
    os.symlink('/mnt/away/bee', Path(root)/'bee')
    with pytest.raises(FileNotFoundError, match='bee leads to /mnt/away/bee, and nothing is there'):
        rn.load_data(root)


def test_boxes_may_answer_with_arrays():
    weight = torch.randn(768, 8, generator=torch.Generator().manual_seed(0))
    x = (255*pictures(2)).round()/255
    said = lambda kind: rn.bandit_descriptor(lambda x: kind(x.flatten(1) @ weight), x, torch.zeros(2, 1, 8),
                                             rn.SSIM(.9))
    assert said(torch.Tensor.numpy).equal(said(lambda o: o))
    with pytest.raises(ValueError, match='`targets` must be descriptors .*in a tensor.*got ndarray'):
        rn.bandit_descriptor(lambda x: x.flatten(1) @ weight, x, np.zeros((2, 1, 8)), rn.SSIM(.9))


def test_a_calibration_is_that_of_the_weights_it_was_made_from():
    net = network()
    ranges = calibrate(net, pictures())
    copy = rn.quantize(net, 'INT8', ranges)
    with torch.no_grad(): net[0].weight.mul_(2)
    with pytest.raises(ValueError, match='`images` must be the `Calibration` of the weights as they are'):
        rn.quantize(net, 'INT8', ranges)
    with torch.no_grad(): net[0].weight.div_(2)
    assert rn.quantize(net, 'INT8', ranges)(pictures()).equal(copy(pictures()))


def test_a_network_that_answers_with_a_record_can_be_exported(tmp_path):
    @dataclass
    class Answer: logits: torch.Tensor
    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x): return Answer(self.net(x))
    net = Recorded().eval()
    export_onnx(net, tmp_path/'net.onnx', (3, 16, 16))
    assert torch.allclose(run_onnx(tmp_path/'net.onnx', pictures()), net(pictures()).logits, atol=1e-6)


def test_a_folder_around_splits_is_told_apart_from_a_class(tmp_path):
    root = files(tmp_path/'set', [f'all/{s}/{c}/1.png' for s in ('train', 'val') for c in ('ant', 'bee')])
    assert rn.load_data(root, 'val').classes == ('ant', 'bee')
    with pytest.raises(ValueError, match='`split` must name one of the splits of .*train.*val'):
        rn.load_data(root)
    with pytest.raises(ValueError, match="`crop_pct` must lie in .* got '.5' with size 16"):
        rn.load_data(root, 'val', 16, crop_pct='.5')
    with pytest.raises(ValueError, match=r"`fraction` must lie inside \(0, 1\); got 'a'"):
        rn.load_splits(Path(root)/'all'/'val', fraction='a')


def test_networks_of_other_classes_make_no_training_set(tmp_path):
    birds = ['auk', 'emu', 'owl']
    pool(birds, 30).save(tmp_path/'birds')
    for name, classes in (('turned', birds[::-1]), ('other', ['ant', 'bee', 'fly'])):
        net = rn.build_model('AlexNet', 3, .0625)
        net.classes = tuple(classes)
        rn.save_model(net, tmp_path/name/'weights.pt')
    build = lambda *names: build_set_command(
        'clean', ','.join(str(tmp_path/o/'weights.pt') for o in names), str(tmp_path/'birds'), n=6,
        out=str(tmp_path/'made'))
    with pytest.raises(SystemExit, match='auk'): build('other')
    with pytest.raises(SystemExit, match="turned/weights has 'owl', 'emu', 'auk', other/weights 'ant'"):
        build('turned', 'other')
    rn.save_model(rn.build_model('AlexNet', 4, .0625), tmp_path/'four'/'weights.pt')
    with pytest.raises(SystemExit, match='same classes; turned/weights has .* four/weights 4'):
        build('turned', 'four')
    two = ','.join(str(tmp_path/o/'weights.pt') for o in ('four', 'turned'))
    with pytest.raises(SystemExit, match='same classes; turned/weights has .* four/weights 4'):
        score_set_command(str(tmp_path/'birds'), two, test=str(tmp_path/'birds'), out=str(tmp_path/'made'))
    assert not (tmp_path/'made').exists()
    rn.save_model(rn.build_model('AlexNet', 3, .0625), tmp_path/'nameless'/'weights.pt')
    build('nameless', 'turned')
    made = rn.load_data(tmp_path/'made')
    assert made.classes == ('owl', 'emu', 'auk')
    before = rn.load_data(tmp_path/'birds')
    class_of = {o.tobytes(): before.classes[k] for o, k in zip(before.images, before.y)}
    assert all(class_of[o.tobytes()] == made.classes[k] for o, k in zip(made.images, made.y))


def test_seeds_of_intervals_may_be_negative():
    values = np.random.default_rng(0).random(40)
    draw = lambda seed: bootstrap(np.mean, values, seed=seed)
    assert draw(-1) == draw(-1) != draw(1)
    assert draw(3)[0] == values.mean()


def test_tensors_need_no_transform_to_tensors():
    to_tensor = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    with pytest.raises(ValueError, match='Leave `ToTensor` and `PILToTensor` out'):
        from_torchvision(to_tensor)(pictures(), torch.eye(8), torch.Generator())


@pytest.mark.parametrize('name, use', (
    ('models', lambda nets: hidden_set(pool(['cat', 'dog']), nets, n=10)), ('models', unseen_families),
    ('nets', builder_sources), ('nets', partial(published_mixture, 'lyx3911'))))
def test_networks_have_names(name, use):
    with pytest.raises(TypeError, match=f'`{name}` must be a dict with the name of each network.*got list'):
        use([network()])
    with pytest.raises(ValueError, match=f'`{name}` must hold at least one network'): use({})


def test_nothing_is_asked_twice(capsys):
    with pytest.raises(SystemExit, match="`attacks` must not name one twice; got 'fgsm,FGSM'"):
        evaluate_command('timm:resnet18', attacks='fgsm,FGSM')
    with pytest.raises(SystemExit):
        main(['assess', 'timm:resnet18', '--images', 'a', '--images', 'b'])
    assert '--images is given twice: a and b.' in capsys.readouterr().err
