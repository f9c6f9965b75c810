"What `make docs-check` says of a site with one fault, and that it is silent on a site without"
import ast, builtins, json, os, re, stat, subprocess, sys
from pathlib import Path
import pytest, torch, yaml
from browser import find
from docs_check import cfg, fault
from docs_faults import (ENTRIES, exported, html_faults, index_faults, menu_faults, menu_files,
                         order_faults, output_faults, shown, site_faults)
from docs_pages import (Parts, bar_links, footer, header, menu, neighbours, notebook_md, page_style, pandoc,
                        whole_page)
from docs_parts import comment_md, type_md
from docs_reader import (FORBIDDEN, code_faults, nan_faults, next_faults, picture_faults, reader_faults,
                         word_faults)
from docs_tables import SIZES, fitted

root = Path(__file__).parent.parent
SOURCES = [
    '# Halves\n\n> Half of things',
    '#| default_exp halves',
    '''#| export
def whole(
    x:float,        # A number, as `half` takes it; not *all* of them
    n:int|None=None, # None is `half`
): return x

def half(x): "The half."; return x/2
''',
    'whole(1)',
]


def notebook(sources, outputs=()):
    "A notebook as it is saved: the first source is Markdown; `outputs` are those of the last cell"
    kinds = ['markdown'] + ['code']*(len(sources) - 1)
    cells = []
    for i,(kind,source) in enumerate(zip(kinds, sources)):
        cells.append(dict(cell_type=kind, id=f'c{i}', metadata={}, source=source.splitlines(True)))
        if kind == 'code': cells[-1].update(outputs=[], execution_count=None)
    cells[-1]['outputs'] = [dict(output_type='display_data', metadata={}, data=o) for o in outputs]
    return dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)


def processed(nb):
    "What the processors that settings.ini names make of a notebook"
    from execnb.nbio import dict2nb
    from nbdev.processors import FilterDefaults
    nb = dict2nb(json.loads(json.dumps(nb)))
    nb.path_ = cfg.nbs_path/'halves.ipynb'
    FilterDefaults()(nb)
    return nb


@pytest.fixture(scope='module')
def made():
    html = ['<table><tr><td>1</td></tr></table>']
    return processed(notebook(SOURCES, [{'text/html': html}]))


def test_a_notebook_as_nbdev_makes_it_has_no_fault(made):
    module, names = exported(notebook(SOURCES))
    assert (module, names) == ('halves', ['whole', 'half'])
    assert not list(order_faults(names, shown(made)))
    assert not list(output_faults(made))


def shown_md(made, name):
    "The Markdown of the cell that shows a name"
    cell = next(o for o in made.cells if f'show_doc({name})' in o.source)
    return ''.join(cell.outputs[-1].data['text/markdown'])


def test_arguments_are_a_table(made):
    md = shown_md(made, 'whole')
    signature, _, table = md.partition('\n```\n')
    assert 'def whole(x:float, n:int | None=None)' in signature
    assert '#' not in signature.partition('def ')[2]
    assert '| `x` | `float` | A number, as `half` takes it; not \\*all\\* of them |' in table
    assert not list(html_faults(Parts(pandoc(md, 'html'))))


def test_names_in_a_table_are_links():
    from nbdev.doclinks import NbdevLookup
    name = 'pgd'
    line = f'| `x` | `Tensor` | As `{name}` takes it |'
    html = pandoc('| A | B | C |\n|:--|:--|:--|\n' + NbdevLookup().linkify(line), 'html')
    assert any(o.endswith(f'#{name}') for o in Parts(html).links)


TYPES = {
    '`int`': int,
    '`int` or `None`': int | None,
    '`Path`': Path,
    '`tuple[int | None, Path]`': tuple[int | None, Path],
    '`Module`': 'nn.Module',
    '`torch.Generator` or `None`': torch.Generator | None,          # not our `Generator`
    '`Generator`': 'robustnb.transfer.generator.Generator',
}


@pytest.mark.parametrize('md', TYPES)
def test_types(md): assert type_md(TYPES[md]) == md


