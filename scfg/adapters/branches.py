"""One transformer of a pipeline, call by call: which branch it is, and what is made of its output.

The unconditional prediction u becomes ``u + (c - u) g (1 - rate) / (g - 1)``, from which the
pipeline's own formula makes ``u + g rate (c - u)``. Where the two branches are two calls, the text
comes first; it is kept until the second call, on the same latents, whose output is rewritten.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfg.patches import needs_uncond
from scfg.recording.layouts import call_arguments, find_layout
from scfg.recording.packing import repack, unpack
from scfg.recording.replayed import MissingLayers, TransformerRecorder
from scfg.recording.words import weigh_columns, words_table
from scfg.regions import Regions, find_regions


@dataclass(frozen=True)
class Calls:
    """How pipelines of one kind of transformer guide.

    Attributes:
        together: Both branches in one call, or text, then unconditional.
        text_first: The order in one call.
        told: Whether ``pipe.guidance_scale`` is the scale of the two branches.
        offset: What the scale lacks: 1 where the pipeline computes ``c + s (c - u)``.
    """

    together: bool = True
    text_first: bool = False
    told: bool = True
    offset: float = 0.0


CALLS = {
    "SD3Transformer2DModel": Calls(),
    "QwenImageTransformer2DModel": Calls(together=False, told=False),
    "FluxTransformer2DModel": Calls(together=False, told=False),
    "ChromaTransformer2DModel": Calls(together=False),
    "PixArtTransformer2DModel": Calls(told=False),
    "SanaTransformer2DModel": Calls(),
    "HunyuanDiT2DModel": Calls(),
    "Lumina2Transformer2DModel": Calls(together=False),
    "ZImageTransformer2DModel": Calls(text_first=True, offset=1.0),
    "CogView4Transformer2DModel": Calls(together=False),
    "AuraFlowTransformer2DModel": Calls(),
    "WanTransformer3DModel": Calls(together=False),
    "LTXVideoTransformer3DModel": Calls(),
}


def calls_of(model: nn.Module) -> Calls:
    """How pipelines call a transformer.

    Raises:
        ValueError: Its class is unknown.
    """
    for kind in type(getattr(model, "_orig_mod", model)).__mro__:
        if kind.__name__ in CALLS and find_layout(model) is not None:
            return CALLS[kind.__name__]
    raise ValueError(
        f"{type(getattr(model, '_orig_mod', model)).__name__} is not known: it needs a row in "
        "scfg.recording.layouts, and one in scfg.adapters.pipelines.CALLS"
    )


class Branches:
    """What is known of a step, between the calls of a transformer.

    Args:
        attached: `scfg.adapters.pipelines.AttachedTransformers`.
        model: The transformer.
    """

    def __init__(self, attached, model: nn.Module):
        self.attached, self.model = attached, model
        self.calls, self.layout = calls_of(model), find_layout(model)
        run = attached.run
        self.recorder = TransformerRecorder(model, run.config, run.backend)
        self.checked: int | None = None  # rows of a batch that is two branches
        self.forget()

    def forget(self) -> None:
        """Nothing is known of a step."""
        self.recorder.abort()
        self.role: str | None = None  # of the call at hand: both, text, uncond; None: not ours
        self.acts = self.records = False
        self.sample = self.text = self.evidence = self.grid = None

    def before(self, args: tuple, kwargs: dict) -> None:
        """Find out which branch a call is, and start recording."""
        attached, call = self.attached, call_arguments(self.model, args, kwargs)
        self.role = None
        if call.get("skip_layers"):  # skip-layer guidance: a third branch
            return
        sample = call["x"] if self.layout.listed else call["hidden_states"]
        if not self.calls.together and self.sample is sample:
            self.role, attached.unguided = "uncond", 0
            if self.records and needs_uncond(attached.run.config):
                self.recorder.start(args, kwargs, torch.tensor([-1]))
            return
        self.forget()
        scale = attached.scale(self.model)
        step, steps = attached.next_step()
        if scale <= 1:
            attached.warn_unguided("guidance_scale is 1 at most")
            return
        if self.calls.together and len(sample) != self.checked and not _in_halves(sample):
            if self.layout.listed:
                return  # steps that the pipeline does not guide
            raise RuntimeError(
                f"{type(attached.pipe).__name__} must call its transformer with the same latents "
                f"for two branches, got another batch of {len(sample)} rows"
            )
        self.checked = len(sample)  # once, for it waits for the device
        self.role, self.sample = ("both" if self.calls.together else "text"), sample
        attached.unguided += not self.calls.together
        self.acts = attached.run.acts_at(step, steps)
        self.records = self.acts and attached.run.records_at(step, steps)
        if self.acts:
            self.grid = self.layout.grid(self.recorder.model_itself, call)
        if self.records:
            self._start(args, kwargs, call, len(sample))

    def _start(self, args: tuple, kwargs: dict, call: dict, rows: int) -> None:
        """Record the text's rows, the others only where they are needed."""
        text = slice(None)
        b = rows // 2 if self.role == "both" else rows
        if self.role == "both":
            text = slice(0, b) if self.calls.text_first else slice(b, rows)
        words = self._words(call, b, text)
        if self.role == "both" and needs_uncond(self.attached.run.config):
            text = slice(None)
            if words is not None:
                none = torch.full_like(words, -1)
                words = torch.cat([words, none] if self.calls.text_first else [none, words])
        self.recorder.start(args, kwargs, words, text)

    def _words(self, call: dict, b: int, rows: slice) -> Tensor | None:
        """(b, t) word of each column of the text, and weights of phrases; None if not known."""
        attached, prompts = self.attached, self.attached.prompts
        if prompts is None or b % len(prompts):
            return None
        if self.layout.listed:
            ends = [len(text) for text in call["cap_feats"][rows]]
            t = max(ends)
        else:
            t = sum(call[name].shape[1] for name in self.layout.texts)
            mask = call.get(self.layout.mask) if self.layout.mask else None
            ends = None if mask is None else (mask[rows] > 0).sum(dim=-1).flatten().tolist()
        each = b // len(prompts)
        table = words_table([prompt for prompt in prompts for _ in range(each)], t, ends)
        if attached.phrases:
            lead = self.layout.lead(self.grid)
            attached.token_weights = weigh_columns(prompts, table[::each], attached.phrases, lead)
        return table

    def after(self, output):
        """Rewrite what the transformer returned."""
        if self.role is None or not self.acts:
            return output
        prediction = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        rewritten = self._rewrite(prediction)
        if isinstance(output, tuple):
            return (rewritten, *output[1:])
        if isinstance(output, (Tensor, list)):
            return rewritten
        return dataclasses.replace(output, sample=rewritten)

    def _rewrite(self, prediction):
        """The prediction with another unconditional part."""
        if self.role == "both":
            return self._rewrite_both(prediction)
        if self.role == "text":
            self.text = prediction
            self.evidence = self._finish() if self.records else None
            return prediction
        if self.evidence is not None:
            other = self._finish() if needs_uncond(self.attached.run.config) else None
            self._keep(text=self.evidence, uncond=other)
        new = self._guide(prediction, self.text)
        self.sample = self.text = self.evidence = None
        return prediction if self.attached.observe else new

    def _rewrite_both(self, prediction):
        """`_rewrite` of two branches in one call."""
        b, first = len(prediction) // 2, self.calls.text_first
        text, uncond = _halves(prediction, b, first)
        evidence = self._finish() if self.records else None
        if evidence is not None and needs_uncond(self.attached.run.config):
            rows = evidence.rows(0, b), evidence.rows(b, 2 * b)
            self._keep(text=rows[not first], uncond=rows[first])
        elif evidence is not None:
            self._keep(text=evidence, uncond=None)
        new = self._guide(uncond, text)
        if self.attached.observe:
            return prediction
        parts = (text, new) if first else (new, text)
        return [*parts[0], *parts[1]] if isinstance(prediction, list) else torch.cat(parts)

    def _finish(self):
        """Evidence; None where layers were skipped and earlier regions still stand."""
        run = self.attached.run
        try:
            return self.recorder.finish()
        except MissingLayers:
            if run.regions is None:
                raise
            self._stay(run.regions)
            return None

    def _stay(self, regions: Regions) -> None:
        note = "; a cache skipped layers, regions are those of an earlier step"
        if not regions.rule.endswith(note):
            self.attached.run.keep(dataclasses.replace(regions, rule=regions.rule + note))

    def _keep(self, text, uncond) -> None:
        run = self.attached.run
        regions = find_regions(uncond=uncond, text=text, config=run.config, backend=run.backend)
        run.keep(regions)

    def _guide(self, uncond, text):
        """The unconditional prediction that makes the pipeline's formula S-CFG."""
        attached, grid = self.attached, self.grid
        scale = attached.scale(self.model)
        u, c = (unpack(x, self.layout, grid) for x in (uncond, text))
        rate = attached.run.guide(u, c, scale, attached.token_weights).rate
        wide = u.to(rate.dtype)
        new = wide + (c.to(rate.dtype) - wide) * (scale * (1 - rate) / (scale - 1))
        return repack(new.to(u.dtype), uncond, self.layout, grid)


def _in_halves(sample: Tensor | list[Tensor]) -> bool:
    """Whether a batch is the same latents twice."""
    half = len(sample) // 2
    if len(sample) % 2:
        return False
    return all(sample[i].equal(sample[half + i]) for i in range(half))


def _halves(prediction, b: int, text_first: bool) -> tuple:
    """(text, unconditional) of a batch of both."""
    halves = prediction[:b], prediction[b:]
    return halves if text_first else halves[::-1]
