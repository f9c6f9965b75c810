"A network that may refuse: attacks against a search of the whole ball."
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import (
    cross_entropy, full_pgd, is_correct, loss_and_grad, margin, margin_to, pgd)
from robustnb.attacks.rejection import refused, Rejecting
from robustnb.attacks.standard import run_cascade
from robustnb.attacks.threat_models import Linf
from robustnb.contract import MeanAnswer
from robustnb.core import make_generator
from robustnb.evaluation.publishing import save_adversarial
from robustnb.evaluation.robust_accuracy import evaluate
from robustnb.quant.ptq import quantize

eps = .15


def small_net():
    "Four classes and a refusal, of two pixels"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = nn.Sequential(nn.Flatten(), nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 5)).eval()
    with torch.no_grad():
        net[1].weight.mul_(6)
        net[3].weight.mul_(3)
        net[3].bias[-1] += .5
    return net


@pytest.fixture(scope='module')
def case():
    net = small_net()
    x = torch.rand(80, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    return net, Rejecting(net), x, net(x)[:, :4].argmax(1).detach()


@torch.no_grad()
def stands_everywhere(net, x, y):
    "No point of a fine grid over the ball is answered with a wrong class"
    step = torch.linspace(-eps, eps, 81)
    grid = torch.stack(torch.meshgrid(step, step, indexing='ij'), -1).view(-1, 2, 1, 1)
    found = [net((o + grid).clamp(0, 1)).argmax(1) for o in x]
    return torch.tensor([bool(((a == k) | (a == 4)).all()) for a, k in zip(found, y)])


def test_verdicts_are_those_of_all_logits(case):
    net, model, x, y = case
    wrong_labels = (y + torch.arange(len(y)) % 2) % 4
    said = net(x).argmax(1)
    right = (said == wrong_labels) | (said == 4)
    assert 0 < (said == 4).sum() < len(x)
    assert torch.equal(is_correct(model, x, wrong_labels)[0], right.nonzero().flatten())
    assert torch.equal(refused(model, model(x)), said == 4)


def test_only_a_rejecting_network_refuses():
    assert not refused(nn.Flatten(), torch.zeros(3, 4)).any()


@pytest.mark.parametrize('loss', [margin, cross_entropy])
def test_the_loss_is_that_of_logits_in_which_a_refusal_is_right(case, loss):
    net, model, x, y = case
    value, grad, logits = loss_and_grad(model, x, y, loss)
    for k in range(0, len(x), 9):
        at = x[k:k+1].double().requires_grad_()
        L = small_net().double()(at)[0]
        L = torch.stack([torch.maximum(L[c], L[4]) if c == y[k] else L[c] for c in range(4)])
        by_hand = loss(L[None], y[k:k+1])
        torch.testing.assert_close(value[k].double(), by_hand[0].detach(), rtol=1e-4, atol=1e-5)
        by_hand.backward()
        torch.testing.assert_close(grad[k:k+1].double(), at.grad, rtol=1e-3, atol=1e-4)


def test_a_targeted_loss_has_a_gradient_too(case):
    net, model, x, y = case
    value, grad, _ = loss_and_grad(model, x, torch.stack([y, (y+1) % 4], 1), margin_to)
    assert (grad.flatten(1).norm(dim=1) > 0).all() and (value < 0).all()


class Drawing(nn.Module):
    "Logits that differ a little each time"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        logits = self.net(x)
        return logits + .01*torch.randn_like(logits)


def test_the_gradient_of_the_mean_is_the_mean_of_the_gradients(case):
    net, model, x, y = case
    both = torch.stack([y, (y+1) % 4], 1)     # margin_to is linear in the logits
    drawing = Rejecting(Drawing(net).eval())
    mean = MeanAnswer(drawing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value, grad, logits = loss_and_grad(mean, x, both, margin_to)
        torch.manual_seed(0)
        found = [loss_and_grad(drawing, x, both, margin_to) for _ in range(8)]
    for got, parts in zip((value, grad, logits), zip(*found)):
        torch.testing.assert_close(got, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
    assert refused(model, model(x)).any()
    assert (grad.flatten(1).norm(dim=1) > 0).all()
    plain = MeanAnswer(Drawing(net).eval())
    assert loss_and_grad(plain, x, y, margin)[2].shape == (len(x), 5)


def test_a_random_refusal_is_crossed_too():
    model = Rejecting(Drawing(Line().eval()).eval())
    x = torch.linspace(.47, .5, 8).view(8, 1, 1, 1)
    y = torch.zeros(8, dtype=int)
    seen = run_cascade(model, x, y, Linf(.3))
    assert not seen.survives.any() and not seen.masked
    assert (full_pgd(MeanAnswer(model), x, y, Linf(.3), loss=margin) > .65).all()


def test_the_cascade_finds_what_a_grid_finds(case):
    net, model, x, y = case
    there = stands_everywhere(net, x, y)
    seen = run_cascade(model, x, y, Linf(eps))
    assert 10 < there.sum() < 70
    assert (seen.survives & ~there).sum() <= 1
    assert (there & ~seen.survives).sum() <= 1      # the grid itself has gaps
    said = net(seen.x_adv).argmax(1)
    assert torch.equal(seen.survives, (said == y) | (said == 4))


def test_a_refusal_is_no_success(case):
    "Taken for a class of its own, the refusal would count as one"
    net, model, x, y = case
    as_a_class = run_cascade(net, x, y, Linf(eps)).survives.sum()
    assert run_cascade(model, x, y, Linf(eps)).survives.sum() > as_a_class


def test_rows_of_evaluate_name_the_refusals(case):
    net, model, x, y = case
    rows = evaluate(model, x, y, dict(pgd=pgd), Linf(eps))
    clean = rows[rows.attack == 'clean']
    assert (clean.prediction == net(x).argmax(1).numpy()).all()
    assert clean.correct.all()
    attacked = rows[rows.attack == 'pgd']
    assert (attacked.prediction[~attacked.correct] < 4).all()


def test_a_file_proves_what_the_rows_say(case, tmp_path):
    net, model, x, y = case
    seen = run_cascade(model, x, y, Linf(eps))
    proved = save_adversarial(tmp_path/'adversarial.pt', model, x, y, seen.x_adv, Linf(eps))
    assert proved['clean_accuracy'] == 1
    assert proved['robust_accuracy'] == pytest.approx(seen.robust_accuracy)


def test_two_logits_are_no_classes_with_a_refusal():
    with pytest.raises(ValueError, match='at least two classes beside .* with 2 logits'):
        Rejecting(nn.Flatten().eval())(torch.rand(3, 2, 1, 1))


def test_infinite_logits_refuse_nothing(case):
    model = case[1]
    assert not refused(model, torch.full((2, 4), torch.inf)).any()


def test_in_a_wrapper_it_refuses_all_the_same(case, tmp_path):
    net, model, x, y = case
    wrapped = nn.DataParallel(model)
    assert torch.equal(refused(wrapped, model(x)), net(x).argmax(1) == 4)
    found = [save_adversarial(tmp_path/'adversarial.pt', o, x, y, x, Linf(eps)) for o in (model, wrapped)]
    assert found[0] == found[1] and found[0]['clean_accuracy'] == 1


def test_margins_of_verdicts_are_those_that_attacks_climb(case):
    net, model, x, y = case
    said = net(x).detach()
    by_hand = said[:, :4].clone()
    for row, k, refusal in zip(by_hand, y, said[:, 4]):
        row[k] = max(row[k], refusal)
    torch.testing.assert_close(is_correct(model, x, y)[1], by_hand)
    assert (margin(by_hand, y)[said.argmax(1) == 4] < 0).all()


class Line(nn.Module):
    "Class 0 below .4 and class 1 above .6 of one grey value, never class 2; in the middle a refusal"
    def forward(self, x):
        at = x.flatten(1)[:, :1]
        return torch.cat([.8-2*at, 2*at-1.2, 0*at-5, .1-(at-.5).abs()], 1)


def test_a_wrong_answer_is_kept_rather_than_the_refusal_it_came_from():
    "All three logits of a refusal are equal, a cross-entropy of log 3 that narrow wrong answers do not reach"
    model = Rejecting(Line().eval())
    x = torch.full((1, 1, 1, 1), .5)
    y = torch.tensor([0])
    found = full_pgd(model, x, y, Linf(.12), generator=make_generator(0))
    assert model(found).argmax(1) == 1 and not refused(model, model(found)).any()


def test_images_that_are_refused_do_not_pass_for_masked():
    "Far from the other class, each comes nearer without reaching it"
    model = Rejecting(Line().eval())
    x = torch.linspace(.42, .46, 12).view(12, 1, 1, 1)
    seen = run_cascade(model, x, torch.zeros(12, dtype=int), Linf(.05))
    assert seen.survives.all() and not seen.masked
    assert (seen.x_adv > x).all()


def test_without_a_gradient_there_are_queries(case):
    net, _, x, y = case
    class Steps(nn.Module):
        def forward(self, x): return net(x.detach())
    model = Rejecting(Steps().eval())
    with pytest.raises(ValueError, match='`model` must be differentiable'):
        loss_and_grad(model, x, y, margin)
    assert run_cascade(model, x[:4], y[:4], Linf(eps)).masked


def test_parts_keep_their_modes():
    parts = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2)).train()
    parts[1].eval()
    assert Rejecting(parts).training and parts.training and not parts[1].training


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match='`model` must be a torch.nn.Module .*; got function'):
        Rejecting(lambda x: x)


def test_copies_are_made_of_what_is_inside(case):
    net, model, x, y = case
    with pytest.raises(TypeError, match=r'`Rejecting\(quantize\(net'):
        quantize(model, 'INT8', x)
    copied = Rejecting(quantize(net, 'INT8', x))
    assert (refused(copied, copied(x)) == refused(model, model(x))).float().mean() > .9
