"""Words of a caption as numbers: one token a word, START before and END after, padded with END."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfg.shapes.scenes import COLOURS, SHAPES, TEXTURES

START, END = "<start>", "<end>"
WORDS = ("a", "and", "on", "background", *SHAPES, *COLOURS, *TEXTURES[1:])  # plain is not said


@dataclass(frozen=True)
class Tokenizer:
    """A fixed vocabulary of words; a word's number is its place in `vocabulary`.

    Attributes:
        words: The known words.
        length: Tokens of every encoded caption; the longest caption of a scene needs all 16.
    """

    words: tuple[str, ...] = WORDS
    length: int = 16

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """START, END and the words."""
        return (START, END, *self.words)

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Encode captions.

        Args:
            captions: One caption or several, in any case; words are separated by white space. The
                empty caption, START and then only END, is the unconditional one.

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
        words = caption.lower().split()
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

        A phrase is what follows an "a", up to "and", "on" or the end: the phrases of a scene's
        caption stand in the order of `Scene.regions`.

        Args:
            caption: A caption.

        Returns:
            One (first, last + 1) per phrase.

        Raises:
            ValueError: As in `__call__`.
        """
        tokens = self.tokens(caption)
        starts = [i + 1 for i, token in enumerate(tokens) if token == "a"]
        ends = [
            next(i for i in range(start, self.length) if tokens[i] in ("a", "and", "on", END))
            for start in starts
        ]
        return tuple(zip(starts, ends, strict=True))
