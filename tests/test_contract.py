"Any classifier is asked in its own manner, through every door alike, or refused in a sentence"
import copy
import gc
import weakref
from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import fx, nn

from robustnb.attacks.adaptive_pgd import apgd
from robustnb.attacks.gradient import fgsm, multi_attack, pgd, restarts
from robustnb.attacks.minimum_norm import fab
from robustnb.attacks.score_based import random_search, square
from robustnb.attacks.standard import cascade
from robustnb.attacks.threat_models import Linf
from robustnb.attacks.transferable import ensemble
from robustnb.contract import (
    _manners, answers_at_random, check_repeatable, memory_format, open_model, predict, unwrap)
from robustnb.evaluation.checks import red_flags
from robustnb.evaluation.radius import first_order_radius
from robustnb.evaluation.robust_accuracy import evaluate
from robustnb.quant.ptq import quantize

threat = Linf(8/255)


def small(k=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, k)).eval()


def images(n=8, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (255*torch.rand(n, 3, size, size, generator=g)).round()/255


class Says(nn.Module):
    "A network and a form for its answer"
    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x): return self.form(self.net(x))


class Viewed(nn.Module):
    "A view behind a convolution, which channels-last memory does not allow"
    def __init__(self, view):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = nn.Linear(128, 5)
        self.view = view

    def forward(self, x):
        x = self.conv(x).relu()
        return self.fc(x.view(x.size(0), -1) if self.view else x.flatten(1))


class Scaled(nn.Module):
    "Normalises its images, in place or not"
    def __init__(self, in_place):
        super().__init__()
        self.net = small()
        self.in_place = in_place

    def forward(self, x): return self.net(x.sub_(.45).div_(.25) if self.in_place else (x-.45)/.25)


Answer = namedtuple('Answer', 'logits hidden')
forms = {'dict': lambda o: dict(logits=o, hidden=o[:, :2]), 'one key': lambda o: dict(out=o),
         'tuple': lambda o: (o, None), 'auxiliary': lambda o: (o, 2*o),
         'object': lambda o: Answer(o, o[:, :1]), 'maps': lambda o: o[:, :, None, None]}
attacks = dict(fgsm=fgsm, pgd=partial(pgd, steps=3), apgd=partial(apgd, steps=5), fab=partial(fab, steps=5),
               square=partial(square, queries=20), random_search=partial(random_search, tries=10),
               cascade=cascade, several=multi_attack(fgsm, pgd), restarts=restarts(pgd, 2))


def pairs():
    "Odd networks, each with the plain one that answers the same"
    for name, form in forms.items():
        yield pytest.param(Says(small(), form).eval(), small(), id=name)
    yield pytest.param(Viewed(True).eval(), Viewed(False).eval(), id='view')
    yield pytest.param(Scaled(True).eval(), Scaled(False).eval(), id='in place')
    yield pytest.param(nn.DataParallel(small()).eval(), small(), id='DataParallel')
    yield pytest.param(torch.compile(small(), backend='eager').eval(), small(), id='compiled')


odd_and_plain = pytest.mark.parametrize('odd, plain', list(pairs()))


@odd_and_plain
def test_predictions_are_those_of_the_plain_network(odd, plain):
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert (predict(odd, x, 3)-predict(plain, x)).abs().max() < 1e-5
    assert torch.equal(x, before)


@odd_and_plain
@pytest.mark.parametrize('name', attacks)
def test_attacks_find_what_they_find_on_the_plain_network(odd, plain, name):
    x = images()
    y = predict(plain, x).argmax(1)
    before = x.clone()
    draws = lambda: torch.Generator().manual_seed(1)
    found = attacks[name](odd, x, y, threat, generator=draws())
    assert torch.equal(x, before)
    assert (found-attacks[name](plain, x, y, threat, generator=draws())).abs().mean() < 1e-3


@odd_and_plain
def test_rows_flags_radii_and_ensembles(odd, plain):
    x = images(24)
    y = predict(plain, x).argmax(1)
    rows = [evaluate(o, x, y, dict(pgd=pgd), threat) for o in (odd, plain)]
    assert rows[0].correct.equals(rows[1].correct)
    assert (rows[0].margin-rows[1].margin).abs().max() < 1e-3
    radii = [first_order_radius(o, x, y) for o in (odd, plain)]
    assert (radii[0]-radii[1]).abs().max() < 1e-4
    assert (predict(ensemble([odd, plain]), x)-predict(plain, x)).abs().max() < 1e-5
    assert len(red_flags(odd, x, y, threat)) == len(red_flags(plain, x, y, threat))


@odd_and_plain
def test_quantised_copies_agree(odd, plain):
    x = images(16)
    logits = [predict(quantize(o, 'INT8', x), x) for o in (odd, plain)]
    assert (logits[0]-logits[1]).square().mean() < 1e-3*logits[1].var()


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x): return self.fc(x.reshape(1, -1))


