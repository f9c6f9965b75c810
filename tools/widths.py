"""Which tables and blocks of text a reader cannot see whole, measured in headless Chromium.

`python tools/widths.py PAGE.html ...` prints a line for each page and width on which something is cut.
"""
import sys
from pathlib import Path
from browser import Browser, find

WIDTHS = 1280, 390                    # a desk and a telephone, in CSS pixels
# How many tables and blocks there are, and the first words of those that are wider than the text or than their own box
MEASURE = '''(() => {
  const main = document.querySelector('main').getBoundingClientRect();
  const all = [...document.querySelectorAll('main table, main pre')];
  const cut = e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > main.right + 1;
  const words = e => e.tagName.toLowerCase() + ': ' + e.innerText.trim().slice(0, 60).replace(/\\s+/g, ' ');
  return {text: Math.round(document.querySelector('main p').clientWidth),
          tables: all.filter(e => e.tagName === 'TABLE').length,
          blocks: all.filter(e => e.tagName === 'PRE').length,
          cut: all.filter(cut).map(words)};
})()'''


def measure(pages, widths=WIDTHS):
    "For each width and page a dict: `text`, pixels of a line of prose; `tables`, `blocks`; those that are `cut`"
    with Browser() as browser:
        return {(width, page): measured(browser, page, width) for width in widths for page in pages}


def measured(browser, page, width):
    "The measurements of one page at one width"
    browser.open(Path(page).resolve().as_uri(), width)
    return browser.ask('Runtime.evaluate', expression=MEASURE, returnByValue=True)['result']['value']


def cut(pages, widths=WIDTHS):
    "One line for each page and width on which something is cut"
    return [f'{page}: cut at {width} px: ' + '; '.join(found['cut'])
            for (width, page),found in measure(pages, widths).items() if found['cut']]


if __name__ == '__main__':
    if not find(): sys.exit('no Chromium on this machine')
    lines = cut(sys.argv[1:])
    for o in lines: print(o)
    sys.exit(bool(lines))
