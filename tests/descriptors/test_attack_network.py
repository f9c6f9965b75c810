"""The attacker network and its training, what both attacks that never look at the oracle promise,
resumed runs, and what must not succeed."""
import copy, math, os, random, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from helpers_descriptors import (
    distance, Net, pictures, problem, rule, Same, students, teacher, windowed)
from robustnb.core import make_generator, to_uint8
from robustnb.attacks.ssim_rule import SSIM, ssim
from robustnb.attacks.threat_models import L2, Linf
from robustnb.descriptors import attack_network as E
from robustnb.descriptors.attack import fit_8bit
from robustnb.descriptors.attack_network import (
    AttackerRecipe, LinkNetAttacker, network_attack, train_attacker)
from robustnb.descriptors.blackbox import BlackBox
from robustnb.descriptors.carlini_wagner import carlini_wagner_ssim

pytestmark = pytest.mark.usefixtures('one_thread')


def tinted(n, seed):
    "Two images of each wanted identity, every second one reddish, the others bluish"
    return pictures(2*n, seed=seed).unflatten(0, (n, 2))*torch.tensor([
        [1., .2, .2], [.2, .2, 1.]])[torch.arange(n) % 2].view(n, 1, 3, 1, 1)


def job(**more):
    "A training that takes a second"
    return dict(students=students, sources=pictures(40, seed=3),
                target_images=pictures(80, seed=4).unflatten(0, (40, 2)), threat=rule,
                recipe=AttackerRecipe(epochs=4, batch_size=8),
                attacker=LinkNetAttacker(width=4, k=1.)) | more


@pytest.fixture(scope='module')
def trained(one_thread):
    return train_attacker(students, pictures(120, seed=3), tinted(120, 4), rule,
                          AttackerRecipe(epochs=16, batch_size=8), LinkNetAttacker(width=8))


def attacks(people):
    net = LinkNetAttacker(width=4, k=1.)
    return dict(adam=lambda o, x, t, threat, g=None, start=None: carlini_wagner_ssim(
        o, x, t, threat, g, start, students=students, steps=20),
                network=lambda o, x, t, threat, g=None, start=None: network_attack(
                    o, x, t, threat, g, start, attacker=net, target_images=people[:len(x)]))


both = pytest.mark.parametrize('name', ['adam', 'network'])


