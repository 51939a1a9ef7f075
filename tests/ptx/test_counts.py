"""What our launches would have a GPU do stays within 5 % of counts.json: bank conflicts, FLOPs, traffic."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptx.counts import KEPT, Row, compilers, differences, main
from ptx.emulated import kernels_of, needs_compiler
from ptx.plugin import OPS
from ptx.units import RATES, Work

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
COUNTS = json.loads(KEPT.read_text())


def run(*options):
    """The command, in a process without Triton's interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-P", "-m", "ptx.counts", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def assert_as_kept(*options):
    done = run("--check", *options)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nif meant: python -m tests.ptx.counts --write"
    assert re.search(r"^[1-9]\d* kernels counted, 0 counts differ", done.stdout, re.M), done.stdout


def skip_with_others(**versions):
    kept = {name: COUNTS["compilers"][name] for name in versions}
    if versions != kept:
        pytest.skip(f"{KEPT.name} is of {kept}, this is {versions}")


@needs_compiler
def test_quick_ones():
    skip_with_others(**compilers(cuda=False))
    assert_as_kept("--quick")


@pytest.mark.slow
@needs_compiler
def test_all():
    versions = compilers()
    if "nvcc" not in versions:
        pytest.skip("nvcc is not on PATH")
    skip_with_others(**versions)
    assert_as_kept()


@pytest.mark.parametrize("target", RATES)
def test_every_triton_kernel_is_counted(target):
    counted = {key.split(" | ")[2] for key in COUNTS["counts"] if key.startswith(target)}
    counted |= {name.removeprefix("gluon_") for name in counted}  # on sm_90 they take the place of those
    assert set.union(*map(kernels_of, OPS)) - counted == set()


@needs_compiler
def test_thresholds_are_found_in_four_reads_of_a_row():
    """Of two rows of each call of top_k and top_p; the list of candidates is written and read beside them."""
    done = run("--target", "sm_90", "--call", "sampling, top_")
    reads = [float(line.split(" | ")[8]) for line in done.stdout.splitlines() if "`threshold_kernel`" in line]
    assert len(reads) == 3
    assert max(reads) <= 4, done.stdout


@needs_compiler
def test_a_gradient_times_1_is_not_moved():
    done = run("--target", "sm_90", "--call", "gradient of an unscaled loss")
    moved = [int(line.split(" | ")[7]) for line in done.stdout.splitlines() if "`scale_kernel`" in line]
    assert len(moved) == 1
    assert moved[0] <= 1, done.stdout  # kB: every warp reads the factor, of 512 kB nothing


WORK = Work(launches=1, blocks=8, matrix_flop=4096_000, exp=16_000, wavefronts=1200, least_wavefronts=1000, sectors=500)


def row(**changed):
    return Row("sm_90", "a call", "a_kernel", WORK._replace(**changed), (0, 0))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"wavefronts": 1259}, None),
        ({"wavefronts": 2400}, "wavefronts 2400, 2.00 times the 1200"),
        ({"wavefronts": 1000}, "wavefronts 1000, 0.83 times the 1200"),  # better: to be written
        ({"matrix_flop": 4400_000}, "matrix_flop 4400000"),
        ({"barriers": 1}, "barriers 1, not the 0"),
    ],
)
def test_what_differs_is_named(changed, expected):
    kept = {row().key: WORK._asdict()}
    found = differences([row(**changed)], kept)
    assert len(found) == (expected is not None)
    assert all(expected in text and "sm_90 | a call | a_kernel" in text for text in found)


def test_kernels_that_come_and_go_are_named():
    kept = {row().key.replace("a_kernel", "another_kernel"): WORK._asdict(), "sm_80 | a call | a_kernel": {}}
    assert [text.split(" | ")[2] for text in differences([row()], kept)] == [
        "a_kernel: launched, but not in counts.json",
        "another_kernel: in counts.json, but not launched",
    ]


def test_cycles_of_units():
    cycles = WORK._replace(operand_bytes=1280, instructions=400).cycles("sm_90")
    assert cycles == {"matrix": 1000, "exp": 1000, "fp32": 0, "int": 0, "shared": 1210, "global": 250, "issue": 100}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--call", "nothing"], "--call must be part of a name of "),
        (["--write", "--quick"], "--write must be given alone"),
        (["--write", "--target", "sm_80"], "--write must be given alone"),
        (["--target", "sm_100"], "invalid choice: 'sm_100'"),
    ],
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_counts_of_other_compilers_are_not_compared(monkeypatch, capsys):
    monkeypatch.setattr("ptx.counts.compilers", lambda cuda: {"triton": "0.1"})
    with pytest.raises(SystemExit):
        main(["--check", "--quick"])
    assert "compilers must be" in capsys.readouterr().err
