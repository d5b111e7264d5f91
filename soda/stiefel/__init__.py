"""Momentum SGD and Adam on Stiefel manifolds, St(n, m) = {X (n, m): X^T X = I}, which for n = m are rotations.

`geometry` has the step along the manifold, `newton_schulz` the way back onto it, `sgd` and `adam` the two momenta.
"""

from .adam import StiefelAdam
from .newton_schulz import polar
from .sgd import StiefelSGD

__all__ = ["StiefelAdam", "StiefelSGD", "polar"]
