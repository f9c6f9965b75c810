"""Rows and what is derived from them: every prediction kept, nothing counted as robust that is not,
nothing lost when a run is killed."""
import json, os, signal, subprocess, sys, threading, time, warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers_attacks import counted
from robustnb.attacks.gradient import fgsm, full_pgd, multi_attack, margin, pgd, restarts
from robustnb.attacks.adaptive_pgd import apgd
from robustnb.attacks.score_based import square
from robustnb.attacks.standard import cascade
from robustnb.contract import predict
from robustnb.core import draw, image_generators, make_generator
from robustnb.evaluation.auditing import audit
from robustnb.evaluation.publishing import craft_adversarial
from robustnb.evaluation.robust_accuracy import (
    _unharmed, AttackHelped, compare, transfer_attack, on_8bit_images, evaluate, plot_curve,
    quantized_attacks, robustness_curve, summarize, worst_case)
from robustnb.metrics import paired_difference, wilson
from robustnb.attacks.threat_models import L2, Linf


def make_net(seed=0):
    g = make_generator(seed, 'net')
    net = nn.Sequential(nn.Flatten(), nn.Linear(75, 24), nn.Tanh(), nn.Linear(24, 4))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(2*torch.randn(p.shape, generator=g)/p[0].numel()**.5 if p.ndim > 1
                    else torch.zeros_like(p))
    return net.eval()


model, x = make_net(), torch.rand(40, 3, 5, 5, generator=make_generator(0, 'images'))
with torch.no_grad():
    y = model(x).argmax(1)
y = y.where(torch.arange(40) % 8 > 0, (y+1) % 4)
threat = Linf(8/255)
costs = ['forward', 'backward', 'seconds']


def steady(rows): return rows.drop(columns='seconds')


def test_rows_are_what_the_model_says():
    made = {}
    def keep(model, x, y, threat, *, generator=None):
        made[len(made)] = pgd(model, x, y, threat, generator=generator)
        return made[len(made)-1]
    rows = evaluate(model, x, y, dict(pgd=keep), threat, batch_size=15)
    x_adv = torch.cat(list(made.values()))
    assert rows.columns.tolist() == ['image', 'attack', 'threat', 'label', 'prediction',
                                     'correct', 'margin', 'confidence', 'distance', *costs]
    for name, images in (('clean', x), ('pgd', x_adv)):
        r = rows[rows.attack == name]
        with torch.no_grad():
            logits = model(images)
        assert r.image.tolist() == list(range(40))
        assert r.label.tolist() == y.tolist()
        assert r.prediction.tolist() == logits.argmax(1).tolist()
        assert r.correct.tolist() == (logits.argmax(1) == y).tolist()
        assert r.margin.tolist() == pytest.approx((-margin(logits, y)).tolist(), abs=1e-5)
        assert r.distance.tolist() == pytest.approx((images-x).abs().flatten(1).amax(1).tolist())
        assert set(r.threat) == {'none' if name == 'clean' else repr(threat)}
    assert .8 < rows[rows.attack == 'clean'].correct.mean() < .9, 'some labels are wrong on purpose'


class Watched(nn.Module):
    "Counts each image by hooks of its own"
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.forward_passes = 0
        self.backward_passes = 0
    def count_back(self, grad): self.backward_passes += len(grad)
    def forward(self, x):
        self.forward_passes += len(x)
        logits = self.net(x)
        if logits.requires_grad: logits.register_hook(self.count_back)
        return logits


@pytest.mark.parametrize('size', (1, 7, 40))
def test_passes_are_those_that_a_counter_in_the_model_saw(size):
    attacks = dict(fgsm=fgsm, pgd=partial(pgd, steps=5), full=partial(full_pgd, steps=5),
                   square=partial(square, queries=30), both=multi_attack(fgsm, partial(pgd, steps=3)))
    rows = evaluate(model, x, y, attacks, threat, batch_size=size)
    cost = rows.groupby('attack', sort=False)[costs].first()
    assert (rows.groupby('attack')[costs].nunique() == 1).all(axis=None)
    watched = Watched(model).eval()
    evaluate(watched, x, y, {}, threat)
    for name, attack in attacks.items():
        watched.forward_passes = watched.backward_passes = 0
        attack(watched, x, y, threat, generator=make_generator(0, name))
        probes = dict(both=3).get(name, 1)    # `check_attack` asks about an image
        assert cost.forward[name]*40 == pytest.approx(watched.forward_passes-probes), name
        assert cost.backward[name]*40 == pytest.approx(watched.backward_passes), name
    assert cost.loc['clean', ['forward', 'backward']].tolist() == [0, 0]
    assert cost.loc['full', ['forward', 'backward']].tolist() == [7, 5]
    assert cost.backward['square'] == 0 < cost.forward['square']
    assert (cost.seconds > 0).all()


def jitter(model, x, y, threat, *, generator=None):
    "The best of five random images"
    generators, best = image_generators(generator, x), x
    for _ in range(5):
        new = threat.project(
            x, x + threat.eps*(2*draw(torch.rand, generators, *x.shape[1:], like=x)-1))
        with torch.no_grad():
            better = margin(model(new), y) > margin(model(best), y)
        best = torch.where(better.view(-1, 1, 1, 1), new, best)
    return best


