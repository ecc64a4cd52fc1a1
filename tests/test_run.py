"""A run alone: where S-CFG acts, when regions are found, and weights of phrases."""

import math

import pytest
import torch

import scfg
from scfg.recording.phrases import find_phrase, weigh_phrases
from scfg.recording.run import Run
from scfg.regions import Regions


def test_eight_steps_twice_are_the_table_of_the_module():
    run = Run(scfg.SCFGConfig(), start=0.25, stop=0.75, every=2)
    for _ in range(2):  # a second run must not use the first one's regions
        run.begin()
        assert run.regions is None
        used = []
        for step in range(8):
            if not run.acts_at(step, 8):
                used.append(None)
                continue
            if run.records_at(step, 8):
                run.keep(Regions(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), step, torch.zeros(1)))
            used.append(run.regions.tokens)
        assert used == [None, None, 2, 2, 4, 4, None, None]
    assert not run.always and Run(scfg.SCFGConfig()).always


@pytest.mark.parametrize(
    ("level", "step"), [(9.0, 0), (7.0, 0), (5.0, 1), (4.999999, 1), (3.0, 1), (1.0, 2), (0.5, 2)]
)
def test_a_level_belongs_to_the_step_that_begins_at_it_or_above(level, step):
    assert Run.place(level, [7.0, 5.0, 1.0]) == (step, 3)


def test_a_window_without_a_step_is_an_error():
    run = Run(scfg.SCFGConfig(), start=0.3, stop=0.4)
    assert run.acts_at(3, 10) and not run.acts_at(4, 10)
    with pytest.raises(ValueError, match="must have a step of 2 between them, got 0.3 and 0.4"):
        run.acts_at(0, 2)


def test_phrases_are_weighed_in_every_text_and_padded_to_the_longest():
    texts, phrases = [[0, 5, 6, 9], [0, 6, 5, 6, 7, 9]], {"red owl": [5, 6], "owl": [6]}
    table = weigh_phrases(texts, phrases, {"red owl": 2.0, "owl": 0.5})
    assert table.tolist() == [[1, 2, 0.5, 1, 1, 1], [1, 0.5, 2, 0.5, 1, 1]]
    assert find_phrase([1, 1, 1], [1, 1]) == [0, 1] and find_phrase([1], [1, 1]) == []


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_out_of_range_or_a_phrase_that_is_nowhere_is_an_error(weight):
    with pytest.raises(ValueError, match=r"token_weights\['owl'\] must be finite and > 0"):
        weigh_phrases([[0, 6]], {"owl": [6]}, {"owl": weight})
    with pytest.raises(ValueError, match="the phrase 'fox', which is not in the prompt"):
        weigh_phrases([[0, 6]], {"fox": [8]}, {"fox": 2.0})
