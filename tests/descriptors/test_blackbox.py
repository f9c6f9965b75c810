"""The counter against a plain list of what the box really saw, boxes that fail in every way, a kill
in the middle, and servers that lie."""
import copy
import io
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torch import nn

from robustnb.core import make_generator, round_to_8bit, to_float, to_uint8
from robustnb.descriptors import blackbox as module
from robustnb.descriptors.blackbox import (
    BlackBox, descriptor_distance, http_blackbox, is_spent, query_distances)

weights = torch.randn(3*5*4, 7, generator=make_generator(0, 'weights'), dtype=torch.float64).float()


def images(n=6, seed=0): return torch.rand(n, 3, 5, 4, generator=make_generator(seed, 'images'))


def answer(x): return x.flatten(1) @ weights


def grey(x): return [o.tobytes() for o in to_uint8(x)]


class Box:
    "Remembers what it was asked; `bad` maps the number of an image to what happens there"
    source = 'the same box'
    def __init__(self, x=None, **bad):
        self.calls = []
        self.bad = {} if x is None else {grey(x)[int(k[1:])]: v for k, v in bad.items()}

    def __call__(self, x):
        assert not torch.is_grad_enabled()
        self.calls.append(grey(x))
        d = answer(x)
        for i, o in enumerate(grey(x)):
            what = self.bad.get(o)
            if callable(what):
                what()
            elif isinstance(what, list):
                (what.pop() if what else lambda: None)()
            elif what is not None:
                d[i, 2] = what
        return d

    @property
    def asked(self): return sum(map(len, self.calls))


def fails(error=OSError('no\nroom')):
    def act(): raise error
    return act


def called(source, box):
    box.source = source
    return box


def quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return BlackBox(*args, **kw)


def test_round_to_8bit():
    x = torch.cat([images(), torch.arange(60).view(1, 3, 5, 4)/255, torch.ones(1, 3, 5, 4)])
    for dtype in (torch.float32, torch.float64):
        out = round_to_8bit(x.to(dtype))
        assert out.dtype == dtype
        assert torch.equal(out, torch.from_numpy(
            np.rint(x.to(dtype).numpy()*255)/np.array(255, x.to(dtype).numpy().dtype)))
        assert torch.equal(out.float(), to_float(to_uint8(x)))
        assert torch.equal(round_to_8bit(out), out)
    for bad in (x*1.01, x-1, x[0], torch.full_like(x, torch.nan)):
        with pytest.raises(ValueError, match='`x`'):
            round_to_8bit(bad)


def test_descriptor_distance():
    d = torch.randn(4, 7, generator=make_generator(1))
    targets = torch.randn(4, 3, 7, generator=make_generator(2))
    slow = [sum(sum((float(a)-float(b))**2 for a, b in zip(d[i], t))**.5 for t in targets[i])/3
            for i in range(4)]
    assert torch.allclose(descriptor_distance(d, targets), torch.tensor(slow), atol=1e-5)
    assert descriptor_distance(torch.full((1, 2), torch.nan), torch.zeros(1, 1, 2)).isnan().all()
    same = d.clone().requires_grad_()
    descriptor_distance(same, d[:, None]).sum().backward()
    assert (same.grad == 0).all()
    for bad in (targets[0], targets[:3], targets[:1], targets[:, :, :6], targets[:, :0]):
        with pytest.raises(ValueError, match='`targets`'):
            descriptor_distance(d, bad)
    with pytest.raises(ValueError, match='`targets`'):
        descriptor_distance(d[0], targets)


def test_queries_of_an_attack():
    x = images(4)
    targets = torch.randn(4, 3, 7, generator=make_generator(2))
    oracle = BlackBox(answer, 3)
    assert not is_spent(oracle)
    answers, distances = query_distances(oracle, x, targets.double())
    assert is_spent(oracle)
    assert answers.dtype == torch.float64
    assert torch.allclose(answers[:3].float(), answer(round_to_8bit(x[:3])), atol=1e-5)
    assert torch.equal(distances[:3], descriptor_distance(answers[:3], targets[:3].double()))
    assert answers[3].isnan().all()
    assert distances[3] == torch.inf
    _, far = query_distances(lambda o: answer(o)*torch.inf, x, targets)
    assert (far == torch.inf).all(), 'an infinite answer is none'
    for wrong in (lambda o: answer(o)[:, :6], lambda o: answer(o)[1:]):
        with pytest.raises(ValueError, match='`oracle` must answer with one descriptor'):
            query_distances(wrong, x, targets)
    assert not is_spent(answer)


