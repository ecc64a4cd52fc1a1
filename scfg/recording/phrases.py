"""From weights of phrases, as people write them, to weights of tokens."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def find_phrase(ids: Sequence[int], phrase: Sequence[int]) -> list[int]:
    """Where a phrase begins in a text, both as token numbers: every place, in order."""
    places = range(len(ids) - len(phrase) + 1)
    return [i for i in places if list(ids[i : i + len(phrase)]) == list(phrase)]


def phrase_weights(
    tokenizer: Callable, prompts: str | Sequence[str], weights: Mapping[str, float]
) -> Tensor:
    """Weights of tokens, to be given as ``token_weights``, from weights of phrases.

    Args:
        tokenizer: A tokenizer of transformers, or anything called like one.
        prompts: One prompt or B of them.
        weights: Factor of the rate of the regions that belong to each phrase, > 0. A phrase is
            found by its tokens, in whole words, wherever it occurs.

    Returns:
        (B, t) float32, 1 where no phrase is; t tokens with START, without padding.

    Raises:
        ValueError: A phrase occurs in no prompt, or beyond the longest text the tokenizer takes.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    longest = getattr(tokenizer, "model_max_length", None)
    texts = [tokenizer(prompt).input_ids[:longest] for prompt in prompts]
    table = torch.ones(len(texts), max(map(len, texts)))  # (B, t)
    for phrase, weight in weights.items():
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        spans = [(row, i) for row, text in enumerate(texts) for i in find_phrase(text, ids)]
        if not ids or not spans:
            raise ValueError(
                f"token_weights has the phrase {phrase!r}, which is not in {prompts}"
                + (f" (of which {longest} tokens are read)" if longest else "")
            )
        for row, i in spans:
            table[row, i : i + len(ids)] = weight
    return table


def fit_weights(table: Tensor, rows: int, tokens: int) -> Tensor:
    """The weights of B prompts for a batch of images, rows of one prompt side by side.

    Args:
        table: (t,) or (B, t).
        rows: b, a multiple of B.
        tokens: Tokens that the U-Net sees.

    Returns:
        (b, tokens), padded with 1.

    Raises:
        ValueError: b is not a multiple of B, or a weight other than 1 is beyond the tokens.
    """
    table = table.float() if table.dim() == 2 else table.float()[None]
    if rows % len(table):
        raise ValueError(f"token_weights has {len(table)} rows, for a batch of {rows} images")
    if not (table[:, tokens:] == 1).all():
        raise ValueError(f"token_weights must be for at most {tokens} tokens, got {table.shape[1]}")
    padded = table.new_ones(rows, tokens)
    kept = table[:, :tokens].repeat_interleave(rows // len(table), dim=0)
    padded[:, : kept.shape[1]] = kept
    return padded
