"How answers change: logits of other images are no pair"
import pytest
import torch

from robustnb.quant.sensitivity import output_change


def test_answers_to_other_images_are_refused():
    with pytest.raises(ValueError, match='same images'):
        output_change(torch.zeros(3, 2), torch.zeros(4, 2))
