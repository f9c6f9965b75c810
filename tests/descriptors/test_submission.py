"""The score against a slow loop, the rule against scikit-image, a judge that names every broken
rule and runs nothing, and comparisons that survive a kill."""
import io, itertools, math, pickle, random, struct, zipfile, zlib
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from robustnb.descriptors import submission as V
from robustnb.core import make_generator, to_float, to_uint8
from robustnb.data import NamedSet
from robustnb.attacks.ssim_rule import SSIM
from robustnb.attacks.ssim_rule import file_ssim
from robustnb.descriptors.pairs import make_pairs, Pairs, read_pairs, write_pairs
from robustnb.descriptors.submission import (
    check_submission, organiser_layout, score_pairs, write_submission)
from robustnb.descriptors.comparison import ablation, attack_table, attacked_images, compare_attacks

rng = np.random.default_rng(0)
WEIGHTS = torch.randn(16, 3, 3, 3, generator=make_generator(0))


@pytest.fixture(autouse=True)
def quiet():
    "No function touches the global random numbers"
    torch_state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    py_state = random.getstate()
    yield
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (np_state == np.random.get_state()[1]).all()
    assert py_state == random.getstate()


def box(x): return F.normalize(F.conv2d(x, WEIGHTS, stride=5).flatten(1), dim=1)


class Counted:
    "A small oracle: counts, and says NaN when its budget is spent"
    def __init__(self, limit, lost=()): self.limit, self.used = limit, 0
    left = property(lambda self: self.limit-self.used)

    def __call__(self, x):
        n = min(len(x), self.left)
        self.used += n
        d = box(x)
        d[n:] = math.nan
        return d


@pytest.fixture(scope='module')
def faces():
    "Smooth images, 4 persons x 6"
    soft = torch.rand(24, 3, 4, 5, generator=make_generator(1))
    return NamedSet(to_uint8(F.interpolate(soft, size=(16, 18), mode='bilinear')),
                    np.arange(24)//6, ('ann', 'bob', 'cat', 'dan'),
                    [f'{p}{i}.jpg' for p in 'abcd' for i in range(6)])


@pytest.fixture(scope='module')
def pairs(faces): return make_pairs(faces, 3, 2, persons=('ann', 'bob'))


@pytest.fixture(scope='module')
def entry(faces, pairs):
    "A submission that obeys: x, x_adv, targets (P,T,D)"
    x = faces.x[faces.at(pairs.sources).ravel()]
    x_adv = x.clone()
    x_adv[:, 0, 3, 4] = to_float(to_uint8(1-x[:, 0, 3, 4][:, None, None, None]))[:, 0, 0, 0]
    assert 0 < (1-file_ssim(to_uint8(x), to_uint8(x_adv))).min()
    assert file_ssim(to_uint8(x), to_uint8(x_adv)).min() > .95
    return x, x_adv, box(faces.x)[faces.at(pairs.targets)]


# ---- pairs

def test_pairs_survive_the_file(tmp_path, faces, pairs):
    assert read_pairs(write_pairs(pairs, tmp_path/'p.csv'), faces) == pairs
    assert len(pairs) == 2
    lines = (tmp_path/'p.csv').read_text().split('\n')
    assert lines[0] == 'source_imgs,target_imgs'
    assert lines[1] == '|'.join(pairs.sources[0]) + ',' + '|'.join(pairs.targets[0])
    assert len(lines) == 4
    (tmp_path/'q.csv').write_text(
        '\ufefftarget_imgs,id,source_imgs\r\nb1|b2,0,a1\r\n\r\n"a,1|a2",1,b1\r\n', encoding='utf-8')
    assert read_pairs(tmp_path/'q.csv') == Pairs((('a1',), ('b1',)), (('b1', 'b2'), ('a,1', 'a2')))


@pytest.mark.parametrize('text, problem', [
    ('sources,target_imgs\na,b\n',
     "columns must be source_imgs and target_imgs; got 'sources', 'target_imgs'"),
    ('', 'columns must be .* got none'), ('source_imgs,target_imgs\n', 'no pairs'),
    ('source_imgs,target_imgs,source_imgs\na,b,c\n', 'columns must be'),
    ('source_imgs,target_imgs\na,b\na|b,c|d,e\n', 'row 2 has 3'),
    ('source_imgs,target_imgs\na\n', 'row 1 has 1'),
    ('source_imgs,target_imgs\na|b,c\na,c\n',
     'same number of images in every pair, at least 1; got 1 and 2'),
    ('source_imgs,target_imgs\na,c\na,c|d\n', '`targets` must have the same number'),
    ('source_imgs,target_imgs\na|a,b\n', "sources.0.. must be different names"),
    ('source_imgs,target_imgs\nz,y\na|b,c|b\n', "same number"),
    ('source_imgs,target_imgs\na|b,c|b\n', "pair 0 has 'b' on both sides"),
    ('source_imgs,target_imgs\n../a,b\n', "plain file names.*'../a'"),
    ('source_imgs,target_imgs\n,b\n', 'plain file names'),
    ('source_imgs,target_imgs\na,b|\n', 'plain file names'),
    ('source_imgs,target_imgs\n"a,b\n', 'is wrong'),
    ('source_imgs,target_imgs\na\0,b\n', 'is wrong')])
def test_a_wrong_pairs_file_is_refused(tmp_path, text, problem):
    (tmp_path/'p.csv').write_bytes(text.encode())
    with pytest.raises(ValueError, match=problem) as e:
        read_pairs(tmp_path/'p.csv')
    assert 'p.csv' in str(e.value)


