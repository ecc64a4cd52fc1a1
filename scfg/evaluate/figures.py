"""Figures of an evaluation, each drawn from its tables, as SVG for light and dark pages, or PNG."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from scfg.models.shapes import COLOURS

NAMES = {
    "cfg": "CFG",
    "scfg": "S-CFG",
    "scfg_none": "S-CFG, no self-attention",
    "scfg_image": "S-CFG, image mean",
    "scfg_official": "S-CFG, released code's powers",
    "samg": "SAMG",
}
STYLES = {  # colour and marker: legible on white and on black, and without colour
    "cfg": ("#7d8590", "o"),
    "scfg": ("#e0650a", "s"),
    "scfg_none": ("#2f8fd8", "v"),
    "scfg_image": ("#16a078", "^"),
    "scfg_official": ("#c79a00", "P"),
    "samg": ("#c465a5", "D"),
}
SAMPLERS = {"dpmpp_2m": "DPM-Solver++(2M)", "ddim": "DDIM"}
INK = "#010203"  # stands for the colour of the page's text
LOOK = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9.5,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "scfg",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def svg(draw: Callable[[], Figure]) -> str:
    """A figure as SVG without background, its ink the `currentColor` of the page."""
    file = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw().savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)


def png(draw: Callable[[], Figure], path: Path) -> None:
    """A figure as PNG on white."""
    with matplotlib.rc_context(LOOK):
        draw().savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def tradeoff(rows: Sequence[dict], quality: str = "kid") -> Figure:
    """Quality against alignment, and both against mean scale; a line of panels per sampler."""
    samplers = list(dict.fromkeys((row["sampler"], row["steps"]) for row in rows))
    figure = Figure((11, 3.7 * len(samplers)), layout="constrained")
    axes = figure.subplots(len(samplers), 3, squeeze=False)
    title = {"kid": "KID to real scenes", "frechet": "Fréchet distance"}[quality]
    for (sampler, steps), (both, aligned, good) in zip(samplers, axes, strict=True):
        for method in NAMES:
            line = [r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)]
            line = [r for r in line if r["method"] == method and r[quality] is not None]
            line.sort(key=lambda r: r["guidance_scale"])
            if not line:
                continue
            panels = (
                (both, "alignment", quality),
                (aligned, "mean_scale", "alignment"),
                (good, "mean_scale", quality),
            )
            for axis, x, y in panels:
                _line(axis, line, x, y, method)
            if method in ("cfg", "scfg"):
                for r in line:
                    at = (r["alignment"], r[quality])
                    text = f"{r['guidance_scale']:g}"
                    look = {"fontsize": 7.5, "color": STYLES[method][0]}
                    both.annotate(text, at, (4, 4), textcoords="offset points", **look)
        both.set(xlabel="caption attributes carried", ylabel=f"{title} (lower is better)")
        aligned.set(xlabel="mean scale", ylabel="caption attributes carried", xscale="log")
        good.set(xlabel="mean scale", ylabel=f"{title}", xscale="log")
        both.set_title(f"{SAMPLERS.get(sampler, sampler)}, {steps} steps", loc="left")
        for axis in (aligned, good):
            scales = sorted({r["guidance_scale"] for r in rows if r["method"] == "cfg"})
            axis.set_xticks(scales, [f"{s:g}" for s in scales])
            axis.minorticks_off()
        for axis in (both, good):
            axis.set_yscale("log" if all(r[quality] > 0 for r in rows) else "linear")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _line(axis, rows: Sequence[dict], x: str, y: str, method: str) -> None:
    colour, marker = STYLES[method]
    errors = {
        side: [row[f"{name}_interval"] for row in rows]
        for side, name in (("xerr", x), ("yerr", y))
        if f"{name}_interval" in rows[0]
    }
    values = [[row[name] for row in rows] for name in (x, y)]
    style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
    axis.errorbar(*values, **errors, **style, elinewidth=0.7, capsize=1.5, label=NAMES[method])


def regions(rows: Sequence[dict]) -> Figure:
    """Overlap with the true regions, by noise level, and by number of powers and resolution."""
    figure = Figure((11, 3.6), layout="constrained")
    *panels, powers = figure.subplots(1, 4, sharey=True)
    ways = {
        "none": (0, "#2f8fd8", "v"),
        "official": (2, "#c79a00", "P"),
        "paper": (4, "#e0650a", "s"),
    }
    for axis, kind in zip(panels, ("objects", "background", "foreground"), strict=True):
        for name, (count, colour, marker) in ways.items():
            line = [r for r in rows if (r["propagation"], r["powers"]) == (name, count)]
            line = [r for r in line if r["level"] == "both" and r["timestep"] != "all"]
            values = [[r[key] for r in line] for key in ("timestep", kind)]
            errors = [r[f"{kind}_interval"] for r in line]
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            axis.errorbar(*values, errors, **style, elinewidth=0.7, capsize=1.5, label=name)
        axis.set(xlabel="timestep (noise grows)", title=kind)
    panels[0].set(ylabel="intersection over union", ylim=(0, 1))
    panels[0].legend(title="propagation")
    for level, style in (("16 x 16", "--"), ("8 x 8", ":"), ("both", "-")):
        line = [r for r in rows if r["level"] == level and r["timestep"] == "all"]
        line = [r for r in line if r["propagation"] in ("none", "paper")]
        values = [[r[key] for r in line] for key in ("powers", "objects")]
        powers.plot(*values, style, color="#e0650a", marker=".", label=level)
    powers.set(xlabel="powers of self-attention (0: none)", title="objects, all timesteps")
    powers.legend(title="maps")
    return figure


def inconsistency(rows: Sequence[dict]) -> Figure:
    """Spread of guidance over regions: true ones of real scenes, and found ones while sampling."""
    figure = Figure((11, 3.7), layout="constrained")
    real, sampled = figure.subplots(1, 2)
    for method in NAMES:
        line = [r for r in rows if r["regions"] == "true" and r["method"] == method]
        if line:
            _line(real, line, "timestep", "after", method)
        line = [r for r in rows if r["regions"] == "found" and r["method"] == method]
        if line:
            scale = min((r["guidance_scale"] for r in line), key=lambda s: abs(s - 2.5))
            line = [r for r in line if r["guidance_scale"] == scale]
            line = [r for r in line if r["sampler"] == line[0]["sampler"]]
            _line(sampled, line, "timestep", "after", method)
            if method == "scfg":
                before = [r | {"after": r["before"]} for r in line]
                before = [r | {"after_interval": r["before_interval"]} for r in before]
                _line(sampled, before, "timestep", "after", "cfg")
    real.set(title="true regions of noised real scenes")
    sampled.set(title="token regions while S-CFG draws (CFG: the same steps without rate)")
    for axis in (real, sampled):
        axis.set(xlabel="timestep", ylabel="spread of guidance over regions")
        axis.invert_xaxis()
        axis.set_ylim(bottom=0)
    handles, labels = real.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def segmentation(examples: Sequence[dict]) -> Figure:
    """Regions found in noised real scenes, each in the colour that its phrase names.

    Args:
        examples: Per column "title" (str), "image" (3, 64, 64) in [-1, 1], "colours" (three names),
            and, by row title, "found": (16, 16) int64 regions, -1 for none.
    """
    titles = ["noised image", *examples[0]["found"]]
    figure = Figure((1.35 * len(examples) + 0.9, 1.35 * len(titles) + 0.4), layout="constrained")
    axes = figure.subplots(len(titles), len(examples), squeeze=False)
    for column, example in zip(axes.T, examples, strict=True):
        pictures = [_pixels(example["image"])]
        pictures += [_paint(found, example["colours"]) for found in example["found"].values()]
        column[0].set_title(example["title"], fontsize=8)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(title, fontsize=8.5)
    return figure


def montage(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """Pictures (k, 3, 64, 64) uint8 of the same prompts, a titled row per way of drawing them."""
    count = len(rows[0][1])
    figure = Figure((count + 1.6, len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def _pixels(image: Tensor) -> np.ndarray:
    return ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()


def _paint(found: Tensor, colours: Sequence[str]) -> np.ndarray:
    palette = np.array([*(COLOURS[colour] for colour in colours), (0.75, 0.75, 0.75)])
    return palette[found.cpu().numpy()]  # -1 is the last: grey