@pytest.mark.parametrize('size', (1, 7, 40, 1000))
def test_batch_size_does_not_matter(size):
    attacks = dict(fgsm=fgsm, pgd=pgd, jitter=jitter, both=multi_attack(jitter, pgd),
                   transfer=transfer_attack(make_net(1).double(), pgd))
    a = evaluate(make_net().double(), x.double(), y, attacks, threat, batch_size=size)
    b = evaluate(make_net().double(), x.double(), y, attacks, threat, batch_size=13)
    rounded = ['margin', 'confidence', 'distance', *costs]    # what was crafted before is free
    assert a.drop(columns=rounded).equals(b.drop(columns=rounded))
    assert np.allclose(a.margin, b.margin, atol=1e-6)
    assert np.allclose(a.distance, b.distance, atol=1e-6)
    assert not np.allclose(
        a.margin, evaluate(make_net().double(), x.double(), y, attacks, threat, seed=1).margin,
        atol=1e-4)


def test_attacks_and_seeds_draw_numbers_of_their_own_and_batches_the_same():
    drawn = []
    def note(model, x, y, threat, *, generator=None):
        drawn.append(torch.rand(1, generator=generator).item())
        return x
    evaluate(model, x, y, dict(a=note, b=note), threat, batch_size=10)
    evaluate(model, x, y, dict(a=note), threat, batch_size=10, seed=1)
    assert len(set(drawn[:4])) == len(set(drawn[4:8])) == 1
    assert len(set(drawn)) == 3
    before = list(drawn)
    evaluate(model, x, y, dict(b=note, a=note), threat, batch_size=10)
    assert drawn[12:] == before[4:8] + before[:4], 'whatever else is evaluated'


def test_only_survivors_are_given_to_the_next_attack():
    asked = []
    def noted(k, attack):
        def run(model, x, y, threat, *, generator=None):
            asked.append((k, len(x)))
            return attack(model, x, y, threat, generator=generator)
        return run
    weak = partial(fgsm)
    strong = partial(pgd, steps=10)
    rows = evaluate(model, x, y, dict(
        weak=weak, both=multi_attack(noted(0, weak), noted(1, strong), noted(2, strong))),
                    threat)
    survivors = int((rows.pivot(index='image', columns='attack',
                                values='correct')[['clean', 'weak']]).all(axis=1).sum())
    assert asked[0] == (0, int(rows[rows.attack == 'clean'].correct.sum()))
    assert asked[1] == (1, survivors)
    assert asked[2][1] <= survivors
    table = summarize(rows).set_index('attack').accuracy
    assert table['both'] <= table['weak'] < table['clean']
    nothing_left = multi_attack(noted(3, fgsm))(model, x, (y+1+torch.randint(1, (40,))) % 4, threat)
    assert threat.allows(x, nothing_left).all()


def test_in_turn_never_makes_a_wrong_image_right():
    helpful = lambda model, x, y, threat, *, generator=None: 2*x - pgd(model, x, y, threat)
    out = multi_attack(helpful, fgsm)(model, x.clamp(.1, .9), y, Linf(.1))
    with torch.no_grad():
        wrong = model(x.clamp(.1, .9)).argmax(1) != y
    assert wrong.sum() >= 4
    assert torch.equal(out[wrong], x.clamp(.1, .9)[wrong])
    assert not torch.equal(out[~wrong], x.clamp(.1, .9)[~wrong])


def test_transferred_images_are_crafted_once_for_several_copies():
    calls = []
    def counted(model, x, y, threat, *, generator=None):
        calls.append(len(x))
        return fgsm(model, x, y, threat)
    both = multi_attack(transfer_attack(model, counted), fgsm)
    right = torch.zeros(40, dtype=torch.bool)
    for other in (model, make_net(1), make_net(2), model):
        rows = evaluate(other, x, y, dict(both=both), threat, batch_size=15)
        n = len(calls)
        seen, right = right, right | torch.tensor(rows[rows.attack == 'clean'].correct.to_numpy())
        assert sum(calls) == right.sum(), 'those that were right for the first time'
    assert right.sum() == 40 or not right.all()
    assert torch.equal(transfer_attack(model, fgsm)(None, x, y, threat), fgsm(model, x, y, threat))


def test_kept_images_belong_to_their_question():
    calls = []
    def counted(model, x, y, threat, *, generator=None):
        calls.append(1)
        return pgd(model, x, y, threat, generator=generator)
    kept = transfer_attack(model, counted)
    ask = lambda x=x, y=y, threat=threat, seed=0: kept(
        None, x, y, threat, generator=None if seed is None else make_generator(seed))
    first = ask()
    for other in (dict(y=(y+1) % 4), dict(seed=1), dict(seed=None), dict(threat=Linf(4/255)),
                  dict(threat=L2(8/255)), dict(x=x.clamp_min(.02))):
        n = len(calls)
        assert not torch.equal(ask(**other), first), other
        assert len(calls) == n+1, other
        assert len(ask(**other))
        assert len(calls) == n+1
    for rows in (slice(None), slice(9), torch.arange(40).flip(0), torch.tensor([3, 3, 5])):
        assert torch.equal(ask(x=x[rows], y=y[rows]), first[rows])
    assert len(calls) == 7
    g = make_generator(5)
    h = make_generator(5)
    kept(None, x, y, threat, generator=g), kept(None, x, y, threat, generator=h)
    assert torch.equal(g.get_state(), h.get_state()), 'whoever draws next draws the same'


