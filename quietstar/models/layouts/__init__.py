"""How rows of text and of thoughts lie in one pass, and the attention function through which they reach a decoder.

Whatever the family, the rows of a pass go through the decoder's own forward; what they see of each other is a layout's,
which reaches ``quietstar_attention`` as a keyword argument:

- ``BaseStates``: a base pass whose keys and values are kept for the thoughts that follow;
- ``TextCache``: base passes over texts that grow each at its own pace (generation with drafts);
- ``ThoughtCache``: steps of thoughts on kept base states (inference, sampling);
- ``BaseAndThoughts``: a base pass and the first steps of the thoughts behind it at once;
- ``ThoughtTree``: base text and all thought steps in one sequence (training).
"""

from quietstar.models.layouts.attention import ATTENTION_NAME, Layout
from quietstar.models.layouts.text import BaseStates, TextCache, TextRows
from quietstar.models.layouts.thoughts import BaseAndThoughts, ThoughtCache, ThoughtStates, ThoughtTree

__all__ = [
    "ATTENTION_NAME",
    "BaseAndThoughts",
    "BaseStates",
    "Layout",
    "TextCache",
    "TextRows",
    "ThoughtCache",
    "ThoughtStates",
    "ThoughtTree",
]
