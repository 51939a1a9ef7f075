"""How much memory a piece of code holds at a time."""

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of CPU tensors allocated at a time while ``function`` runs, counted from its start."""
    return max(accumulate(_allocations(function)), default=0)


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest CPU tensor allocated while ``function`` runs."""
    return max(_allocations(function), default=0)


def _allocations(function: Callable[[], object]) -> list[int]:
    """Bytes of what is allocated, and with a minus of what is freed, in the order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]
