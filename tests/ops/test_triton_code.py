"""What the compiler makes of every Triton kernel of the package, and what it is told."""

from pathlib import Path

import pytest
from compile_kernels import Launch, launched

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parent
LAUNCHERS = {  # the functions that launch all kernels of an op, by the file of its tests
    "test_vocabulary_compile.py": ["launch_all"],
    "test_thought_attention_compile.py": ["launch_common", "launch_large_heads", "launch_options", "every_position"],
}


def compiles(path: Path) -> bool:
    return not path.name.startswith("gluon_") or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def launches(file: str) -> list[Launch]:
    return launched(str(FOLDER / file), *LAUNCHERS[file])


@pytest.mark.parametrize("file", LAUNCHERS)
def test_no_order_is_left_to_the_compiler(file):
    """It may reorder a reshape in front of a reduction: then a maximum is not where it is said to be."""
    assert [launch.name for launch in launches(file) if "allow_reorder" in launch.ttir] == []


@pytest.mark.parametrize("file", LAUNCHERS)
def test_every_launch_says_whether_products_are_fused(file):
    """Triton's default is to change."""
    assert [launch.name for launch in launches(file) if "enable_fp_fusion" not in launch.options] == []


def test_no_kernel_is_forgotten():
    """A kernel is a function of which the name says so."""
    paths = FOLDER.parents[1].glob("quietstar/ops/*/*.py")
    lines = [line for path in paths if compiles(path) for line in path.read_text().splitlines()]
    names = {line.partition("(")[0].removeprefix("def ") for line in lines if line.startswith("def ")}
    kernels = {name for name in names if name.endswith("_kernel") and name[0] != "_"}
    assert kernels - {launch.name for file in LAUNCHERS for launch in launches(file)} == set()