def test_a_comment_is_text_but_for_backticks():
    said = '`a|b` in [0,1] | x_adv ~ <b> $5 *z'
    html = pandoc(f'| A |\n|:--|\n| {comment_md(said)} |', 'html')
    assert '><code>a|b</code> in [0,1] | x_adv ~ &lt;b&gt; $5 *z</td>' in html.replace('\n', ' ')


def test_raw_link_in_a_block():
    html = pandoc('```python\ndef f(x) # as [`g`](https://a.b/c#g)\n```', 'html')
    assert ['a block shows Markdown'] == [o.partition(':')[0] for o in html_faults(Parts(html))]


def test_link_within_a_link():
    "As nbdev makes of a name in backticks that stands in a link already"
    html = pandoc('see [[`g`](https://a.b/c#g)](../d.html), and `x](https://a.b)`, [a](b.html) (c)', 'html')
    found = [*html_faults(Parts(html))]
    assert found == ['the text shows Markdown: ](https://a.b/c#g)']


def in_html(md): return Parts(pandoc(md, 'html'))


@pytest.mark.parametrize('link', ['[`g`](https://a.b/c#g)', '[g](../d.ipynb)', '[g](d.html#g)', '[g](#g)'])
def test_link_in_code_of_a_line(link):
    found = list(code_faults(in_html(f'As ``{link}`` takes it')))
    assert found == [f'code shows Markdown: {link}']


def test_code_that_is_no_link():
    assert not list(code_faults(in_html('`steps[0](x)`, `f[k](a.b)`, [`g`](d.html), `[a, b](c)`')))
    assert not list(code_faults(in_html('```\n[a](b.html)\n```')))          # a block: html_faults


PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


def figure_page(*options):
    "The parts of a page with a figure, made as docs_check makes it"
    nb = notebook(['# A\n\n> B', ''.join(f'#| {o}\n' for o in options) + 'show()'], [{'image/png': PIXEL}])
    return in_html(notebook_md(nb, lambda data, name: name)[1])


def test_figure_without_alt_text():
    found = list(picture_faults(figure_page()))
    assert len(found) == 1
    assert 'without alt text: 1-0.png' in found[0]
    assert list(picture_faults(figure_page('fig-alt: "  "')))
    assert list(picture_faults(Parts('<img src="a.png"><img src="b.png" alt="">')))


def test_alt_text_and_caption_reach_the_page():
    said = 'Loss: 3 % of "all", a < b'
    parts = figure_page(f'fig-alt: "{said}"', 'fig-cap: "What it cost"')
    assert parts.alts == [said]
    assert 'What it cost' in parts.prose
    assert not list(picture_faults(parts))


@pytest.mark.parametrize('word', ['Simply', 'easily', 'easy to', 'leverages', 'utilise', 'state-of-the-art',
                                  'obviously', 'novel', 'in order to', '/tmp/a', '/work/x', 'issue 30'])
def test_forbidden_word(word):
    found = list(word_faults(in_html(f'This is {word} what it does')))
    assert len(found) == 1
    assert repr(word) in found[0]


def test_words_that_only_look_forbidden():
    text = 'simplicity, easy images, novelty, api/tmp/x, tissue 5, `simply`\n\n```\nobviously\n```'
    assert not list(word_faults(in_html(text)))


def nan_page(prose, html='<table><tr><td>NaN</td></tr></table>'):
    return notebook([prose, '1'], [{'text/html': html, 'text/plain': 'a NaN'}])


def test_nan_that_nobody_explains():
    found = list(nan_faults(nan_page('# A')))
    assert len(found) == 1
    assert 'cell 1 shows NaN' in found[0]
    plain = notebook(['# A', '1'], [{'text/plain': '[1.0, nan]'}])
    assert list(nan_faults(plain))


def test_nan_that_is_explained():
    assert not list(nan_faults(nan_page('# A\n\nNaN: no result.')))
    assert not list(nan_faults(nan_page('# A\n\nWhat is empty was not measured.')))
    assert not list(nan_faults(nan_page('# A', '<table><tr><td>no NaN here</td></tr></table>')))
    assert not list(nan_faults(notebook(['# A', '1'], [{'text/plain': 'nano, banana'}])))


