"""Optional packages, which only some features need."""

from importlib import import_module
from types import ModuleType


def require(package: str, purpose: str, extra: str) -> ModuleType:
    """Import a package, or raise an ImportError that says how to install it.

    Args:
        package: name of the package.
        purpose: what needs it, for the message.
        extra: quietstar's extra that installs it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f'{purpose} needs the package {package}: pip install "quietstar[{extra}]"') from error
