"Files of adversarial images, classes and curves: judged by hand, refused where they are not what they say."
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.attacks.gradient import fgsm, pgd
from robustnb.attacks.standard import CascadeResult
from robustnb.attacks.threat_models import Linf
from robustnb.contract import count_passes
from robustnb.core import make_generator
from robustnb.evaluation.publishing import (
    accuracy_by_passes, check_adversarial, craft_adversarial, per_class, save_adversarial)
from robustnb.evaluation.robust_accuracy import evaluate

threat = Linf(.1)


class Bright(nn.Module):
    "Class 1 is bright, class 0 dark"
    def forward(self, x):
        light = x.flatten(1).mean(1)-.5
        return torch.stack([-light, light], 1)


def case():
    "Ten grey images: two wrong from the start, three more wrong where they are darkened"
    light = torch.tensor([.4, .45, .55, .56, .57, .7, .8, .9, .95, .62])
    x = light.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Bright().eval(), x, torch.ones(10, dtype=torch.int64), (x-.1).clamp(0, 1)


def test_a_file_proves_what_was_counted_by_hand(tmp_path):
    net, x, y, x_adv = case()
    told = save_adversarial(tmp_path/'a.pt', net, x, y, x_adv, threat)
    assert (told['n'], told['threat']) == (10, 'Linf(eps=0.1)')
    assert told['clean_accuracy'] == pytest.approx(.8)
    assert told['robust_accuracy'] == pytest.approx(.5)
    assert told['largest_distance'] == pytest.approx(.1, abs=1e-6)
    held = torch.load(tmp_path/'a.pt', weights_only=True)
    assert list(held) == ['adv_complete']
    assert torch.equal(held['adv_complete'], x_adv)
    torch.save(x_adv, tmp_path/'alone.pt')
    assert check_adversarial(tmp_path/'alone.pt', net, x, y, threat) == told


def test_an_image_wrong_from_the_start_is_not_robust_whatever_the_file_holds(tmp_path):
    net, x, y, _ = case()
    told = save_adversarial(tmp_path/'a.pt', net, x, y, (x+.1).clamp(0, 1), threat)
    assert told['robust_accuracy'] == pytest.approx(.8), 'brightened until it is right'


@pytest.mark.parametrize('change, words', (
    (lambda x: x-.12, 'are outside, the first is image 0'), (lambda x: x[:9], 'one image for each'),
    (lambda x: x.flip(0), 'are outside'), (lambda x: x.numpy(), 'got ndarray'),
    (lambda x: (255*x).byte(), 'must hold floats in .0, 1.; got torch.uint8, which may be divided by 255'),
    (lambda x: x*torch.nan, 'must hold floats in .0, 1.; got NaN')))
def test_other_images_are_refused_and_nothing_is_written(tmp_path, change, words):
    net, x, y, _ = case()
    with pytest.raises(ValueError, match=words):
        save_adversarial(tmp_path/'a.pt', net, x, y, change(x), threat)
    assert not list(tmp_path.iterdir())


def test_files_of_something_else_are_named(tmp_path):
    net, x, y, x_adv = case()
    torch.save(dict(images=x_adv), tmp_path/'a.pt')
    with pytest.raises(ValueError, match="'adv_complete'; .*a.pt has .'images'"):
        check_adversarial(tmp_path/'a.pt', net, x, y, threat)
    save_adversarial(tmp_path/'b.pt', net, x, y, x_adv, threat)
    (tmp_path/'b.pt').write_bytes((tmp_path/'b.pt').read_bytes()[:-200])
    with pytest.raises(ValueError, match='damaged'):
        check_adversarial(tmp_path/'b.pt', net, x, y, threat)


def test_classes_are_counted_by_hand():
    labels = [0, 0, 0, 2, 2]
    rows = pd.DataFrame(dict(image=2*list(range(5)), attack=5*['clean']+5*['a'], label=2*labels,
                             correct=[True, True, False, True, True, True, False, True, False, False]))
    table = per_class(rows.sample(frac=1, random_state=0))
    assert table.label.tolist() == [0, 2]
    assert table.n.tolist() == [3, 2]
    assert table.clean_accuracy.tolist() == pytest.approx([2/3, 1])
    assert table.robust_accuracy.tolist() == pytest.approx([1/3, 0]), 'wrong when clean is never robust'
    assert ((table.lo <= table.robust_accuracy) & (table.robust_accuracy <= table.hi)).all()


def test_the_curve_sums_stages():
    stages = pd.DataFrame(dict(stage=['clean', 'quick', 'long'], asked=[4, 3, 2], fallen=[1, 1, 1],
                               forward=[4, 12, 20], backward=[0, 10, 20]))
    survives = torch.tensor([True, False, False, False])
    result = CascadeResult(torch.zeros(4, 1, 2, 2), survives, stages, False, False)
    curve = accuracy_by_passes(result)
    assert curve.stage.tolist() == ['clean', 'quick', 'long']
    assert curve.passes.tolist() == [1, 6.5, 16.5]
    assert curve.backward.tolist() == [0, 2.5, 7.5]
    assert curve.accuracy.tolist() == [.75, .5, .25]


