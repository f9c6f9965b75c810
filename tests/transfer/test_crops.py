import numpy as np, pytest, torch
from scipy.stats import gamma
from torch import nn

from robustnb.contract import predict
from robustnb.core import make_generator
from robustnb.transfer import crops as C
from robustnb.transfer.crops import foreseen_leads, lead_dispersion, leads, move_crops, natural_crops
from robustnb.transfer.generator import bn_distance, bn_inputs


def test_a_crop_is_a_piece_of_its_photograph():
    ramp = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None], (80, 120, 3))
    x = natural_crops(40, 20, photographs=[ramp])[:, 0, 0]
    steps = x.diff(dim=1)
    # a ramp stays a ramp, mirrored in about half of the crops; its slope is the scale of the crop
    assert (steps.sign().sum(1).abs() == 19).all()
    assert 8 <= (steps.mean(1) < 0).sum() <= 32
    scale = 255*steps.mean(1).abs()
    assert scale.min() > .95 and scale.max() <= 80/20 + .1 and scale.max() > 2.5
    # sides from 20 to 80 pixels, evenly on a logarithmic scale
    assert .3 < (scale < 2).double().mean() < .7


def test_pixels_of_a_smaller_crop_are_means():
    "So that an edge does not ring, as it does where a crop is enlarged"
    edge = np.full((64, 64, 3), 100, np.uint8)
    edge[:, 32:] = 200
    smaller = 255*natural_crops(30, 16, photographs=[edge])
    assert 99.9 < smaller.min() and smaller.max() < 200.1
    assert (255*natural_crops(30, 80, photographs=[edge])).max() > 201


def test_small_photographs_are_enlarged():
    assert natural_crops(3, 64, photographs=[np.zeros((10, 12, 3), np.uint8)]).shape == (3, 3, 64, 64)


def test_photographs_take_turns():
    flat = [np.full((40, 40, 3), v, np.uint8) for v in (0, 255)]
    assert natural_crops(5, 8, photographs=flat).mean((1, 2, 3)).tolist() == [0, 1, 0, 1, 0]


def test_grey_is_the_mean_of_the_colours():
    assert torch.equal(natural_crops(4, 16, 1), natural_crops(4, 16).mean(1, keepdim=True))


def test_a_photograph_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(C, '_bundled', dict(sklearn=('datasets/images', 'nowhere.jpg')))
    C.bundled_photographs.cache_clear()
    with pytest.raises(FileNotFoundError, match='nowhere.jpg.*installed sklearn'): natural_crops(1, 8)
    C.bundled_photographs.cache_clear()


def test_foreseen_leads_are_quantiles_of_a_gamma_law():
    logits = torch.randn(60, 10, generator=make_generator(0, 'g'))
    mean = C.typical_growth*leads(logits).mean().item()
    wanted = gamma.ppf((np.arange(7)+.5)/7, mean/C.lead_scale, scale=C.lead_scale)
    assert np.allclose(foreseen_leads(logits, 7).numpy(), wanted)


def test_leads_by_hand():
    logits = torch.tensor([[3., 1, 2], [0, 0, 0]])
    centred = logits - logits.mean(1, keepdim=True)
    assert torch.allclose(leads(logits), (torch.tensor([1., 0])/centred.std(correction=0)).double())


class Bright(nn.Module):
    "Two classes: bright and dark; no batch norm"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(4.))
    def forward(self, x):
        z = self.w*(x.mean((1, 2, 3)) - .4)
        return torch.stack([z, -z], 1)


def test_without_batch_norm_the_leads_alone_are_sought():
    net = Bright().eval()
    x = natural_crops(24, 16)
    wanted = foreseen_leads(predict(net, x))
    off = lambda z: (leads(predict(net, z)).sort().values - wanted).abs().mean()
    moved = move_crops(net, x)
    assert moved.min() >= 0 and moved.max() <= 1 and (moved - x).abs().max() <= 8*.021
    # a lead in units of all leads keeps its mean; their order is that of the crops
    assert torch.equal(predict(net, moved).argmax(1), predict(net, x).argmax(1))
    assert net.w.requires_grad and net.w.grad is None


def moved_by_hand(net, x, classes, wanted):
    "Eight steps of Adam, the last three shorter, on the distance and a twentieth of the squared lack of lead"
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 9):
        x = x.detach().requires_grad_()
        with bn_inputs(net) as seen: logits = net(x)
        unit = logits.std().item()
        lack = [(row[k] - max(v for i, v in enumerate(row) if i != k))/unit - w
                for row, k, w in zip(logits, classes.tolist(), wanted.tolist())]
        loss = bn_distance(seen) + sum(o**2 for o in lack)/len(x)/20
        grad, = torch.autograd.grad(loss, x)
        first = .9*first + .1*grad
        second = .99*second + .01*grad**2
        way = first/(1-.9**step)/((second/(1-.99**step)).sqrt() + 1e-8)
        x = (x - (.02 if step <= 5 else .006)*way).clamp(0, 1)
    return x.detach()


