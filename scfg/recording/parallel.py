"""The two branches on two processes, what hosts call CFG parallelism: each records its own.

    with Recorder(model, config) as network:
        eps = network(x, t, context)  # of this rank's branch
        out = guide_across(network, eps, guidance_scale, branch="text")

Evidence and predictions are exchanged, a few hundred kB, and every rank makes the same guided
prediction from them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from scfg.evidence import Evidence
from scfg.guidance import Guided, guide_regions
from scfg.patches import Patches, needs_uncond
from scfg.recording.packing import repack, unpack
from scfg.recording.wrapper import Recorder
from scfg.regions import find_regions

BRANCHES = ("uncond", "text")


def exchange(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """A tensor of each rank of a group, on every rank; their sizes may differ, their type not.

    Args:
        x: This rank's, on the device the group's backend takes.
        group: None: all ranks.

    Returns:
        One tensor a rank.
    """
    dims = torch.tensor([x.dim(), *x.shape], dtype=torch.int64, device=x.device)
    dims = torch.nn.functional.pad(dims, (0, 8 - len(dims)))
    shapes = [torch.empty_like(dims) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, dims, group=group)
    sizes = [tuple(shape[1 : 1 + shape[0]].tolist()) for shape in shapes]
    largest = max(torch.Size(size).numel() for size in sizes)
    flat = torch.nn.functional.pad(x.flatten(), (0, largest - x.numel()))
    parts = [torch.empty_like(flat) for _ in sizes]
    dist.all_gather(parts, flat.contiguous(), group=group)
    return [
        part[: torch.Size(size).numel()].view(size) for part, size in zip(parts, sizes, strict=True)
    ]


def exchange_evidence(
    evidence: Evidence, branch: str, group: dist.ProcessGroup | None = None
) -> dict[str, Evidence]:
    """Evidence of both branches, by name, from that of each rank's.

    Args:
        evidence: This rank's.
        branch: ``"uncond"`` or ``"text"``, what it is of.
        group: Two ranks.

    Raises:
        RuntimeError: The group is not two ranks with a branch each, recorded at the same levels.
    """
    levels, count = evidence.reductions, evidence.levels
    layers = [x for r in levels for x in count[r]]
    head = [BRANCHES.index(branch), *evidence.size, evidence.patches is not None]
    head += [number for r in levels for number in (r, len(count[r]))]
    heads = exchange(torch.tensor(head, device=layers[0].device), group)
    if len(heads) != 2 or sorted(int(other[0]) for other in heads) != [0, 1]:
        raise RuntimeError(
            "the group must be two ranks, one 'uncond' and one 'text'; context or tensor "
            f"parallelism is not supported. Got branches {[int(other[0]) for other in heads]}"
        )
    if not heads[0][1:].equal(heads[1][1:]):
        raise RuntimeError(
            "both branches must be recorded at the same levels, got "
            f"{[other[1:].tolist() for other in heads]} (size, then level and layers)"
        )
    gathered = [exchange(layer, group) for layer in layers]
    patches = [None, None]
    if evidence.patches is not None:
        patches = _exchange_patches(evidence.patches, layers[0].device, group)
    names = [BRANCHES[int(other[0])] for other in heads]
    found = {}
    for rank, name in enumerate(names):
        own = iter([layer[rank] for layer in gathered])
        found[name] = Evidence(
            evidence.size, {r: [next(own) for _ in count[r]] for r in levels}, patches[rank]
        )
    return found


def _exchange_patches(patches: Patches, device: torch.device, group) -> list[Patches]:
    """`Patches` of each rank."""
    tensors = [
        exchange(x.to(device, torch.int64), group)
        for x in (
            torch.tensor([*patches.grid, patches.start, patches.text]),
            patches.columns,
            patches.owning,
        )
    ]
    found = []
    for numbers, columns, owning in zip(*tensors, strict=True):
        f, h, w, start, text = numbers.tolist()
        found.append(Patches((f, h, w), columns.cpu(), owning.bool().cpu(), bool(start), text))
    return found


def guide_across(
    network: Recorder,
    eps: Tensor,
    guidance_scale: float | Tensor,
    branch: str,
    group: dist.ProcessGroup | None = None,
    token_weights: Tensor | None = None,
) -> Guided:
    """S-CFG of two predictions of which this rank has one.

    Args:
        network: What this rank's last call was recorded by: b rows of one branch.
        eps: Its prediction, b rows.
        guidance_scale: Float or (b,) tensor, > 0, the same on both ranks.
        branch: ``"uncond"`` or ``"text"``.
        group: Two ranks; None: all.
        token_weights: See `guide_regions`.

    Returns:
        Guided, the same bits on both ranks.

    Raises:
        ValueError: An unknown branch.
        RuntimeError: Nothing is recorded, or see `exchange_evidence`.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {BRANCHES}, got {branch!r}")
    both = exchange_evidence(network.evidence, branch, group)
    heads = exchange(torch.tensor([BRANCHES.index(branch)], device=eps.device), group)
    like, parts = eps, dict(zip([int(x) for x in heads], exchange(eps, group), strict=True))
    eps_uncond, eps_text = parts[0], parts[1]
    layout, grid = network.layout, network.grid
    if layout is not None:
        eps_uncond, eps_text = (unpack(x, layout, grid) for x in (eps_uncond, eps_text))
    uncond = both["uncond"] if layout is None or needs_uncond(network.config) else None
    regions = find_regions(
        uncond=uncond, text=both["text"], config=network.config, backend=network.backend
    )
    guided = guide_regions(
        eps_uncond,
        eps_text,
        regions,
        guidance_scale,
        network.config,
        network.backend,
        token_weights,
    )
    if layout is None:
        return guided
    return Guided(**{**vars(guided), "eps": repack(guided.eps, like, layout, grid)})
