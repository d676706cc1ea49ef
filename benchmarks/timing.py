"""How long a call takes on a device, by CUDA graphs and events where that is a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_ms(
    run: Callable[[int], object], device: torch.device, repeats: int, calls: int = 1, pool: Any = None
) -> float:
    """The median milliseconds of a call run(number), of `repeats` times, after one that compiles.

    On a GPU calls 0 to calls - 1 are one CUDA graph, which allocates in `pool` (`torch.cuda.graph_pool_handle`), and is
    replayed once before; elsewhere each time is one call.
    """
    run(0)
    times = []
    if device.type != "cuda":
        for call in range(repeats):
            start = time.perf_counter()
            run(call)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        kept = [run(call) for call in range(calls)]
    graph.replay()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    del kept
    return statistics.median(times)
