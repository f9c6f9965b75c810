"""What a page shows of its cells: the import first, checks folded, everything else as it was."""
import json, re
from pathlib import Path
import pytest
from docs_cells import ReaderFirst, folded, import_md, public_names
from execnb.nbio import dict2nb, mk_cell, new_nb
from nbdev.process import NBProcessor, extract_directives

api = Path(__file__).parent.parent/'nbs'/'api'


def cell(source, kind='code'):
    made = mk_cell(source, kind)
    made.directives_ = extract_directives(made) if kind == 'code' else {}
    return made


def sources(*cells):
    return [o.source for c in cells for o in folded(c)]


mixed = '''x = 2
test_eq(x, 2)
with expect_fail(ValueError,
                 contains='no'):
    broken(x)
# a word on what follows
for i in range(2):
    assert i < 2
x + 1'''


def test_checks_go_into_a_folded_cell_below_and_the_rest_stays():
    shown, test = sources(cell(mixed))
    assert shown == 'x = 2\n# a word on what follows\nfor i in range(2):\n    assert i < 2\nx + 1'
    assert test.startswith('#| code-fold: true\n#| code-summary: Test\n')
    assert test.endswith("""(x, 2)
with expect_fail(ValueError,
                 contains='no'):
    broken(x)""")
    assert 'x + 1' not in test


def test_the_output_stays_with_what_is_shown():
    one = cell(mixed)
    one.outputs = ['3']
    first, second = folded(one)
    assert (first.outputs, second.outputs) == (['3'], [])


def test_a_cell_of_checks_alone_is_folded_whole():
    only, = sources(cell('assert 1\ntest_close(2, 2)'))
    assert only == '#| code-fold: true\n#| code-summary: Test\nassert 1\ntest_close(2, 2)'


def test_cells_without_checks_exported_cells_text_and_magics_stay():
    text = cell('assert it', 'markdown')
    for one in (cell('x = 1\nx'), cell('#| export\nassert torch'), text,
                cell('#| echo: false\nassert 1\n2'), cell('%time\nassert 1')):
        before = one.source
        assert sources(one) == [before]


def test_a_page_begins_with_the_import_of_its_public_names():
    nb = dict2nb(new_nb([mk_cell('---\ntitle: x\n---', 'raw'), mk_cell('#| default_exp attacks.gradient'),
                         mk_cell('#| export\na = 1\n_b = 2\ndef f(): pass\ndef _g(): pass\nclass C: pass'),
                         mk_cell('h = 3')]))
    made = NBProcessor(nb=nb, procs=[ReaderFirst], process=True).nb.cells
    assert made[0].cell_type == 'raw'
    assert made[1].source == '```python\nfrom robustnb.attacks.gradient import a, f, C\n```'
    assert [c.source for c in made].count(made[1].source) == 1
    plain = dict2nb(new_nb([mk_cell('h = 3')]))
    assert [c.source for c in NBProcessor(nb=plain, procs=[ReaderFirst], process=True).nb.cells] == ['h = 3']


def test_a_long_import_is_wrapped_and_still_python():
    names = [f'name_number_{i}' for i in range(12)]
    code = import_md('robustnb.core', names).strip('`').removeprefix('python\n')
    assert max(map(len, code.splitlines())) <= 88 and code.count('\n') > 2
    compile(code, 'page', 'exec')


def fault(cells):
    "What is wrong with the example that a page of nbs/api begins with; None if nothing is"
    starts = [''.join(c['source'])[:14] for c in cells]
    at = starts.index('#| default_exp')
    said = public_words(cells, at)
    if not said: return
    example = cells[at+1]
    source = ''.join(example['source'])
    if example['cell_type'] != 'code' or source.startswith(('#| export', '#| hide')):
        return 'the cell below `default_exp` must be an example'
    module = cells[at]['source'][0].split()[-1]
    if f'from robustnb.{module} import' not in source:
        return f'its example must import from robustnb.{module}'
    if not said & {*re.findall(r'\w+', source)}:
        return f'its example must use one of {", ".join(sorted(said))}'
    if sum(bool(o.strip()) for o in source.splitlines()) > 16: return 'its example must have at most 16 lines'
    if not example['outputs']: return 'its example must show an output'


def public_words(cells, at):
    "Public names that the cells after `at` export"
    exported = [cell(''.join(c['source'])) for c in cells[at+1:] if c['cell_type'] == 'code']
    return {o for c in exported for o in public_names(c)}


@pytest.mark.parametrize('page', sorted(api.rglob('*.ipynb')), ids=lambda o: o.relative_to(api).as_posix())
def test_a_page_of_the_api_begins_with_an_example_that_needs_nothing_above_it(page):
    said = fault(json.loads(page.read_text(encoding='utf-8'))['cells'])
    assert not said, f'{page.name}: {said}'


def test_a_page_without_an_example_is_noticed():
    def page(source, kind='code', outputs=('shown',)):
        made = ['#| default_exp core', source, '#| export\ndef f(): pass']
        return [dict(cell_type=kind if o is source else 'code', source=o.splitlines(True),
                     outputs=[*outputs] if o is source else []) for o in made]
    good = 'from robustnb.core import f\nf()'
    assert fault(page(good)) is None
    assert 'must be an example' in fault(page('#| export\nimport torch'))
    assert 'must be an example' in fault(page(good, 'markdown'))
    assert 'import from robustnb.core' in fault(page('import torch\ntorch.ones(1)'))
    assert 'use one of f' in fault(page('from robustnb.core import h\nh()'))
    assert 'at most 16 lines' in fault(page(good + '\nf()'*16))
    assert 'show an output' in fault(page(good, outputs=()))
