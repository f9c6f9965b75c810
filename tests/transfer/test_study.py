"The Study: each part once, the same answers one by one and together; losses counted by hand."
import copy, json, re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustnb.attacks import standard
from robustnb.transfer import study as module
from robustnb.attacks.gradient import fgsm, multi_attack, pgd
from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.data import ImageSet
from robustnb.evaluation.robust_accuracy import transfer_attack, evaluate, robustness_curve
from robustnb.quant.ptq import calibrate, FakeQuantize, quantize
from robustnb.quant.formats import quant_spec
from robustnb.transfer.certainty import granted
from robustnb.transfer.features import noise_sum, relative_margin
from robustnb.transfer.prediction import predict_loss
from robustnb.transfer.study import assess, measure_one, Probes, relative_loss, Study, study_of
from robustnb.attacks.threat_models import L2, Linf

pytestmark = pytest.mark.usefixtures('one_thread')
quick = partial(pgd, steps=2)
budgets = (Linf(.25/255), Linf(1/255), Linf(4/255))


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope='module')
def probes(): return Probes.of(torch.rand(60, 3, 8, 8, generator=make_generator(0, 'probes')))


@pytest.fixture(scope='module')
def labelled(net):
    "Images with the labels that the network gives them, but for every fifth"
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    labels = predict(net, ImageSet(images, np.zeros(80, int), 4).x).argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % 4
    return ImageSet(images, labels, 4)


@pytest.fixture
def calls(monkeypatch):
    "How often each part is computed, by name"
    counts = dict.fromkeys(('predict', 'calibrate', 'quantize_as', 'evaluate', 'transfer_attack'), 0)
    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)
        return call
    for name in counts:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def test_nothing_is_computed_before_it_is_asked_for(net, probes, calls):
    study = Study(net, probes, budgets[:1])
    assert set(calls.values()) == {0}
    study.ranges
    assert calls['calibrate'] == 1
    assert calls['evaluate'] == 0


def test_what_no_format_changes_is_computed_once(net, probes, labelled, calls):
    study = Study(net, probes, budgets[:1], labelled, quick)
    start = dict(calls)
    study.rows('INT8')
    first = {k: n - start[k] for k, n in calls.items()}
    # predict: the probes, the probes shifted to four corners, and the copy on the probes
    assert first == dict(predict=6, calibrate=1, quantize_as=1, evaluate=5, transfer_attack=2)
    study.rows('INT4')
    study.original
    study.layers('INT4')
    study.copy('INT4')
    second = {k: n - start[k] - first[k] for k, n in calls.items()}
    assert second == dict(predict=1, calibrate=0, quantize_as=1, evaluate=3, transfer_attack=0)


def test_losses_are_those_counted_by_hand(net, probes, labelled):
    study = Study(net, probes, budgets[1:2], labelled, quick, seed=3)
    row = study.rows('INT3')[0]
    copy = quantize(net, 'INT3', probes.x)
    y = torch.as_tensor(labelled.y)
    def right(model, attack):
        generator = make_generator(3, 'attacked')
        x_adv = attack(model, labelled.x, y, budgets[1], generator=generator)
        clean = predict(model, labelled.x).argmax(1) == y
        return clean, clean & (predict(model, x_adv).argmax(1) == y)
    made = transfer_attack(net, quick)
    clean, robust = right(net, made)
    clean_copy, robust_copy = right(copy, multi_attack(made, quick))
    assert row['accuracy'] == pytest.approx(clean_copy.double().mean().item())
    assert row['robust_accuracy'] == pytest.approx(robust_copy.double().mean().item())
    assert row['measured_loss'] == pytest.approx(1 - clean_copy.sum().item()/clean.sum().item())
    robust_loss = 1 - robust_copy.sum().item()/robust.sum().item()
    assert row['measured_robust_loss'] == pytest.approx(robust_loss)
    assert study.original[0]['accuracy'] == .8
    assert study.original[0]['robust_accuracy'] == pytest.approx(robust.double().mean().item())
    assert row['measured_loss'] > 0
    assert row['measured_robust_loss'] > 0


