"""V-JEPA 1 in plain torch, as the public code of facebookresearch/jepa computes it.

Modules have Meta's names, so that state_dict() is what its checkpoints hold.
"""

import math

import numpy as np
import torch
from torch import nn


def sincos_1d(width, position):
    omega = 1 / 10000 ** (np.arange(width // 2) / (width / 2))
    angle = np.outer(position.reshape(-1), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def table(width, time, side, uniform_power):
    rows, times, columns = np.meshgrid(np.arange(side), np.arange(time), np.arange(side))
    sizes = (width // 2, width // 4, width // 4)
    if uniform_power:
        sizes = 3 * (math.ceil(width / 6) * 2,)
    parts = [sincos_1d(s, p) for s, p in zip(sizes, (times, rows, columns), strict=True)]
    return torch.from_numpy(np.concatenate(parts, axis=1)[:, :width]).float()[None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * (D // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), MLP(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed3D(nn.Module):
    def __init__(self, width, tubelet, patch):
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, width, kernel_size=size, stride=size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, width, depth, heads, tubelet, patch, frames, size, uniform_power):
        super().__init__()
        self.patch_embed = PatchEmbed3D(width, tubelet, patch)
        positions = table(width, frames // tubelet, size // patch, uniform_power)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video_BCTHW):
        x = self.patch_embed(video_BCTHW) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Its number of heads is the encoder's; mask_index is taken modulo the number of tokens."""

    def __init__(self, encoder, width, depth, heads, mask_tokens, time, side, uniform_power):
        super().__init__()
        wide = encoder.norm.weight.numel()
        self.predictor_embed, self.predictor_proj = nn.Linear(wide, width), nn.Linear(width, wide)
        tokens = [nn.Parameter(torch.zeros(1, 1, width)) for _ in range(mask_tokens)]
        self.mask_tokens = nn.ParameterList(tokens)
        positions = table(width, time, side, uniform_power)
        self.predictor_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, context_BKD, context_ids_K, target_ids_M, mask_index=1):
        positions = self.predictor_pos_embed
        token = self.mask_tokens[mask_index % len(self.mask_tokens)]
        masked = (token + positions[:, target_ids_M]).expand(len(context_BKD), -1, -1)
        context = self.predictor_embed(context_BKD) + positions[:, context_ids_K]
        x = torch.cat([context, masked], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, len(context_ids_K) :])


def build(uniform_power=True, mask_tokens=2, width=48, heads=2, predictor_width=24, seed=0):
    """Return encoder and predictor of clips of 4 frames of 12 px: 2 x 3 x 3 tokens."""
    torch.manual_seed(seed)
    encoder = Encoder(width, 2, heads, 2, 4, 4, 12, uniform_power)
    predictor = Predictor(encoder, predictor_width, 2, heads, mask_tokens, 2, 3, uniform_power)
    for module in (encoder, predictor):
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = 0.15 * torch.randn(parameter.shape)
                parameter.data = noise + (parameter.data if parameter.ndim == 1 else 0)
    return encoder.eval(), predictor.eval()