def test_missing_images_are_all_counted_and_five_shown(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path/'none.csv')
    (tmp_path/'b.csv').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='b.csv is wrong'):
        read_pairs(tmp_path/'b.csv')
    path = write_pairs(Pairs((tuple('abcd'),), (tuple('efgh'),)), tmp_path/'p.csv')
    with pytest.raises(ValueError, match="7 of 8 are missing: 'a', 'b', 'd', 'e', 'f' and 2 more"):
        read_pairs(path, ['c'])
    assert len(read_pairs(path, list('abcdefgh'))) == 1
    with pytest.raises(ValueError, match='same pairs; got 1 and 2'):
        Pairs((('a',),), (('b',), ('c',)))
    with pytest.raises(ValueError, match='at least 1; got 0'):
        Pairs(((),), (('b',),))


def test_file_names_of_changed_images():
    assert Pairs((('a.jpg', 'b.c.png'), ('d', 'e.pgm')),
                 (('x',), ('y',))).files == ('a.png', 'b.c.png', 'd.png', 'e.png')
    assert Pairs((('a.jpg',), ('a.jpg',)), (('x',), ('y',))).files == ('0000_a.png', '0001_a.png')
    with pytest.raises(ValueError, match='more than once'):
        Pairs((('a.jpg', 'a.png'),), (('x',),)).files


def test_made_pairs(faces):
    every = make_pairs(faces, 3, 2)
    s = faces.at(every.sources)
    t = faces.at(every.targets)
    got = [(faces.y[a][0], faces.y[b][0]) for a, b in zip(s, t)]
    assert got == [(a, b) for a in range(4) for b in range(4) if a != b]
    assert s.shape == (12, 3)
    assert t.shape == (12, 2)
    assert all(len(set(faces.y[o])) == 1 for o in [*s, *t])
    assert not set(s.flat) & set(t.flat)
    assert every == make_pairs(faces, 3, 2) != make_pairs(faces, 3, 2, seed=1)
    # each person has a choice of its own
    assert len({tuple(o % 6) for o in s}) > 1
    rows = lambda p: list(zip(p.sources, p.targets))
    some = make_pairs(faces, 3, 2, limit=7)
    fewer = make_pairs(faces, 3, 2, limit=4)
    assert set(rows(fewer)) < set(rows(some)) < set(rows(every))
    assert len(some) == 7
    assert rows(some) == [o for o in rows(every) if o in rows(some)]
    assert rows(some) != rows(every)[:7]
    assert set(rows(make_pairs(faces, 3, 2, persons=('dan', 'bob')))) < set(rows(every))
    assert make_pairs(
        pd.DataFrame(dict(name=faces.names, person=[faces.classes[i] for i in faces.y])), 3,
        2) == every
    assert make_pairs(pd.DataFrame(dict(name=list('abcd'), person=[1, 1, 2, 2])), 1,
                      1).targets[0][0] in 'cd'
    for more, problem in (
            (dict(n_source=5, n_target=2), r"5\+2 images of each person; 'ann' has 6"),
            (dict(limit=13), 'from 1 to 12'), (dict(limit=0), 'from 1 to 12'),
            (dict(persons=['ann']), 'at least 2'),
            (dict(persons=['ann', 'ann']), 'different persons'),
            (dict(persons=['ann', 'eve']), "'eve' has 0"),
            (dict(n_source=0), 'at least 1 image'), (dict(n_target=0), 'at least 1 image')):
        with pytest.raises(ValueError, match=problem):
            make_pairs(faces, **{**dict(n_source=3, n_target=2), **more})
    with pytest.raises(TypeError, match="got .'name', 'who'"):
        make_pairs(pd.DataFrame(dict(name=['a'], who=['b'])))
    with pytest.raises(ValueError, match='more than once'):
        make_pairs(pd.DataFrame(dict(name=['a', 'a'], person=[1, 2])))


# ---- the score

def test_score_is_the_organisers_loop():
    P, S, T, D = 7, 5, 4, 6
    before = rng.normal(size=(P, S, D))
    after = rng.normal(size=(P, S, D))
    targets = rng.normal(size=(P, T, D))
    # rows of a file, reshaped as the organiser does
    stacked = [np.ascontiguousarray(o.reshape(-1, D)).reshape((o.shape[1], P, D), order='F')
               for o in (before, after, targets)]
    want = np.zeros((2, P))
    for k, d in enumerate(stacked[:2]):
        for p in range(P):
            for i, j in itertools.product(range(S), range(T)):
                want[k, p] += (
                    math.sqrt(sum((d[i, p, c]-stacked[2][j, p, c])**2 for c in range(D)))/S/T)
    table = score_pairs(before, targets, after)
    assert np.allclose(table.before, want[0])
    assert np.allclose(table.after, want[1])
    assert list(table) == ['pair', 'before', 'after']
    assert table.pair.tolist() == list(range(P))
    mine = [organiser_layout(o) for o in stacked]
    assert all(np.array_equal(a, b) for a, b in zip(mine, (before, after, targets)))
    assert np.array_equal(organiser_layout(after).reshape(-1, D, order='F'), after.reshape(-1, D))
    assert organiser_layout(after).shape == (S, P, D)
    assert list(score_pairs(torch.tensor(before, requires_grad=True), targets)) == [
        'pair', 'before']


