"""Tables of pandas made ready for narrow screens, for `nbs/styles.css` to stack the cells of a row.

The columns of a stacked table have no heads, so each cell says in `data-label` what it holds.
"""
import re
from html import unescape

# Characters of a line that are too many for a telephone, for a desk, for a desk in small type
SIZES = dict(wide=38, widest=92, stacked=110)
LONG = 14                    # characters of a word that may break anywhere
CELL = re.compile(r'<t([hd])([^>]*)>(.*?)</t[hd]>', re.S)
NUMBER = re.compile(r'[-+.\d]+(e[-+]\d+)?%?')
TABLE = re.compile(r'<table[^>]*class="dataframe"[^>]*>.*?</table>', re.S)
ROW = re.compile(r'<tr.*?</tr>', re.S)


def fitted(html):
    "HTML with labels and a class for each table of pandas in it, without pandas' own style"
    html = re.sub(r'<style scoped>.*?</style>\s*', '', html, flags=re.S)
    return TABLE.sub(lambda m: fitted_table(m[0]), html)


def fitted_table(table):
    "One table with labels in its cells, its `SIZES` as classes, and heads that may break after `_`"
    head, begins, body = table.partition('<tbody>')
    if not body: return table
    n = characters(head, body)
    size = ''.join(f' {k}' for k,most in SIZES.items() if n > most)
    names = [' '.join(filter(None, o)).replace('_', '_&#8203;') for o in columns(head)]
    head = head.replace('class="dataframe"', f'class="dataframe{size}"')
    head = CELL.sub(lambda m: f'<t{m[1]}{m[2]}>{m[3].replace("_", "_<wbr>")}</t{m[1]}>', head)
    return head + begins + ROW.sub(lambda m: labelled(m[0], names), body)


def columns(head, shared=True):
    "The heads of each column, line by line; without `shared`, empty where columns share one"
    lines = []
    for line in ROW.findall(head):
        lines.append([])
        for _,attributes,inside in CELL.findall(line):
            span = re.search(r'colspan="(\d+)"', attributes)
            said = inside.strip() if shared or not span else ''
            lines[-1] += [said]*(int(span[1]) if span else 1)
    return list(zip(*lines))


def labelled(line, names):
    "A line of the body with a label in each cell"
    # Where cells above reach into the line, it has fewer, and they are the last
    left = iter(names[-len(CELL.findall(line)):])

    def cell(m):
        inside = unescape(m[3])
        kind = ''
        if NUMBER.fullmatch(inside): kind = ' class="number"'
        elif longest(inside.split()) > LONG: kind = ' class="long"'
        return f'<t{m[1]}{m[2]}{kind} data-label="{next(left, "")}">{m[3]}</t{m[1]}>'
    return CELL.sub(cell, line)


def characters(head, body):
    "About how many characters a line of the table needs, if what can break at blanks or `_` does"
    heads = columns(head, shared=False)
    width = [longest(re.split('(?<=_)| ', ' '.join(o))) for o in heads]
    for line in ROW.findall(body):
        cells = CELL.findall(line)
        for i,(_,_,inside) in enumerate(cells, len(width)-len(cells)):
            width[i] = max(width[i], min(LONG, longest(unescape(inside).split())))
    return sum(width) + 1.5*len(width)


def longest(pieces): return max(map(len, pieces), default=0)
