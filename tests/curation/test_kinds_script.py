"What the benchmark of kinds keeps is found again only where the numbers behind it are the same"
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers_curation import nets, pool
from robustnb.curation.training_sets import build_training_set, unchanged

folder = Path(__file__).parents[2]/'benchmarks'/'curation'


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, 'training_sets', raising=False)
    spec = importlib.util.spec_from_file_location('kinds_script', folder/'kinds.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop('training_sets', None)


@pytest.mark.parametrize('change', (
    dict(candidates={'mixed': (dict(clean=1.), .5)}), dict(candidates={'mixed': (dict(noise=1.), 0.)}),
    dict(rows=8), dict(photographs=60), dict(width=.25), dict(epochs=3), dict(effort=.5)))
def test_a_changed_plan_is_built_anew(script, change, tmp_path, monkeypatch):
    built = []
    def build(pool, **plan):
        built.append(plan['n'])
        return build_training_set(pool, dict(clean=unchanged), dict(clean=1.), 9)
    for name, value in dict(drawn=lambda *_: pool, builders=lambda *_: dict(a=nets[0]),
                            teachers=lambda *_: nets, build_training_set=build,
                            candidates={'mixed': (dict(clean=1.), 0.)}).items():
        monkeypatch.setattr(script, name, value)
    args = SimpleNamespace(data=None, work=tmp_path, bf16=False)
    for _ in range(2):
        script.sets_of(args, ['mixed', 'clean'])
    assert len(built) == 2
    for name, value in change.items():
        monkeypatch.setattr(script, name, value)
    script.sets_of(args, ['mixed'])
    assert len(built) == 3, 'the old set would pass for the new one'
    monkeypatch.undo()


def test_a_network_of_other_numbers_is_trained_anew(script, tmp_path, monkeypatch):
    trained = []
    def train(net, images, labels, config, seed, checkpoint):
        trained.append((len(images), config['epochs']))
        checkpoint.write_text('')
        return net, None
    monkeypatch.setattr(script, 'contest_train', train)
    monkeypatch.setattr(script, 'width', .05)
    args = SimpleNamespace(work=tmp_path, bf16=False)
    for photographs in (pool, pool, pool[:60]):
        script.builders(args, photographs)
    monkeypatch.setattr(script, 'photographs', 60)
    script.builders(args, pool[:60])
    assert trained == [(90, 30)]*2 + [(60, 30)]*4
