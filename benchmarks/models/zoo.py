"""Train the small networks that constants of the predictor are derived on.

    python benchmarks/models/zoo.py --data ../shared/data --out zoo

`--data` is a folder with `read_images.py`, `cifar10/` and `cifar100/`: lossless photographs. Each network
is trained for a few epochs by the published recipe, shortened, and written as
OUT/NAME-DATASET.pt; networks that are there already are not trained again, and one that was
interrupted goes on from its last epoch. Accuracy on 2,000 test photographs stands in OUT/zoo.csv.
"""
import argparse, sys
from pathlib import Path

import pandas as pd
import torch

from robustnb.contract import predict
from robustnb.core import to_float
from robustnb.data import ImageSet
from robustnb.models.loading import load_model, save_model
from robustnb.models.training import Recipe, train
from robustnb.models.zoo import build_model

networks = ('ResNet_18,.125,cifar10,9 ResNet_18,.125,cifar100,9 AlexNet,.25,cifar10,10 '
            'VGG_16,.125,cifar10,9 AlexNet_BN,.25,cifar100,10 AlexNet_BN,.25,cifar10,10 '
            'VGG_16,.125,cifar100,12 MobileNetV2,.25,cifar10,7')
statistics = dict(cifar10=((.4914, .4822, .4465), (.2470, .2435, .2616)),
                  cifar100=((.5071, .4865, .4409), (.2673, .2564, .2762)))


def photographs(data, dataset, part, per_class=None):
    from read_images import read
    x, y, classes = read(data/dataset/f'{dataset}-{part}.zip', *([per_class] if per_class else []))
    return ImageSet(x, y, classes)


def accuracy(model, test):
    return (predict(model, to_float(test.images)).argmax(1).numpy() == test.y).mean()


def one(kind, width, dataset, epochs, args):
    "A row"
    path = args.out/f'{kind}-{dataset}.pt'
    n_classes = 100 if dataset == 'cifar100' else 10
    mean, std = statistics[dataset]
    net = build_model(kind, n_classes, float(width), mean, std, seed=0)
    recipe = Recipe(lr=.02 if kind == 'AlexNet' else .1).shortened(int(epochs))
    net, _ = train(recipe, net, photographs(args.data, dataset, 'train'), seed=0,
                   checkpoint=path.with_suffix('.ckpt'), resume=True)
    save_model(net, path)
    test = photographs(args.data, dataset, 'test-a', 200 if n_classes == 10 else 20)
    return dict(network=kind, width=width, dataset=dataset, epochs=epochs,
                accuracy=accuracy(load_model(path), test), n=len(test.images))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--networks', default=networks, help='name,width,dataset,epochs with spaces between')
    parser.add_argument('--out', type=Path, default=Path('zoo'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(args.data)]
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out/'zoo.csv'
    rows = pd.read_csv(table).to_dict('records') if table.exists() else []
    for asked in args.networks.split():
        kind, width, dataset, epochs = asked.split(',')
        if any((row['network'], row['dataset']) == (kind, dataset) for row in rows): continue
        rows.append(one(kind, width, dataset, epochs, args))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(table, index=False)


if __name__ == '__main__':
    main()
