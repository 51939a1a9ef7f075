"""The command `quietstar train`, from files to a model that loads."""

import json
import math
import re
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GPT2Config, MistralForCausalLM, TrainingArguments

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.training.arguments import ModelArguments, TrainParser
from quietstar.training.train import load_model, make_trainer

PAPER = {
    "learning_rate": 1e-6, "warmup_steps": 20, "weight_decay": 0.001, "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8, "block_size": 256, "thought_length": 9, "lookahead": 4, "num_thoughts": 2,
    "policy_weight": 1e6, "policy_temperature": 3.0, "thought_temperature": 1.0,
}  # fmt: skip


def states(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_training_resuming_and_going_on(run, base, tmp_path):
    out = tmp_path / "out"
    assert run() == 0
    model, tokenizer = QuietStarForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.thought_length, model.config.num_thoughts, model.config.lookahead) == (2, 1, 4)
    assert tokenizer.convert_tokens_to_ids(["<|startthought|>", "<|endthought|>"]) == [30, 31]
    assert list(model.config.thought_token_ids) == [30, 31]
    assert not torch.equal(model.lm_head.weight[:30], MistralForCausalLM.from_pretrained(base).lm_head.weight)
    held_out = json.loads((out / "eval_results.json").read_text())
    assert held_out["eval_base_nll"] == pytest.approx(math.log(30), rel=0.2)
    assert [log["step"] for log in states(out) if "eval_talk_nll_3" in log] == [2, 4]

    assert run("--max_steps", 6, "--resume_from_checkpoint", "last") == 0
    assert [log["step"] for log in states(out) if "reward" in log] == [2, 4, 6]

    weights = model.state_dict()
    again = tmp_path / "again"
    assert run("--model", out, "--output_dir", again, "--learning_rate", 0, "--held_out_fraction", 0) == 0
    trained = QuietStarForCausalLM.from_pretrained(out).state_dict()
    assert all(
        torch.equal(x, trained[name]) for name, x in QuietStarForCausalLM.from_pretrained(again).state_dict().items()
    )
    assert not torch.equal(trained["lm_head.weight"], weights["lm_head.weight"])
    assert not (again / "eval_results.json").exists()


