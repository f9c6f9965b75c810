"""Predict what quantization costs a classifier, build training sets, attack descriptors.

The names that the tutorials type; everything else is imported from its room, `from robustnb.quant.ptq import calibrate`.
A name is imported when it is first used, so that `import robustnb` is quick.
"""
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

_NAMES = {
    'data': 'ImageSet load_data load_splits subset',
    'images': 'load_images',
    'contract': 'predict',
    'models.zoo': 'build_model',
    'models.wrapping': 'wrap_model',
    'models.loading': 'load_model save_model',
    'models.training': 'Recipe train',
    'quant.formats': 'number_format quant_spec',
    'quant.ptq': 'quantize',
    'attacks.threat_models': 'L1 L2 Linf',
    'attacks.ssim_rule': 'SSIM',
    'attacks.gradient': 'fgsm full_pgd multi_attack pgd',
    'attacks.score_based': 'square',
    'attacks.standard': 'cascade',
    'evaluation.robust_accuracy': 'evaluate summarize',
    'evaluation.checks': 'red_flags',
    'evaluation.auditing': 'audit',
    'transfer.generator': 'generate train_generator',
    'transfer.study': 'assess Study',
    'curation.training_sets': 'attacked build_training_set',
    'curation.hidden': 'hidden_set rank_training_sets score_training_sets',
    'curation.contest': 'validate_set',
    'descriptors.blackbox': 'BlackBox',
    'descriptors.students': 'distill_descriptor',
    'descriptors.attack': 'attack_descriptor',
    'descriptors.bandit': 'bandit_descriptor',
    'descriptors.ridge_students': 'fit_ridge',
    'descriptors.pairs': 'make_pairs',
    'descriptors.submission': 'check_submission write_submission',
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    "Import a public name on its first use (PEP 562)"
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; its names are {", ".join(__all__)}.')
    value = getattr(import_module(f'.{_HOME[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .attacks.gradient import fgsm, full_pgd, multi_attack, pgd
    from .attacks.score_based import square
    from .attacks.ssim_rule import SSIM
    from .attacks.standard import cascade
    from .attacks.threat_models import L1, L2, Linf
    from .contract import predict
    from .curation.contest import validate_set
    from .curation.hidden import hidden_set, rank_training_sets, score_training_sets
    from .curation.training_sets import attacked, build_training_set
    from .data import ImageSet, load_data, load_splits, subset
    from .descriptors.attack import attack_descriptor
    from .descriptors.bandit import bandit_descriptor
    from .descriptors.blackbox import BlackBox
    from .descriptors.pairs import make_pairs
    from .descriptors.ridge_students import fit_ridge
    from .descriptors.students import distill_descriptor
    from .descriptors.submission import check_submission, write_submission
    from .evaluation.auditing import audit
    from .evaluation.checks import red_flags
    from .evaluation.robust_accuracy import evaluate, summarize
    from .images import load_images
    from .models.loading import load_model, save_model
    from .models.training import Recipe, train
    from .models.wrapping import wrap_model
    from .models.zoo import build_model
    from .quant.formats import number_format, quant_spec
    from .quant.ptq import quantize
    from .transfer.generator import generate, train_generator
    from .transfer.study import assess, Study