@pytest.mark.parametrize('size', [None, 1, 4, 100])
def test_every_image_is_counted_and_sent_once(size):
    x = images()
    box = Box()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    oracle = quiet(box, 100, batch_size=size)
    twice = x[[0, 1, 0, 2, 3, 4, 1, 5]]
    before = twice.clone()
    d = oracle(twice.requires_grad_())
    assert d.shape == (8, 7)
    assert d.dtype == torch.float32
    assert not d.requires_grad
    assert torch.equal(twice, before)
    assert torch.allclose(d, answer(round_to_8bit(x))[[0, 1, 0, 2, 3, 4, 1, 5]], atol=1e-5)
    assert not torch.allclose(d[:2], answer(x)[:2],
                              atol=1e-5), 'the box must not see what a PNG cannot hold'
    assert [o for c in box.calls for o in c] == grey(x)
    assert [len(c) for c in box.calls] == {None: [6], 1: [1]*6, 4: [4, 2], 100: [6]}[size]
    assert (oracle.used, oracle.left, oracle.limit) == (6, 94, 100)
    for same in (round_to_8bit(x), x.double(), (round_to_8bit(x) + .4/255).clamp_max(1)):
        assert torch.equal(oracle(same), d[[0, 1, 3, 4, 5, 7]])
        assert box.asked == 6
    log = oracle.log
    assert list(log) == ['key', 'seconds', 'outcome', 'repeated']
    assert (log.outcome == 'answered').all()
    assert not log.repeated.any()
    assert log.key.nunique() == 6
    oracle(images(1, seed=5)), oracle(x.flip(3)[:1])
    assert oracle.used == 8
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_images_of_other_sizes_are_other_images():
    seen = []
    oracle = BlackBox(lambda x: seen.append(x.shape) or torch.ones(len(x), 2)*x.shape[2], 10)
    assert oracle(torch.zeros(1, 3, 2, 6))[0, 0] == 2
    assert oracle(torch.zeros(1, 3, 6, 2))[0, 0] == 6
    assert len(seen) == 2
    rigid = BlackBox(Box(), 20)
    rigid(images(2))
    assert rigid(torch.rand(1, 3, 6, 6)).isnan().all()
    assert rigid.log.outcome.str.startswith('failed: RuntimeError').sum() == 3
    for mixed in ([torch.zeros(3, 5, 4), torch.zeros(3, 6, 4)], (images(1),)):
        with pytest.raises(TypeError, match='`x` must be one tensor.*shapes'):
            rigid(mixed)


def test_seconds_are_shares_of_the_call():
    oracle = BlackBox(lambda x: time.sleep(.2) or answer(x), 10)
    start = time.perf_counter()
    oracle(images(4))
    assert .199 <= oracle.log.seconds.sum() <= time.perf_counter()-start
    assert oracle.log.seconds.nunique() == 1


@pytest.mark.parametrize('size', [None, 1, 2])
def test_the_budget_is_never_exceeded(size):
    x, box = images(), Box()
    oracle = BlackBox(box, 4, batch_size=size)
    d = oracle(x)
    assert d.isnan().all(1).tolist() == [False]*4 + [True]*2
    assert (oracle.used, oracle.left, box.asked) == (4, 0, 4)
    assert torch.equal(oracle(x.flip(0)).flip(0).nan_to_num(9), d.nan_to_num(9))
    assert box.asked == 4
    assert oracle._cache.grant(['another process'], 4) == []
    assert len(oracle.log) == 4
    x = images(8, seed=3)
    box = Box(images(8, seed=3), i0=fails())
    oracle = BlackBox(box, 5, batch_size=4)
    d = oracle(x)
    assert box.asked == oracle.used == len(oracle.log) == 5
    assert [len(c) for c in box.calls] == [4, 1]
    assert d.isnan().all(1).tolist() == [True]*4 + [False] + [True]*3


