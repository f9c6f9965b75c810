"""Processed notebooks as Markdown and as pages that look like those of the site, without Quarto.

pandoc is the Markdown reader that Quarto uses; widths are those of `_quarto.yml`, and the style is
`nbs/styles.css`.
"""
import base64, json, os, re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pypandoc, yaml

# The columns of Quarto's docked layout: what stands beside the text gets 4/5 of its width
STYLE = '''body{{font:17px/1.5 system-ui,sans-serif;color:#222;margin:0;
padding:0 1.5em;display:grid;gap:0 1.5em;
grid-template-columns:calc(.8*{sidebar}) minmax(500px,calc({body} - 3em)) calc(.8*{margin})}}
header,footer{{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:.3em 1.5em;padding:.6em 0;
border-bottom:1px solid #ddd}} footer{{border-top:1px solid #ddd}} header a:first-child{{flex:1}}
.turn{{display:flex;justify-content:space-between;gap:1em;list-style:none;padding:1em 0 0}}
nav{{font-size:.85em;padding-top:1em}} nav ul{{padding-left:1em}} nav summary{{font-weight:bold}}
main{{min-width:0}} a{{color:#0b5cad}} 
pre{{background:#f6f6f6;padding:.7em;font-size:.875em}}
img{{max-width:100%;height:auto}}
math{{overflow-x:auto;max-width:100%}} math[display=block]{{display:block}}
p,li,h1,h2,h3,h4{{overflow-wrap:anywhere}}
.co{{color:#666}} .kw,.cf,.im{{color:#8250a0}} .st{{color:#236b36}}
@media(max-width:48em){{body{{display:block}}}}'''
# On a telephone the contents stay folded
UNFOLD = '<script>if (innerWidth > 768) document.querySelector("nav details").open = true</script>'


def text(s): return s if isinstance(s, str) else ''.join(s)
def fence(s, lang=''): return f'\n``````{lang}\n{s.rstrip()}\n``````\n'


def output_md(o, picture, name, option):
    "Markdown of one saved output; `picture(bytes, file name)` stores an image and gives its link"
    if o['output_type'] == 'stream': return fence(text(o['text'])) if o['name'] == 'stdout' else ''
    d = o.get('data', {})
    if 'text/markdown' in d: return '\n' + text(d['text/markdown']) + '\n'
    for k in ('text/html', 'image/svg+xml'):
        if k in d: return fence(text(d[k]), '{=html}')
    for k in ('image/png', 'image/jpeg'):
        if k in d:
            file = picture(base64.b64decode(text(d[k])), f'{name}.{k[6:]}')
            return figure_md(file, option)
    return fence(text(d['text/plain'])) if 'text/plain' in d else ''


def figure_md(file, option):
    "Markdown of a figure with the caption and the alt text of its cell"
    alt = option.get('fig-alt', '').replace('"', '&quot;')
    return f'\n![{option.get("fig-cap", "")}]({file}){{alt="{alt}"}}\n'


def code_md(cell, number, picture):
    "Markdown of a code cell and its outputs, as its Quarto options want them"
    source = text(cell['source'])
    option = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', source, re.M))
    option = {k: v.strip('"') for k,v in option.items()}
    source = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    md = []
    if option.get('include') == 'false': return md
    if source and option.get('echo') != 'false':
        code = fence(source, ' python')
        summary = option.get('code-summary', 'Code')
        fold = option.get('code-fold') == 'true'
        md.append(f'<details><summary>{summary}</summary>\n{code}\n</details>' if fold else code)
    if option.get('output') != 'false':
        md += [output_md(o, picture, f'{number}-{i}', option) for i,o in enumerate(cell['outputs'])]
    return md


def notebook_md(nb, picture):
    "Front matter and Markdown of a processed notebook"
    front, md = {}, []
    for number,cell in enumerate(nb['cells']):
        source = text(cell['source'])
        if cell['cell_type'] == 'code': md += code_md(cell, number, picture)
        elif cell['cell_type'] == 'markdown': md.append(source)
        elif source.lstrip().startswith('---'):
            front.update(yaml.safe_load(source.strip().strip('-')) or {})
    return front, '\n\n'.join(md)


def pandoc(md, to, *args):
    reader = 'markdown+autolink_bare_uris+emoji'
    return pypandoc.convert_text(md, to, format=reader, extra_args=list(args))


unread = {'pre', 'code', 'script', 'style'}


