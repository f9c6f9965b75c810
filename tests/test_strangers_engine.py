"What strangers to the attack engine met, found by reports about other libraries of attacks"
import random, threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from robustnb.attacks.adaptive_pgd import apgd, apgd_targeted
from robustnb.attacks.gradient import (
    cross_entropy, dlr_to, is_correct, margin, margin_to, multi_attack, pgd, restarts)
from robustnb.attacks.minimum_norm import deepfool, fab
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.standard import autoattack, cascade, run_cascade
from robustnb.attacks.threat_models import L2, Linf
from robustnb.contract import answers_at_random, predict
from robustnb.core import memory_layout, round_to_8bit
from robustnb.evaluation.auditing import most_still_to_fall
from robustnb.evaluation.checks import red_flags
from robustnb.evaluation.publishing import craft_adversarial, save_adversarial
from robustnb.evaluation.robust_accuracy import evaluate, on_8bit_images, summarize, transfer_attack
from robustnb.models.loading import load_model
from robustnb.models.wrapping import wrap_model

from helpers_attacks import make_batch, make_net

threat = Linf(.02)


class Moved(nn.Module):
    "Logits by a factor, a power of two, or far from zero and close together: the same classes"
    def __init__(self, net, factor=1, shift=0):
        super().__init__()
        self.net, self.factor, self.shift = net, factor, shift
    def forward(self, x): return self.net(x)*self.factor + self.shift


def test_what_computes_in_double_precision_is_judged_in_it(tmp_path):
    net = Moved(make_net(), shift=1e9).eval()
    x, y = make_batch(model=net, n=30)
    assert predict(net, x).dtype == torch.float64
    x_adv = cascade(net, x, y, threat)
    rows = evaluate(net, x, y, dict(fixed=lambda model, x, y, threat, *, generator: x_adv), threat)
    stand = len(is_correct(net, x_adv, y)[0])/30
    assert 0 < stand < 1 and summarize(rows).accuracy.tolist() == [1, stand, stand]
    assert rows.margin.dtype == np.float32 and (rows.correct == (rows.margin >= 0)).all()
    said = save_adversarial(tmp_path/'a.pt', net, x, y, x_adv.float().double(), Linf(.0201))
    assert said['clean_accuracy'] == 1


class NowAndThen(nn.Module):
    "Another image for one batch in two, as after Xie et al. 2018 (arXiv:1711.01991)"
    def __init__(self, net, coin):
        super().__init__()
        self.net = net
        self.coin = coin

    def forward(self, x): return self.net(x + .1*(self.coin() < .5))


@pytest.mark.parametrize('coin', [lambda: torch.rand(()).item(), np.random.rand, random.random])
def test_a_model_that_draws_now_and_then_is_one_that_draws(coin):
    x = make_batch()[0]
    for seed in range(20):
        for start in (torch.manual_seed, np.random.seed, random.seed): start(seed)
        assert answers_at_random(NowAndThen(make_net(), coin).eval(), x)


def test_what_draws_to_no_effect_answers_alike():
    assert not answers_at_random(NowAndThen(make_net(), lambda: 1 + torch.rand(())).eval(), make_batch()[0])


@pytest.mark.parametrize('attack', [fab, deepfool])
def test_the_size_of_logits_does_not_matter(attack):
    net = make_net(torch.float32)
    x, y = make_batch(torch.float32, 30)
    stand = [len(is_correct(net, attack(Moved(net, f).eval(), x, y, L2(.3), steps=20), y)[0])
             for f in (1, 2**-20, 2**-40, 2**-80)]
    assert 0 < stand[0] < 25 and len({*stand}) == 1


class Locked(nn.Module):
    "It can be neither copied nor traced"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.lock = threading.Lock()
    def forward(self, x):
        with self.lock:
            return self.net(x) if x.min() >= 0 else -self.net(x)


class Deep(nn.Module):
    "A convolution of three dimensions in front, which changes nothing"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.deep = nn.Conv3d(3, 3, 1, bias=False)
        self.deep.weight.data = torch.eye(3).view(3, 3, 1, 1, 1)
    def forward(self, x): return self.net(self.deep(x[:, :, None])[:, :, 0])


def scripted(net): return nn.Sequential(torch.jit.trace(net, make_batch(torch.float32)[0]))


@pytest.mark.parametrize('wrap', [Locked, Deep, scripted])
def test_the_cascade_needs_no_copy(wrap):
    net = make_net(torch.float32)
    odd = wrap(net).eval()
    x, y = make_batch(torch.float32, 30, odd)
    survives = run_cascade(odd, x, y, threat).survives
    assert 0 < survives.sum() < 30
    rows = evaluate(odd, x, y, dict(cascade=cascade), threat)
    assert rows.correct.tail(30).tolist() == survives.tolist()


