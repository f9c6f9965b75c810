"Rows and what is derived from them: every prediction kept, nothing counted as robust that is not."
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.attacks import fgsm, margin, pgd
from robustnb.core import make_generator
from robustnb.evaluation import crafted_on, evaluate, in_turn, loss_of, quantised_attacks, summarize, worst
from robustnb.metrics import paired_difference, wilson
from robustnb.threat import L2, Linf


def make_net(seed=0):
    g, net = make_generator(seed, 'net'), nn.Sequential(nn.Flatten(), nn.Linear(75, 24), nn.Tanh(), nn.Linear(24, 4))
    with torch.no_grad():
        for p in net.parameters(): p.copy_(2*torch.randn(p.shape, generator=g)/p[0].numel()**.5 if p.ndim > 1 else 0*p)
    return net.eval()


model, x = make_net(), torch.rand(40, 3, 5, 5, generator=make_generator(0, 'images'))
with torch.no_grad(): y = model(x).argmax(1)
y = y.where(torch.arange(40) % 8 > 0, (y+1) % 4)
threat = Linf(8/255)


def test_rows_are_what_the_model_says():
    made = {}
    def keep(model, x, y, threat, *, generator=None):
        made[len(made)] = pgd(model, x, y, threat, generator=generator)
        return made[len(made)-1]
    rows = evaluate(model, x, y, dict(pgd=keep), threat, batch_size=15)
    x_adv = torch.cat(list(made.values()))
    assert rows.columns.tolist() == ['image', 'attack', 'threat', 'label', 'prediction', 'correct', 'margin', 'distance']
    for name, images in (('clean', x), ('pgd', x_adv)):
        r = rows[rows.attack == name]
        with torch.no_grad(): logits = model(images)
        assert r.image.tolist() == list(range(40)) and r.label.tolist() == y.tolist() and r.prediction.tolist() == logits.argmax(1).tolist()
        assert r.correct.tolist() == (logits.argmax(1) == y).tolist() and r.margin.tolist() == pytest.approx((-margin(logits, y)).tolist(), abs=1e-5)
        assert r.distance.tolist() == pytest.approx((images-x).abs().flatten(1).amax(1).tolist()) and set(r.threat) == {'none' if name == 'clean' else repr(threat)}
    assert .8 < rows[rows.attack == 'clean'].correct.mean() < .9, 'some labels are wrong on purpose'


@pytest.mark.parametrize('size', (1, 7, 40, 1000))
def test_batch_size_does_not_matter_where_nothing_is_random(size):
    still = lambda model, x, y, threat, *, generator=None: pgd(model, x, y, threat)
    attacks = dict(fgsm=fgsm, pgd=still, both=in_turn(fgsm, still), transfer=crafted_on(make_net(1).double(), still))
    a, b = (evaluate(make_net().double(), x.double(), y, attacks, threat, batch_size=s) for s in (size, 13))
    assert a.drop(columns=['margin', 'distance']).equals(b.drop(columns=['margin', 'distance']))
    assert np.allclose(a.margin, b.margin, atol=1e-4) and np.allclose(a.distance, b.distance, atol=1e-6)


def test_batches_attacks_and_seeds_draw_numbers_of_their_own():
    drawn = []
    def note(model, x, y, threat, *, generator=None):
        drawn.append(torch.rand(1, generator=generator).item())
        return x
    evaluate(model, x, y, dict(a=note, b=note), threat, batch_size=10)
    evaluate(model, x, y, dict(a=note), threat, batch_size=10, seed=1)
    assert len(set(drawn)) == 12
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
    weak, strong = partial(fgsm), partial(pgd, steps=10)
    rows = evaluate(model, x, y, dict(weak=weak, both=in_turn(noted(0, weak), noted(1, strong), noted(2, strong))), threat)
    survivors = int((rows.pivot(index='image', columns='attack', values='correct')[['clean', 'weak']]).all(axis=1).sum())
    assert asked[0] == (0, len(x)) and asked[1] == (1, survivors) and asked[2][1] <= survivors
    table = summarize(rows).set_index('attack').accuracy
    assert table['both'] <= table['weak'] < table['clean']
    nothing_left = in_turn(noted(3, fgsm))(model, x, (y+1+torch.randint(1, (40,))) % 4, threat)
    assert threat.allows(x, nothing_left).all()


def test_transferred_images_are_crafted_once_for_several_copies():
    calls = []
    def counted(model, x, y, threat, *, generator=None):
        calls.append(len(x))
        return fgsm(model, x, y, threat)
    both = in_turn(crafted_on(model, counted), fgsm)
    for shift in (0, 1):
        other = torch.nn.Sequential(model, torch.nn.LayerNorm(4, elementwise_affine=False)).eval() if shift else model
        evaluate(other, x, y, dict(both=both), threat)
    assert calls == [len(x)]


