"""What a prediction from training photographs is worth, and whether they can be told from new ones.

    python benchmarks/transfer/training_photographs.py --data ../shared/data --work work

`--data` as for quantization_loss.py. A row per network and format in results/training_photographs.csv,
from 300 training and 300 test photographs: accuracies; `certainty`, the mean certainty at the typical
sharpness; `growth`, the mean lead over that on natural crops; `dispersion`, the variance of the leads over
their mean, and `most`, the upper end of its interval; the loss that is predicted from either part (`law`,
its sharpness from `foreseen_accuracy` as in a report), from training photographs and the accuracy on test
photographs (`known_train`), and the loss that is measured on the test photographs, of a copy with ranges
from 100 other training photographs.
Answers are kept in `--work`, so that an interrupted run goes on.
"""
import pandas as pd

from others import cifar, kept, loaded, parsed
from quantization_loss import lost
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.quant.ptq import quantize
from robustnb.transfer.certainty import (
    expected_loss, foreseen_accuracy, granted, known_sharpness, shifted)
from robustnb.transfer.crops import lead_dispersion, leads, natural_crops

formats = 'INT4', 'POT4'
chosen_on = ('c10_resnet8_k c10_resnet8_m c10_cnna_v c100_resnet8_k c10_resnet20_a c10_resnet20_i '
             'c100_resnet20_k').split()
judged_on = 'c100_micronet_t c10_resnet26_k'.split()
parts = 'train', 'test'


def answers(name, args):
    "Labels and logits of the network and its copies on both parts, and on natural crops"
    model = loaded(name)
    x, y = cifar(args.data, name, 'train', 400)
    new, labels = cifar(args.data, name, 'test-a', 300)
    images = dict(train=x[:300], test=new)
    asked = lambda net: {k: predict(net, o) for k, o in images.items()}
    found = dict(y=dict(train=y[:300], test=labels), original=asked(model),
                 shifted={k: [predict(model, o) for o in shifted(v)] for k, v in images.items()},
                 crops=predict(model, natural_crops(200, 32)))
    return found | {f: asked(quantize(model, f, x[300:])) for f in formats}


def rows_of(name, args):
    "A row per format"
    held = kept(args.work/f'{name}.pt', lambda: answers(name, args))
    row = dict(network=name)
    sharpness = {}
    for part in parts:
        logits = held['original'][part]
        dispersion, most = lead_dispersion(logits)
        found = dict(accuracy=(logits.argmax(1) == held['y'][part]).double().mean().item(),
                     certainty=granted(logits).max(1).values.mean().item(),
                     growth=(leads(logits).mean()/leads(held['crops']).mean()).item(),
                     dispersion=dispersion, most=most)
        row |= {f'{k}_{part}': v for k, v in found.items()}
        sharpness[part] = known_sharpness(logits, foreseen_accuracy(logits, held['shifted'][part]))
    for f in formats:
        both = {part: (held['original'][part], held[f][part]) for part in parts}
        said = {f'law_{part}': expected_loss(*both[part], sharpness[part])[0] for part in parts}
        new = known_sharpness(both['train'][0], row['accuracy_test'])
        said['known_train'] = expected_loss(*both['train'], new)[0]
        measured = lost(held['original']['test'], held[f]['test'], held['y']['test'])
        yield row | dict(format=f) | said | dict(measured=measured)


def more_arguments(parser):
    parser.add_argument('--networks', default=' '.join(chosen_on + judged_on))


def main():
    args = parsed(__doc__, 'training_photographs', more_arguments)
    rows = [row for name in args.networks.split() for row in rows_of(name, args)]
    pd.DataFrame(rows).round(4).to_csv(args.out/'training_photographs.csv', index=False)
    save_json(manifest(n=300, chosen_on=chosen_on), args.out/'training_photographs.json')


if __name__ == '__main__':
    main()