@both
def test_promises(name):
    x, people, targets = problem()
    attack = attacks(people)[name]
    image = x.clone()
    weights = [p.clone() for s in students for p in s.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    out = attack(teacher, x, targets, rule, make_generator(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.equal(x, image)
    assert all(torch.equal(a, b)
               for a, b in zip(weights, [p for s in students for p in s.parameters()]))
    assert all(p.grad is None for s in students for p in s.parameters())
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert not out.requires_grad
    assert torch.equal(out, (out*255).round()/255)
    assert all(windowed(a, b) >= .95
               for a, b in zip(to_uint8(x), to_uint8(out))), 'the rule, on what files hold'
    assert (distance(teacher(out),
                     targets) <= distance(teacher((x*255).round()/255), targets)).all()
    assert torch.equal(attack(teacher, x, targets, rule, make_generator(3)), out)
    order = torch.randperm(6, generator=make_generator(0))
    shuffled = attacks(people[order])[name](teacher, x[order], targets[order], rule,
                                            make_generator(3))
    alone = torch.cat([attacks(people[i:])[name](
        teacher, x[i:i+1], targets[i:i+1], rule, make_generator(3)) for i in range(6)])
    assert (shuffled-out[order]).abs().mean() < 1e-3, 'an image does not know its batch'
    assert (alone-out).abs().mean() < 1e-3, 'an image does not know its batch'
    for threat in (L2(.3), Linf(4/255)):
        near = attack(teacher, x, targets, threat)
        assert threat.allows((x*255).round()/255, near).all()
        assert distance(teacher(near),
                        targets).mean() < distance(teacher(x), targets).mean() - .1*(name == 'adam')
    assert torch.equal(attack(teacher, x, targets, SSIM(1.)), (x*255).round()/255)


@both
def test_never_worse_than_start(name):
    x, people, targets = problem()
    good = carlini_wagner_ssim(teacher, x, targets, rule, students=teacher)
    for start in (good, x):
        out = attacks(people)[name](teacher, x, targets, rule, start=start)
        before = distance(teacher((start*255).round()/255), targets)
        after = distance(teacher(out), targets)
        assert (after <= before).all()
        assert all(torch.equal(o, s) for o, s, a, b in zip(out, start, before, after)
                   if a == b and start is good)
    broken = (x + .2*torch.randn(x.shape, generator=make_generator(1))).clamp(0, 1)
    assert not rule.allows(x, broken).any()
    out = attacks(people)[name](lambda o: teacher(o)*0, x, targets, rule, start=broken)
    assert (out != x).any(), 'a start outside the rule is drawn back'
    assert all(windowed(a, b) >= .95 for a, b in zip(to_uint8(x), to_uint8(out))), (
        'a start outside the rule is drawn back')


@both
def test_what_must_not_succeed(name):
    x, people, targets = problem()
    flat = lambda o: torch.ones(len(o), 12)
    assert torch.equal(attacks(people)[name](flat, x, targets, rule), (x*255).round()/255)
    worse = lambda o: teacher(o) if torch.equal(o, (x*255).round()/255) else 5+teacher(o)
    assert torch.equal(attacks(people)[name](worse, x, targets, rule), (x*255).round()/255)


@both
def test_budget_and_missing_answers(name):
    x, people, targets = problem()
    clean = (x*255).round()/255
    attack = attacks(people)[name]
    for limit in (3, 6, 8):
        oracle = BlackBox(teacher, limit)
        out = attack(oracle, x, targets, rule)
        assert oracle.used == limit
        assert torch.equal(out[limit:], clean[limit:])
        assert (distance(teacher(out), targets) <= distance(teacher(clean), targets)).all()
    assert oracle.left == 0
    assert torch.equal(attack(oracle, x, targets, rule), clean)
    class Unused(nn.Linear):
        def forward(self, *a): raise AssertionError('nobody can query what this would find')
    unused = Unused(1, 1).eval()
    assert torch.equal(carlini_wagner_ssim(oracle, x, targets, rule, students=unused), clean)
    assert torch.equal(
        network_attack(oracle, x, targets, rule, attacker=unused, target_images=people), clean)
    lost = lambda o: torch.where(torch.arange(len(o))[:, None] == 2, torch.nan,
                                 teacher(o)) if len(o) == 6 else teacher(o)
    assert torch.equal(attack(lost, x, targets, rule)[2], clean[2]), 'nothing to compare with'
    start = carlini_wagner_ssim(teacher, x, targets, rule, students=teacher)
    queried = []
    def never(o):
        queried.append(len(o))
        return torch.full((len(o), 12), torch.nan)
    assert torch.equal(attack(never, x, targets, rule, start=start), start)
    assert queried == [6]
    oracle = BlackBox(teacher, 1000)
    attack(oracle, x, targets, rule)
    assert oracle.used <= dict(adam=6*11, network=6*2)[name]
    assert oracle.used > 6


@pytest.mark.parametrize('size', [(32, 32), (64, 64), (112, 112), (112, 92), (33, 47), (16, 9)],
                         ids=str)
def test_shapes(size):
    net = LinkNetAttacker(width=4)
    x = torch.rand(2, 3, *size, generator=make_generator(0))
    people = torch.rand(2, 3, 3, *size, generator=make_generator(1))
    out = net(x, people)
    assert out.shape == x.shape
    assert (out >= 0).all()
    assert (out <= 1).all()
    assert (out != x).any()
    if size == (32, 32):
        assert [o.shape[1:] for o in net.encoder(x)] == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_maps_that_do_not_meet():
    a = torch.rand(1, 2, 6, 8, generator=make_generator(0))
    assert torch.equal(E._sized(a, torch.zeros(1, 9, 5, 8)), a[:, :, :5])
    assert torch.equal(E._sized(a, torch.zeros(1, 9, 6, 7)), a[:, :, :, :7])
    assert E._sized(a, torch.zeros(1, 9, 9, 4)).shape == (1, 2, 9, 4)


def test_the_network_is_siamese():
    net = LinkNetAttacker(width=4, k=1.)
    x, people, _ = problem()
    seen = []
    hook = net.encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    out = net(x, people)
    hook.remove()
    assert len(seen) == 2, 'one encoder sees both'
    assert torch.equal(seen[0], x), 'one encoder sees both'
    assert torch.equal(seen[1], people.flatten(0, 1)), 'one encoder sees both'
    assert torch.allclose(net(x, people.flip(1)), out, atol=1e-5)
    assert torch.allclose(net(x, people.repeat(1, 2, 1, 1, 1)), out, atol=1e-5)
    assert (net(x, people.flip(0))-out).abs().max() > 1e-3
    assert (net(people[:, 0], x[:, None])-out).abs().max() > 1e-3
    assert torch.allclose(torch.cat([net(x[i:i+1], people[i:i+1]) for i in range(6)]), out,
                          atol=1e-5)


def test_the_decoder_by_hand():
    net = LinkNetAttacker(width=4, k=.3)
    x, people, _ = problem()
    maps = []
    for images in (x, people[:, 0], people[:, 1]):
        steps = [images]
        for stage in net.encoder.stages:
            steps.append(stage(steps[-1]))
        maps.append(steps[1:])
    fine, middle, coarse = (torch.cat([a, (b+c)/2], 1) for a, b, c in zip(*maps))
    want = x + .3*net.head(net.up[1](net.up[0](coarse)+middle)+fine)
    assert torch.allclose(net(x, people), want.clamp(0, 1), atol=1e-5)
    assert torch.equal(LinkNetAttacker(width=4, k=0)(x, people), x)
    assert torch.equal(LinkNetAttacker(width=4, k=0)(x, people, rule), x)


def test_weights_are_a_function_of_the_seed():
    a = torch.cat([p.flatten() for p in LinkNetAttacker(width=4, seed=0).parameters()])
    b = torch.cat([p.flatten() for p in LinkNetAttacker(width=4, seed=0).parameters()])
    c = torch.cat([p.flatten() for p in LinkNetAttacker(width=4, seed=1).parameters()])
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Staged(nn.Module):
    "A student that lists its stages, four of them, the first two with strides as in ResNet's stem"
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = lambda i, o, s, p: nn.Sequential(
                nn.Conv2d(i, o, 3, s, p), nn.BatchNorm2d(o), nn.ReLU())
            self.stages = nn.Sequential(conv(3, 5, 2, 0), conv(5, 7, 2, 1), conv(7, 9, 1, 0),
                                        conv(9, 11, 2, 1))
            self.normalize = nn.BatchNorm2d(3, affine=False)
            self.last = nn.Linear(11, 12)

    def forward(self, x):
        return F.normalize(self.last(self.stages(self.normalize(x)).mean((2, 3))), dim=1)


def test_encoder_of_a_student():
    student = Staged().train()
    with torch.no_grad():
        student(pictures(30))
    student.eval().requires_grad_(False)
    net = LinkNetAttacker(width=4, encoder=student)
    x, people, _ = problem()
    a = student.normalize(x)
    for stage, o in zip(student.stages, net.encoder(x)):
        a = stage(a)
        assert torch.equal(a, o)
    assert len(net.encoder(x)) == 3
    assert all(p.requires_grad for p in net.parameters())
    assert net(x, people).shape == x.shape
    before = {k: v.clone() for k, v in student.state_dict().items()}
    after, _ = train_attacker(**job(attacker=net, recipe=AttackerRecipe(epochs=1, batch_size=20)))
    assert all(torch.equal(v, before[k])
               for k, v in student.state_dict().items()), 'the student is copied'
    assert torch.equal(after.encoder.stages[0][1].running_mean,
                       net.encoder.stages[0][1].running_mean)
    assert not torch.equal(after.encoder.stages[0][0].weight, net.encoder.stages[0][0].weight)
    for short in (nn.Identity(), Staged()):
        if hasattr(short, 'stages'):
            short.stages = short.stages[:2]
        with pytest.raises(ValueError, match=r'`encoder` must have `stages`.*Use None'):
            LinkNetAttacker(encoder=short)


def test_projection_layer():
    x = pictures(5)
    raw = (x + .3*torch.randn(x.shape, generator=make_generator(0))*torch.tensor([
        0, .001, .1, 1, 1]).view(-1, 1, 1, 1)).requires_grad_()
    out = E._allowed(rule, x, raw)
    assert torch.equal(out[:2], raw[:2].clamp(0, 1))
    assert rule.allows(x, out).all()
    assert torch.allclose(out, rule.project(x, raw.detach()), atol=1e-6)
    up = torch.randn(x.shape, generator=make_generator(1))
    grad = torch.autograd.grad((out*up).sum(), raw)[0]
    goal = raw.detach().clamp(0, 1)
    part = (rule.project(x, raw.detach())-x).abs().sum((
        1, 2, 3))/(goal-x).abs().sum((1, 2, 3)).clamp_min(1e-12)
    inner = (raw > 0) & (raw < 1)
    assert torch.allclose(grad[1:], (part.view(-1, 1, 1, 1)*up*inner)[1:], atol=1e-4)
    assert part[4] < .9


def test_loss_of_training():
    "The first steps of an epoch, written out once more"
    work = job(recipe=AttackerRecipe(epochs=2, batch_size=10, lr=.01, smallest=1.,
                                     shuffle=False, seed=5),
               attacker=LinkNetAttacker(width=4, k=1.))
    mine, history = train_attacker(**work)
    net = LinkNetAttacker(width=4, k=1.)
    frozen = copy.deepcopy(students)
    optimizer = torch.optim.Adam(net.parameters())
    means = None
    rows = []
    step = 0
    for epoch in range(2):
        order = torch.randperm(40, generator=make_generator(5, 'epoch', epoch))
        excess = []
        far = []
        kept = []
        for i in range(0, 40, 10):
            for group in optimizer.param_groups:
                group['lr'] = .01*(1+math.cos(math.pi*step/8))/2
            x = work['sources'][order[i:i+10]]
            people = work['target_images'][order[i:i+10]]
            raw = net(x, people)
            s = 1-torch.stack([ssim(a[None], b[None])[0] for a, b in zip(x, raw)])
            d = sum((m(E._allowed(rule, x, raw))-m(people[:, j])).norm(dim=1) for m in frozen
                    for j in range(2))/4
            now = (s.mean().item(), d.mean().item())
            means = now if means is None else tuple(.9*a + .1*b for a, b in zip(means, now))
            a = means[1]/sum(means)
            b = means[0]/sum(means)
            loss = sum(d[j] if s[j] <= .05 else a*s[j] + b*d[j] for j in range(10))/10
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            excess += s.tolist()
            far += d.tolist()
            kept += (s <= .05).tolist()
        rows.append((np.mean(excess), np.mean(far), np.mean(kept)))
    assert np.allclose(history[['excess', 'distance', 'inside']].values, rows, atol=2e-3)
    assert 0 < rows[1][2] < 1
    for p, q, first in zip(mine.parameters(), net.parameters(), work['attacker'].parameters()):
        assert (p-q).norm() < .02*(p-first).norm() + 1e-4
    assert history.columns.tolist() == ['epoch', 'excess', 'distance', 'inside', 'seconds']
    assert history.epoch.tolist() == [1, 2]


def test_training_leaves_everything_as_it_was():
    work = job(recipe=AttackerRecipe(epochs=1))
    before = [p.clone() for m in (*students, work['attacker']) for p in m.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    net, _ = train_attacker(**work)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    after = [p for m in (*students, work['attacker']) for p in m.parameters()]
    assert all(torch.equal(a, b) and b.grad is None and b.requires_grad
               for a, b in zip(before, after))
    assert not net.training
    assert all((p != q).any()
               for p, q in zip(net.head.parameters(), work['attacker'].head.parameters()))
    weights = lambda **more: torch.cat(
        [p.flatten() for p in train_attacker(**{**work, **more})[0].parameters()])
    one = weights()
    recipe = lambda **o: AttackerRecipe(epochs=1, **o)
    for more in (dict(seed=1), dict(shuffle=False), dict(smallest=.5), dict(lr=1e-3),
                 dict(batch_size=7)):
        assert not torch.equal(weights(recipe=recipe(**more)),
one), more
    assert torch.equal(weights(), one)
    assert not torch.equal(weights(threat=SSIM(.999)), one)
    assert torch.equal(weights(students=students[0]), weights(students=[students[0]]))


def test_a_trained_attacker_beats_noise_on_images_it_has_never_seen(trained):
    net, history = trained
    x = pictures(30, seed=7)
    people = tinted(30, 8)
    targets = teacher(people.flatten(0, 1)).detach().unflatten(0, (30, 2))
    clean = (x*255).round()/255
    out = network_attack(teacher, x, targets, rule, attacker=net, target_images=people)
    noise = [fit_8bit(clean, clean + torch.randn(x.shape, generator=make_generator(i)),
                             rule) for i in range(3)]
    gain = [distance(teacher(clean), targets)-distance(teacher(o).detach(), targets)
            for o in (out, *noise)]
    assert gain[0].mean() > .2
    assert all(gain[0].mean() > 5*o.mean().abs() for o in gain[1:])
    alone = net(clean, people, rule).detach()
    assert rule.allows(clean, alone).all()
    assert (distance(teacher(alone).detach(),
                     targets) < distance(teacher(clean), targets)).float().mean() > .8
    wrong = net(clean, people.roll(1, 0), rule).detach()
    assert distance(teacher(wrong).detach(), targets).mean() > distance(
        teacher(alone).detach(), targets).mean() + .1, 'it looks at the wanted identity'
    assert history.distance.iloc[-1] < history.distance[0] - .1


def test_training_on_students_that_say_the_same_learns_nothing():
    net, history = train_attacker(**job(students=Same().eval(),
                                        attacker=LinkNetAttacker(width=4, k=.001)))
    assert all(torch.equal(a, b)
               for a, b in zip(net.parameters(), LinkNetAttacker(width=4, k=.001).parameters()))
    assert (history.distance == 0).all()
    assert (history.inside == 1).all()


child = f'''
import os, signal, sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
torch.set_num_threads(1)
import test_attack_network as t
real, left = t.E.save_state, [2]
def save(state, path):
    real(state, path)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
t.E.save_state = save
t.train_attacker(**t.job(), checkpoint=sys.argv[1], resume=True)
'''


def test_a_killed_run_ends_like_the_undisturbed_one(tmp_path):
    want, rows = train_attacker(**job())
    assert (rows.inside < 1).all(), 'the running means matter'
    f = tmp_path/'run.pt'
    r = subprocess.run([sys.executable, '-c', child, str(f)], capture_output=True,
                       env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert r.returncode == -9, r.stderr[-500:]
    assert f.exists(), r.stderr[-500:]
    assert len(torch.load(f)['history']) == 2
    with pytest.raises(ValueError, match='`checkpoint` already exists.*resume=True'):
        train_attacker(**job(), checkpoint=f)
    net, history = train_attacker(**job(), checkpoint=f, resume=True)
    assert all(torch.equal(a, b)
               for a, b in zip(net.state_dict().values(), want.state_dict().values()))
    assert history.drop(columns='seconds').equals(rows.drop(columns='seconds'))
    assert [o.name for o in tmp_path.iterdir()] == ['run.pt']
    again, _ = train_attacker(**job(), checkpoint=f, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), want.parameters())), (
        'a finished run is read, not repeated')
    others = dict(recipe=dict(recipe=AttackerRecipe(epochs=5, batch_size=8)),
                  threat=dict(threat=SSIM(.9)), students=dict(students=students[:1]),
                  attacker=dict(attacker=LinkNetAttacker(width=4, k=.2)),
                  images=dict(sources=pictures(40, seed=9)))
    for k, more in others.items():
        with pytest.raises(ValueError,
                           match=f'`checkpoint` belongs to another run: its {k} is.*another path'):
            train_attacker(**job(**more), checkpoint=f, resume=True)
    with pytest.raises(ValueError, match='its attacker is'):
        train_attacker(**job(attacker=LinkNetAttacker(width=4, k=1., seed=1)), checkpoint=f,
                       resume=True)
    with pytest.raises(ValueError, match='its images is'):
        train_attacker(**job(target_images=job()['target_images'].flip(0)), checkpoint=f,
                       resume=True)
    torch.save([1], tmp_path/'other.pt')
    with pytest.raises(ValueError, match='its format is None'):
        train_attacker(**job(), checkpoint=tmp_path/'other.pt', resume=True)


def test_the_default_attacker_has_the_seed_of_the_recipe(monkeypatch):
    made = []
    monkeypatch.setattr(E, 'LinkNetAttacker',
                        lambda seed: (made.append(seed), LinkNetAttacker(width=4, seed=seed))[1])
    train_attacker(**job(attacker=None, recipe=AttackerRecipe(epochs=1, seed=8),
                         sources=pictures(4), target_images=pictures(4)[:, None]))
    assert made == [8]


def test_errors():
    x, people, targets = problem(2)
    adam = lambda **o: carlini_wagner_ssim(**dict(
        dict(oracle=teacher, x=x, targets=targets, threat=rule, students=students, steps=1), **o))
    net = lambda **o: network_attack(**dict(dict(
        oracle=teacher, x=x, targets=targets, threat=rule, attacker=LinkNetAttacker(width=4),
        target_images=people),
                                            **o))
    shared = [(dict(x=2*x), '`x` must hold pixels in'),
              (dict(targets=targets[:, 0]),
               r'`targets` must be descriptors \(N,T,D\).*targets\[:, None\]'),
              (dict(targets=targets[:1]), '`targets` must be descriptors'),
              (dict(targets=targets*torch.nan), '`targets` must be finite'),
              (dict(targets=targets[:, :0]), '`targets` must be descriptors'),
              (dict(targets=None), '`targets` must be descriptors'),
              (dict(start=x[:1]), '`start` must have the shape of `x`'),
              (dict(start=x+1), '`start` must hold pixels'),
              (dict(targets=targets[:, :, :5]),
               r'`oracle` must answer with one descriptor for each image.*\(2,5\)')]
    for attack in (adam, net):
        for more, match in shared:
            with pytest.raises(ValueError, match=match):
                attack(**more)
        with pytest.raises(TypeError, match='`threat` must be a threat model such as SSIM'):
            attack(threat=.95)
    for more, match in [
            (dict(students=()), '`students` must hold at least one'),
            (dict(steps=0), '`steps` must be a whole number, at least 1; got 0'),
            (dict(steps=math.nan), '`steps`'), (dict(students=Net().train()), 'evaluation mode'),
            (dict(students=Net(dim=5).eval()),
             '`students` must answer with descriptors as long as the targets, 12'),
            (dict(students=Net(math.nan).eval()), '`students` must answer with finite')]:
        with pytest.raises((ValueError, TypeError), match=match):
            adam(**more)
    with pytest.raises(TypeError, match='torch.nn.Module'):
        adam(students=[lambda o: o])
    with pytest.raises(TypeError,
                       match='`attacker` must be a network from `train_attacker`; got NoneType'):
        net(attacker=None)
    for wrong in (None, people[:1], people[:, 0], people[..., :8]):
        with pytest.raises(ValueError, match='`target_images` must be.*like `x`'):
            net(target_images=wrong)
        with pytest.raises(ValueError, match='`target_images` must be.*like `sources`'):
            train_attacker(students, x, wrong, rule)
    with pytest.raises(ValueError, match='`target_images` must hold pixels'):
        net(target_images=people*2)
    with pytest.raises(ValueError, match='`x` must have three channels'):
        net(x=x[:, :1])
    with pytest.raises(TypeError, match='`threat`'):
        train_attacker(students, x, people, None)
    with pytest.raises(FloatingPointError, match='not finite in epoch 1. Lower `lr`'):
        train_attacker(**job(recipe=AttackerRecipe(lr=1e20)))
    for more in (dict(epochs=0), dict(batch_size=0), dict(lr=0), dict(lr=math.nan),
                 dict(lr=math.inf), dict(smallest=0), dict(smallest=1.1), dict(epochs=math.nan)):
        with pytest.raises((ValueError, TypeError), match=f'`{next(iter(more))}` (must|in)'):
            AttackerRecipe(**more)
    for more in (dict(width=3), dict(width=8.), dict(k=-1), dict(k=math.nan), dict(k=math.inf)):
        with pytest.raises((ValueError, TypeError), match=f'`{next(iter(more))}` must be'):
            LinkNetAttacker(**more)
