"""Quiet-STaR: language models that think before every token (arXiv 2403.09629).

Three layers, each usable without the one above it: ``quietstar.ops`` (differentiable operations, needs torch only),
``quietstar.models`` (Hugging Face models) and ``quietstar.training`` with the command ``quietstar``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quietstar.models import QuietStarConfig, QuietStarForCausalLM, QuietStarOutput
    from quietstar.training import QuietStarTrainer

__version__ = "0.2.0"

__all__ = ["QuietStarConfig", "QuietStarForCausalLM", "QuietStarOutput", "QuietStarTrainer"]

# Loaded on first use, so that `import quietstar.ops` imports no transformers.
_HOMES = {
    "QuietStarConfig": "quietstar.models",
    "QuietStarForCausalLM": "quietstar.models",
    "QuietStarOutput": "quietstar.models",
    "QuietStarTrainer": "quietstar.training",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