def test_networks_with_weights_of_five_dimensions_are_trained():
    assert memory_layout(nn.Conv3d(3, 16, 1)) == torch.contiguous_format


doors = dict(several=multi_attack(pgd), restarts=restarts(pgd, 2), rounded=on_8bit_images(pgd),
             transfer=lambda model, *o, **kw: transfer_attack(model, pgd)(model, *o, **kw))


@pytest.mark.parametrize('door', doors)
def test_attacks_made_of_attacks_check_what_they_are_given(door):
    net = make_net(torch.float32)
    x = round_to_8bit(make_batch(torch.float32)[0])
    y = net(x).argmax(1)
    odd = [(x, y.int()), (x, y.numpy()), (x, y.tolist()), (x, y[:, None]), (x, y[:0]), (x, y[0]), (x, y-9),
           (x.numpy(), y), (x.tolist(), y), (x[:0], y[:0]), (x[0], y), (x*torch.nan, y)]
    for images, labels in odd:
        with pytest.raises((TypeError, ValueError), match='^`[xy]` must'):
            doors[door](net, images, labels, threat)


@pytest.mark.parametrize('attack', [cascade, autoattack, *doors.values()])
def test_numbers_are_no_generators(attack):
    net = make_net(torch.float32)
    x = round_to_8bit(make_batch(torch.float32)[0])
    for generator in (0, 5, np.random.default_rng(0)):
        with pytest.raises(TypeError, match='^`generator` must be a torch.Generator'):
            attack(net, x, net(x).argmax(1), threat, generator=generator)


@pytest.mark.parametrize('attack, loss', [(apgd_targeted, margin), (apgd_targeted, cross_entropy),
                                          (apgd, margin_to), (pgd, dlr_to)])
def test_losses_for_other_labels_are_named(attack, loss):
    with pytest.raises(ValueError, match='`loss` must take logits .* true and wanted labels'):
        attack(make_net(), *make_batch(), threat, loss=loss)


def test_few_classes_are_told_the_loss_that_a_targeted_attack_takes():
    net = make_net(classes=3)
    with pytest.raises(ValueError, match='Use `margin_to`'):
        apgd_targeted(net, *make_batch(model=net), threat)


class Saved(nn.Module):
    "Checkpoints of the kind that gives no gradient to the images alone"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return checkpoint(self.net, x, use_reentrant=True)


@pytest.mark.parametrize('attack', [pgd, cascade])
def test_an_error_on_the_way_back_is_named(attack):
    with pytest.raises(ValueError, match='`model` must let a gradient through; .*use_reentrant=False'):
        attack(Saved(make_net()).eval(), *make_batch(), threat)


def test_frozen_torchscript_is_told_its_way():
    frozen = torch.jit.freeze(torch.jit.trace(make_net(torch.float32), make_batch(torch.float32)[0]))
    with pytest.raises(ValueError, match='`model` must be in evaluation mode; .* Call `model.eval'):
        pgd(frozen, *make_batch(torch.float32), threat)
    x_adv = pgd(frozen.eval(), *make_batch(torch.float32), threat)
    assert torch.allclose(x_adv, pgd(make_net(torch.float32), *make_batch(torch.float32), threat), atol=1e-5)


@pytest.mark.parametrize('nothing', [Linf(0), L2(1e-9), SSIM(1.)])
def test_a_budget_of_nothing_is_no_sign_of_a_misleading_gradient(nothing):
    net = make_net(torch.float32)
    x, y = make_batch(torch.float32, 30, net)
    flags = red_flags(net, x, y, nothing).set_index('check').verdict
    assert flags['misleading gradient'] == 'not judged' and 'doubt' not in set(flags)


def test_counts_of_numpy_are_counts_and_others_are_named(tmp_path):
    net = make_net(torch.float32)
    x, y = make_batch(torch.float32)
    assert len(craft_adversarial(net, x, y, pgd, threat, tmp_path/'a', part=np.int64(5))) == 12
    with pytest.raises(TypeError, match='`seed` must be an integer; got None'):
        craft_adversarial(net, x, y, pgd, threat, tmp_path/'b', seed=None)
    assert most_still_to_fall(*np.array([50, 10, 1])) == most_still_to_fall(50, 10, 1)
    assert wrap_model(make_net().net, 3*[.5], 3*[.2], size=np.int64(8)).image_size == 8
    path = tmp_path/'net.pt'
    torch.save(resnet18().state_dict(), path)
    told = dict(name='torchvision:resnet18', path=path, mean=3*[.5], std=3*[.2])
    assert load_model(**told, n_classes=np.int64(1000)).n_classes == 1000
    for n in (0, -1, 10., '10', True):
        with pytest.raises((TypeError, ValueError), match='^`n_classes` must be a whole number'):
            load_model(**told, n_classes=n)