def test_noise_and_flips_by_hand(net, probes):
    study = Study(net, probes, budgets[1:2], attack=quick)
    row = study.change('INT3')[0]
    copy = quantize(net, 'INT3', probes.x)
    a, b = predict(net, probes.x), predict(copy, probes.x)
    noise = noise_sum(calibrate(net, probes.x).graph, copy, probes.x)
    margin = relative_margin(a)
    tensors = len([m for m in copy.modules() if isinstance(m, FakeQuantize)])
    assert tensors > 1 and noise['activations'] > 0, 'the case is worth looking at'
    assert row['noise'] == pytest.approx(sum(noise.values())/margin)
    assert row['activation_noise'] == pytest.approx(noise['activations']/tensors/margin)
    assert row['flips'] == (a.argmax(1) != b.argmax(1)).double().mean().item() > 0
    assert (row['photographs'], row['crops']) == (60, False)
    assert row['expected_loss'] == predict_loss((a, b), accuracy=study.presumed_accuracy).loss


def judged(correct):
    "Rows of an attack that leaves these right, of clean images that are all right"
    both = [pd.DataFrame(dict(image=range(len(correct)), attack=k, threat='', correct=right))
            for k, right in (('clean', [True]*len(correct)), ('attacked', list(correct)))]
    return pd.concat(both)


def test_survivors_count_by_their_certainty():
    "Twenty stand of the thirty that are attacked; their copy holds those that are worth least"
    logits = torch.zeros(59, 3)
    logits[:, 0] = torch.linspace(3, .1, 59)**2
    study = SimpleNamespace(answers=logits, sharpness=.7, attacked=30)
    stood = np.arange(30) < 20
    stands = stood & (np.arange(30) >= 12)
    p = granted(logits, .7)[::2].max(1).values
    found = module._robust_expected(study, judged(stood), judged(stands))
    assert found == dict(expected_robust_loss=pytest.approx(1 - (p[12:20].sum()/p[:20].sum()).item()),
                         survivors=20)
    assert found['expected_robust_loss'] > 12/20 + .01
    few = module._robust_expected(study, judged(stood & (np.arange(30) > 0)), judged(stands))
    assert few['survivors'] == 19 and np.isnan(few['expected_robust_loss'])


def test_at_most_three_classes_are_named_and_none_under_a_twentieth():
    by_class = torch.tensor([.04, .2, torch.nan, .06, .5, .1])
    study = SimpleNamespace(model=SimpleNamespace(classes=None))
    assert module._worst_classes(study, by_class) == 'class 4 50%, class 1 20%, class 5 10%'
    study.model.classes = 'abcdef'
    assert module._worst_classes(study, by_class[:4]) == 'b 20%, d 6%'
    assert module._worst_classes(study, by_class[:1]) == ''


def test_a_test_set_changes_nothing_that_is_predicted(net, probes, labelled):
    with_test = Study(net, probes, budgets[1:2], labelled, quick).rows('INT3')[0]
    without = Study(net, probes, budgets[1:2], attack=quick).rows('INT3')[0]
    assert not any('measured' in k for k in without)
    assert without == {k: with_test[k] for k in without}
    assert {'predicted_loss', 'predicted_robust_loss', 'robust_flips'} <= without.keys()


def test_the_order_of_questions_changes_nothing(net, probes, labelled):
    forth = Study(net, probes, budgets[1:2], labelled, quick)
    back = Study(net, probes, budgets[1:2], labelled, quick)
    first = [forth.change('INT3'), forth.loss('INT3'), forth.loss('INT4')]
    last = [back.loss('INT4'), back.loss('INT3'), back.change('INT3')][::-1]
    assert first == last


def test_the_same_seed_gives_the_same_rows(net, probes, labelled):
    make = partial(Study, net, probes, budgets[1:2], labelled, quick)
    assert make(seed=1).rows('INT3') == make(seed=1).rows('INT3')
    assert make(seed=1).answers.equal(make(seed=2).answers)


