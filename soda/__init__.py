"""SODA: spectral orthogonal decomposition adaptation (arXiv 2405.21050) for the weights of diffusion models.

Load, mix and apply, with no host:

    adapter = soda.load("style.safetensors")
    mixed = soda.mix([(adapter, 0.8), (soda.load("subject.safetensors"), 1.0)])
    weight = soda.adapt(weight, mixed.layers[name], {"lq": soda.decompose(weight, "lq")})
"""

from .adapt import adapt
from .adapter import Adapter, Layer
from .bases import decompose_all
from .basis_cache import BasisCache
from .decomposition import Basis, decompose, spectral_change
from .errors import SodaError, SodaFileError, SodaMixError, SodaTrainingError
from .file import load, save, validate
from .kronecker import factor_sizes
from .mixing import b_lora, mix, sum_delta
from .stiefel import StiefelAdam, StiefelSGD

__all__ = [
    "Adapter",
    "Basis",
    "BasisCache",
    "Layer",
    "SodaError",
    "SodaFileError",
    "SodaMixError",
    "SodaTrainingError",
    "StiefelAdam",
    "StiefelSGD",
    "adapt",
    "b_lora",
    "decompose",
    "decompose_all",
    "factor_sizes",
    "load",
    "mix",
    "save",
    "spectral_change",
    "sum_delta",
    "validate",
]