def test_descriptors_that_do_not_fit_are_refused():
    good = rng.normal(size=(3, 5, 4))
    for bad, problem in ((good[:2], 'same pairs'), (good[..., :3], 'descriptor length'),
                         (good[0], r'\(P,S,D\); got shape \(5, 4\)'),
                         (good[:0], 'must be descriptors')):
        with pytest.raises(ValueError, match=problem):
            score_pairs(bad, good)
        with pytest.raises(ValueError, match='`changed`'):
            score_pairs(good, good, bad)
    holed = good.copy()
    holed[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match=r'`targets` must be finite; the descriptor at \[1, 2\]'):
        score_pairs(good, holed)
    with pytest.raises(ValueError, match="order='F'"):
        organiser_layout(good[0])


# ---- submissions

def test_a_submission_holds_exactly_the_images(tmp_path, pairs, entry):
    x, x_adv, _ = entry
    d = box(x_adv)
    path = write_submission(tmp_path/'s.zip', pairs.files, x_adv, x, d)
    with zipfile.ZipFile(path) as z:
        assert z.namelist() == [*pairs.files, 'descriptors.npy']
        assert z.testzip() is None
        for name, want in zip(pairs.files, to_uint8(x_adv)):
            with Image.open(z.open(name)) as im:
                assert im.format == 'PNG'
                assert im.mode == 'RGB'
                assert np.array_equal(np.array(im), want)
        rows = np.load(z.open('descriptors.npy'), allow_pickle=False)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, d.numpy())
    again = write_submission(tmp_path/'t.zip', list(pairs.files), to_uint8(x_adv),
                             list(to_uint8(x)), d.numpy())
    assert again.read_bytes() == path.read_bytes()
    rounded = write_submission(tmp_path/'u.zip', pairs.files, (x_adv+.4/255).clamp(0, 1), x, d)
    assert rounded.read_bytes() == path.read_bytes()
    assert sorted(o.name for o in tmp_path.iterdir()) == ['s.zip', 't.zip', 'u.zip']


def test_a_submission_is_refused_and_leaves_what_was_there(tmp_path, pairs, entry):
    x, x_adv, _ = entry
    d = box(x_adv)
    names = pairs.files
    path = tmp_path/'s.zip'
    path.write_bytes(b'before')
    far = x_adv.clone()
    far[[1, 4]] = 1-x[[1, 4]]
    worst = file_ssim(to_uint8(x), to_uint8(far))[1]
    with pytest.raises(ValueError,
                       match=f"2 of 6 have less: '{names[1]} {worst:.6f}', '{names[4]}"):
        write_submission(path, names, far, x, d)
    level = float(file_ssim(to_uint8(x), to_uint8(x_adv)).min())
    with pytest.raises(ValueError, match='1 of 6 have less'):
        write_submission(path, names, x_adv, x, d, np.nextafter(level, 1))
    for change, problem in (
            (dict(names=names[1:]), 'got 5, 6, 6 and 6'),
            (dict(descriptors=d[1:]), '6, 6, 6 and 5'), (dict(x=x[1:]), 'must belong'),
            (dict(names=['../a.png', *names[1:]]), 'plain file names'),
            (dict(names=['a.jpg', *names[1:]]), "end in .png; got 'a.jpg'"),
            (dict(names=[names[1], *names[1:]]), 'more than once'),
            (dict(descriptors=d*math.nan), 'finite'), (dict(descriptors=d[:, 0]), r'\(N,D\)'),
            (dict(x_adv=[*to_uint8(x)[:5], to_uint8(x)[5, 1:]]),
             r'`x_adv` must be images of one size; got \(15, 18, 3\), \(16, 18, 3\)'),
            (dict(x_adv=list(x[:5])+[x[5, :, 1:]]), 'one size'), (dict(x=[]), 'one size; got none'),
            (dict(x=x[:, :1]), '3 channels'), (dict(x=255*x), r'\[0, 1\]'),
            (dict(level=0), '`level`'), (dict(level=math.nan), '`level`'),
            (dict(level=1.01), '`level`'), (dict(x_adv=x_adv[:, :, :-1]), 'like `images`')):
        with pytest.raises(ValueError, match=problem):
            write_submission(**{**dict(path=path, names=names, x_adv=x_adv, x=x, descriptors=d),
                                **change})
    assert path.read_bytes() == b'before'
    assert len(list(tmp_path.iterdir())) == 1
    with zipfile.ZipFile(write_submission(path, names, x_adv, x, d, level)) as z:
        assert len(z.namelist()) == 7


def test_half_a_submission_is_never_left(tmp_path, pairs, entry, monkeypatch):
    def broken(a): raise KeyboardInterrupt
    monkeypatch.setattr(V, '_npy', broken)
    with pytest.raises(KeyboardInterrupt):
        write_submission(tmp_path/'s.zip', pairs.files, entry[1], entry[0], box(entry[1]))
    assert not list(tmp_path.iterdir())


# ---- the judge

def judged(path, *a, **k): return check_submission(path, *a, **k).set_index('rule')


def rezip(path, change, names=None):
    "The zip file with entries replaced, added, or dropped (None)"
    with zipfile.ZipFile(path) as z:
        held = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, raw in (held | change).items():
            if raw is not None:
                z.writestr(n, raw)
    return path


@pytest.fixture
def sent(tmp_path, pairs, entry):
    return write_submission(tmp_path/'in'/'s.zip', pairs.files, entry[1], entry[0], box(entry[1]))


