"""A prompt as ComfyUI's tokenizers see it: words and phrases among the columns of the text."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfg.recording.layouts import Words
from scfg.recording.phrases import find_phrase
from scfg.recording.words import split_words

EMPHASIS = re.compile(r"(?<!\\)\(|(:[\d.]+)?(?<!\\)\)")  # as in "(red circle:1.2)"
EMBEDDING = -1  # in place of a token's number


def parse_phrases(text: str) -> dict[str, float]:
    """``{"blue square": 1.5}`` from lines such as ``blue square: 1.5``.

    Raises:
        ValueError: A line is not a phrase, a colon and a number > 0.
    """
    weights = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        phrase, _, factor = line.rpartition(":")
        try:
            weights[phrase.strip()] = float(factor)
        except ValueError:
            raise ValueError(f"a line of phrases must be 'phrase: factor', got {line!r}") from None
        if not phrase.strip() or not 0 < weights[phrase.strip()] < math.inf:
            raise ValueError(f"a line of phrases must be 'phrase: factor > 0', got {line!r}")
    return weights


@dataclass(frozen=True)
class Copy:
    """The prompt as one tokenizer has it, token by token, START, END and padding among them.

    Attributes:
        tokens: Numbers.
        words: The word that each is a piece of, from 0; -1 for what is none of the prompt.
        weights: Factor of the phrase that it belongs to, 1 where there is none.
        at_end: The text ends with these; before them the encoder adds or cuts a template.
    """

    tokens: tuple[int, ...]
    words: tuple[int, ...]
    weights: tuple[float, ...]
    at_end: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt whose copies, one after another, are the columns of a text."""

    copies: tuple[Copy, ...]

    def words(self, t: int) -> Tensor:
        """(t,) int64: the word of each column, -1 for none.

        Raises:
            ValueError: A text of t columns is not of this prompt.
        """
        return self._columns([copy.words for copy in self.copies], t, -1)

    def weights(self, t: int) -> Tensor:
        """(t,) float32: the factor of each column.

        Raises:
            ValueError: A text of t columns is not of this prompt.
        """
        return self._columns([copy.weights for copy in self.copies], t, 1.0)

    def _columns(self, rows: Sequence[Sequence], t: int, none: float) -> Tensor:
        lengths = [len(row) for row in rows]
        if self.copies[0].at_end:
            return torch.tensor([none] * (t - lengths[0]) + [*rows[0][max(lengths[0] - t, 0) :]])
        sums = [sum(lengths[:i]) for i in range(1, len(rows) + 1)]
        if t not in sums:  # an encoder that was not loaded leaves its copy out
            raise ValueError(
                f"prompt must be the one that is guided by, whose text has {t} tokens; got one of "
                f"{' or '.join(map(str, sums))} tokens"
            )
        return torch.tensor([value for row in rows for value in row][:t])


def read_prompt(
    clip, prompt: str, places: Sequence[Words], weights: Mapping[str, float] | None = None
) -> Prompt:
    """A prompt as the tokenizers of a model see it.

    Args:
        clip: A CLIP of ComfyUI.
        prompt: Words between spaces.
        places: The model's tokenizers, in order of its text; the first that clip has, if it has
            none of them.
        weights: Factors of phrases; each counts wherever it occurs, the later one where two
            overlap.

    Raises:
        ValueError: A phrase is not in the prompt.
    """
    weights = weights or {}
    given = clip.tokenize(prompt)
    ends = {place.tokenizer: place.first is None for place in places if place.tokenizer in given}
    copies, found = [], set()
    for name, at_end in (ends or {next(iter(given)): False}).items():
        tokens, own = _tokens(clip, prompt, name)
        words, numbers = _words(clip, prompt, name)
        numbers = iter(numbers)
        numbers = [next(numbers) if inside else -1 for inside in own]
        factors = [1.0] * len(tokens)
        for phrase, factor in weights.items():
            for i in _places(clip, phrase, name, tokens, words, numbers):
                factors[i] = factor
                found.add(phrase)
        copies.append(Copy(tuple(tokens), tuple(numbers), tuple(factors), at_end))
    if missing := [phrase for phrase in weights if phrase not in found]:
        raise ValueError(f"phrases must be in the prompt, which has no {missing}, got {prompt!r}")
    return Prompt(tuple(copies))


def _words(clip, prompt: str, name: str) -> tuple[list[str] | None, list[int]]:
    """Words of a prompt, and for each token of its own the word it is a piece of.

    Where tokens and words disagree there are no words, and each token counts as one; their numbers
    are none that another tokenizer may have given to a word.
    """
    whole, spoken = _own(clip, prompt, name), EMPHASIS.sub("", prompt)
    for text in (spoken, prompt):
        ends = [0]  # tokens of the text up to each word: a piece may hold the space before it
        for word in re.finditer(r"\S+", text):
            ends.append(len(_own(clip, text[: word.end()], name)))
        if _own(clip, text, name) == whole and ends == sorted(ends) and ends[-1] == len(whole):
            counts = [last - first for first, last in zip(ends, ends[1:], strict=False)]
            numbers = [word for word, count in enumerate(counts) for _ in range(count)]
            return split_words(text), numbers
    first = len(spoken.split())
    return None, list(range(first, first + len(whole)))


def _places(clip, phrase: str, name: str, tokens: list, words: list | None, numbers: list) -> list:
    """Tokens that belong to a phrase: found by its words, else by its tokens."""
    if words is None:
        wanted = _own(clip, phrase, name)
        starts = find_phrase(tokens, wanted) if wanted else []
        return [i for start in starts for i in range(start, start + len(wanted))]
    wanted = split_words(phrase)
    starts = find_phrase(words, wanted) if wanted else []
    inside = {i for start in starts for i in range(start, start + len(wanted))}
    return [i for i, number in enumerate(numbers) if number in inside]


def _own(clip, text: str, name: str) -> list[int]:
    """Tokens of a text, without what surrounds it."""
    tokens, own = _tokens(clip, text, name)
    return [token for token, inside in zip(tokens, own, strict=True) if inside]


def _tokens(clip, text: str, name: str) -> tuple[list[int], list[bool]]:
    """All tokens, and which are the text's own: those that an empty prompt lacks."""
    frame = _numbers(clip.tokenize("")[name][0])
    tokens, own = [], []
    for chunk in map(_numbers, clip.tokenize(text)[name]):
        first, last = _inside(chunk, frame)
        tokens += chunk
        own += [first <= i < last for i in range(len(chunk))]
    return tokens, own


def _numbers(chunk: list[tuple]) -> list[int]:
    return [pair[0] if isinstance(pair[0], int) else EMBEDDING for pair in chunk]


def _inside(chunk: list[int], frame: list[int]) -> tuple[int, int]:
    """Where a chunk's text begins and ends."""
    first = _alike(chunk, frame)
    last = max(len(chunk) - _alike(chunk[::-1], frame[::-1]), first)
    end = frame[first : first + 1]  # of the text, where padding follows
    while last > first and chunk[last - 1 : last] == end:
        last -= 1
    return first, last


def _alike(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return (same + [False]).index(False)
