"People who bring their own model and data get a right number, or one sentence that names the argument"
import copy, pickle, threading, time
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from helpers_models import needs
import robustnb as rn
from robustnb.commands.common import _command
from robustnb.core import ordered_names, pick_device, to_float, to_uint8
from robustnb.data import NamedSet
from robustnb.attacks.perceptual import advdrop, recolor, wasserstein
from robustnb.curation.contest import contest_train, default_config
from robustnb.curation.hidden import load_hidden, proxy_networks
from robustnb.descriptors.attack import baseline, fgvm, Plan
from robustnb.descriptors.attack_network import AttackerRecipe, train_attacker
from robustnb.descriptors.bandit import Bandit
from robustnb.descriptors.ridge_students import GaborFeatures
from robustnb.descriptors.students import DescriptorRecipe
from robustnb.evaluation.radius import first_order_radius, spectral_norms
from robustnb.models.graph import trace
from robustnb.models.wrapping import read_classes
from robustnb.quant.ptq import calibrate
from robustnb.transfer.crops import move_crops
from robustnb.transfer.generator import Generator
from robustnb.transfer.probe_quality import compose, Composition, optimize_images
from robustnb.transfer.probes import Probes


class Small(nn.Module):
    "A few layers; weightless ones keep their weights as buffers"
    def __init__(self, weightless=False, sees=lambda x: x):
        super().__init__()
        self.sees = sees
        weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        if weightless:
            self.register_buffer('weight', weight)
        else:
            self.weight = nn.Parameter(weight)
        self.eval()

    def forward(self, x): return F.conv2d(self.sees(x), self.weight).flatten(2).amax(2)


def pictures(n=8, high=8, wide=8):
    return torch.rand(n, 3, high, wide, generator=torch.Generator().manual_seed(1))


def images(n=4): return np.zeros((n, 8, 8, 3), np.uint8)


PLACES = {'dog': 1, 'ant': 2, 'cat': 0}

def test_a_table_of_places_gives_names_in_their_order():
    right = ('cat', 'dog', 'ant')
    for table in (PLACES, {v: k for k, v in PLACES.items()}):
        assert rn.ImageSet(images(3), [0, 1, 2], table).classes == right
        assert read_classes(table, 3) == right

@pytest.mark.parametrize('classes', ({'cat', 'dog', 'ant'}, frozenset('abc'), 'abc', 3.,
                                     {'a': 0, 'b': 1, 'c': 3}))
def test_names_without_an_order_are_refused(classes):
    with pytest.raises(TypeError, match='`classes` must be a list of names in the order of the labels.*got'):
        rn.ImageSet(images(3), [0, 1, 2], classes)

def test_a_set_is_no_list_of_the_classes_of_a_model():
    with pytest.raises(TypeError, match='got a set, which has no such order'):
        rn.wrap_model(Small(), (.5,)*3, (.5,)*3, classes={'a', 'b', 'c', 'd', 'e'})
    assert ordered_names(('b', 'a')) == ['b', 'a']


@pytest.mark.parametrize('door', (rn.predict, lambda m, x: rn.quantize(m, 'INT8', x),
                                  lambda m, x: rn.assess(m, unlabelled=x)))
def test_a_model_without_weights_in_memory(door):
    with pytest.raises(ValueError, match='`model` must hold its weights; weight is on the meta device'):
        door(Small().to('meta'), pictures())


def test_crops_of_models_of_all_kinds():
    x = pictures(3, 12, 20)
    weightless = Probes.of(x, model=Small(weightless=True))
    assert weightless.natural.shape[1:] == weightless.moved.shape[1:] == (3, 12, 20)
    here = Probes.of(x, model=Small()).moved
    with torch.no_grad():
        assert torch.equal(Probes.of(x, model=Small()).moved, here)

def test_crops_are_moved_in_inference_mode():
    model = Small()
    right = move_crops(model, pictures())
    with torch.inference_mode():
        assert torch.equal(move_crops(model, pictures()), right)

