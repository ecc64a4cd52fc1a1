"""How exact must S be? Labels and rates with S in float16 or products in tf32, against float64.

    python -m benchmarks.precision [--out benchmarks/results/precision.json]

Maps are those of the embedded model while it draws, and of random queries and keys at the shapes of
SD 1.5 and SDXL (which attend more evenly than trained ones: more patches are near ties). A row is
what becomes of the labels and rates of all images if only that is rounded.
"""

import argparse

import torch

import scfg
from benchmarks import cases, records
from benchmarks.machine import machine
from scfg import reference
from scfg.evidence import level_weights
from scfg.models.embedded import load_model

SCALE = 7.5
PROMPTS = (
    "a blue owl and a small car on a gray background",
    "a red apple and a cat on a green background",
    "a dog on a yellow background",
    "a guitar and a pizza on a striped blue background",
)


def tf32(x):
    """Rounded to 10 bits of mantissa, as a tensor core reads float32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def half(x):
    """Rounded to float16, in float32."""
    return x.half().float()


def same(x):
    """Float32 as it is."""
    return x.float()


# How S and the columns are rounded before each product, which is added up in float32.
WAYS = {
    "float32": (same, same),
    "S float16": (half, same),
    "products tf32": (tf32, tf32),
    "S float16, products tf32": (lambda x: tf32(half(x)), tf32),
}


def complete(self_map, cross_map, weights, way, steps=4):
    """`scfg.reference.complete` of one layer with rounded products; way None: in float64."""
    columns = cross_map.double() if way is None else cross_map.float()
    if way is None:
        return reference.complete(self_map.double(), columns, weights, None, "paper", steps)
    round_map, round_columns = WAYS[way]
    self_map, total = round_map(self_map), 0
    for _ in range(steps):
        columns = self_map @ round_columns(columns)
        total = total + columns / steps
    return reference.complete(None, total, weights, None, "none")


def guide(eps_uncond, eps_text, layers, config, way):
    """Labels and rate from the maps of (reduction, self map, cross map) of 2b rows each."""
    size, b = tuple(eps_text.shape[-2:]), len(eps_text)
    weights, levels = level_weights(size, config), {}
    for reduction, self_map, cross_map in layers:
        evidence = complete(self_map, cross_map, weights[reduction], way)
        levels[reduction] = levels.get(reduction, 0) + evidence
    order = sorted(levels)
    tokens, start = ([levels[r][rows] for r in order] for rows in (slice(b, None), slice(b)))
    h, w = (-(-s // config.map_reduction) for s in size)
    factors = [r // config.map_reduction for r in order]
    wide = torch.float64 if way is None else torch.float32
    eps = eps_uncond.to(wide), eps_text.to(wide)
    out = reference.guide_evidence(*eps, tokens, start, h, w, factors, SCALE, config.map_reduction)
    return out[2], out[1]


def drawn():
    """Predictions and maps of the embedded model, of its first noise at step 500."""
    model = load_model()
    conditions = [model.encode(list(x)) for x in ([""] * len(PROMPTS), PROMPTS)]
    generator = torch.Generator().manual_seed(0)
    x, config = torch.randn(len(PROMPTS), *model.latent_shape, generator=generator), model.config
    with scfg.UNetWrapper(model.unet, config, keep_maps=True) as unet:
        eps = unet(torch.cat([x, x]), torch.full((2 * len(x),), 500), torch.cat(conditions))
        layers = [(y.reduction, y.self_map, y.cross_map) for y in unet.attention]
    return *eps.chunk(2), layers, config


def random(name, layers, images):
    """Predictions and maps of random queries and keys at a published shape, some layers a level."""
    shape = cases.SIZES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    maps = []
    for reduction, count, heads, width in shape.levels:
        h, w = shape.grid(reduction)
        for _ in range(min(count, layers)):
            q, k, q_text = (1.5 * normal(2 * images, h * w, heads * width) for _ in range(3))
            text = normal(2 * images, shape.tokens, heads * width)
            both = reference.attention_maps(q, k, q_text, text, heads)
            maps.append((reduction, *both))
    eps = (normal(images, *shape.latent) for _ in range(2))
    config = scfg.SCFGConfig(map_reduction=4, coarsest_reduction=shape.levels[-1][0])
    return *eps, maps, config


@torch.no_grad()
def measure():
    """One row for each source of maps and way of rounding."""
    sources = {
        "embedded": drawn,
        "sd15-512 random": lambda: random("sd15-512", 5, 2),
        "sdxl-1024 random": lambda: random("sdxl-1024", 4, 1),
    }
    rows = []
    for name, make in sources.items():
        eps_uncond, eps_text, layers, config = make()
        labels, rate = guide(eps_uncond, eps_text, layers, config, None)
        for way in WAYS:
            own_labels, own_rate = guide(eps_uncond, eps_text, layers, config, way)
            row = {"kind": "precision", "maps": name, "way": way, "patches": labels.numel()}
            row["labels_changed"] = int((own_labels != labels).sum())
            row["rate_error"] = float(f"{(own_rate - rate).abs().max():.2g}")
            rows.append(row)
    return rows


def main():
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="append rows to this JSON file, e.g. in benchmarks/results")
    options = parser.parse_args()
    rows, about = measure(), machine()
    for row in rows:
        print(
            f"{row['maps']:18} {row['way']:26} {row['labels_changed']:4} of {row['patches']:5} "
            f"labels, rate off by at most {row['rate_error']:.2g}"
        )
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.out:
        records.append(options.out, rows, about)


if __name__ == "__main__":
    main()