def test_several_budgets_agree_with_each_alone(net, probes, labelled):
    "FGSM draws nothing, and on a linear network an image that is lost stays lost"
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    labels = predict(linear, labelled.x).argmax(1).numpy()
    ours = ImageSet(labelled.images, labels, 4)
    several = Study(linear, probes, budgets, ours, fgsm).rows('INT8')
    alone = [Study(linear, probes, (t,), ours, fgsm).rows('INT8')[0] for t in budgets]
    same = ['format', 'n_classes', 'eps', 'size_kb', 'js', 'flips', 'noise', 'activation_noise']
    same += ['measured_loss', 'accuracy', 'predicted_loss']
    for one, other in zip(several, alone):
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
        assert one['robust_accuracy'] <= other['robust_accuracy'] + 1/80
    accuracies = [r['robust_accuracy'] for r in several]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[2] < accuracies[0]
    assert [r['eps'] for r in several] == [t.eps for t in budgets]


def test_several_budgets_are_those_of_robustness_curve(net, probes, labelled):
    study = Study(net, probes, budgets, labelled, quick, attacked=50, seed=2)
    every = torch.linspace(0, len(labelled)-1, 50).round().long()
    x = labelled.x[every]
    y = torch.as_tensor(labelled.y)[every]
    curve = robustness_curve(net, x, y, transfer_attack(net, quick), list(budgets), seed=2)
    by_eps = curve.groupby('eps').correct.mean()
    found = [o['robust_accuracy'] for o in study.original]
    assert found == pytest.approx([by_eps[t.eps] for t in budgets])


def test_images_are_attacked_from_the_first_to_the_last(net, probes, labelled):
    study = Study(net, probes, budgets[1:2], labelled, quick, attacked=30)
    all_of_them = Study(net, probes, budgets[1:2], labelled, quick)
    some = [torch.linspace(0, len(o)-1, 30).round().long() for o in (probes.x, labelled)]
    few = Study(net, Probes.of(probes.x[some[0]]), budgets[1:2], labelled[some[1].numpy()], quick)
    assert study.original[0]['accuracy'] == all_of_them.original[0]['accuracy'] == .8
    assert study.original[0]['robust_accuracy'] == few.original[0]['robust_accuracy']
    assert study.original[0]['survivors_among_probes'] == few.original[0]['survivors_among_probes']
    row = study.rows('INT3')[0]
    whole = all_of_them.rows('INT3')[0]
    for name in ('accuracy', 'measured_loss', 'measured_loss_lo', 'js', 'flips', 'noise'):
        assert row[name] == whole[name], name
    assert row['robust_accuracy'] != whole['robust_accuracy']


def test_rows_are_plain_and_survive_a_file(net, probes, labelled):
    rows = Study(net, probes, budgets[1:2], labelled, quick).rows('INT4')
    assert {type(v) for v in rows[0].values()} <= {int, float, str, bool}
    assert json.loads(json.dumps(rows)) == rows


def test_too_few_survivors_say_nothing(net, probes, labelled):
    study = Study(net, probes, (Linf(.5),), labelled, quick)
    assert study.original[0]['robust_accuracy'] < .25
    row = study.rows('INT4')[0]
    nothing = ['robust_flips', *(f'{kind}_robust_loss{end}' for kind in ('measured', 'predicted')
                                 for end in ('', '_lo', '_hi'))]
    assert np.isnan([row[k] for k in nothing]).all()
    assert np.isfinite(row['measured_loss'])
    report = study.report([row], study.layers('INT4'))
    assert report.table.predicted_robust_loss.isna().all()
    assert 'robust lost' not in str(report)
    notes = ' '.join(report.facts['notes'])
    assert 'fewer than 20 attacked probes, so no robust loss is predicted' in notes
    assert 'fewer than 20 attacked test images, so no robust loss is measured' in notes
    assert 'less than twice as often as by chance' in notes


def test_crops_keep_the_fitted_robust_loss_and_say_so(net, probes):
    g = make_generator(0, 'crops')
    natural, x = torch.rand(2, 60, 3, 8, 8, generator=g)
    crops = Probes(x, '60 crops', real=False, natural=natural, moved=x)
    study = Study(net, crops, (Linf(.5),), attack=quick)
    report = study.report(study.rows('INT4'), study.layers('INT4'))
    assert report.table.robust_flips.isna().all()
    assert report.table.predicted_robust_loss.notna().all()
    notes = ' '.join(report.facts['notes'])
    assert 'robust_flips is empty; the robust losses are those of the fitted predictor' in notes
    assert 'no robust loss' not in notes


