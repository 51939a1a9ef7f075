"""``generate``: thinking with drafts against thinking token by token, the base model, and recomputing the context.

On a CPU the model is the one that ``quietstar quickstart --text stdlib`` leaves in ``quickstart/model``; it is looked
for in the current directory, or in the folder that the environment variable QUICKSTART_MODEL names. On a GPU it is a
Mistral-7B of random weights in bfloat16, whose fresh mixing head gives thoughts no weight: all drafts are accepted
there, which is the most that drafts can give.

A generated token takes one pass of the base model, in which its thought starts, and k more; a pass reads all weights.
The bytes that are counted are those of one pass per token, the floor of the base model; thinking token by token cannot
get beyond 1 / (k + 1) of that, n drafts of which all are accepted not beyond (n + 1) / (n + k + 1).
"""

import argparse
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from baselines import model_weights, sequential_next_logits
from measure import DEVICE
from torch import Tensor
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from quietstar import QuietStarConfig, QuietStarForCausalLM

QUICKSTART = "quietstar quickstart --text stdlib"


@dataclass(frozen=True)
class GenerationShape:
    prompt_tokens: int
    new_tokens: int
    draft_length: int


SHAPE = {"cpu": GenerationShape(256, 64, 12), "cuda": GenerationShape(256, 128, 8)}[DEVICE]
RECOMPUTED = GenerationShape(256, 32, 0)  # fewer tokens: each of the peer's takes a pass over all positions


def thinking_model() -> tuple[QuietStarForCausalLM, Tensor]:
    """The model and a prompt, source code of Python's standard library."""
    if DEVICE == "cuda":
        config = QuietStarConfig(
            text_config=MistralConfig(sliding_window=None),
            start_thought_token_id=31998,
            end_thought_token_id=31999,
        )
        with torch.device(DEVICE):
            model = QuietStarForCausalLM(config).to(torch.bfloat16)
        return model.eval(), torch.randint(31998, (1, SHAPE.prompt_tokens), device=DEVICE)
    folder = Path(os.environ.get("QUICKSTART_MODEL", "quickstart/model"))
    if not folder.is_dir():
        pytest.skip(f"needs the model of `{QUICKSTART}` in {folder}, or its folder in QUICKSTART_MODEL")
    model = QuietStarForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(inspect.getsource(argparse), return_tensors="pt")["input_ids"]
    if tokenizer.unk_token_id in text[0].tolist():  # a model of the world of questions
        pytest.skip(f"needs the model of `{QUICKSTART}`, got one that cannot read source code in {folder}")
    return model, text[:, : SHAPE.prompt_tokens]


def mistral_inside(model: QuietStarForCausalLM) -> MistralForCausalLM:
    """The base model as transformers runs it; shares the weights."""
    config = MistralConfig(**model.config.text_config.to_dict())
    with torch.device("meta"):
        base = MistralForCausalLM(config)
    base.load_state_dict(model.state_dict(), strict=False, assign=True)
    base.model.rotary_emb = model.model.rotary_emb
    return base.eval()


def generator(model: torch.nn.Module, prompt: Tensor, shape: GenerationShape, **options) -> Callable[[], Tensor]:
    def run() -> Tensor:
        torch.manual_seed(0)
        return model.generate(
            prompt, max_new_tokens=shape.new_tokens, eos_token_id=None, pad_token_id=0, use_cache=True, **options
        )

    return run


def recompute(model: QuietStarForCausalLM, prompt: Tensor, shape: GenerationShape, **options) -> Tensor:
    """Greedy text as the authors' script makes it; ``options`` are of ``sequential_next_logits``."""
    weights = model_weights(model)
    for _ in range(shape.new_tokens):
        logits = sequential_next_logits(weights, model.config, prompt, **options)
        logits[:, list(model.config.thought_token_ids)] = -torch.inf
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], dim=1)
    return prompt


def assert_drafts_change_nothing(model: QuietStarForCausalLM, prompt: Tensor) -> None:
    """Greedy thoughts and greedy text, in float32 on a CPU. (In bfloat16 rounding decides between close tokens.)"""
    if DEVICE == "cuda":
        return
    texts = [generator(model, prompt, SHAPE, do_sample=False, draft_length=n)() for n in (None, SHAPE.draft_length)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def bench_drafts(compare, do_sample):
    model, prompt = thinking_model()
    temperature, model.config.thought_temperature = model.config.thought_temperature, 0.0
    assert_drafts_change_nothing(model, prompt)
    model.config.thought_temperature = temperature
    base = mistral_inside(model)
    weights = sum(p.nbytes for p in base.parameters()) - base.model.embed_tokens.weight.nbytes
    with_drafts = generator(
        model, prompt, SHAPE, do_sample=do_sample, draft_length=SHAPE.draft_length, return_dict_in_generate=True
    )
    peers = {
        "thinking token by token": generator(model, prompt, SHAPE, do_sample=do_sample),
        "base model": generator(base, prompt, SHAPE, do_sample=do_sample),
        "auto": generator(model, prompt, SHAPE, do_sample=do_sample, draft_length="auto"),
    }
    for run in peers.values():
        run()
    rate = with_drafts().acceptance_rate
    print(f"acceptance rate {rate:.3f}")
    compare(
        with_drafts,
        peers,
        rounds=7,
        promised=2,
        moved=weights * SHAPE.new_tokens,
        shape=SHAPE,
        less_work=["base model"],
    )


def bench_thinking(compare):
    """The cache: thinking token by token against the authors' way, the whole text for every token.

    Thoughts are sampled, each program's its own; greedy ones lead both to the same text.
    """
    model, prompt = thinking_model()
    ours = generator(model, prompt, RECOMPUTED, do_sample=False)
    if DEVICE == "cpu":
        temperature, model.config.thought_temperature = model.config.thought_temperature, 0.0
        assert torch.equal(ours(), recompute(model, prompt, RECOMPUTED, greedy_thoughts=True))
        model.config.thought_temperature = temperature
    peers = {"whole text for every token": lambda: recompute(model, prompt, RECOMPUTED)}
    compare(ours, peers, rounds=5, promised=10, shape=RECOMPUTED)
