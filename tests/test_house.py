"Every house limit turns red on a notebook that breaks it, and stays silent on one that does not"
import json, re
import pytest
from house import breaches

GOOD = [
    '# Halves\n\n> Half of things',
    '#| default_exp halves',
    '#| export\nfrom dataclasses import dataclass\nfrom robustnb.core import whole',
    'Half of a number is what two people get. Nothing negative is halved.',
    '''#| export
def half(
    x:float,  # Number, >= 0
    *rest,    # More of them
    n:int=2,  # Parts, >= 1
)->float:     # `x/n`
    "A share of `x`."
    # rounding is left to the caller
    return x/n''',
    'assert half(4) == 2\nhalf(4)',
    'A share can be kept.',
    '''#| export
@dataclass(frozen=True)
class Share:
    "A share and its owner."
    size:float      # Fraction in [0,1]
    owner:str = ''  # Name

    def scaled(self,
        by:float,   # Factor
    )->float:       # Scaled size
        "The size, scaled."
        return self.size*by''',
    '#| hide\nfrom fastcore.test import test_eq',
    'test_eq(Share(.5).scaled(2), 1)',
    '#| export\ndef _private(a, b): return a + b',
]
CORE = ['# Core\n\n> The bottom', '#| default_exp core', 'A whole.',
        '#| export\ndef whole(): return 1', 'assert whole() == 1']


def write(folder, name, sources):
    "A notebook of `sources`: those that start like a title or a sentence are Markdown"
    kind = {True: 'markdown', False: 'code'}
    cells = [dict(cell_type=kind[bool(re.match('# |[A-Z]', o))], source=o.splitlines(True))
             for o in sources]
    (folder/name).write_text(json.dumps(dict(cells=cells)))
    return folder/name


@pytest.fixture
def check(tmp_path):
    """Breaches of the good notebook after replacing text in it, beside a core notebook below and a
    later one above"""
    def check(old='', new='', drop=None, more=()):
        sources = [o.replace(old, new) if old else o for i,o in enumerate(GOOD)
                   if i != drop] + list(more)
        assert sources != GOOD or not old, f'{old} is not in the good notebook'
        later = [o.replace('core', 'later').replace('whole', 'more') for o in CORE]
        files = [write(tmp_path, '00_core.ipynb', CORE),
                 write(tmp_path, '10_halves.ipynb', sources),
                 write(tmp_path, '20_later.ipynb', later)]
        return [o.partition('10_halves.ipynb: ')[2] for o in breaches(files)]
    return check


def test_good_notebook_is_silent(check): assert check() == []


def test_a_comment_above_an_argument_documents_it(check):
    above = '    # Parts, each as large as the others,\n    # at least 1\n    n:int=2,'
    assert check(old='    n:int=2,  # Parts, >= 1', new=above) == []


def test_a_comment_behind_the_argument_before_documents_nothing(check):
    found = check(old='  # Parts, >= 1', new='')
    assert found == ['cell 4: half: n has no comment of its own']


def test_exported_cells_in_a_row_share_prose_and_lesson(tmp_path):
    first = "#| export\ndef one():\n    return 1"
    second = "#| export\ndef two():\n    return 2"
    head = ['# Numbers\n\n> Small ones', '#| default_exp numbers', 'Two numbers.']
    lesson = 'assert one() < two()'
    assert breaches([write(tmp_path, 'a.ipynb', [*head, first, second, lesson])]) == []
    apart = breaches([write(tmp_path, 'b.ipynb', [*head, first, 'x = 1', second, lesson])])
    assert [o.partition(': cell ')[2] for o in apart] == [
        '3: no visible lesson after one', '5: no prose before two']
    alone = breaches([write(tmp_path, 'c.ipynb', [*head, first, second])])
    assert [o.partition(': cell ')[2] for o in alone] == ['3: no visible lesson after one, two']


def book(folder, name, module):
    "A good notebook of `module` at `folder/nbs/api/name`"
    (folder/'nbs/api'/name).parent.mkdir(parents=True, exist_ok=True)
    sources = ['# Title\n\n> What', f'#| default_exp {module}', '#| export\ndef _f(): return 1']
    return write(folder, f'nbs/api/{name}', sources)


@pytest.mark.parametrize('name, module, said', [
    ('attacks/10_gradient.ipynb', 'attacks.gradient', None),
    ('10_gradient.ipynb', 'gradient', None),
    ('attacks/10_gradient.ipynb', 'attacks.other', 'the file must be NN_other.ipynb'),
    ('quant/10_gradient.ipynb', 'attacks.gradient', 'its folder must be attacks/')])
