"""Versions of installed packages."""

from importlib import metadata


def version_of(package: str) -> tuple[int, ...]:
    """Return the first two numbers of the version; empty if the package is not installed."""
    try:
        return tuple(map(int, metadata.version(package).split(".")[:2]))
    except metadata.PackageNotFoundError:
        return ()
