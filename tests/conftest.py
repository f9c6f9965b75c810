"Counts in the words that the notebook tests use too, and what several test files share"
import json, os
from collections import Counter
from pathlib import Path

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


SLOW = Path(__file__).with_name('slow.json')      # what `make test` runs and .ci/run does not
A_TEST, A_FIXTURE = 2, 30       # seconds from which a test is in it, and a file for its fixtures
seconds = Counter()


def pytest_addoption(parser):
    parser.addoption('--keep-times', action='store_true', help='write tests/slow.json, in a run of all tests')


def pytest_runtest_logreport(report):
    place = report.nodeid.partition('::')[0] if report.when == 'setup' else report.nodeid
    seconds[place] += report.duration


def pytest_sessionfinish(session):
    if not session.config.option.keep_times or hasattr(session.config, 'workerinput'): return
    slow = [k for k, v in seconds.items() if v > (A_TEST if '::' in k else A_FIXTURE)]
    SLOW.write_text(json.dumps(sorted(slow), indent=1) + '\n')


def pytest_collection_modifyitems(items):
    "Those of slow.json are marked; the files that take longest start first, so that none is waited for"
    slow = set(json.loads(SLOW.read_text()))
    for o in items:
        if not slow.isdisjoint((o.nodeid, o.nodeid.partition('::')[0])): o.add_marker('slow')
    long = ['test_own_data.py', 'test_kills.py', 'test_faults.py', 'test_checks.py', 'test_nbtest.py']
    items.sort(key=lambda o: long.index(o.path.name) if o.path.name in long else len(long))