def test_a_good_submission_is_ok_with_its_score(sent, faces, pairs, entry):
    x, x_adv, targets = entry
    table = check_submission(sent, faces, pairs, oracle=box)
    assert table.rule.tolist() == list(V._rules)
    assert set(table.verdict) == {'ok'}
    assert list(table) == ['rule', 'verdict', 'found', 'what_to_do', 'value']
    score = torch.stack([torch.cdist(box(x_adv)[3*p:3*p+3], targets[p]).mean()
                         for p in range(2)]).mean().item()
    value = table.set_index('rule').value
    assert value['score'] == pytest.approx(score, abs=1e-6)
    assert value['ssim'] == pytest.approx(file_ssim(to_uint8(x), to_uint8(x_adv)).min(), abs=0)
    assert value['spot check'] < 1e-5
    known = judged(sent, faces, pairs, targets=targets)
    assert known.value['score'] == pytest.approx(score, abs=1e-6)
    assert known.verdict['spot check'] == 'not checked'
    blind = judged(sent, faces, pairs)
    assert blind.verdict['score'] == blind.verdict['spot check'] == 'not checked'
    assert blind.verdict[:'descriptors finite'].eq('ok').all()
    with zipfile.ZipFile(sent) as z:
        z.extractall(sent.parent/'folder')
    assert check_submission(sent.parent/'folder', faces, pairs,
                            oracle=box).drop(0).equals(table.drop(0))


def test_the_oracle_is_asked_for_the_sample_and_each_target_once(sent, faces, pairs):
    oracle = Counted(10**6)
    twice = (Pairs(pairs.sources, (pairs.targets[0],)*2)
             if not set(pairs.targets[0]) & set(pairs.sources[1]) else None)
    assert judged(sent, faces, twice, oracle=oracle, spot=4).verdict['spot check'] == 'ok'
    assert oracle.used == 4 + 2
    oracle = Counted(4)
    table = judged(sent, faces, pairs, oracle=oracle, spot=4)
    assert table.verdict['spot check'] == 'ok'
    assert table.verdict['score'] == 'not checked'
    assert 'questions left' in table.what_to_do['score']
    assert '2 agree' in judged(sent, faces, pairs, oracle=Counted(2), spot=4).found['spot check']
    assert judged(sent, faces, pairs, oracle=Counted(0)).verdict['spot check'] == 'not checked'
    assert judged(sent, faces, pairs, oracle=box, spot=0).verdict['spot check'] == 'not checked'


def test_a_single_pair_has_a_score_without_an_interval(tmp_path, faces, pairs, entry):
    one, (x, x_adv, _) = Pairs(pairs.sources[:1], pairs.targets[:1]), entry
    table = judged(write_submission(tmp_path/'s.zip', one.files, x_adv[:3], x[:3], box(x_adv[:3])),
                   faces, one, oracle=box)
    assert set(table.verdict) == {'ok'}
    assert '[' not in table.found['score']
    assert '1 pairs' in table.found['score']


def png(shape=(16, 18), depth=8, colour=2, size=None, extra=b'', data=None):
    "A PNG file by hand"
    def chunk(kind, data):
        return struct.pack('>I',
                           len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    raw = b''.join(b'\0' + bytes(shape[1]*channels*depth//8)
                   for _ in range(shape[0])) if data is None else data
    palette = chunk(b'PLTE', bytes(768)) if colour == 3 else b''
    height, width = size or shape
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack(
        '>IIBBBBB', width, height, depth, colour, 0, 0,
        0)) + palette + extra + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def saved(a, kind='PNG', **k):
    held = io.BytesIO()
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(held, kind, **k)
    return held.getvalue()


BLACK = np.zeros((16, 18, 3), np.uint8)
MOVING = dict(save_all=True, append_images=[Image.fromarray(BLACK+9)])


@pytest.mark.parametrize('raw, problem', [
    (png(colour=6), 'RGBA of 8 bits'), (png(depth=16), 'RGB of 16 bits'),
    (png(colour=3), 'palette of 8 bits'), (png(colour=0), 'grey of 8 bits'),
    (png(depth=16, colour=0), 'grey of 16 bits'),
    (png(colour=4), 'grey with transparency'), (png(shape=(18, 16)), '16x18 pixels, not 18x16'),
    (png(size=(60000, 60000)), '60000x60000 pixels'), (saved(BLACK, 'JPEG'), 'not a PNG'),
    (b'', 'not a PNG'),
    (saved(BLACK, 'BMP'), 'not a PNG'), (b'\x89PNG\r\n\x1a\n' + bytes(9), 'not a PNG'),
    (saved(BLACK)[:-30], ''), (png(data=b'\0'*40), ''), (saved(BLACK) + bytes(2**20), 'more than'),
    (png(extra=chunk(b'IHDR', struct.pack('>IIBBBBB', 9000, 9000, 8, 2, 0, 0, 0))), 'plain image'),
    (png(extra=chunk(b'tRNS', bytes(6))), 'plain image'), (saved(BLACK, **MOVING), 'plain image'),
    (png(extra=chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10**8)))), '')])
def test_an_image_that_is_no_plain_png_is_named(sent, faces, pairs, raw, problem):
    assert Image.open(io.BytesIO(saved(BLACK, **MOVING))).n_frames == 2
    name = pairs.files[2]
    table = judged(rezip(sent, {name: raw}), faces, pairs, oracle=box)
    assert table.verdict['png'] == 'broken'
    assert table.found['png'].startswith(f"'{name}: ")
    assert problem in table.found['png']
    assert table.value['png'] == 1
    assert table.verdict['files'] == 'ok'
    assert table.verdict['ssim'] == 'ok'
    assert table.verdict['spot check'] == 'not checked'
    assert table.verdict['descriptors'] == 'ok'


