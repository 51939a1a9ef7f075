"""For tests on two processes: starting them, and a model of which thoughts are the same in any batch."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.layers import GainHead

VOCABULARY = 40
ROOT = str(Path(__file__).parents[1])


def run_on_two(function: Callable, *arguments: object) -> None:
    """Call ``function(rank, *arguments)`` of a test's module in two new processes."""
    before = list(sys.path)
    sys.path.append(ROOT)  # they take it over, and find `tests` there; pytest imports tests by their files
    try:
        torch.multiprocessing.spawn(function, arguments, nprocs=2)
    finally:
        sys.path[:] = before  # which may hold it further in front


def new_model(**fields: object) -> QuietStarForCausalLM:
    """The same model in every process. Its thoughts are greedy; with one per position their policy term is not 0.

    Keyword arguments are fields of its configuration.
    """
    torch.manual_seed(0)
    config = QuietStarConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, initializer_range=0.3, thought_length=2, lookahead=2,
        num_thoughts=1, policy_weight=1.0, thought_temperature=0.0, start_thought_token_id=VOCABULARY - 2,
        end_thought_token_id=VOCABULARY - 1, **fields,
    )  # fmt: skip
    model = QuietStarForCausalLM(config)
    nn.init.normal_(model.mixing_head[-1].weight)
    model.config.gain_weight, model.gain_head = 0.5, GainHead(model.config.hidden_size)
    return model


def texts(count: int, length: int = 12) -> torch.Tensor:
    """The same ordinary tokens in every process, int64 [count, length]."""
    return torch.randint(1, VOCABULARY - 2, (count, length), generator=torch.Generator().manual_seed(0))