def test_one_bad_image_does_not_lose_the_others():
    x = images()
    box = Box(x, i2=fails())
    oracle = BlackBox(box, 100)
    d = oracle(x)
    assert d.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert torch.allclose(d[3:], answer(round_to_8bit(x))[3:], atol=1e-5)
    assert [len(c) for c in box.calls] == [6] + [1]*6 + [1]
    assert oracle.used == 13
    assert box.calls[-1] == grey(x[2:3])
    log = oracle.log
    assert log.outcome.tolist()[:6] == ['failed: OSError: no room']*6
    assert (log.outcome == 'answered').sum() == 5
    assert log.repeated.tolist() == [False]*6 + [True]*7
    for size, retries, used in ((1, 0, 6), (1, 3, 9), (6, 0, 6)):
        box = Box(x, i2=fails())
        oracle = BlackBox(box, 100, batch_size=size, retries=retries)
        if size == 6:
            with pytest.raises(RuntimeError, match='at least once'):
                oracle(x)
        else:
            assert oracle(x).isnan().any(1).sum() == 1
        assert oracle.used == box.asked == used
    box = Box(x, i2=[fails(), fails()])
    assert not BlackBox(box, 100)(x).isnan().any()
    assert box.asked == 6 + 6 + 1


def test_a_box_that_always_fails_says_why():
    oracle = BlackBox(fails(), 10)
    with pytest.raises(TypeError):
        oracle(None)
    oracle = BlackBox(lambda x: fails(ZeroDivisionError('w'*999))(), 10)
    with pytest.raises(RuntimeError, match='6 of 10 queries.*ZeroDivisionError: www'):
        oracle(images(2))
    assert oracle.log.outcome.str.len().max() == 300
    with pytest.raises(RuntimeError):
        oracle(images(2))
    assert oracle.used == 10


def test_not_a_number():
    x = images()
    box = Box(x, i1=torch.nan, i4=torch.inf)
    oracle = BlackBox(box, 100)
    d = oracle(x)
    assert d.isnan().all(1).tolist() == d.isnan().any(1).tolist() == [
        False, True, False, False, True, False]
    assert box.asked == 6
    assert oracle.log.outcome.tolist() == ['answered', 'not a number', 'answered', 'answered',
                                           'not a number', 'answered']
    box.bad.clear()
    assert not oracle(x).isnan().any()
    assert box.asked == 8
    blind = BlackBox(lambda x: torch.full((len(x), 7), torch.nan), 10)
    assert blind(x).shape == (6, 7)
    assert blind(x[:1]).isnan().all()
    assert blind.used == 7


def test_late_answers_are_thrown_away():
    x = images(3)
    gate = threading.Event()
    box = Box(x, i1=[lambda: gate.wait(20), lambda: gate.wait(20)])
    oracle = BlackBox(box, 100, timeout=.3)
    start = time.perf_counter()
    d = oracle(x)
    assert time.perf_counter()-start < 10
    assert not d.isnan().any()
    assert [len(c) for c in box.calls] == [1, 2, 1, 1, 1]
    assert oracle.log.outcome.tolist() == ['answered'] + ['late']*3 + ['answered', 'answered']
    assert oracle.log.seconds[3] >= .3
    rows = oracle.log
    assert all(o.daemon for o in threading.enumerate() if o is not threading.main_thread()), (
        'a stalled box must not keep the process alive')
    gate.set()
    time.sleep(.2)
    assert oracle.log.equals(rows)
    assert oracle.used == 6
    with pytest.raises(RuntimeError, match='the last: late'):
        BlackBox(lambda x: time.sleep(2), 4, timeout=.05)(x)
    with pytest.raises(KeyboardInterrupt):
        BlackBox(lambda x: fails(KeyboardInterrupt())(), 4, timeout=5)(x)


@pytest.mark.parametrize('timeout', [None, 30])
def test_an_interruption_passes_and_is_logged(tmp_path, timeout):
    x = images()
    box = Box(x, i3=fails(KeyboardInterrupt()))
    oracle = BlackBox(box, 100, cache=tmp_path/'a.db', batch_size=2, timeout=timeout)
    with pytest.raises(KeyboardInterrupt):
        oracle(x)
    known = 3 if timeout else 2
    assert oracle.used == known+2
    assert oracle.log.outcome.tolist() == ['answered']*known + ['interrupted']*2
    box.bad.clear()
    assert not oracle(x).isnan().any()
    assert oracle.used == 8
    assert grey(x)[0] not in sum(box.calls[2:], [])


