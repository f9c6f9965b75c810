"""Which torchvision and timm classifiers can be quantised: one row per network, with what stayed in
full precision or why it was refused.

    python benchmarks/quant/any_model.py

Random weights, batch norm that has seen the images, two images of 224 pixels (more where the
network wants more). `noise` is the noise power of the logits over their variance; a copy in
INT16 must be next to exact, which shows that the copy is the same network. Rows go to
results/any_model.csv with a manifest beside them.
"""
import argparse, time
from pathlib import Path

import pandas as pd
import timm
import torch
import torchvision
from torch import nn

from robustnb.core import make_generator
from robustnb.contract import predict
from robustnb.files import manifest, save_json
from robustnb.models.complexity import model_complexity
from robustnb.models.wrapping import last_linear, wrap_model
from robustnb.quant.ptq import calibrate, quantize, FakeQuantize

from_torchvision = ('alexnet', 'vgg11', 'resnet18', 'resnext50_32x4d', 'densenet121', 'googlenet',
                    'inception_v3', 'squeezenet1_1', 'shufflenet_v2_x1_0', 'mnasnet0_5',
                    'mobilenet_v3_small', 'efficientnet_b0', 'regnet_x_400mf', 'regnet_y_400mf',
                    'convnext_tiny', 'vit_b_16', 'swin_t', 'swin_v2_t', 'maxvit_t')
from_timm = ('resnet18', 'resnetv2_50', 'nf_resnet50', 'res2net50_14w_8s', 'densenet121',
             'regnetx_002', 'repvgg_a0', 'mobilenetv3_small_050', 'ghostnet_050', 'efficientnet_b0',
             'tf_efficientnet_b0', 'convnext_atto', 'inception_next_atto', 'poolformer_s12',
             'mixer_s32_224', 'resmlp_12_224', 'vit_tiny_patch16_224', 'deit_tiny_patch16_224',
             'beit_base_patch16_224', 'cait_xxs24_224', 'xcit_nano_12_p16_224',
             'swin_tiny_patch4_window7_224', 'levit_128s', 'coat_tiny', 'pvt_v2_b0',
             'efficientformer_l1', 'edgenext_xx_small', 'mobilevit_xxs', 'maxvit_nano_rw_256')
sizes = {'inception_v3': 299, 'swin_v2_t': 256, 'maxvit_nano_rw_256': 256}


def build(library, name, x):
    torch.manual_seed(0)
    if library == 'timm':
        net = timm.create_model(name, pretrained=False)
    else:
        given = {'init_weights': True} if name in ('googlenet', 'inception_v3') else {}
        net = getattr(torchvision.models, name)(weights=None, **given)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.momentum = None
    if norms:
        net.train()((x-.5)/.25)
    head = last_linear(net)
    if not head.weight.any():
        nn.init.normal_(head.weight, std=.02)
    return wrap_model(net, (.5,)*3, (.25,)*3)


def noise(q, x, logits): return ((predict(q, x)-logits).square().mean()/logits.var(1).mean()).item()


@torch.no_grad()
def row(library, name):
    size = sizes.get(name, 224)
    x = torch.rand(2, 3, size, size, generator=make_generator(0, 'any model'))
    model = build(library, name, x)
    found = dict(library=library, model=name, pixels=size,
                 parameters=sum(p.numel() for p in model.parameters()))
    began = time.process_time()
    try:
        seen = calibrate(model, x)
    except TypeError as e:
        reason = str(e).partition(';')[2].partition(': symbolically')[0].partition('. Its')[0].strip()
        return found | dict(outcome='refused', reason=reason)
    q = quantize(model, 'INT8', seen)
    took = time.process_time()-began
    logits = predict(model, x)
    outcome = ('calls closed' if q.opaque else 'layers in full precision' if q.left_float
               else 'all rounded')
    kept = sum(p.numel() for n, p in q.named_parameters()
               if any(n == o or n.startswith(o + '.') for o in q.left_float))
    return found | dict(
        outcome=outcome, rounded=sum(isinstance(m, FakeQuantize) for m in q.modules()),
        left=len(q.left_float), left_fraction=kept/found['parameters'], opaque=len(q.opaque),
        noise_int8=noise(q, x, logits),
        noise_int16=noise(quantize(model, 'INT16', seen), x, logits),
        gmacs=model_complexity(model, (3, size, size)).macs.sum()/1e9, seconds=round(took, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    rows = []
    torch.set_num_threads(1)
    path = Path(args.out)/'any_model.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    for library, names in (('torchvision', from_torchvision), ('timm', from_timm)):
        for name in names:
            rows.append(row(library, name))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(path, index=False)
    save_json(manifest(timm=timm.__version__, images=2), path.with_suffix('.json'))


if __name__ == '__main__':
    main()
