"""``quietstar quickstart`` on a tiny model, and the table it ends with."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.evaluation import HeldOutNll
from quietstar.quickstart.command import results_table
from quietstar.quickstart.corpus import standard_library


def test_from_nothing_to_generated_text(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    assert main(["quickstart", "--tiny", "--output_dir", str(folder)]) == 0
    output = capsys.readouterr().out
    for row in ("before Quiet-STaR", "without thoughts", "after a thought", "gain of the thought"):
        assert re.search(rf"{row} +-?\d+\.\d{{4}} ± \d+\.\d{{4}} +-?\d+\.\d{{4}} ± \d+\.\d{{4}}\n", output), row
    assert len(re.findall(r"weight [+-]\d\.\d{3}  gain [+-]\d\.\d{3}  thought '", output)) == 24

    model = QuietStarForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.convert_ids_to_tokens(list(model.config.thought_token_ids)) == [
        "<|startthought|>",
        "<|endthought|>",
    ]
    assert model.mixing_head[-1].weight.any()  # it was trained
    options = ["--model", str(folder / "model"), "--prompt", "import os", "--max_new_tokens", "3"]
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out.startswith("import os")

    assert main(["quickstart", "--tiny", "--output_dir", str(folder)]) == 2
    assert "--output_dir must be new or empty" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_bad_seeds_are_named(tmp_path, capsys, seed):
    assert main(["quickstart", "--tiny", "--output_dir", str(tmp_path / "new"), "--seed", seed]) == 2
    assert f"quietstar quickstart: --seed must be an integer in [0, 4294967295], got {seed}" in capsys.readouterr().err


def test_the_hardest_tokens_are_those_of_the_model_before():
    before = torch.arange(20.0).view(2, 10)  # the last two tokens are the hardest tenth
    base, mixed = torch.ones(2, 10), torch.zeros(2, 10)
    base[0, 0], mixed[1, 8:] = 100, 0.5
    rest = [torch.zeros(2, 10)] * 3  # which the table does not show
    table = results_table(HeldOutNll(before, before, *rest), HeldOutNll(base, mixed, *rest), speed=1234.5)
    numbers = {line[:36].strip(): re.findall(r"(-?[\d.]+) ±", line) for line in table.splitlines()}
    assert numbers["base model, before Quiet-STaR"] == ["9.5000", "18.5000"]
    assert numbers["after Quiet-STaR, without thoughts"] == ["5.9500", "1.0000"]
    assert numbers["after Quiet-STaR, after a thought"] == ["0.0500", "0.5000"]
    assert numbers["gain of the thought"] == ["5.9000", "0.5000"]
    assert "1,234 tokens/s" in table


def test_training_and_held_out_files_are_apart_and_the_seed_decides():
    train, held_out = standard_library(seed=0, held_out_share=0.05)
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.06
    assert standard_library(seed=0, held_out_share=0.05) == (train, held_out)
    assert standard_library(seed=1, held_out_share=0.05)[1] != held_out