refused = {
    'softmax': (nn.Sequential(small(), nn.Softmax(1)), ValueError, 'its answers are probabilities'),
    'one logit': (nn.Sequential(small(), nn.Linear(5, 1)), ValueError, 'got one logit'),
    'one logit, flat': (Says(small(), lambda o: o[:, 0]), ValueError, 'got one logit'),
    'bfloat16': (small().bfloat16(), ValueError, 'its weights are bfloat16 and `x` is float32'),
    'half': (small().half(), ValueError, 'its weights are float16'),
    'one at a time': (Single(), ValueError, 'Does its forward fix the batch size'),
    'no logits': (Says(small(), lambda o: dict(a=o, b=o)), TypeError, "['a', 'b']"),
    'text': (Says(small(), lambda o: 'cat'), TypeError, 'got str'),
    'classes': (Says(small(), lambda o: o.argmax(1)), TypeError, 'torch.int64'),
    'two tables': (Says(small(), lambda o: (o, o[:, :3])), TypeError, 'a tuple of shape'),
    'another size': (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), ValueError, 'Is this the image size'),
}
doors = dict(predict=lambda m, x, y: predict(m, x), pgd=lambda m, x, y: pgd(m, x, y, threat),
             square=lambda m, x, y: square(m, x, y, threat, queries=5),
             cascade=lambda m, x, y: cascade(m, x, y, threat),
             evaluate=lambda m, x, y: evaluate(m, x, y, {}, threat),
             quantize=lambda m, x, y: quantize(m, 'INT8', x),
             radius=lambda m, x, y: first_order_radius(m, x, y))


@pytest.mark.parametrize('door', doors)
@pytest.mark.parametrize('name', refused)
def test_what_has_no_right_answer_is_refused_at_every_door(name, door):
    model, error, words = refused[name]
    with pytest.raises(error) as e:
        doors[door](model.eval(), images(4), torch.zeros(4, dtype=torch.int64))
    assert words in str(e.value)
    assert '`model`' in str(e.value)
    assert '\n' not in str(e.value)


def test_float64_images_and_weights():
    x = images()
    with pytest.raises(ValueError, match='its weights are float32 and `x` is float64'):
        predict(small(), x.double())
    double = small().double()
    assert (predict(double, x.double())-predict(small(), x)).abs().max() < 1e-5
    with pytest.raises(ValueError, match='its weights are float64 and `x` is float32'):
        predict(double, x)


def test_a_model_is_asked_once_for_each_kind_of_image_and_forgotten_with_it():
    net = small()
    calls = []
    net.register_forward_pre_hook(lambda m, args: calls.append(tuple(args[0].shape)))
    open_model(net, images())
    open_model(net, images(3))
    asked = [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert calls == asked
    open_model(net, images(1, 16))
    assert calls[3:] == [(*o[:2], 16, 16) for o in asked]
    gone = weakref.ref(net)
    kept = len(_manners)
    del net
    gc.collect()
    assert gone() is None
    assert len(_manners) < kept


def test_wrappers_inside_are_taken_off_and_the_weights_stay_shared():
    net = small()
    whole = nn.Sequential(nn.Identity(), nn.Sequential(nn.DataParallel(net))).eval()
    bare = unwrap(whole)
    assert bare[1][0] is net
    assert type(whole[1][0]) is nn.DataParallel
    assert unwrap(net) is net
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert torch.equal(bare[1][0][0].weight, net[0].weight)


def test_an_adapted_model_can_be_copied_traced_and_read():
    odd = Viewed(True).eval()
    odd.classes = ('a', 'b', 'c', 'd', 'e')
    x = images()
    model = open_model(odd, x)
    assert model is not odd
    assert model.classes == odd.classes
    assert open_model(model, x) is model
    assert memory_format(model) == torch.contiguous_format
    again = copy.deepcopy(model)
    assert torch.equal(predict(again, x), predict(odd, x))
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(AttributeError):
        model.nothing_of_this_name


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x): return nn.functional.dropout(self.net(x), .5)


def test_opening_leaves_the_global_random_numbers_alone():
    models = Drops().eval(), small()
    before = torch.random.get_rng_state()
    assert [answers_at_random(o, images()) for o in models] == [True, False]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_answers_at_random_are_the_same_in_two_runs():
    model = Drops().eval()
    x = images(12)
    y = torch.zeros(12, dtype=torch.int64)
    with pytest.warns(UserWarning, match='answers at random'):
        first = evaluate(model, x, y, dict(pgd=pgd), threat)
    torch.rand(5)
    with pytest.warns(UserWarning):
        second = evaluate(model, x, y, dict(pgd=pgd), threat)
    assert first.margin.tolist() == second.margin.tolist()
    with pytest.warns(UserWarning):
        other = evaluate(model, x, y, dict(pgd=pgd), threat, seed=1)
    assert first.margin.tolist() != other.margin.tolist()
    with pytest.raises(ValueError, match='its answers are random'):
        check_repeatable(model, x)
    assert check_repeatable(small(), x)


