"""A model that has learnt four questions by heart, two of them wrongly, and with a hint one of these."""

import json

import pytest
import torch
from star_questions import EXAMPLE, FORM, ROWS, SAID, SAID_WITH_HINT

from quietstar.evaluation import load_task
from quietstar.quickstart.stages import new_base
from quietstar.quickstart.world import world_tokenizer
from quietstar.star import read_examples


@pytest.fixture
def few_shot(tmp_path):
    file = tmp_path / "few_shot.txt"
    file.write_text(f"\n{EXAMPLE}\n\n")
    return file


@pytest.fixture
def examples(few_shot):
    return read_examples(few_shot, FORM)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def task(data):
    return load_task("qa", data)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    tokenizer, folder = world_tokenizer(), tmp_path_factory.mktemp("base")
    texts = [f"{EXAMPLE} {row['question']} {said}" for row, said in zip(ROWS, SAID, strict=True)]
    texts += [
        f"Ray. {EXAMPLE} {row['answer']}. {row['question']} {said}"
        for row, said in zip(ROWS, SAID_WITH_HINT, strict=True)
    ]
    texts += [f"{row['question']} {said}" for row, said in zip(ROWS, SAID, strict=True)]
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    model = new_base(tokenizer, hidden_size=32, intermediate_size=64, layers=2, kv_heads=4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
