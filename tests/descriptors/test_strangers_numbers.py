"Numbers given as text, names given as numbers, and persons of whom there is only one"
import numpy as np
import pytest
import torch
from torch import nn

from robustnb.descriptors.ridge_students import fit_ridge
from robustnb.descriptors.students import descriptor_model, DescriptorRecipe, train_teacher
from robustnb.descriptors.verification import (
    dodging_rate, false_accept_rate, impersonation_rate, threshold_at, true_accept_rate, verification_table)

d = torch.eye(8)
who = ['a']*4 + ['b']*4
photos = np.arange(4*32*32*3, dtype=np.uint8).reshape(4, 32, 32, 3)


@pytest.mark.parametrize('bad', ['0.6', None, [.6]])
def test_a_threshold_is_a_number(bad):
    asked = [lambda: impersonation_rate(d[:1], ['b'], d, who, bad), lambda: false_accept_rate([.1], bad),
             lambda: dodging_rate(d[:1], ['a'], d, who, bad)]
    if bad is not None: asked.append(lambda: verification_table(d, who, threshold=bad))
    for ask in asked:
        with pytest.raises(ValueError, match='`threshold` must be a distance above 0; got'): ask()
    for ask in (lambda: threshold_at(bad, [.5, .6]), lambda: true_accept_rate([.1], [.5, .6], far=bad)):
        with pytest.raises(ValueError, match='`far` must lie in'): ask()
    with pytest.raises(ValueError, match='`ridge` must be positive'):
        fit_ridge(nn.Flatten(), photos, d[:4], ridge=bad)


def test_thresholds_of_any_kind_of_number():
    for threshold in (1, np.float32(.6), .6):
        assert false_accept_rate([.1, 2.], threshold, most=1) == .5


def test_a_teacher_tells_two_at_least_apart():
    model = descriptor_model('ResNet_18', 8, .125, 32)
    for y, said in ((['a', 'b', 'a', 'b'], 'Names become numbers by'), ([3]*4, 'at least 2 identities')):
        with pytest.raises(ValueError, match=said):
            train_teacher(model, photos, np.array(y), DescriptorRecipe(epochs=1))
