"results/attack_capabilities.csv tells the truth: tried again for attacks that take a moment"
import sys
from functools import partial
from pathlib import Path
import pandas as pd
import pytest
import torch
from robustnb.attacks import gradient, score_based

root = Path(__file__).parent.parent.parent
sys.path.insert(0, str(root/'benchmarks/attacks'))
from capabilities import Blunt, attacks, case, large, rows_of, tried

said = pd.read_csv(root/'results/attack_capabilities.csv')


@pytest.fixture(scope='module')
def small(): return case()


def test_every_attack_has_its_rows():
    assert set(said.attack) == {f.__name__ for _,f in attacks()}
    assert said.groupby('attack').threat.nunique().eq(len(large)).all()


@pytest.mark.parametrize('attack', [gradient.fgsm, gradient.pgd, score_based.random_search])
def test_what_is_said_is_what_is_found(attack, small):
    found = pd.DataFrame(rows_of('x', attack, *small)).drop(columns='module')
    there = said[said.attack == attack.__name__].drop(columns='module').reset_index(drop=True)
    pd.testing.assert_frame_equal(found, there)


@pytest.mark.parametrize('name', ['fgsm', 'mi_fgsm', 'square', 'random_search'])
def test_access(name, small):
    net, x, y = small
    attack = next(f for _,f in attacks() if f.__name__ == name)
    if name == 'square': attack = partial(attack, queries=20)
    refused = tried(attack, Blunt(net).eval(), x, y, large['Linf'])[0] == 'refused'
    assert refused == (said[said.attack == name].access == 'gradient').all()


def test_an_attack_that_leaves_its_threat_is_no_row(small):
    def far(model, x, y, threat, *, generator=None): return torch.ones_like(x)
    with pytest.raises(AssertionError, match='far left'): tried(far, *small, large['L2'])


def test_an_attack_that_finds_nothing_is_not_called_good(small):
    def idle(model, x, y, threat, *, generator=None): return x
    assert tried(idle, *small, large['L2'])[0] == 'found nothing'
