"""From weights of phrases, as people write them, to weights of tokens."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from scfg import checks


def find_phrase(text: Sequence[Hashable], phrase: Sequence[Hashable]) -> list[int]:
    """Where a phrase begins in a text, both as tokens: every place, in order.

    >>> find_phrase([7, 1, 2, 1, 2, 9], [1, 2])
    [1, 3]
    """
    places = range(len(text) - len(phrase) + 1)
    return [i for i in places if list(text[i : i + len(phrase)]) == list(phrase)]


def weigh_phrases(
    texts: Sequence[Sequence[Hashable]],
    phrases: Mapping[str, Sequence[Hashable]],
    weights: Mapping[str, float],
) -> Tensor:
    """Weights of tokens, to be given as ``token_weights``, from weights of phrases.

    Args:
        texts: B texts as tokens, START and padding included.
        phrases: Each phrase as tokens.
        weights: Factor of the rate of the regions that belong to each phrase, > 0. A phrase counts
            wherever it occurs; where two overlap, the later one's factor holds.

    Returns:
        (B, t) float32 for the longest text, 1 where no phrase is.

    Raises:
        ValueError: A weight is not finite and > 0, or a phrase is in no text.
    """
    table = torch.ones(len(texts), max(map(len, texts)))  # (B, t)
    for phrase, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"token_weights[{phrase!r}] must be finite and > 0, got {weight}")
        tokens = phrases[phrase]
        spans = [(row, i) for row, text in enumerate(texts) for i in find_phrase(text, tokens)]
        if not tokens or not spans:
            raise ValueError(
                f"token_weights has the phrase {phrase!r}, which is not in the prompt, as far as "
                f"that is read ({max(map(len, texts))} tokens)"
            )
        for row, i in spans:
            table[row, i : i + len(tokens)] = weight
    return table


def phrase_weights(
    tokenizer: Callable, prompts: str | Sequence[str], weights: Mapping[str, float]
) -> Tensor:
    """`weigh_phrases` of prompts, by their tokenizer.

    Args:
        tokenizer: A tokenizer of transformers, or anything called like one.
        prompts: One prompt or B of them.
        weights: Factors of phrases, > 0. A phrase is found by its tokens, in whole words.

    Returns:
        (B, t) float32, 1 where no phrase is; t tokens with START, without padding.

    Raises:
        ValueError: A weight is not finite and > 0; a phrase occurs in no prompt, or beyond the
            longest text the tokenizer takes.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    longest = getattr(tokenizer, "model_max_length", None)
    texts = [tokenizer(prompt).input_ids[:longest] for prompt in prompts]
    phrases = {phrase: tokenizer(phrase, add_special_tokens=False).input_ids for phrase in weights}
    return weigh_phrases(texts, phrases, weights)


def refuse_phrases(token_weights: object) -> None:
    """Raise TypeError where weights are given by phrase and no prompt is at hand."""
    if isinstance(token_weights, Mapping):
        raise TypeError(
            "token_weights must be a tensor, one number a token, got phrases, and here no prompt "
            "is seen: scfg.recording.phrases.phrase_weights(tokenizer, prompt, weights) makes it"
        )


def fit_weights(table: Tensor, rows: int, tokens: int) -> Tensor:
    """The weights of B prompts for a batch of images, rows of one prompt side by side.

    Args:
        table: (t,) or (B, t).
        rows: b, a multiple of B.
        tokens: Tokens that the U-Net sees.

    Returns:
        (b, tokens) float32, padded with 1.

    Raises:
        TypeError: table is not a tensor of real numbers.
        ValueError: It is not (t,) or (B, t) or not finite and > 0 (checked on a CPU only), b is not
            a multiple of B, or a weight other than 1 is beyond the tokens.
    """
    checks.weights(table)
    if table.dim() not in (1, 2) or 0 in table.shape:
        raise ValueError(f"token_weights must be (t,) or (B, t), got {tuple(table.shape)}")
    table = table.float() if table.dim() == 2 else table.float()[None]
    if rows % len(table):
        raise ValueError(f"token_weights has {len(table)} rows, for a batch of {rows} images")
    if not (table[:, tokens:] == 1).all():
        raise ValueError(f"token_weights must be for at most {tokens} tokens, got {table.shape[1]}")
    padded = table.new_ones(rows, tokens)
    kept = table[:, :tokens].repeat_interleave(rows // len(table), dim=0)
    padded[:, : kept.shape[1]] = kept
    return padded
