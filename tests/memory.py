"""How much memory a piece of code holds at a time."""

from collections.abc import Callable

import torch


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of CPU tensors allocated at a time while ``function`` runs, counted from its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    total = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak
