"""Reasons to doubt: a deliberately faulty model or attack for every check, and a healthy network
that raises none."""
import copy
from dataclasses import dataclass
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from helpers_models import needs
from robustnb.attacks.adaptive_pgd import apgd
from robustnb.attacks.gradient import fgsm, multi_attack, margin, pgd
from robustnb.attacks.score_based import square
from robustnb.evaluation import checks
from robustnb.evaluation.checks import _signs, red_flags
from robustnb.core import make_generator
from robustnb.data import digits, subset
from robustnb.evaluation.robust_accuracy import transfer_attack, on_8bit_images
from robustnb.models.zoo import build_model
from robustnb.attacks.threat_models import L1, L2, Linf
from robustnb.attacks.ssim_rule import SSIM
from robustnb.models.training import Recipe, train
from robustnb.quant.ptq import quantize
from helpers_attacks import counted, sparse_border

# what twenty steps of `pgd` leave standing here and a longer search finds, about three images
leftover = {'more steps'}
names = ['training mode', 'randomness', 'batch dependence', 'low precision', 'changed state',
         'zero budget', 'larger budget', 'unbounded', 'vanishing gradient', 'misleading gradient',
         'saturated loss', 'more steps', 'black box', '8-bit rounding', 'not numbers']
test = subset(digits('test', size=8), 100, seed=0)
x, y, threat = test.x, torch.as_tensor(test.y), Linf(20/255)


