"""Which tables and blocks of text a reader cannot see whole, measured in headless Chromium.

`python tools/widths.py PAGE.html ...` prints a line for each page and width on which text is cut.
"""
import sys
from pathlib import Path
from browser import Browser, find

WIDTHS = 1280, 390                    # a desk and a telephone, in CSS pixels
# How many tables and blocks there are, and how those begin that are wider than their room
MEASURE = '''(() => {
  const main = document.querySelector('main').getBoundingClientRect();
  const all = [...document.querySelectorAll('main table, main pre')];
  const beyond = e => e.getBoundingClientRect().right > main.right + 1;
  const cut = e => e.scrollWidth > e.clientWidth + 1 || beyond(e);
  // a number that goes on in the next line
  const number = e => /^[-+.\\d]+(e[-+]\\d+)?%?$/.test(e.innerText.trim());
  const lines = e => {
    const range = document.createRange();
    range.selectNodeContents(e);
    return new Set([...range.getClientRects()].map(o => Math.round(o.top))).size;
  };
  const broken = e => [...e.querySelectorAll('td')].some(o => number(o) && lines(o) > 1);
  const start = e => e.innerText.trim().slice(0, 60).replace(/\\s+/g, ' ');
  const words = e => e.tagName.toLowerCase() + ': ' + start(e);
  return {text: Math.round(document.querySelector('main p').clientWidth),
          tables: all.filter(e => e.tagName === 'TABLE').length,
          blocks: all.filter(e => e.tagName === 'PRE').length,
          cut: all.filter(e => cut(e) || broken(e)).map(words)};
})()'''


def measure(pages, widths=WIDTHS):
    "For each width and page: `text`, its width; how many `tables`, `blocks`; what is `cut`"
    found = {}
    with Browser() as browser:
        for page in pages:
            browser.open(Path(page).resolve().as_uri(), widths[0])
            for width in widths: found[width, page] = measured(browser, width)
    return found


def measured(browser, width):
    "The measurements of the page that is open, at one width"
    screen = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.ask('Emulation.setDeviceMetricsOverride', **screen)
    answer = browser.ask('Runtime.evaluate', expression=MEASURE, returnByValue=True)
    return answer['result']['value']


def cut(pages, widths=WIDTHS):
    "One line for each page and width on which something is cut"
    return [f'{page}: cut at {width} px: ' + '; '.join(found['cut'])
            for (width, page),found in measure(pages, widths).items() if found['cut']]


if __name__ == '__main__':
    if not find(): sys.exit('no Chromium on this machine')
    lines = cut(sys.argv[1:])
    for o in lines: print(o)
    sys.exit(bool(lines))
