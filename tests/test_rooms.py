"Each rule of the rooms turns red on a package that breaks it, and stays silent on one that does not"
import pytest
import rooms

GOOD = {
    '__init__.py': '__version__ = "1"\n',
    'core.py': 'def whole(): return 1\ndef _half(): return 2\n',
    'models/__init__.py': '',
    'models/zoo.py': 'from ..core import whole\nnet = whole()\n',
    'attacks/__init__.py': '',
    'attacks/gradient.py': 'from ..core import whole\nfrom ..models.zoo import net\n_step = 1\n',
    'attacks/standard.py': 'from .gradient import _step\n',
    'transfer/__init__.py': '',
    'transfer/study.py': 'from robustnb.attacks.gradient import net\n',
    'curation/__init__.py': '',
    'curation/hidden.py': 'def slices(): return 3\n',
}


@pytest.fixture
def check(tmp_path):
    "Broken rules of the good package with some files changed or added"
    def check(changed={}):
        root = tmp_path/'robustnb'
        for name, text in (GOOD | changed).items():
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            (root/name).write_text(text)
        return rooms.broken_rules(root)
    return check


def test_good_package_is_silent(check): assert check() == []


BROKEN = {
    'arrows that go up: models.zoo': {'models/zoo.py': 'from ..attacks.gradient import step\n'},
    'arrows that go up: core -> models.zoo (net)': {'core.py': 'from .models.zoo import net\n'},
    'arrows between rooms side by side':
        {'transfer/study.py': 'from ..curation.hidden import slices\n'},
    'private names of another room': {'attacks/gradient.py': 'from ..core import _half\n'},
    'modules in a circle: attacks.gradient':
        {'attacks/gradient.py': 'from .standard import a\n',
         'attacks/standard.py': 'from .gradient import b\n'},
    'modules with a definition of their own name':
        {'attacks/gradient.py': 'def gradient(): return 1\n'},
    'rooms that are not in the list: kitchen': {'kitchen/stove.py': 'x = 1\n'},
    'models/__init__.py: zoo': {'models/__init__.py': 'from .zoo import net as zoo\n'},
}


@pytest.mark.parametrize('said', BROKEN)
def test_broken_rule(check, said):
    found = check(BROKEN[said])
    assert any(said in o for o in found), found


def test_arrows_of_a_statement_inside_a_function_count(check):
    found = check({'core.py': 'def late():\n    from .models.zoo import net\n'})
    assert found[0] == 'arrows that go up: core -> models.zoo (net)'


def test_floors():
    arrows = [('c', 'b'), ('b', 'a'), ('c', 'a')]
    assert rooms.count_floors('abcd', arrows) == 3
    assert rooms.count_floors('abcd', [*arrows, ('a', 'c')]) == 0
