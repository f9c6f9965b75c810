"""What a page shows of its cells: the import first, checks folded, everything else as it was."""
from docs_cells import ReaderFirst, folded, import_md
from execnb.nbio import dict2nb, mk_cell, new_nb
from nbdev.process import NBProcessor, extract_directives


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
