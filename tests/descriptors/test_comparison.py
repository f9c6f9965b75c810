"""Comparisons that survive a kill, tables against numbers by hand, and ablations."""
import math, pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils import skip_init

from helpers_submission import box, Counted, entry, Evil, faces, pairs, quiet
from robustnb.core import make_generator, to_uint8
from robustnb.attacks.ssim_rule import file_ssim, SSIM
from robustnb.descriptors import comparison as C
from robustnb.descriptors.attack import fgvm
from robustnb.descriptors.bandit import Bandit, bandit_descriptor
from robustnb.descriptors.blackbox import BlackBox
from robustnb.descriptors.query_attacks import square_descriptor
from robustnb.descriptors.comparison import ablation, attack_table, attacked_images, compare_attacks

rng = np.random.default_rng(0)


def step(oracle, x, targets, threat, generator=None, *, size=.05, decay=1, calls=None):
    "Query one random change, and keep it where it helps"
    if calls is not None:
        calls.append(len(x))
    tried = (255*threat.project(x, x + size*torch.randn(x.shape, generator=generator))).round()/255
    tried = torch.where(threat.allows(x, tried).view(-1, 1, 1, 1), tried, x)
    gap = lambda o: (oracle(o)[:, None]-targets).norm(dim=2).mean(1)
    return torch.where((gap(tried) < gap(x)).view(-1, 1, 1, 1), tried, x)


def nothing(oracle, x, targets, threat, generator=None): return x


@pytest.fixture(scope='module')
def duel(faces, entry):
    x, _, targets = entry
    return partial(compare_attacks, dict(nothing=nothing, step=step), lambda: Counted(1000), x,
                   targets.repeat_interleave(3, 0), SSIM(.9), group=4)


def facts(rows): return rows.drop(columns='seconds')


