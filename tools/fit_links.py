"""Collect assessments into results/transfer_cifar10.csv and fit the links that ship with the package.

    python tools/fit_links.py assess/ResNet_18 assess/VGG_16 ...

Each folder holds report_table.csv and manifest.json of `robustnb_assess --test`.
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path
import pandas as pd
from robustnb.core import atomic_path, manifest, save_json
from robustnb.plots import plot_predicted
from robustnb.similarity import fit_link

root = Path(__file__).parent.parent
FEATURES = ('js',)     # the best of those compared in nbs/results/transfer_cifar10.ipynb


def fit(rows):
    "Both links from rows of measured models; rows without a measured loss are left out."
    return {name: fit_link(rows.dropna(subset=f'measured_{name}'), FEATURES, f'measured_{name}') for name in ('loss', 'robust_loss')}


def main(folders):
    facts = {Path(f).name: json.loads((Path(f)/'manifest.json').read_text()) for f in folders}
    rows = pd.concat([pd.read_csv(Path(f)/'report_table.csv').assign(model=Path(f).name) for f in folders], ignore_index=True)
    rows = rows[['model', *(c for c in rows if c != 'model' and not c.startswith('predicted'))]]
    fitted = fit(rows)
    links = {name: asdict(link) for name, (link, _) in fitted.items()}
    names = dict(measured_loss='measured loss of accuracy (share)', predicted='predicted (share)')
    ax = plot_predicted(fitted['loss'][1].rename(columns=names), *names.values(), by='model', caption='each network left out of the fit; n = 500 photographs')
    ax.figure.savefig(root/'nbs/images/transfer_cifar10.png', dpi=110, bbox_inches='tight')
    with atomic_path(root/'results/transfer_cifar10.csv') as tmp: rows.round(6).to_csv(tmp, index=False)
    save_json(facts, root/'results/transfer_cifar10_manifest.json')
    save_json(dict(links=links, manifest=manifest(rows=len(rows), data='results/transfer_cifar10.csv')), root/'robustnb/links.json')


if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    main(sys.argv[1:])
