"""Packages that only some uses need."""

from importlib import import_module
from types import ModuleType


def require(package: str, purpose: str, extra: str) -> ModuleType:
    """The package, or an ImportError that says how to get it.

    Args:
        package: its name.
        purpose: what needs it.
        extra: of ours, that brings it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f'{purpose} needs the package {package}: pip install "quietstar[{extra}]"') from error
