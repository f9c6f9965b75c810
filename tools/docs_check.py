"""Build the docs without Quarto, and check them.

The notebooks are processed exactly as `nbdev_docs` does, rendered with pandoc (the Markdown reader that Quarto uses) into
`_check/`, and then every link, anchor and image of the HTML is resolved. Links to other sites are counted, not visited.
"""
import base64, json, os, re, shutil, sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pypandoc, yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

cfg = get_config()
root, out = cfg.config_path, cfg.config_path/'_check'
site = f'{cfg.doc_host}{cfg.doc_baseurl}/'
source = f'{cfg.git_url}/blob/{cfg.branch}/'
style = '''
body{font:16px/1.55 system-ui,sans-serif;color:#222;max-width:76em;margin:0 auto;padding:1em;display:flex;gap:2.5em}
nav{flex:0 0 14em;font-size:.9em} nav ul{padding-left:1em} nav summary{font-weight:bold} main{min-width:0;flex:1} a{color:#0b5cad}
pre,table{overflow-x:auto;font-size:.86em} table{display:block;border-collapse:collapse} td,th{padding:.2em .7em;text-align:right}
tr{border-bottom:1px solid #ddd} pre{background:#f6f6f6;padding:.7em} img{max-width:100%;height:auto} math{overflow-x:auto;max-width:100%}
math[display=block]{display:block} p,li,td,h1,h2,h3,h4{overflow-wrap:anywhere} td,th{overflow-wrap:normal;border:0} table{border:0}
.sourceCode code{white-space:pre-wrap} .co{color:#666} .kw,.cf,.im{color:#8250a0} .st{color:#236b36}
@media(max-width:48em){body{flex-direction:column;gap:0} nav{flex:none} main{width:100%}}'''

unfold = '<script>if (innerWidth > 768) document.querySelector("nav details").open = true</script>'      # on a telephone the contents stay folded


def text(s): return s if isinstance(s, str) else ''.join(s)
def fence(s, lang=''): return f'\n``````{lang}\n{s.rstrip()}\n``````\n'


def output_md(o, picture, name):
    "Markdown of one saved output; `picture(bytes, file name)` stores an image and gives its link"
    if o['output_type'] == 'stream': return fence(text(o['text'])) if o['name'] == 'stdout' else ''
    d = o.get('data', {})
    if 'text/markdown' in d: return '\n' + text(d['text/markdown']) + '\n'
    for k in ('text/html', 'image/svg+xml'):
        if k in d: return fence(text(d[k]), '{=html}')
    for k in ('image/png', 'image/jpeg'):
        if k in d: return f'\n![]({picture(base64.b64decode(text(d[k])), f"{name}.{k[6:]}")})\n'
    return fence(text(d['text/plain'])) if 'text/plain' in d else ''


def notebook_md(nb, picture):
    "Front matter and Markdown of a processed notebook"
    front, md = {}, []
    for n,cell in enumerate(nb['cells']):
        src = text(cell['source'])
        if cell['cell_type'] == 'raw':
            if src.lstrip().startswith('---'): front.update(yaml.safe_load(src.strip().strip('-')) or {})
        elif cell['cell_type'] == 'markdown': md.append(src)
        else:
            opt = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', src, re.M))
            src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
            if opt.get('include') == 'false': continue
            if src and opt.get('echo') != 'false':
                code = fence(src, ' python')
                if opt.get('code-fold') == 'true':
                    code = f'<details><summary>{opt.get("code-summary", "Code")}</summary>\n{code}\n</details>'
                md.append(code)
            if opt.get('output') != 'false': md += [output_md(o, picture, f'{n}-{i}') for i,o in enumerate(cell['outputs'])]
    return front, '\n\n'.join(md)


def pandoc(md, to, *args):
    return pypandoc.convert_text(md, to, format='markdown+autolink_bare_uris+emoji', extra_args=list(args))


class Page(HTMLParser):
    "The ids and links of some HTML"
    def __init__(self, html):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k == 'id': self.ids.add(v)
            elif k in ('href', 'src') and v and not v.startswith('#cb'): self.links.append(v)     # not the lines of code


