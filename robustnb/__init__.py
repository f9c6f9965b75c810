__version__ = "0.0.1"

from .apgd import apgd, apgd_targeted
from .attacks import fgsm, in_turn, pgd, restarts
from .autoattack import autoattack, cascade
from .blackbox import square
from .checks import red_flags
from .core import predict
from .cost import cost
from .data import ImageSet, digits, load_data, split_data, subset
from .evaluation import compare, evaluate, robustness_curve, summarize
from .generator import generate, train_generator
from .models import build_model, load_model, model_names, save_model, wrap_model
from .ptq import quantize
from .quant import all_formats, number_format, quant_spec
from .similarity import layer_sensitivity
from .threat import L1, L2, SSIM, Linf
from .training import Recipe, train
from .transfer import Report, assess

__all__ = ['ImageSet', 'L1', 'L2', 'Linf', 'Recipe', 'Report', 'SSIM', 'all_formats', 'apgd', 'apgd_targeted', 'assess', 'autoattack', 'build_model',
           'cascade', 'compare', 'cost', 'digits', 'evaluate', 'fgsm', 'generate', 'in_turn', 'layer_sensitivity', 'load_data', 'load_model',
           'model_names', 'number_format', 'pgd', 'predict', 'quant_spec', 'quantize', 'red_flags', 'restarts', 'robustness_curve', 'save_model',
           'split_data', 'square', 'subset', 'summarize', 'train', 'train_generator', 'wrap_model']
