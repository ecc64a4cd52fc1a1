"""Figures of an evaluation, each drawn from its tables, as SVG for light and dark pages, or PNG."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from scfg.evaluate.plan import HEADLINE
from scfg.models.files import write_whole

NAMES = {
    "cfg": "CFG",
    "scfg": "S-CFG",
    "scfg_official": "S-CFG, released code's powers",
    "scfg_none": "S-CFG, no self-attention",
    "scfg_image": "S-CFG, relative to the image",
    "samg": "SAMG",
    "interval": "CFG in an interval of steps",
    "mean": "S-CFG's mean rate everywhere",
    "shuffled": "S-CFG's rates, regions shuffled",
    "oracle": "S-CFG on true regions",
}
STYLES = {  # colour and marker: legible on white and on black, and without colour
    "cfg": ("#7d8590", "o"),
    "scfg": ("#e0650a", "s"),
    "scfg_official": ("#c79a00", "P"),
    "scfg_none": ("#2f8fd8", "v"),
    "scfg_image": ("#16a078", "^"),
    "samg": ("#c465a5", "D"),
    "interval": ("#8a63d2", "X"),
    "mean": ("#b0503c", "<"),
    "shuffled": ("#5b9a3c", ">"),
    "oracle": ("#d0393e", "*"),
}
SAME = {  # readings of "the same": label, colour, marker, and shift in a figure
    "scale": ("nominal scale", "#7d8590", "o", -0.22),
    "mean_scale": ("mean scale", "#2f8fd8", "v", 0.0),
    "strength": ("strength", "#e0650a", "s", 0.22),
}
CONTROLS = {"mean": "its mean rate", "shuffled": "its regions shuffled"}
MEASURES = {
    "objects": "objects found",
    "bound": "attributes bound",
    "count": "number right",
    "clean": "no other noun",
    "ground": "ground right",
    "all": "caption wholly right",
    "kid": "kernel distance",
}
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
    look = {"dpi": 150, "facecolor": "white", "format": "png", "metadata": {"Software": None}}
    with matplotlib.rc_context(LOOK):
        write_whole(path, lambda aside: draw().savefig(aside, **look))


def evidence(points: Sequence[dict], differences: Sequence[dict]) -> Figure:
    """The main figure: objects found by strength; differences by stratum, and by method."""
    figure = Figure((13, 4.7), layout="constrained")
    curves, strata, methods = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    _curves(curves, [r for r in points if r["begin"] is None], "strength", "objects")
    curves.set(xlabel="strength (norm-weighted mean scale)")
    curves.set_title("captioned objects found, %")
    rows = [r for r in differences if (r["scale"], r["begin"]) == (HEADLINE, None)]
    own = [r for r in rows if r["method"] == "scfg"]
    titles = [r["measure"] for r in own if r["measure"] != "kid" and r["against"] == "strength"]
    for against, look in SAME.items():
        found = {r["measure"]: r for r in own if r["against"] == against}
        _forest(strata, [found.get(title) for title in titles], look)
    strata.set_yticks(range(len(titles)), [MEASURES.get(title, title) for title in titles])
    strata.set_title(f"S-CFG at {HEADLINE:g} less CFG, points")
    strata.legend(title="of the same", fontsize=8, frameon=True, framealpha=0.7)
    lines = {
        NAMES[r["method"]]: r
        for r in rows
        if (r["against"], r["measure"]) == ("strength", "objects")
    }
    lines |= {
        f"S-CFG less {CONTROLS[r['against']]}": r
        for r in own
        if r["measure"] == "objects" and r["against"] in CONTROLS
    }
    label, colour, marker, _ = SAME["strength"]
    _forest(methods, list(lines.values()), (label, colour, marker, 0.0))
    methods.set_yticks(range(len(lines)), lines)
    methods.set_title(f"objects found at {HEADLINE:g} less CFG\nof the same strength, points")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def quality(points: Sequence[dict]) -> Figure:
    """Captions wholly right, and distance from real scenes, by strength; and one by the other."""
    figure = Figure((11, 4.1), layout="constrained")
    right, far, both = figure.subplots(1, 3)
    rows = [r for r in points if r["begin"] is None]
    _curves(right, rows, "strength", "all")
    right.set(xlabel="strength", title="captions wholly right, %")
    for axis, x in ((far, "strength"), (both, "objects")):
        _curves(axis, rows, x, "kid", factor=1)
        axis.set(title="kernel distance from real scenes", yscale="log")
    far.set(xlabel="strength")
    both.set(xlabel="share of objects found", xscale="linear")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def known(points: Sequence[dict]) -> Figure:
    """Pictures that begin as real scenes, whose true regions S-CFG may be given."""
    figure = Figure((11, 3.7), layout="constrained")
    rows = [r for r in points if r["begin"] is not None]
    panels = (("objects", "objects found, %"), ("small", "small ones"), ("all", "captions right"))
    for axis, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        _curves(axis, rows, "strength", name)
        axis.set(xlabel="strength", title=title)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def regions(rows: Sequence[dict]) -> Figure:
    """Overlap with the true regions, by noise level, and by number of powers and resolution."""
    figure = Figure((11, 3.6), layout="constrained")
    *panels, powers = figure.subplots(1, 4, sharey=True)
    levels = list(dict.fromkeys(r["level"] for r in rows))  # the last: all together
    ways = {"none": (0, "scfg_none"), "official": (2, "scfg_official"), "paper": (4, "scfg")}
    kinds = {"small": "small objects", "large": "large objects", "background": "background"}
    for axis, (kind, title) in zip(panels, kinds.items(), strict=True):
        for name, (count, style) in ways.items():
            line = [r for r in rows if (r["propagation"], r["powers"]) == (name, count)]
            line = [r for r in line if r["level"] == levels[-1] and r["timestep"] != "all"]
            _line(axis, line, "timestep", kind, style, name)
        axis.set(xlabel="timestep (noise grows)", title=title)
    panels[0].set(ylabel="intersection over union", ylim=(0, 1))
    panels[0].legend(title="propagation")
    for i, level in enumerate(levels):
        line = [r for r in rows if r["level"] == level and r["timestep"] == "all"]
        line = [r for r in line if r["propagation"] in ("none", "paper")]
        values = [[r[key] for r in line] for key in ("powers", "objects")]
        style = "-" if level == levels[-1] else ("--", ":")[i % 2]
        marker = "." if len(line) > 1 else f"${i}$"
        powers.plot(*values, style, color=STYLES["scfg"][0], marker=marker, label=level)
    powers.set(xlabel="powers of self-attention (0: none)", title="objects, all timesteps")
    powers.legend(title="maps")
    return figure


def rates(rows: Sequence[dict]) -> Figure:
    """How strongly guidance acts on true regions, and the rates S-CFG gives them."""
    figure = Figure((11, 3.6), layout="constrained")
    panels = {
        "norm": "norm of guidance / mean of the picture",
        "rate": "S-CFG's rate",
        "true_rate": "its rate on true regions",
    }
    looks = {"small": "scfg", "large": "scfg_none", "background": "cfg"}
    for axis, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for region, style in looks.items():
            line = [r for r in rows if r["region"] == region]
            _line(axis, line, "timestep", name, style, region)
        axis.set(xlabel="timestep (noise grows)", title=title, ylim=(0, None))
    axis.legend()
    return figure


def montage(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    """Pictures (k, 3, 64, 64) uint8 of the same captions, a titled row per way of drawing them."""
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


def _curves(axis, rows: Sequence[dict], x: str, y: str, factor: float = 100) -> None:
    """A line per method, its points by guidance scale."""
    for method in dict.fromkeys(r["method"] for r in rows):
        line = sorted((r for r in rows if r["method"] == method), key=lambda r: r["scale"])
        _line(axis, line, x, y, method, NAMES[method], factor)
    if x == "strength":
        ticks = sorted({r["scale"] for r in rows if r["method"] == "cfg"})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()


def _line(axis, rows: Sequence[dict], x: str, y: str, style: str, label: str, factor=1) -> None:
    colour, marker = STYLES[style]
    values = [[r[x] for r in rows], [factor * r[y] for r in rows]]
    errors = [[factor * abs(r[f"{y}_{end}"] - r[y]) for r in rows] for end in ("low", "high")]
    look = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
    axis.errorbar(*values, errors, **look, elinewidth=0.7, capsize=1.5, label=label)


def _forest(axis, rows: Sequence[dict | None], look: tuple[str, str, str, float]) -> None:
    """Differences in points with their intervals, from top to bottom."""
    label, colour, marker, shift = look
    there = [(i, r) for i, r in enumerate(rows) if r is not None]
    values = [100 * r["difference"] for _, r in there]
    errors = [
        [100 * abs(r[f"difference_{end}"] - r["difference"]) for _, r in there]
        for end in ("low", "high")
    ]
    style = {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": ""}
    axis.errorbar(values, [i + shift for i, _ in there], xerr=errors, **style, label=label)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
