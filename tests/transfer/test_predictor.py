"The predictor from change to loss: known curves, models left out, intervals that hold"
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit
from scipy.special import expit

from robustnb.transfer import predictor as module
from robustnb.transfer.prediction import prediction_interval
from robustnb.transfer.predictor import (
    fit_predictor, fit_predictors, LossPredictor, load_predictor, predict_losses)


def made_up(models='abcdef', n=30, shift=0., seed=0):
    rng = np.random.default_rng(seed)
    f = 10**rng.uniform(-3.5, -.2, n*len(models))
    own = np.repeat(rng.normal(size=len(models))*shift, n)
    return pd.DataFrame(dict(model=np.repeat([*models], n), n_classes=10, change=f,
                             loss=.9*expit(4 + 3*np.log10(f) + own)))


def test_coefficients_are_those_of_least_squares():
    rows = made_up(shift=.3)
    predictor, _ = fit_predictor(rows, ('change',), 'loss', resamples=2)
    b, _ = curve_fit(lambda x, a, b: .9*expit(a + b*x), np.log10(rows.change), rows.loss, p0=(1, 1))
    assert np.allclose(predictor.coefficients, b, atol=.02)


def test_a_model_left_out_has_no_say_in_its_prediction():
    rows = made_up(shift=.3)
    _, left = fit_predictor(rows, ('change',), 'loss', resamples=2)
    spoilt = rows.assign(loss=np.where(rows.model == 'c', .9-rows.loss, rows.loss))
    _, again = fit_predictor(spoilt, ('change',), 'loss', resamples=2)
    c = rows.model == 'c'
    assert np.allclose(left.predicted[c], again.predicted[c])
    assert not np.allclose(left.predicted[~c], again.predicted[~c], atol=.01)


def test_the_interval_of_a_model_left_out_is_that_of_the_errors_of_others():
    """A model far from the others does not widen its own interval, and lies outside of it; it does widen
    that of the others"""
    rows = made_up(shift=.05)
    odd = rows.assign(loss=np.where(rows.model == 'c', .9*expit(7 + 3*np.log10(rows.change)), rows.loss))
    _, left = fit_predictor(rows, ('change',), 'loss')
    predictor, again = fit_predictor(odd, ('change',), 'loss')
    odds = lambda p: np.log(p/(.9-p))
    half = lambda t: odds(t.hi) - odds(t.predicted)
    assert np.allclose(half(again), odds(again.predicted) - odds(again.lo))
    held = (again.lo <= odd.loss) & (odd.loss <= again.hi)
    c = rows.model == 'c'
    assert half(again)[c].max() < .8*predictor.spread
    assert half(again)[~c].min() >= .99*predictor.spread > 2*half(left).max()
    assert held[c].mean() < .5 and held[~c].mean() > .9


def test_without_an_error_of_another_nothing_is_known():
    _, left = fit_predictor(made_up('ab'), ('change',), 'loss', resamples=1)
    width = (left.hi - left.lo).groupby(left.model).max()
    assert width.min() < .5 and width.max() == pytest.approx(.9)


def test_the_interval_widens_with_the_difference_between_models_and_holds_for_new_ones():
    alike = fit_predictor(made_up('abcdefghijkl', 10, .05), ('change',), 'loss')[0]
    unlike = fit_predictor(made_up('abcdefghijkl', 10, .8), ('change',), 'loss')[0]
    assert unlike.spread > 3*alike.spread
    new = made_up([str(k) for k in range(40)], 10, .8, 5)
    p = unlike.predict(new)
    assert ((p.lo <= new.loss) & (new.loss <= p.hi)).mean() > .8
    assert (p.hi-p.lo).max() < .9


def test_the_predictor_is_monotone_and_knows_its_range():
    rows = made_up()
    predictor, _ = fit_predictor(rows.assign(loss=.9-rows.loss), ('change',), 'loss', resamples=2)
    # more change never means less loss, whatever the rows say
    assert predictor.coefficients[1] >= 0
    predictor, _ = fit_predictor(rows, ('change',), 'loss', resamples=2)
    p = predictor.predict(pd.DataFrame(dict(
        change=[1e-4, rows.change.min(), .01, rows.change.max(), 1.], n_classes=10)))
    assert p.outside.tolist() == [True, False, False, False, True]
    assert p.predicted.is_monotonic_increasing
    assert (p.lo < p.predicted).all()
    assert (p.predicted < p.hi).all()
    many = predictor.predict(pd.DataFrame(dict(change=[1.], n_classes=[1000])))
    assert many.predicted[0] == pytest.approx(p.predicted[4]/.9*.999)


def test_same_seed_same_interval_and_two_models_are_enough():
    rows = made_up('ab', shift=.3)
    a = fit_predictor(rows, ('change',), 'loss', 9, 0)[0]
    b = fit_predictor(rows, ('change',), 'loss', 9, 0)[0]
    c = fit_predictor(rows, ('change',), 'loss', 9, 1)[0]
    assert a == b
    assert a.spread > 0
    assert fit_predictor(rows, ('change',), 'loss', 9, -1)[0].spread > 0
    assert replace(c, spread=0) == replace(a, spread=0)
    with pytest.raises(ValueError, match='at least 2 models'):
        fit_predictor(rows[rows.model == 'a'], ('change',), 'loss')


