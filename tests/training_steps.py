"""Training steps on a small model, as `quietstar estimate` describes them, and the memory that they take."""

from collections.abc import Callable
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import torch
from decoder_families import config_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.estimate.step import TrainingStep
from quietstar.ops._rows import release_logits_buffer

DEFAULTS = {"dtype": torch.float32, "checkpointing": False, "optimizer": "none", "device": "cpu"}


def training_step(fields: dict, batch: int = 2, length: int = 32, **options) -> TrainingStep:
    words = fields["vocab_size"]
    config = QuietStarConfig(**fields, start_thought_token_id=words - 2, end_thought_token_id=words - 1)
    return TrainingStep(config, batch, length, **DEFAULTS | options)


def step_of_family(family: str, fields: dict | None = None, rope_parameters: dict | None = None, **options):
    sizes = {"vocab_size": 1002, "hidden_size": 64, "intermediate_size": 160}
    text = config_of(family, **sizes, rope_parameters=rope_parameters)
    thoughts = {"num_thoughts": 2, "thought_length": 4, "lookahead": 3}
    tokens = {"start_thought_token_id": 1000, "end_thought_token_id": 1001}
    config = QuietStarConfig(text_config=text, **tokens, **thoughts | (fields or {}))
    return TrainingStep(config, 2, 48, **DEFAULTS | options)


def model_of(step: TrainingStep) -> nn.Module:
    """The model that is trained, with adapters where there are any."""
    model = QuietStarForCausalLM(step.config)
    if step.config.prediction == "mixed":
        torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.5)  # at zero, thoughts would have no gradient
    model = model.to(step.device, step.dtype)
    if step.lora_r is not None:
        import peft

        from quietstar.training.lora import four_bits, lora_config

        if step.load_in_4bit:
            model = in_four_bits(model, four_bits(step.dtype))
        model = peft.get_peft_model(model, lora_config(model, step.lora_r))
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def in_four_bits(model: QuietStarForCausalLM, quantisation) -> QuietStarForCausalLM:
    import peft

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = QuietStarForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=model.dtype)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def run(step: TrainingStep, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
    text = torch.randint(step.config.vocab_size - 2, (step.batch, step.length), device=step.device)
    mixed = step.lora_r is not None and step.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        output = model(text, labels=text, output_thought_logprobs=False)
    output.loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return output


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def measured_peak(step: TrainingStep, model: nn.Module, peak: Callable) -> int:
    """Bytes of tensors of the second step, weights and states of the optimizer included."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if step.optimizer == "adamw" else None
    states = 0
    if optimizer is not None:
        run(step, model, optimizer)
        states = state_bytes(optimizer)
    release_logits_buffer()
    return sum(p.nbytes for p in model.parameters()) + states + peak(lambda: run(step, model, optimizer))


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products outside of ops."""

    flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.flops += flop_registry[operation.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result