wrong_answers = dict(rows=lambda x: answer(x)[:1], more=lambda x: torch.cat([answer(x)]*2),
                     flat=lambda x: answer(x)[0], deep=lambda x: answer(x)[None],
                     empty=lambda x: torch.zeros(len(x), 0), nothing=lambda x: None,
                     words=lambda x: ['a']*len(x), objects=lambda x: np.array([[None]]*len(x)))


@pytest.mark.parametrize('name', wrong_answers)
@pytest.mark.parametrize('timeout', [None, 30])
def test_answers_of_the_wrong_form(name, timeout):
    oracle = BlackBox(wrong_answers[name], 100, timeout=timeout)
    with pytest.raises((ValueError, TypeError), match='`black_box` must answer') as e:
        oracle(images(3))
    right = 1 if timeout and name in ('rows', 'flat') else 0
    assert oracle.used == (3 if right or not timeout else 1), 'with a time-out one is sent first'
    outcomes = oracle.log.outcome[right:]
    assert outcomes.str.startswith(f'failed: {type(e.value).__name__}: `black_box`').all()
    if name == 'rows':
        assert 'batch_size=1' in str(e.value)


def test_one_image_may_have_one_row_of_numbers():
    x = images(3)
    alone = BlackBox(lambda o: answer(o)[0].numpy(), 10, batch_size=1)
    assert torch.equal(alone(x), torch.cat([answer(round_to_8bit(o[None])) for o in x]))
    assert alone.used == 3
    with pytest.raises(ValueError, match='for 1 image. Answer with the numbers') as e:
        BlackBox(lambda o: answer(o)[None], 10, batch_size=1)(x)
    assert 'batch_size' not in str(e.value), 'it has it already'


class Clock:
    "A box that takes `pace(n)` seconds for a call of n images, without waiting"
    def __init__(self, monkeypatch, pace):
        self.now = 0.
        self.sizes = []
        def call(box, x, timeout):
            self.sizes.append(len(x))
            self.now += min(pace(len(x)), timeout or 9e9)
            if timeout and pace(len(x)) > timeout: raise TimeoutError
            return box(x)
        monkeypatch.setattr(module, '_call', call)
        monkeypatch.setattr(module, 'time', self)
    def perf_counter(self): return self.now


def test_a_slow_box_is_asked_once(monkeypatch):
    x = images(120)
    for pace, sizes in ((lambda n: .15*n, [1, 33, 33, 33, 20]),
                        (lambda n: 2 + .01*n, [1, 2, 4, 9, 21, 47, 36]),
                        (lambda n: 1e-5*n, [1, 100, 19])):
        clock = Clock(monkeypatch, pace)
        oracle = BlackBox(answer, 1000, batch_size=100, timeout=10)
        oracle(x)
        assert clock.sizes == sizes
        assert oracle.used == 120
        assert (oracle.log.outcome == 'answered').all()
    assert BlackBox(answer, 1000, batch_size=100)(x).isfinite().all()
    assert clock.sizes[-2:] == [100, 20], 'without a time-out nothing need be found out'


def test_a_late_call_is_followed_by_shorter_ones(monkeypatch):
    clock = Clock(monkeypatch, lambda n: 0 if n == 1 else .3*n)
    oracle = BlackBox(answer, 1000, batch_size=64, timeout=10)
    assert oracle(images(129)).isfinite().all()
    assert clock.sizes[:3] == [1, 64, 32]
    late = [n for n in clock.sizes if .3*n > 10 and n > 1]
    assert late == [64], 'half of it would be in time, and is'
    assert oracle.used == 129 + 64
    clock = Clock(monkeypatch, lambda n: 99)
    oracle = BlackBox(answer, 1000, timeout=10)
    with pytest.raises(RuntimeError, match='the last: late'):
        oracle(images(4))
    assert oracle.used == 12


def test_a_server_says_how_long_to_wait(server):
    box = http_blackbox(server + '/', timeout=7, batch_size=4)
    assert (box.timeout, box.batch_size) == (7, 4)
    assert torch.allclose(torch.from_numpy(box(images())).float(), answer(round_to_8bit(images())),
                          atol=1e-5), 'in two requests'
    assert BlackBox(box, 5).batch_size == 4
    assert BlackBox(box, 5, batch_size=3).batch_size == 3
    seen = []
    def asked(x):
        seen.append(len(x))
        return answer(x)
    asked.timeout = 60
    BlackBox(asked, 10)(images())
    assert seen == [1, 5]
    slow = BlackBox(http_blackbox(server + '/slow', timeout=.3), 2)
    with pytest.raises(RuntimeError, match='the last: late: `url`'):
        slow(images(2))
    for bad in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match='`batch_size` must'):
            http_blackbox(server, batch_size=bad)