def test_percentages_by_hand():
    rows = pd.DataFrame(dict(
        image=[0, 1, 2, 3]*3, attack=['clean']*4 + ['b']*4 + ['a']*4,
        correct=[1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0])).astype({'correct': bool})
    assert worst_case(rows).correct.tolist() == [False, False, True, False]
    assert worst_case(rows).image.tolist() == [0, 1, 2, 3]
    table = summarize(rows)
    assert table.attack.tolist() == ['clean', 'b', 'a', 'worst']
    assert table.accuracy.tolist() == [.75, .75, .5, .25]
    assert set(table.n) == {4}
    assert [tuple(r)
            for r in table[['lo', 'hi']].to_numpy()] == [wilson(k, 4) for k in (3, 3, 2, 1)]


def test_comparisons_by_hand():
    a = pd.DataFrame(dict(image=[0, 1, 2, 3]*3, attack=['clean']*4 + ['b']*4 + ['a']*4,
                          threat=['none']*4 + ['Linf']*8, label=[5, 6, 7, 8]*3,
                          correct=[1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0])).astype({'correct': bool})
    b = a.assign(correct=[True]*4 + [False]*8)[a.attack != 'b']
    table = compare(a, b)
    assert table.columns.tolist() == ['attack', 'n', 'accuracy_a', 'accuracy_b', 'difference',
                                      'lo', 'hi']
    assert table.attack.tolist() == ['clean', 'a', 'worst']
    assert set(table.n) == {4}
    t = table.set_index('attack')
    assert t.loc['clean'].tolist() == [4, .75, 1, *paired_difference([1, 1, 1, 0], [1]*4)]
    assert t.difference['clean'] == -.25
    assert t.loc['a'].tolist() == [4, .5, 0, *paired_difference([0, 1, 1, 0], [0]*4)]
    assert t.loc['worst'].tolist() == t.loc['a'].tolist(), 'b was tried on one of them alone'
    assert compare(b, a).accuracy_b.tolist() == t.accuracy_a.tolist()
    with pytest.raises(ValueError, match='must hold an attack in common'):
        compare(a[a.attack == 'b'], a[a.attack == 'a'])
    for seed in range(3):
        assert compare(a, a.assign(correct=[True, True, False]*4).sample(
            frac=1,
            random_state=seed)).equals(compare(a, a.assign(correct=[True, True, False]*4))), (
                'the order of the rows does not matter')
    others = dict(images=(b[b.image < 3], b.assign(image=b.image+1), b.assign(label=b.label+1)),
                  threats=(b.replace('Linf', 'L2'), b[b.attack == 'clean']))
    for what, tables in others.items():
        for o in tables:
            for pair in ((a, o), (o, a)):
                with pytest.raises(ValueError,
                                   match='same images, with the same labels, under the same '
                                         f'threat model; their {what} differ'):
                    compare(*pair)
    with pytest.raises(ValueError, match="`b` must hold the same images .*4 under 'clean', 3 under 'a'"):
        compare(a, b.drop(b.index[-1]))


class Broken(nn.Module):
    "Answers NaN for dark images"
    def forward(self, x): return model(x)/(x.mean((1, 2, 3), keepdim=False)[:, None] > .4)*1.


def test_answers_that_are_not_finite_are_no_robustness():
    dark = torch.cat([x[:5].clamp_min(.5), x[5:6]*.1])
    with pytest.raises(ValueError,
                       match='finite logits; it gave NaN or infinity for image 5 under clean'):
        evaluate(Broken().eval(), dark, y[:6], {}, threat)


bad_attacks = dict(too_far=lambda model, x, y, threat, generator: (x + .1).clamp(0, 1),
                   beyond_white=lambda model, x, y, threat, generator: x + 8/255)


@pytest.mark.parametrize('name', bad_attacks)
def test_attacks_that_cheat_are_named(name):
    words = f"attack '{name}' left its threat model Linf.*Return `threat.project"
    with pytest.raises(ValueError, match=words):
        evaluate(model, x.clamp_min(.5), y, {name: bad_attacks[name]}, threat)


def normed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 4)).eval()
    net[0].running_var.fill_(.3)
    return net


def trains(model, x, y, threat, *, generator=None):
    model.train()
    model(x)
    model.eval()
    return x


def learns(model, x, y, threat, *, generator=None):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return x


@pytest.mark.parametrize('attack, changed', ((trains, 'running_mean'), (learns, 'weight')))
@pytest.mark.parametrize('ask', (
    lambda net, attack, folder: evaluate(net, x, y, dict(odd=attack), threat),
    lambda net, attack, folder: robustness_curve(net, x, y, attack, [threat]),
    lambda net, attack, folder: audit(net, x, net(x).argmax(1), x, threat, attack=attack),
    lambda net, attack, folder: craft_adversarial(net, x, y, attack, threat, folder/'parts')))
def test_an_attack_that_changes_the_model_is_named_and_the_model_put_back(ask, attack, changed, tmp_path):
    net = normed()
    before = {k: v.clone() for k, v in net.state_dict().items() if 'tracked' not in k}
    with pytest.raises(ValueError, match=f'must leave the model as it was; it changed .*{changed}'):
        ask(net, attack, tmp_path)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_weights_that_are_no_numbers_are_not_said_to_have_changed():
    net = normed()
    net[0].running_mean[0] = torch.nan
    with _unharmed(net, 'odd'):
        pass


@pytest.mark.parametrize('out, said', ((x*float('nan'), 'NaN'),
                                       (x.byte(), 'torch.uint8, which may be divided')))
