"The cascade against the long way, on honest models and on models that hide their gradient."
import copy
from functools import partial

import foolbox
import pytest
import torch
from torch import nn

from robustnb.attacks.adapters import from_foolbox
from robustnb.attacks.adaptive_pgd import apgd, apgd_targeted
from robustnb.attacks import standard
from robustnb.attacks.gradient import full_pgd, margin, multi_attack, pgd, restarts
from robustnb.attacks.minimum_norm import carlini_wagner, deepfool, fab
from robustnb.attacks.perceptual import advdrop, recolor, wasserstein
from robustnb.attacks.score_based import one_pixel, random_search, square
from robustnb.attacks.standard import autoattack, cascade, run_cascade, search_copy
from robustnb.core import make_generator
from robustnb.contract import count_passes, predict
from robustnb.data import digits, subset
from robustnb.models.blocks import he_init
from robustnb.attacks.threat_models import L0, L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from robustnb.models.training import Recipe, train
from robustnb.quant.ptq import quantize
from helpers_attacks import sparse_border


def quick_network(seed):
    "A small network that knows its digits of 16 pixels"
    fresh = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                          nn.Flatten(), nn.Linear(512, 10))
    he_init(fresh, make_generator(seed))
    recipe = Recipe(flip=False, batch_size=20, lr=.05, crop=1).shortened(6)
    pool = subset(digits('train', size=16), 300, seed=seed)
    return train(recipe, fresh.eval(), pool, device='cpu')[0]


@pytest.fixture(scope='module')
def trained():
    "Such a network, and test images"
    test = subset(digits('test', size=16), 30, seed=0)
    return quick_network(0), test.x, torch.as_tensor(test.y)


@pytest.fixture
def short(monkeypatch):
    "The standard evaluation with a tenth of its iterations"
    for name, kw in dict(apgd=dict(steps=10), apgd_targeted=dict(steps=10), fab=dict(steps=10),
                         square=dict(queries=300)).items():
        monkeypatch.setattr(standard, name, partial(getattr(standard, name), **kw))


def survives(model, x_adv, y): return predict(model, x_adv).argmax(1) == y


threats = (Linf(4/255), Linf(16/255), L2(.8), L1(8.), SSIM(.9))


@pytest.mark.parametrize('threat', threats, ids=repr)
def test_the_cascade_reaches_the_answer_of_the_long_way(trained, threat):
    net, x, y = trained[0], trained[1][:16], trained[2][:16]
    long_way = multi_attack(partial(apgd, steps=50),
                            partial(apgd_targeted, steps=30))(net, x, y, threat)
    found = cascade(net, x, y, threat)
    assert threat.allows(x, found).all()
    a = survives(net, found, y)
    b = survives(net, long_way, y)
    clean = survives(net, x, y)
    assert (a & ~b).sum() <= 1, 'images that only the long way finds'
    assert not (a & ~clean).any()
    assert b.sum() < clean.sum()


def test_sparse_steps_find_all_that_the_long_way_finds():
    "Under L1, image by image; those that stand cost most and are left out"
    net = quick_network(7)
    test = subset(digits('test', size=16), 40, seed=7)
    y = torch.as_tensor(test.y)
    long_way = multi_attack(partial(apgd, steps=50),
                            partial(apgd_targeted, steps=20, targets=4))(net, test.x, y, L1(4.))
    fell = survives(net, test.x, y) & ~survives(net, long_way, y)
    assert fell.sum() > 10, 'the case is worth looking at'
    found = cascade(net, test.x[fell], y[fell], L1(4.))
    assert not survives(net, found, y[fell]).any()


def at_a_border(stage, threat, share=1.001, seed=0):
    "What a stage finds where the border is at `share` of what L1 of 8 gains; the gradients that it asks for"
    net, x, y = sparse_border(share, seed)
    s = standard._Search(net, x, y, threat, 1)
    return stage(s, net), s.backward


