"Networks, images and checks that the tests of several attacks share."
import numpy as np
import torch
from torch import nn

from robustnb.contract import _manners
from robustnb.attacks.gradient import margin
from robustnb.core import make_generator
from robustnb.models.wrapping import Normalized


def make_net(dtype=torch.float64, seed=0, classes=5):
    "A small convolutional classifier with normalisation inside and no flat regions"
    g = make_generator(seed, 'net')
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
                        nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)/p[0].numel()**.5 if p.ndim > 1 else 0*p)
        net[-1].weight.mul_(5)
    return Normalized(net, (.5, .45, .4), (.2, .25, .3)).eval().to(dtype)


def make_batch(dtype=torch.float64, n=12, model=None):
    "Images, some of whose pixels lie on the border of the range, with the model's own answers as labels"
    x = (1.2*torch.rand(n, 3, 8, 8, generator=make_generator(0, 'images'),
                        dtype=torch.float64)-.1).clamp(0, 1).to(dtype)
    y = (model or make_net(dtype))(x).argmax(1)
    assert len(y.unique()) > 2
    return x, y


def iterates(model, attack):
    "What `attack` returns, and every batch it asks the model about after it was opened and checked"
    _manners.pop(model, None)
    asked = []
    hook = model.register_forward_pre_hook(lambda m, args: asked.append(args[0].detach().clone()))
    out = attack(model)
    hook.remove()
    return out, asked[4:]    # three questions to open it, one to check it


def snapshot(model):
    "All of a model that an attack could touch"
    return ([(k, v.clone()) for k, v in model.state_dict().items()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
              len(m._backward_hooks), sorted(vars(m))) for m in model.modules()])


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


class Ten(nn.Module):
    "Not a classifier of these images: its answer is constant"
    def forward(self, x):
        return (0*x).flatten(1).sum(1, keepdim=True) + torch.arange(10., dtype=x.dtype)


wrong_uses = {
    'training mode': (lambda m, x, y: (m.train(), x, y), ValueError, 'Call `model.eval'),
    'one part in training mode': (lambda m, x, y: (m.net[0].train() and m, x, y), ValueError,
                                  'net.0 is in training mode'),
    'no module': (lambda m, x, y: (m.forward, x, y), TypeError, 'must be a torch.nn.Module'),
    'normalised outside': (lambda m, x, y: (m, (x-.5)/.25, y), ValueError, 'the model normalises'),
    'one NaN': (lambda m, x, y: (m, torch.cat([x[:-1], x[-1:]*float('nan')]), y), ValueError,
                'pixels in .0, 1.'),
    'grey levels': (lambda m, x, y: (m, (x*255).byte(), y), TypeError, 'floating point'),
    'no batch': (lambda m, x, y: (m, x[0], y[:1]), ValueError, r'x\[None\]'),
    'an empty batch': (lambda m, x, y: (m, x[:0], y[:0]), ValueError, 'non-empty'),
    'an array': (lambda m, x, y: (m, x.numpy(), y), TypeError, 'torch tensor'),
    'labels of another model': (lambda m, x, y: (m, x, y+4), ValueError,
                                r'class numbers in \[0, 5\)'),
    'a negative label': (lambda m, x, y: (m, x, y-9), ValueError, 'got -'),
    'too few labels': (lambda m, x, y: (m, x, y[:-1]), ValueError, '11 labels for 12 images'),
    'soft labels': (lambda m, x, y: (m, x, torch.eye(5)[y]), TypeError, 'argmax'),
    'labels as floats': (lambda m, x, y: (m, x, y.double()), TypeError, 'int64'),
}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=make_generator(seed, 'rand'), dtype=dtype)
def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=make_generator(seed, 'randn'), dtype=dtype)
def dot(a, b): return (a*b).flatten(1).sum(1)


class Linear(nn.Module):
    "Two classes, whose margin is linear: `w` is its gradient for label 1"
    def __init__(self, w):
        super().__init__()
        self.w = w
    def forward(self, x):
        score = dot(x, self.w)
        return torch.stack([score, -score], 1)/2


def gain(attack, x, w, threat, **options):
    "How far `attack` lifts the margin"
    model = Linear(w).eval()
    y = torch.ones(len(x), dtype=torch.int64)
    found = attack(model, x, y, threat, loss=margin, **options)
    assert threat.allows(x, found).all()
    return (margin(model(found), y) - margin(model(x), y)).detach()


def linear(bias=1000., shape=(3, 6, 6), seed=0):
    "Two classes, far from the border with the default bias; the weights of the margin"
    model = nn.Sequential(nn.Flatten(), nn.Linear(np.prod(shape), 2)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, np.prod(shape),
                                          generator=make_generator(seed, 'weights')))
        model[1].bias.copy_(torch.tensor([bias, 0.]))
    return model, (model[1].weight[1]-model[1].weight[0]).detach().view(shape)


def grey(n=10, shape=(3, 6, 6)):
    return .3 + .4*torch.rand(n, *shape, generator=make_generator(0, 'grey'),
                              dtype=torch.float64), torch.zeros(n, dtype=torch.int64)


def sparse_border(share, seed=0):
    """A linear network, an image and its label; the border is at `share` of the most that L1 of 8 gains: the
    budget spent on the heaviest pixels, each as far as it goes"""
    x = rand(1, 3, 8, 8, seed=seed)
    w = randn(192, seed=seed)**3
    room = torch.where(w > 0, 1-x.flatten(), x.flatten())
    heavy = w.abs().argsort(descending=True)
    spent = room[heavy].cumsum(0).clamp_max(8).diff(prepend=torch.zeros(1))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([0*w, w]))
        net[1].bias.copy_(torch.stack([w@x.flatten() + share*(spent@w.abs()[heavy]), torch.zeros(())]))
    return net, x, torch.zeros(1, dtype=torch.int64)


def counted():
    "A network whose logits are the means of the colours, and how many images it is shown each time"
    asked = []
    class Counted(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return 5*x.mean((2, 3))
    return Counted().eval(), asked