def test_rows_say_what_the_attack_did(duel, entry):
    x, _, targets = entry
    rows = duel()
    assert list(rows) == ['attack', 'group', 'image', 'before', 'after', 'ssim', 'queries',
                          'seconds']
    assert rows.attack.tolist() == ['nothing']*6 + ['step']*6
    assert rows.group.tolist() == [0, 0, 0, 0, 1, 1]*2
    assert rows.image.tolist() == [*range(6)]*2
    assert rows.queries.tolist() == [0]*6 + [2]*6
    before = [torch.cdist(box(x[i:i+1]), targets[i//3]).mean().item() for i in range(6)]
    assert np.allclose(rows.before, before*2, atol=1e-6)
    assert np.allclose(rows.after[:6], before, atol=1e-6)
    assert (rows.ssim[:6] == 1).all()
    made = torch.cat([step(box, x[s], targets.repeat_interleave(3, 0)[s], SSIM(.9),
                           make_generator(0, 'compare')) for s in (slice(0, 4), slice(4, 6))])
    assert np.allclose(
        rows.after[6:],
        [torch.cdist(box(made[i:i+1]), targets[i//3]).mean().item() for i in range(6)], atol=1e-6)
    assert (rows.after < rows.before).any()
    assert np.allclose(rows.ssim[6:], file_ssim(to_uint8(x), to_uint8(made)), atol=0)
    assert (rows.ssim[6:] < 1).any()
    assert (rows.seconds > 0).all()
    assert facts(duel()).equals(facts(rows))
    assert not facts(duel(seed=1)).equals(facts(rows))


def test_a_killed_comparison_goes_on_and_gives_the_same_rows(duel, tmp_path, entry, monkeypatch):
    whole = duel()
    asked = []
    written = []

    def logged(oracle, x, targets, threat, generator=None):
        asked.append(len(x))
        return step(oracle, x, targets, threat, generator)
    def dies(*state):
        if len(written) == 3: raise KeyboardInterrupt
        written.append(save(*state))
    run = partial(compare_attacks, dict(nothing=nothing, step=logged), *duel.args[1:], group=4,
                  folder=tmp_path)
    save = C.save_state
    with monkeypatch.context() as power:
        power.setattr(C, 'save_state', dies)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert sorted(o.relative_to(tmp_path).as_posix() for o in tmp_path.rglob('*')
                  if o.is_file()) == ['nothing/00000.pt', 'nothing/00001.pt', 'step/00000.pt']
    with pytest.raises(ValueError, match='1 of 2 are finished'):
        attacked_images(tmp_path, 'step')
    rows = run()
    # the finished group was not run again
    assert facts(rows).equals(facts(whole))
    assert asked == [4, 2, 2]
    seconds = run().seconds
    assert asked == [4, 2, 2]
    assert seconds.equals(rows.seconds)
    images = attacked_images(tmp_path, 'step')
    assert images.dtype == np.uint8
    assert np.allclose(file_ssim(to_uint8(entry[0]), images), rows.ssim[6:], atol=0)
    assert np.array_equal(attacked_images(tmp_path, 'nothing'), to_uint8(entry[0]))
    with pytest.raises(FileNotFoundError, match='none'):
        attacked_images(tmp_path, 'none')


def test_an_answer_to_another_question_is_not_taken(duel, tmp_path, entry):
    x, _, targets = entry
    attacks, oracle, x, wanted, threat = duel.args
    run = lambda a=step, x=x, wanted=wanted, threat=threat, **k: compare_attacks(
        dict(a=a), oracle, x, wanted, threat, group=4, folder=tmp_path, **k)
    run(partial(step, size=.1, calls=None))
    run(partial(step, calls=None, size=.1))
    for change, what in (
            (dict(a=partial(step, size=.2, calls=None)), 'attack'), (dict(seed=1), 'seed'),
            (dict(threat=SSIM(.8)), 'threat'), (dict(x=x.flip(0)), 'images'),
            (dict(wanted=wanted+1e-6), 'targets')):
        with pytest.raises(ValueError, match=f'another question: {what} differ'):
            run(**{**dict(a=partial(step, size=.1, calls=None)), **change})
    (tmp_path/'a'/'00001.pt').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='00001.pt'):
        run(partial(step, size=.1, calls=None))
    torch.save(dict(rows=1), tmp_path/'a'/'00001.pt')
    with pytest.raises(ValueError, match='another question'):
        run(partial(step, size=.1, calls=None))
    (tmp_path/'a'/'00001.pt').write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(ValueError, match='plain tensors'):
        run(partial(step, size=.1, calls=None))


def test_an_attack_that_cheats_is_caught(duel, entry):
    cheats = {'left its threat model .* on image 0 of a group '
              '.2 of 2': lambda o, x, t, threat, generator: x if len(x) > 2 else 1-x,
              r'must return images of shape \(4, 3, 16, 18\); got '
              r'\(3': lambda o, x, t, threat, generator: x[1:],
              'got NoneType': lambda o, x, t, threat, generator: None,
              r'pixels in \[0, 1\]': lambda o, x, t, threat, generator: x+2,
              'pixels in': lambda o, x, t, threat, generator: x*math.nan}
    for problem, attack in cheats.items():
        with pytest.raises(ValueError, match=problem):
            compare_attacks(dict(cheat=attack), *duel.args[1:], group=4)
    # judged as a file: rounding takes it back
    grid = compare_attacks(dict(a=lambda o, x, t, threat, generator: (x+.4/255).clamp(0, 1)),
                           *duel.args[1:], group=4)
    assert (grid.ssim == 1).all()
    assert np.allclose(grid.after, grid.before)


def test_every_group_has_a_fresh_oracle_and_another_one_judges(entry):
    x, _, targets = entry
    made = []
    def make():
        made.append(Counted(5))
        return made[-1]
    def greedy(oracle, x, targets, threat, generator=None):
        while oracle.left:
            oracle(x)
        return x
    rows = compare_attacks(dict(a=greedy), make, x, targets.repeat_interleave(3, 0), SSIM(.9),
                           group=5)
    assert rows.queries.tolist() == [1]*5 + [5]
    assert rows.after.notna().all()
    plain = compare_attacks(dict(a=nothing), lambda: box, x, targets.repeat_interleave(3, 0),
                            SSIM(.9))
    assert plain.queries.isna().all()
    assert np.allclose(plain.after, rows.after)
    for limit in (0, 4):
        with pytest.raises(
                ValueError,
                match=f'at least one query for each image of a group .5.*got {limit}'):
            compare_attacks(dict(a=greedy), lambda: Counted(limit), x,
                            targets.repeat_interleave(3, 0), SSIM(.9))


def test_the_bar_has_the_running_score(duel, monkeypatch):
    said = []
    class Bar(list):
        def set_postfix_str(self, text): said.append(text)
    monkeypatch.setattr(C, 'progress', lambda items, desc='': Bar(items))
    rows = duel()
    mean = lambda name, n: f"{name} {rows[rows.attack == name].after[:n].mean():.4f}"
    assert said == [mean('nothing', 4), mean('nothing', 6), mean('step', 4), mean('step', 6)]


def test_a_comparison_that_cannot_start_is_refused(duel):
    attacks, make, x, targets, threat = duel.args
    start = lambda **k: compare_attacks(**{
        **dict(attacks=attacks, make_oracle=make, x=x, targets=targets, threat=threat), **k})
    for change, problem in (
            (dict(targets=targets[1:]), r'for 6 images; got \(5, 2'),
            (dict(targets=targets[:, 0]), 'N,T,D'), (dict(targets=targets*math.nan), 'finite'),
            (dict(targets=[1]), 'got list'), (dict(group=0), '`group`'),
            (dict(attacks={'../a': step}), 'names of folders; got .../a'),
            (dict(attacks={'a/b': step}), 'names of folders'),
            (dict(attacks=dict(a=3)), 'must be functions'),
            (dict(attacks={'a ': step}), 'names of folders'),
            (dict(attacks={'.a': step}), 'names of folders'), (dict(x=x+2), r'\[0, 1\]')):
        with pytest.raises(ValueError, match=problem):
            start(**change)
    for bad in ([step], {}):
        with pytest.raises(TypeError, match='dict'):
            start(attacks=bad)


def linear(seed):
    made = torch.nn.Sequential(torch.nn.Flatten(), skip_init(torch.nn.Linear, 864, 4)).eval()
    for o, name in zip(made.parameters(), ('weight', 'bias')):
        o.data = torch.randn(o.shape, generator=make_generator(seed, name))
    return made


def plans(n): return partial(bandit_descriptor, plan=Bandit(queries=n))
def squares(n): return lambda *a, generator=None: square_descriptor(*a, generator, queries=n)
def followed(net): return partial(fgvm, students=[net], queries=4)


@pytest.mark.parametrize('what, was, now', (
    ('attack', dict(attack=plans(2)), dict(attack=plans(4))),
    ('attack', dict(attack=squares(2)), dict(attack=squares(3))),
    ('attack', dict(attack=followed(linear(2))), dict(attack=followed(linear(3)))),
    ('box', {}, dict(box=linear(1))), ('budget', {}, dict(limit=60))))
def test_what_the_numbers_depend_on_is_remembered(tmp_path, entry, what, was, now):
    "Settings in objects and closures, networks in lists, the box and its budget"
    x = entry[0][:2]
    wanted = linear(0)(x).detach()[:, None] + 1
    def run(attack=squares(2), box=linear(0), limit=50):
        make = lambda: BlackBox(lambda x: box(x).detach(), limit)
        return compare_attacks(dict(a=attack), make, x, wanted, SSIM(.9), folder=tmp_path)
    rows = run(**was)
    assert run(**was).equals(rows)
    with pytest.raises(ValueError, match=f'another question: {what} differ'):
        run(**now)


def test_images_of_two_questions_are_not_put_together(duel, tmp_path):
    duel(folder=tmp_path/'a')
    duel(folder=tmp_path/'b', seed=1)
    (tmp_path/'b'/'step'/'00001.pt').replace(tmp_path/'a'/'step'/'00001.pt')
    with pytest.raises(ValueError, match='answers to one question; .*00001.pt answers another'):
        attacked_images(tmp_path/'a', 'step')


# ---- tables

def made_rows(**after):
    n = len(next(iter(after.values())))
    return pd.concat([pd.DataFrame(dict(attack=k, group=np.arange(n)//2, image=range(n),
                                        before=1.5, after=v, ssim=.95+np.arange(n)/1000,
                                        queries=7., seconds=2.)) for k, v in after.items()],
                     ignore_index=True)


def test_table_against_numbers_by_hand():
    a = rng.normal(1, .2, 40)
    noise = rng.normal(0, .01, 40)
    table = attack_table(made_rows(full=a, worse=a+.05+noise, other=a[::-1]))
    assert table.index.tolist() == ['full', 'worse', 'other']
    assert np.allclose(table.after, [a.mean(), (a+.05+noise).mean(), a.mean()])
    assert (table.images == 40).all()
    assert (table.before == 1.5).all()
    # paired: far narrower than the scores' own intervals
    assert table.difference['worse'] == pytest.approx(.05+noise.mean())
    assert table.difference_lo['worse'] > .03
    assert table.difference_hi['worse'] < .07
    assert table.difference_lo['other'] < 0 < table.difference_hi['other']
    assert (table.hi-table.lo > .05).all()
    assert (table.lowest_ssim == .95).all()
    assert (table.queries == 7).all()
    assert (table.seconds == 2).all()
    means = a.reshape(20, 2).mean(1)
    assert table.hi['full']-table.lo['full'] == pytest.approx(2*1.96*means.std()/20**.5, rel=.15)
    turned = attack_table(made_rows(full=a, worse=a+.05+noise), reference='worse')
    assert turned.difference['full'] == pytest.approx(-table.difference['worse'])
    assert attack_table(made_rows(full=a),
                        level=.5).pipe(lambda t: t.hi-t.lo).iloc[0] < .5*(table.hi-table.lo)['full']


def test_groups_are_the_units():
    same = np.repeat(rng.normal(1, .2, 20), 2)             # the two images of a group say the same
    mixed = same.reshape(20, 2).T.ravel()                  # the same numbers, spread over groups
    width = lambda v: attack_table(made_rows(a=v)).pipe(lambda t: (t.hi-t.lo).iloc[0])
    assert width(same) > 1.2*width(mixed)
    one = attack_table(made_rows(a=[1., 2.]))
    assert one.after['a'] == 1.5
    assert one[['lo', 'hi', 'difference_lo']].isna().all(axis=None)


def test_images_without_an_answer_leave_all_attacks():
    table = attack_table(made_rows(a=[1, 2, 3, math.nan, 5], b=[10, math.nan, 30, 40, 50]))
    assert table.images.tolist() == [3, 3]
    assert table.after.tolist() == [3, 30]
    assert table.difference['b'] == 27
    assert table.lowest_ssim['a'] == .95
    # a mean over images, though one group is smaller
    assert attack_table(made_rows(a=[1., 2., 6.])).after['a'] == 3
    with pytest.raises(ValueError, match='answered under every attack'):
        attack_table(made_rows(a=[1, math.nan], b=[math.nan, 2]))
    with pytest.raises(ValueError, match="one of the attacks 'a'; got 'c'"):
        attack_table(made_rows(a=[1., 2.]), 'c')


def test_ablation_switches_what_it_says():
    def attack(oracle, x, targets, threat, generator=None, *, decay=1, mirror=True, steps=5):
        return decay, mirror, steps
    off = dict(momentum=dict(decay=0), mirrors=dict(mirror=False, steps=10))
    run = lambda made: {k: v(None, None, None, None) for k, v in made.items()}
    assert run(ablation(partial(attack, decay=2), off)) == {
        'full': (2, True, 5), 'without momentum': (0, True, 5), 'without mirrors': (2, False, 10)}
    assert run(ablation(partial(attack, decay=2), off, cumulative=True)) == {
        'plain': (0, False, 10), '+ momentum': (2, False, 10), '+ mirrors': (2, True, 5)}
    with pytest.raises(ValueError, match="got 'speed'"):
        ablation(attack, dict(a=dict(speed=0)))
    assert run(ablation(lambda *a, **k: k, dict(a=dict(speed=0))))['without a'] == dict(speed=0)
    for bad in ({}, dict(a={}), dict(a=False)):
        with pytest.raises(ValueError, match='switch each heuristic off'):
            ablation(attack, bad)
