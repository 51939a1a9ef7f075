"""A small world, and a model that has learnt nothing of it."""

import pytest
import torch

from quietstar import QuietStarForCausalLM
from quietstar.quickstart.measures import Exam
from quietstar.quickstart.stages import THINKING, new_base
from quietstar.quickstart.world import World, world_tokenizer


@pytest.fixture
def world():
    return World(hops=3, seed=0, people=4)


@pytest.fixture
def tokenizer():
    return world_tokenizer()


@pytest.fixture
def exam(world, tokenizer):
    return Exam.of(world, tokenizer)


@pytest.fixture
def base(tokenizer):
    base = new_base(tokenizer, hidden_size=16, intermediate_size=16, layers=1, kv_heads=4)
    torch.nn.init.normal_(base.lm_head.weight)
    return base


@pytest.fixture
def model(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(tmp_path / "base", tokenizer, thought_length=2, **THINKING)
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=3)
    return model.eval()
