"A short run of benchmarks/reliability/fuzz.py, and what its judge must call a failure."
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    'fuzz', Path(__file__).parent.parent/'benchmarks/reliability/fuzz.py')
fuzzing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzzing)


@pytest.mark.parametrize('name', fuzzing.readers)
def test_readers_say_what_is_wrong(name):
    row, failures = fuzzing.fuzz(name, 12, seed=2)
    assert not failures
    assert row['read'] + row['refused'] == 12
    assert row['refused'] + (name == 'validate_set') > 0


@pytest.mark.parametrize('error', (KeyError('width'), AttributeError('no shape'),
                                   MemoryError(), RecursionError(), ValueError(''),
                                   ValueError('invalid literal'), SystemExit(1)))
def test_the_judge_is_strict(error, tmp_path):
    def read(path): raise error
    assert fuzzing.attempt(read, tmp_path/'a.pt')[0] == 'failed'


def test_the_judge_lets_good_words_pass(tmp_path):
    def read(path): raise ValueError(f'{path} is damaged')
    def argue(path): raise TypeError('`path` must be a file')
    assert [fuzzing.attempt(f, tmp_path/'a.pt')[0] for f in (read, argue, str)] == [
        'refused', 'refused', 'read']


def test_the_judge_does_not_wait(tmp_path, monkeypatch):
    import time
    monkeypatch.setattr(fuzzing, 'patience', 1)
    assert fuzzing.attempt(lambda path: time.sleep(20), tmp_path/'a.pt') == ('failed', '1 s')