def iterations(n): return lambda s, net: standard._walked(s, s.left, net, s.x, n)


def test_sparse_steps_are_twelve_for_one():
    assert all(at_a_border(iterations(5), L1(8.), .985, seed)[0] for seed in (1, 3))
    assert at_a_border(iterations(5), L1(8.), 1.001, 0) == (0, 60)
    assert at_a_border(iterations(5), Linf(1e-3), 1., 0) == (0, 5)


def test_longer_searches_of_sparse_steps_come_from_outside():
    "Two gradients less: the larger balls end with a look"
    assert at_a_border(iterations(10), L1(8.))[1] == 10*10 - 2
    assert at_a_border(iterations(10), Linf(1e-3))[1] == 10
    assert at_a_border(standard._long, L1(8.))[1] == 10*30 - 2
    assert at_a_border(standard._long, Linf(1e-3))[1] == 20


def test_the_cascade_asks_for_a_fraction_of_the_gradients(trained, monkeypatch):
    net, x, y = trained
    def gradients_of(attack):
        seen = []
        counted = copy.deepcopy(net)
        def count(m, args):
            if args[0].requires_grad:
                seen.append(len(args[0]))
        counted.register_forward_pre_hook(count)
        attack(counted, x, y, Linf(4/255))
        return sum(seen)
    monkeypatch.setattr(standard, 'search_copy', lambda model, x, y, low=True: model)
    assert gradients_of(cascade)*6 < gradients_of(multi_attack(apgd, apgd_targeted))


@pytest.mark.parametrize('threat', (Linf(8/255), L2(.5)), ids=repr)
def test_batches_order_and_seeds(trained, threat):
    net = copy.deepcopy(trained[0]).double()
    x = trained[1][:20].double()
    y = trained[2][:20]
    whole = cascade(net, x, y, threat)
    assert torch.equal(cascade(net, x, y, threat), whole)
    pieces = [cascade(net, x[i:i+7], y[i:i+7], threat, batch_size=3) for i in range(0, 20, 7)]
    pieces = torch.cat(pieces)
    order = torch.randperm(20, generator=make_generator(0))
    assert torch.equal(survives(net, pieces, y), survives(net, whole, y))
    shuffled = cascade(net, x[order], y[order], threat)
    assert torch.equal(survives(net, shuffled, y[order]), survives(net, whole, y)[order])


class Wrapped(nn.Module):
    "A network with something done to its images or to its logits"
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
    def forward(self, x): return self.after(self.net(self.before(x)))


def test_scaling_the_logits_changes_nothing(trained, short):
    net, x, y = trained
    threat = Linf(16/255)
    honest = survives(net, cascade(net, x, y, Linf(16/255)), y).sum()
    for scale in (100, 1000):
        loud = Wrapped(net, after=lambda z: scale*z).eval()
        assert survives(loud, cascade(loud, x, y, threat), y).sum() == honest
        assert honest < survives(loud, pgd(loud, x, y, threat), y).sum() - 5


hidden = dict(logits_in_bf16=dict(after=lambda z: (50*z).bfloat16().float()),
              rounded_images=dict(before=lambda x: (15*x).round()/15 + 0*x),
              rounded_with_a_false_trail=dict(before=lambda x: (15*x).round()/15 - 1e-6*x))


@pytest.mark.parametrize('name', hidden)
def test_models_that_hide_their_gradient_are_taken_the_long_way(trained, short, name):
    net, x, y = trained
    model = Wrapped(net, **hidden[name]).eval()
    threat = Linf(24/255)
    found = cascade(model, x, y, threat)
    assert threat.allows(x, found).all()
    count = lambda o: survives(model, o, y).sum().item()
    left = count(found)
    by_gradient = count(pgd(model, x, y, threat))
    clean = count(x)
    assert left <= by_gradient
    assert left < .7*clean
    if 'rounded' in name:
        assert left < by_gradient - 3, 'the gradient alone would have called it robust'