def test_crops_need_a_gradient():
    with pytest.raises(ValueError, match='`model` must pass a gradient to its images where crops are read'):
        move_crops(Small(sees=lambda x: (255*x).byte()/255), pictures())
    with torch.inference_mode():
        made_inside = Small()
    with pytest.raises(ValueError, match='`model` must have weights that a gradient can pass'):
        move_crops(made_inside, pictures())


def trainings():
    x = rn.load_data('digits', 'test', size=32)[:40]
    recipe = DescriptorRecipe(epochs=1)
    return dict(
        train=lambda m: rn.train(rn.Recipe(epochs=1, batch_size=20), m, x),
        contest=lambda m: contest_train(m, x.images, x.labels, default_config()['wideresnet'], epochs=1),
        distill=lambda m: rn.distill_descriptor(m, x.images, x.labels, recipe=recipe))

def net():
    made = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10))
    made.dim = 10
    return made

@pytest.mark.parametrize('name', ('train', 'contest', 'distill'))
def test_trainings_without_and_with_frozen_weights(name):
    run = trainings()[name]
    with torch.no_grad():
        trained = run(net())[0]
    assert trained[1].weight.isfinite().all()
    with pytest.raises(ValueError, match='`model` must have weights to train; all 2 are frozen'):
        run(net().requires_grad_(False))


def test_features_of_a_student_stay_the_callers():
    mine = nn.Sequential(nn.Flatten(), nn.Dropout(.9), nn.Linear(192, 6)).train()
    student = rn.fit_ridge(mine, to_uint8(pictures()), np.random.default_rng(0).random((8, 4)))
    assert mine.training and mine[2].weight.requires_grad
    assert not student.features.training

@pytest.mark.parametrize('features, said', (('gabor', 'got str'), (GaborFeatures, 'got GaborFeatures'),
                                            (lambda x: x.flatten(1), 'got <lambda>')))
def test_features_are_a_network(features, said):
    with pytest.raises(TypeError, match=f'`features` must be a network.*{said}'):
        rn.fit_ridge(features, to_uint8(pictures()), np.zeros((8, 4)))

def test_answers_are_rows():
    with pytest.raises(ValueError, match=r'`descriptors` must be \(N,D\).*got shape \(8,\)'):
        rn.fit_ridge(GaborFeatures(), to_uint8(pictures()), np.zeros(8))


def test_an_error_while_ranges_are_read_is_one_sentence():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    model[0].weight.data.fill_(3e38)
    with pytest.raises(ValueError) as e:
        calibrate(model, pictures())
    assert '\n' not in str(e.value) and '`model` must be finite on `images`' in str(e.value)


POOL = lambda: rn.ImageSet(images(), [0, 1, 0, 1], 2)
KEEP = dict(a=lambda x, y, generator: (x, y))

def build(pool=None, sources=KEEP, **more):
    return rn.build_training_set(POOL() if pool is None else pool, sources, dict(a=1.), n=4, **more)

def score(**other):
    networks, config = proxy_networks()
    given = dict(sets=dict(a=POOL()), hidden=build(), networks=networks, config=config) | other
    return rn.score_training_sets(**given)