@pytest.fixture(scope='module')
def net():
    layers = lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16),
                                   nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                                   nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(.3),
                                   nn.Linear(512, 10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return train(Recipe(flip=False, batch_size=20, lr=.02, crop=0).shortened(6), layers(),
                     subset(digits('train', size=8), 400, seed=0), device='cpu')[0].eval()


class Around(nn.Module):
    "A network with something before and after it"
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
    def forward(self, x): return self.after(self.net(self.before(x)))


class Misleading(torch.autograd.Function):
    "The identity with the gradient of the neighbouring pixels"
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return grad.roll((3, 3), (2, 3))


class Counting(nn.Module):
    "Counts what it is asked"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer('asked', torch.zeros(()), persistent=False)
    def forward(self, x):
        self.asked += len(x)
        return self.net(x)


def batch_norm_of_the_batch(net):
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
    return net


def show(table, verdicts=('doubt', 'note')):
    return {r.check: r.figure for r in table.itertuples() if r.verdict in verdicts}


def explained(table):
    return {r.check: r.verdict[4:] for r in table.itertuples() if r.verdict.startswith('see ')}


def doubts(model, attack=pgd, **kw):
    table = red_flags(model, kw.pop('x', x), y, kw.pop('threat', threat), attack, **kw)
    assert table.columns.tolist() == ['check', 'verdict', 'figure', 'what_to_do']
    assert table.check.tolist() == names
    assert set(table.verdict) <= {'ok', 'doubt', 'note', 'not judged', *(f'see {o}' for o in names)}
    assert set(explained(table).values()) <= set(show(table)), 'a row points to its cause'
    assert ((table.what_to_do != '') == table.verdict.isin(['doubt', 'note'])).all()
    assert (table.figure != '').all()
    return show(table)


@pytest.mark.parametrize('threat', (threat, L2(.8), SSIM(.98)), ids=repr)
def test_a_healthy_network_raises_no_doubt(net, threat):
    right = lambda x: (net(x).argmax(1) == y).float().mean().item()
    assert right(x) > .85, 'the case is worth looking at'
    assert .1 < right(pgd(net, x, y, threat)) < .7, 'the case is worth looking at'
    strong = partial(apgd, steps=60, loss=margin)
    assert doubts(net, strong, threat=threat) == {}
    assert doubts(net, multi_attack(fgsm, strong), threat=threat) == {}


randomly = lambda z: z + 1e-3*z.detach().std()*torch.randn(z.shape)
rounded_logits = lambda step: lambda z: z + (step*(z/step).round() - z).detach()
seven_levels = lambda x: (7*x).round()/7
faulty_models = {
    'training mode': (lambda net: copy.deepcopy(net).train(), {'training mode'}),
    'one part in training mode': (
        lambda net: (lambda m: (m[1].train(), m)[1])(copy.deepcopy(net)), {'training mode'}),
    'noise': (lambda net: Around(net, after=randomly), {'randomness'}),
    'centred by the batch': (lambda net: Around(net, after=lambda z: z - .02*z.mean(0)),
                             {'batch dependence'}),
    'bfloat16 inside': (lambda net: Around(net, after=lambda z: z.bfloat16().float()),
                        {'low precision'}),
    'float16 inside': (lambda net: Around(net, after=lambda z: z.half().float()),
                       {'low precision'}),
    'logits on a grid': (lambda net: Around(net, after=rounded_logits(.03)), {'low precision'}),
    'counter': (Counting, {'changed state'}),
    'rounding without a gradient': (lambda net: Around(net, before=seven_levels),
                                    {'vanishing gradient'}),
    'logits x 100': (lambda net: Around(net, after=lambda z: 100*z),
                     {'saturated loss'}),
    'logits x 1000': (lambda net: Around(net, after=lambda z: 1000*z),
                      {'saturated loss'}),
}


unlike = {'centred by the batch': needs('torch', 2, 9)}    # a doubt more, about rounding to 8 bits


@pytest.mark.parametrize('fault', [pytest.param(o, marks=unlike.get(o, ())) for o in faulty_models])
def test_faulty_models_turn_their_row(fault, net):
    make, rows = faulty_models[fault]
    found = set(doubts(make(net).eval() if 'mode' not in fault else make(net)))
    assert rows <= found <= rows | leftover


def test_an_attack_that_does_not_suit_its_threat_model_is_seen(net):
    budget = L1(4.)
    coarse = partial(pgd, steps=20)
    right = {a: (net(a(net, x, y, budget)).argmax(1) == y).float().mean().item()
             for a in (coarse, apgd)}
    assert right[apgd] < right[coarse] - .2, 'steps of one length are too long for L1'
    assert set(doubts(net, coarse, threat=budget)) == {'more steps'}
    assert set(doubts(net, apgd, threat=budget)) <= leftover


def test_the_longer_search_takes_two_hundred_sparse_steps():
    "To within a five-hundredth of the most that can be gained; a third of the steps gains less"
    net, x, y = sparse_border(.998, 1)
    found = checks._walks(net, x, y, L1(8.), generator=make_generator(0))
    assert L1(8.).allows(x, found).all() and margin(net(found), y) > 0


def test_misleading_gradients_are_seen(net):
    found = doubts(Around(net, before=Misleading.apply).eval())
    assert set(found) == {'misleading gradient'}


def test_batch_norm_of_the_batch_is_seen(net):
    with pytest.raises(ValueError, match='its answer to one changes with the others of the batch'):
        doubts(batch_norm_of_the_batch(net).eval())


def to_the_border(model, x, y, threat, *, generator=None):
    "The image where the straight way to that of `pgd` just becomes wrong"
    far = pgd(model, x, y, threat, generator=generator)
    lo = torch.zeros(len(x))
    hi = torch.ones(len(x))
    for _ in range(20):
        middle = (lo+hi)/2
        with torch.no_grad():
            wrong = model(torch.lerp(x, far, middle.view(-1, 1, 1, 1))).argmax(1) != y
        lo = torch.where(wrong, lo, middle)
        hi = torch.where(wrong, middle, hi)
    return torch.lerp(x, far, hi.view(-1, 1, 1, 1))


def otherwise(case, what, attack=pgd):
    "An attack that does something else at some budgets"
    return lambda model, x, y, threat, *, generator=None: what(x) if case(threat.eps) else attack(
        model, x, y, threat, generator=generator)


def leaves(change):
    "An attack that does something to the model first"
    return lambda model, *a, generator=None: (change(model),
                                              pgd(model.eval(), *a, generator=generator))[1]


def short(model, x, y, threat, *, generator=None, steps=2):
    return pgd(model, x, y, threat, generator=generator, steps=steps, step_size=threat.eps/8)


def broken(x): raise ArithmeticError('at this budget I cannot')


faulty_attacks = {
    'too few steps': (partial(pgd, steps=1, step_size=threat.eps/4), {'more steps'}),
    'tiny steps': (partial(pgd, steps=30, step_size=threat.eps/2000), {'more steps'}),
    'two short steps': (short, {'saturated loss'}),
    'just over the border': (to_the_border, {'8-bit rounding'}),
    'moves without a budget': (otherwise(lambda eps: eps == 0, lambda x: (x + .01).clamp(0, 1)),
                               {'zero budget'}),
    'fails without a budget': (otherwise(lambda eps: eps == 0, broken), {'zero budget'}),
    'gives up at larger budgets': (otherwise(lambda eps: .1 < eps < .9, lambda x: x),
                                   {'larger budget'}),
    'gives up without a limit': (otherwise(lambda eps: eps > .9, lambda x: x), {'unbounded'}),
    'leaves gradients': (leaves(lambda m: torch.enable_grad()(lambda: m(x).sum().backward())()),
                         {'changed state'}),
    'leaves a hook': (leaves(lambda m: m[0].register_forward_hook(lambda *a: None)),
                      {'changed state'}),
    'freezes a layer': (leaves(lambda m: m[0].requires_grad_(False)), {'changed state'}),
    'moves batch norm': (leaves(lambda m: m[1].running_mean.add_(1e-4)), {'changed state'}),
    'does nothing': (lambda model, x, y, threat, *, generator=None: x,
                     {'saturated loss'}),
}


@pytest.mark.parametrize('fault', faulty_attacks)
def test_faulty_attacks_turn_their_row(fault, net):
    attack, rows = faulty_attacks[fault]
    found = doubts(copy.deepcopy(net), attack)
    assert rows <= set(found) <= rows | leftover | {'saturated loss'}
    if fault == 'fails without a budget':
        assert found['zero budget'] == 'ArithmeticError: at this budget I cannot'
    if fault == 'moves without a budget':
        assert 'left its threat model Linf(eps=0.0)' in found['zero budget']


def test_what_appears_in_a_model_has_changed_it(net):
    model = copy.deepcopy(net)
    assert set(doubts(model, attack=leaves(lambda m: m[0].register_buffer(
        'seen', torch.zeros(1))))) - leftover == {'changed state'}


def test_the_number_can_be_right_where_the_model_is_odd(net):
    rounds = Around(net, before=seven_levels).eval()
    scaled = Around(net, after=lambda z: 1000*z).eval()
    around = multi_attack(pgd, transfer_attack(net, pgd))
    assert set(doubts(rounds, around)) == {'vanishing gradient'}
    assert set(doubts(scaled, partial(pgd, loss=margin))) <= leftover
    assert 'saturated loss' in doubts(scaled, multi_attack(pgd, partial(square, queries=400)))
    assert set(doubts(net, on_8bit_images(partial(pgd, loss=margin)))) <= leftover


def blurred(x): return nn.functional.avg_pool2d(nn.functional.pad(x, [1]*4), 3, 1)


class Flips(nn.Module):
    "Another answer where a gradient is wanted"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        z = self.net(x)
        return 2*z.detach() - z if torch.is_grad_enabled() else z


def no_number_near_the_border(z):
    top = z.topk(2, 1).values
    return z.masked_fill((top[:, 0]-top[:, 1] < 2)[:, None], torch.nan)


zoo = {
    'detached': (lambda net: Around(net, before=lambda x: blurred(x) + (x-blurred(x)).detach()),
                 {'misleading gradient', 'more steps', 'black box'}),
    'flips': (Flips, {'misleading gradient'}),
    'NaN': (lambda net: Around(net, after=no_number_near_the_border), {'not numbers'}),
    'INT4': (lambda net: quantize(net, 'INT4', x), {'misleading gradient', 'more steps', 'black box'}),
    'INT8': (lambda net: quantize(net, 'INT8', x), leftover),
    'POT4/INT8': (lambda net: quantize(net, 'POT4/INT8', x), leftover),
    'scaled by 3': (lambda net: Around(net, after=lambda z: 3*z), leftover)}


@pytest.mark.parametrize('kind', zoo)
def test_a_small_zoo(kind, net):
    "What is overstated is seen, by the row that says why; a rounded copy is not accused for rounding"
    make, rows = zoo[kind]
    model = make(net).eval()
    right = lambda images: ((z := model(images)).argmax(1) == y) & z.isfinite().all(1)
    strong = multi_attack(partial(apgd, loss=margin), transfer_attack(net, apgd),
                          partial(square, queries=500))
    with torch.no_grad():
        naive = right(pgd(model, x, y, threat, generator=make_generator(0)))
        truth = naive & right(strong(model, x, y, threat, generator=make_generator(0)))
    found = set(doubts(model))
    # a few images more or less are luck of the random start: INT4 is 6 too high with one and 4 with another
    if naive.sum() - truth.sum() > 6: assert found
    assert found <= rows


def test_a_logit_that_is_no_number_is_never_right(net):
    "`argmax` of a row of NaN is 0, which is the label of some"
    model = Around(net, after=lambda z: torch.where(z.argmax(1, keepdim=True) == 0, torch.nan, z))
    with torch.no_grad():
        said = net(x).argmax(1)
    order = (said == 0).int().argsort(stable=True)
    table = red_flags(model.eval(), x[order], y[order], threat).set_index('check')
    # a doubt where a harder attack finds more as well, which follows the training
    assert table.verdict['not numbers'] in ('doubt', 'note')
    assert int(((said == 0) & (y == 0)).sum()) > 5
    assert f'of {int(((said == y) & (said != 0)).sum())} images' in table.figure['vanishing gradient']


def test_answers_that_are_wrong_by_chance_are_seen_at_eps_0(net):
    noisy = Around(net, before=lambda x: x + 1.2*torch.randn(x.shape)).eval()
    table = red_flags(noisy, x, y, threat).set_index('check')
    found_more = (table.verdict[table.index.isin(_signs)] == 'see randomness').any()
    assert table.verdict['randomness'] == ('doubt' if found_more else 'note')
    assert table.verdict['zero budget'] == 'see randomness'


def test_a_model_without_gradients_is_judged_as_far_as_possible(net):
    found = doubts(Around(net, after=lambda z: z.detach()).eval(), partial(square, queries=20))
    assert set(found) == {'vanishing gradient'}
    assert 'must be differentiable' in found['vanishing gradient']


def test_figures_count(net):
    table = red_flags(net, x, y, threat).set_index('check')
    with torch.no_grad():
        clean = net(x).argmax(1) == y
    on = clean.nonzero().flatten()
    on = on[torch.linspace(0, len(on)-1, 24).long()]
    attacked = lambda f, x, y: net(pgd(net, x, y, Linf(f*threat.eps), generator=make_generator(
        0, 'red flags'))).argmax(1) == y
    right = [int(attacked(f, x[on], y[on]).sum()) for f in (.5, 1, 2)]
    survivors = int((clean & attacked(1, x, y)).sum())
    seen = [int(o) for o in table.figure['larger budget'].split(' of')[0].split(', ')]
    assert seen == right
    assert seen[0] > seen[1] > seen[2]
    assert f'of {int(clean.sum())} images' in table.figure['vanishing gradient']
    assert table.figure['saturated loss'].split(' ')[2] == str(survivors)
    assert table.figure['8-bit rounding'].split(' ')[2] == str(int(clean.sum()) - survivors)


@dataclass(frozen=True)
class NoSize:
    "A threat model without a radius"
    def distance(self, x, x_adv): return Linf(.1).distance(x, x_adv)
    def allows(self, x, x_adv): return Linf(.1).allows(x, x_adv)
    def project(self, x, x_adv): return Linf(.1).project(x, x_adv)
    eps = .1


def test_what_has_no_meaning_is_not_judged(net):
    jitter = lambda model, x, y, threat, *, generator=None: threat.project(x, x + .05)
    tables = [red_flags(net, x, y, NoSize(), jitter).set_index('check'),
              red_flags(net, .99*x, y, threat).set_index('check')]
    assert [set(t.index[t.verdict == 'not judged']) for t in tables] == [
        {'zero budget', 'larger budget', 'unbounded'}, {'8-bit rounding'}]
    assert tables[0].figure['zero budget'] == 'NoSize has no eps to change'
    assert tables[1].figure['8-bit rounding'] == 'the clean images are not 8-bit images'


def test_a_property_is_a_note_until_the_number_is_seen_to_be_too_high(net):
    low = Around(net, after=lambda z: z.bfloat16().float()).eval()
    strong = partial(apgd, steps=60, loss=margin)
    said = {a: red_flags(low, x, y, threat, a).set_index('check').verdict['low precision']
            for a in (strong, fgsm)}
    assert said == {strong: 'note', fgsm: 'doubt'}
    assert {*show(red_flags(net, x, y, threat, to_the_border), ['note'])} == {'8-bit rounding'}


def test_everything_is_afterwards_as_it_was(net):
    model = Counting(copy.deepcopy(net).train())
    model.net[0].eval()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    look = (lambda: {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
                    | {k: m.training for k, m in model.named_modules()}
                    | {'x': x.clone(), 'random': torch.get_rng_state()})
    before = look()
    assert set(doubts(model)) - leftover == {'training mode', 'changed state'}
    assert all(torch.equal(v, before[k]) if isinstance(v, torch.Tensor) else v == before[k]
               for k, v in look().items())
    assert torch.equal(model.net[0].weight.grad, torch.ones_like(model.net[0].weight))
    assert all(p.grad is None for k, p in model.named_parameters() if k != 'net.0.weight')
    with pytest.raises(ValueError, match='20 images'):
        red_flags(model, x[:10], y[:10], threat)
    assert model.training
    assert not model.net[0].training
    assert model.asked == 0


def test_tables_repeat_with_their_seed(net):
    noisy = Around(net, before=lambda x: x + .1*torch.randn(x.shape)).eval()
    few = x[:40], y[:40]
    a = red_flags(noisy, *few, threat, seed=0)
    b = red_flags(noisy, *few, threat, seed=0)
    c = red_flags(noisy, *few, threat, seed=1)
    assert a.equals(b)
    assert not a.equals(c)


def test_more_images_than_a_batch(net):
    more = subset(digits('test', size=8), 300, seed=0)
    table = red_flags(net, more.x, torch.as_tensor(more.y), threat)
    assert set(table.verdict[table.check != 'more steps']) == {'ok'}
    assert table.figure[table.check == 'vanishing gradient'].str.contains(r'of 2[5-9]\d images').all()


def test_wrong_uses(net):
    for kw, error, words in (
            (dict(x=255*x), ValueError, 'Divide by 255'),
            (dict(x=torch.cat([x[:-1], 255*x[-1:]])), ValueError, '`x` must hold pixels'),
            (dict(y=y[:9]), ValueError, 'one label per image'),
            (dict(threat=.03), TypeError, '`threat` must be a threat model'),
            (dict(y=y+1), ValueError, 'class numbers'),
            (dict(y=(y+1) % 10), ValueError,
             'at least 20 images that the model classifies correctly; got'),
            (dict(model=Around(net, after=lambda z: (z, z[:, :2])).eval()), TypeError, 'got a tuple'),
            (dict(model=Around(net, after=lambda z: z/0).eval()), ValueError, 'finite logits')):
        with pytest.raises(error, match=words):
            red_flags(**{**dict(model=net, x=x, y=y, threat=threat), **kw})


def test_large_images_are_followed_a_few_at_a_time():
    net, asked = counted()
    large = torch.rand(21, 3, 160, 160)
    labels = large.mean((2, 3)).argmax(1)
    red_flags(net, large, labels, Linf(1/255), partial(pgd, steps=2))
    assert max(asked) <= 20, 'ten, or ten pairs where two are compared'