def test_a_copy_is_that_of_quantize(net, probes):
    study = Study(net, probes, budgets[:1])
    spec = quant_spec('INT3', per_channel=False)
    expected = predict(quantize(net, spec, probes.x), probes.x)
    assert predict(study.copy(spec), probes.x).equal(expected)
    assert not predict(study.copy('INT3'), probes.x).equal(expected)
    assert study.copy('INT3') is study.copy('INT3')


def test_the_report_is_made_of_rows(net, probes, labelled):
    study = Study(net, probes, budgets[1:2], labelled, quick, seed=7)
    rows = study.rows('INT8') + study.rows('INT3')
    stale = [r | dict(predicted_loss=.5) for r in rows]
    report = study.report(stale, study.layers('INT3'))
    assert report.table.format.tolist() == ['INT8', 'INT3']
    fresh = [r['predicted_loss'] for r in rows]
    assert report.table.predicted_loss.tolist() == pytest.approx(fresh)
    assert report.facts['threat'] == 'Linf 1/255'
    assert report.facts['seed'] == 7
    assert report.facts['accuracy'] == .8
    assert report.facts['probes'] == '60 unlabelled real images'
    assert 'projected gradient descent' in ' '.join(report.facts['notes'])
    other = Study(net, probes, budgets[:1], attack=fgsm).report(rows, report.layers)
    assert 'survives fgsm' in ' '.join(other.facts['notes'])


class FirstPixels(nn.Module):
    "Its logits are the first row of an image, whose other pixels are black"
    def __init__(self, k):
        super().__init__()
        self.body = nn.Conv2d(1, k, (1, k), bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(k).reshape(k, 1, 1, k))
    def forward(self, x): return self.body(x)[:, :, 0, 0]


def notes_on(leads, k=10):
    "What a report says of images whose answers have these leads"
    x = torch.zeros(len(leads), 1, k, k)
    x[range(len(leads)), 0, 0, torch.arange(len(leads)) % k] = (leads/leads.max()).float()
    study = Study(FirstPixels(k).eval(), Probes.of(x), budgets[:1], attack=quick)
    return ' '.join(study.report(study.rows('INT8'), study.layers('INT8')).facts['notes'])


def test_photographs_with_even_answers_are_doubted():
    """One of ten logits follows a gamma law of shape k, the others are 0: the variance of the leads over
    their mean is then (10/3)/sqrt(k(k+1))"""
    drawn = lambda k, n: torch.from_numpy(np.random.default_rng(0).gamma(k, size=n))
    said = notes_on(drawn(14., 300))
    spread = float(re.search(r'evenly clear \((.*?)\)', said)[1])
    assert spread == pytest.approx(10/3/210**.5, rel=.15)
    for leads in (drawn(5.6, 300), drawn(14., 20), drawn(1., 300)):
        assert 'evenly clear' not in notes_on(leads), 'usual answers, or too few to tell'
    assert 'evenly clear' not in notes_on(drawn(40., 300), 4), 'nobody knows what is usual for few classes'


def test_the_page_shows_layers_of_the_worst_format_it_knows(net, probes, tmp_path):
    study = Study(net, probes, budgets[:1], attack=quick)
    rows = study.rows('INT8') + study.rows('INT2')
    study.report(rows, study.layers('INT8')).save(tmp_path/'report.html')
    assert 'Each tensor rounded alone, INT8' in (tmp_path/'report.html').read_text()


def test_assess_is_a_study_in_a_loop(net, probes, labelled, monkeypatch):
    "The cascade is the attack of both; here it is two steps of PGD, which a change of default would leave"
    asked = []
    def short(model, x, y, threat, generator=None, *rest):
        asked.append(len(x))
        return SimpleNamespace(x_adv=quick(model, x, y, threat, generator))
    monkeypatch.setattr(standard, 'run_cascade', short)
    report = assess(net, 'INT8,INT3', budgets[1], labelled, probes.x, n=40, seed=5)
    drawn = probes.x[torch.randperm(60, generator=make_generator(5, 'photographs'))[:40]]
    study = Study(net, Probes.of(drawn, model=net, seed=5), budgets[1:2], labelled, seed=5)
    rows = study.rows('INT8') + study.rows('INT3')
    layers = pd.concat([study.layers(f) for f in ('INT8', 'INT3')], ignore_index=True)
    expected = study.report(rows, layers)
    table = report.table.drop(columns=['file_kb', 'engine_ms', 'float_ms'], errors='ignore')
    pd.testing.assert_frame_equal(table, expected.table, check_exact=True)
    pd.testing.assert_frame_equal(report.layers, expected.layers, check_exact=True)
    assert report.probes.equal(expected.probes)
    half = len(asked)//2
    assert half > 0 and asked[:half] == asked[half:]


