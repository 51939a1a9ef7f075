"""What torch.compile has to know of a function."""

from collections.abc import Callable


def constant_when_compiled(function: Callable) -> Callable:
    """Have torch.compile call the function once and keep its answer, instead of tracing it.

    torch.compiler.assume_constant_result does the same, but imports Dynamo, and with it Triton.
    """
    function._dynamo_marked_constant = True
    return function
