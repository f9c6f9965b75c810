"Exported models: every convolution in integers, the same answers as the simulation, the arithmetic of an integer machine, refusals by name."
import copy
import math
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustnb import export
from robustnb.core import make_generator, predict
from robustnb.export import OnnxModel, check_export, engine_ops, export_onnx, run_onnx, whole_biases
from robustnb.models import Normalized, build_model, model_names, wrap_model
from robustnb.ptq import Rounder, quantize
from robustnb.quant import levels, number_format, quant_spec, to_levels

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.usefixtures('one_thread')


def images(n=64, size=32, seed=0, channels=3):
    "Smooth random pictures that differ much, so that answers do too"
    g = make_generator(seed, 'pictures')
    coarse = torch.rand(n, channels, 3, 3, generator=g)**torch.rand(n, 1, 1, 1, generator=g).mul(4)
    return F.interpolate(coarse, size=size, mode='bicubic', align_corners=True).clamp(0, 1)


def lively(model, x, scale=True):
    "Statistics of batch normalisation from `x`, with scales and shifts that are no identity"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, .5, 1.5), nn.init.uniform_(m.bias, -.3, .3)
                m.momentum = None
        model.train()(x)
    return model.eval()


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def model_of(net): return wrap_model(net, (.5,)*3, (.25,)*3)


@pytest.mark.parametrize('name', model_names)
def test_nine_networks_in_integers(name, tmp_path):
    x = images(128)
    model = lively(build_model(name, width=.1), x)
    q, path = quantize(model, 'INT8', x[:16]), tmp_path/'m.onnx'
    facts, convs = export_onnx(q, path), sum(isinstance(m, nn.Conv2d) for m in q.modules())
    check = check_export(whole_biases(q), path, x)
    assert facts['integer'] and facts['format'] == 'INT8' and facts['rounded'] == sum(isinstance(m, Rounder) for m in q.modules())
    assert facts['layers'] == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in q.modules())
    linear = facts['layers']-convs + (name == 'Inception_BN')
    adds = {'ResNet_18': 8, 'ResNet_50': 16, 'ResNet_152': 50, 'MobileNetV2': 10}.get(name, 0)
    pool = 0 if name.startswith(('Alex', 'VGG')) else 1
    expected = dict(QLinearConv=facts['layers']-linear, QGemm=linear, QLinearAdd=adds, QLinearConcat=9*(name == 'Inception_BN'), QLinearGlobalAveragePool=pool)
    assert check['ops'] == {k: n for k, n in expected.items() if n} and check['unfused'] == [] and check['floats'] == {'Sub': 1, 'Div': 1}
    assert check['fused'] == sum(expected.values()) and check['convolutions_fused'] == expected['QLinearConv'] and check['images'] == 128
    spread = predict(q, x).std().item()
    assert len(predict(q, x).argmax(1).unique()) > 1, 'one answer for all would agree by itself'
    print(name, check['agreement'], check['max_logit_difference']/spread, check['mean_logit_difference']/spread, check_export(q, path, x)['agreement'])
    assert check['agreement'] >= .99 and check['mean_logit_difference'] < .03*spread