def test_no_more_of_an_entry_is_unpacked_than_an_image_can_need():
    class Endless(io.BytesIO):
        def read(self, n=-1):
            assert 0 < n < 10**5
            return bytes(n)
    with pytest.raises(ValueError, match='more than'):
        V._open_png(Endless, (16, 18, 3))


def test_plain_pngs_of_any_writer_are_read(sent, faces, pairs, entry):
    a = to_uint8(entry[1])[2]
    for raw in (saved(a, compress_level=0), saved(a, optimize=True), saved(a, dpi=(72, 72)),
                saved(a, icc_profile=b'x'*200)):
        assert set(judged(rezip(sent, {pairs.files[2]: raw}), faces, pairs,
                          oracle=box).verdict) == {'ok'}


def test_missing_other_and_changed_images_are_named(sent, faces, pairs, entry):
    names = pairs.files
    table = judged(rezip(sent, {names[0]: None, names[5]: None, 'notes.txt': b'hello',
                                names[3]: saved(255-to_uint8(entry[0])[3])}),
                   faces, pairs, oracle=box)
    assert table.verdict.drop(['files', 'other files', 'ssim']).tolist() == [
        'ok', 'ok', 'ok', 'ok', 'not checked', 'ok']
    assert table.verdict['other files'] == 'warning'
    assert f"2 of 6 images are missing: '{names[0]}', '{names[5]}'" == table.found['files']
    assert table.found['other files'] == "'notes.txt'"
    assert table.verdict['ssim'] == 'broken'
    assert f"1 below 0.95: '{names[3]} " in table.found['ssim']
    assert table.value['ssim'] < .95
    empty = judged(rezip(sent, dict.fromkeys(names)), faces, pairs)
    assert empty.verdict['files'] == 'broken'
    assert empty.verdict['ssim'] == 'not checked'
    assert "'a" in empty.found['files']
    assert 'and 1 more' in empty.found['files']


def test_the_rule_of_the_judge_has_no_tolerance(sent, faces, pairs, entry):
    lowest = float(file_ssim(to_uint8(entry[0]), to_uint8(entry[1])).min())
    assert judged(sent, faces, pairs, level=lowest).verdict['ssim'] == 'ok'
    assert judged(sent, faces, pairs, level=np.nextafter(lowest, 1)).verdict['ssim'] == 'broken'


class Evil:
    def __reduce__(self): return exec, ("open('ran', 'w')",)


def npy(a, **k):
    held = io.BytesIO()
    np.save(held, a, **k)
    return held.getvalue()


def test_wrong_descriptors(sent, faces, pairs, entry, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    d = box(entry[1]).numpy()
    cases = {'missing': None, 'pickle': pickle.dumps(Evil()),
             'object array': npy(np.array([Evil()]*6, object), allow_pickle=True),
             'short': npy(d[1:]), 'flat': npy(d[:, 0]), 'whole numbers': npy(d.astype(int)),
             'empty': npy(d[:, :0]), 'truncated': npy(d)[:-5],
             'claims a lot': npy(d).replace(b"(6, ", b"(6000000000, ")}
    for why, raw in cases.items():
        with zipfile.ZipFile(sent) as z:
            before = z.read('descriptors.npy') if 'descriptors.npy' in z.namelist() else npy(d)
        table = judged(rezip(sent, {'descriptors.npy': raw}), faces, pairs, oracle=box)
        assert table.verdict['descriptors'] == 'broken', why
        assert ((table.verdict[['descriptors finite', 'spot check', 'score']] == 'not checked')
                .all()), why
        assert (table.verdict[:'ssim'] == 'ok').all()
        rezip(sent, {'descriptors.npy': before})
    holed = d.copy()
    holed[4, 1] = np.nan
    table = judged(rezip(sent, {'descriptors.npy': npy(holed)}), faces, pairs, oracle=box)
    assert table.verdict['descriptors finite'] == 'broken'
    assert 'first 4' in table.found['descriptors finite']
    assert table.verdict['score'] == 'not checked'
    table = judged(rezip(sent, {'descriptors.npy': npy(d[:, :5])}), faces, pairs, oracle=box)
    assert table.verdict['spot check'] == table.verdict['score'] == 'broken'
    assert f'oracle\'s is {d.shape[1]}' in table.found['spot check']
    assert not (tmp_path/'ran').exists()


def test_false_descriptors_are_found_by_asking(sent, faces, pairs, entry):
    good = box(entry[1]).numpy()
    d = good*np.where(np.arange(6) == 3, 1.005, 1)[:, None]
    table = judged(rezip(sent, {'descriptors.npy': npy(d)}), faces, pairs, oracle=box)
    assert table.verdict['spot check'] == 'broken'
    assert f"1 of 6 are off: '{pairs.files[3]} " in table.found['spot check']
    assert table.verdict['score'] == 'ok'
    assert judged(rezip(sent, {'descriptors.npy': npy(good + 1e-6)}), faces, pairs,
                  oracle=box).verdict['spot check'] == 'ok'
    found = [judged(rezip(sent, {'descriptors.npy': npy(d)}), faces, pairs, oracle=box, spot=2,
                    seed=i).verdict['spot check'] for i in range(12)]
    assert set(found) == {'ok', 'broken'}                       # a sample can miss it


@pytest.mark.parametrize('how, problem', [
    ('slip', 'points outside'), ('absolute', 'points outside'), ('twice', 'twice'),
    ('truncated', 'damaged'), ('no zip', 'not a zip'), ('bomb', 'over the limit')])
def test_an_archive_that_is_wrong_is_not_read(sent, faces, pairs, how, problem, tmp_path):
    raw = sent.read_bytes()
    if how in ('slip', 'absolute'):
        rezip(sent, {dict(slip='../../out.png', absolute='/out.png')[how]: b'x'})
    elif how == 'twice':
        with zipfile.ZipFile(sent, 'a') as z, pytest.warns(UserWarning):
            z.writestr(pairs.files[0], b'x')
    elif how == 'bomb':
        with zipfile.ZipFile(sent, 'a') as z:
            z.writestr('big.png', b'x')
        sent.write_bytes(sent.read_bytes().replace(
            struct.pack('<I', 1) + struct.pack('<HH', 7, 0),
            struct.pack('<I', 2**31) + struct.pack('<HH', 7, 0)))
    else:
        sent.write_bytes(raw[:-40] if how == 'truncated' else b'hello'*20)
    table = judged(sent, faces, pairs, oracle=box)
    assert table.verdict.tolist() == ['broken'] + ['not checked']*8
    assert problem in table.found['archive']
    assert table.index.tolist() == list(V._rules)
    assert [o.name for o in tmp_path.iterdir()] == ['in']
    assert [o.name for o in sent.parent.iterdir()] == ['s.zip']


def test_an_entry_that_is_damaged_or_too_long_is_named(sent, faces, pairs):
    raw = sent.read_bytes()
    name = pairs.files[1]
    at = raw.index(name.encode()) + len(name) + 50
    sent.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at+1:])
    table = judged(sent, faces, pairs)
    assert table.verdict['png'] == 'broken'
    assert name in table.found['png']
    assert 'CRC' in table.found['png']
    sent.write_bytes(raw)
    # 100 MB of zeros in 100 kB
    table = judged(rezip(sent, {name: bytes(10**8)}), faces, pairs)
    assert f'{name}: more than' in table.found['png']
    assert sent.stat().st_size < 2*10**5