@pytest.mark.parametrize('do, said', (
    (lambda: rn.subset(POOL().x, 2, 0), '`data` must be an ImageSet, images with their labels; got Tensor'),
    (lambda: build(pool=POOL().x), '`pool` must be an ImageSet, images with their labels; got Tensor'),
    (lambda: build(pool='digits'), '`pool` must be an ImageSet, images with their labels; got str'),
    (lambda: build(sources=[KEEP['a']]), '`sources` must be a dict with the name of each source; got list'),
    (lambda: build(batch_size=2.), '`batch_size` must be a whole number, at least 1; got 2.0'),
    (lambda: score(sets=[POOL()]), '`sets` must be a dict from names to sets; got list'),
    (lambda: score(sets=dict(a=POOL().x)), r"`sets\['a'\]` must be an ImageSet.*got Tensor"),
    (lambda: score(hidden=POOL()), '`hidden` must be a set whose rows have a `family`.*got ImageSet'),
    (lambda: score(seeds=3), r'`seeds` must be a list of seeds; got 3. Use `range\(3\)`'),
    (lambda: score(networks=dict(a=Small())),
     "`networks` must hold functions of a seed.*'a' is a network itself"),
    (lambda: rn.train(net(), rn.Recipe(), POOL()),
     '`recipe` must be a Recipe; got Sequential. It comes first'),
    (lambda: rn.train(rn.Recipe(), net(), POOL().x), '`data` must be an ImageSet.*got Tensor'),
    (lambda: rn.train(rn.Recipe(), net(), POOL(), val=POOL().x), '`val` must be an ImageSet'),
    (lambda: rn.Recipe(epochs='3'), "`epochs` must be a whole number, at least 1; got '3'"),
    (lambda: rn.subset(POOL(), '2', 0), "`n` must be a whole number, at least 1 image; got '2'"),
    (lambda: rn.load_images('digits', 16, n=1.5), '`n` must be a whole number, at least 1 image; got 1.5'),
    (lambda: rn.predict(Small(), pictures(), batch_size='8'), "`batch_size` must be a whole number.*got '8'"),
    (lambda: rn.assess(Small(), 'INT8', n='8'), "`n` must be a whole number, at least 1; got '8'"),
    (lambda: rn.load_images(None), '`source` must be the path of a file or folder; got NoneType'),
    (lambda: rn.load_images(images()), '`source` must be the path of a file or folder; got ndarray'),
    (lambda: rn.load_data(['a.png']), '`source` must be the path of a file or folder; got list'),
    (lambda: rn.load_splits(images()), '`source` must be the path of a file or folder; got ndarray'),
    (lambda: load_hidden(None), '`path` must be the path of a file or folder; got NoneType'),
    (lambda: rn.validate_set(POOL()), 'got ImageSet. Write it with its method `save`'),
))
def test_what_is_not_meant_is_named(do, said):
    with pytest.raises(TypeError, match=said):
        do()

def test_transforms_of_torchvision_are_told_their_wrapper():
    from torchvision.transforms.v2 import RandomHorizontalFlip
    with pytest.raises(ValueError, match='Those of torchvision do so inside `from_torchvision`'):
        build(sources=dict(a=RandomHorizontalFlip()))


def boxed():
    box = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(192, 4)).eval()
    x = pictures(2)
    return box, x, box(x).detach().flip(0)[:, None], rn.SSIM(.9)

def test_one_student_is_a_list_of_one():
    box, x, wanted, threat = boxed()
    student = rn.fit_ridge(nn.Flatten(), to_uint8(pictures()), box(pictures()))
    one, several = (rn.bandit_descriptor(box, x, wanted, threat, students=o, plan=Bandit(queries=6))
                    for o in (student, [student]))
    assert torch.equal(one, several)

def test_answers_with_a_gradient_are_answers():
    box, x, *_ = boxed()
    seen = to_uint8(pictures())
    forms = box(pictures()), box(pictures()).detach().numpy()
    found = [rn.fit_ridge(nn.Flatten(), seen, o)(x) for o in forms]
    assert torch.equal(*found)
    recipe = DescriptorRecipe(epochs=1)
    made = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(TypeError, match='`model` must be the name of a network.*got Sequential'):
        rn.distill_descriptor(made, seen, box(pictures()), recipe=recipe)
    made.dim = 4
    assert len(rn.distill_descriptor(made, seen, box(pictures()), recipe=recipe)[1]) == 1

@pytest.mark.parametrize('more, said', ((dict(plan=10), '`plan` must be a Bandit.*got 10'),
                                        (dict(generator=0), '`generator` must be a torch.Generator.*got 0')))
def test_arguments_of_a_bandit(more, said):
    with pytest.raises(TypeError, match=said):
        rn.bandit_descriptor(*boxed(), **more)

def test_a_submission_is_judged_with_names_and_pairs():
    faces = NamedSet(images(), [0, 0, 1, 1], 2)
    for given, said in ((('faces', None), '`images` must be a NamedSet.*got str'),
                        ((POOL(), None), '`images` must be a NamedSet.*got ImageSet'),
                        ((faces, 'pairs.csv'), '`pairs` must be a Pairs, as from `read_pairs`; got str')):
        with pytest.raises(TypeError, match=said):
            rn.check_submission('a.zip', *given)


