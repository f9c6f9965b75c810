"""The commands on descriptors, interrupted and given again: nothing is trained or asked twice, and
the end is that of the undisturbed run."""
import importlib.util, io, zipfile
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from robustnb.commands import descriptors
from robustnb.descriptors import students
from robustnb.files import load_state
from robustnb.descriptors.ridge_students import load_student
from robustnb.descriptors.students import load_descriptor

pytestmark = pytest.mark.usefixtures('one_thread')
train = descriptors.train_descriptor_command
distill = descriptors.distill_command
attack = descriptors.attack_descriptors_command
photos = 'digits:train[0:24]'


@pytest.fixture
def epochs(monkeypatch):
    """One mark for each epoch that was trained; the power fails after two of them as long as 'dark'
    is among them"""
    save = students.save_state
    trained = []
    def watched(state, path):
        save(state, path)
        if 'mark' in state:
            trained.append(str(path.name))
        if trained[:1] == ['dark'] and len(trained) == 3: raise KeyboardInterrupt
    monkeypatch.setattr(students, 'save_state', watched)
    return trained


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    train(photos, 'ResNet_18', str(out), .0625, 1)
    return str(out/'descriptor.pt')


@pytest.fixture
def questions(monkeypatch):
    "Images that the black box was asked about"
    asked = []
    box = descriptors._box
    def counting(name):
        answer = box(name)
        def ask(x):
            asked.extend(range(len(x)))
            return answer(x)
        ask.source = str(name)
        return ask
    monkeypatch.setattr(descriptors, '_box', counting)
    return asked


def same(a, b):
    a = load_descriptor(a).state_dict()
    b = load_descriptor(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_descriptor_network_goes_on_where_it_stopped(epochs, tmp_path):
    run = partial(train, photos, 'ResNet_18', width=.0625, epochs=4, copies=2)
    run(out=str(tmp_path/'whole'))
    epochs[:] = ['dark']
    with pytest.raises(KeyboardInterrupt):
        run(out=str(tmp_path/'cut'))
    assert not (tmp_path/'cut'/'descriptor.pt').exists()
    epochs[:] = []
    run(out=str(tmp_path/'cut'))
    assert len(epochs) == 2
    assert same(tmp_path/'cut'/'descriptor.pt', tmp_path/'whole'/'descriptor.pt')
    assert pd.read_csv(
        tmp_path/'cut'/'history.csv').equals(pd.read_csv(tmp_path/'whole'/'history.csv'))
    with pytest.raises(SystemExit, match='belongs to another run: its recipe'):
        train(photos, 'ResNet_18', str(tmp_path/'cut'), .0625, 5, 2)
    assert load_state(tmp_path/'cut'/'checkpoint.pt')['history'][-1]['epoch'] == 4


def test_students_ask_and_learn_once(epochs, questions, teacher, tmp_path):
    run = partial(distill, teacher, photos, 'ResNet_18, Caffe34', width=.0625, epochs=3, copies=2)
    run(out=str(tmp_path/'whole'))
    assert len(questions) == 48
    assert len(epochs) == 6
    epochs[:] = ['dark']
    questions[:] = []
    with pytest.raises(KeyboardInterrupt):
        run(out=str(tmp_path/'cut'))
    epochs[:] = []
    questions[:] = []
    run(out=str(tmp_path/'cut'))
    assert not questions
    assert len(epochs) == 4
    assert all(same(tmp_path/'cut'/f'{k}.pt', tmp_path/'whole'/f'{k}.pt')
               for k in ('ResNet_18', 'Caffe34'))
    assert pd.read_csv(
        tmp_path/'cut'/'fidelity.csv').equals(pd.read_csv(tmp_path/'whole'/'fidelity.csv'))
    questions[:] = []
    for given, said in ((dict(width=0.), '`width` in'), (dict(epochs=0), '`epochs` must be'),
                        (dict(models='ResNet_18,nobody'), "got 'nobody'")):
        with pytest.raises(SystemExit, match=said):
            distill(teacher, photos, **dict(models='ResNet_18', out=str(tmp_path/'none')) | given)
    assert not questions, 'a wrong argument costs no question'


def write_faces(path, people, each, side=32):
    "A zip file of plain images, as light as the number of their person"
    with zipfile.ZipFile(path, 'w') as z:
        for k in range(people):
            for i in range(each):
                held = io.BytesIO()
                Image.fromarray(np.full((side, side), 10*k + 5, np.uint8)).save(held, 'PNG')
                z.writestr(f'p{k}/{i}.png', held.getvalue())
    return str(path)


@pytest.mark.parametrize('people, each, copies, held', [(10, 3, 2, 1), (20, 2, 1, 2), (3, 4, 1, 1),
                                                        (5, 1, 1, 2), (2, 2, 3, 1)])
def test_persons_are_held_back_whole(monkeypatch, people, each, copies, held, tmp_path):
    shown = []
    views = descriptors.views
    def watched(images, *args, **kw):
        shown.append({*images.ravel().tolist()})
        return views(images, *args, **kw)
    monkeypatch.setattr(descriptors, 'views', watched)
    images = descriptors._named(write_faces(tmp_path/'f.zip', people, each) + '@32')
    asked, fit, n = descriptors._two_sides(images, copies, .08)
    assert len(asked) == people*each*copies
    assert n == held
    assert fit == (people-held)*each*copies
    # a copy is blended with images of its own side
    assert not shown[0] & shown[1]
    assert len(shown[1]) == held


def test_the_part_held_back_is_said(teacher, capsys, tmp_path):
    data = write_faces(tmp_path/'f.zip', 3, 4) + '@32'
    done = distill(teacher, data, 'ResNet_18', str(tmp_path/'out'), .0625, 1, 1)
    assert done['identities_held_back'] == 1
    assert 'On 1 of 3 identities or classes, of whom no student saw an image' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='at least 2 identities or classes'):
        distill(teacher, data.replace('@', '[0:1]@'), 'ResNet_18', str(tmp_path/'one'), .0625, 1, 1)


