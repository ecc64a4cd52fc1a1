"""Phrases in ComfyUI's prompts, where ComfyUI can be imported, whose tokenizers are the oracle."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
from conftest import assert_close

if importlib.util.find_spec("comfy") is None:
    pytest.skip("ComfyUI is not on the path", allow_module_level=True)

from comfy_hosts import guided, make, run  # noqa: E402

from scfg.adapters.comfyui.layouts import UNET  # noqa: E402
from scfg.adapters.comfyui.phrases import Copy, Prompt, parse_phrases, read_prompt  # noqa: E402
from scfg.recording.layouts import Words  # noqa: E402


def clip():
    """A CLIP that gives numbers to words, in chunks of 8."""

    def tokenize(prompt):
        ids = [1000 + sum(map(ord, word)) for word in prompt.split()]
        chunks = [ids[i : i + 6] for i in range(0, max(len(ids), 1), 6)]
        return {"l": [[(i, 1.0) for i in [1, *c, 2, *[2] * (6 - len(c))]] for c in chunks]}

    return SimpleNamespace(tokenize=tokenize)


def test_phrases_are_found_in_chunks_and_weighted():
    model = make()
    assert parse_phrases("blue square: 1.5\n\n a: b: 2 ") == {"blue square": 1.5, "a: b": 2.0}
    for bad in ("blue", "blue: -1", ": 2", "blue: x", "blue: inf"):
        with pytest.raises(ValueError, match="phrase: factor"):
            parse_phrases(bad)
    text = "a red circle and a green blue square"
    prompt = read_prompt(clip(), text, UNET, {"blue square": 1.5, "red": 2.0})
    assert {i: w for i, w in enumerate(prompt.weights(16).tolist()) if w != 1} == {
        2: 2.0, 9: 1.5, 10: 1.5,
    }  # fmt: skip
    assert prompt.words(16).tolist() == [-1, 0, 1, 2, 3, 4, 5, -1, -1, 6, 7, *[-1] * 5]
    with pytest.raises(ValueError, match="has 77 tokens; got one of 16"):
        prompt.weights(77)
    with pytest.raises(ValueError, match=r"has no \['square blue'\]"):
        read_prompt(clip(), text, UNET, {"square blue": 2.0})
    words = Prompt((Copy((1,) * 77, (0,) * 77, (1.5,) * 77, False),))
    plain, weighted = guided(model), guided(model, prompt=words)
    run(plain[0], steps=1), run(weighted[0], steps=1)
    rates = plain[1].history[0].rate, weighted[1].history[0].rate
    assert_close(actual=rates[1], expected=1.5 * rates[0], share=1e-6)


TOKENIZERS = [
    ("sd3_clip", "SD3Tokenizer", "l", "a (red circle:1.2) on weathered driftwood, photo"),
    ("sd3_clip", "SD3Tokenizer", "t5xxl", "a (red circle:1.2) on weathered driftwood, photo"),
    ("qwen_image", "QwenImageTokenizer", "qwen25_7b", "a red circle on weathered driftwood, photo"),
    ("z_image", "ZImageTokenizer", "qwen3_4b", "a red circle on weathered driftwood, photo"),
]


@pytest.mark.parametrize("module, kind, name, text", TOKENIZERS, ids=lambda x: x[:9])
def test_words_of_comfyuis_own_tokenizers(module, kind, name, text):
    try:
        module = importlib.import_module(f"comfy.text_encoders.{module}")
    except ImportError:
        pytest.skip("this ComfyUI has no such tokenizer")
    tokenizer = getattr(module, kind)()
    clip = SimpleNamespace(tokenize=tokenizer.tokenize_with_weights)
    (copy,) = read_prompt(clip, text, [Words(name)], {"red circle": 2.0}).copies
    held = getattr(tokenizer, "clip", {"l": "clip_l"}.get(name, name))
    inner = getattr(tokenizer, held).tokenizer
    read = [
        inner.decode([t for t, w in zip(copy.tokens, copy.words, strict=True) if w == word])
        for word in range(max(copy.words) + 1)
    ]
    words = ["a", "red", "circle", "on", "weathered", "driftwood,", "photo"]
    assert [word.replace(" ", "") for word in read] == words
    assert {w for w, f in zip(copy.words, copy.weights, strict=True) if f == 2.0} == {1, 2}
