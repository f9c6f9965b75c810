"""Build the docs without Quarto, and check them.

The notebooks are processed as `make docs` does, rendered with pandoc into `_check/`, and then every
link, anchor and image of the HTML is resolved; links to other sites are counted, not visited.
Other faults are found by `docs_faults.py` and `docs_reader.py`, what a browser shows by `widths.py`.
"""
import json, os, re, runpy, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from html import escape
from urllib.parse import unquote, urlsplit
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs
import browser, widths
from docs_faults import (exported, html_faults, index_faults, menu_faults, menu_files, order_faults,
                         output_faults, shown)
from docs_pages import (Parts, bar_links, footer, header, menu, neighbours, page_style, render, to_pages,
                        whole_page)
from docs_reader import reader_faults
from llms import FILE, llms
from readme import readme

cfg = get_config()
root = cfg.config_path
out = root/'_check'
site = f'{cfg.doc_host}{cfg.doc_baseurl}/'
source = f'{cfg.git_url}/blob/{cfg.branch}/'
sidebar = menu_files                       # its name in tests/test_repo.py


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
    to = pages.get(to, to)                        # a link to a notebook leads to its page
    if to in infos:
        known = not url.fragment or unquote(url.fragment) in infos[to].ids
        return None if known else f'{to} has no anchor'
    lost = to.startswith('..') or not ((cfg.nbs_path/to).is_file() or (out/to).is_file())
    return 'leads nowhere on the site' if lost else None


def notebook_faults(name, processed, symbols, parts):
    "What is wrong with a notebook, with what nbdev made of it and with its page"
    book = json.loads((cfg.nbs_path/name).read_text(encoding='utf-8'))
    made = json.loads(processed.read_text(encoding='utf-8'))
    module, names = exported(book)
    if module: yield from index_faults(f'{cfg.lib_path.name}.{module}', names, symbols)
    yield from order_faults(names, shown(made))
    yield from output_faults(made)
    yield from html_faults(parts)
    yield from reader_faults(name, book, parts)


def faults(cache, made, infos, quarto):
    "One line for each fault of the site, apart from what is cut"
    pages = {nb: page for nb,(page,*_) in made.items()}
    symbols = runpy.run_path(cfg.lib_path/'_modidx.py')['d']['syms']
    for nb,(page,title,*_) in made.items():
        if not title: yield f'{nb}: no title'
        for o in notebook_faults(nb, cache/nb, symbols, infos[page]): yield f'{nb}: {o}'
        for link in infos[page].links:
            if why := fault(link, page, pages, infos): yield f'{nb}: {why}: {link}'
    yield from menu_faults(quarto['website']['sidebar']['contents'], made)
    if (root/'README.md').read_text(encoding='utf-8') != readme():
        yield "README.md is out of step: run 'make readme'"
    listed = llms()
    if not FILE.is_file() or FILE.read_text(encoding='utf-8') != listed:
        yield "nbs/llms.txt is out of step: run 'make readme'"
    for link in [*re.findall(r'\]\((.*?)\)', listed), *bar_links(quarto['website'])]:
        if why := fault(link, 'index.html', pages, infos): yield f'llms.txt or _quarto.yml: {why}: {link}'


def write(made, quarto):
    "The pages of `made`, with the pictures they show, in `_check/`"
    website = quarto['website']
    order = [o for o in sidebar(website['sidebar']['contents']) if o in made]
    for f in [*cfg.nbs_path.rglob('images/*'), FILE]:
        to = out/f.relative_to(cfg.nbs_path)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)
    pages = {nb: page for nb,(page,*_) in made.items()}
    style = page_style(quarto, (cfg.nbs_path/'styles.css').read_text(encoding='utf-8'))
    for nb,(page,title,subtitle,html) in made.items():
        up = '../'*page.count('/')

        def link(file):
            if file not in made: return ''
            return f'<li><a href="{up}{pages[file]}">{escape(made[file][1])}</a></li>'
        nav = ''.join(menu(website['sidebar']['contents'], link))
        html += neighbours(order, nb, link)
        whole = whole_page(title, subtitle, html, nav, style, header(website, up), footer(website))
        whole = to_pages(whole, page, pages).replace(f'href="{site}', f'href="{up}')
        (out/page).write_text(whole, encoding='utf-8')


def main():
    shutil.rmtree(out, ignore_errors=True)
    os.chdir(root)
    # A relative folder: nbdev skips notebooks whose full path has a part like `.cache`
    cache = proc_nbs(cfg.nbs_path.relative_to(root), force=True, n_workers=min(2, os.cpu_count()))
    names = [f.relative_to(cache).as_posix() for f in sorted(cache.rglob('*.ipynb'))]
    with ThreadPoolExecutor(2) as pool:     # pandoc works in processes of its own
        made = dict(zip(names, pool.map(lambda o: render(cache/o, o, out), names)))
    if not made: sys.exit('docs: no notebook was processed')
    quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    infos = {page: Parts(html) for page,_,_,html in made.values()}
    problems = list(faults(cache, made, infos, quarto))
    write(made, quarto)
    if browser.find():
        problems += widths.cut([out/page for page in infos]) + widths.below_the_fold(out/'index.html')
    else: print('docs: no Chromium on this machine, pages were not looked at')
    for o in problems: print('FAILED', o)
    links = [o for i in infos.values() for o in i.links]
    away = sum(o.startswith('http') and not o.startswith((site, source)) for o in links)
    print(f'docs: {len(made)} pages, {len(links)} links ({away} to other sites, not visited), '
          f'{len(problems)} problems; open {out.name}/index.html')
    sys.exit(bool(problems))


if __name__ == '__main__': main()
