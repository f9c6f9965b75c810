"The report and the site as a person opens them: headless Chromium, no script error, every figure shown, readable on a telephone"
import subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from browser import Browser, faults, find
from robustnb.transfer.predictor import predict_losses
from robustnb.transfer.report import Report

root, site = Path(__file__).parent.parent, Path(__file__).parent.parent/'_check'
pytestmark = pytest.mark.skipif(find() is None, reason='no Chromium on this machine')
WIDTHS = dict(desk=1280, telephone=360)


@pytest.fixture(scope='module')
def browser():
    with Browser() as b: yield b


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    table = pd.DataFrame(dict(format=['INT8', 'INT4'], n_classes=10, size_kb=[8., 4.], js=[.001, .1], flips=[.01, .2], noise=[.001, .2], activation_noise=[.001, .2], robust_flips=[.02, .3]))
    for kind in ('loss', 'robust_loss'): table = table.assign(**{f'measured_{kind}{k}': [.01*s, .2*s] for k, s in (('', 1), ('_lo', .5), ('_hi', 2))})
    layers = pd.DataFrame(dict(layer=['conv1', 'fc'], kind=['weights', 'activations'], nsr=.1, logit_noise=[.01, .02], format='INT4'))
    facts = dict(model='<b>Net & Co</b>', threat='Linf(eps=0.1)', probes='4 images', test_images=100, notes=['a < b'])
    path = tmp_path_factory.mktemp('report')/'report.html'
    Report(predict_losses(table), layers, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), facts).save(path)
    return path.read_text(encoding='utf-8')


def opened(browser, tmp_path, html, width=1280):
    (tmp_path/'page.html').write_text(html, encoding='utf-8')
    return browser.open((tmp_path/'page.html').as_uri(), width)


@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
def test_report_in_a_browser(browser, html, tmp_path, width):
    found = opened(browser, tmp_path, html, width)
    assert found['images'] == 4 and not faults(found)


def test_a_broken_figure_is_noticed(browser, html, tmp_path):
    broken = html.replace('data:image/svg+xml;base64,', 'data:image/svg+xml;base64,AAAA', 1)
    assert len(opened(browser, tmp_path, broken)['missing']) == 1


def test_names_are_escaped(html): assert '<b>Net' not in html and '&lt;b&gt;Net &amp; Co' in html


PAGE = '<!doctype html><meta name="viewport" content="width=device-width"><body><main><p>Text</p>{}</main>'
FAULTY = {
    'missing': '<img src="nowhere.png">',
    'outside': '<table><tr><td>' + 'wide'*200 + '</td></tr></table>',
    'wide': '<pre>' + 'wide '*200 + '</pre>',
    'small': '<p style="font-size:9px">Small print</p>',
    'errors': '<script>nowhere()</script>',
}


@pytest.mark.parametrize('fault', FAULTY)
def test_a_fault_is_noticed(browser, tmp_path, fault): assert fault in faults(opened(browser, tmp_path, PAGE.format(FAULTY[fault]), 360))


@pytest.mark.parametrize('fault', ['console.error("no")', 'setTimeout(() => { throw Error("late") }, 0)', 'fetch("nowhere.json")'])
def test_a_complaint_is_heard(browser, tmp_path, fault):
    assert faults(opened(browser, tmp_path, PAGE.format(f'<script>{fault}</script>' + '<p>More</p>'*99)))['errors']


def test_a_good_page_is_silent(browser, tmp_path):
    boxed = '<div style="overflow-x:auto"><table><tr><td>' + 'wide'*200 + '</td></tr></table></div>'
    assert not faults(opened(browser, tmp_path, PAGE.format(boxed), 360)) and not faults(opened(browser, tmp_path, PAGE.format('')))


@pytest.fixture(scope='module')
def pages():
    "The site of `make docs-check`, made now if a notebook or the tool has changed since"
    newest = max(f.stat().st_mtime for f in [*(root/'nbs').rglob('*.ipynb'), root/'tools/docs_check.py', root/'_quarto.yml'])
    if not (site/'index.html').exists() or (site/'index.html').stat().st_mtime < newest:
        subprocess.run([sys.executable, '-W', 'ignore', 'tools/docs_check.py'], cwd=root, check=True, capture_output=True, text=True, timeout=600)
    return sorted(site.rglob('*.html'))


@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
def test_every_page_of_the_site(browser, pages, width):
    found = {f.relative_to(site).as_posix(): browser.open(f.as_uri(), width) for f in pages}
    assert len(found) == len(list((root/'nbs').rglob('[!.]*.ipynb'))) and min(o['text'] for o in found.values()) > 500
    assert not {k: faults(v) for k, v in found.items() if faults(v)}
