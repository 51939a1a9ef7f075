"""What each PTX instruction becomes; importing this package fills the table of ``encoder``."""

from . import arithmetic, asynchronous, control, matrices, memory, tcgen05

__all__ = ["arithmetic", "asynchronous", "control", "matrices", "memory", "tcgen05"]