def test_the_long_way_is_not_taken_without_need(trained, short, monkeypatch):
    net, x, y = trained
    def never(*args): raise AssertionError('the long way')
    monkeypatch.setattr(standard, '_long_way', never)
    for threat in (Linf(2/255), L2(.3), Linf(0)):
        cascade(net, x, y, threat)
    with pytest.raises(AssertionError, match='the long way'):
        cascade(Wrapped(net, before=lambda x: (15*x).round()/15 + 0*x).eval(), x, y, Linf(24/255))


class Liar(nn.Module):
    "Calls every image misclassified"
    def __init__(self, y):
        super().__init__()
        self.y = y
    def forward(self, x):
        return (10*torch.eye(10)[torch.zeros(len(x), dtype=torch.int64)]
                + 0*x.flatten(1).sum(1, keepdim=True))


def test_the_copy_never_judges(trained, monkeypatch):
    net, x, y = trained
    keep = y != 0
    x = x[keep]
    y = y[keep]
    monkeypatch.setattr(standard, 'search_copy', lambda model, x, y, low=True: Liar(y).eval())
    monkeypatch.setattr(standard, '_sentinel', lambda s, generator: False)
    found = cascade(net, x, y, Linf(1/255))
    assert survives(net, found, y).sum() >= survives(net, x, y).sum() - 6, 'the liar claims all of them'


def test_the_copy_is_faithful_or_not_used(trained):
    net, x, y = trained
    lowered = search_copy(net, x, y)
    assert lowered is not net
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        exact = margin(net(x), y)
        low = margin(lowered(x), y)
    assert 0 < (exact-low).abs().max() < .05*exact.abs().max()
    chaotic = Wrapped(net, after=lambda z: z + 10*torch.sin(1e6*z)).eval()
    with torch.no_grad():
        right = chaotic(x)
        assert torch.equal(search_copy(chaotic, x, y)(x), right), 'it is followed as it is'


def test_a_model_that_cannot_be_traced_is_attacked_all_the_same(trained):
    net, x, y = trained
    branch = Wrapped(net, before=lambda x: x if x.sum() > 0 else 1-x).eval()
    found = survives(branch, cascade(branch, x, y, Linf(8/255)), y)
    assert torch.equal(found, survives(net, cascade(net, x, y, Linf(8/255)), y))


def test_the_standard_evaluation_is_the_worst_of_its_four(trained, short):
    net, x, y = trained
    x = x[:8]
    y = y[:8]
    threat = Linf(4/255)
    found = autoattack(net, x, y, threat)
    one = survives(net, standard.apgd(net, x, y, threat, make_generator(0)), y)
    assert threat.allows(x, found).all()
    assert not (survives(net, found, y) & ~one).any()
    assert torch.equal(autoattack(net, x, y, threat), found)


def test_wrong_uses(trained, short):
    net, x, y = trained
    with pytest.raises(TypeError,
                       match='must be Linf, L2 or L1 for the standard evaluation; got SSIM'):
        autoattack(net, x, y, SSIM(.95))
    with pytest.raises(ValueError, match='at least 4 classes'):
        autoattack(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval(), x, y % 3,
                   Linf(.1))
    two = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2)).eval()
    assert Linf(.1).allows(x, cascade(two, x, y % 2, Linf(.1))).all()
    with pytest.raises(ValueError, match='Call `model.eval'):
        cascade(copy.deepcopy(net).train(), x, y, Linf(.1))


def test_a_model_without_a_gradient_is_asked_by_queries(trained, short):
    net, x, y = trained
    closed = Wrapped(net, after=torch.Tensor.detach).eval()
    seen = run_cascade(closed, x, y, Linf(16/255))
    assert seen.masked
    assert list(seen.stages.stage) == ['clean', 'queries']
    assert seen.survives.sum() < survives(net, x, y).sum() - 3
    assert torch.equal(seen.survives, survives(net, seen.x_adv, y))


