__version__ = "0.0.1"

from .apgd import apgd, apgd_targeted
from .attacks import fgsm, in_turn, pgd, restarts
from .autoattack import autoattack, cascade
from .blackbox import square
from .checks import red_flags
from .contest import contest_train, validate_set
from .core import predict
from .corruptions import corruption
from .cost import cost
from .curation import attacked, build_training_set, load_training_set, TrainingSet
from .data import ImageSet, digits, load_data, split_data, subset
from .descriptors import Plan, attack_descriptor, fgvm
from .evaluation import compare, evaluate, robustness_curve, summarize
from .generator import generate, train_generator
from .hidden import hidden_set, score_training_sets, standings
from .models import build_model, load_model, model_names, save_model, wrap_model
from .oracle import Queries, http_box
from .ptq import quantize
from .quant import all_formats, number_format, quant_spec
from .recipes import recipe
from .search import mine_errors, mix, successive_halving
from .similarity import layer_sensitivity
from .students import descriptor_model, distill_descriptor, fidelity, train_teacher
from .sweep import grid, sweep
from .threat import L1, L2, SSIM, Linf
from .training import Recipe, train
from .transfer import Report, assess
from .verification import check_submission, compare_attacks, make_pairs, write_submission

__all__ = ['ImageSet', 'L1', 'L2', 'Linf', 'Plan', 'Queries', 'Recipe', 'Report', 'SSIM', 'TrainingSet', 'all_formats', 'apgd', 'apgd_targeted', 'assess',
           'attack_descriptor', 'attacked', 'autoattack', 'build_model', 'build_training_set', 'cascade', 'check_submission', 'compare', 'compare_attacks',
           'contest_train', 'corruption', 'cost', 'descriptor_model', 'digits', 'distill_descriptor', 'evaluate', 'fgsm', 'fgvm', 'fidelity', 'generate', 'grid',
           'hidden_set', 'http_box', 'in_turn', 'layer_sensitivity', 'load_data', 'load_model', 'load_training_set', 'make_pairs', 'mine_errors', 'mix',
           'model_names', 'number_format', 'pgd', 'predict', 'quant_spec', 'quantize', 'recipe', 'red_flags', 'restarts', 'robustness_curve', 'save_model',
           'score_training_sets', 'split_data', 'square', 'standings', 'subset', 'successive_halving', 'summarize', 'sweep', 'train', 'train_generator',
           'train_teacher', 'validate_set', 'wrap_model', 'write_submission']
