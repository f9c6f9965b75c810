"Seen and unseen kinds: what transforms do, told apart through everything they are made of"
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

from helpers_curation import Brightness, nets, pool, seeded
from robustnb.attacks.adaptive_pgd import apgd
from robustnb.attacks.gradient import fgsm, pgd
from robustnb.attacks.perceptual import advdrop, wasserstein
from robustnb.attacks.score_based import one_pixel
from robustnb.attacks.threat_models import L0, L1, L2, Linf
from robustnb.attacks.transferable import mi_fgsm
from robustnb.augmentation import transforms as T
from robustnb.augmentation.corruptions import corruption, corruption_names
from robustnb.augmentation.mixing import augmix, auto_augment, fractals, pixmix, trivial_augment
from robustnb.augmentation.soft_labels import label_smoothing, mixup
from robustnb.curation import unseen as U
from robustnb.curation.baselines import baseline_mixture, baseline_names
from robustnb.curation.published import published_mixture, summed
from robustnb.curation.training_sets import attacked, build_training_set, unchanged
from robustnb.data import ImageSet

A, B = dict(A=nets[0]), dict(B=nets[1])
photographs = ImageSet(np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8),
                       np.arange(60) % 3, 3)


def on(attack, threat, name='A'): return attacked(attack, nets[0], threat, name)


@pytest.mark.parametrize('transform, found', (
    (unchanged, ''), (partial(label_smoothing, alpha=.1), ''), (mixup, 'mixup'),
    (T.salt_and_pepper, 'impulse_noise'), (corruption('impulse_noise', 1), 'impulse_noise'),
    (partial(T.gaussian_noise, sigma=.1), 'gaussian_noise'), (corruption('saturate', 2), 'saturation'),
    (T.affine, 'rotation translation zoom'), (partial(T.affine, degrees=0, scale=(1, 1)), 'translation'),
    (partial(T.photometric, saturation=1, hue=0), 'brightness contrast'),
    (partial(partial(T.photometric, brightness=1), contrast=1, saturation=1), 'hue'),
    (T.from_torchvision(v2.RandomRotation(5)), 'rotation'),
    (T.from_torchvision(v2.ElasticTransform()), 'elastic'), (corruption('elastic_transform', 1), 'elastic'),
    (T.chain(T.gamma, T.sometimes(.5, T.one_of(T.dropout, T.add))), 'gamma dropout brightness'),
    (pixmix(fractals(2), operations=[T.gamma]), 'pixmix gamma')))
def test_kinds_by_hand(transform, found):
    assert U.kinds(transform) == set(found.split())


@pytest.mark.parametrize('transform, found', (
    (on(pgd, Linf(8/255)), {'pgd Linf on A'}), (on(partial(pgd, steps=3), L2(1.), 'B'), {'pgd L2 on B'}),
    (on(apgd, L1(12.)), {'apgd L1'}), (on(one_pixel, L0(3)), {'one_pixel L0'}),
    (on(partial(advdrop, steps=2), Linf(1.)), {'advdrop'}), (on(wasserstein, Linf(1.)), {'wasserstein'}),
    (summed(on(fgsm, Linf(.1)), on(pgd, L2(1.))), {'fgsm Linf on A', 'pgd L2 on A'})))
def test_kinds_of_attacks(transform, found):
    assert U.kinds(transform) == found


@pytest.mark.parametrize('policy, make', ((v2.TrivialAugmentWide, trivial_augment), (v2.AugMix, augmix)))
def test_policies_hold_what_torchvision_puts_in(policy, make):
    names = dict(Color='saturation', AutoContrast='auto_contrast', Rotate='rotation', ShearX='shear',
                 ShearY='shear', TranslateX='translation', TranslateY='translation')
    inside = {names.get(o, o.lower()) for o in policy._AUGMENTATION_SPACE} - {'identity'}
    assert U.kinds(make()) == inside
    assert U.kinds(T.from_torchvision(policy())) == inside
    assert U.kinds(auto_augment()) == inside | {'invert'}


turn, grey = v2.RandomRotation(5), v2.RandomGrayscale()