def test_page_without_a_next_step():
    last = dict(cell_type='markdown', id='z', metadata={}, source=['Next: [b](b.ipynb).'])
    nb = notebook(['# A [b](b.ipynb)', '1'])
    assert not list(next_faults('howto/a.ipynb', nb))
    nb['cells'].append(dict(last, source=['The end, [here](a.ipynb) and [there](https://c.d).']))
    for o in ('howto', 'explain', 'results', 'tutorials'):
        found = list(next_faults(f'{o}/a.ipynb', nb))
        assert found == ['no next step: the last text has no link to another page']
    assert not list(next_faults('api/a.ipynb', nb))
    beside = '[here](a.ipynb), [next](b.ipynb)'
    for o in ('Next: [b](b.ipynb).', beside, '[the namesake](../results/a.ipynb)'):
        nb['cells'][-1] = last | dict(source=[o])
        assert not list(next_faults('howto/a.ipynb', nb)), o


def test_faults_of_a_reader_are_all_asked_for():
    nb = nan_page('# A')
    parts = in_html('simply `[a](b.html)` ![](c.png)')
    found = ' '.join(reader_faults('howto/a.ipynb', nb, parts))
    for o in ('code shows', 'simply', 'alt text', 'NaN', 'next step'): assert o in found
    clean = notebook(['# A\n\n[b](b.ipynb)', '1'])
    assert not list(reader_faults('howto/a.ipynb', clean, in_html('plain `code` ![a b](c.png)')))


def test_the_list_of_words_is_short(): assert len(FORBIDDEN.split()) < 30


def test_module_without_index():
    assert any('auto' in o for o in index_faults('p.auto', ['f'], {'p.auto': {}}))
    assert any('auto' in o for o in index_faults('p.auto', ['f'], {}))


def test_name_without_index():
    symbols = {'p.m': {'p.m.f': 1}}
    assert not list(index_faults('p.m', ['f'], symbols))
    assert list(index_faults('p.m', ['f', 'g'], symbols)) == ['p.m: not in _modidx.py: g']


def test_order_of_names():
    assert not list(order_faults(['a', 'b'], ['a', 'b']))
    assert 'not in the order' in next(order_faults(['a', 'b'], ['b', 'a']))
    assert list(order_faults(['a', 'b'], ['a'])) == ['not shown: b']


WIDGET = 'application/vnd.jupyter.widget-view+json'


@pytest.mark.parametrize('kind', ['text/html', 'application/javascript', WIDGET])
def test_output_that_makes_quarto_load_scripts(kind):
    nb = notebook(SOURCES, [{kind: ['x'], 'text/plain': ['x']}])
    assert len(list(output_faults(nb))) == 1


@pytest.mark.parametrize('src', ['https://cdn.org/require.min.js', '//cdn.org/jquery.js'])
def test_script_of_another_host(src, tmp_path):
    html = f'<script src="{src}"></script><script src="site_libs/a.js"></script>'
    (tmp_path/'page.html').write_text(html, encoding='utf-8')
    found = list(site_faults(tmp_path))
    assert len(found) == 1
    assert src in found[0]


ATTACKS = dict(section='Attacks', contents=['api/a.ipynb', 'api/b.ipynb'])
MENU = ['index.ipynb', dict(section='API', contents=[ATTACKS])]
FILES = ['index.ipynb', 'api/a.ipynb', 'api/b.ipynb']


def test_good_menu():
    assert list(menu_files(MENU)) == FILES
    assert not list(menu_faults(MENU, FILES))


def test_nested_menu_is_shown():
    html = ''.join(menu(MENU, lambda o: f'<li>{o}</li>'))
    inside = '<li>Attacks<ul><li>api/a.ipynb</li><li>api/b.ipynb</li></ul></li>'
    assert html == f'<li>index.ipynb</li><li>API<ul>{inside}</ul></li>'


