"""The report and the site as a person opens them

Headless Chromium: no script error, every figure shown, readable on a telephone.
"""
import subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
import torch
import widths
from browser import Browser, faults, find
from robustnb.transfer.predictor import predict_losses
from robustnb.transfer.report import Report

root = Path(__file__).parent.parent
site = root/'_check'
pytestmark = pytest.mark.skipif(find() is None, reason='no Chromium on this machine')
WIDTHS = dict(desk=1280, telephone=360)


@pytest.fixture(scope='module')
def browser():
    with Browser() as b:
        yield b


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    "A report of made numbers"
    table = pd.DataFrame(dict(
        format=['INT8', 'INT4'], n_classes=10, size_kb=[8., 4.], js=[.001, .1], flips=[.01, .2],
        noise=[.001, .2], activation_noise=[.001, .2], robust_flips=[.02, .3],
        expected_loss=[.002, .2], photographs=100, crops=False, presumed_accuracy=.9,
        worst_classes=['', 'cat 40%']))
    for kind in ('loss', 'robust_loss'):
        for end, s in (('', 1), ('_lo', .5), ('_hi', 2)):
            table[f'measured_{kind}{end}'] = [.01*s, .2*s]
    layers = pd.DataFrame(dict(
        layer=['conv1', 'fc'], kind=['weights', 'activations'], nsr=.1, logit_noise=[.01, .02],
        format='INT4'))
    facts = dict(
        model='<b>Net & Co</b>', threat='Linf(eps=0.1)', probes='4 images', test_images=100,
        notes=['a < b'])
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp('report')/'report.html'
    Report(predict_losses(table), layers, images, facts).save(path)
    return path.read_text(encoding='utf-8')


def opened(browser, tmp_path, html, width=1280):
    "What is found on a page of `html`"
    path = tmp_path/'page.html'
    path.write_text(html, encoding='utf-8')
    return browser.open(path.as_uri(), width)


@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
def test_report_in_a_browser(browser, html, tmp_path, width):
    found = opened(browser, tmp_path, html, width)
    assert found['images'] == 3
    assert not faults(found)


def test_a_broken_figure_is_noticed(browser, html, tmp_path):
    start = 'data:image/svg+xml;base64,'
    broken = html.replace(start, start + 'AAAA', 1)
    assert len(opened(browser, tmp_path, broken)['missing']) == 1


def test_names_are_escaped(html):
    assert '<b>Net' not in html
    assert '&lt;b&gt;Net &amp; Co' in html


VIEWPORT = '<meta name="viewport" content="width=device-width">'
PAGE = f'<!doctype html>{VIEWPORT}<body><main><p>Text</p>{{}}</main>'
TABLE = '<table><tr><td>' + 'wide'*200 + '</td></tr></table>'
FAULTY = {
    'missing': '<img src="nowhere.png">',
    'outside': TABLE,
    'wide': '<pre>' + 'wide '*200 + '</pre>',
    'small': '<p style="font-size:9px">Small print</p>',
    'errors': '<script>nowhere()</script>',
}
LATE = 'setTimeout(() => { throw Error("late") })'
COMPLAINTS = {
    'console': 'console.error("no")',
    'timer': LATE,
    'fetch': 'fetch("nowhere.json")',
    'timer after load': f'onload = () => {LATE}',
    'fetch after load': 'onload = () => setTimeout(() => fetch("nowhere.json"))',
    'complaint about an answer': 'fetch("page.html").then(() => { throw Error("late") })',
}


@pytest.mark.parametrize('fault', FAULTY)
def test_a_fault_is_noticed(browser, tmp_path, fault):
    assert fault in faults(opened(browser, tmp_path, PAGE.format(FAULTY[fault]), 360))


@pytest.mark.parametrize('script', COMPLAINTS.values(), ids=COMPLAINTS)
def test_a_complaint_is_heard(browser, tmp_path, script):
    page = PAGE.format(f'<script>{script}</script>' + '<p>More</p>'*99)
    assert 'errors' in faults(opened(browser, tmp_path, page))


BOXED = f'<div style="overflow-x:auto">{TABLE}</div>'