@pytest.mark.parametrize('transform, found', (
    (v2.RandomApply([turn]), 'rotation'),
    (v1.RandomApply([v1.RandomRotation(5), v1.Grayscale(3)]), 'rotation grey'),
    (v2.RandomChoice([turn, grey]), 'rotation grey'), (v2.RandomOrder([grey]), 'grey'),
    (v2.Compose([v2.ToImage(), v2.RandomApply([v2.Compose([turn])]), grey]), 'rotation grey'),
    (v1.Compose([v1.ToPILImage(), v1.RandomSolarize(9), v1.PILToTensor()]), 'solarize'),
    ([turn, (grey,)], 'rotation grey'), (torch.nn.Sequential(turn, grey), 'rotation grey'),
    (v2.Compose([v2.ToImage()]), ''), (v2.Compose([v2.RandomApply([v2.AutoAugment()])]), None)))
def test_pipelines_of_torchvision_are_looked_into(transform, found):
    expected = U.kinds(auto_augment()) if found is None else set(found.split())
    assert U.kinds(transform) == expected
    if callable(transform):
        assert U.kinds(T.from_torchvision(transform)) == expected
        assert U.kinds(T.chain(T.gamma, T.from_torchvision(transform))) == expected | {'gamma'}


def unheard(x, y, generator): return x, y


class Unheard(v2.Compose): "May do more than its members"


@pytest.mark.parametrize('transform, name', (
    (lambda x, y, generator: (x, y), '<lambda>'), (unheard, 'unheard'), (partial(unheard, 3), 'unheard'),
    (3, 'int'),
    (T.chain(T.gamma, unheard), 'unheard'), (T.from_torchvision(lambda o: o), '<lambda>'),
    (T.from_torchvision(v2.Lambda(lambda o: o)), 'Lambda'), (Unheard([turn]), 'Unheard'),
    (T.from_torchvision(v2.Compose([turn, v2.RandomZoomOut()])), 'RandomZoomOut'),
    ([turn, unheard], 'unheard'),
    (v2.RandomApply([v2.Compose([v2.SanitizeBoundingBoxes()])]), 'SanitizeBoundingBoxes')))
def test_what_is_not_known_is_refused_by_name(transform, name):
    with pytest.raises(ValueError, match=f'`transform` must say what it does; {name} is not known'):
        U.kinds(transform)
    with pytest.raises(ValueError, match=name):
        U.overlap(dict(mine=transform), U.unseen_families(B))


def test_a_transform_of_ones_own_says_what_it_does():
    def mine(x, y, generator): return x, y
    mine.kinds = {'frost', 'flip'}
    assert U.kinds(partial(T.chain(T.gamma, mine))) == {'gamma', 'frost', 'flip'}
    assert U.overlap(dict(mine=mine), U.unseen_families(B)) == {'frost'}


def test_the_two_lists_share_nothing():
    seen, unseen = U.seen_families(A), U.unseen_families(B)
    assert not set(seen) & set(unseen)
    assert U.overlap(seen, unseen) == set()
    every = {o.name for o in seen['corruption']} | {o.name for o in unseen['held_out']}
    assert every == set(corruption_names)
    assert {o.surrogate for k in ('linf', 'l2') for o in seen[k]} == {'A'}
    assert {o.surrogate for k in ('norms', 'transfer') for o in unseen[k]} == {'B'}


def test_unseen_attacks_by_hand():
    "Frozen: whoever has the same networks gets the same images"
    made = U.unseen_families(A | B, .5)
    def said(family):
        return [(o.surrogate, o.said[1].func, o.said[1].keywords, o.said[3]) for o in made[family]]
    norms = [(apgd, dict(steps=25), L1(12.)), (one_pixel, dict(population=25, generations=10), L0(3)),
             (advdrop, dict(steps=25), Linf(1.)), (wasserstein, dict(steps=10), Linf(1.))]
    transfer = [(mi_fgsm, dict(steps=5), Linf(12/255)), (pgd, dict(steps=5), Linf(8/255)),
                (pgd, dict(steps=5), L2(1.))]
    for family, attacks in dict(norms=norms, transfer=transfer).items():
        assert said(family) == [(net, *attack, repr(t)) for *attack, t in attacks for net in 'AB']


@pytest.mark.parametrize('source, shared', (
    (corruption('frost', 1), {'frost'}), (T.affine, {'rotation', 'zoom'}),
    (T.photometric, {'saturation', 'hue'}), (T.fast_pipeline(), {'erasing'}),
    ((pool, [T.gamma, T.from_torchvision(v2.RandomEqualize())]), {'equalize'}),
    (attacked(pgd, nets[1], Linf(1/255), 'B'), {'pgd Linf on B'}), (on(one_pixel, L0(1)), {'one_pixel L0'}),
    ([U.block_shuffle], {'block_shuffle'})))