def test_faces_are_not_cropped(tmp_path):
    a = np.full((224, 200, 3), 60, np.uint8)
    a[:, :50] = a[:, -50:] = 255
    for k in 'ab':
        (tmp_path/'faces'/k).mkdir(parents=True)
        Image.fromarray(a).save(tmp_path/'faces'/k/'1.png')
    for size in (224, 112):
        images = descriptors._named(f"{tmp_path/'faces'}@{size}").images
        assert images.shape == (2, size, size, 3)
        assert abs((images == 255).mean() - 100/224) < .02


def test_an_attack_asks_once(questions, teacher, tmp_path):
    distill(teacher, photos, 'ResNet_18', str(tmp_path/'students'), .0625, 1, 1)
    questions[:] = []
    run = partial(attack, teacher, str(tmp_path/'students'/'ResNet_18.pt'),
                  'digits:test[0:250]', n_pairs=1, queries=4, out=str(tmp_path/'attacked'))
    run()
    rows = pd.read_csv(tmp_path/'attacked'/'rows.csv')
    zipped = (tmp_path/'attacked'/'submission.zip').read_bytes()
    asked = len(questions)
    assert len(rows) == 5
    assert 0 < asked <= 5*4 + 20
    assert rows.queries.max() <= 4
    assert (rows.ssim >= .95).all()
    questions[:] = []
    run()
    assert not questions
    assert pd.read_csv(tmp_path/'attacked'/'rows.csv').equals(rows)
    assert (tmp_path/'attacked'/'submission.zip').read_bytes() == zipped
    with pytest.raises(SystemExit, match='`queries` must be at least 2'):
        run(queries=0, out=str(tmp_path/'none'))
    assert not questions
    assert not (tmp_path/'none').exists()


def picture(array):
    held = io.BytesIO()
    Image.fromarray(array).save(held, 'PNG')
    return held.getvalue()


@pytest.mark.skipif(not importlib.util.find_spec('dlib'), reason='needs robustnb[faces]')
def test_faces_are_aligned_and_those_without_one_left_out(tmp_path):
    photo = astronaut()
    with zipfile.ZipFile(tmp_path/'faces.zip', 'w') as z:
        z.writestr('a/0.png', picture(photo))
        z.writestr('a/1.png', picture(photo[:, ::-1]))
        z.writestr('b/0.png', picture(np.zeros((60, 50, 3), np.uint8)))
        z.writestr('b/1.png', picture(photo[20:]))
    faces = descriptors._named(f'{tmp_path}/faces.zip@aligned')
    assert faces.images.shape == (3, 150, 150, 3) and faces.names == ('a_0.png', 'a_1.png', 'b_1.png')
    assert faces.y.tolist() == [0, 0, 1]
    said = descriptors._box('dlib')(faces.x)
    assert (said[0]-said[1]).norm() < .6 and (said[0]-said[2]).norm() < .6
    with zipfile.ZipFile(tmp_path/'none.zip', 'w') as z:
        for name in 'ab':
            z.writestr(f'{name}/0.png', picture(np.zeros((60, 50, 3), np.uint8)))
    with pytest.raises(ValueError, match='in none of the 2 photographs'):
        descriptors._named(f'{tmp_path}/none.zip@aligned')


def test_a_network_in_a_file_becomes_a_student(teacher, tmp_path):
    net = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten()).eval()
    program = torch.export.export(net, (torch.rand(2, 3, 16, 16),),
                                  dynamic_shapes=({0: torch.export.Dim('n')},))
    torch.export.save(program, tmp_path/'theirs.pt2')
    got = distill(teacher, photos, f'filters,{tmp_path}/theirs.pt2@16', str(tmp_path/'students'), copies=2)
    assert [o['student'] for o in got['rows']] == ['(constant)', 'filters', 'theirs']
    student = load_student(tmp_path/'students'/'theirs.pt')
    assert student(torch.rand(1, 3, 30, 30)).shape == (1, 512)
    assert student.features(torch.rand(1, 3, 30, 30)).shape == (1, 48)


def test_other_queries_in_one_folder_are_another_attack(teacher, tmp_path):
    distill(teacher, photos, 'filters', str(tmp_path/'students'), copies=1)
    run = lambda n, out: attack(teacher, f'{tmp_path}/students/filters.pt', 'digits:test', n_pairs=1,
                                queries=n, out=str(tmp_path/out))['rows']
    run(2, 'a')
    plain = lambda rows: [{k: v for k, v in o.items() if k != 'seconds'} for o in rows]
    longer = run(6, 'a')
    assert plain(longer) == plain(run(6, 'b'))
    assert longer == run(6, 'a')


def test_a_report_of_an_attack(teacher, tmp_path):
    distill(teacher, photos, 'filters', str(tmp_path/'students'), copies=1)
    out = tmp_path/'attacked'
    attack(teacher, f'{tmp_path}/students/filters.pt', 'digits:test', n_pairs=1, queries=3, out=str(out))
    page = descriptors.report_descriptors_command(str(out), 'digits:test', teacher, teacher)
    assert page['images'] == 5 and page['boxes'] == [teacher]
    assert '</html>' in (out/'report.html').read_text()
    (out/'submission.zip').write_bytes(b'')
    with pytest.raises(SystemExit, match='Attack again'):
        descriptors.report_descriptors_command(str(out), 'digits:test', teacher)
