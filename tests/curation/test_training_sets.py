"Training sets are built, cut, saved and read: by hand on images small enough to check"
from functools import partial

import numpy as np
import pytest
import torch

from helpers_curation import marking, nets, pool, probabilities, seeded
from robustnb.attacks.gradient import fgsm
from robustnb.attacks.threat_models import Linf
from robustnb.curation.selection import everything, misclassified
from robustnb.curation.training_sets import (
    attacked, build_training_set, concatenate_sets, load_training_set, set_card, summary, unchanged)
from robustnb.data import ImageSet


@pytest.mark.parametrize('proportions, quotas',
                         ((dict(a=.5, b=.5), (10, 10)), (dict(a=1/3, b=2/3), (7, 13)),
                          (dict(a=.025, b=.975), (1, 19)), (dict(b=1., a=0), (0, 20))))
def test_proportions_become_whole_numbers(proportions, quotas):
    made = build_training_set(pool, dict(a=marking(1), b=marking(2)), proportions, 20)
    assert tuple((made.rows.source == k).sum() for k in 'ab') == quotas
    assert tuple((made.images[:, 0, 0, 0] == k).sum() for k in (1, 2)) == quotas


def test_images_labels_and_rows_stay_together():
    half = lambda x, y, generator: (x, .5*y + .5/3)
    made = build_training_set(pool, dict(clean=unchanged, soft=half), dict(clean=.5, soft=.5), 90)
    clean = (made.rows.source == 'clean').to_numpy()
    assert (made.images == pool.images[made.rows['image']]).all()
    assert (made.y == pool.y[made.rows['image']]).all()
    assert np.allclose(made.labels.max(1), np.where(clean, 1, 2/3))
    assert (np.diff(clean.astype(int)) != 0).sum() > 20
    assert made.rows['image'][clean].value_counts().max() == 1
    assert np.bincount(made.y[clean]).tolist() == [15]*3


@pytest.mark.parametrize('seed', (3, 5, 7))
def test_every_beginning_is_balanced(seed):
    made = build_training_set(pool, dict(clean=unchanged), dict(clean=1), 46, seed=seed)
    assert np.bincount(made.y).max() == 16


def test_a_small_pool_is_gone_through_again():
    made = build_training_set(pool[:30], dict(clean=unchanged), dict(clean=1), 75)
    assert made.rows['image'].value_counts().isin((2, 3)).all()
    assert len(made) == 75


@pytest.mark.parametrize('candidates, images, versions',
                         ((1, 12, 1), (2, 12, 2), (3, 12, 3), (6, 24, 3)))
def test_versions_take_turns_or_are_all_made(candidates, images, versions):
    seen = []
    def look(x, labels, rows, n, generator):
        seen.append(rows)
        return np.arange(n)
    build_training_set(pool, dict(a=[marking(k) for k in (1, 2, 3)]), dict(a=1), 12,
                       select=look, candidates=candidates)
    rows = seen[0]
    each = rows.groupby('image')['transform'].nunique()
    assert len(rows) == 12*candidates
    assert rows['image'].nunique() == images
    assert (each == versions).all()
    assert rows['transform'].value_counts().nunique() == 1
    assert rows['transform'].nunique() == 3


def test_sources_with_their_own_pool_and_history():
    other = ImageSet(255-pool.images[:20], pool.labels[:20], 3)
    sources = dict(a=unchanged, b=(other, unchanged),
                   c=attacked(fgsm, nets[0], Linf(8/255), 'corner'))
    made = build_training_set(pool, sources, dict(a=.4, b=.2, c=.4), 50)
    b, c = ((made.rows.source == k).to_numpy() for k in 'bc')
    assert (made.images[b] == other.images[made.rows['image'][b]]).all()
    assert (made.rows.surrogate[b] == '').all()
    assert made.rows.success[b].isna().all()
    fooled = probabilities(made.images[c]).argmax(1) != made.y[c]
    assert (made.rows.surrogate[c] == 'corner').all()
    assert (made.rows.success[c].astype(bool) == fooled).all()
    assert made.rows['transform'][c].iloc[0].startswith('attacked(fgsm, corner, Linf(eps=0.03')
    change = abs(made.images[c].astype(int)-pool.images[made.rows['image'][c]])
    assert change.max() == 8