def rows_of(attack, model=None, x=None, y=None, **more):
    model = Small() if model is None else model
    x = pictures() if x is None else x
    y = rn.predict(model, x).argmax(1) if y is None else y
    return rn.evaluate(model, x, y, dict(a=attack), rn.Linf(2/255), **more)

def test_an_attack_that_leaves_the_model_in_training_mode_is_named():
    def careless(model, x, y, threat, generator):
        model.train()
        return x
    with pytest.raises(ValueError, match="attack 'a' must leave the model in evaluation mode"):
        rows_of(careless)

def test_images_that_an_attack_did_not_see_do_not_stand():
    rows = rows_of(rn.fgsm)
    assert len(rn.summarize(rows)) == 3
    with pytest.raises(ValueError, match="same images under every attack.*8 under 'clean', 6 under 'a'"):
        rn.summarize(rows[(rows.attack == 'clean') | (rows.image > 1)])
    for other in (rows.to_dict('records'), rows.drop(columns='correct')):
        with pytest.raises(TypeError, match='`rows` must be a table of `evaluate`; got'):
            rn.summarize(other)

@pytest.mark.parametrize('attack, error, said', (
    (partial(rn.pgd, step_size=-.01), ValueError, '`step_size` must be a number above 0.*got -0.01'),
    (partial(rn.pgd, step_size='1'), ValueError, "`step_size` must be a number above 0.*got '1'"),
    (partial(rn.pgd, steps=2.), TypeError, '`steps` must be a whole number, at least 0; got 2.0'),
    (partial(rn.square, queries=20.), TypeError, '`queries` must be a whole number, at least 2; got 20.0'),
    (partial(rn.pgd, loss=F.cross_entropy), ValueError, r'`loss` must give one value for each.*shape \(\)'),
    (partial(rn.square, loss=F.cross_entropy, queries=9), ValueError, '`loss` must give one value for each'),
    (partial(rn.fgsm, loss='ce'), TypeError, "`loss` must be a function .*got 'ce'"),
    (lambda model, x, y, threat: x, TypeError, "'a' cannot be called so: got an unexpected .*generator"),
))
def test_settings_that_weaken_or_break_an_attack_are_named(attack, error, said):
    with pytest.raises(error, match=said):
        rows_of(attack)

def test_images_of_an_attack_in_double_precision_are_judged():
    assert len(rows_of(lambda model, x, y, threat, generator: x.double())) == 16

def test_half_precision_has_no_budget():
    with pytest.raises(TypeError, match='`x` must be float32 or float64 for an attack.*float16'):
        rows_of(rn.pgd, model=Small().half(), x=pictures().half(), y=torch.zeros(8, dtype=torch.long))

def test_the_way_out_of_wrong_labels_fits_their_shape():
    for y in (torch.ones(8, 1, dtype=torch.long), torch.ones(1, 8)):
        with pytest.raises(TypeError, match=r'Use|`y.flatten\(\).long\(\)`'):
            rows_of(rn.fgsm, y=y)
    with pytest.raises(TypeError, match=r'`y.argmax\(1\)`'):
        rows_of(rn.fgsm, y=F.one_hot(torch.ones(8, dtype=torch.long), 5))
    with pytest.raises(ValueError, match=r'errors of rounding: `x.clamp\(0, 1\)`'):
        rows_of(rn.fgsm, x=pictures().index_fill(3, torch.tensor(2), -1e-7))


def test_budgets_are_numbers_and_equal_ones_are_written_alike():
    for made, plain in ((rn.Linf(np.float64(.1)), rn.Linf(.1)), (rn.SSIM(np.float64(.9)), rn.SSIM(.9)),
                        (rn.L2(np.int64(1)), rn.L2(1))):
        assert repr(made) == repr(plain)
    for make in (lambda: rn.SSIM('.9'), lambda: rn.SSIM(None), lambda: rn.Linf(True)):
        with pytest.raises(TypeError, match='must be (a number|in .0, 1., a number)'):
            make()
    for kind in (rn.Linf, rn.SSIM):
        with pytest.raises(TypeError, match='`threat` must be a threat model such as'):
            rn.evaluate(Small(), pictures(), torch.zeros(8, dtype=torch.long), {}, kind)


