"""What a reader cannot see whole, and what a browser complains about, in headless Chromium.

`python tools/widths.py PAGE.html ...` prints a line for each page and width with faults: tables and
blocks of text that are cut, and what `browser.py` finds.
"""
import sys
from pathlib import Path
from browser import Browser, faults, find

WIDTHS = 1280, 390                    # a desk and a telephone, in CSS pixels
NARROW = 360                          # a small telephone: a number may break there, nothing may stick out
LETTERS = 500                         # a page that shows fewer is broken
FIRST, FOLD = 3, 800                  # blocks of the front page, within so many pixels from its top
BOTTOMS = '''[...document.querySelectorAll('main pre, main table')].map(
    e => e.getBoundingClientRect().bottom)'''
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
    "For each width and page: `text`, its width; how many `tables`, `blocks`; what is `cut`; `seen`"
    found = {}
    with Browser() as browser:
        for page in pages:
            browser.open(Path(page).resolve().as_uri(), widths[0])
            for width in widths: found[width, page] = measured(browser, width)
            browser.resize(NARROW)
            found[NARROW, page] = dict(cut=[], seen=browser.look())
    return found


def measured(browser, width):
    "The measurements of the page that is open, at one width"
    browser.resize(width)
    return browser.value(MEASURE) | dict(seen=browser.look())


def said(found):
    "What is wrong with a page at one width, as a list of lines"
    letters = found['seen']['text']
    few = [f'only {letters} letters'] if letters <= LETTERS else []
    return ['cut: ' + o for o in found['cut']] + few + [f'{k}: {v}' for k,v in faults(found['seen']).items()]


def cut(pages, widths=WIDTHS):
    "One line for each page and width on which something is cut, or faulty"
    return [f'{page}: at {width} px: ' + '; '.join(said(found))
            for (width, page),found in measure(pages, widths).items() if said(found)]


def below_the_fold(page):
    "One line if install, quickstart and figures do not fit the first window of the front page"
    with Browser() as browser:
        browser.open(Path(page).resolve().as_uri(), WIDTHS[0], FOLD)
        bottoms = browser.value(BOTTOMS)
    last = max(bottoms[:FIRST], default=0)
    fits = len(bottoms) >= FIRST and last <= FOLD
    return [] if fits else [f'{page}: {len(bottoms[:FIRST])} first blocks end at {last:.0f} px of {FOLD}']


if __name__ == '__main__':
    if not find(): sys.exit('no Chromium on this machine')
    lines = cut(sys.argv[1:])
    for o in lines: print(o)
    sys.exit(bool(lines))
