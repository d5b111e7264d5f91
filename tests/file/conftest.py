"""The library alone, without ComfyUI: the repository's root goes on sys.path in this process only."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
torch.set_num_threads(1)
