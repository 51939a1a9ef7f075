"""A training step in which only some positions think: a quarter of them, or one, with long thoughts, as in RLP.

The first is compared with the step in which all positions think, the second with what one would write without this
package: every thought in a sequence of its own, the text in front of it, through the plain model. Its step is timed
without sampling, which only the first one has, as both answer for the same thoughts.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bench_generation import mistral_inside
from bench_training_step import SHAPE, ours, random_model, random_text, random_thoughts
from measure import DEVICE, own_peak_memory, peak_memory
from shapes import RLP_STEP, TrainingShape
from torch import Tensor
from torch.nn import functional as F

from quietstar import QuietStarForCausalLM

ALL_POSITIONS, A_QUARTER = "every position", "a quarter of the positions"
TREE, SEPARATE = "one tree", "separate sequences"
CHEAPER = 2.5  # a quarter of the positions in at most 40 % of the time

RLP = RLP_STEP[DEVICE]
RLP_SWITCHES = {
    "prediction": "thought", "baseline": "teacher", "advantage": "leave_one_out", "advantage_clamp": False,
    "base_loss_weight": 0.0, "talk_loss_weight": 0.0, "anchor_choice": "given", "policy_weight": 1.0,
    "policy_temperature": 0.7,
}  # fmt: skip


def quarter_step(name: str) -> Callable[[], object]:
    positions = SHAPE.length // 4 if name == A_QUARTER else None
    model, text = random_model(anchors_per_text=positions).to(SHAPE.dtype), random_text()

    def run() -> None:
        model.zero_grad()
        ours(model, text)

    return run


def assert_chosen_are_as_all() -> None:
    """All positions, chosen one by one, give the loss and the gradients of all positions.

    Without the policy term, which counts one position more where they are chosen.
    """
    model, text = random_model(policy_weight=0.0), random_text()[:, : SHAPE.length // 4]
    thoughts = random_thoughts(text).unflatten(0, (len(text), -1))
    everywhere = torch.arange(text.shape[1] - 1, device=DEVICE).expand(len(text), -1)
    results = []
    for anchors, tokens in ((None, thoughts), (everywhere, thoughts[:, :, :-1])):
        model.zero_grad()
        output = model(text, labels=text, anchors=anchors, thought_tokens=tokens)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@dataclass(frozen=True)
class RlpBatch:
    text: Tensor
    """int64 [1, L]; the anchor is the last position with as many tokens behind it as are predicted."""
    thoughts: Tensor
    """int64 [1, N, 1, k]."""
    baseline_nll: Tensor
    """[1, L − 1], of a teacher."""

    @classmethod
    def random(cls, shape: TrainingShape) -> "RlpBatch":
        tokens = shape.vocab_size - 2
        return cls(
            torch.randint(tokens, (1, shape.length), device=DEVICE),
            torch.randint(tokens, (1, shape.num_thoughts, 1, shape.thought_length), device=DEVICE),
            torch.rand(1, shape.length - 1, device=DEVICE) * 10,
        )

    def anchor(self, lookahead: int) -> int:
        return self.text.shape[1] - 2 - lookahead


def in_one_tree(model: QuietStarForCausalLM, batch: RlpBatch) -> dict[str, Tensor]:
    """Gradients by name."""
    anchors = torch.tensor([[batch.anchor(model.config.lookahead)]], device=DEVICE)
    model.zero_grad()
    output = model(
        batch.text, labels=batch.text, anchors=anchors, thought_tokens=batch.thoughts,
        baseline_nll=batch.baseline_nll, output_thought_logprobs=False,
    )  # fmt: skip
    output.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def in_separate_sequences(model: QuietStarForCausalLM, batch: RlpBatch) -> dict[str, Tensor]:
    """Gradients by name: N sequences of text, thought and look-ahead, an ordinary loss, logits where it needs them."""
    config, plain = model.config, mistral_inside(model).train()
    k, lookahead, anchor = config.thought_length, config.lookahead, batch.anchor(config.lookahead)
    model.zero_grad()
    embed, thoughts = plain.get_input_embeddings(), batch.thoughts[0, :, 0]
    start, end = (x().expand(len(thoughts), 1, -1) for x in (model.start_embedding, model.end_embedding))
    context, following = batch.text[:, : anchor + 1], batch.text[:, anchor + 1 : anchor + lookahead + 1]
    text = [embed(x).expand(len(thoughts), -1, -1) for x in (context, following[:, :-1])]
    rows = torch.cat([text[0], start, embed(thoughts), end, text[1]], dim=1)
    logits = plain(inputs_embeds=rows, logits_to_keep=k + lookahead + 1, use_cache=False).logits
    with torch.no_grad():
        nll = F.cross_entropy(logits[:, k + 1 :].mT, following.expand(len(thoughts), -1), reduction="none").sum(dim=1)
        advantage = (nll.mean() - nll) * len(nll) / (len(nll) - 1)  # of the others' mean; the baseline drops out
    policy = logits[:, :k] / config.policy_temperature
    policy[:, :, list(config.thought_token_ids)] = -torch.inf
    policy_nll = F.cross_entropy(policy.mT, thoughts, reduction="none")
    (config.policy_weight * (advantage[:, None] * policy_nll).mean()).backward()
    gradients = dict(model.named_parameters()) | dict(plain.named_parameters())
    return {name: parameter.grad for name, parameter in gradients.items()}


RLP_STEPS = {TREE: in_one_tree, SEPARATE: in_separate_sequences}


def rlp_step(name: str, model: QuietStarForCausalLM, batch: RlpBatch) -> Callable[[], object]:
    return lambda: RLP_STEPS[name](model, batch)


def assert_same_gradients() -> None:
    """In float32, on an eighth of the text and of the thoughts."""
    shape = replace(RLP, length=RLP.length // 8, thought_length=RLP.thought_length // 8)
    model, batch = random_model(shape, **RLP_SWITCHES), RlpBatch.random(shape)
    mine, wanted = (step(model, batch) for step in RLP_STEPS.values())
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error, norm = (mine[name] - gradient).norm().item(), gradient.norm().item()  # 0 of what only the reward sees
        assert error <= 1e-4 * norm, f"gradient of {name} is off by {error:.1e}, its norm is {norm:.1e}"


def bench_chosen_anchors(compare):
    assert_chosen_are_as_all()
    runs = {name: quarter_step(name) for name in (A_QUARTER, ALL_POSITIONS)}
    runs[A_QUARTER]()
    memory = {name: peak_memory(__file__, name) for name in runs}
    compare(
        runs[A_QUARTER],
        {ALL_POSITIONS: runs[ALL_POSITIONS]},
        rounds=3,
        promised=CHEAPER,
        memory={"ours": memory[A_QUARTER], ALL_POSITIONS: memory[ALL_POSITIONS]},
        dtype=SHAPE.dtype,
        shape=SHAPE,
    )


def bench_rlp_step(compare):
    assert_same_gradients()
    model, batch = random_model(RLP, **RLP_SWITCHES).to(RLP.dtype), RlpBatch.random(RLP)
    runs = {name: rlp_step(name, model, batch) for name in RLP_STEPS}
    memory = {name: peak_memory(__file__, name) for name in runs}
    compare(
        runs[TREE],
        {SEPARATE: runs[SEPARATE]},
        rounds=3 if DEVICE == "cuda" else 2,
        promised=RLP.target,
        memory={"ours": memory[TREE], SEPARATE: memory[SEPARATE]},
        dtype=RLP.dtype,
        shape=RLP,
    )


if __name__ == "__main__":
    if sys.argv[1] in RLP_STEPS:
        rlp_step(sys.argv[1], random_model(RLP, **RLP_SWITCHES).to(RLP.dtype), RlpBatch.random(RLP))()
    else:
        quarter_step(sys.argv[1])()
    print(own_peak_memory())
