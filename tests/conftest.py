"Counts in the words that the notebook tests use too"


def pytest_terminal_summary(terminalreporter):
    n = {k: len(terminalreporter.stats.get(k, [])) for k in ('passed', 'failed', 'error')}
    terminalreporter.write_line(f'unit tests: {n["passed"]} passed, {n["failed"] + n["error"]} failed')
