"""Pages on a reader's own images: only the values in the data cell change, and the page runs to its end

All pages run in one process (`python tests/test_own_data.py FOLDER`), which forks a child for each.
That a page comes to its end is asked, not how well it attacks: the cascade is its fast form there.
"""
import json, re, shutil, subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np
import pytest
from PIL import Image

root = Path(__file__).parent.parent
pages = sorted(f for kind in ('tutorials', 'howto', 'explain') for f in (root/'nbs'/kind).glob('*.ipynb'))
sizes = dict(curation=32)       # what the competition prescribes; the others take any size
VALUES = re.compile(r"^(data, size\b[^=\n]*= )'digits', \d+", re.M)
COLORS = dict(ant=(200, 40, 40), bee=(200, 190, 40), cat=(40, 90, 200), dog=(60, 180, 60))
READS = re.compile(r"load_data\(|load_splits\(|load_images\(|digits\(|'digits'")


def photograph(color, rng):
    "A noisy picture of its class's colour, of any size and aspect"
    h, w = rng.integers(20, 61, 2)
    noise = rng.normal(0, 30, (h, w, 3))
    return Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))


def photographs(folder, counts, learnable=True, seed=0):
    "Write so many images of each class to class folders, those that can be learned by their colours"
    rng = np.random.default_rng(seed)
    colors = [*COLORS.values()]
    for name, n in zip(COLORS, counts):
        (folder/name).mkdir(parents=True)
        for i in range(n):
            color = COLORS[name] if learnable else colors[rng.integers(len(colors))]
            photograph(color, rng).save(folder/name/f'{i}.{("jpg", "png", "webp")[i % 3]}')


def code(path):
    "The code cells that are run"
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    return [o for o in (''.join(c['source']) for c in cells) if not o.startswith('#| eval: false')]


def reads_images(path): return any(map(READS.search, code(path)))


def own(nb, source, size):
    "Change the values in the data cell, and nothing else"
    cells = [c for c in nb.cells if c.cell_type == 'code' and VALUES.search(c.source)]
    assert len(cells) == 1, 'one cell must name the data: data, size, ... = ...'
    cells[0].source = VALUES.sub(lambda m: f'{m[1]}{str(source)!r}, {size}', cells[0].source)


def run(source, files):
    "Print how each page ended: JSON of path -> [done, seconds, what it said]"
    sys.path.insert(0, str(root/'tools'))
    from nbrun import execute, forked
    from robustnb.attacks import standard
    whole = standard.run_cascade

    def fast(model, x, y, threat, generator=None, targets=9, *rest, **more):
        return whole(model, x, y, threat, generator, 0, *rest, **more)

    def on_own(path):
        standard.run_cascade = fast
        execute(path, change=partial(own, source=source, size=sizes.get(path.stem, 18)))
        return True
    ended = {str(path): [done, seconds, said] for path, done, seconds, said in forked(on_own, files, 1)}
    print(json.dumps(ended))


def in_a_process(source, files):
    "What `run` prints"
    p = subprocess.run([sys.executable, __file__, source, *files], cwd=root, capture_output=True,
                       text=True, timeout=900)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])


def page(path, *sources):
    "Write a notebook of code cells"
    cells = [dict(cell_type='code', metadata={}, source=source, outputs=[], execution_count=None)
             for source in sources]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


CELL = "import robustnb as rn\ndata, size, device = 'digits', 16, 'cpu'\nshipped = data == 'digits'"
LOAD = 'train, test = rn.load_splits(data, size)\n'
BAD = {'unguarded': [CELL, LOAD + 'assert len(train.classes) == 10'],
       'nowhere': [LOAD.replace('data, size', '"digits"')]}


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    "How each page ended, on class folders that are divided into train and test"
    folder = tmp_path_factory.mktemp('own')
    shutil.copy(root/'settings.ini', folder)
    photographs(folder/'photos'/'train', (10, 10, 10, 10))
    photographs(folder/'photos'/'test', (6, 6, 6, 6), seed=1)
    made = [page(folder/f'{k}.ipynb', *v) for k, v in BAD.items()]
    made.append(page(folder/'guarded.ipynb', CELL, LOAD + 'assert not shipped\nassert len(train) == 40'))
    found = in_a_process(folder/'photos', [*filter(reads_images, pages), *made])
    return {Path(k).stem: v for k, v in found.items()}


def test_pages_that_read_images_are_found():
    found = [*filter(reads_images, pages)]
    assert len(found) > 10
    assert not {'intervals', 'imagenet'} & {f.stem for f in found}


@pytest.mark.parametrize('name', [f.stem for f in pages if reads_images(f)])
def test_page_runs_on_own_images(ended, name):
    done, _, said = ended[name]
    assert done, said


def test_page_with_a_guard_passes(ended): assert ended['guarded'][0], ended['guarded'][2]


@pytest.mark.parametrize('name, said', [('unguarded', 'assert len(train.classes) == 10'),
                                        ('nowhere', 'one cell must name the data')])
def test_page_for_the_digits_only_fails(ended, name, said):
    assert not ended[name][0]
    assert said in ended[name][2]


if __name__ == '__main__': run(sys.argv[1], sys.argv[2:])
