"""From measured networks to what ships: the predictors, the rows with each network left
out, the figure of the front page.

    python tools/fit_predictors.py work/AlexNet work/AlexNet_BN ...    (folders of study.py)
"""
import shutil, sys, tempfile
from pathlib import Path

import pandas as pd

from robustnb.plots import plot_predicted
from robustnb.commands.fit_predictor import fit_predictor_command

root = Path(__file__).parent.parent


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as out:
        fit_predictor_command(','.join(sys.argv[1:]), out=out)
        for name, place in (
                ('predictors.json', 'robustnb/transfer/predictors.json'),
                ('manifest.json', 'results/transfer_lomo.json'),
                *((f'{k}_lomo.csv', f'results/{k}_lomo.csv') for k in ('transfer', 'robust'))):
            shutil.copyfile(Path(out)/name, root/place)
    rows = pd.read_csv(root/'results/transfer_lomo.csv').rename(columns=dict(
        measured_loss='measured loss (share)', predicted_loss='predicted loss (share)'))
    ax = plot_predicted(
        rows, 'measured loss (share)', 'predicted loss (share)', by='model',
        caption='each network left out of its own fit; n = 1,000 photographs, one seed')
    ax.figure.savefig(root/'nbs/images/transfer_cifar10.png', dpi=110, bbox_inches='tight')
