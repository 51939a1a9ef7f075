import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

import quietstar


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
    assert any(file.match("quietstar/_C.*.so") or file.match("quietstar/_C.*.pyd") for file in installed)
    assert {file.suffix for file in installed} <= {".py", ".pyi", ".pyc", ".typed", ".so", ".pyd"}
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


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("quietstar", {"torch", "transformers"}),
        ("quietstar.cli", {"torch", "transformers"}),
        ("quietstar.ops", {"transformers", "quietstar.models", "quietstar.training"}),
        ("quietstar.models", {"quietstar.training"}),
    ],
)
def test_layers_import_nothing_from_above(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    path = {"PYTHONPATH": str(Path(quietstar.__file__).parents[1])}  # and -P: this package, whatever lies in the cwd
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | path, capture_output=True, text=True, check=True
    )
    assert unwanted.isdisjoint(run.stdout.split())
