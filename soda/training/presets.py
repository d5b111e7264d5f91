"""What to train for a role, and how fast, where the user leaves both open.

A subject on cross-attention and a style on self-attention share no weight, which is why they mix. The rates are per
target: self-attention bears more.
"""

from __future__ import annotations

TARGETS = {"subject": "cross-attention", "style": "self-attention", "other": "all attention"}
LEARNING_RATES = {"cross-attention": 0.00875, "self-attention": 0.05, "all attention": 0.01}
