"""From the words of a caption to the context of a network: tokens, and a small causal encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START, END = "<start>", "<end>"


@dataclass(frozen=True)
class Tokenizer:
    """A fixed vocabulary of words; a word's number is its place in `vocabulary`.

    Attributes:
        words: The known words.
        length: Tokens of every encoded caption, longer than the longest.
    """

    words: tuple[str, ...]
    length: int

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """START, END and the words."""
        return (START, END, *self.words)

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Encode captions.

        Args:
            captions: One caption or several, in any case; words are separated by white space, and
                punctuation after one is left out. The empty caption, START and then only END, is
                the unconditional one.

        Returns:
            (b, length) int64.

        Raises:
            ValueError: A word is not known, or a caption is too long.
        """
        captions = [captions] if isinstance(captions, str) else captions
        number = {word: i for i, word in enumerate(self.vocabulary)}
        rows = [[number[token] for token in self.tokens(caption)] for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def tokens(self, caption: str) -> tuple[str, ...]:
        """The token at every position of an encoded caption, for legends: `length` strings.

        Raises:
            ValueError: As in `__call__`.
        """
        words = [word.strip(".,;:!?") for word in caption.lower().split()]
        for word in words:
            if word not in self.words:
                known = ", ".join(self.words)
                raise ValueError(f"caption has the unknown word {word!r}; known words are {known}")
        room = self.length - 2
        if len(words) > room:
            raise ValueError(f"caption has {len(words)} words, at most {room} fit: {caption!r}")
        return (START, *words, *[END] * (self.length - 1 - len(words)))

    def phrase_spans(self, caption: str) -> tuple[tuple[int, int], ...]:
        """Token positions of the phrases that name regions, each without its article.

        A phrase is what follows an "a" or "an", up to "and", "on" or the end: the phrases of a
        scene's caption stand in the order of `Scene.regions`.

        Args:
            caption: A caption.

        Returns:
            One (first, last + 1) per phrase.

        Raises:
            ValueError: As in `__call__`.
        """
        tokens = self.tokens(caption)
        starts = [i + 1 for i, token in enumerate(tokens) if token in ("a", "an")]
        ends = [
            next(i for i in range(start, self.length) if tokens[i] in ("a", "an", "and", "on", END))
            for start in starts
        ]
        return tuple(zip(starts, ends, strict=True))


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
