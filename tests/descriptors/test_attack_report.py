"The numbers on the page against the functions they come from, its pictures against the images"
import base64, html, io, re, warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers_submission import box, entry, faces, pairs, quiet
from robustnb.core import to_float, to_uint8
from robustnb.data import NamedSet
from robustnb.descriptors.pairs import make_pairs, Pairs
from robustnb.descriptors.report import attack_report
from robustnb.descriptors.verification import (
    dodging_rate, equal_error_rate, image_quality, impersonation_rate, pair_distances, threshold_at)


def other_box(x): return x[:, :, ::4, ::4].flatten(1).numpy()


def cells(page, first):
    "Cells of the table whose first row begins with `first`"
    table = next(t for t in re.findall('<table.*?</table>', page, re.S) if first in t)
    rows = re.findall('<tr.*?</tr>', table, re.S)
    return [[html.unescape(o) for o in re.findall('<t[hd][^>]*>(.*?)</t[hd]>', row, re.S)]
            for row in rows]


def pictures(page):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(o))))
            for o in re.findall('src="data:image/png;base64,(.*?)"', page)]


def percent(o): return f'{100*o:.1f}\u00a0%'


@pytest.fixture(scope='module')
def case(faces, pairs):
    "An attack that goes two thirds of the way to the image it imitates, and what both boxes say"
    x = faces.x[faces.at(pairs.sources).ravel()]
    goal = faces.x[faces.at(pairs.targets)[:, [0, 1, 1]].ravel()]
    return x, .3*x + .7*goal


@pytest.fixture(scope='module')
def page(faces, pairs, case, tmp_path_factory):
    path = tmp_path_factory.mktemp('r')/'deep'/'report.html'
    done = attack_report(path, dict(near=box, far=other_box), faces, pairs, case[1], shown=3,
                         perceptual=lambda a, b: (a-b).abs().mean((1, 2, 3)))
    assert done == path
    assert [o.name for o in path.parent.iterdir()] == ['report.html']
    return path.read_text(encoding='utf-8')


def enrolled(faces, pairs):
    "Every image that is not attacked, by a loop"
    attacked = {n for row in pairs.sources for n in row}
    return [i for i, n in enumerate(faces.names) if n not in attacked]


def rates(asked, x, faces, pairs, cut):
    rest = enrolled(faces, pairs)
    at = faces.at(pairs.sources)
    known = np.asarray(asked(faces.x[rest])), faces.y[rest], cut
    said = np.asarray(asked(to_float(to_uint8(x))))
    wanted = faces.y[faces.at(pairs.targets)[:, 0]].repeat(3)
    return impersonation_rate(said, wanted, *known), dodging_rate(said, faces.y[at.ravel()], *known)


def test_the_rates_are_those_of_the_functions(faces, pairs, case, page):
    x, x_adv = case
    reached = []
    for name, asked in dict(near=box, far=other_box).items():
        same, strangers = pair_distances(np.asarray(asked(faces.x)), faces.y)
        cut = threshold_at(.01, strangers)
        table = dict((o[0], o[1:]) for o in cells(page, 'equal error rate'))
        column = table[''].index(name)
        assert table['equal error rate'][column] == percent(equal_error_rate(same, strangers))
        assert table['threshold used'][column] == f'{cut:.4g}'
        attacked, clean = (rates(asked, o, faces, pairs, cut) for o in (x_adv, x))
        part = page[page.index(f'<h3>{name}</h3>'):]
        row = next(o for o in cells(part, 'as it is') if o[0] == 'as it is')
        assert row[1:] == [f'{percent(a)} ({percent(c)})' for a, c in zip(attacked, clean)]
        reached.append((attacked[0], clean[0]))
    assert reached[0][0] > reached[0][1]
    assert page.split('<b>')[1].startswith(percent(reached[0][0]))


def test_what_can_be_seen_is_said(case, page):
    rows = image_quality(*case)
    table = {o[0]: o[1:] for o in cells(page, 'structural similarity')}
    assert table['structural similarity'] == [f'{rows.ssim.mean():.4g}', f'{rows.ssim.min():.4g}']
    worst = rows.grey_levels.max()
    assert table['largest change, grey levels of 255'] == [f'{rows.grey_levels.mean():.4g}', f'{worst:.4g}']
    assert len(table['perceptual distance']) == 2