def test_a_surrogate_helps_where_there_is_no_gradient_and_is_not_asked_elsewhere(trained, short):
    net, x, y = trained
    closed = Wrapped(net, after=torch.Tensor.detach).eval()
    seen = run_cascade(closed, x, y, Linf(16/255), surrogate=net)
    row = seen.stages.set_index('stage').loc['transfer']
    alone = survives(net, full_pgd(net, x, y, Linf(16/255), make_generator(0)), y)
    assert row.fallen == survives(net, x, y).sum() - alone.sum() > 3
    assert torch.equal(seen.survives, survives(net, seen.x_adv, y))
    with count_passes() as one:
        full_pgd(net, x[:1], y[:1], Linf(16/255), make_generator(0))
    assert row.backward == row.asked*one.backward
    assert row.forward == row.asked*(one.forward + 1), 'and one for the verdict'
    torch.manual_seed(0)
    stranger = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)).eval()
    useless = run_cascade(closed, x, y, Linf(16/255), surrogate=stranger)
    assert useless.stages.set_index('stage').loc['transfer'].fallen < row.fallen
    with pytest.raises(ValueError, match='Call `model.eval'):
        run_cascade(closed, x, y, Linf(16/255), surrogate=copy.deepcopy(net).train())
    asked = []
    watched = Wrapped(net, before=lambda x: (asked.append(len(x)), x)[1]).eval()
    honest = run_cascade(net, x, y, Linf(2/255), surrogate=watched)
    assert not honest.masked and sum(asked) < 10
    assert torch.equal(cascade(closed, x, y, Linf(16/255), surrogate=net), seen.x_adv)


class DeadEnd(nn.Module):
    "The leading wrong class never gets there; the other does, the opposite way"
    def forward(self, x):
        u = (x-.5).flatten(1).mean(1)/.1
        return torch.stack([0*u, .4*u-1, -1.5*u-1.1], 1)


def test_the_fast_cascade_finds_what_the_margin_runs_past():
    x = torch.full((20, 1, 2, 2), .5)
    y = torch.zeros(20, dtype=torch.int64)
    net = DeadEnd().eval()
    assert not survives(net, pgd(net, x, y, Linf(.1)), y).any()
    assert survives(net, apgd(net, x, y, Linf(.1), loss=margin), y).all(), 'the case is worth looking at'
    seen = run_cascade(net, x, y, Linf(.1), targets=0)
    row = seen.stages.set_index('stage').loc['cross-entropy']
    assert row.fallen == 20 and row.backward <= 20*20
    assert not seen.masked and not seen.survives.any()


@pytest.mark.parametrize('name', ('INT8', 'INT4', 'POT4', 'FLOAT4'))
def test_a_copy_that_rounds_is_its_own_search_copy(trained, monkeypatch, name):
    net, x, y = trained
    copied = quantize(net, name, x)
    monkeypatch.setattr(standard, 'fast_bf16', lambda device: True)
    assert search_copy(copied, x, y) is copied
    threat = Linf(4/255)
    seen = run_cascade(copied, x, y, threat)
    long_way = multi_attack(partial(apgd, steps=50, loss=margin),
                            partial(apgd_targeted, steps=20, targets=3))(copied, x, y, threat)
    assert (seen.survives & ~survives(copied, long_way, y)).sum() <= 1


@pytest.mark.parametrize('name, climbs', [('INT8', False), ('INT4', True), ('POT4', False), ('FLOAT4', True)])
def test_coarse_copies_are_climbed_once_more(trained, name, climbs):
    net, x, y = trained
    copied = quantize(net, name, x)
    stages = set(run_cascade(copied, x, y, Linf(2/255)).stages.stage)
    assert ('Auto-PGD of a coarse copy' in stages) == climbs
    fast = run_cascade(copied, x, y, Linf(2/255), targets=0)
    assert 'Auto-PGD of a coarse copy' not in set(fast.stages.stage)