def test_crops_move_as_by_hand():
    "The clearest crop is to become the clearest image, the next one the next"
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Softplus(), nn.AdaptiveAvgPool2d(2),
                        nn.Flatten(), nn.Linear(24, 4)).double().eval()
    g = make_generator(0, 'net')
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)/p[0].numel()**.5)
        net[-1].weight.mul_(4)
    x = natural_crops(12, 16).double()
    logits = predict(net, x)
    wanted = torch.empty(12, dtype=torch.float64)
    wanted[leads(logits).argsort()] = foreseen_leads(logits)
    moved = move_crops(net, x)
    assert (moved - moved_by_hand(net, x, logits.argmax(1), wanted)).abs().max() < 1e-6
    assert (moved - x).abs().max() > .1


@pytest.mark.parametrize('call, words', [
    (lambda: natural_crops(0, 8), '`n` must be a whole number, at least 1'),
    (lambda: natural_crops(1, 2), '`size`'),
    (lambda: natural_crops(1, 8, 2), '`channels` must be 1 or 3; got 2'),
    (lambda: natural_crops(1, 8, photographs=[]), 'at least one'),
    (lambda: foreseen_leads(torch.randn(4, 3), 0), '`n` must be a whole number, at least 1; got 0')])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize('shape', (1., 4., 12.))
def test_dispersion_of_gamma_leads(shape):
    "One of K logits is drawn and the others are 0: the leads are the draws over their rms times sqrt(K-1)/K"
    first = np.random.default_rng(1).gamma(shape, size=500)
    logits = torch.zeros(500, 7, dtype=torch.float64)
    logits[range(500), np.arange(500) % 7] = torch.from_numpy(first)
    lead = first/((first**2).mean()*6)**.5*7
    ratio, most = lead_dispersion(logits)
    assert ratio == pytest.approx(lead.var()/lead.mean())
    # the delta method for a gamma law, whose variance over the squared mean is one over its shape
    assert most == pytest.approx(ratio*np.exp(1.64*((2 + 3*lead.var()/lead.mean()**2)/500)**.5))
    assert lead_dispersion(9*logits - 4) == pytest.approx((ratio, most))
    assert ratio < most < lead_dispersion(logits[:50])[1]/lead_dispersion(logits[:50])[0]*ratio
    assert lead_dispersion(torch.eye(4))[0] == pytest.approx(0, abs=1e-9), 'all alike'


class Twice(nn.Module):
    "A batch norm that is asked twice, and one that is defined first and comes last"
    def __init__(self):
        super().__init__()
        g = make_generator(3)
        self.last, self.bn, self.line = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for bn in (self.last, self.bn):
            bn.running_mean.copy_(torch.randn(4, generator=g))
            bn.running_var.copy_(torch.rand(4, generator=g) + .5)
    def forward(self, x):
        x = self.bn(self.bn(self.conv(x)))
        return self.line(self.last(x.tanh()).mean((2, 3)))


@pytest.mark.parametrize('size', (3, 10, 99))
def test_parts_have_the_distance_and_the_gradient_of_the_whole(size):
    torch.manual_seed(0)
    net = Twice().eval()
    x = natural_crops(10, 12)
    def seen(size):
        z = x.clone().requires_grad_()
        logits, distance = C._seen_in_parts(net, z, size)
        return logits, distance, torch.autograd.grad(distance + logits.square().mean(), z)[0]
    for a, b in zip(seen(size), seen(10)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    none = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    assert C._seen_in_parts(none, x, size)[1] == 0


def test_large_crops_are_shown_a_few_at_a_time():
    sizes = []
    class Seen(Twice):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)
    net = Seen().eval()
    move_crops(net, natural_crops(12, 256))
    assert max(sizes) == 8 and len(sizes) > 16
    sizes.clear()
    move_crops(net, natural_crops(12, 64))
    assert max(sizes) == 12


@pytest.mark.parametrize('shape', (1., 6.))
def test_the_upper_end_of_the_dispersion_holds_nineteen_times_in_twenty(shape):
    "Of 200 samples that are drawn as above"
    rng = np.random.default_rng(0)
    true = 7/(6*shape*(shape+1))**.5
    held = 0
    for _ in range(200):
        logits = torch.zeros(150, 7, dtype=torch.float64)
        logits[:, 0] = torch.from_numpy(rng.gamma(shape, size=150))
        held += lead_dispersion(logits)[1] >= true
    assert 182 <= held <= 198
