"""The plugin through which ``lm_eval --model quietstar`` finds the model without anybody importing it.

lm-eval (0.4.13) has a registry of models but no entry points for it. PyTorch has entry points: importing torch calls
every function in the group ``torch.backends``. lm-eval imports torch before it looks a model up, and the function here
then registers the model. It must not import anything heavy and must not fail, as it runs in every program that imports
torch.
"""

import contextlib
import sys


def register() -> None:
    """Register the model with lm-eval, if it is lm-eval that imports torch."""
    registry = getattr(sys.modules.get("lm_eval.api.registry"), "model_registry", None)
    if registry is None:
        return
    with contextlib.suppress(Exception):  # another version of lm-eval may differ; it then reports an unknown model
        import lm_eval.models  # noqa: F401 - registers its own models, which it does only while the registry is empty

        if "quietstar" not in registry:
            registry.register("quietstar", target="quietstar.evaluation.lm_eval:QuietStarLM")
