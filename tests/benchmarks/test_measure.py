"""What benchmarks measure with tells the truth about work whose cost is known."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import measure
import pytest
import torch

# Bytes of a copy, and how many copies the other clock times at once: on a CPU one so short that a busy machine lets
# some pass undisturbed, on a GPU as many as make the launch of the first one and the wait for the last one small.
COPIED, CALLS = (2**22, 1) if measure.DEVICE == "cpu" else (2**30, 10)


@pytest.fixture
def one_thread():
    """Threads that wait for each other take any time on a machine that others use too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best_of_both(measured, known, rounds=2000):
    """Smallest result of each, in turn: on a busy machine it takes a while until neither has been disturbed."""
    best = float("inf"), float("inf")
    for done in range(rounds):
        best = min(best[0], measured()), min(best[1], known())
        if done >= 20 and abs(best[0] / best[1] - 1) < 0.05:
            break
    return best


def test_a_copy_is_as_fast_as_it_is(one_thread):
    source = torch.ones(COPIED // 4, device=measure.DEVICE)
    target = torch.empty_like(source)

    def by_another_clock():
        start = time.monotonic_ns()
        for _ in range(CALLS):
            target.copy_(source)
        if measure.DEVICE == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic_ns() - start) / 1e9 / CALLS

    measured, known = best_of_both(lambda: measure.seconds(lambda: target.copy_(source)), by_another_clock)
    assert measured == pytest.approx(known, rel=0.1)


def test_a_delay_is_as_long_as_it_is():
    delay = 0.02

    def wait():
        end = time.monotonic() + delay
        while time.monotonic() < end:
            pass

    measured, _ = best_of_both(lambda: measure.seconds(wait), lambda: delay)
    assert measured == pytest.approx(delay, rel=0.1)


@pytest.mark.parametrize(
    ("peak", "amount"),
    [
        (lambda: measure.copy_peak.__wrapped__(), 2 * (2**30 if measure.DEVICE == "cuda" else 2**28)),
        (
            lambda: measure.matmul_peak.__wrapped__(torch.float32),
            2 * (8192 if measure.DEVICE == "cuda" else 2048) ** 3,
        ),
    ],
    ids=["copy", "matmul"],
)
def test_peaks_are_amounts_over_the_best_time(peak, amount, monkeypatch):
    times = iter([0.75, 0.5, *[1.0] * 8])
    monkeypatch.setattr(measure, "seconds", lambda function: next(times))
    assert peak() == amount / 0.5


def test_memory_of_a_call_and_of_a_process(tmp_path):
    size = 2**26

    def hold():
        torch.ones(size // 4, device=measure.DEVICE)

    kept = torch.ones(size, dtype=torch.int8, device=measure.DEVICE)  # was there before, so it does not count
    assert measure.tensor_memory(hold) == size
    del kept

    script = tmp_path / "hold.py"
    script.write_text(
        "import sys, torch\n"
        "from measure import DEVICE, own_peak_memory\n"
        "torch.ones(int(sys.argv[1]), dtype=torch.int8, device=DEVICE)\n"
        "print('other output')\n"
        "print(own_peak_memory())\n"
    )
    small, large = (measure.peak_memory(str(script), str(each)) for each in (1, size))
    assert large - small == pytest.approx(size, rel=0.1)


def test_machine_says_what_the_numbers_depend_on():
    machine = measure.machine()
    assert machine["device"]
    assert machine["kind"] == measure.DEVICE
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["quietstar"]
    assert os.uname().nodename not in map(str, machine.values())


MEMORY = """
import resource, measure

def pages_from_the_system():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**27)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

as_it_comes = [pages_from_the_system() for _ in range(20)]
measure.keep_freed_memory()
print(*as_it_comes[-5:], *[pages_from_the_system() for _ in range(20)][-5:])
"""


@pytest.mark.skipif(measure.DEVICE == "cuda" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept():
    folder = Path(measure.__file__).parent
    process = subprocess.run([sys.executable, "-c", MEMORY], cwd=folder, capture_output=True, text=True, check=True)
    pages = [int(number) for number in process.stdout.split()]
    assert max(pages[5:]) < 0.1 * min(pages[:5])
