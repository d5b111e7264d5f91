"""Adapters from and to what other tools read: official `.pt` tables, full differences, LoRAs, diffusers names."""

from .base import BaseWeights
from .export import save_difference, save_lora
from .names import renamed, to_comfy, to_diffusers
from .official import read_official

__all__ = ["BaseWeights", "read_official", "renamed", "save_difference", "save_lora", "to_comfy", "to_diffusers"]
