"""Tables of pandas made ready for narrow screens: what `nbs/styles.css` needs to stack the cells of a row.

The columns of a stacked table have no heads, so each cell says in `data-label` what it holds.
"""
import re
from html import unescape

# Characters of a line beyond which it is too much for a telephone, for a desk in letters of common size, and in smaller ones
SIZES = dict(wide=38, widest=92, stacked=110)
LONG = 14                    # characters of a word that may break anywhere
CELL = re.compile(r'<t([hd])([^>]*)>(.*?)</t[hd]>', re.S)
NUMBER = re.compile(r'[-+.\d]+(e[-+]\d+)?%?')
ROW = re.compile(r'<tr.*?</tr>', re.S)


def fitted(html):
    "HTML with labels and a class for each table of pandas in it, without pandas' own style"
    html = re.sub(r'<style scoped>.*?</style>\s*', '', html, flags=re.S)
    return re.sub(r'<table[^>]*class="dataframe"[^>]*>.*?</table>', lambda m: fitted_table(m[0]), html, flags=re.S)


def fitted_table(table):
    "One table with `data-label` in its cells, names of `SIZES` in its class, and heads that may break after `_`"
    head, begins, body = table.partition('<tbody>')
    if not body: return table
    n = characters(head, body)
    size = ''.join(f' {k}' for k,most in SIZES.items() if n > most)
    names = [' '.join(filter(None, o)) for o in columns(head)]
    head = head.replace('class="dataframe"', f'class="dataframe{size}"')
    head = CELL.sub(lambda m: f'<t{m[1]}{m[2]}>{m[3].replace("_", "_<wbr>")}</t{m[1]}>', head)
    return head + begins + ROW.sub(lambda m: labelled(m[0], names), body)


def columns(head, shared=True):
    "The heads of each column, one for each line of heads; empty where columns have one together, unless `shared`"
    lines = []
    for line in ROW.findall(head):
        lines.append([])
        for _,attributes,inside in CELL.findall(line):
            span = re.search(r'colspan="(\d+)"', attributes)
            lines[-1] += [inside.strip() if shared or not span else ''] * (int(span[1]) if span else 1)
    return list(zip(*lines))


def labelled(line, names):
    "A line of the body in which each cell has its label; where cells above reach into the line, it has fewer"
    left = iter(names[-len(CELL.findall(line)):])

    def cell(m):
        inside = unescape(m[3])
        kind = 'number' if NUMBER.fullmatch(inside) else 'long' if longest(inside.split()) > LONG else ''
        kind = f' class="{kind}"' if kind else ''
        return f'<t{m[1]}{m[2]}{kind} data-label="{next(left, "")}">{m[3]}</t{m[1]}>'
    return CELL.sub(cell, line)


def characters(head, body):
    "About how many characters one line of the table needs, if what can break at blanks or `_` does so"
    heads = columns(head, shared=False)
    width = [longest(re.split('(?<=_)| ', ' '.join(o))) for o in heads]
    for line in ROW.findall(body):
        cells = CELL.findall(line)
        for i,(_,_,inside) in enumerate(cells, len(width)-len(cells)):
            width[i] = max(width[i], min(LONG, longest(unescape(inside).split())))
    return sum(width) + 1.5*len(width)


def longest(pieces): return max(map(len, pieces), default=0)
