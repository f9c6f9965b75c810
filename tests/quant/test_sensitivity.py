"The change of the answers: what is no pair of logits is refused (values are checked on the page)"
import pytest
import torch

from robustnb.quant.sensitivity import layer_sensitivity, noise_ratio, output_change


@pytest.mark.parametrize('before, after', ((torch.zeros(3, 2), torch.zeros(4, 2)),
                                           (torch.zeros(3), torch.zeros(3))))
def test_logits_of_other_images_are_refused(before, after):
    with pytest.raises(ValueError, match='must be logits .* of the same images'):
        output_change(before, after)


def test_noise_is_counted_over_the_variance_and_a_constant_signal_divides_nothing():
    a = torch.tensor([1., 3.])
    assert noise_ratio(a, a+2) == 4
    assert noise_ratio(a, a) == 0
    assert noise_ratio(torch.ones(3), torch.ones(3)) == 0


def test_images_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r'pixels in \[0, 1\]'):
        layer_sensitivity(None, None, torch.full((1, 3, 8, 8), 2.))
