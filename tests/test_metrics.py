"Metrics against closed forms, reference libraries and simulation."
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mean_absolute_error, r2_score
from robustnb.metrics import (
    accuracy, bootstrap, js_divergence, mae, mid_range, paired_difference, r2, wilson)

Z = 1.959963984540054

# One share

@pytest.mark.parametrize('k,n,lo,hi', [(81, 263, .2553, .3662), (15, 148, .0624, .1605),
                                       (0, 20, 0, .1611), (1, 29, .0061, .1718)])
def test_wilson_published_values(k, n, lo, hi):
    "Newcombe 1998, table I"
    assert wilson(k, n) == pytest.approx((lo, hi), abs=5e-5)

@pytest.mark.parametrize('n', [1, 7, 100, 10_000])
def test_wilson_solves_its_equation(n):
    for k in {0, 1, n//3, n-1, n}:
        lo, hi = wilson(k, n)
        for p in (lo, hi):
            assert (k/n-p)**2 == pytest.approx(Z*Z*p*(1-p)/n, abs=1e-12)
        assert 0 <= lo <= k/n <= hi <= 1
        assert hi-lo > 0
        assert wilson(n-k, n) == pytest.approx((1-hi, 1-lo))

def test_wilson_ends_and_levels():
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1
    assert wilson(0, 1000)[1] == pytest.approx(Z*Z/(1000+Z*Z))
    wide = wilson(30, 100, .99)
    narrow = wilson(30, 100, .8)
    assert wide[0] < narrow[0] < .3 < narrow[1] < wide[1]

@pytest.mark.parametrize('args,message',
                         [((0, 0), 'at least 1 image; got 0'), ((-1, 5), r'\[0, 5\]; got -1'),
                          ((6, 5), r'\[0, 5\]; got 6'), ((float('nan'), 5), 'got nan'),
                          ((1, float('nan')), 'got nan'), ((1, 5, 1), r'`level`.*got 1'),
                          ((1, 5, 95), '`level`.*got 95'), ((1, 5, float('nan')), '`level`')])
def test_wilson_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        wilson(*args)

def test_wilson_coverage():
    rng = np.random.default_rng(0)
    for p in (.05, .5, .9):
        hit = [lo <= p <= hi for lo,hi in (wilson(int(k), 60) for k in rng.binomial(60, p, 2000))]
        assert .92 < np.mean(hit) < .985

# Two shares of the same images

def slow_paired(a, b):
    "The normal interval of the mean of a-b after half an image is added to each of the four cells"
    # every image counted as two halves
    d = np.concatenate([np.repeat(np.asarray(a)-np.asarray(b), 2), [1, -1, 0, 0]])
    half = Z*d.std()/np.sqrt(len(d)/2)
    return d.mean()-half, d.mean()+half

@pytest.mark.parametrize('n,seed', [(5, 0), (40, 1), (300, 2)])
def test_paired_difference_against_the_slow_version(n, seed):
    a, b = np.random.default_rng(seed).integers(0, 2, (2, n))
    d, lo, hi = paired_difference(a, b)
    assert d == pytest.approx(a.mean()-b.mean())
    assert (lo, hi) == pytest.approx(slow_paired(a, b))
    assert paired_difference(b, a) == pytest.approx((-d, -hi, -lo))

def test_paired_difference_direction_and_inputs():
    d, lo, hi = paired_difference(np.ones(50, bool), torch.zeros(50))
    assert d == 1
    assert .8 < lo < 1 == hi
    d, lo, hi = paired_difference([1]*50, [1]*50)
    assert d == 0
    assert hi == -lo > 0
    assert paired_difference([1]*500, [1]*500)[2] < hi

@pytest.mark.parametrize('both,only_a,only_b', [(.6, .1, .1), (.85, .08, .02), (.3, .4, .1)])
def test_paired_difference_coverage(both, only_a, only_b):
    rng = np.random.default_rng(0)
    hits = []
    for cells in rng.multinomial(80, [both, only_a, only_b, 1-both-only_a-only_b], 2000):
        _, lo, hi = paired_difference(np.repeat([1, 1, 0, 0], cells),
                                      np.repeat([1, 0, 1, 0], cells))
        hits.append(lo <= only_a-only_b <= hi)
    assert .93 < np.mean(hits) < .985

@pytest.mark.parametrize('a,b,message',
                         [([0, 1], [0], r'\(2,\) and \(1,\)'), ([], [], 'at least one row'),
                          ([0, 2], [0, 1], '`a`.*got 2.0'), ([0, 1], [.5, 1], '`b`.*got 0.5'),
                          ([0, float('nan')], [0, 1], '`a` must be finite; row 1')])
def test_paired_difference_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)

# Bootstrap

def test_bootstrap_of_a_mean():
    x = np.random.default_rng(0).normal(3, 2, 500)
    value, lo, hi = bootstrap(np.mean, x, n=4000)
    half = Z*x.std()/np.sqrt(500)
    assert value == x.mean()
    assert (lo, hi) == pytest.approx((value-half, value+half), abs=.1*half)
    assert bootstrap(np.mean, x, n=4000,
                     level=.5)[1] == pytest.approx(value-.6745*x.std()/np.sqrt(500), abs=.1*half)