def render(path, name):
    "Page name, title, subtitle and HTML of the processed notebook at `path`; its pictures go to `_check/`"
    here, stem = (out/name).parent, Path(name).stem
    here.mkdir(parents=True, exist_ok=True)

    def picture(data, file):
        (here/f'{stem}_files').mkdir(exist_ok=True)
        (here/f'{stem}_files'/file).write_bytes(data)
        return f'{stem}_files/{file}'

    front, md = notebook_md(json.loads(path.read_text(encoding='utf-8')), picture)
    page = Path(name).with_name(front.get('output-file', stem+'.html')).as_posix()
    return page, front.get('title', ''), front.get('description', ''), pandoc(md, 'html', '--mathml')


def fault(link, page, pages, infos):
    "What is wrong with `link` on `page`, None if nothing is"
    if link.startswith(source):
        file, _, line = link[len(source):].partition('#L')
        return None if (root/file).exists() and line != 'None' else 'no such source line'
    inside = link.startswith(site)
    url = urlsplit(link[len(site):] if inside else link)
    if url.scheme or url.netloc: return None
    base = '' if inside else os.path.dirname(page)
    to = os.path.normpath(os.path.join(base, unquote(url.path))) if url.path else page
    to = pages.get(to, to)                                          # a link to a notebook leads to its page
    if to in infos: return f'{to} has no anchor' if url.fragment and unquote(url.fragment) not in infos[to].ids else None
    here = to.startswith('..') or not ((cfg.nbs_path/to).is_file() or (out/to).is_file())
    return 'leads nowhere on the site' if here else None


def sidebar(items):
    "The files that the sidebar of `_quarto.yml` names, in order"
    for o in items:
        if isinstance(o, str): yield o
        else: yield from ([o['href']] if 'href' in o else []) + list(sidebar(o.get('contents', [])))


def contents(items, link):
    "The sidebar as nested lists; `link(file)` is a list entry, empty for a file without a page"
    for o in items:
        if isinstance(o, str): yield link(o)
        elif 'href' in o: yield link(o['href'])
        else: yield f'<li>{escape(o["section"])}<ul>{"".join(contents(o["contents"], link))}</ul></li>'


def main():
    shutil.rmtree(out, ignore_errors=True)
    os.chdir(root)                        # a relative folder: nbdev skips notebooks whose full path has a part like `.cache`
    cache = proc_nbs(cfg.nbs_path.relative_to(root), force=True, n_workers=min(2, os.cpu_count()))
    made = {f.relative_to(cache).as_posix(): render(f, f.relative_to(cache).as_posix()) for f in sorted(cache.rglob('*.ipynb'))}
    if not made: sys.exit('docs: no notebook was processed')
    pages = {nb: page for nb,(page,*_) in made.items()}
    infos = {page: Page(html) for page,_,_,html in made.values()}
    problems = [f'{nb}: no title' for nb,(_,title,_,_) in made.items() if not title]
    problems += [f'{nb}: {why}: {link}' for nb,page in pages.items() for link in infos[page].links
                 if (why := fault(link, page, pages, infos))]

    for f in cfg.nbs_path.rglob('images/*'):
        (out/f.relative_to(cfg.nbs_path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, out/f.relative_to(cfg.nbs_path))
    side = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    for page,title,subtitle,html in made.values():
        up = '../'*page.count('/')
        nav = ''.join(contents(side, lambda o: f'<li><a href="{up}{pages[o]}">{escape(made[o][1])}</a></li>' if o in made else ''))

        def to_page(m):
            t = pages.get(os.path.normpath(os.path.join(os.path.dirname(page), unquote(m[1]))))
            return f'href="{os.path.relpath(t, os.path.dirname(page) or ".")}' if t else m[0]
        html = re.sub(r'href="(?!\w+:)([^"#]*\.ipynb)', to_page, html).replace(f'href="{site}', f'href="{up}')
        (out/page).write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{escape(title)}</title><style>{style}</style><nav><details><summary>{escape(cfg.title)}</summary><ul>{nav}</ul></details></nav>'
            f'<main><h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n{html}</main>{unfold}</html>', encoding='utf-8')
    for o in problems: print('FAILED', o)
    links = [o for i in infos.values() for o in i.links]
    away = sum(o.startswith('http') and not o.startswith((site, source)) for o in links)
    print(f'docs: {len(made)} pages, {len(links)} links ({away} to other sites, not visited), {len(problems)} problems; '
          f'open {out.name}/{pages.get(cfg.readme_nb, "")}')
    sys.exit(bool(problems))


if __name__ == '__main__': main()