def test_a_descriptor_keeps_its_length():
    oracle = BlackBox(lambda x: torch.ones(len(x), 8 if x.mean() > .5 else 7), 100)
    assert oracle(torch.zeros(2, 3, 2, 2)).shape == (2, 7)
    with pytest.raises(ValueError, match='8 numbers after earlier answers of 7'):
        oracle(torch.ones(2, 3, 2, 2))
    assert oracle.used == 2
    assert oracle(torch.zeros(2, 3, 2, 2)).shape == (2, 7)


def test_what_a_box_may_be():
    x = images()
    net = nn.Sequential(nn.Flatten(), nn.Linear(60, 7))
    with pytest.raises(ValueError, match='evaluation mode'):
        BlackBox(net, 5)
    for box in (net.eval(), lambda x: net(x).detach().numpy(), lambda x: net(x).double(),
                lambda x: net(x).detach().numpy()[:, ::-1].copy()[:, ::-1],
                lambda x: net(x).tolist()):
        d = BlackBox(box, 10)(x)
        assert type(d) is torch.Tensor
        assert d.dtype == torch.float32
        assert not d.requires_grad
        assert torch.allclose(d, net(round_to_8bit(x)).detach(), atol=1e-6)
    spoiler = BlackBox(lambda x: (answer(x), x.zero_())[0], 20, batch_size=2)
    assert torch.allclose(spoiler(x), answer(round_to_8bit(x)), atol=1e-5)
    buffer = torch.zeros(2, 7)
    lazy = BlackBox(lambda x: buffer.copy_(answer(x)), 20, batch_size=2)
    assert torch.allclose(lazy(x), answer(round_to_8bit(x)),
                          atol=1e-5), 'a box may use its memory again'


def test_wrong_settings():
    for bad in (None, 'box', 3, nn.Linear):
        with pytest.raises(TypeError if bad is not nn.Linear else Exception):
            BlackBox(bad, 5)(images())
    for name, values in dict(limit=(0, -1, 2.5, 1e3, torch.nan, None, True, '9'),
                             batch_size=(0, -1, 1.5, True), retries=(-1, .5, None),
                             timeout=(0, -1, torch.nan, torch.inf, 'x')).items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f'`{name}` must.*got'):
                BlackBox(answer, **{'limit': 5, name: value})
    assert BlackBox(answer, np.int64(5), retries=0, timeout=1).left == 5
    oracle = BlackBox(answer, 5)
    for bad in (images()*2, images()[:0], images()[0], to_uint8(images()),
                torch.zeros(1, 3, 5, 4, dtype=torch.uint8)):
        with pytest.raises((ValueError, TypeError), match='`x`'):
            oracle(bad)
    for kw in (dict(n=0), dict(n=1.5), dict(tolerance=-1), dict(tolerance=torch.nan)):
        with pytest.raises((ValueError, TypeError), match=f'`{next(iter(kw))}`'):
            oracle.repeats(images(1), **kw)
    assert oracle.used == 0


def test_repeats():
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        box = Box(x, i1=torch.nan)
        oracle = BlackBox(box, 100)
        table = oracle.repeats(x[[0, 1, 2, 0]], n=3)
        assert box.asked == oracle.used == 12
        assert table.answers.tolist() == [4, 0, 4, 4]
        assert table.difference.fillna(-1).tolist() == [0, -1, 0, 0]
        assert table.key[0] == table.key[3]
        short = BlackBox(Box(), 3)
        table = short.repeats(x[:2], n=5)
        assert table.answers.tolist() == [2, 1]
        assert table.difference.isna().tolist() == [False, True]
        assert short.left == 0
    step = iter(range(100))
    drift = BlackBox(lambda x: torch.tensor([[0., 1.]])*next(step) + torch.zeros(len(x), 2), 100)
    with pytest.warns(UserWarning, match='up to 2: it is not deterministic') as said:
        table = drift.repeats(x[:2])
    assert said[0].filename == __file__, 'the first answer is kept'
    assert table.difference.tolist() == [2, 2], 'the first answer is kept'
    assert (drift(x[:2])[:, 1] == 0).all(), 'the first answer is kept'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        drift.repeats(x[:2], n=1, tolerance=99)