def deep():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return rn.wrap_model(net, (.5,)*3, (.5,)*3)

def test_a_forward_is_told_which_rule_it_broke():
    def blanked(x):
        x = x.clone()
        x[:, 0] = 0
        return x
    for sees, said in ((blanked, 'must not assign to a part of a tensor: `torch.where`'),
                       (lambda x: x if x.mean() > 0 else -x, 'must not branch or loop on the values')):
        with pytest.raises(TypeError, match=said):
            rn.quantize(Small(sees=sees), 'INT8', pictures())

def test_copies_made_in_inference_mode_pass_a_gradient():
    outside = deep()
    with torch.inference_mode():
        copies = [rn.quantize(o, 'INT4', pictures()) for o in (outside, deep())]
        rows_of(rn.pgd, copies[0])
        built = rn.build_model('ResNet_18', width=.1)
    for model in copies:
        rows_of(rn.pgd, model)
    rows_of(rn.fgsm, built, pictures(2, 32, 32))

def painter(size):
    torch.manual_seed(0)
    return Generator(torch.eye(3), torch.full((3,), .5), torch.full((3,), .25), size=size, width=8).eval()

followers = dict(
    advdrop=lambda net, x, y: advdrop(net, x, y, rn.Linf(8/255)),
    wasserstein=lambda net, x, y: wasserstein(net, x, y, rn.Linf(8/255)),
    recolor=lambda net, x, y: recolor(net, x, y, rn.Linf(8/255)),
    radius=lambda net, x, y: first_order_radius(net, x, y),
    norms=lambda net, x, y: torch.from_numpy(spectral_norms(net, x.shape[1:]).norm.to_numpy()),
    images=lambda net, x, y: optimize_images(net, F.one_hot(y, 3).float(), steps=3, size=x.shape[2])[0],
    composed=lambda net, x, y: compose(painter(x.shape[2]), net, 6, Composition(.2, .5))[0],
    attacker=lambda net, x, y: next(train_attacker(net, x, x[:, None], rn.SSIM(.95),
                                                   AttackerRecipe(epochs=1))[0].parameters()))

@pytest.mark.parametrize('name', followers)
def test_what_follows_a_gradient_does_so_in_inference_mode(name):
    net = deep() if name != 'attacker' else nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 4)).eval()
    x = pictures(3, 64, 64) if name == 'attacker' else pictures()
    y = rn.predict(net, x).argmax(1)
    outside = followers[name](net, x, y)
    with torch.inference_mode():
        inside = followers[name](net, x.clone(), y.clone())
    assert torch.equal(inside, outside)

@pytest.mark.parametrize('attack', (baseline, fgvm, rn.attack_descriptor))
def test_a_chain_of_layers_is_one_student(attack):
    box, x, wanted, threat = boxed()
    x = to_float(to_uint8(x))
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    one, several = (attack(box, x, wanted, threat, students=o) for o in (student, [student]))
    assert torch.equal(one, several)

def test_descriptors_are_attacked_in_inference_mode():
    box, x, wanted, threat = boxed()
    plan, outside = Plan(queries=6), nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    with torch.inference_mode():
        seen = to_float(to_uint8(pictures()))
        student = rn.fit_ridge(nn.Flatten(), to_uint8(seen), box(seen))
        found = rn.bandit_descriptor(box, seen[:2], wanted, threat, students=student, plan=Bandit(queries=6))
        one, several = (rn.attack_descriptor(box, seen[:2], wanted, threat, students=o, plan=plan)
                        for o in (outside, [outside]))
        with pytest.raises(ValueError, match='`students` must have weights that learn.*RidgeStudent'):
            rn.attack_descriptor(box, seen[:2], wanted, threat, students=student, plan=plan)
    assert torch.equal(one, several)
    assert found.shape == x.shape

@pytest.mark.parametrize('name', ('train', 'contest', 'distill'))
def test_trainings_in_inference_mode(name):
    outside = net()
    with torch.inference_mode():
        for model in outside, net():
            assert trainings()[name](model)[0][1].weight.isfinite().all()

