"""Every file reader against damaged and hostile files: it must read them, or say in one line what
is wrong with which file.

    python benchmarks/reliability/fuzz.py --n 800

Each reader gets --n copies of a good file in which bytes are flipped, cut, doubled, moved or
made up; files of tensors and JSON are also taken apart, and their values removed or replaced by
others of any type. Allowed are an answer, and ValueError, TypeError or OSError with the name of
the file or of the argument in its text. Everything else, ten seconds, or 4 GB more memory than
before, is a failure; its file goes to --keep. Rows go to results/fuzz.csv: reader, inputs, read,
refused, failed.
"""
import argparse, io, json, random, resource, shutil, signal, tempfile, time, warnings, zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from robustnb.commands.common import _continue
from robustnb.commands.transfer import _once
from robustnb.curation.contest import (
    default_config, load_set, read_config, validate_set, write_config)
from robustnb.files import load_state, manifest, save_json, save_state
from robustnb.curation.training_sets import load_training_set
from robustnb.data import load_data
from robustnb.descriptors.faces import load_faces
from robustnb.transfer.generator import train_generator
from robustnb.models.zoo import build_model
from robustnb.models.loading import load_model, save_model
from robustnb.commands.fit_predictor import _measured
from robustnb.quant.ptq import quantize
from robustnb.transfer import predictor
from robustnb.transfer.predictor import load_predictor
from robustnb.transfer.probes import load_crops, Probes, save_crops
from robustnb.quant.checkpoints import load_quantized, save_quantized
from robustnb.transfer.generator import load_generator, save_generator
from robustnb.descriptors.students import descriptor_model, load_descriptor, save_descriptor
from robustnb.descriptors.pairs import read_pairs

allowed, patience = (ValueError, TypeError, OSError), 10
odd = (None, True, -1, 0, 7, 1e9, 2**40, float('nan'), '', 'x'*50, [], {}, [1, 'a'], {'a': 1})


def image(seed, size=32):
    "Bytes of a PNG"
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(
        0, 256, (size, size, 3), dtype=np.uint8)).save(out, 'PNG')
    return out.getvalue()


def folder_of_images(path, names):
    for i, name in enumerate(names):
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        (path/name).write_bytes(image(i))


def zipped(path, names):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for i, name in enumerate(names):
            z.writestr(name, image(i))


def arrays(path):
    path.mkdir(exist_ok=True)
    np.save(path/'data.npy', np.zeros((20, 32, 32, 3), np.uint8))
    np.save(path/'label.npy', np.eye(10, dtype=np.float32)[np.arange(20) % 10])


def training_set(path):
    arrays(path)
    (path/'classes.json').write_text(json.dumps([str(k) for k in range(10)]))
    pd.DataFrame(dict(image=range(20), source='clean', success=True)).to_csv(
        path/'provenance.csv', index=False)


def submission(path):
    arrays(path)
    write_config(default_config(2), path/'config.py')


def measured(path):
    path.mkdir()
    pd.DataFrame(dict(
        format=['INT8', 'INT4'], n_classes=10, js=[.1, .2], flips=[.1, .2], noise=[.1, .2],
        activation_noise=[.1, .2], robust_flips=[.1, .2], measured_loss=[.1, .2],
        measured_robust_loss=[.1, .2])).to_csv(path/'report_table.csv', index=False)