def test_the_file_goes_on_where_it_stopped(tmp_path):
    x = images()
    path = tmp_path/'deep'/'asked.db'
    first = BlackBox(Box(x, i2=fails()), 100, cache=path)
    d = first(x)
    log = first.log
    box = Box()
    second = BlackBox(box, 15, cache=str(path))
    assert second.used == 13
    assert second.left == 2
    assert second.log.equals(log)
    assert torch.equal(second(x)[[0, 1, 3, 4, 5]], d[[0, 1, 3, 4, 5]])
    assert box.calls == [grey(x[2:3])]
    second(images(4, seed=1))
    assert box.asked == 2, 'one file, one budget'
    assert second.left == 0, 'one file, one budget'
    assert first.used == 15, 'one file, one budget'
    third = BlackBox(called('the same box', fails()), 3, cache=path)
    assert third.left == 0
    assert torch.equal(third(x), second(x))
    assert BlackBox(Box(), 3).used == 0
    other = BlackBox(called('the same box', lambda x: torch.ones(len(x), 9)), 100, cache=path)
    with pytest.raises(ValueError, match='9 numbers after earlier answers of 7.*`cache`'):
        other(images(1, seed=2))
    assert torch.equal(third(x), second(x))


def test_a_cache_of_another_box_is_refused(tmp_path):
    path = tmp_path/'asked.db'
    def refused(box):
        with pytest.raises(ValueError, match=f'`cache` must be .* of the same box; {path} holds'):
            BlackBox(box, 9, cache=path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(7)).eval()
    net(images(1))
    shifted = lambda by: lambda x: answer(x) + by
    for one, two in ((net, copy.deepcopy(net)), (shifted(1), shifted(2)),
                     (http_blackbox('http://a/b'), http_blackbox('http://a/c'))):
        if one is net:
            two[1].bias.data += 1
        BlackBox(one, 9, cache=path)
        BlackBox(copy.deepcopy(one), 9, cache=path)
        refused(two)
        with sqlite3.connect(path) as db:           # as the error says; and as an older version wrote it
            db.execute('pragma user_version=0')
        BlackBox(two, 9, cache=path)
        refused(one)
        path.unlink()
    BlackBox(http_blackbox('http://a/b'), 9, cache=path)
    BlackBox(http_blackbox('http://a/b', timeout=3), 9, cache=path)
    hidden = torch.jit.trace(net, images(1))        # nobody can tell it from another
    assert BlackBox(hidden, 9, cache=path).used == 0