def test_a_climb_finds_what_walks_have_missed(trained, monkeypatch):
    net, x, y = trained
    copied = quantize(net, 'INT4', x)
    walked = run_cascade(copied, x, y, Linf(6/255)).robust_accuracy
    def stand_still(look, x, y, threat, start, steps, judge):
        n = len(x)
        return start, torch.full((n,), -torch.inf), torch.zeros(n, dtype=torch.bool)
    monkeypatch.setattr(standard, 'walk', stand_still)
    seen = run_cascade(copied, x, y, Linf(6/255))
    row = seen.stages.set_index('stage').loc['Auto-PGD of a coarse copy']
    assert row.fallen > 0 and row.backward <= 100*row.asked
    assert walked <= seen.robust_accuracy < (copied(x).argmax(1) == y).float().mean()


def test_a_model_that_refuses_bfloat16_is_folded_all_the_same(trained, monkeypatch):
    net, x, y = trained
    def only_float32(x):
        if torch.is_autocast_enabled('cpu'): raise TypeError('`x` must be float32')
        return x
    picky = Wrapped(net, before=only_float32).eval()
    monkeypatch.setattr(standard, 'fast_bf16', lambda device: True)
    monkeypatch.setattr(standard, 'fold_batchnorm', lambda model, x: copy.deepcopy(model))
    chosen = search_copy(picky, x, y)
    assert chosen is not picky
    assert not chosen.low
    assert search_copy(net, x, y).low, 'a model that does not refuse it is lowered'


def test_the_search_copy_is_judged_on_images_of_several_classes(trained):
    net, x, y = trained
    order = y.argsort()
    asked = []
    watched = Wrapped(net, before=lambda x: (asked.append(x), x)[1]).eval()
    many = x[order].repeat_interleave(4, 0)
    search_copy(watched, many, y[order].repeat_interleave(4))
    assert len(asked[0]) == 32
    assert len(predict(net, asked[0]).argmax(1).unique()) >= 8


class NotANumber(nn.Module):
    "NaN where the two largest logits come near each other"
    def __init__(self, net, within):
        super().__init__()
        self.net = net
        self.within = within
    def forward(self, x):
        z = self.net(x)
        top = z.topk(2, 1).values
        return torch.where((top[:, :1]-top[:, 1:] < self.within), torch.nan, z)


@pytest.mark.parametrize('attack', (cascade, apgd, partial(pgd, loss=margin)))
def test_answers_that_are_no_numbers_are_no_defence(trained, attack):
    net, x, y = trained
    threat = Linf(16/255)
    fearful = NotANumber(net, .5).eval()
    found = attack(fearful, x, y, threat)
    wrong = (predict(fearful, found).argmax(1) != y) | predict(fearful, found).isnan().any(1)
    plain = ~survives(net, attack(net, x, y, threat), y)
    assert wrong.sum() >= plain.sum() - 1


class Speechless(nn.Module):
    "No answer to anything but the images themselves"
    def __init__(self, net, x, said):
        super().__init__()
        self.net, self.x, self.said = net, x, said
    def forward(self, x):
        far = (x.flatten(1)[:, None] - self.x.flatten(1)).abs().amax(2).amin(1) > 1e-3
        return torch.where(far[:, None], self.said, self.net(x))


searches = dict(
    restarts=restarts(partial(pgd, steps=2), 2), random_search=random_search,
    square=partial(square, queries=9), fab=partial(fab, steps=3), deepfool=partial(deepfool, steps=3),
    carlini_wagner=partial(carlini_wagner, steps=9), recolor=partial(recolor, steps=3),
    wasserstein=partial(wasserstein, steps=3), advdrop=partial(advdrop, steps=3),
    apgd_targeted=partial(apgd_targeted, steps=3), cascade=cascade,
    foolbox=from_foolbox(foolbox.attacks.LinfFastGradientAttack()),
    one_pixel=partial(one_pixel, population=5, generations=1))