def test_bootstrap_coverage():
    rng = np.random.default_rng(1)
    hits = [lo <= 0 <= hi for _,lo,hi in (bootstrap(np.mean, rng.normal(size=40), n=200, seed=i)
                                          for i in range(400))]
    assert .89 < np.mean(hits) < .975

def test_bootstrap_keeps_rows_together():
    x = np.random.default_rng(0).normal(size=(50, 3))
    gap = lambda a,b: abs(a[:, 0]-b).max()
    assert bootstrap(gap, x, x[:, 0], n=100) == (0, 0, 0)
    assert bootstrap(np.mean, x[:, 0], n=100, seed=1) == bootstrap(
        np.mean, x[:, 0], n=100, seed=1) != bootstrap(np.mean, x[:, 0], n=100, seed=2)

def test_bootstrap_leaves_global_randomness_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bootstrap(np.mean, np.arange(9.), n=100)
    assert (np.random.get_state()[1] == before).all()

def test_bootstrap_and_undefined_draws():
    true = np.arange(6.)
    value, lo, hi = bootstrap(r2, true, true+.1, n=300)
    assert lo <= value <= hi <= 1
    with pytest.raises(ValueError, match='undefined on .* of 300 draws. Use more rows'):
        bootstrap(r2, true[:2], true[:2], n=300)
    with pytest.raises(ValueError, match='it is nan on the 3 rows'):
        bootstrap(r2, np.ones(3), np.ones(3), n=300)

@pytest.mark.parametrize('columns,kw,message', [
    ((), {}, 'at least one array'), (([1, 2], [1]), {}, r'\(2,\), \(1,\)'),
    (([1],), {}, 'at least 2'), ((3.,), {}, 'same rows'),
    (([1, 2],), dict(n=10), 'at least 100 draws; got 10'), (([1, 2],), dict(level=95), '`level`')])
def test_bootstrap_refuses(columns, kw, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(np.mean, *columns, **kw)

# Predictions

def test_r2_and_mae_against_sklearn():
    true, pred = np.random.default_rng(0).normal(size=(2, 60))
    for p in (pred, true+.1*pred, 3*true):
        assert r2(true, p) == pytest.approx(r2_score(true, p))
        assert mae(true, p) == pytest.approx(mean_absolute_error(true, p))
    assert r2(true, pred) != pytest.approx(r2(pred, true))
    assert np.isnan(r2([1, 1], [0, 2]))
    assert mae([1, 1], [0, 2]) == 1

@pytest.mark.parametrize('fn', [r2, mae])
def test_predictions_must_match(fn):
    with pytest.raises(ValueError, match=r'`true` and `pred`.*\(2,\) and \(2, 1\)'):
        fn([1, 2], [[1], [2]])
    with pytest.raises(ValueError, match='`pred` must be finite; row 1'):
        fn([1, 2], [1, float('inf')])
    with pytest.raises(ValueError, match='at least one row'):
        fn([], [])

def test_mid_range_includes_its_ends():
    assert mid_range([-.1, .019, .02, .5, .8, .81]).tolist() == [
        False, False, True, True, True, False]
    with pytest.raises(ValueError, match='`lo` must be below `hi`'):
        mid_range([.1], .8, .02)
    with pytest.raises(ValueError, match='finite; row 0'):
        mid_range([float('nan')])

def test_accuracy():
    logits = torch.tensor([[.1, .9], [.8, .2], [.4, .6], [.7, .3]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == .75
    assert accuracy(logits.numpy(), [0, 1, 0, 1]) == 0
    with pytest.raises(ValueError, match='got 2 at position 1'):
        accuracy(logits, [0, 2, 0, 0])
    with pytest.raises(ValueError, match='got -1 at position 0'):
        accuracy(logits, [-1, 0, 0, 0])
    with pytest.raises(ValueError, match=r'\(4, 2\) and \(3,\)'):
        accuracy(logits, [0, 1, 0])
    with pytest.raises(ValueError, match='row 2 is not'):
        accuracy(logits.index_fill(0, torch.tensor(2), float('nan')), [0, 0, 0, 0])

def test_js_divergence_against_scipy():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(10, .3), (2, 50))
    p[0, :5] = 0
    p[0] /= p[0].sum()
    want = [jensenshannon(a, b)**2 for a,b in zip(p, q)]
    np.testing.assert_allclose(js_divergence(p, q), want, atol=1e-12)
    np.testing.assert_allclose(js_divergence(q, p), want, atol=1e-12)
    assert (js_divergence(p, p) == 0).all()

def test_js_divergence_near_zero():
    "For small differences it is sum (p-q)^2/(8 p)"
    p = np.full((1, 4), .25)
    d = np.array([[1, -1, 2, -2]])*1e-4
    assert js_divergence(p, p+d)[0] == pytest.approx((d**2/(8*p)).sum(), rel=1e-3)

@pytest.mark.parametrize('p,q,message', [
    ([[2., 1]], [[.5, .5]], '`p`.*softmax'), ([[.5, .5]], [[1.5, -.5]], '`q`.*-0.5, 1.5'),
    ([.5, .5], [.5, .5], r'\(N,K\)'), ([[.5, .5]], [[.5, .5]]*2, 'same rows'),
    ([[float('nan'), 1]], [[.5, .5]], 'finite')])
def test_js_divergence_refuses(p, q, message):
    with pytest.raises(ValueError, match=message):
        js_divergence(p, q)
