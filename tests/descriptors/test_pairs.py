"""Pairs files that are read strictly, and pairs made from a set with identities."""
import numpy as np
import pandas as pd
import pytest

from helpers_submission import faces, pairs, quiet
from robustnb.descriptors.pairs import make_pairs, Pairs, read_pairs, write_pairs


def test_pairs_survive_the_file(tmp_path, faces, pairs):
    assert read_pairs(write_pairs(pairs, tmp_path/'p.csv'), faces) == pairs
    assert len(pairs) == 2
    lines = (tmp_path/'p.csv').read_text().split('\n')
    assert lines[0] == 'source_imgs,target_imgs'
    assert lines[1] == '|'.join(pairs.sources[0]) + ',' + '|'.join(pairs.targets[0])
    assert len(lines) == 4
    (tmp_path/'q.csv').write_text(
        '\ufefftarget_imgs,id,source_imgs\r\nb1|b2,0,a1\r\n\r\n"a,1|a2",1,b1\r\n', encoding='utf-8')
    assert read_pairs(tmp_path/'q.csv') == Pairs((('a1',), ('b1',)), (('b1', 'b2'), ('a,1', 'a2')))


@pytest.mark.parametrize('text, problem', [
    ('sources,target_imgs\na,b\n',
     "columns must be source_imgs and target_imgs; got 'sources', 'target_imgs'"),
    ('', 'columns must be .* got none'), ('source_imgs,target_imgs\n', 'no pairs'),
    ('source_imgs,target_imgs,source_imgs\na,b,c\n', 'columns must be'),
    ('source_imgs,target_imgs\na,b\na|b,c|d,e\n', 'row 2 has 3'),
    ('source_imgs,target_imgs\na\n', 'row 1 has 1'),
    ('source_imgs,target_imgs\na|b,c\na,c\n',
     'same number of images in every pair, at least 1; got 1 and 2'),
    ('source_imgs,target_imgs\na,c\na,c|d\n', '`targets` must have the same number'),
    ('source_imgs,target_imgs\na|a,b\n', "sources.0.. must be different names"),
    ('source_imgs,target_imgs\nz,y\na|b,c|b\n', "same number"),
    ('source_imgs,target_imgs\na|b,c|b\n', "pair 0 has 'b' on both sides"),
    ('source_imgs,target_imgs\n../a,b\n', "plain file names.*'../a'"),
    ('source_imgs,target_imgs\n,b\n', 'plain file names'),
    ('source_imgs,target_imgs\na,b|\n', 'plain file names'),
    ('source_imgs,target_imgs\n"a,b\n', 'is wrong'),
    ('source_imgs,target_imgs\na\0,b\n', 'is wrong')])
def test_a_wrong_pairs_file_is_refused(tmp_path, text, problem):
    (tmp_path/'p.csv').write_bytes(text.encode())
    with pytest.raises(ValueError, match=problem) as e:
        read_pairs(tmp_path/'p.csv')
    assert 'p.csv' in str(e.value)


def test_missing_images_are_all_counted_and_five_shown(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path/'none.csv')
    (tmp_path/'b.csv').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='b.csv is wrong'):
        read_pairs(tmp_path/'b.csv')
    path = write_pairs(Pairs((tuple('abcd'),), (tuple('efgh'),)), tmp_path/'p.csv')
    with pytest.raises(ValueError, match="7 of 8 are missing: 'a', 'b', 'd', 'e', 'f' and 2 more"):
        read_pairs(path, ['c'])
    assert len(read_pairs(path, list('abcdefgh'))) == 1
    with pytest.raises(ValueError, match='same pairs; got 1 and 2'):
        Pairs((('a',),), (('b',), ('c',)))
    with pytest.raises(ValueError, match='at least 1; got 0'):
        Pairs(((),), (('b',),))


def test_file_names_of_changed_images():
    assert Pairs((('a.jpg', 'b.c.png'), ('d', 'e.pgm')),
                 (('x',), ('y',))).files == ('a.png', 'b.c.png', 'd.png', 'e.png')
    assert Pairs((('a.jpg',), ('a.jpg',)), (('x',), ('y',))).files == ('0000_a.png', '0001_a.png')
    with pytest.raises(ValueError, match='more than once'):
        Pairs((('a.jpg', 'a.png'),), (('x',),)).files


def test_made_pairs(faces):
    every = make_pairs(faces, 3, 2)
    s = faces.at(every.sources)
    t = faces.at(every.targets)
    got = [(faces.y[a][0], faces.y[b][0]) for a, b in zip(s, t)]
    assert got == [(a, b) for a in range(4) for b in range(4) if a != b]
    assert s.shape == (12, 3)
    assert t.shape == (12, 2)
    assert all(len(set(faces.y[o])) == 1 for o in [*s, *t])
    assert not set(s.flat) & set(t.flat)
    assert every == make_pairs(faces, 3, 2) != make_pairs(faces, 3, 2, seed=1)
    # each identity has a choice of its own
    assert len({tuple(o % 6) for o in s}) > 1
    rows = lambda p: list(zip(p.sources, p.targets))
    some = make_pairs(faces, 3, 2, limit=7)
    fewer = make_pairs(faces, 3, 2, limit=4)
    assert set(rows(fewer)) < set(rows(some)) < set(rows(every))
    assert len(some) == 7
    assert rows(some) == [o for o in rows(every) if o in rows(some)]
    assert rows(some) != rows(every)[:7]
    assert set(rows(make_pairs(faces, 3, 2, identities=('dan', 'bob')))) < set(rows(every))
    assert make_pairs(
        pd.DataFrame(dict(name=faces.names, identity=[faces.classes[i] for i in faces.y])), 3,
        2) == every
    assert make_pairs(pd.DataFrame(dict(name=list('abcd'), identity=[1, 1, 2, 2])), 1,
                      1).targets[0][0] in 'cd'
    for more, problem in (
            (dict(n_source=5, n_target=2), r"5\+2 images of each identity; 'ann' has 6"),
            (dict(limit=13), 'from 1 to 12'), (dict(limit=0), 'from 1 to 12'),
            (dict(identities=['ann']), 'at least 2'),
            (dict(identities=['ann', 'ann']), 'different identities'),
            (dict(identities=['ann', 'eve']), "'eve' has 0"),
            (dict(n_source=0), 'at least 1 image'), (dict(n_target=0), 'at least 1 image')):
        with pytest.raises(ValueError, match=problem):
            make_pairs(faces, **{**dict(n_source=3, n_target=2), **more})
    with pytest.raises(TypeError, match="got .'name', 'who'"):
        make_pairs(pd.DataFrame(dict(name=['a'], who=['b'])))
    with pytest.raises(ValueError, match='more than once'):
        make_pairs(pd.DataFrame(dict(name=['a', 'a'], identity=[1, 2])))
