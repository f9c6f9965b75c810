"Weights in checkpoints: wrappers, twins, what is left over, what is missing"
import argparse
import pytest
import torch
from torch import nn

from robustnb.files import load_state, save_state
from robustnb.models.states import fitting_state


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


net = network()
own = net.state_dict()
twin = network(1).state_dict()


def under(prefix, state=own): return {prefix + k: v for k, v in state.items()}


forms = dict(
    plain=own, list=[3, own], module=dict(model=under('module.')), lightning=dict(state_dict=under('model.')),
    deep=dict(a=dict(b=dict(c=under('x.y.')))), equal=dict(model=own, best=dict(own)),
    inside=under('net.') | {'normalize.mean': torch.ones(3), 'normalize.std': torch.ones(3)},
    counted=own | {'total_ops': torch.ones(1), '0.total_params': torch.ones(1)},
    teacher=under('student.') | {f'teacher.{k}': v for k, v in nn.Linear(9, 9).state_dict().items()},
    averaged=under('module.') | {'n_averaged': torch.tensor(3)},
    parallel_inside={k.replace('0.', '0.module._orig_mod.'): v for k, v in own.items()},
    no_counter={k: v for k, v in own.items() if 'num_batches' not in k},
    half={k: v.half() if v.is_floating_point() else v for k, v in own.items()})


@pytest.mark.parametrize('form', forms)
def test_the_one_that_fits_is_found(form):
    state, stats = fitting_state(forms[form], net, 'w.pt')
    tolerance = 1e-3 if form == 'half' else 0
    assert state.keys() == own.keys()
    assert all(state[k].dtype == v.dtype for k, v in own.items())
    assert all((state[k] - v).abs().max() <= tolerance for k, v in own.items())
    assert stats == (dict(mean=[1.]*3, std=[1.]*3) if form == 'inside' else {})


@pytest.mark.parametrize('held, names', (
    (dict(model=own, ema=twin), ('model', 'ema')),
    (under('net.') | under('net_ema.', twin), ('net', 'net_ema')),
    (dict(state_dict=under('model.') | under('ema_model.module.', twin)), ('state_dict.model', 'ema_model'))))
def test_two_that_fit_are_named(held, names):
    with pytest.raises(ValueError, match='Name one after a #') as e:
        fitting_state(held, net, 'w.pt')
    assert all(o in str(e.value) for o in names)
    chosen = 'state_dict.ema_model' if 'state_dict' in held else names[1]
    assert torch.equal(fitting_state(held, net, 'w.pt', chosen)[0]['3.bias'], twin['3.bias'])


def test_what_does_not_fit_is_said_in_words():
    larger = {**own, '4.weight': torch.ones(2, 2)}
    for held, text in ((larger, '1 unexpected: 4.weight'),
                       ({**own, '3.bias': torch.ones(3)}, r'\(3,\) instead'),
                       (dict(epoch=3), "holds a dict with .'epoch'"), (5, 'holds a int'),
                       (dict(m={k: v for k, v in own.items() if k != '3.bias'}), "'m': 1 missing: 3.bias")):
        with pytest.raises(ValueError, match=text):
            fitting_state(held, net, 'w.pt')


def test_settings_beside_the_weights_are_read_and_code_is_not(tmp_path):
    held = dict(args=argparse.Namespace(lr=.1), model=own)
    torch.save(held, tmp_path/'a.pt')
    assert load_state(tmp_path/'a.pt')['args'].lr == .1
    torch.save(net, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='torch.nn.modules.container.Sequential, which only code'):
        load_state(tmp_path/'a.pt')
    save_state(own, tmp_path/'a.pt')
    assert fitting_state(load_state(tmp_path/'a.pt'), net, 'a.pt')[0].keys() == own.keys()


@pytest.mark.parametrize('other', (torch.int8, torch.uint8, torch.complex64))
def test_weights_of_another_kind_are_refused(other):
    state = {k: v.to(other) if v.ndim > 1 else v for k, v in own.items()}
    said = f'2 other kinds: 0.weight {other} instead of torch.float32, 3.weight'
    with pytest.raises(ValueError, match=said):
        fitting_state(state, net, 'w.pt')