def test_labels_attacked_are_the_likeliest():
    seen = []
    def attack(model, x, y, threat, generator=None):
        seen.append(y)
        return x
    labels = torch.tensor([[.2, .5, .3], [.6, .2, .2]])
    attacked(attack, nets[0], Linf(.1))(torch.rand(2, 3, 8, 8), labels, seeded())
    assert seen[0].tolist() == [1, 0]


@pytest.mark.parametrize('change, words', (
    (dict(proportions=dict(clean=.9)), 'must sum to 1; got 0.9'),
    (dict(proportions=dict(clean=.5, other=.5)), "'other' is none of clean"),
    (dict(proportions=dict(clean=float('nan'))), r'numbers in \[0, 1\]'),
    (dict(proportions=dict(clean=1.2)), r'numbers in \[0, 1\]'),
    (dict(sources=dict(clean=[])), "'clean' must hold at least one transform"),
    (dict(sources=dict(clean=(pool, []))), 'at least one transform'),
    (dict(n=50_001), '50,000'), (dict(n=0), 'between 1'),
    (dict(select=dict(nobody=everything)), '`select` must name sources'),
    (dict(candidates=dict(clean=0)), '`candidates` must be at least 1'),
    (dict(sources=dict(clean=lambda x, y, g: (x+1, y))),
     "source 'clean' failed: `x` must hold pixels"),
    (dict(select=partial(misclassified, models=nets, by=all),
          sources=dict(clean=lambda x, y, g: (x*0, torch.eye(3)[y.argmax(1)*0]))),
     "source 'clean' must give 30 images; misclassified.* lets 0 of 30"),
    (dict(sources=dict(clean=lambda x, y, g: (x, y-1))), '`labels` must be rows of probabilities')))
def test_plans_that_cannot_be_built(change, words):
    with pytest.raises(ValueError, match=words):
        build_training_set(**dict(pool=pool, sources=dict(clean=unchanged),
                                  proportions=dict(clean=1.), n=30) | change)


@pytest.fixture
def fooled():
    sources = dict(clean=unchanged, fooled=attacked(fgsm, nets[0], Linf(.2)))
    return build_training_set(pool, sources, dict(clean=.5, fooled=.5), 40)


def test_sets_can_be_cut(fooled):
    for cut in (slice(5, 9), np.array([3, 1, 7]), fooled.y == 2):
        part = fooled[cut]
        at = np.arange(40)[cut]
        assert (part.images == fooled.images[at]).all()
        assert part.rows['image'].tolist() == fooled.rows['image'].iloc[at].tolist()
        assert part.rows.index.tolist() == [*range(len(at))]


def test_sets_are_read_as_they_were_saved(fooled, tmp_path):
    again = load_training_set(fooled.save(tmp_path/'set'))
    success = lambda data: data.rows.success.fillna('').astype(str).tolist()
    assert (again.images == fooled.images).all()
    assert again.rows.surrogate.tolist() == fooled.rows.surrogate.tolist()
    assert success(again) == success(fooled)
    table = summary(again)
    successes = fooled.rows.success[fooled.rows.source == 'fooled']
    assert table.attack_success['fooled'] == successes.mean()
    assert np.isnan(table.attack_success['clean'])
    assert table.fraction.to_dict() == dict(clean=.5, fooled=.5)


def test_a_card_shows_text_as_text(fooled, tmp_path):
    page = set_card(fooled, tmp_path/'card.html', 'A <b> set').read_text()
    assert 'A &lt;b&gt; set' in page
    assert '<b> set' not in page
    assert 'attacked(fgsm' in page


def test_nothing_is_written_where_one_file_cannot_be(tmp_path, monkeypatch):
    made = build_training_set(pool, dict(clean=unchanged), dict(clean=1.), 10)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', full)
    with pytest.raises(OSError, match='No space left'):
        made.save(tmp_path/'set')
    assert not [*(tmp_path/'set').glob('*')]


def test_sets_are_concatenated_in_order():
    parts = [build_training_set(pool, {k: marking(i)}, {k: 1.}, 20) for i, k in enumerate('ab')]
    both = concatenate_sets(parts)
    assert len(both) == 40
    assert (both.images[20:] == parts[1].images).all()
    assert both.rows.source.tolist() == ['a']*20 + ['b']*20
    with pytest.raises(ValueError, match='at least one'):
        concatenate_sets([])
