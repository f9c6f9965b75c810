"What counts as a long line, a packed assignment, a one-line block and a claim"
import json
import pytest
import lines
from lines import Count, Piece


def count(source, exported=False):
    "What is found in one piece of code"
    return Count([Piece('file', '', source, exported)])


@pytest.mark.parametrize('source, n', [
    ('a, b = f(x), g(y)', 1),
    ('a, b = f(x), 1', 0),
    ('a, b = x, y', 0),
    ('a, b = f(x)', 0),
    ('a, b = (f(o) for o in (x, y))', 1),
    ('a = f(x), g(y)', 0)])
def test_packed_assignments(source, n):
    assert len(count(source).found['packed']) == n


@pytest.mark.parametrize('source, n', [
    ('for x in y: f(x)', 1),
    ('with x: f()', 1),
    ('if x: f()', 1),
    ('if x: raise ValueError', 0),
    ('for x in y:\n    f(x)', 0)])
def test_one_line_blocks(source, n):
    assert len(count(source).found['one_line']) == n


def test_claims():
    found = count('assert a and b and (c and d)').found['several']
    assert [o.size for o in found] == [4]
    assert not count('assert a and b').found['several']


@pytest.mark.parametrize('length, n', [(110, 0), (111, 1)])
def test_long_lines(length, n):
    found = count('x = 1\n' + 'y'*length).found['long']
    assert [o.line for o in found] == [2]*n


@pytest.mark.parametrize('n, long', [(40, 0), (41, 1)])
def test_long_cells(n, long):
    assert len(count('x = 1\n'*n, exported=True).found['cells']) == long


def test_limits_name_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'tests').mkdir()
    cell = dict(cell_type='code', source=['#| export\n', '# ' + 'x'*120])
    (tmp_path/'nbs/a.ipynb').write_text(json.dumps(dict(cells=[cell])))
    (tmp_path/'tests/test_a.py').write_text('a, b = f(), g()\n')
    found = lines.broken_limits()
    assert any('nbs/a.ipynb cell 0 line 1: 122 columns, at most 110' in o for o in found)
    assert any('tests: packed assignments 1 (100 %)' in o for o in found)
    (tmp_path/'nbs/a.ipynb').unlink()
    (tmp_path/'tests/test_a.py').write_text('a = f()\n')
    assert lines.broken_limits() == []