def never(*args, **kw): raise AssertionError('attacked')


@pytest.mark.parametrize('test', [False, True])
@pytest.mark.parametrize('photographs', [False, True])
def test_without_a_threat_nothing_is_attacked(net, probes, labelled, photographs, test):
    "and what is said of the accuracy is the same as with one"
    probes = probes if photographs else Probes(probes.x, 'crops', {}, False, probes.x, probes.x**2)
    test = labelled if test else None
    attacked = Study(net, probes, budgets[:1], test, quick)
    rows = pd.DataFrame(attacked.rows('INT8') + attacked.rows('INT3'))
    study = Study(net, probes, (), test, attack=never)
    alone = pd.DataFrame(study.rows('INT8') + study.rows('INT3'))
    lost = {c for c in rows if 'robust' in c} | {'eps', 'survivors'}
    assert not lost & {*alone} and {*rows} - {*alone} == lost & {*rows}
    pd.testing.assert_frame_equal(alone, rows[alone.columns], check_exact=True)
    accuracy = {} if test is None else dict(accuracy=.8)
    assert study.original == [accuracy]


def test_a_report_without_a_threat(net, probes, labelled):
    report = assess(net, 'INT8,INT3', None, labelled, probes.x)
    assert not any('robust' in c for c in report.table) and report.facts['threat'] == ''
    assert not any('ttack' in o for o in report.facts['notes'])
    assert 'obust' not in repr(report) and report.recommend(1.) == 'INT3'
    with pytest.raises(ValueError, match='`robust` must be False where no robust loss was asked for'):
        report.recommend(robust=True)


@pytest.mark.parametrize('threats', [budgets[::-1], (Linf(1/255), L2(1.)), (budgets[0],)*2])
def test_budgets_that_do_not_grow_are_refused(net, probes, threats):
    with pytest.raises(ValueError, match='`threats` must be .* balls of one kind with growing eps'):
        Study(net, probes, threats)


def test_what_a_study_refuses(net, probes, labelled):
    def refused(kind, said, *args, **kw):
        with pytest.raises(kind, match=said):
            Study(*args, **kw)
    refused(TypeError, '`threats` must be a tuple of threat models', net, probes, budgets[0])
    refused(TypeError, '`threats` must be a tuple of threat models', net, probes, None)
    refused(TypeError, '`threat` must be a threat model', net, probes, (.03,))
    refused(TypeError, '`test` must be an ImageSet', net, probes, budgets, (labelled.x, labelled.y))
    strange = ImageSet(labelled.images[:2], np.array([0, 4]), 5)
    refused(ValueError, r'class numbers in \[0, 4\)', net, probes, budgets, strange)
    for bad, kind in ((0, ValueError), (float('nan'), TypeError), (2.5, TypeError), ('9', TypeError)):
        refused(kind, '`attacked` must be a whole number, at least 1 image, or None', net, probes, budgets,
                attacked=bad)
    refused(TypeError, '`probes` must be `Probes`, .*; got Tensor', net, probes.x, budgets)
    refused(TypeError, "`attack` must be a function .*; got 'fgsm'", net, probes, budgets, attack='fgsm')
    learning = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).train()
    refused(ValueError, r'Call `model.eval\(\)`', learning, probes, budgets)


def test_what_its_methods_refuse(net, probes, labelled):
    study = Study(net, probes, budgets[:1], attack=quick)
    with pytest.raises(ValueError, match='where a loss is measured; got None'):
        study.loss('INT8')
    for method in (study.copy, study.change, study.rows, study.layers):
        with pytest.raises(ValueError, match="'INT99'"):
            method('INT99')
    rows = study.rows('INT8')
    with pytest.raises(ValueError, match='`layers` must be .* formats INT8; got those of INT4'):
        study.report(rows, study.layers('INT4'))
    several = Study(net, probes, budgets, attack=quick)
    with pytest.raises(ValueError, match='one threat model where a report is made; got 3'):
        several.report(rows, study.layers('INT8'))
    with pytest.raises(AttributeError):
        study.seed = 1