@pytest.mark.parametrize('content', [BOXED, ''], ids=['boxed', 'empty'])
def test_a_good_page_is_silent(browser, tmp_path, content):
    assert not faults(opened(browser, tmp_path, PAGE.format(content), 360))


def test_a_fault_belongs_to_its_page(browser, tmp_path):
    opened(browser, tmp_path, PAGE.format(f'<script>{COMPLAINTS["fetch after load"]}</script>'))
    assert not faults(opened(browser, tmp_path, PAGE.format('')))


def docs_check():
    "Make the site of `make docs-check`"
    command = [sys.executable, '-W', 'ignore', 'tools/docs_check.py']
    subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def pages():
    "The pages of the site, made now if a notebook or the tool has changed since"
    sources = [*(root/'nbs').rglob('*.ipynb'), root/'tools/docs_check.py', root/'_quarto.yml']
    index = site/'index.html'
    if not index.exists() or index.stat().st_mtime < max(f.stat().st_mtime for f in sources):
        docs_check()
    return sorted(site.rglob('*.html'))


BLOCKS = '<pre style="height:{}px">A block</pre>'*3 + '<p>' + 'word '*200 + '</p>'


@pytest.mark.parametrize('blocks, ends', [(BLOCKS.format(100, 100, 100), None),
                                          (BLOCKS.format(100, 100, 900), '3 first blocks end at'),
                                          ('<pre>One</pre>', '1 first blocks end at')])
def test_front_page_below_the_fold(tmp_path, blocks, ends):
    (tmp_path/'index.html').write_text(PAGE.format(blocks), encoding='utf-8')
    found = widths.below_the_fold(tmp_path/'index.html')
    assert ends in found[0] if ends else found == []


def test_the_site_is_looked_at_as_a_page_is(tmp_path):
    "`make docs-check` opens a page once, and sees at both widths what a page opened at that width has"
    for k, v in FAULTY.items():
        (tmp_path/f'{k}.html').write_text(PAGE.format(v + '<p>word</p>'*200), encoding='utf-8')
    (tmp_path/'few.html').write_text(PAGE.format('<p>Text</p>'), encoding='utf-8')
    (tmp_path/'good.html').write_text(PAGE.format('<p>word</p>'*200), encoding='utf-8')
    lines = widths.cut(sorted(tmp_path.iterdir()))
    said = {k: ' '.join(o for o in lines if f'{k}.html: at 360 px' in o) for k in FAULTY}
    assert all(f'{k}: ' in v for k, v in said.items()), said
    assert sum('errors: ' in o for o in lines if 'errors.html' in o) == 3
    assert sum('only ' in o and 'few.html' in o for o in lines) == 3
    assert not [o for o in lines if 'good.html' in o]


def accessible(browser, page):
    "What axe-core finds serious or critical on a page, at a desk and on a telephone"
    import axe
    found = [o for width in WIDTHS.values() for o in axe.violations(browser, page, axe.script(), width)]
    return [axe.line(o) for o in axe.grave(found)]


@pytest.fixture
def with_axe():
    import axe
    if not axe.script(): pytest.skip('ROBUSTNB_AXE does not name axe.min.js of axe-core (tools/axe.py)')


def test_report_for_everybody(with_axe, browser, html, tmp_path):
    (tmp_path/'report.html').write_text(html, encoding='utf-8')
    assert not accessible(browser, tmp_path/'report.html')


KINDS = 'index', 'api/attacks/gradient', 'results/quantization_loss', 'howto/model', 'tutorials/transfer'


@pytest.mark.parametrize('name', KINDS)
def test_site_for_everybody(with_axe, browser, pages, name):
    assert not accessible(browser, site/f'{name}.html')


def test_a_hindrance_is_noticed(with_axe, browser, tmp_path):
    page = '<!doctype html><html><title>A</title><img src="a.png">'
    (tmp_path/'page.html').write_text(page, encoding='utf-8')
    found = ' '.join(accessible(browser, tmp_path/'page.html'))
    assert 'image-alt' in found
    assert 'html-has-lang' in found
