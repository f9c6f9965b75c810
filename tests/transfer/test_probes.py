import pytest, torch
from torch import nn

from robustnb.contract import predict
from robustnb.core import make_generator
from robustnb.files import load_state, save_state
from robustnb.models.zoo import build_model
from robustnb.transfer.crops import foreseen_leads, leads, natural_crops
from robustnb.transfer.generator import bn_distance, bn_inputs
from robustnb.transfer.probes import load_crops, Probes, save_crops


@pytest.fixture(scope='module')
def net(): return build_model('AlexNet_BN', 10, .0625, seed=0)


@pytest.fixture(scope='module')
def cut(net): return Probes.crops(net, seed=2)


def images(n): return torch.rand(n, 3, 32, 32, generator=make_generator(0, 'images'))


def test_crops_are_pictures_of_8_bits(cut):
    assert torch.equal(cut.natural, natural_crops(200, 32, seed=2))
    assert cut.x is cut.moved and not cut.real
    assert torch.equal((255*cut.moved).round()/255, cut.moved)
    assert (cut.moved - cut.natural).abs().max() > .01
    assert set(cut.facts) == {'clip_rate', 'lead_ratio', 'unusual_before', 'unusual'}
    assert cut.facts['unusual'] < cut.facts['unusual_before']


def test_what_is_known_of_crops_by_hand(net, cut):
    answers, moved = predict(net, cut.natural), predict(net, cut.moved)
    ends = ((255*cut.moved).round().long() % 255 == 0).double().mean().item()
    assert cut.facts['clip_rate'] == pytest.approx(ends) and ends > 0
    ratio = leads(moved).mean()/foreseen_leads(answers).mean()
    assert cut.facts['lead_ratio'] == pytest.approx(ratio.item())
    for name, x in (('unusual_before', cut.natural), ('unusual', cut.moved)):
        with bn_inputs(net) as seen: net(x[:100])
        assert cut.facts[name] == pytest.approx(bn_distance(seen).item(), rel=1e-5)


def test_few_photographs_are_read_beside_crops_and_many_alone(net, cut):
    few = Probes.of(images(5), model=net, seed=2)
    assert few.real and torch.equal(few.moved, cut.moved) and few.words.startswith('5 unlabelled')
    for many in (Probes.of(images(200), model=net), Probes.of(images(5))):
        assert many.real and many.natural is None and many.facts == {}


def test_crops_come_back_from_their_file(cut, tmp_path):
    save_crops(cut, tmp_path/'crops.pt')
    again = load_crops(tmp_path/'crops.pt')
    assert torch.equal(again.moved, cut.moved) and torch.equal(again.natural, cut.natural)
    assert (again.facts, again.words, again.real) == (cut.facts, cut.words, False)


@pytest.mark.parametrize('change', (
    dict(format='other'), dict(words=3), dict(facts=torch.ones(2)), dict(moved=torch.ones(2)),
    dict(natural=torch.zeros(1, 8, 8, 3, dtype=torch.uint8))))
def test_a_file_of_something_else_is_named(cut, tmp_path, change):
    path = tmp_path/'crops.pt'
    save_crops(cut, path)
    save_state(load_state(path) | change, path)
    with pytest.raises(ValueError, match='crops.pt'): load_crops(path)


def test_photographs_are_not_kept_as_crops(tmp_path):
    with pytest.raises(ValueError, match='must be those of `Probes.crops`; got 3 unlabelled'):
        save_crops(Probes.of(images(3)), tmp_path/'x.pt')
    assert not (tmp_path/'x.pt').exists()


def test_fewer_crops_are_cut_of_large_images():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(4, 5)).eval()
    assert [len(Probes.crops(net, o).natural) for o in (16, 65)] == [200, 50]
