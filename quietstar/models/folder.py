"""What a saved folder holds so that transformers loads it where nobody has imported quietstar."""

from os import PathLike
from pathlib import Path

_MODULE = "modeling_quietstar"

# Of config.json: which class of which file of the folder each of transformers' loaders takes.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.QuietStarConfig",
    "AutoModelForCausalLM": f"{_MODULE}.QuietStarForCausalLM",
}

# transformers reads which packages such a file imports, and says which of them must be installed.
_CODE = '''\
"""With trust_remote_code=True transformers finds the model here; its code is that of the package quietstar."""

from quietstar import QuietStarConfig, QuietStarForCausalLM  # noqa: F401
'''


def write_code(folder: str | PathLike) -> None:
    """Write the file that :data:`AUTO_MAP` names: the classes are the installed package's, not copies of them."""
    (Path(folder) / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
