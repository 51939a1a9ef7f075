"""The code file of a saved folder, with which transformers loads it without anybody importing quietstar."""

from os import PathLike
from pathlib import Path

_MODULE = "modeling_quietstar"

# Field of config.json that tells transformers' auto classes which class of which file in the folder to use.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.QuietStarConfig",
    "AutoModelForCausalLM": f"{_MODULE}.QuietStarForCausalLM",
}

# transformers finds out which packages this file imports, and names those that must be installed.
_CODE = '''\
"""With trust_remote_code=True, transformers finds the model here; its code is in the package quietstar."""

from quietstar import QuietStarConfig, QuietStarForCausalLM  # noqa: F401
'''


def write_code(folder: str | PathLike) -> None:
    """Write the file that :data:`AUTO_MAP` names; it imports the classes of the installed package."""
    (Path(folder) / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
