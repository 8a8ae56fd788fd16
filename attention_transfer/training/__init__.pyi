from .caching import build_cache as build_cache
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate_model as evaluate_model
from .fit import resume as resume
from .fit import train as train