def test_what_ships():
    for name in ('loss', 'robust_loss'):
        assert isinstance(load_predictor(name), LossPredictor)
    with pytest.raises(ValueError, match='robust_loss'):
        load_predictor('speed')


def test_nineteen_errors_in_twenty_are_inside():
    rows = made_up(shift=.3)
    f = np.log10(rows[['change']].to_numpy())
    parts = f, np.full(len(f), .9), rows.loss.to_numpy(), rows.model.to_numpy()
    errors, whose = module._bootstrap_errors(*parts, 20, 3)
    predictor, left = fit_predictor(rows, ('change',), 'loss', 20, 3)
    assert (errors <= predictor.spread).mean() == pytest.approx(.95, abs=.002)
    odds = lambda p: np.log(p/(.9-p))
    half = (odds(left.hi) - odds(left.predicted))[rows.model == 'b'].iloc[0]
    assert (errors[whose != 'b'] <= half).mean() == pytest.approx(.95, abs=.002)


def test_budgets_count_once_for_clean_images_and_what_was_not_measured_does_not(monkeypatch):
    monkeypatch.setattr(module, 'fit_predictor', partial(fit_predictor, resamples=1))
    rng = np.random.default_rng(0)
    clean = pd.DataFrame(dict(model=np.repeat([*'abc'], 6), format=[*'uvwxyz']*3, n_classes=10,
                              flips=10**rng.uniform(-3, -.5, 18), noise=10**rng.uniform(-2, 1, 18),
                              activation_noise=10**rng.uniform(-3, 0, 18)))
    clean = clean.assign(measured_loss=.8*clean.flips)
    rows = pd.concat([clean.assign(measured_robust_loss=clean.flips*k) for k in (1, 1.5, np.nan)])
    rows = rows.sample(frac=1, random_state=0)
    found, left = fit_predictors(rows)
    assert len(left['loss']) == 18 and len(left['robust_loss']) == 36
    once = fit_predictor(rows.drop_duplicates(['model', 'format']), ('flips', 'noise'), 'measured_loss', 1)[0]
    assert found['loss'] == once
    known = rows[rows.measured_robust_loss.notna()]
    robust = fit_predictor(known, module._reads['robust_loss'], 'measured_robust_loss', 1)[0]
    assert found['robust_loss'] == robust


def test_each_row_is_predicted_by_what_is_known_of_it():
    """Attacked photographs give a robust loss and its interval, which holds it also below 0; too few
    survivors none; crops that of the fitted predictor"""
    table = pd.DataFrame(dict(
        n_classes=10, flips=.1, noise=.5, activation_noise=.2, expected_loss=[.1, .2, .3, .4],
        crops=[0, 0, 1, 1], photographs=[100, 100, 300, 0], presumed_accuracy=[.9, .5, .7, np.nan],
        expected_robust_loss=[.25, -.1, np.nan, np.nan], survivors=[40, 30, 19, np.nan]))
    found = predict_losses(table)
    for row in found.itertuples():
        accuracy = dict(accuracy=row.presumed_accuracy) if row.photographs else {}
        ends = prediction_interval(row.expected_loss, row.photographs, bool(row.crops), **accuracy)
        said = row.predicted_loss, row.predicted_loss_lo, row.predicted_loss_hi
        assert said == (row.expected_loss, *ends)
    robust = [f'predicted_robust_loss{o}' for o in ('', '_lo', '_hi', '_outside')]
    fitted = load_predictor('robust_loss').predict(table)
    assert found[robust].iloc[0].tolist() == [.25, *prediction_interval(.25, 40, accuracy=.9), False]
    assert found[robust].iloc[1].tolist() == [-.1, -.1, prediction_interval(0., 30, accuracy=.5)[1], False]
    assert found[robust[:3]].iloc[2].isna().all()
    assert found[robust].iloc[3].tolist() == fitted[['predicted', 'lo', 'hi', 'outside']].iloc[3].tolist()
    with pytest.raises(ValueError, match='`table` must have the columns .* photographs are missing'):
        predict_losses(table.drop(columns='photographs'))


@pytest.mark.parametrize('column, value, said', (
    ('measured_loss', 32.2, 'from -inf to 1 as measured_loss; v of b has 32.2'),
    ('flips', -.1, 'from 0 to 1 as flips'), ('n_classes', 1, 'from 2 to inf as n_classes'),
    ('n_classes', np.nan, 'as n_classes'), ('noise', np.inf, 'as noise'), ('noise', '0,322', "has '0,322'")))
def test_tables_that_were_edited_by_hand_are_looked_at(column, value, said):
    rows = pd.DataFrame(dict(model=np.repeat([*'abc'], 2), format=[*'uv']*3, n_classes=10., flips=.1,
                             noise=.2, activation_noise=.1, measured_loss=.1, measured_robust_loss=.2))
    rows[column] = rows[column].astype(object)
    rows.loc[3, column] = value
    with pytest.raises(ValueError, match=said):
        fit_predictors(rows)
