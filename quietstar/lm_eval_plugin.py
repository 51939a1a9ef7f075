"""How ``lm_eval --model quietstar`` finds the model although nobody imports it.

lm-eval (0.4.13) has a registry of models and no entry points for it. PyTorch has some: importing torch calls every
function in the group ``torch.backends``. lm-eval imports torch before it looks a model up, and this says then where
the model is. Nothing heavy may be imported here, and nothing may fail: this runs in every program that imports torch.
"""

import contextlib
import sys


def register() -> None:
    """Tell lm-eval of the model, if it is lm-eval that imports torch."""
    registry = getattr(sys.modules.get("lm_eval.api.registry"), "model_registry", None)
    if registry is None:
        return
    with contextlib.suppress(Exception):  # of another version of lm-eval; it says then that it knows no such model
        import lm_eval.models  # noqa: F401 - its own models; it looks for them only while the registry is empty

        if "quietstar" not in registry:
            registry.register("quietstar", target="quietstar.evaluation.lm_eval:QuietStarLM")
