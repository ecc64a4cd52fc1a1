"""Words of a prompt among the columns of a transformer's text: pieces and copies of one are one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfg.patches import OTHER, START, Patches
from scfg.recording.layouts import Grid, Layout, Words
from scfg.recording.phrases import weigh_phrases


def split_words(text: str) -> list[str]:
    """Words of a text, in lower case, without punctuation around them.

    >>> split_words("A red circle, and a blue square.")
    ['a', 'red', 'circle', 'and', 'a', 'blue', 'square']
    """
    return [word.strip(".,;:!?\"'()[]").lower() or word for word in text.split()]


def word_numbers(tokenizer: Callable, text: str) -> list[int]:
    """For each token of a text, without special tokens, the number of the word it is a piece of.

    Args:
        tokenizer: One of transformers, or anything called like one.
        text: Words between spaces.

    Returns:
        Numbers from 0; each token is a word of its own where the tokenizer cannot tell.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        # a piece may begin with the space before its word, so its last character decides
        return [sum(end < last for end in ends) for _, last in found["offset_mapping"]]
    whole = len(tokenizer(text, add_special_tokens=False).input_ids)
    counts = [len(tokenizer(word, add_special_tokens=False).input_ids) for word in text.split()]
    if sum(counts) != whole:
        return list(range(whole))
    return [word for word, count in enumerate(counts) for _ in range(count)]


@dataclass(frozen=True)
class Prompt:
    """One prompt: its words, and of each copy in the text the place and the words' numbers.

    Attributes:
        words: As `split_words`; those of a second, different text of the same prompt follow.
        copies: Where a copy begins and ends, see `Words`, and the word of each of its tokens.
    """

    words: tuple[str, ...]
    copies: tuple[tuple[Words, tuple[int, ...]], ...]


def read_prompt(texts: Sequence[str], places: Sequence[Words], tokenizers: Sequence) -> Prompt:
    """A prompt as its tokenizers see it.

    Args:
        texts: What each tokenizer is given; the same text twice is one.
        places: Where its copy is.
        tokenizers: As many.
    """
    words: list[str] = []
    copies, offsets = [], {}
    for text, place, tokenizer in zip(texts, places, tokenizers, strict=True):
        if text not in offsets:
            offsets[text] = len(words)
            words += split_words(text)
        numbers = [offsets[text] + n for n in word_numbers(tokenizer, text)]
        copies.append((place, tuple(numbers)))
    return Prompt(tuple(words), tuple(copies))


def words_table(prompts: Sequence[Prompt], t: int, ends: Sequence[int] | None) -> Tensor:
    """(prompts, t) int64, the word of each column, -1 for none.

    Args:
        prompts: As `read_prompt`.
        t: Columns of the text.
        ends: Of each prompt, the end of its text before the padding; None: t.
    """
    table = torch.full((len(prompts), t), -1)
    for row, prompt in enumerate(prompts):
        for place, numbers in prompt.copies:
            end = t if ends is None else ends[row]
            first = max(end - len(numbers), 0) if place.first is None else place.first
            last = min(end if place.room is None else first + place.room, t)
            numbers = numbers[: max(last - first, 0)]
            table[row, first : first + len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    return table


def weigh_columns(
    prompts: Sequence[Prompt], table: Tensor, weights: Mapping[str, float], lead: int = 0
) -> Tensor:
    """(prompts, lead + t) float32: weights of columns from weights of phrases.

    Args:
        prompts: As `read_prompt`.
        table: From `words_table`.
        weights: See `weigh_phrases`.
        lead: Columns before the text.

    Raises:
        ValueError: A weight is not finite and > 0, or a phrase is in no prompt.
    """
    texts = [prompt.words for prompt in prompts]
    of_words = weigh_phrases(texts, {p: split_words(p) for p in weights}, weights)
    of_columns = of_words.gather(1, table.clamp_min(0))
    columns = torch.where(table >= 0, of_columns, 1.0)
    return torch.nn.functional.pad(columns, (lead, 0), value=1.0)


def group_words(
    words: Tensor | None, b: int, t: int, layout: Layout, lead: int, grid: Grid
) -> tuple[Tensor, Patches]:
    """The group of each column of the text, and what the groups are.

    Args:
        words: (t',) or (b, t'), see `TransformerRecorder.start`; columns beyond t' are no words.
        b: Rows.
        t: Columns.
        layout: Its start is used.
        lead: Columns before the text: registers and the padding of the image.
        grid: For `Patches`.

    Returns:
        (b, t) int64, and Patches.

    Raises:
        ValueError: words has another number of rows, or a word beyond the last column.
    """
    start = torch.zeros(t, dtype=torch.bool)
    if layout.registers:
        start[:lead] = True
    for column in layout.start:
        start[lead + column if column >= 0 else t + column] = True
    if words is None:
        table = torch.arange(t).masked_fill(start, -1)
        table[:lead] = -1
        table = table.expand(b, t)
    else:
        words = words[None] if words.dim() == 1 else words
        if len(words) not in (1, b) or words.shape[1] > t - lead:
            raise ValueError(
                f"words must be (t,) or (rows, t) for {b} rows and at most {t - lead} columns of "
                f"text, got {tuple(words.shape)}"
            )
        table = torch.full((b, t), -1)
        table[:, lead : lead + words.shape[1]] = words.cpu()
    groups = torch.where(table >= 0, table + 2, torch.where(start, START, OTHER))
    count = max(int(groups.max()) + 1, 3)
    columns = torch.full((b, count), t).scatter_reduce(
        1, groups, torch.arange(t).expand(b, t), "amin"
    )
    owning = (columns < t) & (torch.arange(count) >= 2)
    patches = Patches(grid, columns.clamp_max(t - 1), owning, bool(start.any()), t)
    return groups, patches