class Parts(HTMLParser):
    "Ids, links, scripts, pictures without words; the text of blocks, of code in lines, and the rest"
    def __init__(self, html):
        super().__init__()
        self.ids = set()
        self.links = []
        self.scripts = []
        self.alts = []                  # alt text of the pictures that have some
        self.unnamed = []               # the other pictures
        self.blocks = []
        self.codes = []                 # of each <code> that is not in a <pre>
        self.coding = 0
        self.inside = 0                 # how many <pre> are open
        self.prose = ''
        self.unread = 0                 # how many of <pre>, <code>, <script>, <style> are open
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        link = attrs.get('href') or attrs.get('src')
        if attrs.get('id'): self.ids.add(attrs['id'])
        if link and not link.startswith('#cb'): self.links.append(link)     # not the lines of code
        if tag == 'script': self.scripts.append(attrs.get('src') or '')
        if tag == 'img': self.picture(link or '', attrs.get('alt') or '')
        self.unread += tag in unread
        if tag == 'code' and not self.inside:
            self.coding += 1
            self.codes.append('')
        if tag == 'pre':
            self.inside += 1
            self.blocks.append('')

    def picture(self, link, alt):
        if alt.strip(): self.alts.append(alt)
        else: self.unnamed.append(link)

    def handle_endtag(self, tag):
        if tag == 'pre': self.inside -= 1
        if tag == 'code' and not self.inside: self.coding -= 1
        self.unread -= tag in unread

    def handle_data(self, data):
        if self.inside: self.blocks[-1] += data
        elif self.coding: self.codes[-1] += data
        if not self.unread: self.prose += data


def render(path, name, out):
    "Page name, title, subtitle and HTML of a processed notebook; its pictures go to `out`"
    here = (out/name).parent
    stem = Path(name).stem
    here.mkdir(parents=True, exist_ok=True)

    def picture(data, file):
        (here/f'{stem}_files').mkdir(exist_ok=True)
        (here/f'{stem}_files'/file).write_bytes(data)
        return f'{stem}_files/{file}'

    front, md = notebook_md(json.loads(path.read_text(encoding='utf-8')), picture)
    page = Path(name).with_name(front.get('output-file', stem+'.html')).as_posix()
    html = pandoc(md, 'html', '--mathml')
    return page, front.get('title', ''), front.get('description', ''), html


def menu(items, link):
    "The sidebar as nested lists; `link(file)` is a list entry, empty for a file without a page"
    for o in items:
        if isinstance(o, str): yield link(o)
        elif 'href' in o: yield link(o['href'])
        else:
            inside = ''.join(menu(o['contents'], link))
            yield f'<li>{escape(o["section"])}<ul>{inside}</ul></li>'


def to_pages(html, page, pages):
    "HTML in which links to notebooks lead to their pages"
    here = os.path.dirname(page)

    def to_page(m):
        to = pages.get(os.path.normpath(os.path.join(here, unquote(m[1]))))
        return f'href="{os.path.relpath(to, here or ".")}' if to else m[0]
    return re.sub(r'href="(?!\w+:)([^"#]*\.ipynb)', to_page, html)


def bar_links(website):
    "The addresses in the bars at the top and at the bottom"
    return [o['href'] for o in [*website['navbar']['right'], *website['page-footer']['right']]]


def bar(items): return ''.join(f'<a href="{escape(o["href"])}">{escape(o["text"])}</a>' for o in items)


def header(website, up):
    "The bar at the top: the title, and the links of the navbar"
    home = f'<a href="{up}index.html">{escape(website["title"])}</a>'
    icon = f'<link rel="icon" href="{up}{website["favicon"]}">'
    return f'{icon}<header>{home}{bar(website["navbar"]["right"])}</header>'


def footer(website):
    "The bar at the bottom"
    foot = website['page-footer']
    return f'<footer><span>{escape(foot["left"])}</span>{bar(foot["right"])}</footer>'


def neighbours(order, file, link):
    "Links to the pages before and after `file` in the menu; `link` is that of `menu`"
    at = order.index(file) if file in order else None
    if at is None: return ''
    before = order[at-1] if at else None
    after = order[at+1] if at+1 < len(order) else None
    return f'<ul class="turn">{"".join(link(o) if o else "<li></li>" for o in (before, after))}</ul>'


def whole_page(title, subtitle, html, nav, style, head='', foot=''):
    "A page that can be opened"
    title = escape(title)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{title}</title><style>{style}</style>{head}'
            f'<nav><details><summary>Contents</summary><ul>{nav}</ul></details></nav>'
            f'<main><h1>{title}</h1>\n<p>{escape(subtitle)}</p>\n{html}</main>{foot}{UNFOLD}</html>')


def page_style(quarto, css):
    "The style of a page: the widths that `_quarto.yml` sets, then the site's own style"
    grid = quarto['format']['html']['grid']
    return STYLE.format(**{k: grid[f'{k}-width'] for k in ('sidebar', 'body', 'margin')}) + css
