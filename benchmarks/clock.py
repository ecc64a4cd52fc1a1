"""How long something takes: host clock on a CPU; events, CUDA graphs and cold inputs on a GPU."""

import statistics
import time

import torch


def seconds(run, device, count=1):
    """Seconds of each of `count` runs.

    On a GPU between events, all runs queued at once: the device never waits for the host, unless
    a run's own launches are slower than its work.
    """
    if device == "cpu":
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return taken
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def capture(run, warm_up=2):
    """A function that replays, as a CUDA graph, what `run()` launches, and its (static) result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):  # compiles, allocates, and fills caches, which a capture must not
            run()
    main = torch.cuda.current_stream()
    main.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves its own stream current
    return graph.replay, result


def copies(args, device, amount):
    """The arguments, and so many bytes of copies of them that no cache holds all.

    At least 4 sets and at most 1024: the inputs of the smallest operations, 1024 times, do not fill
    the cache of a large GPU either, and a longer graph would take longer to make than to time.
    """
    size = sum(x.numel() * x.element_size() for x in tensors(args))
    count = min(1024, max(4, -(-amount // size))) if device == "cuda" else 1
    return [args] + [clone(args) for _ in range(count - 1)], count * size


def tensors(value):
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def clone(value):
    """Nested tuples and lists with every tensor copied."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(clone, value)) if isinstance(value, (tuple, list)) else value


def percentiles(taken):
    """20th, 50th and 80th percentile."""
    if len(taken) == 1:
        return tuple(taken * 3)
    cuts = statistics.quantiles(taken, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