class Pooled(nn.Module):
    "A network whose `squeeze` takes the batch away where there is one image, or its right twin"
    def __init__(self, squeeze):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.squeeze = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), squeeze

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.conv(x), 1)
        return self.fc(x.squeeze() if self.squeeze else x.flatten(1))


def test_a_single_image_left_for_the_last_batch():
    odd, plain = Pooled(True).eval(), Pooled(False).eval()
    x = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = predict(plain, x).argmax(1)
    torch.testing.assert_close(predict(odd, x, 3), predict(plain, x))
    for attack in (pgd, partial(square, queries=20), cascade):
        torch.testing.assert_close(attack(odd, x[:1], y[:1], threat), attack(plain, x[:1], y[:1], threat),
                                   rtol=0, atol=1e-4)
    rows = [evaluate(m, x, y, dict(pgd=pgd), threat, batch_size=3).correct.tolist() for m in (odd, plain)]
    assert rows[0] == rows[1]
    many = x.repeat(15, 1, 1, 1)[:101]
    torch.testing.assert_close(predict(quantize(odd, 'INT8', many), x[:1]),
                               predict(quantize(plain, 'INT8', many), x[:1]))


@pytest.mark.parametrize('ask', (lambda m, x, y: predict(m, x), lambda m, x, y: pgd(m, x, y, threat),
                                 lambda m, x, y: quantize(m, 'INT8', x)))
def test_an_answer_that_changes_with_the_batch_is_refused(ask):
    def net(**how):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **how), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(4).long()
    with pytest.raises(ValueError, match='`model` must answer each image by itself'):
        ask(net(track_running_stats=False), x, y)
    ask(net(), x, y)


def test_a_model_that_was_changed_is_asked_again():
    class Half(nn.Module):
        def forward(self, x): return x.mul_(.5)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    predict(model, x)
    model.insert(0, Half().eval())
    predict(model, x)
    assert torch.equal(x, before)
    model.append(nn.Softmax(1).eval())
    with pytest.raises(ValueError, match='its answers are probabilities'):
        predict(model, x)


class Switched(nn.Module):
    "A linear network with settings"
    def __init__(self):
        super().__init__()
        self.net = small()
        self.sigma = 0.
        self.soft = False
    def forward(self, x):
        logits = self.net(x)
        logits = logits + self.sigma*torch.randn_like(logits)
        return logits.softmax(1) if self.soft else logits


def test_a_model_whose_settings_were_changed_is_asked_again():
    x = images()
    net = Switched().eval()
    assert not answers_at_random(net, x)
    net.sigma = .5
    assert answers_at_random(net, x)
    with pytest.raises(ValueError, match='answers are random'):
        check_repeatable(net, x)
    net.sigma = 0.
    assert not answers_at_random(net, x)
    net.soft = True
    with pytest.raises(ValueError, match='probabilities'):
        predict(net, x)


@pytest.mark.parametrize('first', (lambda x: x[:1], lambda x: 0*x[:1]))
def test_equal_images_in_front_do_not_hide_that_an_answer_changes_with_the_batch(first):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(192, 5)).eval()
    shown = images()*torch.linspace(.2, 1, 8).view(-1, 1, 1, 1)
    alike = first(shown)
    for x in (torch.cat([alike, alike, shown]), alike):
        with pytest.raises(ValueError, match='must answer each image by itself'):
            predict(net, x)


def test_a_sigmoid_is_refused_once_it_saturates():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Sigmoid()).eval()
    predict(model, x)
    strong = copy.deepcopy(model)
    strong[1].weight.data.mul_(1000)
    with pytest.raises(ValueError, match='as behind a sigmoid'):
        pgd(strong, x, torch.zeros(4).long(), threat)


@pytest.mark.parametrize('attack', (fgsm, pgd, partial(apgd, steps=5), partial(fab, steps=5),
                                    partial(square, queries=20),
                                    partial(random_search, tries=20), cascade,
                                    multi_attack(pgd), restarts(pgd, 2)))
def test_images_that_require_a_gradient(attack):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Pooled(False).eval()
    y = predict(model, x).argmax(1)
    found = attack(model, x.clone().requires_grad_(), y, threat)
    assert not found.requires_grad
    assert torch.equal(found, attack(model, x, y, threat))


def test_the_mode_of_a_wrapper_does_not_matter_that_of_the_network_does():
    x = images()
    around = nn.DataParallel(small())
    assert around.training
    assert torch.equal(predict(around, x), predict(small(), x))
    around.module[1].train()
    with pytest.raises(ValueError, match='Call `model.eval'):
        predict(around, x)