def test_neighbours_in_the_menu():
    def turn(file): return re.findall('<li>(.*?)</li>', neighbours(FILES, file, lambda o: f'<li>{o}</li>'))
    assert turn('index.ipynb') == ['', 'api/a.ipynb']
    assert turn('api/a.ipynb') == ['index.ipynb', 'api/b.ipynb']
    assert turn('api/b.ipynb') == ['api/a.ipynb', '']
    assert turn('lost.ipynb') == []


def test_bars_lead_where_the_settings_say():
    website = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']
    html = whole_page('T', 'S', '', '', '', header(website, '../'), footer(website))
    links = Parts(html).links
    assert {'../index.html', '../images/favicon.svg', *bar_links(website)} == {*links}
    assert not [o for o in bar_links(website) if fault(o, 'index.html', {}, {})]
    assert fault(bar_links(website)[0] + 'x', 'index.html', {}, {}) == 'no such source line'


def test_menu_lacks_a_notebook():
    assert list(menu_faults(MENU, FILES + ['c.ipynb'])) == ['_quarto.yml: the menu lacks c.ipynb']


def test_menu_names_nothing():
    assert list(menu_faults(MENU, FILES[:2])) == ['_quarto.yml: there is no api/b.ipynb']


def test_flat_menu():
    files = [f'api/{i}.ipynb' for i in range(ENTRIES + 1)]
    found = list(menu_faults([dict(section='API', contents=files)], files))
    assert any(f'API lists {ENTRIES + 1} entries' in o for o in found)
    assert any('no sub-sections' in o for o in found)


def test_link_to_nowhere():
    pages = {'a.ipynb': 'a.html'}
    infos = {'a.html': Parts('<p id="here"></p>')}
    assert fault('#here', 'a.html', pages, infos) is None
    assert 'anchor' in fault('#there', 'a.html', pages, infos)
    assert 'nowhere' in fault('b.ipynb', 'a.html', pages, infos)


def table(columns, cell='0.5', rows=2):
    "HTML of a table as pandas writes it"
    head = ''.join(f'<th>{o}</th>' for o in ['', *columns])
    cells = f'<td>{cell}</td>'*len(columns)
    body = ''.join(f'<tr><th>{i}</th>{cells}</tr>' for i in range(rows))
    return ('<table border="1" class="dataframe">'
            f'<thead><tr style="text-align: right;">{head}</tr></thead>'
            f'<tbody>{body}</tbody></table>')


def test_cells_know_their_columns():
    html = fitted(table(['first_name', 'b']))
    assert '<th>first_<wbr>name</th>' in html
    assert '<td class="number" data-label="first_&#8203;name">0.5</td>' in html
    assert '<td class="number" data-label="b">0.5</td>' in html
    assert 'class="dataframe"' in html


def test_two_lines_of_heads():
    html = '''<table border="1" class="dataframe">
        <thead><tr><th></th><th colspan="2">top</th></tr>
        <tr><th></th><th>l</th><th>r</th></tr></thead>
        <tbody><tr><th rowspan="2">0</th><td>a</td><td>b</td></tr>
        <tr><td>c</td><td>d</td></tr></tbody>
        </table>'''
    assert fitted(html).count('data-label="top l"') == 2
    assert 'data-label="top r">d<' in fitted(html)


def numbered(n): return table([f'column_{i}' for i in range(n)])


def test_wide_tables_say_so():
    def size(n): return re.search('class="(dataframe[^"]*)"', fitted(numbered(n)))[1]
    assert size(2) == 'dataframe'
    assert size(8) == 'dataframe wide'
    assert size(20) == 'dataframe wide widest stacked'
    assert list(SIZES.values()) == sorted(SIZES.values())


def page(html, tmp_path, name='page.html'):
    "A page of the site's own style"
    quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    style = page_style(quarto, (root/'nbs/styles.css').read_text(encoding='utf-8'))
    path = tmp_path/name
    path.write_text(whole_page('Title', 'Text', html, '', style), encoding='utf-8')
    return path


