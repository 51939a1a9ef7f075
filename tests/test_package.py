import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

import quietstar

ROOT = Path(__file__).parents[1]
REPORT_ASSETS = {".html", ".css", ".js"}


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("quietstar")
    except metadata.PackageNotFoundError:
        pytest.skip("a checkout that is not installed has no metadata")


def test_version_is_stated_once(distribution):
    assert distribution.version == quietstar.__version__


def test_wheel_holds_the_package_and_nothing_else(distribution):
    if json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("an editable install holds links to the checkout")
    files = [PurePosixPath(file) for file in distribution.files]
    installed = {file for file in files if file.parts[0] == "quietstar"}
    assert PurePosixPath("quietstar/py.typed") in installed
    assert {file.suffix for file in installed if file.parts[:-1] == ("quietstar", "report", "assets")} == REPORT_ASSETS
    assert any(file.match("quietstar/_C.*.so") or file.match("quietstar/_C.*.pyd") for file in installed)
    assert {file.suffix for file in installed} <= {".py", ".pyi", ".pyc", ".typed", ".so", ".pyd", *REPORT_ASSETS}
    assert {file.parts[0] for file in files} - {"..", "quietstar"} == {f"quietstar-{distribution.version}.dist-info"}
    assert any(file.name == "LICENSE" for file in files)


@pytest.mark.parametrize("name", quietstar.__all__)
def test_public_names_load_on_use(monkeypatch, name):
    monkeypatch.delitem(vars(quietstar), name, raising=False)  # where another test has loaded it
    assert name in dir(quietstar)
    assert getattr(quietstar, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'quietstar' has no attribute 'QuietStar'"):
        quietstar.QuietStar  # noqa: B018


def printed_by(code: str) -> str:
    """What a fresh Python with this package, whatever lies in its working directory, prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(quietstar.__file__).parents[1])}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("quietstar", {"torch", "transformers"}),
        ("quietstar.cli", {"torch", "transformers"}),
        ("quietstar.lm_eval_plugin", {"torch", "transformers", "lm_eval"}),  # runs whenever torch is imported
        ("quietstar.ops", {"transformers", "triton", "torch._dynamo", "quietstar.models", "quietstar.training"}),
        ("quietstar.models", {"quietstar.training"}),
        ("quietstar.report.page", {"quietstar.quickstart", "quietstar.training", "datasets", "matplotlib.pyplot"}),
    ],
)
def test_layers_import_nothing_from_above(module, unwanted):
    assert unwanted.isdisjoint(printed_by(f"import sys, {module}; print(*sys.modules)").split())


def test_without_the_compiled_module_everything_else_works():
    output = printed_by("""
import sys
sys.modules["quietstar._C"] = None
import torch
from quietstar.ops import mix_logits
print(mix_logits(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1)).tolist())
try:
    mix_logits(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), backend="cpu")
except ValueError as error:
    print(error)
""")
    value, error = output.splitlines()
    assert value == "[[1.0, 1.0]]"
    assert "'cpu' cannot run mix_logits here: the compiled module is missing" in error
    assert "`pip install .` builds it" in error


@pytest.mark.parametrize(
    ("native", "succeeds", "message"),
    [
        ("AUTO", True, "installed without its compiled module"),
        ("ON", False, "QUIETSTAR_NATIVE=ON, but"),
        ("OFF", True, ""),
        ("MAYBE", False, "must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_a_build_without_a_compiler(tmp_path, native, succeeds, message):
    """It gives a package of Python alone and says so, unless the compiled module is insisted on."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs CMake and ninja")
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), f"-DQUIETSTAR_NATIVE={native}"]
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert message in " ".join(done.stderr.split())


def test_the_version_is_that_of_citation_and_changelog():
    assert f"\nversion: {quietstar.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {quietstar.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_compiled_module_shares_the_threads_of_torch():
    pytest.importorskip("quietstar._C", reason="a checkout that is not installed has no compiled module")
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    output = printed_by("""
import quietstar.ops
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
""")
    assert len(output.split()) <= 1
