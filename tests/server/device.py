"""Where the server of these tests computes: on the CPU, or as COMFYUI_ARGUMENTS says."""

import os

ARGUMENTS = os.environ.get("COMFYUI_ARGUMENTS", "--cpu --use-pytorch-cross-attention").split()
ON_CPU = "--cpu" in ARGUMENTS
