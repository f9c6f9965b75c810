"Benchmarks on networks of others: tables that grow, answers that are asked for once, the report's sharpness."
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robustnb.transfer.certainty import expected_loss, foreseen_accuracy, granted, known_sharpness

sys.path.insert(0, str(Path(__file__).parents[2]/'benchmarks'/'transfer'))
import others, quantization_loss, training_photographs

pytestmark = pytest.mark.usefixtures('one_thread')


def logits(seed, n=200, K=10): return 3*torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
def near(l, seed): return l + .5*logits(seed, *l.shape)


def test_rows_take_the_place_of_those_of_the_same_network(tmp_path):
    path = tmp_path/'table.csv'
    rows = lambda name, *losses: [dict(network=name, loss=o) for o in losses]
    others.merged(rows('a', .1, .2) + rows('b', .3), path).to_csv(path, index=False)
    again = others.merged(rows('c', .5) + rows('a', .4), path)
    assert again.values.tolist() == [['a', .4], ['b', .3], ['c', .5]]
    with pytest.raises(ValueError, match='has other columns: more'):
        others.merged([dict(network='a', loss=.1, more=1)], path)


def test_what_a_file_holds_is_not_made_again(tmp_path):
    path = tmp_path/'work'/'kept.pt'
    assert others.kept(path, lambda: dict(a=1)) == dict(a=1)
    assert others.kept(path, lambda: 1/0) == dict(a=1)


@pytest.fixture
def held():
    L = logits(0)
    crops = [(logits(k), logits(k+5)) for k in (10, 20)]
    copy = dict(photographs=near(L, 1),
                crops=[(near(a, 2), near(b, 3), near(L, 4)) for a, b in crops])
    return dict(y=near(L, 7).argmax(1), photographs=L, shifted=[near(L, k) for k in range(30, 34)],
                crops=crops, copies=dict(INT4=copy))


def test_what_is_foreseen_is_asked_for_once(held, tmp_path, monkeypatch):
    torch.save(held, tmp_path/'net.pt')
    asked = []
    def counted(photographs=None, *crops, **told):
        asked.append((0 if photographs is None else len(photographs[0]), *sorted(told.items())))
        return predict_loss(photographs, *crops, **told)
    predict_loss = quantization_loss.predict_loss
    monkeypatch.setattr(quantization_loss, 'predict_loss', counted)
    row, = quantization_loss.rows_of('net', Namespace(work=tmp_path, truth='', seeds=1))
    whole = [o for o in asked if o[0] in (0, 200)]
    assert len(whole) == len(set(whole)) == 5 and len(asked) == 25
    accuracy = foreseen_accuracy(held['photographs'], held['shifted'])
    sharpness = known_sharpness(held['photographs'], accuracy)
    both = held['photographs'], held['copies']['INT4']['photographs']
    assert row['law'] == expected_loss(*both, sharpness)[0]
    assert row['crops_mean'] == row['crops']
    assert np.isfinite([row['classes'], row['classes_crops']]).all()


def test_training_photographs_are_read_with_the_sharpness_of_a_report(tmp_path):
    L = dict(train=logits(0), test=logits(1))
    Q = {k: near(l, 2) for k, l in L.items()}
    moved = {k: [near(l, 3 + i) for i in range(4)] for k, l in L.items()}
    y = {k: near(l, 8).argmax(1) for k, l in L.items()}
    torch.save(dict(y=y, original=L, shifted=moved, crops=logits(9), INT4=Q, POT4=Q), tmp_path/'net.pt')
    row = pd.DataFrame(training_photographs.rows_of('net', Namespace(work=tmp_path))).loc[0]
    for part in ('train', 'test'):
        sharpness = known_sharpness(L[part], foreseen_accuracy(L[part], moved[part]))
        assert row[f'law_{part}'] == pytest.approx(expected_loss(L[part], Q[part], sharpness)[0])
        assert row[f'law_{part}'] != pytest.approx(expected_loss(L[part], Q[part])[0], abs=1e-3)
        assert row[f'certainty_{part}'] == pytest.approx(float(granted(L[part]).max(1).values.mean()))
