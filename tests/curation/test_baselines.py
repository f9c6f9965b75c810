"Baselines: as many rows of each photograph, the stated share unchanged"
import numpy as np
import pytest

from helpers_curation import pool
from robustnb.augmentation.mixing import fractals
from robustnb.curation.baselines import baseline_mixture, baseline_names
from robustnb.curation.training_sets import build_training_set

from robustnb.data import ImageSet

photographs = ImageSet(np.random.default_rng(0).integers(0, 256, (90, 32, 32, 3), dtype=np.uint8),
                       np.arange(90) % 3, 3)
pictures = fractals(20)


@pytest.mark.parametrize('name', baseline_names)
def test_photographs_are_used_evenly(name):
    plan = baseline_mixture(name, pictures)
    made = build_training_set(photographs, **plan, n=225)
    assert set(made.rows.image.value_counts()) == {2, 3}
    kept = (made.images == photographs.images[made.rows.image]).all((1, 2, 3)).mean()
    low, high = dict(clean=(1, 1), smoothed=(1, 1), augmix=(0, .1), trivial=(0, .4), auto=(.1, .6),
                     pixmix=(.03, .2), noise=(.4, .6), cutmix=(.4, .6))[name]
    assert low <= kept <= high
    assert (made.y == photographs.y[made.rows.image]).mean() > (.7 if name == 'cutmix' else .999)


def test_labels():
    smooth = build_training_set(pool, **baseline_mixture('smoothed'), n=90).labels
    assert np.allclose(np.sort(smooth, 1), [.05, .05, .9])
    cut = build_training_set(photographs, **baseline_mixture('cutmix'), n=900)
    assert np.allclose(cut.labels.sum(1), 1)
    assert .35 < (cut.labels.max(1) == 1).mean() < .75


def test_half_of_the_rows_get_noise_of_up_to_a_tenth():
    "On grey: the deviations are even over [0, .1], their mean is .05"
    grey = ImageSet(np.full((90, 32, 32, 3), 128, np.uint8), np.arange(90) % 3, 3)
    made = build_training_set(grey, **baseline_mixture('noise'), n=900)
    changed = (made.images != 128).any((1, 2, 3))
    size = (made.images[changed]/255 - 128/255).std((1, 2, 3))
    assert .42 < changed.mean() < .55
    assert .045 < size.mean() < .055 and .095 < size.max() < .105
    cut = build_training_set(photographs, **baseline_mixture('cutmix'), n=900)
    changed = (cut.images != photographs.images[cut.rows.image]).any((1, 2, 3))
    assert .44 < changed.mean() < .54


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match='`name` must be one of clean, smoothed'):
        baseline_mixture('gold')
