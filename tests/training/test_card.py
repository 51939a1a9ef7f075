"""What a trainer tells the model card."""

import re
from pathlib import Path

import pytest

CODE = "modeling_quietstar.py"


def rows(folder):
    """The tables of a folder's card."""
    return dict(re.findall(r"^\| (\S.*) \| (\S.*) \|$", (Path(folder) / "README.md").read_text(), re.MULTILINE))


def test_a_checkpoint_says_what_it_was_trained_on(make_model, make_trainer):
    trainer = make_trainer(
        make_model(), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=3
    )
    trainer.data_source = ["text.jsonl", "more.txt"]
    trainer.train()
    trainer.save_model()
    out = Path(trainer.args.output_dir)
    for folder, step in ((out / "checkpoint-2", 2), (out / "checkpoint-4", 4), (out, 4)):
        assert (folder / CODE).is_file()
        card = rows(folder)
        assert card["steps"] == str(step)
        assert card["data"] == "`text.jsonl`, `more.txt`"
        assert (card["windows of text"], card["windows per step"]) == ("12", "6")
        assert card["learning rate"] == "0.01, linear"
        (logs,) = (logs for logs in trainer.state.log_history if logs["step"] == step and "eval_base_nll" in logs)
        expected = f"{logs['eval_base_nll']:.4f} (after step {step})"
        assert card["held-out text without thoughts, nats per token"] == expected
        assert card["held-out text after a thought, nats per token"].startswith(f"{logs['eval_talk_nll_0']:.4f} ")


def test_what_was_not_evaluated_is_not_claimed(make_model, make_trainer):
    trainer = make_trainer(make_model(), max_steps=1)
    trainer.train()
    trainer.save_model()
    card = rows(trainer.args.output_dir)
    assert card["steps"] == "1"
    assert not any("held-out" in name for name in card)
    assert "data" not in card
    trainer.evaluate()
    trainer.create_model_card(license="mit")
    assert "held-out text without thoughts, nats per token" in rows(trainer.args.output_dir)
    assert "license: mit\n" in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_a_card_of_the_users_is_left_alone(make_model, make_trainer):
    trainer = make_trainer(make_model(), max_steps=1)
    card = Path(trainer.args.output_dir) / "README.md"
    card.parent.mkdir(exist_ok=True)
    card.write_text("# Mine\n")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert card.read_text() == "# Mine\n"


def test_what_is_pushed_while_training_loads(make_model, make_trainer, monkeypatch):
    trainer = make_trainer(make_model(), max_steps=2, save_steps=1)
    trainer.args.push_to_hub = True
    pushed = []
    monkeypatch.setattr(
        trainer, "_push_from_checkpoint", lambda _: pushed.append((Path(trainer.args.output_dir) / CODE).is_file())
    )
    trainer.train()
    assert pushed == [True, True]


def test_adapters_keep_the_card_of_peft(make_model, make_trainer):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(adapted, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "library_name: peft" in (Path(trainer.args.output_dir) / "README.md").read_text()
    assert not (Path(trainer.args.output_dir) / CODE).exists()