def test_kept_images_belong_to_their_question():
    calls = []
    def counted(model, x, y, threat, *, generator=None):
        calls.append(1)
        return pgd(model, x, y, threat, generator=generator)
    kept = crafted_on(model, counted)
    ask = lambda x=x, y=y, threat=threat, seed=0: kept(None, x, y, threat, generator=None if seed is None else make_generator(seed))
    first = ask()
    for other in (dict(y=(y+1) % 4), dict(seed=1), dict(seed=None), dict(threat=Linf(4/255)), dict(threat=L2(8/255)), dict(x=x.flip(0)), dict(x=x[:9], y=y[:9])):
        n = len(calls)
        assert not torch.equal(ask(**other), first) and len(calls) == n+1, other
        assert len(ask(**other)) and len(calls) == n+1
    assert torch.equal(ask(), first) and len(calls) == 8
    g, h = make_generator(5), make_generator(5)
    kept(None, x, y, threat, generator=g), kept(None, x, y, threat, generator=h)
    assert torch.equal(g.get_state(), h.get_state()), 'whoever draws next draws the same'


def test_percentages_by_hand():
    rows = pd.DataFrame(dict(image=[0, 1, 2, 3]*3, attack=['clean']*4 + ['b']*4 + ['a']*4, correct=[1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0])).astype({'correct': bool})
    assert worst(rows).correct.tolist() == [False, False, True, False] and worst(rows).image.tolist() == [0, 1, 2, 3]
    table = summarize(rows)
    assert table.attack.tolist() == ['clean', 'b', 'a', 'worst'] and table.accuracy.tolist() == [.75, .75, .5, .25] and set(table.n) == {4}
    assert [tuple(r) for r in table[['lo', 'hi']].to_numpy()] == [wilson(k, 4) for k in (3, 3, 2, 1)]
    after = rows.assign(correct=False)
    assert loss_of(rows, after)[0] == .75 and loss_of(rows, after, 'a')[0] == .5 and loss_of(rows, after, 'worst')[0] == .25 and loss_of(after, rows)[0] == -.75
    assert loss_of(rows, after, 'b') == paired_difference(np.array([1, 0, 1, 1]), np.zeros(4))
    assert loss_of(rows, after.iloc[::-1].reset_index(drop=True).sort_values('image'), 'b')[0] == .75
    for a, b, attack in ((rows, after[after.image < 3], 'clean'), (rows, after, 'c'), (rows, after.assign(image=after.image+1), 'clean')):
        with pytest.raises(ValueError, match='must hold the same images'): loss_of(a, b, attack)


class Broken(nn.Module):
    "Answers NaN for dark images"
    def forward(self, x): return model(x)/(x.mean((1, 2, 3), keepdim=False)[:, None] > .4)*1.


def test_answers_that_are_not_finite_are_no_robustness():
    dark = torch.cat([x[:5].clamp_min(.5), x[5:6]*.1])
    with pytest.raises(ValueError, match='finite logits; it gave NaN or infinity for image 5 under clean'): evaluate(Broken().eval(), dark, y[:6], {}, threat)


bad_attacks = dict(too_far=lambda model, x, y, threat, generator: (x + .1).clamp(0, 1), beyond_white=lambda model, x, y, threat, generator: x + 8/255,
                   nan=lambda model, x, y, threat, generator: x*float('nan'))


@pytest.mark.parametrize('name', bad_attacks)
def test_attacks_that_cheat_are_named(name):
    words = 'finite logits.*under nan' if name == 'nan' else f"attack '{name}' left its threat model Linf.*Return `threat.project"
    with pytest.raises(ValueError, match=words): evaluate(model, x.clamp_min(.5), y, {name: bad_attacks[name]}, threat)


def test_wrong_uses():
    for kw, words in ((dict(y=y[:-1]), 'one label per image'), (dict(y=y+1), 'class numbers'), (dict(x=x*255), 'Divide by 255'), (dict(attacks=dict(clean=fgsm)), "must not hold 'clean'")):
        with pytest.raises(ValueError, match=words): evaluate(**{**dict(model=model, x=x, y=y, attacks={}, threat=threat), **kw})
    with pytest.raises(ValueError, match='Call `model.eval'): evaluate(make_net().train(), x, y, {}, threat)
    assert set(quantised_attacks(model)) == {'white_box', 'transfer'}
