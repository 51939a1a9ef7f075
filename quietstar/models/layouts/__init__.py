"""Layouts, which define how rows of text and thoughts see each other in a pass, and the attention function.

Whatever the family, the rows of a pass go through the decoder's own forward. A layout, passed to
``quietstar_attention`` as a keyword argument, decides what they see of each other:

- ``BaseStates``: a base pass whose keys and values are kept for the thoughts that follow;
- ``TextCache``: base passes over texts that each grow at their own pace (generation with drafts);
- ``ThoughtCache``: steps of thoughts on kept base states (inference, sampling);
- ``BaseAndThoughts``: a base pass together with the first steps of its thoughts;
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