def test_broken_checkpoints_and_other_runs_checkpoints(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--save_steps", 1) == 0
    assert run() == 2
    message = (
        "quietstar train: output_dir must not hold the checkpoints of another run, got checkpoint-1 to checkpoint-4"
    )
    assert message in capsys.readouterr().err

    for step, file in ((4, "model.safetensors"), (3, "optimizer.pt")):
        (out / f"checkpoint-{step}" / file).write_bytes(b"")
    assert run("--resume_from_checkpoint", out / "checkpoint-3") == 2
    assert f"optimizer.pt is broken; the last whole one is {out}/checkpoint-2" in capsys.readouterr().err
    assert run("--resume_from_checkpoint", "last") == 0
    assert "checkpoint-4 is not whole (model.safetensors is broken); going on from" in capsys.readouterr().err

    assert run("--overwrite_output_dir", "--resume_from_checkpoint", "last") == 2
    assert run("--overwrite_output_dir", "--data", "none.jsonl") == 2
    assert len(list(out.glob("checkpoint-*"))) == 4  # nothing is removed before a run can start
    assert run("--overwrite_output_dir", "--max_steps", 2) == 0
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert states(out)[-1]["step"] == 2


@pytest.mark.parametrize(
    ("flags", "held_out"),
    [([], 12), (["--max_held_out_windows", "5"], 5), (["--held_out_fraction", "0"], 0)],
    ids=["all", "capped", "none"],
)
def test_documents_are_trained_on_or_held_out(base, text, tmp_path, flags, held_out):
    arguments = ["--model", base, "--data", text, "--output_dir", tmp_path, "--block_size", "10", *flags]
    if held_out:
        arguments[6:6] = ["--held_out_fraction", "0.2"]
    trainer = make_trainer(*TrainParser().parse([*map(str, arguments), "--report_to", "none", "--use_cpu"]))
    # Twenty documents of thirty tokens, four of them held out.
    assert len(trainer.train_dataset) == (48 if held_out else 60)
    assert len(trainer.eval_dataset or []) == held_out


def test_checkpoints_in_the_authors_layout_are_taken_as_they_are(base):
    model, _ = load_model(ModelArguments(str(base)))
    weights = {name.replace("mixing_head.", "talk_head.0."): x for name, x in model.state_dict().items()}
    for name in ("start_embedding", "end_embedding"):
        weights[name] = torch.stack([weights.pop(f"{name}.weight")] * 2)
    save_file(weights, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 32, "max_thoughts": 8}
    (base / "config.json").write_text(json.dumps(config))
    again, _ = load_model(ModelArguments(str(base)))
    assert again.config.thought_length == 3
    assert torch.equal(again.start_embedding.weight, model.start_embedding.weight)


@pytest.mark.parametrize(
    ("flags", "scale", "words"),
    [({}, 100, [0]), ({"embedding_scale": 0.5}, 0.5, [0]), ({"initial_text": "w7 w3"}, 100, [7, 3])],
    ids=str,
)
def test_what_thought_embeddings_begin_with(base, flags, scale, words):
    """Used embeddings are those of the text, whatever the scale."""
    model, _ = load_model(ModelArguments(str(base), **flags))
    assert model.config.embedding_scale == scale
    expected = model.get_input_embeddings().weight[words].mean(dim=0)
    for embedding in (model.start_embedding, model.end_embedding):
        torch.testing.assert_close(embedding(), expected)
        torch.testing.assert_close(embedding.weight, expected / scale)


@pytest.mark.parametrize(
    ("flags", "ours", "message"),
    [
        (["--initial_text", ""], False, "initial_text must hold at least one token, got ''"),
        (["--initial_text", " "], False, "initial_text must hold at least one token, got ' '"),
        (
            ["--initial_text", "w1 what"],
            False,
            "initial_text must hold no token unknown to the tokenizer, got 'w1 what'",
        ),
        (["--initial_text", "w1"], True, "initial_text must be left out with a Quiet-STaR checkpoint, .*, got 'w1'"),
        (["--initial_text", ""], True, "initial_text must be left out with a Quiet-STaR checkpoint"),
        (["--embedding_scale", "2"], True, "embedding_scale must be left out with a Quiet-STaR .*, got 2.0 with "),
    ],
)
def test_beginnings_that_make_no_sense(run, base, tmp_path, capsys, flags, ours, message):
    if ours:
        model, tokenizer = load_model(ModelArguments(str(base)))
        model.save_pretrained(tmp_path / "ours")
        tokenizer.save_pretrained(tmp_path / "ours")
        flags = ["--model", tmp_path / "ours", *flags]
    assert run(*flags) == 2
    assert re.search(f"^quietstar train: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_dtype_of_the_weights(run, tmp_path):
    assert run("--dtype", "bfloat16", "--max_steps", 1, "--eval_strategy", "no") == 0
    assert QuietStarForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "none.jsonl"], "data must be a file or the name of a dataset, got no file at none.jsonl"),
        (["--text_column", "body"], "text_column must be one of 'text', got 'body'"),
        (["--block_size", "1000"], "block_size must be no longer than the text"),
        (["--block_size", "5"], r"block_size must be >= lookahead \+ 2 = 6, got 5"),
        (["--held_out_fraction", "1"], r"held_out_fraction must be in \[0, 1\), got 1.0"),
        (["--model", "{tmp}"], "model must be a decoder or Quiet-STaR checkpoint, got no config.json in "),
        (["--model", "/no/such"], "model must be the folder or hub name of a checkpoint, got '/no/such': "),
        (
            ["--model", "{tmp}/gpt2"],
            "model must be a decoder that can think, got model type 'gpt2': it must be ",
        ),
        (["--model", "{tmp}/run"], "model must be a .*, got no config.json in .*run, only checkpoint-2, checkpoint-4"),
        (["--tokenizer", "{tmp}"], "tokenizer must be given: none in "),
        (["--thought_length", "-1"], "thought_length must be an integer >= 0, got -1"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint must not be 'last' without a checkpoint"),
        (["--resume_from_checkpoint", "{tmp}"], "resume_from_checkpoint must be the folder of a checkpoint, got '.*'"),
        (["--learning_rat", "1"], "unknown arguments: --learning_rat 1"),
        (["--lr_scheduler_type", "up"], "argument --lr_scheduler_type.*: invalid choice: 'up'"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must be 0, got 0.1"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_arguments_are_named_without_a_traceback(run, tmp_path, capsys, flags, message):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    for step in (2, 4):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    try:
        code = run(*(flag.format(tmp=tmp_path) for flag in flags))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(f"^quietstar train: (error: )?{message}", capsys.readouterr().err, re.MULTILINE)


NOT_NEGATIVE = "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "thought_temperature", "policy_weight"
POSITIVE = (
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "policy_temperature", "embedding_scale",
)  # fmt: skip
SHARES = "held_out_fraction", "adam_beta1", "base_loss_weight"
COUNTS = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit", "block_size",
    "max_held_out_windows", "workers", "lookahead", "num_thoughts",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in (*NOT_NEGATIVE, *POSITIVE, *SHARES) for value in ("nan", "inf", "-inf", "-0.5")),
        *((name, "0") for name in POSITIVE),
        *((name, "1.5") for name in SHARES),
        *((name, value) for name in COUNTS for value in ("0", "-3")),
        *(("seed", value) for value in ("-1", "4294967296")),
    ],
)
def test_bad_numbers_in_flags(capsys, name, value):
    with pytest.raises(SystemExit, match=r"^2$"):
        TrainParser().parse(["--model", "m", "--data", "d", f"--{name}={value}"])
    assert re.search(f"error: {name} must be .*, got {value}", capsys.readouterr().err)


def test_bad_numbers_end_the_command(run, base, tmp_path, capsys):
    model = MistralForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(base)
    assert run() == 1
    assert "quietstar train: training stopped: the loss of step 1 is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_broken_model_is_named(run, base, capsys):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run() == 2
    assert f"quietstar train: model cannot be loaded from {base}: " in capsys.readouterr().err


def test_defaults_are_the_papers():
    model_args, data_args, training_args = TrainParser().parse(["--model", "m", "--data", "d"])
    model_defaults = QuietStarForCausalLM.config_class()
    assert model_args.config_fields() == {}
    for name, value in PAPER.items():
        holders = [holder for holder in (training_args, data_args, model_defaults) if hasattr(holder, name)]
        assert getattr(holders[0], name) == value, name


def test_help_is_short_and_full_help_has_every_flag(capsys):
    shown = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["train", flag])
        shown.append(capsys.readouterr().out)
    short, full = shown
    assert len(short.splitlines()) < 80
    assert max(map(len, short.splitlines())) <= 110
    assert "%%" not in short + full
    for name in ("model", "data", "thought_length", "learning_rate"):
        assert f"--{name} " in short
    for entry in fields(TrainingArguments):
        assert f"--{entry.name}" in full
