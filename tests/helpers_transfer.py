"What tests of generated images share"
import torch

from robustnb.core import make_generator
from robustnb.models.wrapping import last_linear
from robustnb.transfer.generator import draw_targets, Generator


def settled(model, size=16):
    "An untrained generator for `model` whose own batch norm has seen some batches"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Generator(last_linear(model).weight, model.normalize.mean.flatten(),
                        model.normalize.std.flatten(), size, 8)
    g = make_generator(0)
    for _ in range(30):
        net.train()(draw_targets(32, len(net.embedding), .5, g),
                    torch.randn(32, net.embedding.shape[1], generator=g))
    return net.eval()