def test_attacks_return_floats(out, said):
    with pytest.raises(ValueError, match=f"attack 'odd' must return floats in .0, 1.; got {said}"):
        evaluate(model, x, y, dict(odd=lambda *a, **k: out), threat)


@pytest.mark.parametrize('out', (x[:3], x[:, :1], None, [1]),
                         ids=('too few', 'other shape', 'None', 'list'))
def test_attacks_return_images(out):
    with pytest.raises(ValueError,
                       match="attack 'odd' must return images of shape .40, 3, 5, 5.; got"):
        evaluate(model, x, y, dict(odd=lambda *a, **k: out), threat)


class Pair(nn.Module):
    def forward(self, x): return model(x), model(x)[:, :2]


wrong = (
    (dict(y=y[:-1]), 'one label per image'), (dict(y=y+1), 'class numbers'),
    (dict(x=x*255), 'Divide by 255'), (dict(attacks=dict(clean=fgsm)), "must not hold 'clean'"),
    (dict(attacks=dict(worst=fgsm)), "must not hold 'worst'"),
    (dict(attacks={'': fgsm}), "non-empty strings; got ''"),
    (dict(attacks={' ': fgsm}), 'non-empty strings'),
    (dict(attacks={3: fgsm}), 'non-empty strings; got 3'),
    (dict(attacks=fgsm), r'such as `dict\(pgd=pgd\)`; got function'),
    (dict(attacks=dict(a=threat)), "'a' is Linf"),
    (dict(threat=8/255), r'such as `Linf\(8/255\)`; got 0.03'),
    (dict(model=make_net().train()), 'Call `model.eval'),
    (dict(model=Pair().eval()), 'got a tuple'), (dict(model=len), 'torch.nn.Module'),
    (dict(model=nn.Sequential(nn.Flatten(), nn.Threshold(2., torch.nan)).eval()), 'finite logits'),
    (dict(batch_size=0), 'at least 1'))


@pytest.mark.parametrize('kw, words', wrong, ids=[w for _, w in wrong])
def test_wrong_uses(kw, words):
    with pytest.raises((ValueError, TypeError), match=words):
        evaluate(**{**dict(model=model, x=x, y=y, attacks={}, threat=threat), **kw})


def test_three_roads_to_a_quantised_model():
    roads = quantized_attacks(model, fgsm, queries=7)
    assert set(roads) == {'white_box', 'transfer', 'square'}
    assert roads['white_box'] is fgsm
    assert roads['square'].keywords == dict(queries=7)
    assert torch.equal(roads['transfer'](None, x, y, threat), fgsm(model, x, y, threat))


# Eight bits

grey = (255*x).round()/255


@pytest.mark.parametrize(
    't', (Linf(8/255), Linf(7.6/255), Linf(.4/255), Linf(0), L2(.2), L2(.003)), ids=repr)
def test_rounded_images_are_on_the_grid_and_inside(t):
    free = full_pgd(model, grey, y, t)
    out = on_8bit_images(pgd)(model, grey, y, t)
    assert torch.equal(out, (255*out).round()/255)
    assert t.allows(grey, out).all()
    nearest = (255*free).round()/255
    inside = t.allows(grey, nearest)
    assert torch.equal(out[inside],
                       nearest[inside]), 'the nearest grey levels, where they are allowed'
    assert not ((out-grey)*(free-grey) < 0).any(), 'else less of the same change'
    assert ((out-grey).abs() <= (nearest-grey).abs() + 1e-7).all(), 'else less of the same change'
    whole = int(255*t.eps + 1e-4)
    if isinstance(t, Linf):
        assert (out-grey).abs().max().item() == pytest.approx(whole/255, abs=1e-6)
        assert inside.all() if whole/255 == pytest.approx(t.eps, abs=1e-9) else True
    elif t.eps == .2:
        assert not inside.all(), 'as much of it as there is room for'
        assert (t.distance(grey, out) > .9*t.eps).all(), 'as much of it as there is room for'
    else:
        assert torch.equal(out, grey), 'less than one grey level is no change'


def test_changes_that_may_stay_are_not_shortened():
    flat = torch.full((3, 1, 2, 2), 100/255, dtype=torch.float64)
    grid = on_8bit_images(lambda model, x, y, threat, *, generator=None: x + 2.5001/255)
    for eps, levels in ((3, 3.), (2.9, 2.)):
        assert (255*(grid(None, flat, None, Linf(eps/255))-flat) - levels).abs().max() < 1e-9


def test_the_evaluator_judges_what_is_rounded():
    rows = evaluate(model, grey, y,
                    dict(free=full_pgd, grid=on_8bit_images(pgd),
                         turn=multi_attack(on_8bit_images(fgsm), on_8bit_images(pgd))),
                    Linf(.4/255)).set_index(['attack', 'image'])
    assert (rows.distance['grid'] == 0).all()
    assert (rows.distance['turn'] == 0).all()
    assert rows.margin['grid'].tolist() == pytest.approx(rows.margin['clean'].tolist(), abs=1e-6)
    assert (rows.distance['free'] > .3/255).all()
    with pytest.raises(ValueError, match='8-bit images.*image 3 is up to 0.3 grey levels off'):
        evaluate(model, grey + .3/255*(torch.arange(40) == 3).view(-1, 1, 1, 1)*(grey < .9), y,
                 dict(grid=on_8bit_images(pgd)), threat)


# Runs that are killed

def question(**other):
    return dict(dict(model=model, x=x, y=y,
                     attacks=dict(jitter=jitter, pgd=partial(pgd, steps=3), again=eight_bit_free),
                     threat=threat, batch_size=2),
                **other)