class_files = ('test/cat/1.png', 'test/cat/2.png', 'test/dog/1.png', 'test/dog/2.png')
net = build_model('AlexNet_BN', 10, .0625, seed=0)
crops = Probes(torch.rand(2, 3, 8, 8), '2 crops', {}, False, torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
# reader -> (how a good file is made at a path, the files to damage, how it is read)
readers = dict(
    load_state=(lambda p: save_state(dict(a=torch.ones(3), b=[1, 'x']), p), '', load_state),
    load_model=(lambda p: save_model(net, p), '', load_model),
    load_quantized=(lambda p: save_quantized(quantize(net, 'INT4', torch.rand(4, 3, 32, 32)), p),
                    '', load_quantized),
    load_generator=(lambda p: save_generator(
        train_generator(net, steps=1, batch_size=4, width=8, device='cpu')[0], p),
                    '', load_generator),
    load_crops=(lambda p: save_crops(crops, p), '', load_crops),
    load_descriptor=(
        lambda p: save_descriptor(descriptor_model('Caffe34', width=.0625, size=32), p), '',
        load_descriptor),
    load_predictor=(
        lambda p: shutil.copyfile(Path(predictor.__file__).with_name('predictors.json'), p), '',
        lambda p: load_predictor('loss', p)),
    load_zip=(lambda p: zipped(p, class_files), '', lambda p: load_data(p, 'test')),
    load_folder=(lambda p: folder_of_images(p, class_files), 'test/cat/1.png',
                 lambda p: load_data(p, 'test')),
    load_npy=(arrays, 'data.npy label.npy', load_data),
    load_training_set=(training_set, 'data.npy label.npy classes.json provenance.csv',
                       load_training_set),
    load_set=(submission, 'data.npy label.npy', load_set),
    validate_set=(submission, 'data.npy label.npy config.py', validate_set),
    read_config=(lambda p: write_config(default_config(2), p), '', read_config),
    load_faces=(lambda p: zipped(p, ('s1/1.png', 's1/2.png', 's2/1.png', 's2/2.png')), '',
                lambda p: load_faces(p, 32, 32)),
    read_pairs=(lambda p: p.write_text(
        'source_imgs,target_imgs\na.png|b.png,c.png|d.png\ne.png|f.png,a.png|b.png\n'),
                '', read_pairs),
    report_table=(measured, 'report_table.csv', _measured),
    question=(lambda p: _continue(p, dict(network='a', seed=0)), 'question.json',
              lambda p: _continue(p, dict(network='a', seed=0))),
    finished_format=(lambda p: save_json([dict(format='INT8', js=.1)], p), '',
                     lambda p: _once(p, dict)))
of_tensors = ('load_state', 'load_model', 'load_quantized', 'load_generator', 'load_crops', 'load_descriptor')


def damaged(raw, rng):
    "The bytes with one or several injuries"
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        i, j = sorted(rng.randrange(len(raw)+1) for _ in range(2))
        kind = rng.choice(('flip', 'flip', 'cut', 'end', 'double', 'noise', 'zero', 'text'))
        if kind == 'flip' and raw:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        if kind == 'cut':
            del raw[i:min(j, i+rng.choice((1, 8, 10**6)))]
        if kind == 'end':
            del raw[i:]
        if kind == 'double':
            raw[i:i] = raw[i:j][:10**5]
        if kind == 'noise':
            raw[i:i+rng.choice((1, 4, 64))] = rng.randbytes(rng.choice((1, 4, 64)))
        if kind == 'zero':
            raw[i:i+rng.choice((1, 4, 64))] = bytes(rng.choice((1, 4, 64)))
        if kind == 'text':
            raw[i:i] = rng.choice((b'NaN', b'-1', b'1e999', b'"', b',', b'\n', b'../',
                                   b'\xff\xfe', b'\x00', b'{', b'[' * 50, b'9'*30))
    return bytes(raw)


def swapped(held, rng):
    "The structure with one value removed or replaced, somewhere inside"
    places = []
    def look(o):
        for k in (list(o) if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ()):
            places.append((o, k))
            look(o[k])
    look(held)
    if not places: return rng.choice(odd)
    o, k = rng.choice(places)
    if rng.random() < .3:
        del o[k]
    else:
        o[k] = rng.choice((*odd, torch.full((2, 2), torch.nan)))
    return held


def attempt(read, path):
    "read, refused, or what else happened"
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(patience)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            read(path)
        return 'read', ''
    except TimeoutError:
        return 'failed', f'{patience} s'
    except allowed as e:
        return (('refused', str(e)) if str(e).strip() and ('`' in str(e) or path.name in str(e))
                else ('failed', f'says too little: {type(e).__name__}: {e}'))
    except BaseException as e:
        return 'failed', f'{type(e).__name__}: {e}'
    finally:
        signal.alarm(0)


def fuzz(name, n, seed=0, keep=None):
    "Rows reader, inputs, read, refused, failed; and what failed"
    make, files, read = readers[name]
    rng = random.Random(f'{name} {seed}')
    counts = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder)/'good'
        make(good)
        if attempt(read, good)[0] != 'read':
            raise AssertionError(f'{name} cannot read a good file: {attempt(read, good)[1]}')
        for i in range(n):
            bad = Path(folder)/f'bad{i}'
            (shutil.copytree if good.is_dir() else shutil.copyfile)(good, bad)
            victim = bad/rng.choice(files.split()) if files else bad
            raw = victim.read_bytes()
            if rng.random() < .5 and name in of_tensors:
                save_state(swapped(load_state(victim), rng), victim)
            elif rng.random() < .5 and raw[:1] in b'{[':
                victim.write_text(json.dumps(swapped(json.loads(raw), rng), default=str))
            else:
                victim.write_bytes(damaged(raw, rng))
            verdict, said = attempt(read, bad)
            counts[verdict] += 1
            if verdict == 'failed':
                failures.append(dict(reader=name, number=i, said=said[:200]))
                if keep:
                    Path(keep).mkdir(parents=True, exist_ok=True)
                    shutil.copy(victim, Path(keep)/f'{name}_{i}')
            (shutil.rmtree if bad.is_dir() else Path.unlink)(bad)
    return dict(reader=name, inputs=n, read=counts['read'], refused=counts['refused'],
                failed=counts['failed']), failures


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=800, help='inputs for each reader')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--readers', default=','.join(readers))
    p.add_argument('--keep', default=None, help='folder for the files that a reader failed on')
    p.add_argument('--out', type=Path, default=Path('results/fuzz.csv'))
    args = p.parse_args()
    torch.set_num_threads(1)
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4*2**30,)*2)
    began = time.time()
    found = [fuzz(name, args.n, args.seed, args.keep) for name in args.readers.split(',')]
    rows = pd.DataFrame([row for row, _ in found])
    rows.to_csv(args.out, index=False)
    save_json(manifest(inputs=int(rows.inputs.sum()), seed=args.seed,
                       seconds=round(time.time()-began)),
              args.out.with_suffix('.json'))
    print(rows.to_string(index=False))
    failures = pd.DataFrame([f for _, fs in found for f in fs])
    if len(failures):
        print(failures.groupby(['reader', 'said']).agg(
            n=('number', 'size'), first=('number', 'first')).to_string())