def test_questions_to_the_judge_are_checked(sent, faces, pairs):
    for change, problem in ((dict(level=math.nan), '`level`'), (dict(spot=-1), '`spot`'),
                            (dict(spot=1.5), '`spot`'),
                            (dict(targets=np.zeros((2, 3, 4))), '2 pairs with 2 images'),
                            (dict(images=faces[:3]), 'missing')):
        with pytest.raises(ValueError, match=problem):
            check_submission(**{**dict(path=sent, images=faces, pairs=pairs), **change})
    with pytest.raises(FileNotFoundError):
        check_submission(sent.parent/'none.zip', faces, pairs)


# ---- comparisons

def step(oracle, x, targets, threat, generator=None, *, size=.05, decay=1, calls=None):
    "Ask about one random change, and keep it where it helps"
    if calls is not None:
        calls.append(len(x))
    tried = (255*threat.project(x, x + size*torch.randn(x.shape, generator=generator))).round()/255
    tried = torch.where(threat.allows(x, tried).view(-1, 1, 1, 1), tried, x)
    gap = lambda o: (oracle(o)[:, None]-targets).norm(dim=2).mean(1)
    return torch.where((gap(tried) < gap(x)).view(-1, 1, 1, 1), tried, x)


def nothing(oracle, x, targets, threat, generator=None): return x


@pytest.fixture(scope='module')
def duel(faces, entry):
    x, _, targets = entry
    return partial(compare_attacks, dict(nothing=nothing, step=step), lambda: Counted(1000), x,
                   targets.repeat_interleave(3, 0), SSIM(.9), group=4)


def facts(rows): return rows.drop(columns='seconds')


