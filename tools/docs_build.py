"""Render the site with Quarto into `_docs/`, by nbdev's own command.

This folder is on Python's path then, for `docs_parts.py`. README.md stays as it is: `make readme`
writes it, without Quarto.
"""
import sys
from nbdev.config import get_config
from nbdev.quarto import nbdev_docs
from docs_faults import site_faults


def build():
    "Build the site; faults of its pages, one line each"
    cfg = get_config()
    readme = cfg.config_path/'README.md'
    before = readme.read_bytes()
    readme.touch()              # nbdev writes it anew if its notebook is newer, as in a fresh clone
    nbdev_docs.__wrapped__()
    if readme.read_bytes() != before:
        readme.write_bytes(before)
        yield 'README.md: Quarto wrote it anew'
    yield from site_faults(cfg.doc_path)


if __name__ == '__main__':
    faults = list(build())
    for o in faults: print('FAILED', o)
    print(f'docs: {len(faults)} problems')
    sys.exit(bool(faults))