def test_a_source_that_trains_for_the_unseen_is_found(source, shared):
    assert U.overlap(U.seen_families(A) | dict(mine=source), U.unseen_families(B)) == shared


def test_published_sets_and_baselines_can_all_be_looked_into():
    "And are not all free of what is called unseen"
    unseen = U.unseen_families(B)
    shared = {k: U.overlap(published_mixture(k, A)['sources'], unseen)
              for k in ('clean', 'noise', 'lyx3911', 'kanra', 'second', 'yoyo', 'hncszyq', 'tenth', 'ciki000',
                        'lz_ch')}
    shared |= {k: U.overlap(baseline_mixture(k, fractals(2))['sources'], unseen) for k in baseline_names}
    assert {k for k, v in shared.items() if not v} == {
        'clean', 'noise', 'second', 'smoothed', 'pixmix', 'cutmix'}
    assert shared['kanra'] == {'glass_blur', 'zoom_blur', 'frost', 'elastic'}


def test_blocks_by_hand():
    x = torch.arange(2*3*4*6).view(2, 3, 4, 6).float()
    out = U.block_shuffle(x, None, seeded(), size=2)[0]
    def blocks(image):
        return {tuple(image[:, i:i+2, j:j+2].flatten().tolist()) for i in (0, 2) for j in (0, 2, 4)}
    for a, b in zip(x, out):
        assert blocks(a) == blocks(b)
    assert (out != x).any()
    many = torch.arange(4.).view(1, 1, 2, 2).expand(4000, 1, 2, 2)
    places = U.block_shuffle(many, None, seeded(), size=1)[0].flatten(1)
    assert len({tuple(o) for o in places.tolist()}) == 24, 'every order is possible'
    assert abs((places[:, 0] == 0).double().mean() - .25) < .03
    for size in (0, 4, 3):
        with pytest.raises(ValueError, match='`size`'):
            U.block_shuffle(x, None, seeded(), size=size)


def test_webp_keeps_the_form_and_loses_detail():
    x = torch.rand(3, 3, 16, 16, generator=seeded())
    y = torch.eye(3)
    worse = U.webp(x, y)[0]
    flat = torch.full_like(x, .5)
    assert worse.shape == x.shape
    assert (worse - x).abs().mean() > .05
    assert (U.webp(flat, y)[0] - flat).abs().max() <= 3/255
    assert U.webp(x[:, :1], y)[0].shape == (3, 1, 16, 16)
    assert U.webp(x, y)[1] is y


@pytest.fixture(scope='module')
def hidden(): return U.held_out_set(photographs, A, B, 150, effort=.05)


def test_every_family_has_as_many_images_and_slices(hidden):
    families = {**dict.fromkeys(U.seen_families(A), 'seen'), **dict.fromkeys(U.unseen_families(B), 'unseen'),
                'clean': 'clean'}
    rows = hidden.rows
    assert rows.groupby('family').size().to_dict() == dict.fromkeys(families, 150//len(families))
    assert (rows.kind == rows.family.map(families)).all()
    parts = pd.crosstab(rows.family, rows['slice'])
    assert parts[['public_a', 'public_b']].isin((2, 3)).all(axis=None)
    assert parts.final.isin((4, 5, 6)).all()
    clean = hidden[(rows.kind == 'clean').to_numpy()]
    assert (clean.images == photographs.images[clean.rows.image]).all()
    changed = (hidden.images != photographs.images[rows.image]).any((1, 2, 3))
    assert changed[(rows.family == 'blocks').to_numpy()].all()
    assert (hidden.y == photographs.y[rows.image]).all()


def test_the_seed_alone_decides(hidden):
    again = U.held_out_set(photographs, A, B, 150, effort=.05)
    other = U.held_out_set(photographs, A, B, 150, seed=1, effort=.05)
    assert (again.images == hidden.images).all()
    assert again.rows.equals(hidden.rows)
    assert (other.images != hidden.images).any()


@pytest.mark.parametrize('others', (A, dict(C=nets[0])))
def test_networks_of_others_are_other_networks(others):
    with pytest.raises(ValueError, match='`others` must be other networks'):
        U.held_out_set(photographs, A, others, 30)
    with pytest.raises(ValueError, match='`models`'):
        U.held_out_set(photographs, {}, B, 30)
    with pytest.raises(ValueError, match='`effort`'):
        U.unseen_families(B, 0)