def test_other_threads_ask_while_one_is_followed():
    model, x = deep(), pictures()
    right = rn.predict(model, x)
    wrong = []
    def ask():
        for _ in range(60):
            try:
                if not torch.equal(model(x), right): wrong.append('other logits')
            except Exception as e:
                wrong.append(repr(e))
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(.02)
            return x
    slow = nn.Sequential(*(Slow() for _ in range(5)), nn.Flatten(), nn.Linear(192, 3)).eval()
    threads = [threading.Thread(target=trace, args=(slow,)) for _ in range(2)]
    with torch.no_grad():
        for thread in threads:
            thread.start()
        time.sleep(.03)
        ask()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(rn.predict(model, x), right)


def test_precision_is_named_where_torch_computes_in_another():
    with torch.autocast('cpu', torch.bfloat16):
        with pytest.raises(TypeError, match='`model` must compute in float32.*outside `torch.autocast`'):
            rn.quantize(deep(), 'INT8', pictures())

@needs('torch', 2, 9)
def test_a_default_device_is_named():
    model, x = deep(), pictures()
    with torch.device('meta'):
        with pytest.raises(ValueError, match='`torch.set_default_device` must be left at the CPU'):
            rn.predict(model, x)
        built = rn.build_model('ResNet_18', width=.1)
        with torch.device('cpu'):
            assert rn.predict(model, x).shape == (8, 3)
    assert rn.predict(built, pictures(2, 32, 32)).shape == (2, 10)

@pytest.mark.parametrize('door', (rn.predict, lambda m, x: rn.wrap_model(m, (.5,)*3, (.5,)*3)))
def test_programs_of_export_are_told_their_way(door):
    program = torch.export.export(deep(), (pictures(),))
    with pytest.raises(TypeError, match='`torch.export.save`'):
        rn.predict(program, pictures())
    with pytest.raises(TypeError, match='`torch.export.save`'):
        door(program.module(), pictures())

def test_torchscript_takes_the_cascade():
    script = torch.jit.trace(Small(), pictures())
    assert len(rows_of(rn.cascade, script)) == 16

def test_a_rounded_network_is_pickled_by_torch(tmp_path):
    copy_of_it = rn.quantize(deep(), 'INT4', pictures())
    torch.save(copy_of_it, tmp_path/'q.pt')
    back = torch.load(tmp_path/'q.pt', weights_only=False)
    assert torch.equal(rn.predict(back, pictures()), rn.predict(copy_of_it, pictures()))
    with pytest.raises(ValueError, match='weights are float16 and `x` is float32'):
        rn.predict(copy.deepcopy(copy_of_it).half(), pictures())

def test_copies_of_a_box_share_its_budget(tmp_path):
    box = rn.BlackBox(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), 10)
    twin = copy.deepcopy(box)
    twin(pictures(3))
    assert box.used == 3
    with pytest.raises(TypeError, match='`cache` must be a file where a `BlackBox` is written down'):
        pickle.dumps(box)
    kept = rn.BlackBox(box.black_box, 10, cache=tmp_path/'asked.db')
    kept(pictures(2))
    assert pickle.loads(pickle.dumps(kept)).used == 2


def test_the_home_of_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    POOL().save(tmp_path/'set')
    assert len(rn.load_data('~/set')) == len(rn.load_images('~/set')) == 4
    rn.save_model(rn.build_model('ResNet_18', width=.1), tmp_path/'net.pt')
    assert rn.load_model('~/net.pt').width == .1
    with pytest.raises(ValueError, match='`path` begins with ~, which only a shell takes for your home'):
        POOL().save('~/other')
    assert not (tmp_path/'~').exists()

@pytest.mark.parametrize('name', ('data', 'hidden', 'images', 'test'))
def test_a_folder_that_is_not_there_is_named_before_a_network_is_fetched(name, capsys):
    @_command
    def job(model, **given): raise AssertionError('it was fetched')
    with pytest.raises(SystemExit, match=f'`{name}` must be a folder of images.*there is none at nowhere'):
        job('timm:resnet18', **{name: 'nowhere'})

def test_devices_that_do_not_exist():
    for device in ('gpu', 3.5):
        with pytest.raises(ValueError, match='`device` must be a device of torch'):
            pick_device(device)
