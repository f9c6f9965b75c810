"Soft labels by hand: smoothing, mixtures of two images, the opinions of teachers; bad input."
from functools import partial

import pytest
import torch

from robustnb.augmentation.soft_labels import cutmix, label_smoothing, mixup, teacher_labels
from robustnb.core import make_generator

seeded = lambda *a: make_generator(0, *a)
x = torch.rand(40, 3, 16, 20, generator=seeded('x'))
y = torch.eye(10)[torch.arange(40) % 10]


def test_mixtures_by_hand():
    a, b = mixup(x, y, seeded(), alpha=.7)
    for i in range(40):
        first, second = (int(k) for k in torch.cat([
            b[i].nonzero().flatten(), torch.tensor([i % 10, i % 10])])[:2])
        other = first if first != i % 10 else second
        if other == i % 10: continue
        own = b[i, i % 10]
        assert min((a[i] - own*x[i] - (1-own)*x[j]).abs().max() for j in range(40)
                   if j % 10 == other) < 1e-5
    a, b = cutmix(x, y, seeded())
    kept = (a == x).all(1).flatten(1).float().mean(1)
    assert torch.allclose(b[torch.arange(40), torch.arange(40) % 10][b.max(1).values < .999],
                          kept[b.max(1).values < .999], atol=1e-5)


def test_rectangles_have_the_area_drawn():
    many = torch.rand(3000, 1, 32, 32)
    label = torch.eye(3000)
    kept = cutmix(many, label, seeded(), alpha=1000)[1].diagonal()
    side = .5**.5
    # a rectangle around a uniform centre, cut at the borders
    assert abs(1-kept.mean() - (side-side**2/4)**2) < .01


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits
    def forward(self, x): return self.logits.expand(len(x), -1)


def test_teachers_by_hand():
    one = Fixed(torch.tensor([2., 0, 0])).eval()
    two = Fixed(torch.tensor([0., 4, 0])).eval()
    hard = torch.eye(3)[torch.arange(40) % 3]
    said = ((torch.tensor([2., 0, 0])/2).softmax(0) + (torch.tensor([0., 4, 0])/2).softmax(0))/2
    assert torch.allclose(teacher_labels(x, hard, models=[one, two], temperature=2, weight=.75)[1],
                          .75*said + .25*hard)
    agreed = teacher_labels(x, hard, models=one, agree=True)[1]
    assert torch.equal(agreed[1::3], hard[1::3])
    assert (agreed[0::3].max(1).values < 1).all()
    assert torch.equal(teacher_labels(x, hard, models=[one, two], agree=True)[1], hard)
    assert torch.allclose(label_smoothing(x, hard, alpha=.2)[1], .7*hard + .1)


@pytest.mark.parametrize('job, words', (
    (lambda: mixup(x, y, seeded(), alpha=0), '`alpha`'),
    (lambda: cutmix(x, y, seeded(), alpha=float('nan')), '`alpha`'),
    (lambda: label_smoothing(x, y, alpha=1.1), '`alpha`'),
    (lambda: teacher_labels(x, y), '`models`'),
    (lambda: teacher_labels(x, y, models=Fixed(torch.zeros(3)).eval()), 'one logit per class'),
    (lambda: teacher_labels(x, y, models=Fixed(torch.zeros(10)).eval(), temperature=0),
     '`temperature`'),
    (lambda: teacher_labels(x, y, models=Fixed(torch.zeros(10)).eval(), weight=2), '`weight`')))
def test_bad_labels(job, words):
    with pytest.raises(ValueError, match=words):
        job()


@pytest.mark.parametrize('labels', (y.argmax(1), y.argmax(1).float(), y[:39], y.long(), y.tolist(), y[None]))
@pytest.mark.parametrize('transform', (mixup, cutmix, label_smoothing, partial(
    teacher_labels, models=Fixed(torch.zeros(10)).eval())))
def test_labels_must_be_rows(transform, labels):
    with pytest.raises(ValueError, match='`y` must be soft labels, floats .N,K., .* 40 images; got'):
        transform(x, labels, seeded())


@pytest.mark.parametrize('transform', (mixup, cutmix))
def test_portions_need_a_finite_alpha(transform):
    with pytest.raises(ValueError, match='`alpha` must be above 0 and finite; got inf'):
        transform(x, y, seeded(), alpha=float('inf'))