def test_the_pictures_are_the_files_and_their_difference(faces, pairs, case, page):
    clean, attacked = (to_uint8(o) for o in case)
    shown = pictures(page)
    assert len(shown) == 3*4
    targets = faces.images[faces.at(pairs.targets)].repeat(3, 0)
    gaps = np.linalg.norm(box(to_float(attacked)).numpy()[:, None]
                          - box(faces.x)[faces.at(pairs.targets)].numpy().repeat(3, 0), axis=2)
    order = gaps.mean(1).argsort()
    for i, four in zip(order[[0, 2, 5]], zip(*[iter(shown)]*4)):      # the middle one of 0 to 5
        assert np.array_equal(four[0], clean[i])
        assert np.array_equal(four[1], attacked[i])
        change = attacked[i].astype(int) - clean[i]
        assert np.array_equal(four[2], np.clip(128 + change, 0, 255))
        assert np.array_equal(four[3], targets[i, gaps[i].argmin()])
        assert f'<b>{gaps[i].mean():.3f}</b> after' in page


def test_small_differences_are_enlarged(faces, pairs, case, tmp_path):
    x = case[0]
    page = attack_report(tmp_path/'r.html', dict(near=box), faces, pairs, (x + 3/255).clamp(0, 1), shown=1)
    page = page.read_text()
    assert 'enlarged 42 times' in page
    assert np.array_equal(np.unique(pictures(page)[2]), [128 + 3*42])


def test_names_are_text_and_no_other_file_is_asked_for(faces, pairs, case, tmp_path):
    odd = NamedSet(faces.images, faces.y, ['<script>', 'b & b', '"c"', "d'"], faces.names)
    page = attack_report(tmp_path/'r.html', {'<i>box</i>': box}, odd, pairs, case[1]).read_text()
    assert '<script' not in page
    assert '<i>' not in page
    assert 'b &amp; b' in page
    assert not re.search('https?:|url\\(|@import|<link|src="(?!data:)', page)


def test_no_image_is_asked_about_twice(faces, pairs, case, tmp_path):
    asked = []
    def counted(x):
        asked.extend(o.tobytes() for o in to_uint8(x))
        return box(x)
    page = attack_report(tmp_path/'r.html', dict(near=counted), faces, pairs, case[1]).read_text()
    assert len(asked) == len({*asked})
    assert f"queries: {{&#x27;near&#x27;: {len(asked)}}}" in page


def test_strangers_who_match_are_doubted_on_the_page(faces, pairs, case, page, tmp_path):
    with pytest.warns(UserWarning, match='Align the faces first'):
        loose = attack_report(tmp_path/'r.html', dict(near=box), faces, pairs, case[0], 1.9, shown=0)
    loose = loose.read_text()
    assert 'Align the faces first' in loose
    assert 'Align the faces' not in page
    assert '<img' not in loose
    # nobody was attacked, and all match: the rate alone says nothing
    assert loose.split('<b>')[1].startswith(percent(1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        strict = attack_report(tmp_path/'s.html', dict(near=box), faces, pairs, case[0], 1e-6).read_text()
    assert strict.split('<b>')[1].startswith(percent(0) + ' (0.0 to 39.0)')      # of six images


def test_what_does_not_fit_is_refused_and_nothing_is_written(faces, pairs, case, tmp_path):
    x_adv = case[1]
    path = tmp_path/'r.html'
    good = dict(path=path, boxes=dict(near=box), images=faces, pairs=pairs, x_adv=x_adv)
    rows = zip(pairs.sources, pairs.targets)
    everybody = make_pairs(faces, 4, 2)
    mixed = Pairs(pairs.sources, tuple((t[0], 'd0.jpg') for _, t in rows))
    for change, kind, said in (
            (dict(boxes=box), TypeError, '`boxes` must be a dict'),
            (dict(boxes={}), TypeError, '`boxes` must be a dict'),
            (dict(x_adv=x_adv[1:]), ValueError, '`x_adv` must be one image for each source'),
            (dict(x_adv=x_adv[..., 1:]), ValueError, '`x_adv` must be one image for each source'),
            (dict(shown=-1), ValueError, '`shown` must be'),
            (dict(threshold=0), ValueError, '`threshold` must be a distance above 0'),
            (dict(pairs=mixed), ValueError, "targets of one person .* pair 0 show 'bob', 'dan'"),
            (dict(images=faces[np.isin(np.arange(24), faces.at(everybody.sources))],
                  pairs=Pairs(everybody.sources[:1], everybody.sources[-1:]), x_adv=x_adv[:4]),
             ValueError, "not attacked, to compare with; there is none of 'ann'"),
            (dict(boxes=dict(near=lambda x: box(x)*torch.nan)), ValueError, '`descriptors` must be finite')):
        with pytest.raises(kind, match=said):
            attack_report(**good | change)
    assert not [*tmp_path.iterdir()]
