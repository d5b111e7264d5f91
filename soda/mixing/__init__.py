"""Mixing adapters. For one weight W0 with adapters (delta_i, A_i) and weights w_i, s = sum w_i:

    lie_sum    delta = sum w_i delta_i             A_j = sum w_i A_ij
    karcher    delta = sum w_i delta_i             exp(A_j) = mean on SO(n_j) of R_ij^s with the shares w_i / s
    ties       trim, elect a sign per coordinate, sum what agrees                        (arXiv 2306.01708)
    dare       drop coordinates at random, rescale the rest, lie_sum                     (arXiv 2311.03099)
    sum_delta  W = W0 + sum w_i (W_i - W0), W_i adapted by adapter i alone; no small form

What each keeps; an exception is named, and every cell is a test:

| law           | lie_sum | karcher | ties    | dare    | sum_delta |
|---------------|---------|---------|---------|---------|-----------|
| identity      | yes     | refused | yes     | yes     | yes       |
| recovery      | yes     | yes     | no      | no      | yes       |
| full density  | -       | -       | yes     | yes     | -         |
| repetition    | yes     | yes     | yes     | yes     | yes       |
| strength      | yes     | yes     | yes     | yes     | no        |
| negative      | yes     | refused | yes     | yes     | yes       |
| order         | yes     | yes     | yes     | yes     | yes       |
| orthogonality | yes     | yes     | yes     | yes     | no        |
| spectrum      | yes     | yes     | no      | no      | no        |
| size          | yes     | yes     | yes     | yes     | refused   |
| sketch        | yes     | yes     | no      | no      | -         |
| unlike bases  | yes     | yes     | yes     | yes     | yes       |
| unlike sizes  | yes     | refused | refused | yes     | yes       |

identity: all weights 0 give W0 bit for bit. recovery: one adapter at weight 1, others at 0, is that adapter bit for
bit; full density: so it is at density 1. repetition: weights 1/4 and 3/4 on one adapter are weight 1 on it. strength:
one adapter at weight w is the mix at weight 1, scaled by w (karcher: w > 0). negative: weights below 0 are allowed.
order: a permutation of the adapters changes no bit. orthogonality: where all delta are 0, W has W0's singular values.
spectrum: W has the singular values of W0 + sum w_i D_i. size: adapters of one form mix to one of that form, which a
file can hold. sketch: the mix has the sketch of its D. unlike bases: adapters of unlike decompositions with equal
factor sizes mix; their terms stay side by side, (W0 + sum D_i) R^T, the first of them with the R of all on its side
(only `none`, which has no D, merges into it). unlike sizes: so do adapters of unlike factor sizes, through the dense
exp(sum w_i log R_i). Neither can be saved as one file. Where an operator refuses, SodaMixError says what to do. A layer
that only some adapters have is mixed from these.

A weight is a number or a mapping of blocks to numbers (`blocks`), so that all of this holds layer by layer.
"""

from .blocks import Weight, b_lora
from .mix import OPERATORS, mix
from .sum_delta import sum_delta
from .terms import Part

__all__ = ["OPERATORS", "Part", "Weight", "b_lora", "mix", "sum_delta"]