@pytest.mark.skipif(find() is None, reason='no Chromium on this machine')
def test_what_is_cut_is_found(tmp_path):
    import widths
    good = '<pre>' + 'word '*99 + '</pre>' + ''.join(fitted(numbered(n)) for n in (2, 5, 9, 14, 30))
    wide = '<table style="min-width:1500px"><tr><td>x</td></tr></table>'
    bad = dict(
        table=wide,
        block='<pre><b style="white-space:pre">' + 'word '*99 + '</b></pre>',
        boxed=f'<div style="overflow-x:auto">{wide}</div>',
        number='<table><tr><td style="max-width:2em">0.000000042</td></tr></table>',
    )
    pages = [page(o, tmp_path, f'{k}.html') for k,o in bad.items()]
    found = widths.cut([page(good, tmp_path), *pages])
    assert not [o for o in found if 'page.html' in o]
    assert all(sum(f'{k}.html' in o and 'cut: ' in o for o in found) == 2 for k in bad), found


QUARTO = '''#!/bin/sh
# What nbdev asks of Quarto: README.md, or the site
case "$*" in
  *README.md*) mkdir -p _docs; echo changed > _docs/README.md ;;
  *) mkdir -p _docs; echo '<script src="https://cdn.org/require.js"></script>' > _docs/index.html ;;
esac
'''


SETTINGS = '''[DEFAULT]
repo = tiny
user = u
author = a
author_email = e
description = d
branch = main
custom_sidebar = True
skip_procs = exec_show_docs,add_links
'''


def test_make_docs_keeps_the_readme(tmp_path):
    "`make docs` with a Quarto that would write README.md anew, which is older than its notebook"
    for o in ('nbs', 'tiny', 'bin'): (tmp_path/o).mkdir()
    (tmp_path/'settings.ini').write_text(SETTINGS)
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(notebook(['# Tiny\n\n> Text', '1'])))
    (tmp_path/'README.md').write_text('as it was')
    os.utime(tmp_path/'README.md', (1, 1))
    quarto = tmp_path/'bin/quarto'
    quarto.write_text(QUARTO)
    quarto.chmod(quarto.stat().st_mode | stat.S_IEXEC)
    env = os.environ | dict(PATH=f'{tmp_path}/bin:{os.environ["PATH"]}')
    command = [sys.executable, '-W', 'ignore', root/'tools/docs_build.py']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (tmp_path/'README.md').read_text() == 'as it was'
    assert 'a script of another host: https://cdn.org/require.js' in done.stdout, done.stderr
    assert 'docs: 1 problems' in done.stdout
    assert done.returncode == 1


def test_settings_name_what_exists():
    from importlib import import_module
    named = [cfg['renderer'].rpartition('.')[::2], *(o.split(':') for o in cfg['procs'].split())]
    for module,name in named: assert hasattr(import_module(module), name)


def test_style_is_that_of_the_site():
    html = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['format']['html']
    assert (root/'nbs'/html['css']).is_file()
    assert html['html-math-method'] == 'mathml'
    assert html['html-table-processing'] == 'none'


def examples():
    "The cells of the page of public names that readers paste; they run with the notebooks"
    book = json.loads((root/'nbs/reference/names.ipynb').read_text(encoding='utf-8'))
    sources = [''.join(o['source']) for o in book['cells'] if o['cell_type'] == 'code']
    return [o for o in sources if not o.startswith('#|')]


def unbound(source):
    "Names that a cell reads without having made them"
    nodes = list(ast.walk(ast.parse(source)))
    made = {o.id for o in nodes if isinstance(o, ast.Name) and not isinstance(o.ctx, ast.Load)}
    made |= {o.arg for o in nodes if isinstance(o, ast.arg)}
    made |= {(o.asname or o.name).split('.')[0] for o in nodes if isinstance(o, ast.alias)}
    made |= {o.name for o in nodes if isinstance(o, ast.FunctionDef)} | set(dir(builtins))
    return {o.id for o in nodes if isinstance(o, ast.Name)} - made


def test_every_public_name_has_an_example():
    public = json.loads((root/'tests/public_names.json').read_text())
    shown = set(re.findall(r'\brn\.(\w+)', ' '.join(examples())))
    assert shown == set(public)


def test_an_example_can_be_pasted_alone():
    assert unbound('x + rn.pgd') == {'x', 'rn'}
    for o in examples(): assert not unbound(o), o