def test_files_that_are_not_ours(tmp_path):
    def refused(path, why):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ValueError, match=f'`cache` must be.*{why}'):
            BlackBox(answer, 5, cache=path)
        assert before is None or path.read_bytes() == before
        assert not [o for o in tmp_path.iterdir() if o.name.startswith(path.name + '-')]
    (tmp_path/'a.txt').write_text('my thesis\n'*1000)
    refused(tmp_path/'a.txt', 'not a database')
    with sqlite3.connect(tmp_path/'b.db') as db:
        db.execute('create table diary (day, text)')
    db.close()
    refused(tmp_path/'b.db', 'another program')
    db = sqlite3.connect(tmp_path/'g.db')
    db.execute('pragma application_id=5')
    db.close()
    refused(tmp_path/'g.db', 'another program')
    BlackBox(answer, 900, cache=tmp_path/'c.db')(images(200))
    raw = (tmp_path/'c.db').read_bytes()
    (tmp_path/'d.db').write_bytes(raw[:len(raw)//2])
    refused(tmp_path/'d.db', '')
    (tmp_path/'e.db').write_bytes(raw[:4096] + os.urandom(len(raw)-4096))
    refused(tmp_path/'e.db', '')
    refused(tmp_path, '')
    (tmp_path/'f.db').touch()
    BlackBox(answer, 5, cache=tmp_path/'f.db')(images(1))
    assert BlackBox(answer, 5, cache=tmp_path/'f.db').used == 1


@pytest.mark.parametrize('room', (0, 12))
def test_a_full_disk(tmp_path, room):
    "SQLite itself says that there is no room; what was answered before is kept, every query counted"
    box = Box()
    path = tmp_path/'cache.db'
    oracle = BlackBox(box, 900, cache=path, batch_size=100)
    known = oracle(images(3))
    pages = oracle._cache.get('pragma page_count')[0][0]
    oracle._cache.db.execute(f'pragma max_page_count={pages + room}')
    with pytest.raises(OSError, match='could not write .*cache.db: database or disk is full. '
                                      'Every answer .*free some space'):
        oracle(images(800, 1))
    outcomes = oracle.log.outcome[3:]
    assert (outcomes != 'answered').all() if room == 0 else 'interrupted' in set(outcomes)
    asked = box.asked
    again = BlackBox(box, 2000, cache=path, batch_size=100)
    assert torch.equal(again(images(3)), known)
    assert box.asked == asked
    assert again.used >= asked
    assert torch.equal(again(images(800, 1)), answer(round_to_8bit(images(800, 1))))


script = '''
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
from test_blackbox import answer, images
from robustnb.descriptors.blackbox import BlackBox
asked = 0
def box(x):
    global asked
    asked += len(x)
    if asked > 4:
        print('now', flush=True)
        time.sleep(60)
    return answer(x)
box.source = 'the same box'
BlackBox(box, 100, cache=sys.argv[1], batch_size=2)(images())
'''


def test_a_kill_loses_nothing(tmp_path):
    path = tmp_path/'asked.db'
    here = os.path.dirname(__file__)
    run = subprocess.Popen([sys.executable, '-c', script, str(path), here],
                           stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == 'now\n'
    finally:
        run.kill() if os.name == 'nt' else run.send_signal(signal.SIGKILL)
        run.communicate()
    x, box = images(), Box()
    oracle = BlackBox(box, 100, cache=path)
    assert oracle.used == 6
    assert oracle.log.outcome.tolist() == ['answered']*4 + ['interrupted']*2
    assert torch.allclose(oracle(x), answer(round_to_8bit(x)), atol=1e-5)
    assert box.calls == [grey(x[4:])]
    assert oracle.used == 8
    assert oracle.log.repeated.tolist() == [False]*6 + [True]*2


class Evil:
    def __reduce__(self): return os.mkdir, ('evil',)


def npy(a, **kw):
    np.save(f := io.BytesIO(), a, **kw)
    return f.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def do_POST(self):
        x = np.load(io.BytesIO(self.rfile.read(int(self.headers['Content-Length']))),
                    allow_pickle=False)
        assert x.dtype == np.uint8
        assert x.shape[3] == 3
        good = npy(answer(to_float(x)).numpy().astype(np.float64))
        zipped = io.BytesIO()
        np.savez(zipped, a=np.ones((len(x), 7)))
        huge = npy(np.ones((1, 7))).replace(b'(1, 7), }' + b' '*10, b'(99999999999, 7), }')
        reply = {'/': good, '/garbage': b'<html>hello</html>', '/pickle': pickle.dumps(Evil()),
                 '/objects': npy(np.array([[Evil()]]*len(x), dtype=object), allow_pickle=True),
                 '/cut': good[:-20], '/rows': npy(np.ones((len(x)+1, 7))),
                 '/flat': npy(np.ones(len(x))), '/text': npy(np.array([['a']]*len(x))),
                 '/zip': zipped.getvalue(), '/empty': b'', '/long': bytes(2**20*len(x)+1),
                 '/header': huge, '/whole': npy(np.ones((len(x), 7), int)),
                 '/500': b'out of memory', '/slow': good, '/dead': good, '/status': b''}[self.path]
        if self.path == '/slow':
            time.sleep(1)
        if self.path == '/status':
            self.close_connection = True
            return self.wfile.write(b'garbage\r\n\r\n')
        self.send_response(500 if self.path == '/500' else 200)
        self.send_header('Content-Length', str(len(reply) + (99 if self.path == '/dead' else 0)))
        self.end_headers()
        try:
            self.wfile.write(reply[:-30] if self.path == '/dead' else reply)
        except OSError:
            pass
        if self.path == '/dead':
            self.close_connection = True


@pytest.fixture(scope='module')
def server():
    old = {k: os.environ.get(k) for k in ('no_proxy', 'NO_PROXY')}
    os.environ.update(no_proxy='127.0.0.1', NO_PROXY='127.0.0.1')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    for k, v in old.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})


def test_a_server_says_what_the_box_says(server):
    x = images()
    oracle = BlackBox(http_blackbox(server + '/'), 100, batch_size=4)
    assert torch.allclose(oracle(x), answer(round_to_8bit(x)), atol=1e-5)
    assert oracle.used == 6
    assert (http_blackbox(server + '/whole')(x) == 1).all()


@pytest.mark.parametrize('path, error, words', [
    ('garbage', ValueError, "begin with b'<html>"), ('pickle', ValueError, 'npy array'),
    ('objects', ValueError, 'npy array'), ('cut', ValueError, 'npy array of 6 rows'),
    ('dead', (ValueError, ConnectionError), '`url`'),
    ('rows', ValueError, '6 rows.*shape .7, 7'), ('flat', ValueError, '6 rows.*shape .6,'),
    ('text', ValueError, 'rows of numbers'), ('zip', ValueError, 'an archive'),
    ('empty', ValueError, '0 bytes'),
    ('header', ValueError, 'allocate'), ('long', ValueError, f'at most {6*2**20} bytes'),
    ('status', ConnectionError, 'gave no answer.*BadStatusLine'),
    ('500', ConnectionError, 'HTTP 500.*out of memory'),
    ('slow', TimeoutError, 'timed out.*timeout 0.3 s')])
def test_servers_that_lie(server, path, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as e:
        http_blackbox(f'{server}/{path}', timeout=.3 if path == 'slow' else 10)(images())
    assert str(e.value).startswith(f'`url` {server}/{path}')
    assert not os.path.exists('evil')
    oracle = BlackBox(http_blackbox(f'{server}/{path}', timeout=.3 if path == 'slow' else 10),
                      2, retries=1)
    with pytest.raises(RuntimeError, match='2 of 2 queries.*`url`'):
        oracle(images(1))


def test_a_server_that_is_not_there(server, monkeypatch):
    box = http_blackbox('http://127.0.0.1:9')
    with pytest.raises(ConnectionError, match='refused.*running'):
        box(images())
    for bad in ('file:///etc/passwd', 'ftp://host/x', '127.0.0.1:80', None, b'http://x'):
        with pytest.raises(ValueError, match='`url` must start with'):
            http_blackbox(bad)
    for bad in (0, -1, torch.nan, torch.inf, None):
        with pytest.raises(ValueError, match='`timeout`'):
            http_blackbox('http://127.0.0.1:9', timeout=bad)
    monkeypatch.setattr(module, '_most_sent', 400)
    with pytest.raises(ValueError, match='6 images of .* bytes.*batch_size'):
        http_blackbox(server)(images())
    assert http_blackbox(server + '/')(images(2)).shape == (2, 7)


def test_any_thread_may_ask_and_the_budget_is_one(tmp_path):
    for cache in (None, tmp_path/'asked.db'):
        box = BlackBox(answer, 20, cache)
        x = images(30)
        said = {}
        def ask(part):
            for i in part:
                try:
                    said[i] = box(x[i:i+1])[0]
                except RuntimeError:
                    said[i] = None
        threads = [threading.Thread(target=ask, args=(range(k, 30, 5),)) for k in range(5)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert box.used == len(box.log) == 20
        known = [i for i, d in said.items() if d is not None and d.isfinite().all()]
        assert len(known) == 20
        for i in known:
            assert torch.equal(said[i], answer(round_to_8bit(x[i:i+1]))[0])


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path):
    gate = threading.Barrier(4)
    said = []
    def ask(i):
        gate.wait()
        try:
            said.append(BlackBox(answer, 9, cache=tmp_path/f'{k}.db')(images(2)))
        except Exception as e:
            said.append(e)
    for k in range(40):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert len(said) == 160
    wrong = [o for o in said if not torch.is_tensor(o)]
    assert not wrong, wrong[0]
    assert all(torch.equal(o, said[0]) for o in said)


def test_a_file_that_stays_in_use_is_named(tmp_path, monkeypatch):
    db = module._open(tmp_path/'a.db')
    db.execute('pragma journal_mode=delete')
    db.execute('begin')
    db.execute('select count(*) from asked').fetchone()
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with pytest.raises(ValueError, match='a.db cannot be used .*locked'):
        BlackBox(answer, 9, cache=tmp_path/'a.db')
    db.execute('commit')
    db.close()
    assert BlackBox(answer, 9, cache=tmp_path/'a.db')(images(2)).shape == (2, 7)
