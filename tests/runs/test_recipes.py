"""The recipes call `quietstar train` with flags that it has, and docs/recipes.md has a line for each."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from quietstar.training.arguments import TrainParser

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "runs").glob("*.sh"))
ARGUMENTS = {
    "fast_quietstar": ["MODEL", "text.jsonl"], "lora_24gb": ["text.jsonl"], "paper": [], "quickstart": [],
    "rlp": ["text.jsonl"],
}  # fmt: skip
# In place of the programs that recipes call: writes down a call of quietstar, without what starts it.
RECORDER = """#!/bin/sh
while [ "$(basename "$1")" != quietstar ] && [ $# -gt 0 ] && [ "$(basename "$0")" != quietstar ]; do shift; done
[ "$(basename "$0")" = quietstar ] || shift
for argument; do printf '%s\\0' "$argument" >> "$CALLS"; done
printf '\\n' >> "$CALLS"
"""


def calls(recipe: Path, folder: Path) -> list[list[str]]:
    """The argument lists with which a recipe calls quietstar."""
    for program in ("quietstar", "accelerate", "torchrun", "python"):
        (folder / program).write_text(RECORDER if program != "python" else "#!/bin/sh\n")
        (folder / program).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run([recipe, *ARGUMENTS[recipe.stem], folder / "out"], env=environment, check=True)
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_flags_exist(recipe, tmp_path):
    if shutil.which("sh") is None:
        pytest.skip("needs a shell")
    made = calls(recipe, tmp_path)
    assert made
    for command, *arguments in made:
        if command == "train":
            TrainParser().parse([argument for argument in arguments if argument not in ("--bf16",)] + ["--use_cpu"])
        else:
            assert command == "quickstart"


def test_the_page_has_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    scripts = {f"runs/{path.name}" for path in (ROOT / "runs").glob("*.*") if path.suffix in (".sh", ".py")}
    helpers = {"runs/method_table.py", "runs/star_world.py"}
    assert {script for script in scripts if script not in page} == helpers