def test_rows_say_what_the_attack_did(duel, entry):
    x, _, targets = entry
    rows = duel()
    assert list(rows) == ['attack', 'group', 'image', 'before', 'after', 'ssim', 'queries',
                          'seconds']
    assert rows.attack.tolist() == ['nothing']*6 + ['step']*6
    assert rows.group.tolist() == [0, 0, 0, 0, 1, 1]*2
    assert rows.image.tolist() == [*range(6)]*2
    assert rows.queries.tolist() == [0]*6 + [2]*6
    before = [torch.cdist(box(x[i:i+1]), targets[i//3]).mean().item() for i in range(6)]
    assert np.allclose(rows.before, before*2, atol=1e-6)
    assert np.allclose(rows.after[:6], before, atol=1e-6)
    assert (rows.ssim[:6] == 1).all()
    made = torch.cat([step(box, x[s], targets.repeat_interleave(3, 0)[s], SSIM(.9),
                           make_generator(0, 'compare')) for s in (slice(0, 4), slice(4, 6))])
    assert np.allclose(
        rows.after[6:],
        [torch.cdist(box(made[i:i+1]), targets[i//3]).mean().item() for i in range(6)], atol=1e-6)
    assert (rows.after < rows.before).any()
    assert np.allclose(rows.ssim[6:], file_ssim(to_uint8(x), to_uint8(made)), atol=0)
    assert (rows.ssim[6:] < 1).any()
    assert (rows.seconds > 0).all()
    assert facts(duel()).equals(facts(rows))
    assert not facts(duel(seed=1)).equals(facts(rows))


def test_a_killed_comparison_goes_on_and_gives_the_same_rows(duel, tmp_path, entry):
    whole = duel()
    asked = []

    def dies(oracle, x, targets, threat, generator=None, calls=asked):
        if len(calls) == 1:
            calls.append('killed')
            raise KeyboardInterrupt
        return step(oracle, x, targets, threat, generator, calls=calls)
    dies.__qualname__ = 'the same'
    run = partial(compare_attacks, dict(nothing=nothing, step=dies), *duel.args[1:], group=4,
                  folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(o.relative_to(tmp_path).as_posix() for o in tmp_path.rglob('*')
                  if o.is_file()) == ['nothing/00000.pt', 'nothing/00001.pt', 'step/00000.pt']
    with pytest.raises(ValueError, match='1 of 2 are finished'):
        attacked_images(tmp_path, 'step')
    rows = run()
    # the finished group was not run again
    assert facts(rows).equals(facts(whole))
    assert asked == [4, 'killed', 2]
    seconds = run().seconds
    assert asked == [4, 'killed', 2]
    assert seconds.equals(rows.seconds)
    images = attacked_images(tmp_path, 'step')
    assert images.dtype == np.uint8
    assert np.allclose(file_ssim(to_uint8(entry[0]), images), rows.ssim[6:], atol=0)
    assert np.array_equal(attacked_images(tmp_path, 'nothing'), to_uint8(entry[0]))
    with pytest.raises(FileNotFoundError, match='none'):
        attacked_images(tmp_path, 'none')


def test_an_answer_to_another_question_is_not_taken(duel, tmp_path, entry):
    x, _, targets = entry
    attacks, oracle, x, wanted, threat = duel.args
    run = lambda a=step, x=x, wanted=wanted, threat=threat, **k: compare_attacks(
        dict(a=a), oracle, x, wanted, threat, group=4, folder=tmp_path, **k)
    run(partial(step, size=.1, calls=None))
    run(partial(step, calls=None, size=.1))
    for change, what in (
            (dict(a=partial(step, size=.2, calls=None)),
             r'attack \(step\(calls=None, size=0.1\), now step\(calls=None, size=0.2\)\)'),
            (dict(seed=1), r'seed \(0, now 1\)'), (dict(threat=SSIM(.8)), 'threat'),
            (dict(x=x.flip(0)), 'images'), (dict(wanted=wanted+1e-6), 'targets')):
        with pytest.raises(ValueError, match=f'another question.*{what}'):
            run(**{**dict(a=partial(step, size=.1, calls=None)), **change})
    (tmp_path/'a'/'00001.pt').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='00001.pt'):
        run(partial(step, size=.1, calls=None))
    torch.save(dict(rows=1), tmp_path/'a'/'00001.pt')
    with pytest.raises(ValueError, match='another question'):
        run(partial(step, size=.1, calls=None))
    (tmp_path/'a'/'00001.pt').write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(ValueError, match='plain tensors'):
        run(partial(step, size=.1, calls=None))


def test_the_text_of_an_attack_is_the_same_in_another_process():
    with torch.random.fork_rng():
        net = torch.nn.Linear(2, 2)
    assert (V._describe(partial(partial(step, size=1), students=net, f=step, names=[net]))
            == 'step(f=function, names=[Linear(in_features=2, out_features=2, bias=True)], '
               'size=1, students=Linear)')
    assert V._digest(torch.zeros(
        2, 3)) != V._digest(torch.zeros(3, 2)) != V._digest(torch.zeros(3, 2).double())
    assert V._describe(net) == 'Linear'
    assert '0x' not in V._describe(partial(step, calls=[object()]))


def test_an_attack_that_cheats_is_caught(duel, entry):
    cheats = {'left its threat model .* on image 0 of a group '
              '.2 of 2': lambda o, x, t, threat, generator: x if len(x) > 2 else 1-x,
              r'must return images of shape \(4, 3, 16, 18\); got '
              r'\(3': lambda o, x, t, threat, generator: x[1:],
              'got NoneType': lambda o, x, t, threat, generator: None,
              r'pixels in \[0, 1\]': lambda o, x, t, threat, generator: x+2,
              'pixels in': lambda o, x, t, threat, generator: x*math.nan}
    for problem, attack in cheats.items():
        with pytest.raises(ValueError, match=problem):
            compare_attacks(dict(cheat=attack), *duel.args[1:], group=4)
    # judged as a file: rounding takes it back
    grid = compare_attacks(dict(a=lambda o, x, t, threat, generator: (x+.4/255).clamp(0, 1)),
                           *duel.args[1:], group=4)
    assert (grid.ssim == 1).all()
    assert np.allclose(grid.after, grid.before)


def test_every_group_has_a_fresh_oracle_and_another_one_judges(entry):
    x, _, targets = entry
    made = []
    def make():
        made.append(Counted(5))
        return made[-1]
    def greedy(oracle, x, targets, threat, generator=None):
        while oracle.left:
            oracle(x)
        return x
    rows = compare_attacks(dict(a=greedy), make, x, targets.repeat_interleave(3, 0), SSIM(.9),
                           group=5)
    assert rows.queries.tolist() == [1]*5 + [5]
    assert rows.after.notna().all()
    plain = compare_attacks(dict(a=nothing), lambda: box, x, targets.repeat_interleave(3, 0),
                            SSIM(.9))
    assert plain.queries.isna().all()
    assert np.allclose(plain.after, rows.after)
    for limit in (0, 4):
        with pytest.raises(
                ValueError,
                match=f'at least one question for each image of a group .5.*got {limit}'):
            compare_attacks(dict(a=greedy), lambda: Counted(limit), x,
                            targets.repeat_interleave(3, 0), SSIM(.9))


def test_the_bar_has_the_running_score(duel, monkeypatch):
    said = []
    class Bar(list):
        def set_postfix_str(self, text): said.append(text)
    monkeypatch.setattr(V, 'progress', lambda items, desc='': Bar(items))
    rows = duel()
    mean = lambda name, n: f"{name} {rows[rows.attack == name].after[:n].mean():.4f}"
    assert said == [mean('nothing', 4), mean('nothing', 6), mean('step', 4), mean('step', 6)]


def test_a_comparison_that_cannot_start_is_refused(duel):
    attacks, make, x, targets, threat = duel.args
    start = lambda **k: compare_attacks(**{
        **dict(attacks=attacks, make_oracle=make, x=x, targets=targets, threat=threat), **k})
    for change, problem in (
            (dict(targets=targets[1:]), r'for 6 images; got \(5, 2'),
            (dict(targets=targets[:, 0]), 'N,T,D'), (dict(targets=targets*math.nan), 'finite'),
            (dict(targets=[1]), 'got list'), (dict(group=0), '`group`'),
            (dict(attacks={'../a': step}), 'names of folders; got .../a'),
            (dict(attacks={'a/b': step}), 'names of folders'),
            (dict(attacks=dict(a=3)), 'must be functions'),
            (dict(attacks={'a ': step}), 'names of folders'),
            (dict(attacks={'.a': step}), 'names of folders'), (dict(x=x+2), r'\[0, 1\]')):
        with pytest.raises(ValueError, match=problem):
            start(**change)
    for bad in ([step], {}):
        with pytest.raises(TypeError, match='dict'):
            start(attacks=bad)


# ---- tables

def made_rows(**after):
    n = len(next(iter(after.values())))
    return pd.concat([pd.DataFrame(dict(attack=k, group=np.arange(n)//2, image=range(n),
                                        before=1.5, after=v, ssim=.95+np.arange(n)/1000,
                                        queries=7., seconds=2.)) for k, v in after.items()],
                     ignore_index=True)


def test_table_against_numbers_by_hand():
    a = rng.normal(1, .2, 40)
    noise = rng.normal(0, .01, 40)
    table = attack_table(made_rows(full=a, worse=a+.05+noise, other=a[::-1]))
    assert table.index.tolist() == ['full', 'worse', 'other']
    assert np.allclose(table.after, [a.mean(), (a+.05+noise).mean(), a.mean()])
    assert (table.images == 40).all()
    assert (table.before == 1.5).all()
    # paired: far narrower than the scores' own intervals
    assert table.difference['worse'] == pytest.approx(.05+noise.mean())
    assert table.difference_lo['worse'] > .03
    assert table.difference_hi['worse'] < .07
    assert table.difference_lo['other'] < 0 < table.difference_hi['other']
    assert (table.hi-table.lo > .05).all()
    assert (table.lowest_ssim == .95).all()
    assert (table.queries == 7).all()
    assert (table.seconds == 2).all()
    means = a.reshape(20, 2).mean(1)
    assert table.hi['full']-table.lo['full'] == pytest.approx(2*1.96*means.std()/20**.5, rel=.15)
    turned = attack_table(made_rows(full=a, worse=a+.05+noise), reference='worse')
    assert turned.difference['full'] == pytest.approx(-table.difference['worse'])
    assert attack_table(made_rows(full=a),
                        level=.5).pipe(lambda t: t.hi-t.lo).iloc[0] < .5*(table.hi-table.lo)['full']


def test_groups_are_the_units():
    same = np.repeat(rng.normal(1, .2, 20), 2)             # the two images of a group say the same
    mixed = same.reshape(20, 2).T.ravel()                  # the same numbers, spread over groups
    width = lambda v: attack_table(made_rows(a=v)).pipe(lambda t: (t.hi-t.lo).iloc[0])
    assert width(same) > 1.2*width(mixed)
    one = attack_table(made_rows(a=[1., 2.]))
    assert one.after['a'] == 1.5
    assert one[['lo', 'hi', 'difference_lo']].isna().all(axis=None)


def test_images_without_an_answer_leave_all_attacks():
    table = attack_table(made_rows(a=[1, 2, 3, math.nan, 5], b=[10, math.nan, 30, 40, 50]))
    assert table.images.tolist() == [3, 3]
    assert table.after.tolist() == [3, 30]
    assert table.difference['b'] == 27
    assert table.lowest_ssim['a'] == .95
    # a mean over images, though one group is smaller
    assert attack_table(made_rows(a=[1., 2., 6.])).after['a'] == 3
    with pytest.raises(ValueError, match='answered under every attack'):
        attack_table(made_rows(a=[1, math.nan], b=[math.nan, 2]))
    with pytest.raises(ValueError, match="one of the attacks 'a'; got 'c'"):
        attack_table(made_rows(a=[1., 2.]), 'c')


def test_ablation_switches_what_it_says():
    def attack(oracle, x, targets, threat, generator=None, *, decay=1, mirror=True, steps=5):
        return decay, mirror, steps
    off = dict(momentum=dict(decay=0), mirrors=dict(mirror=False, steps=10))
    run = lambda made: {k: v(None, None, None, None) for k, v in made.items()}
    assert run(ablation(partial(attack, decay=2), off)) == {
        'full': (2, True, 5), 'without momentum': (0, True, 5), 'without mirrors': (2, False, 10)}
    assert run(ablation(partial(attack, decay=2), off, cumulative=True)) == {
        'plain': (0, False, 10), '+ momentum': (2, False, 10), '+ mirrors': (2, True, 5)}
    with pytest.raises(ValueError, match="got 'speed'"):
        ablation(attack, dict(a=dict(speed=0)))
    assert run(ablation(lambda *a, **k: k, dict(a=dict(speed=0))))['without a'] == dict(speed=0)
    for bad in ({}, dict(a={}), dict(a=False)):
        with pytest.raises(ValueError, match='switch each heuristic off'):
            ablation(attack, bad)