@pytest.mark.parametrize('said', (torch.nan, torch.inf))
@pytest.mark.parametrize('name', searches)
def test_where_there_is_no_answer_an_image_has_fallen(trained, name, said):
    net, x, y = trained
    x = x[survives(net, x, y)][:4]
    y = predict(net, x).argmax(1)
    threat = L0(1) if name == 'one_pixel' else Linf(.1)
    silent = Speechless(net, x, said).eval()
    found = searches[name](silent, x, y, threat, generator=make_generator(0))
    assert not predict(silent, found).isfinite().any()


def test_a_random_model_is_judged_by_its_mean(trained):
    net, x, y = trained
    noisy = Wrapped(net, before=lambda x: (x + .03*torch.randn_like(x)).clamp(0, 1)).eval()
    torch.manual_seed(0)
    seen = run_cascade(noisy, x, y, Linf(12/255))
    assert seen.random
    fresh = sum(predict(noisy, seen.x_adv) for _ in range(32))
    agree = (fresh.argmax(1) == y) == seen.survives
    assert agree.float().mean() > .9
    assert not run_cascade(net, x, y, Linf(2/255)).random


def test_what_a_random_model_draws_is_drawn_anew(trained, monkeypatch):
    net, x, y = trained
    def never(*args, **kw): raise AssertionError('a copy of a random model')
    noisy = Wrapped(net, before=lambda x: (x + .03*torch.randn(x.shape)).clamp(0, 1)).eval()
    monkeypatch.setattr(standard, 'search_copy', never)
    assert run_cascade(noisy, x, y, Linf(2/255)).random


@pytest.mark.parametrize('size', (4/255, 24/255), ids=('some survive', 'all fall'))
def test_the_passes_of_a_result_are_those_that_hooks_count(trained, monkeypatch, size):
    net, x, y = trained
    monkeypatch.setattr(standard, 'search_copy', lambda model, x, y, low=True: model)
    seen = dict(forward=0, backward=0)
    def back(grad): seen['backward'] += len(grad)
    def after(m, args, out):
        seen['forward'] += len(out)
        if out.requires_grad: out.register_hook(back)
    run_cascade(net, x[:1], y[:1], Linf(size))    # opened
    hook = net.register_forward_hook(after)
    result = run_cascade(net, x, y, Linf(size))
    hook.remove()
    told = result.stages[['forward', 'backward']].sum()
    fallen = result.stages.fallen.sum()
    assert fallen == len(x) if size > .05 else 0 < fallen < len(x), 'the case is worth looking at'
    # a look at the first image by `check_attack`, one at whether it can be differentiated
    assert seen['backward'] == told.backward + 1
    asked = result.stages.set_index('stage').asked.get('sentinel', 0)
    assert told.forward + 2 - 33*asked <= seen['forward'] <= told.forward + 2
    assert asked == 0 or not result.masked


class Same(nn.Module):
    "All logits are equal, as those of a network that was rounded to death"
    def forward(self, x): return 0*x.flatten(1)[:, :10]


def test_a_network_whose_logits_are_all_equal_is_not_robust():
    x = torch.rand(20, 3, 4, 4, generator=make_generator(0))
    found = run_cascade(Same().eval(), x, torch.arange(20) % 10, Linf(8/255))
    assert found.robust_accuracy == pytest.approx(.1), 'the first class is its answer'


def test_the_cascade_follows_gradients_in_inference_mode(trained):
    net, x, y = trained
    with torch.inference_mode():
        inside = run_cascade(net, x[:10].clone(), y[:10].clone(), Linf(4/255))
    outside = run_cascade(net, x[:10], y[:10], Linf(4/255))
    assert torch.equal(inside.survives, outside.survives)
    assert not inside.masked
    assert inside.stages.backward.sum() > 0