def test_probes(net, probes):
    assert probes.words == '60 unlabelled real images'
    assert Probes.of(probes.x[:3], 'photographs').words == '3 photographs'
    assert probes.facts == {}
    with pytest.raises(ValueError, match='`images`.*the model normalises'):
        Probes.of(probes.x*255)
    for bad, kind in ((0, ValueError), (float('nan'), TypeError)):
        with pytest.raises(kind, match=f'`n` must be a whole number, at least 1; got {bad}'):
            Probes.generated(net, bad)


def test_a_job_is_refused_before_its_files_are_read():
    with pytest.raises(ValueError, match='`attack` must be one of fgsm, pgd, apgd'):
        study_of('nowhere.pt', 'PGD')
    with pytest.raises(ValueError, match='`n` must be a whole number, at least 1'):
        study_of('nowhere.pt', n=0)
    with pytest.raises(ValueError, match="'INT99'"):
        measure_one('nowhere.pt', 'INT99')


def test_share_lost_needs_twenty():
    x = torch.rand(40, 3, 4, 4, generator=make_generator(0))
    y = torch.zeros(40, dtype=torch.int64)
    class First(nn.Module):
        "Right on the first `n` images that it sees"
        def __init__(self, n):
            super().__init__()
            self.n = n
        def forward(self, x): return torch.eye(2)[(torch.arange(len(x)) >= self.n).long()]
    def rows(n): return evaluate(First(n).eval(), x, y, {}, Linf(.1))
    assert relative_loss(rows(20), rows(15), 'clean')[0] == pytest.approx(.25)
    assert np.isnan(relative_loss(rows(19), rows(15), 'clean')).all()


def test_classes_of_the_test_set_are_those_of_the_model_by_name():
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[[0, 1, 2], :, :, [1, 2, 0]] = 200
    test = ImageSet(images, [0, 1, 2], ('bee', 'cow', 'ant'))
    probes = Probes.of(test.x)
    net.classes = ('ant', 'bee', 'cow')
    study = Study(net, probes, (Linf(1/255),), test)
    assert (study.test.y == predict(net, test.x).argmax(1).numpy()).all()
    net.classes = ('ant', 'bee', 'fox')
    with pytest.raises(ValueError, match="`classes` must have.*'cow'"):
        Study(net, probes, (Linf(1/255),), test)
    net.classes = None
    assert Study(net, probes, (Linf(1/255),), test).test.matched == 'by position'


def test_photographs_are_drawn_from_all_that_are_given(net, monkeypatch):
    "Folders are read class by class: the first ones would be of the first classes"
    asked = []
    def kept(images, **kw):
        asked.append(images)
        return Probes(images, 'images')
    monkeypatch.setattr(module.Probes, 'of', staticmethod(kept))
    x = torch.linspace(0, 1, 400).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    assess(net, ['INT8'], None, unlabelled=x, n=100)
    assess(net, ['INT8'], None, unlabelled=x)
    few, every = asked
    assert len(few) == 100 and few[:, 0, 0, 0].unique().shape == (100,) and .4 < few.mean() < .6
    assert torch.equal(every.sort(0).values, x) and .4 < every[:50].mean() < .6


@pytest.mark.parametrize('broken, error, words', (
    (lambda net: net.half(), TypeError, 'must be float32 or float64; got torch.float16.*model.float'),
    (lambda net: nn.init.constant_(net[-1].weight, torch.nan), ValueError, 'must have finite weights')))
def test_few_photographs_do_not_hide_what_is_wrong_with_a_network(net, broken, error, words):
    model = copy.deepcopy(net)
    broken(model)
    x = torch.rand(20, 3, 8, 8).to(next(model.parameters()).dtype)
    with pytest.raises(error, match=words):
        assess(model, ['INT8'], None, unlabelled=x)


@pytest.mark.parametrize('given', (3, 'photographs', [1, 2]))
def test_what_is_no_images_is_named(net, given):
    with pytest.raises(TypeError, match='`unlabelled`'):
        assess(net, ['INT8'], None, unlabelled=given)