def test_a_run_in_parts_goes_on_where_it_was_killed(tmp_path):
    net, x, y, _ = case()
    def run(): return craft_adversarial(net, x, y, pgd, threat, tmp_path/'parts', part=4)
    whole = run()
    kept = {o: o.stat().st_mtime_ns for o in sorted((tmp_path/'parts').glob('*.pt'))}
    assert [o.name for o in kept] == ['0000000.pt', '0000004.pt', '0000008.pt']
    (tmp_path/'parts'/'0000004.pt').unlink()
    with count_passes() as passes:
        assert torch.equal(run(), whole)
    assert 0 < passes.backward <= 25*4, 'four images, at most 25 steps each'
    assert (tmp_path/'parts'/'0000008.pt').stat().st_mtime_ns == kept[tmp_path/'parts'/'0000008.pt']


@pytest.mark.parametrize('differ', [dict(part=5), dict(seed=1), dict(attack=fgsm), dict(threat=Linf(.2))])
def test_parts_of_another_question_are_refused(tmp_path, differ):
    net, x, y, _ = case()
    same = dict(attack=pgd, threat=threat, part=4, seed=0)
    craft_adversarial(net, x, y, save=tmp_path/'parts', **same)
    name = {"attack": "attacks"}.get(*differ, *differ)
    with pytest.raises(ValueError, match=f"of another question: {name}"):
        craft_adversarial(net, x, y, save=tmp_path/'parts', **same | differ)


def test_a_damaged_part_is_named(tmp_path):
    net, x, y, _ = case()
    craft_adversarial(net, x, y, pgd, threat, tmp_path/'parts', part=4)
    (tmp_path/'parts'/'0000004.pt').write_bytes(b'PK broken')
    with pytest.raises(ValueError, match='0000004.pt'):
        craft_adversarial(net, x, y, pgd, threat, tmp_path/'parts', part=4)


def test_a_part_has_images(tmp_path):
    net, x, y, _ = case()
    for part, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=f'`part` must be a whole number, at least 1; got {part}'):
            craft_adversarial(net, x, y, pgd, threat, tmp_path/'parts', part=part)
    assert not (tmp_path/'parts').exists()


def beyond(model, x, y, threat, *, generator=None): return (x + 2*threat.eps).clamp(0, 1)


def nothing(model, x, y, threat, *, generator=None): return None


@pytest.mark.parametrize('attack, words', [(beyond, 'left its threat model'), (nothing, 'got NoneType')])
def test_what_an_attack_may_not_return_is_not_kept(tmp_path, attack, words):
    net, x, y, _ = case()
    with pytest.raises(ValueError, match=words):
        craft_adversarial(net, x, y, attack, threat, tmp_path/'parts', part=4)
    assert not [*(tmp_path/'parts').glob('*.pt')]


def test_each_part_has_random_starts_of_its_own(tmp_path):
    net, x, y, _ = case()
    drawn = []
    def drawing(model, x, y, threat, *, generator=None):
        drawn.append(torch.rand(1, generator=generator).item())
        return x
    craft_adversarial(net, x, y, drawing, threat, tmp_path/'parts', part=4)
    assert len({*drawn}) == 3


def asking(model, x, y, threat, *, generator=None):
    assert model(x).shape == (len(x), 2)
    return x


def test_an_attack_is_given_a_model_that_returns_logits(tmp_path):
    net, x, y, _ = case()
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x): return dict(logits=self.net(x))
    assert torch.equal(craft_adversarial(Told().eval(), x, y, asking, threat, tmp_path/'parts'), x)


def test_a_run_in_parts_is_no_run_of_evaluate(tmp_path):
    net, x, y, _ = case()
    craft_adversarial(net, x, y, pgd, threat, tmp_path/'parts')
    with pytest.raises(ValueError, match='of another question: part differ'):
        evaluate(net, x, y, dict(attack=pgd), threat, save=tmp_path/'parts')


def test_logits_that_are_no_numbers_prove_nothing(tmp_path):
    net, x, y, _ = case()
    class Broken(nn.Module):
        def forward(self, x): return net(x) + torch.where(x.amax((1, 2, 3)) > 1-1e-6, torch.nan, 0.)[:, None]
    x = x.clamp_max(.95)
    y = net(x).argmax(1)
    x_adv = x.clone()
    x_adv[:, 0, 0, 0] = 1.
    told = save_adversarial(tmp_path/'a.pt', Broken().eval(), x, y, x_adv, Linf(1.))
    assert 0 < y.sum() < len(y)
    assert told['clean_accuracy'] == 1 and told['robust_accuracy'] == 0


def test_crafting_leaves_the_images_of_the_caller(tmp_path):
    net, x, y, _ = case()
    before = x.clone()
    def darken(model, x, y, threat, *, generator=None): return x.sub_(.2).clamp_(0, 1)
    with pytest.raises(ValueError, match="attack 'attack' left its threat model"):
        craft_adversarial(net, x, y, darken, threat, tmp_path/'run')
    assert x.equal(before) and not any((tmp_path/'run').glob('*.pt'))


def test_a_network_that_answers_at_random_proves_nothing(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        def forward(self, x): return self.net(x) + torch.randn(len(x), 4)
    x = torch.rand(6, 3, 4, 4, generator=make_generator(0))
    torch.save(x, tmp_path/'adv.pt')
    for ask in (check_adversarial, lambda path, *a: save_adversarial(path, *a[:3], x, a[3])):
        with pytest.raises(ValueError, match='answers are random'):
            ask(tmp_path/'adv.pt', Noisy().eval(), x, torch.zeros(6).long(), Linf(8/255))
