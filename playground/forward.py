"""The forward pass of ComfyUI's UNet and CLIP text model, written out for training.

ComfyUI's own forwards add in place and branch on patches, which autograd or the compiler cannot follow; these walk the
same modules with the same arithmetic (`tests/comfy` holds them equal). Each repeated part is one function, so that the
compiler sees it once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of `1000 t`, cosines first: `(B,)` to `(B, width)`."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000 * t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of `(B, N, heads * d)` queries over `(B, M, heads * d)` keys and values."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def transformer_block(block: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """Self-attention, cross-attention and gated feed-forward, each on a layer norm and added."""
    for attention, norm, source in ((block.attn1, block.norm1, None), (block.attn2, block.norm2, context)):
        n = norm(x)
        source = n if source is None else source
        q, k, v = attention.to_q(n), attention.to_k(source), attention.to_v(source)
        x = x + attention.to_out(attend(q, k, v, block.n_heads))
    return x + block.ff(block.norm3(x))


def residual_block(block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    """Two convolutions on group norms; the embedding is added between them."""
    h = block.in_layers(x) + block.emb_layers(embedding)[:, :, None, None]
    return block.skip_connection(x) + block.out_layers(h)


class Walk:
    """The UNet as a function `(x, t, context) -> velocity`, with its two repeated parts compiled or not."""

    def __init__(self, unet: nn.Module, compiled: bool = False):
        self.unet = unet
        self.transformer = torch.compile(transformer_block, dynamic=False) if compiled else transformer_block
        self.residual = torch.compile(residual_block, dynamic=False) if compiled else residual_block

    def _layers(self, layers: nn.Module, h: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for layer in layers:
            if hasattr(layer, "in_layers"):
                h = self.residual(layer, h, embedding)
            elif hasattr(layer, "transformer_blocks"):
                n = layer.proj_in(layer.norm(h))
                size = n.shape[2:]
                n = n.flatten(2).transpose(1, 2).contiguous()
                for block in layer.transformer_blocks:
                    n = self.transformer(block, n, context)
                h = h + layer.proj_out(n.transpose(1, 2).unflatten(2, size))
            elif hasattr(layer, "op"):
                h = layer.op(h)
            elif hasattr(layer, "use_conv"):
                h = layer.conv(F.interpolate(h, scale_factor=2.0))
            else:
                h = layer(h)
        return h

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        unet, h, skips = self.unet, x, []
        embedding = unet.time_embed(timestep_features(t, unet.model_channels))
        for layers in unet.input_blocks:
            h = self._layers(layers, h, embedding, context)
            skips.append(h)
        h = self._layers(unet.middle_block, h, embedding, context)
        for layers in unet.output_blocks:
            h = self._layers(layers, torch.cat([h, skips.pop()], dim=1), embedding, context)
        return unet.out(h)


def encode_text(text: nn.Module, embeddings: Tensor, heads: int) -> Tensor:
    """ComfyUI's CLIP text model on token embeddings `(B, L, width)`: causal, last layer, final norm."""
    x = embeddings + text.embeddings.position_embedding.weight
    length = x.shape[1]
    mask = torch.full((length, length), -1e9, device=x.device).triu_(1)
    for layer in text.encoder.layers:
        attention, n = layer.self_attn, layer.layer_norm1(x)
        q, k, v = attention.q_proj(n), attention.k_proj(n), attention.v_proj(n)
        x = x + attention.out_proj(attend(q, k, v, heads, mask.to(q.dtype)))
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)
