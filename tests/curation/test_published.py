"Published training sets: every plan can be built, and what is their own is checked by hand"
from functools import partial

import numpy as np
import pytest
import torch

from helpers_curation import Brightness, nets, pool, seeded
from robustnb.attacks.gradient import fgsm
from robustnb.attacks.threat_models import Linf
from robustnb.augmentation.soft_labels import label_smoothing, teacher_labels
from robustnb.curation import published as P
from robustnb.curation.published import (
    published_mixture, published_names, simulated_training, towards_random)
from robustnb.curation.training_sets import attacked, build_training_set


@pytest.mark.parametrize('name', published_names)
def test_every_plan_has_proportions_for_its_sources(name):
    plan = published_mixture(name, dict(a=nets[0], b=nets[1]), nets[0], pool, effort=.01)
    assert abs(sum(plan['proportions'].values())-1) < 1e-9
    assert set(plan['proportions']) == set(plan['sources'])
    select = plan.get('select', {})
    assert not isinstance(select, dict) or set(select) <= set(plan['sources'])
    assert set(plan) <= {'sources', 'proportions', 'select'}


@pytest.mark.parametrize('change, words', (
    (dict(name='gold'), '`name` must be one of clean'),
    (dict(nets={}), '`nets`'),
    (dict(effort=0), '`effort`'),
    (dict(name='lyx3911_distilled'), '`teacher` must be given'),
    (dict(name='lyx3911_generated'), '`generated` must be given')))
def test_plans_that_do_not_exist(change, words):
    with pytest.raises(ValueError, match=words):
        published_mixture(**dict(name='lyx3911', nets=dict(a=nets[0])) | change)


def test_targets_are_wrong_and_random():
    seen = []
    def attack(model, x, y, threat, generator=None, loss=None):
        seen.append((y, loss))
        return x
    y = torch.arange(300) % 3
    towards_random(attack)(nets[0], torch.rand(300, 3, 8, 8), y, Linf(.1), seeded())
    target, loss = seen[0]
    assert (target != y).all()
    assert set(((target-y) % 3).tolist()) == {1, 2}
    assert 100 < ((target-y) % 3 == 1).sum() < 200
    logits = torch.randn(4, 3)
    assert torch.allclose(loss(logits, target[:4]),
                          logits.log_softmax(1)[torch.arange(4), target[:4]])


def test_simulated_training_attacks_what_it_trains(monkeypatch):
    steps = []
    def fake(recipe, net, data, seed):
        steps.append((recipe.epochs, net.at, len(data)))
        return Brightness(net.at+1).eval(), None
    monkeypatch.setattr(P, 'train', fake)
    made = simulated_training(pool, nets[0], 20, rounds=3, radii=(.05,), steps=1)
    assert steps == [(1, 0, 90), (1, 1, 90), (1, 2, 90)]
    assert len(made) == 20
    assert made.rows.surrogate.value_counts().to_dict() == {
        'round 1': 7, 'round 2': 7, 'round 3': 6}


def test_simulated_training_needs_a_round():
    with pytest.raises(ValueError, match='`rounds` must be a whole number, at least 1; got 0'):
        simulated_training(pool, nets[0], 20, rounds=0)


def test_relabeled_sources_keep_images_and_the_network_attacked():
    sources = dict(fooled=[attacked(fgsm, nets[0], Linf(.1), 'corner')])
    half = P.relabeled(sources, partial(label_smoothing, alpha=.5))
    plain, soft = (build_training_set(pool, o, dict(fooled=1.), 30) for o in (sources, half))
    assert (soft.images == plain.images).all()
    assert (soft.rows.surrogate == 'corner').all()
    assert (soft.rows.success == plain.rows.success).all()
    assert np.allclose(soft.labels, .5*plain.labels + .25*(1-plain.labels))


def test_a_teacher_that_is_fooled_does_not_hide_that_an_attack_succeeded():
    net = nets[0]
    fooled = attacked(fgsm, net, Linf(.3), 'corner')
    own = pool[30:80]
    taught = P.relabeled(dict(fooled=(own, [fooled])), partial(teacher_labels, models=net))
    plain, made = (build_training_set(pool, o, dict(fooled=1.), 30)
                   for o in (dict(fooled=(own, [fooled])), taught))
    assert plain.rows.success.sum() > 3
    assert (made.rows.success == plain.rows.success).all()
    assert (made.images == plain.images).all() and not np.allclose(made.labels, plain.labels)
