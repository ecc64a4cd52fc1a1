"""A small causal transformer that turns token numbers into the context of the U-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Causal self-attention and a feed-forward, each on a LayerNorm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix and transform tokens (b, t, c)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """Embed tokens and their positions, then causal layers and a LayerNorm.

    Causal as in CLIP: the first token, START, is encoded the same whatever the caption, and every
    token knows only the words up to its own.

    Args:
        vocabulary: Number of tokens.
        length: Positions.
        width: Features of a token.
        layers: Transformer layers.
        heads: Attention heads.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens (b, t) int64 as context (b, t, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.layers(self.token(tokens) + self.position(positions)))
