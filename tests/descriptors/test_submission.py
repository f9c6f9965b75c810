"""The score against a slow loop, and a judge that names every broken
rule and runs nothing."""
import io, itertools, math, pickle, struct, zipfile, zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from helpers_submission import box, Counted, entry, Evil, faces, pairs, quiet
from robustnb.core import to_uint8
from robustnb.attacks.ssim_rule import file_ssim
from robustnb.descriptors import submission as V
from robustnb.descriptors.pairs import Pairs
from robustnb.descriptors.submission import (
    check_submission, organiser_layout, score_pairs, write_submission)

rng = np.random.default_rng(0)


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


def test_the_oracle_is_queried_for_the_sample_and_each_target_once(sent, faces, pairs):
    oracle = Counted(10**6)
    twice = (Pairs(pairs.sources, (pairs.targets[0],)*2)
             if not set(pairs.targets[0]) & set(pairs.sources[1]) else None)
    assert judged(sent, faces, twice, oracle=oracle, spot=4).verdict['spot check'] == 'ok'
    assert oracle.used == 4 + 2
    oracle = Counted(4)
    table = judged(sent, faces, pairs, oracle=oracle, spot=4)
    assert table.verdict['spot check'] == 'ok'
    assert table.verdict['score'] == 'not checked'
    assert 'queries left' in table.what_to_do['score']
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


def test_false_descriptors_are_found_by_queries(sent, faces, pairs, entry):
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


def test_arguments_of_the_judge_are_checked(sent, faces, pairs):
    for change, problem in ((dict(level=math.nan), '`level`'), (dict(spot=-1), '`spot`'),
                            (dict(spot=1.5), '`spot`'),
                            (dict(targets=np.zeros((2, 3, 4))), '2 pairs with 2 images'),
                            (dict(images=faces[:3]), 'missing')):
        with pytest.raises(ValueError, match=problem):
            check_submission(**{**dict(path=sent, images=faces, pairs=pairs), **change})
    with pytest.raises(FileNotFoundError):
        check_submission(sent.parent/'none.zip', faces, pairs)


def test_the_box_of_a_server_answers_with_arrays(tmp_path, faces, pairs, entry):
    x, x_adv, targets = entry
    path = write_submission(tmp_path/'s.zip', pairs.files, x_adv, x, box(x_adv))
    want = check_submission(path, faces, pairs, box)
    assert set(want.verdict) == {'ok'}
    for served in (lambda x: box(x).numpy(), lambda x: box(x).double().numpy(),
                   lambda x: box(x).tolist()):
        pd.testing.assert_frame_equal(check_submission(path, faces, pairs, served), want)
    coarse = check_submission(path, faces, pairs, lambda x: box(x).bfloat16())
    assert abs(coarse.value.iloc[-1]-want.value.iloc[-1]) < .01
    for bad in (lambda x: box(x)[0], lambda x: box(x)[1:], lambda x: 1.):
        with pytest.raises(ValueError, match='`oracle` must answer with one descriptor per image'):
            check_submission(path, faces, pairs, bad)