def test_a_notebook_stands_where_its_module_does(tmp_path, name, module, said):
    found = breaches([book(tmp_path, name, module)])
    assert [said in o for o in found] == ([] if said is None else [True])


def test_two_notebooks_of_one_module(tmp_path):
    files = [book(tmp_path, '10_gradient.ipynb', 'gradient'),
             book(tmp_path, 'old/20_gradient.ipynb', 'gradient')]
    found = breaches(files)
    assert len(found) == 2
    assert all('gradient is exported by another notebook too' in o for o in found)


def test_numbers_begin_anew_in_each_room(tmp_path):
    lower = book(tmp_path, 'models/90_zoo.ipynb', 'models.zoo')
    upper = book(tmp_path, 'attacks/10_gradient.ipynb', 'attacks.gradient')
    cells = json.loads(upper.read_text())
    below = 'from robustnb.models.zoo import _f'
    cells['cells'].append(dict(cell_type='code', source=['#| export\n', below]))
    upper.write_text(json.dumps(cells))
    assert breaches([lower, upper]) == []
    cells = json.loads(lower.read_text())
    above = 'from robustnb.attacks.gradient import _f'
    cells['cells'].append(dict(cell_type='code', source=['#| export\n', above]))
    lower.write_text(json.dumps(cells))
    found = breaches([lower, upper])
    assert len(found) == 1
    assert 'imports attacks.gradient, which is not below it' in found[0]


BAD = {
    'import from above': (dict(old='robustnb.core', new='robustnb.later'), 'imports later'),
    'relative import from above': (dict(old='robustnb.core', new='.later'), 'imports later'),
    'import from above in a lesson': (dict(more=['assert 1\nfrom robustnb.later import more']),
                                      'imports later'),
    'import from above in a function': (
        dict(old='    return x/n', new='    import robustnb.later\n    return x/n'),
        'imports later'),
    'unknown module': (dict(old='robustnb.core', new='robustnb.nowhere'), 'imports nowhere'),
    'import of the package': (dict(old='robustnb.core', new='robustnb'),
                              'imports the package itself'),
    'star import': (dict(old='import whole', new='import *'), 'star import of robustnb.core'),
    'dead cell': (dict(more=['#| export\n# x = half(3)']), 'an exported cell without code'),
    'dead line': (dict(old='# rounding is left to the caller', new='# x = round(x)'),
                  'code in a comment: x = round(x)'),
    'long cell': (dict(old='    return x/n', new='    x = x\n'*40), 'lines, at most 40'),
    'many parameters': (dict(old='a, b)', new='a, b, c, d, e, f, g, h, i)'),
                        '_private has 9 parameters'),
    'many cells': (dict(more=['Text.']*50), 'cells, at most 60'),
    'many bytes': (dict(more=['Text. '*70_000]), 'KB, at most 400'),
    'no prose': (dict(drop=3), 'no prose before half'),
    'a heading is not prose': (dict(old=GOOD[6], new='# Shares'), 'no prose before Share'),
    'no lesson': (dict(drop=5), 'no visible lesson after half'),
    'a lesson that cannot fail': (dict(old='assert half(4) == 2\n', new='a = 1\n'),
                                  'no visible lesson after half'),
    'hidden lesson': (dict(old='assert half', new='#| hide\nassert half'),
                      'no visible lesson after half'),
    'lesson without its code': (dict(old='test_eq(S', new='#| echo: false\ntest_eq(S'),
                                'no visible lesson after Share'),
    'slow lesson': (dict(old='test_eq(S', new='#| slow\ntest_eq(S'),
                    'no visible lesson after Share'),
    'argument without comment': (dict(old='  # Parts, >= 1', new=''), 'half: n has no comment'),
    'rest argument without comment': (dict(old='    # More of them', new=''),
                                      'half: rest has no comment'),
    'two arguments on a line': (dict(old='    *rest,    # More of them\n    n', new='    *rest, n'),
                                'half: rest has no comment'),
    'return without comment': (dict(old='     # `x/n`', new=''), 'half: return has no comment'),
    'method argument without comment': (dict(old='   # Factor', new=''),
                                        'Share.scaled: by has no comment'),
    'field without comment': (dict(old='  # Name', new=''), 'Share: owner has no comment'),
    'not Python': (dict(more=['#| export\ndef']), 'not Python'),
}


@pytest.mark.parametrize('change,message', BAD.values(), ids=BAD)
def test_limit(check, change, message):
    found = check(**change)
    assert any(message in o for o in found), found
