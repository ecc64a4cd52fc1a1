"""Weights of phrases, from lines of text and a CLIP of ComfyUI."""

from types import SimpleNamespace

from torch import Tensor

from scfg.recording.phrases import phrase_weights


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
        if not phrase.strip() or not weights[phrase.strip()] > 0:
            raise ValueError(f"a line of phrases must be 'phrase: factor > 0', got {line!r}")
    return weights


def clip_weights(clip, prompt: str, weights: dict[str, float]) -> Tensor:
    """`scfg.recording.phrases.phrase_weights` of a prompt as ComfyUI reads it, in chunks.

    Args:
        clip: A CLIP of ComfyUI.
        prompt: The prompt.
        weights: Factors of phrases.

    Returns:
        (1, t).
    """

    def numbers(text: str) -> list[int]:
        branches = clip.tokenize(text)
        chunks = branches.get("l", next(iter(branches.values())))
        return [pair[0] if isinstance(pair[0], int) else -1 for chunk in chunks for pair in chunk]

    frame = set(numbers(""))  # START, END, padding

    def tokenizer(text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = numbers(text)
        kept = ids if add_special_tokens else [i for i in ids if i not in frame]
        return SimpleNamespace(input_ids=kept)

    return phrase_weights(tokenizer, prompt, weights)
