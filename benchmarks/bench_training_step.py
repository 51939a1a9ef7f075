"""A whole training step of ``QuietStarForCausalLM``, forward and backward, against the authors' sequential program.

Both sample their own thoughts when they are timed; the answers are compared on the same thoughts. The base model, which
only reads the text, shows what thinking costs. FLOPs counted are those that the objective needs once.
"""

import sys
from collections.abc import Callable

import torch
from baselines import SequentialStep, model_weights, sequential_training_step
from bench_generation import mistral_inside
from measure import DEVICE, own_peak_memory, peak_memory
from shapes import TRAINING_STEP, TrainingShape
from torch import Tensor
from transformers import MistralForCausalLM

from quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarOutput
from quietstar.estimate.flops import model_flops
from quietstar.estimate.step import TrainingStep

SHAPE = TRAINING_STEP[DEVICE]
SEQUENTIAL = "sequential baseline"
BASE = "base model, no thoughts"
BEFORE_RELU = "mixing_head.0", "mixing_head.2"


def random_model(shape: TrainingShape = SHAPE, **fields: object) -> QuietStarForCausalLM:
    config = QuietStarConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        num_thoughts=shape.num_thoughts,
        thought_length=shape.thought_length,
        lookahead=shape.lookahead,
        start_thought_token_id=shape.vocab_size - 2,
        end_thought_token_id=shape.vocab_size - 1,
        **fields,
    )
    model = QuietStarForCausalLM(config).to(DEVICE)
    if config.prediction == "mixed":
        # A fresh mixing head gives thoughts no weight, and then most gradients are zero.
        torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.5)
    return model


def random_text() -> Tensor:
    return torch.randint(SHAPE.vocab_size - 2, (SHAPE.batch, SHAPE.length), device=DEVICE)


def random_thoughts(text: Tensor) -> Tensor:
    shape = SHAPE.num_thoughts * len(text), text.shape[1], SHAPE.thought_length
    return torch.randint(SHAPE.vocab_size - 2, shape, device=DEVICE)


def ours(model: QuietStarForCausalLM, text: Tensor, thoughts: Tensor | None = None) -> QuietStarOutput:
    output = model(text, labels=text, thought_tokens=thoughts, output_thought_logprobs=False)  # as the trainer does
    output.loss.backward()
    return output


def sequential(model: QuietStarForCausalLM, text: Tensor, thoughts: Tensor | None = None) -> SequentialStep:
    step = sequential_training_step(model_weights(model), model.config, text, text, thought_tokens=thoughts)
    step.loss.backward()
    return step


def base(model: MistralForCausalLM, text: Tensor) -> Tensor:
    loss = model(text, labels=text).loss
    loss.backward()
    return loss.detach()


CANDIDATES = {"ours": ours, SEQUENTIAL: sequential}
TIMED = CANDIDATES | {BASE: base}


def repeatable(name: str, model: QuietStarForCausalLM, text: Tensor) -> Callable[[], None]:
    """The step without what it leaves behind: gradients would be added up, and the result holds on to memory."""
    stepping = mistral_inside(model).train() if name == BASE else model

    def run() -> None:
        stepping.zero_grad()
        TIMED[name](stepping, text)

    return run


def assert_same(model: QuietStarForCausalLM, text: Tensor) -> None:
    """Losses and the gradient of every parameter agree, in float32, up to what rounding does to the rewards.

    A reward is the difference of 2 M losses, each rounded at its own size; the policy term, and through its weight the
    gradient, is proportional to rewards. (In a smaller dtype nothing of a reward is left to compare.) Two units of the
    mixing head may differ: an input near zero can be rounded to either side of the kink of its ReLU.
    """
    thoughts = random_thoughts(text)
    results = {}
    for name, step in CANDIDATES.items():
        model.zero_grad()
        result = step(model, text, thoughts)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results[name] = result.loss.detach(), result.talk_nll.detach(), gradients
    (loss, talk_nll, gradients), (wanted_loss, wanted_nll, wanted_gradients) = results["ours"], results[SEQUENTIAL]

    torch.testing.assert_close(base(mistral_inside(model), text), result.base_nll.mean())
    rounding = 2 * SHAPE.lookahead * torch.finfo(torch.float32).eps * result.base_nll.max() / result.reward.std()
    rounding = rounding.item()
    torch.testing.assert_close(talk_nll.flatten(0, 1), wanted_nll, rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, wanted_loss, rtol=rounding, atol=0)
    for name, wanted in wanted_gradients.items():
        of_units = (gradients[name] - wanted).reshape(len(wanted), -1).norm(dim=1)
        counted = of_units.sort().values[:-2] if name.startswith(BEFORE_RELU) else of_units
        error = (counted.norm() / wanted.norm()).item()
        assert error <= rounding, f"gradient of {name} is off by {error:.1e} of its norm, {rounding:.1e} is allowed"


def bench_training_step(compare):
    model, text = random_model(), random_text()
    assert_same(model, text[:, : SHAPE.length // 2])  # the baseline takes half a minute for all of it on a CPU
    model.to(SHAPE.dtype)
    runs = {name: repeatable(name, model, text) for name in TIMED}
    flops = model_flops(TrainingStep(model.config, SHAPE.batch, SHAPE.length, SHAPE.dtype, device=DEVICE))
    compare(
        runs.pop("ours"),
        runs,
        rounds=3 if DEVICE == "cuda" else 2,
        promised=SHAPE.target,
        memory={name: peak_memory(__file__, name) for name in TIMED},
        flops=flops,
        dtype=SHAPE.dtype,
        shape=SHAPE,
        less_work=[BASE],
    )


if __name__ == "__main__":
    repeatable(sys.argv[1], random_model().to(SHAPE.dtype), random_text())()
    print(own_peak_memory())
