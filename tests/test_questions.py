"A key is equal only if code, defaults, closures, globals, values and weights are, in every process."
import copy, functools, subprocess, sys, threading
from dataclasses import dataclass
import numpy as np
import pytest
import torch
from torch import nn
from robustnb.attacks.gradient import pgd
from robustnb.questions import cache_key

EDITS = {
    'body': 'def f(x): return x*{}',
    'docstring-less lambda': 'f = lambda x: x + {}',
    'default': 'def f(x, size={}): return x*size',
    'keyword default': 'def f(x, *, size={}): return x*size',
    'global number': 'size = {}\ndef f(x): return x*size',
    'global of an inner function': 'size = {}\ndef f(x):\n    def g(): return size\n    return g()',
    'global helper': 'def g(x): return x*{}\ndef f(x): return g(x)',
    'helper of a helper': 'def h(x): return x*{}\ndef g(x): return h(x)\ndef f(x): return g(x)',
    'closure': 'def make(s):\n    def f(x): return x*s\n    return f\nf = make({})',
    'list in a closure': 'def make(s):\n    def f(x): return x*s[0]\n    return f\nf = make([{}])',
    'tensor': 'import torch\ns = torch.tensor({})\ndef f(x): return x*s',
    'array': 'import numpy as np\ns = np.array({})\ndef f(x): return x*s',
    'set': 's = {{"a", "b", {}}}\ndef f(x): return x in s',
    'partial': 'from functools import partial\ndef g(x, s): return x*s\nf = partial(g, s={})',
    'attribute': 'class F:\n    def __init__(self, s): self.s = s\nf = F({})',
    'slot': 'class F:\n    __slots__ = ("s",)\n    def __init__(self, s): self.s = s\nf = F({})',
    'method': 'class F:\n    def __call__(self, x): return x*{}\nf = F()',
    'bound method': 'class F:\n    def go(self, x): return x*{}\nf = F().go',
    'base class': 'class G:\n    def go(self, x): return x*{}\nclass F(G): pass\nf = F()',
    'property': 'class F:\n    @property\n    def s(self): return {}\nf = F()',
    'static method': 'class F:\n    @staticmethod\n    def s(): return {}\nf = F()',
    'class attribute': 'class F:\n    s = {}\nf = F()',
    'function attribute': 'def f(x): return x*f.s\nf.s = {}',
    'decorated': 'import torch\n@torch.no_grad()\ndef f(x): return x*{}',
    'cached': 'from functools import lru_cache\n@lru_cache\ndef f(x): return x*{}',
    'dataclass': 'from dataclasses import dataclass\n@dataclass\nclass F:\n    s: float\nf = F({})',
    'forward': 'from torch import nn\nclass F(nn.Module):\n    def forward(self, x): return x*{}\n'
               'f = nn.Sequential(F())',
    'setting of a layer': 'from torch import nn\nf = nn.Sequential(nn.Hardtanh(-{0}, {0}))',
    'patched library class': 'from torch import nn\nclass F(nn.ReLU): pass\n'
                             'f = F()\nf.forward = lambda x: x*{}',
}


def made(text):
    space = dict(__name__='__main__')
    exec(text, space)
    return space['f']


@pytest.mark.parametrize('how', EDITS)
def test_every_edit_is_seen_and_only_edits(how):
    first = cache_key(made(EDITS[how].format(.25)))
    assert cache_key(made(EDITS[how].format(.25))) == first
    assert cache_key(made(EDITS[how].format(.75))) != first


def test_the_same_in_every_process():
    code = ('from robustnb.questions import cache_key\nimport test_questions as t\n'
            'print([cache_key(t.made(o.format(.25))) for o in t.EDITS.values()])')
    said = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           cwd=__file__.rpartition('/')[0],
                           env=dict(PYTHONHASHSEED=seed, PYTHONPATH='.:..')).stdout
            for seed in ('1', '2')]
    assert said[0] == said[1] == f'{[cache_key(made(o.format(.25))) for o in EDITS.values()]}\n'


def test_values_types_and_shapes_count():
    values = [0, 0., False, '0', b'0', None, (0,), [0], {0}, {0: 0}, np.zeros(1), torch.zeros(1),
              torch.zeros(1, 1), torch.zeros(1).double(), -0., np.float32(0), torch.float32]
    keys = [cache_key(o) for o in values]
    assert len({*keys}) == len(values)
    assert cache_key(torch.arange(6).view(2, 3).T) == cache_key(torch.arange(6).view(2, 3).T.clone())
    assert cache_key({'a', 'b', 'c'}) == cache_key({'c', 'b', 'a'})


def test_weights_buffers_and_hooks_of_networks():
    net = lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    a = net()
    b = net()
    assert cache_key(a) != cache_key(b)
    b.load_state_dict(a.state_dict())
    assert cache_key(a) == cache_key(b)
    b[1].running_mean += 1
    assert cache_key(a) != cache_key(b)
    b[1].running_mean -= 1
    for _ in range(3):
        b.register_forward_hook(lambda *_: None).remove()
    hook = b.register_forward_hook(lambda m, i, o: 2*o)
    a.register_forward_hook(lambda m, i, o: 2*o)
    assert cache_key(a) == cache_key(b), 'hooks are numbered anew'
    hook.remove()
    assert cache_key(a) != cache_key(b)


def test_circles_come_to_an_end():
    a = [1]
    a.append(a)
    b = [1]
    b.append(b)
    assert cache_key(a) == cache_key(b) != cache_key([1, [1]])
    text = 'def f(x): return g(x) if x else {}\ndef g(x): return f(x-1)'
    assert cache_key(made(text.format(1))) == cache_key(made(text.format(1)))
    assert cache_key(made(text.format(1))) != cache_key(made(text.format(2)))


def test_a_list_that_is_only_appended_to_does_not_count():
    calls = []
    def counted(x):
        calls.append(x)
        return x
    def judged(x):
        calls.append(x)
        return len(calls)
    before = cache_key(counted), cache_key(judged)
    counted(1)
    assert cache_key(counted) == before[0]
    assert cache_key(judged) != before[1]


def test_what_was_computed_and_kept_does_not_count():
    class Kept:
        @functools.cached_property
        def half(self): return .5
    a = Kept()
    before = cache_key(a)
    assert a.half == .5
    assert cache_key(a) == before


@pytest.mark.parametrize('thing', (threading.Lock(), (i for i in 'a'), sys.__stdout__))
def test_what_nobody_can_tell_is_refused(thing):
    with pytest.raises(ValueError, match='`folder` needs to know'):
        cache_key(dict(a=thing), arg='folder')
    assert cache_key(thing, files=True), 'the text of the files stands for it'


def test_files_of_functions_count_where_they_are_asked_for():
    assert cache_key(pgd) != cache_key(pgd, files=True)


def test_a_class_is_the_same_after_one_of_its_objects_was_copied():
    @dataclass(frozen=True)
    class Held:
        size:int
    before = cache_key(Held)
    copy.deepcopy(Held(3))
    assert '__slotnames__' in vars(Held), 'what the copy leaves behind'
    assert cache_key(Held) == before
