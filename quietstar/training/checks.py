"""Errors and warnings of the trainer for settings that bypass the objective or ruin training."""

from collections.abc import Callable

from transformers import TrainingArguments
from transformers.utils import logging

from quietstar.models import QuietStarConfig, QuietStarForCausalLM

logger = logging.get_logger(__name__)

# Policy weight times learning rate is 1 in the paper (1e6 · 1e-6). In the quickstart, 1 does no harm either, but 2000
# ruins the prediction without a thought.
LARGEST_POLICY_STEP = 10


class NonFiniteError(FloatingPointError):
    """Raised if the loss or weights become NaN or infinite; nothing is saved after that. The message names the step."""


def check_arguments(args: TrainingArguments | None = None, compute_loss_func: Callable | None = None, **others) -> None:
    """Refuse arguments of the Trainer that bypass the model's objective, some of them already in its constructor."""
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func must be None: the loss is the model's, and its parts are weighed by its configuration; "
            "a subclass may change compute_loss"
        )
    if args is not None and args.label_smoothing_factor != 0:
        raise ValueError(f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if args is not None and args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel must be False, got True: its forward pass does not think, and ours has kernels of its own"
        )


def check_processes(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process, for which the Trainer would use ``torch.nn.DataParallel``."""
    if args.n_gpu > 1:
        raise ValueError(
            f"every GPU must have a process of its own, got {args.n_gpu} GPUs in one: start with "
            f"`torchrun --nproc_per_node {args.n_gpu} $(which quietstar) train ...`, or train on one GPU with "
            "CUDA_VISIBLE_DEVICES=0 in the environment"
        )


def keep_trainable(model: QuietStarForCausalLM) -> None:
    """Keep 4-bit weights trainable on a CPU, where bitsandbytes repacks them when evaluating and loses gradients."""
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    "model must not have been evaluated on a CPU before it is trained on weights of 4 bits: load it "
                    f"anew, {name} gives no gradients any more"
                )


def warn_of_large_policy_steps(config: QuietStarConfig, rate: float) -> None:
    """Warn if policy weight times ``rate``, the peak learning rate, is much larger than in the paper."""
    weight = config.policy_weight if config.thought_length > 0 else 0
    if weight * rate > LARGEST_POLICY_STEP:
        logger.warning(
            f"policy_weight {weight:g} is too much for learning_rate {rate:g}: the policy term drowns the others. "
            f"Their product is 1 in the paper: set policy_weight to {1 / rate:g} or less, or learning_rate to "
            f"{1 / weight:g} or less"
        )
