"""The library alone, without ComfyUI: the repository's root goes on sys.path in this process only."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
torch.set_num_threads(1)
