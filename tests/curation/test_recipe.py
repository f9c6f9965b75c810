"The library's own set: its sources, and the labels of its teachers by hand"
import numpy as np
import pytest

from helpers_curation import nets, pool, probabilities
from robustnb.attacks.gradient import pgd
from robustnb.attacks.threat_models import L2, Linf
from robustnb.attacks.transferable import mi_fgsm
from robustnb.augmentation import mixing
from robustnb.augmentation.corruptions import corruption
from robustnb.curation.baselines import baseline_mixture
from robustnb.curation.recipe import (
    builder_sources, robust_mixture, robust_proportions, teaching_mixture)
from robustnb.curation.training_sets import build_training_set
from robustnb.curation.unseen import overlap, unseen_families

networks = dict(corner=nets[0], other=nets[1])
stranger = dict(stranger=nets[0])


def test_nothing_unseen_is_a_source():
    sources = builder_sources(networks)
    assert not overlap(sources, unseen_families(stranger))
    assert overlap(sources | dict(more=[corruption('frost', 1)]), unseen_families(stranger)) == {'frost'}
    for plan in (teaching_mixture(networks), robust_mixture(networks)):
        assert set(plan['sources']) == set(plan['proportions']) <= set(sources)
        assert sum(plan['proportions'].values()) == pytest.approx(1)


def test_attacks_go_round_networks_and_budgets():
    sources = builder_sources(networks, .3)
    def said(name):
        return [(t.surrogate, t.said[1].func, t.said[1].keywords, t.said[3]) for t in sources[name]]
    assert said('linf') == [(net, mi_fgsm, dict(steps=3), repr(Linf(e/255)))
                            for e in (8, 12, 16) for net in networks]
    assert said('l2') == [(net, pgd, dict(steps=3), repr(L2(1.5))) for net in networks]


def test_the_set_that_the_measured_tables_are_of():
    "Of `benchmarks/curation/kinds.py`"
    assert robust_proportions == dict(clean=.6, corrupted=.25, noise=.1, linf=.05)
    plan = robust_mixture(networks, nets, dict(clean=1.))
    made = build_training_set(pool, **plan, n=90)
    opinion = sum(probabilities(pool.images[made.rows.image], k) for k in (0, 1))/2
    assert np.allclose(made.labels, .8*opinion + .2*pool.labels[made.rows.image], atol=1e-5)


def test_plans_make_no_fractals(monkeypatch):
    def refuse(*_): raise AssertionError('nobody asked for an image')
    monkeypatch.setattr(mixing, 'fractals', refuse)
    mixing._thousand.cache_clear()
    builder_sources(networks)
    robust_mixture(networks)
    plan = teaching_mixture(networks)
    build_training_set(pool, dict(clean=plan['sources']['clean']), dict(clean=1.), n=9)
    baseline_mixture('pixmix')


def test_labels_are_the_weighted_mean_of_opinion_and_label():
    plan = robust_mixture(networks, nets, dict(clean=1.), weight=.7)
    made = build_training_set(pool, **plan, n=90)
    images = pool.images[made.rows.image]
    opinion = (probabilities(images, 0) + probabilities(images, 1))/2
    assert (made.images == images).all()
    assert np.allclose(made.labels, .7*opinion + .3*pool.labels[made.rows.image], atol=1e-5)


def test_without_a_teacher_labels_stay():
    made = build_training_set(pool, **robust_mixture(networks, (), dict(clean=1.)), n=90)
    assert (made.labels == pool.labels[made.rows.image]).all()


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match='`proportions`.*gold'):
        robust_mixture(networks, proportions=dict(gold=1.))
    with pytest.raises(ValueError, match='`weight`'):
        robust_mixture(networks, nets, weight=2)
    with pytest.raises(ValueError, match='`nets`'):
        teaching_mixture({})
    assert sum(robust_proportions.values()) == pytest.approx(1)
