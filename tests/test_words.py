"""What is made of words: columns of one word are a group, and groups own patches."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from transformer_hosts import randn

import scfg
from scfg import patches
from scfg.recording.layouts import Layout, Words
from scfg.recording.words import group_words, read_prompt, split_words, word_numbers, words_table


def test_copies_and_pieces_of_a_word_are_one_group_and_nothing_else_owns_a_patch():
    layout = Layout(("attn",), None, start=(0,), registers=2)
    words = torch.tensor([[-1, 0, 1, 1, -1, 0, 1, -1]])
    groups, found = group_words(words, 2, 11, layout, 2, (1, 2, 3))
    assert groups.tolist() == [[0, 0, 0, 2, 3, 3, 1, 2, 3, 1, 1]] * 2
    assert found.columns[0, 2:].tolist() == [3, 4]
    assert found.owning.tolist() == [[False, False, True, True]] * 2 and found.start
    with pytest.raises(ValueError, match=r"words must be .* got \(3, 2\)"):
        group_words(torch.zeros(3, 2), 2, 11, layout, 2, (1, 2, 3))
    summed = scfg.reference.group_columns(torch.ones(2, 6, 11), groups, 4)
    assert summed[0, 0].tolist() == [3, 3, 2, 3]


def regions_of(columns, **config):
    """Labels and benchmark region of hand-made evidence of words, (b, 16, words)."""
    b, n, t = columns.shape
    groups, found = group_words(None, b, t, Layout(("a",), None), 0, (1, 4, 4))
    grouped = scfg.reference.group_columns(columns, groups, found.owning.shape[1])
    rest = grouped[..., 1:].sum(-1, keepdim=True)
    config = scfg.SCFGConfig(**config)
    return patches.own_patches(torch.cat([grouped, rest], -1), found, None, config, "torch")[:2]


def test_small_regions_go_to_what_comes_next():
    columns = torch.zeros(1, 16, 3)
    columns[..., 0] = 1.0
    columns[:, 8:, 1] = 2.0
    columns[:, 15, 2] = 9.0  # one corner
    labels, _ = regions_of(columns, min_share=0.0)
    assert labels.unique().tolist() == [0, 1, 2]
    labels, _ = regions_of(columns, min_share=0.2)
    assert labels.flatten().tolist() == [0] * 8 + [1] * 8


def test_an_image_that_says_nothing_is_left_to_plain_guidance():
    columns = torch.ones(2, 16, 2)
    columns[1, :8, 0] += 4.0
    labels, benchmark = regions_of(columns)
    assert not benchmark[0].any() and benchmark[1].all()
    eps = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=5)
    flat = torch.zeros(2, dtype=torch.bool)
    regions = scfg.guidance.Regions(labels, benchmark, 2, flat, "foreground", "image")
    out = scfg.guidance.guide_regions(*eps, regions, 20.0, scfg.SCFGConfig())
    assert_close(actual=out.rate[0], expected=torch.ones(1, 8, 8), share=1e-6)
    assert (out.rate[1] < 0.99).all()  # capped at 15 / 20
    assert regions_of(columns, min_peak=0.0)[1].all()


class Fast:
    """A tokenizer that tells where its pieces are: two characters each, spaces before them."""

    is_fast = True

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        spans = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
        return {"input_ids": spans, "offset_mapping": spans if return_offsets_mapping else None}


def test_words_of_tokens():
    assert split_words("A red circle, (big)") == ["a", "red", "circle", "big"]
    # "ab", " c", "de", " f" of "ab cde f"
    assert word_numbers(Fast(), "ab cde f") == [0, 1, 1, 2]
    places = [Words("a", 1, 3), Words("b", None)]
    prompt = read_prompt(["ab cde f", "ab cde f"], places, [Fast(), Fast()])
    table = words_table([prompt], 12, [10])
    assert table.tolist() == [[-1, 0, 1, 1, -1, -1, 0, 1, 1, 2, -1, -1]]


def pieces(text):
    """Where three letters at most of a word begin and end."""
    words = re.finditer(r"\S+", text)
    return [(i, min(i + 3, w.end())) for w in words for i in range(w.start(), w.end(), 3)]


class Slow:
    merged = 0

    def __call__(self, text, add_special_tokens):
        count = len(pieces(text)) - (self.merged if " " in text else 0)
        return SimpleNamespace(input_ids=[0] * count)


def test_pieces_of_words_are_counted_where_no_token_is_of_two_words():
    slow = Slow()
    assert word_numbers(slow, "a spotted dog") == [0, 1, 1, 1, 2]
    slow.merged = 1  # one token is of two words
    assert word_numbers(slow, "a spotted dog") == [0, 1, 2, 3]
