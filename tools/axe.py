"""What hinders a reader who uses a keyboard, a screen reader or strong contrast, by axe-core.

    npm pack axe-core && tar xzf axe-core-*.tgz        # in a folder of your own; nothing here needs npm
    ROBUSTNB_AXE=package/axe.min.js python tools/axe.py _check/index.html report.html

It prints each violation of a page, and ends with status 1 if one is serious or critical.
"""
import os, sys
from itertools import product
from pathlib import Path
from browser import Browser, find
from widths import WIDTHS

GRAVE = 'serious', 'critical'
RUN = '''axe.run(document, {resultTypes: ['violations']}).then(found => found.violations.map(o => ({
  rule: o.id, impact: o.impact, help: o.help, places: o.nodes.map(n => n.target.join(' '))})))'''


def script():
    "The file of axe-core that ROBUSTNB_AXE names, None if it names none"
    path = os.environ.get('ROBUSTNB_AXE')
    return Path(path) if path and Path(path).is_file() else None


def violations(browser, page, axe, width=1280):
    "What axe-core finds on a page: dicts of `rule`, `impact`, `help` and `places`"
    browser.open(Path(page).resolve().as_uri(), width)
    browser.ask('Runtime.evaluate', expression=Path(axe).read_text(encoding='utf-8'))
    said = browser.ask('Runtime.evaluate', expression=RUN, awaitPromise=True, returnByValue=True)
    if why := said.get('exceptionDetails'): raise RuntimeError(f'axe-core failed on {page}: {why}')
    return said['result']['value']


def grave(found): return [o for o in found if o['impact'] in GRAVE]


def line(o):
    "A violation as one line"
    first = ', '.join(o['places'][:3])
    return f"{o['impact']}: {o['rule']} ({len(o['places'])} places, as {first}): {o['help']}"


def main(pages):
    axe = script()
    if not axe or not find(): sys.exit('Chromium is needed, and ROBUSTNB_AXE must name axe.min.js')
    bad = 0
    with Browser() as browser:
        for page,width in product(pages, WIDTHS):
            found = violations(browser, page, axe, width)
            bad += len(grave(found))
            print(page, f'{width} px', 'ok' if not found else '')
            for o in found: print('   ', line(o))
    print(f'axe: {len(pages)} pages, {bad} serious or critical violations')
    return bad


if __name__ == '__main__': sys.exit(main(sys.argv[1:]) > 0)