def eight_bit_free(model, x, y, threat, *, generator=None): return fgsm(model, x, y, threat)


starter = f'''
import os, sys
sys.path[:0] = {[str(o) for o in Path(__file__).parents[:2]]!r}
import test_robust_accuracy as t
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        t.evaluate(**t.question(), save={{folder!r}})
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


def test_killed_runs_continue(tmp_path):
    "A process that has imported everything starts one run after the other; each is killed"
    folder = tmp_path/'run'
    undisturbed = evaluate(**question())
    seen = [0]
    with subprocess.Popen([sys.executable, '-c', starter.format(folder=str(folder))], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        for more in (1, 7, 20, 2):
            print(file=parent.stdin, flush=True)
            run = int(parent.stdout.readline())
            limit = time.monotonic() + 60
            while len(list(folder.glob('*.csv'))) < seen[-1] + more and time.monotonic() < limit:
                time.sleep(.0005)
            os.kill(run, signal.SIGKILL)
            assert int(parent.stdout.readline()) == -signal.SIGKILL, 'killed, not finished'
            seen.append(len(list(folder.glob('*.csv'))))
    assert all(a < b for a, b in zip(seen, seen[1:]))
    assert seen[-1] < 80
    pd.testing.assert_frame_equal(steady(evaluate(**question(), save=folder)), steady(undisturbed),
                                  check_exact=True)
    assert len(list(folder.glob('*.csv'))) == 80
    pd.testing.assert_frame_equal(steady(evaluate(**question(), save=folder)), steady(undisturbed),
                                  check_exact=True)


@pytest.fixture
def folder(tmp_path):
    "Where a run was finished"
    evaluate(**question(batch_size=15), save=tmp_path/'run')
    return tmp_path/'run'


def test_finished_batches_are_not_evaluated_again(tmp_path):
    asked = []
    folder = tmp_path/'run'
    hook = model.register_forward_pre_hook(lambda m, args: asked.append(len(args[0])))
    evaluate(**question(batch_size=15), save=folder)
    asked.clear()
    evaluate(**question(batch_size=15), save=folder)
    assert asked == [1], 'a look at the first image'
    (folder/'1_0000015.csv').unlink()
    rows = evaluate(**question(batch_size=4), save=folder)
    hook.remove()
    assert max(asked[2:]) == 4, 'with other batches'
    rounded = ['margin', 'confidence', 'seconds']
    assert rows.drop(columns=rounded).equals(evaluate(**question()).drop(columns=rounded)), (
        'with other batches')


def test_a_run_without_batches_done_begins_anew(tmp_path):
    (tmp_path/'.0_0000000.csv.k3x.tmp').write_text('half a line')
    assert steady(evaluate(**question(), save=tmp_path)).equals(steady(evaluate(**question())))


other_net = make_net()
with torch.no_grad():
    other_net[1].bias[3] += 1e-6
others = dict(model=other_net, images=x.clone().index_fill_(0, torch.tensor([39]), .5),
              labels=(y+1) % 4, threat=Linf(9/255), seed=1,
              attacks=dict(jitter=jitter, pgd=partial(pgd, steps=4), again=eight_bit_free))


@pytest.mark.parametrize('what', others)
def test_another_question_is_refused(what, folder):
    name = dict(images='x', labels='y').get(what, what)
    with pytest.raises(ValueError, match=f'`save` holds rows of another question: {what} '
                                         'differ from .*question.json. Name another folder'):
        evaluate(**question(**{name: others[what]}), save=folder)


def test_other_ways_of_asking_otherwise(folder):
    attacks = question()['attacks']
    same_weights = nn.Sequential(*make_net(), nn.Hardtanh(-100, 100)).eval()
    for other in (dict(model=same_weights), dict(x=x.double(), model=make_net().double()),
                  dict(attacks=dict(reversed(attacks.items()))),
                  dict(attacks=attacks | dict(pgd=partial(pgd, steps=3, loss=margin))),
                  dict(attacks=attacks | dict(pgd=on_8bit_images(partial(pgd, steps=3)))),
                  dict(attacks=attacks | dict(pgd=transfer_attack(model, partial(pgd, steps=3)))),
                  dict(attacks={}), dict(threat=L2(8/255))):
        with pytest.raises(ValueError, match='another question'):
            evaluate(**question(**other), save=folder)


settings = ((lambda m=model: transfer_attack(m, pgd), lambda: transfer_attack(other_net, pgd)),
            (lambda: multi_attack(fgsm, pgd), lambda: multi_attack(pgd, fgsm)),
            (lambda: restarts(pgd, 2), lambda: restarts(pgd, 3)),
            (lambda: on_8bit_images(partial(fgsm, loss=margin)), lambda: on_8bit_images(fgsm)),
            (lambda: multi_attack(fgsm, transfer_attack(model, pgd)),
             lambda: multi_attack(fgsm, transfer_attack(other_net, pgd))))


@pytest.mark.parametrize('same, other', settings)
def test_settings_of_attacks_belong_to_the_question(same, other, tmp_path):
    run = lambda attack: steady(evaluate(model, grey, y, dict(t=attack), threat, batch_size=30,
                                         save=tmp_path))
    attack = same()
    assert run(attack).equals(run(attack)), 'what an attack remembers does not'
    assert run(attack).equals(run(same())), 'what an attack remembers does not'
    with pytest.raises(ValueError, match='attacks differ'):
        run(other())


def test_full_disks_leave_no_half_tables(tmp_path, monkeypatch):
    calls = []
    fsync = os.fsync
    def full(f):
        calls.append(f)
        if len(calls) == 5: raise OSError(28, 'No space left on device')
        fsync(f)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='could not write .*0_0000006.csv: No space left'):
        evaluate(**question(), save=tmp_path)
    assert sorted(o.name for o in tmp_path.iterdir()) == [
        '0_0000000.csv', '0_0000002.csv', '0_0000004.csv', 'question.json']
    assert steady(evaluate(**question(), save=tmp_path)).equals(steady(evaluate(**question())))


def test_odd_names_come_back(tmp_path):
    attacks = {k: fgsm for k in ('NA', '1', '1.0', 'a,b "c"', '# x', 'é', 'True')}
    rows = [evaluate(model, x, y, attacks, threat, batch_size=25, save=folder)
            for folder in (None, tmp_path, tmp_path)]
    assert steady(rows[0]).equals(steady(rows[1]))
    assert steady(rows[0]).equals(steady(rows[2]))
    assert rows[0].attack.unique().tolist() == ['clean', *attacks]
    assert rows[0].image.tolist() == 8*list(range(40))


damage = dict(half=lambda b: b[:len(b)//2], empty=lambda b: b'',
              a_line_less=lambda b: b[:b.rindex(b'\n', 0, -1)+1],
              one_digit=lambda b: b.replace(b',3,', b',2,', 1),
              one_bit=lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
              not_text=lambda b: b'\xff\xfe' + b)


@pytest.mark.parametrize('kind', damage)
def test_damaged_tables_are_named(kind, folder):
    file = folder/'2_0000015.csv'
    file.write_bytes(damage[kind](file.read_bytes()))
    with pytest.raises(ValueError,
                       match='2_0000015.csv is damaged, incomplete or from another run. Delete it'):
        evaluate(**question(), save=folder)
    file.unlink()
    again = evaluate(**question(batch_size=15), save=folder)
    assert steady(again).equals(steady(evaluate(**question(batch_size=15))))


def test_tables_of_another_run_are_named(folder, tmp_path):
    evaluate(**question(seed=1, batch_size=15), save=tmp_path/'other')
    (tmp_path/'other/1_0000000.csv').replace(folder/'1_0000000.csv')
    with pytest.raises(ValueError,
                       match='1_0000000.csv is damaged, incomplete or from another run'):
        evaluate(**question(), save=folder)


@pytest.mark.parametrize('text', ('', '{"model": ', '[1, 2]', '3', '"a"'))
def test_a_damaged_question_is_named(text, folder):
    (folder/'question.json').write_text(text)
    with pytest.raises(ValueError, match='question.json is damaged.*Delete the folder'):
        evaluate(**question(), save=folder)


def test_folders_that_are_something_else(folder, tmp_path):
    (folder/'question.json').unlink()
    with pytest.raises(ValueError, match='holds results but no question.json'):
        evaluate(**question(), save=folder)
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='`save` must name a folder'):
        evaluate(**question(), save=tmp_path/'file')


def test_the_folder_can_be_read_by_people(folder):
    tables = [pd.read_csv(f, comment='#') for f in sorted(folder.glob('*.csv'))]
    assert len(tables) == 12
    assert pd.concat(tables).correct.mean() == evaluate(**question()).correct.mean()
    known = json.loads((folder/'question.json').read_text())
    assert [name for name, key in known['attacks']] == ['jitter', 'pgd', 'again']
    assert known['threat'][0] == repr(threat)


def test_rows_of_another_scheme_are_refused(folder):
    file = folder/'question.json'
    old = json.loads(file.read_text())
    del old['scheme']
    file.write_text(json.dumps(old))
    with pytest.raises(ValueError, match='`save` holds rows of another version of this library'):
        evaluate(**question(), save=folder)


def test_what_nobody_can_tell_is_refused_before_anything_is_written(tmp_path):
    lock = threading.Lock()
    def locked(model, x, y, threat, *, generator=None):
        with lock:
            return x
    with pytest.raises(ValueError, match='`save` needs to know.*lock of locked is a _thread.lock'):
        evaluate(**question(attacks=dict(a=locked)), save=tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_crafted_images_are_those_of_the_weights():
    net = make_net(4)
    kept = transfer_attack(net, fgsm)
    before = kept(None, x, y, threat)
    net.load_state_dict(make_net(5).state_dict())
    assert torch.equal(kept(None, x, y, threat), fgsm(net, x, y, threat))
    assert not torch.equal(kept(None, x, y, threat), before)


# Curves

budgets = [Linf(k/255) for k in (1, 4, 8, 16, 255)]


def test_curves_keep_the_worst_image_so_far():
    rows = robustness_curve(model, x, y, pgd, budgets, seed=3)
    assert rows.columns.tolist() == ['image', 'attack', 'threat', 'label', 'prediction',
                                     'correct', 'margin', 'confidence', 'distance', 'forward',
                                     'backward', 'seconds', 'eps']
    assert len(rows) == 6*40
    slow = {0.: evaluate(model, x, y, {}, threat)}
    for t in budgets:
        slow[t.eps] = evaluate(model, x, y, dict(attacked=pgd), t, seed=3)
    lowest = np.full(40, np.inf)
    for eps, g in rows.groupby('eps'):
        one = slow[eps][slow[eps].attack == ('attacked' if eps else 'clean')].margin.to_numpy()
        lowest = np.where(lowest <= 0, lowest, np.minimum(lowest, one))
        assert g.image.tolist() == list(range(40))
        assert g.label.tolist() == y.tolist()
        assert (g.distance <= eps + 1e-6).all()
        assert g.margin.to_numpy() == pytest.approx(lowest, abs=1e-4)
        assert (g.correct == (g.margin > 0)).all()
        assert (g.correct == (g.prediction == g.label)).all()
    assert set(rows.threat) == {'none', *map(repr, budgets)}
    assert (lowest < 0).all()
    assert not slow[0.].correct.all()


def test_only_survivors_are_asked_and_a_bad_attack_cannot_help():
    asked = []
    def weak(model, x, y, threat, *, generator=None):
        asked.append(len(x))
        return (fgsm(model, x, y, threat) if threat.eps < .02
                else 2*x - fgsm(model, x, y, threat) if threat.eps < .04 else x)
    inner = x.clamp(.1, .9)
    rows = robustness_curve(model, inner, y, weak, budgets[:4])
    right = rows.groupby('eps').correct.sum()
    assert asked == right.iloc[:4].tolist()
    assert right.is_monotonic_decreasing
    assert right.iloc[2] < right.iloc[0]
    assert right.iloc[2] == right.iloc[4]
    assert (rows.pivot(index='image', columns='eps',
                       values='margin').diff(axis=1).iloc[:, 1:] <= 0).all(axis=None)


def test_a_curve_ends_when_nothing_is_left():
    rows = robustness_curve(model, x, (model(x).argmax(1)+1) % 4,
                            lambda *a, **k: pytest.fail('nothing is left to attack'), budgets)
    assert len(rows) == 240
    assert not rows.correct.any()


@pytest.mark.parametrize('threats', ([], [Linf(.1), Linf(.1)], [Linf(.2), Linf(.1)],
                                     [Linf(0), Linf(.1)], [Linf(.1), L2(.2)], [.1, .2]),
                         ids=repr)
def test_other_lists_are_no_budgets(threats):
    with pytest.raises(ValueError, match='positive and growing'):
        robustness_curve(model, x, y, pgd, threats)


def test_curves_are_drawn_as_they_are():
    rows = robustness_curve(model, x, y, fgsm, budgets[:3])
    ax = plot_curve(pd.concat([rows.assign(net='a'), rows.assign(net='b', correct=False)]),
                    by='net', caption='seed 0')
    share = 100*rows.groupby('eps').correct.mean()
    assert ax.lines[0].get_xdata().tolist() == pytest.approx([0, 1, 4, 8])
    assert ax.lines[0].get_ydata().tolist() == pytest.approx(share.tolist())
    assert not ax.lines[1].get_ydata().any()
    band = ax.collections[0].get_paths()[0].vertices
    assert (100*wilson(int(rows[rows.eps == 0].correct.sum()),
                       40)[0]) == pytest.approx(band[band[:, 0] == 0, 1].min())
    assert ax.get_xlabel() == 'Linf budget, grey levels'
    assert ax.get_ylabel() == 'accuracy, %'
    assert {t.get_text() for t in ax.texts} == {'a', 'b', 'chance',
                                                'n = 40 images, 95 % intervals, seed 0'}
    assert ax.lines[2].get_ydata()[0] == 25
    length = plot_curve(robustness_curve(model, x, y, fgsm, [L2(.5)]))
    assert length.lines[0].get_xdata().tolist() == [0, .5]
    assert length.get_xlabel() == 'L2 budget, pixels in [0, 1]'
    assert 'accuracy' in {t.get_text() for t in length.texts}
    plt.close('all')


class Shaky(nn.Module):
    "NaN where the first pixel was changed"
    def __init__(self, first):
        super().__init__()
        self.first = first
    def forward(self, x):
        z = x.flatten(1)[:, :3]
        here = (x[:, :1, 0, 0] - self.first).abs() > 1e-6
        return torch.where(here, torch.nan, z)


def test_no_number_under_attack_counts_as_wrong():
    x = torch.full((4, 1, 2, 2), .5)
    x[:, 0, 0, 1] = .9
    y = torch.ones(4, dtype=torch.int64)
    def first_pixel(model, x, y, threat, *, generator=None):
        x = x.clone()
        x[:2, :, 0, 0] += .1
        return x
    rows = evaluate(Shaky(.5).eval(), x, y, dict(first=first_pixel), Linf(.1))
    hit = rows[rows.attack == 'first']
    assert hit.correct.tolist() == [False, False, True, True]
    assert hit.prediction.tolist() == [-1, -1, 1, 1]
    assert (hit.confidence[:2] == 0).all()
    assert summarize(rows).set_index('attack').accuracy['worst'] == .5


def test_confidence_is_the_softmax_of_the_prediction():
    rows = evaluate(model, x, y, {}, threat)
    expected = predict(model, x).softmax(1).amax(1)
    assert (torch.tensor(rows.confidence.to_numpy()) - expected).abs().max() < 1e-5


def test_an_attack_that_helps_is_an_alarm():
    said = predict(model, x)
    wrong = said.argsort(1)[:, -2]
    def helpful(model, x, y, threat, *, generator=None):
        return pgd(model, x, said.argmax(1)[:len(x)], threat, steps=20)
    with pytest.warns(UserWarning, match="attack 'helpful' leaves .* 0 are right without"):
        evaluate(model, x, wrong, dict(helpful=helpful), Linf(.3))
    with warnings.catch_warnings():
        warnings.simplefilter('error', AttackHelped)
        evaluate(model, x, said.argmax(1), dict(idle=lambda model, x, *rest, **kw: x), Linf(.3))


def test_an_attack_that_views_its_images_is_asked_in_the_usual_layout():
    drawn = []
    def mine(model, x, y, threat, *, generator=None):
        drawn.append(torch.rand(1, generator=generator))
        return threat.project(x, x + x.view(len(x), -1).sign().view(x.shape))
    rows = evaluate(model, x, y, dict(mine=mine), threat)
    assert (rows.distance[rows.attack == 'mine'] > 0).all()
    assert drawn[0] == drawn[1], 'the second call draws what the first one drew'
    def broken(model, x, y, threat, *, generator=None): raise RuntimeError('something else')
    with pytest.raises(RuntimeError, match='something else'):
        evaluate(model, x, y, dict(broken=broken), threat)


def test_rows_of_several_calls_are_refused_until_their_images_differ():
    first = evaluate(model, x[:30], y[:30], dict(fgsm=fgsm), threat)
    second = evaluate(model, x[30:], y[30:], dict(fgsm=fgsm), threat)
    both = pd.concat([first, second])
    for read in (summarize, worst_case, lambda o: compare(o, o)):
        with pytest.raises(ValueError, match='image 0 is there again under .clean. .20 such rows'):
            read(both)
    whole = evaluate(model, x, y, dict(fgsm=fgsm), threat)
    joined = pd.concat([first, second.assign(image=second.image+30)])
    pd.testing.assert_frame_equal(summarize(joined), summarize(whole))
    curve = robustness_curve(model, x, y, fgsm, [Linf(4/255), Linf(8/255)])
    assert len(worst_case(curve)) == 40, 'budgets may stand side by side'
    for read in (summarize, lambda o: compare(o, o)):
        with pytest.raises(ValueError, match="one threat model for each attack; 'attacked' has 2"):
            read(curve)


def test_tables_that_were_put_together_wrongly_are_refused():
    rows = evaluate(model, x, y, dict(fgsm=fgsm, pgd=pgd), threat)
    halves = pd.concat([rows[(rows.attack == 'fgsm') & (rows.image < 20)],
                        rows[(rows.attack == 'pgd') & (rows.image >= 20)]])
    with pytest.raises(ValueError, match="20 under 'fgsm', 20 under 'pgd', not the same ones"):
        summarize(halves)
    for read in (summarize, worst_case, lambda o: compare(rows, o)):
        with pytest.raises(ValueError, match='must say of every row whether it is correct; 9 of them do not'):
            read(rows.assign(correct=rows.correct.where(rows.image > 2)))
        with pytest.raises(ValueError, match='at least one image; the table is empty'):
            read(rows[:0])
        with pytest.raises(TypeError, match='a table of `evaluate`; got DataFrame without .*correct'):
            read(summarize(rows))
    with pytest.raises(TypeError, match='without eps'):
        plot_curve(rows)


def test_an_attack_may_write_into_its_images():
    "What it returns is judged beside what was given, which stays as it was"
    before = x.clone()
    def far(model, x, y, threat, *, generator=None):
        x += .5
        return x.clamp_(0, 1)
    with pytest.raises(ValueError, match="attack 'far' left its threat model"):
        evaluate(model, x, y, dict(far=far), threat)
    assert x.equal(before)
    grey = (255*x).round()/255
    near = on_8bit_images(far)(model, grey, y, threat)
    assert threat.allows(grey, near).all() and not near.equal(grey)


def test_seeds_and_folders_are_checked_first(tmp_path):
    with pytest.raises(TypeError, match='`seed` must be an integer; got None'):
        evaluate(model, x, y, dict(fgsm=fgsm), threat, seed=None, save=tmp_path)
    with pytest.raises(TypeError, match='`save` must be the path of a file or folder; got bool'):
        evaluate(model, x, y, dict(fgsm=fgsm), threat, save=True)


def test_attacks_that_divide_their_images_are_given_many():
    given = {}
    net, asked = counted()
    def whole(model, x, y, threat, *, generator=None):
        given.setdefault('whole', []).append(len(x))
        return x
    def parts(model, x, y, threat, *, generator=None, batch_size=None):
        given.setdefault('parts', []).append(len(x))
        return x
    large = torch.rand(12, 3, 256, 256)
    labels = large.mean((2, 3)).argmax(1)
    attacks = dict(whole=whole, parts=parts)
    evaluate(net, large, labels, attacks, threat)
    assert given == dict(whole=[4, 4, 4], parts=[12]) and max(asked) <= 4
    given.clear()
    evaluate(net, large, labels, attacks, threat, batch_size=5)
    assert given == dict(whole=[5, 5, 2], parts=[5, 5, 2])
    given.clear()
    evaluate(net, large, labels, dict(transfer=transfer_attack(net, parts), both=multi_attack(parts, whole)),
             threat)
    assert given == dict(parts=[12, 4, 4, 4], whole=[4, 4, 4])


def test_the_engine_shows_a_model_few_large_images_at_a_time():
    net, asked = counted()
    large = torch.rand(9, 3, 256, 256)
    labels = net(large).argmax(1)
    for attack in (cascade, apgd):
        asked.clear()
        attack(net, large, labels, Linf(1/255))
        assert max(asked) <= 4, attack
