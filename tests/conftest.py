"Counts in the words that the notebook tests use too, and what several test files share"
import os

import pytest

# files are run side by side: threads of their own would fight for the processors
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch


@pytest.fixture(scope='module')
def one_thread():
    "Sums are added in another order by another number of threads"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    n = {k: len(terminalreporter.stats.get(k, [])) for k in ('passed', 'failed', 'error')}
    terminalreporter.write_line(f'unit tests: {n["passed"]} passed, {n["failed"] + n["error"]} failed')


def pytest_collection_modifyitems(items):
    "The files that take longest start first, so that no processor waits for them at the end"
    long = ['test_own_data.py', 'test_kills.py', 'test_faults.py', 'test_checks.py', 'test_nbtest.py']
    items.sort(key=lambda o: long.index(o.path.name) if o.path.name in long else len(long))
