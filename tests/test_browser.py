"The report as a person opens it: headless Chromium, no script error, every figure shown"
import os, re, shutil, subprocess
import pandas as pd
import pytest
import torch
from robustnb.transfer import Report, predict_losses

chromium = next((p for o in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(o))), None)
pytestmark = pytest.mark.skipif(chromium is None, reason='no Chromium on this machine')

CHECK = """<script>
window.faults = [];
window.onerror = (m) => { window.faults.push(m); };
window.onload = () => {
  const images = [...document.images], shown = images.filter(i => i.complete && i.naturalWidth > 50 && i.getBoundingClientRect().width > 50);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.title = `images=${images.length} shown=${shown.length} faults=${window.faults.length} wide=${wide}`;
};
</script>"""


def open_page(html, tmp_path, width=900):
    "Title of the page after it has checked itself, and what the console said"
    page = tmp_path/'page.html'
    page.write_text(html.replace('<head>', '<head>' + CHECK), encoding='utf-8')
    out = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
                          '--disable-component-update', '--disable-sync', f'--user-data-dir={tmp_path}/profile', f'--window-size={width},900',
                          '--virtual-time-budget=3000', '--enable-logging=stderr', '--dump-dom', page.as_uri()],
                         capture_output=True, text=True, timeout=120, env=os.environ | dict(HOME=str(tmp_path)))
    return re.search(r'<title>(.*?)</title>', out.stdout)[1], [o for o in out.stderr.splitlines() if 'CONSOLE' in o]


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    table = pd.DataFrame(dict(format=['INT8', 'INT4'], n_classes=10, size_kb=[8., 4.], js=[.001, .1], flips=[.01, .2], noise=[.001, .2], robust_flips=[.02, .3]))
    for kind in ('loss', 'robust_loss'): table = table.assign(**{f'measured_{kind}{k}': [.01*s, .2*s] for k, s in (('', 1), ('_lo', .5), ('_hi', 2))})
    layers = pd.DataFrame(dict(layer=['conv1', 'fc'], kind=['weights', 'activations'], nsr=.1, logit_noise=[.01, .02], format='INT4'))
    facts = dict(model='<b>Net & Co</b>', threat='Linf(eps=0.1)', probes='4 images', test_images=100, notes=['a < b'])
    path = tmp_path_factory.mktemp('report')/'report.html'
    Report(predict_losses(table), layers, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), facts).save(path)
    return path.read_text(encoding='utf-8')


@pytest.mark.parametrize('width', [900, 500])
def test_report_in_a_browser(html, tmp_path, width):
    title, console = open_page(html, tmp_path, width)
    assert title == 'images=4 shown=4 faults=0 wide=false' and not console


def test_a_broken_figure_is_noticed(html, tmp_path):
    broken = html.replace('data:image/svg+xml;base64,', 'data:image/svg+xml;base64,AAAA', 1)
    assert 'images=4 shown=3' in open_page(broken, tmp_path)[0]


def test_names_are_escaped(html): assert '<b>Net' not in html and '&lt;b&gt;Net &amp; Co' in html
