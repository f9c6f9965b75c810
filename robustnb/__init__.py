__version__ = "0.0.1"

from .attacks import fgsm, pgd
from .core import predict
from .cost import cost
from .data import ImageSet, digits, load_data, split_data, subset
from .evaluation import evaluate, summarize
from .generator import generate, train_generator
from .models import build_model, load_model, model_names, save_model, wrap_model
from .ptq import quantize
from .quant import all_formats, number_format, quant_spec
from .similarity import layer_sensitivity
from .threat import L2, Linf
from .training import Recipe, train
from .transfer import Report, assess

__all__ = ['ImageSet', 'L2', 'Linf', 'Recipe', 'Report', 'all_formats', 'assess', 'build_model', 'cost', 'digits', 'evaluate', 'fgsm',
           'generate', 'layer_sensitivity', 'load_data', 'load_model', 'model_names', 'number_format', 'pgd', 'predict', 'quant_spec',
           'quantize', 'save_model', 'split_data', 'subset', 'summarize', 'train', 'train_generator', 'wrap_model']
