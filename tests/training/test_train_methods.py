"""The flags of `quietstar train` for other methods than Quiet-STaR: the objective, stages, distillation, a teacher."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from quietstar import QuietStarForCausalLM


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def test_the_objective_is_in_the_saved_configuration(run, tmp_path):
    flags = (
        "--prediction thought --baseline teacher --teacher_decay 0.9 --reward log_likelihood --advantage leave_one_out "
        "--advantage_clamp false --normalize_advantage true --clip_ratio 0.2 --policy_updates 2 --entropy_weight 0.1 "
        "--kl_weight 0.01 --base_loss_weight 0 --talk_loss_weight 0 --anchors_per_text 2 --anchor_choice entropy "
        "--num_thoughts 3"
    )
    assert run(*flags.split()) == 0
    config = QuietStarForCausalLM.from_pretrained(tmp_path / "out").config
    given = dict(zip(*[iter(part.lstrip("-") for part in flags.split())] * 2, strict=True))
    for name, value in given.items():
        assert str(getattr(config, name)).lower() == value or float(getattr(config, name)) == float(value), name


def test_a_stream_killed_and_resumed_with_a_teacher_and_stages(run, tmp_path):
    out = tmp_path / "out"
    flags = (
        *("--streaming", "--held_out_fraction", 0.8, "--eval_strategy", "no", "--logging_steps", 1, "--save_steps", 3),
        *("--max_steps", -1, "--baseline", "teacher", "--teacher_decay", 0.5, "--stages", "3-3:2,2-2:3,1-1:3"),
    )
    unset = ["--thought_length"]
    assert run(*flags, without=unset) == 0
    whole, expected = load_file(out / "model.safetensors"), losses(out)
    config = json.loads((out / "config.json").read_text())
    assert (config["thought_length"], config["lookahead"]) == (1, 1)
    assert len(expected) == 8
    for step, stage in ((3, 2), (6, 1)):
        saved = json.loads((out / f"checkpoint-{step}" / "config.json").read_text())
        assert (saved["thought_length"], saved["lookahead"]) == (stage, stage)
    for step in (6, 3):
        for folder in out.glob("checkpoint-*"):
            if int(folder.name[11:]) > step:
                shutil.rmtree(folder)
        assert run(*flags, "--resume_from_checkpoint", "last", without=unset) == 0
        assert losses(out) == expected
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(("flag", "own"), [(["--distil"], True), (["--distil", "reward"], False)])
def test_what_is_distilled_does_not_think(run, tmp_path, flag, own):
    assert run() == 0
    thinking = tmp_path / "thinking"
    shutil.move(tmp_path / "out", thinking)
    teacher = [] if own else ["--teacher", thinking]
    assert run("--model", thinking, *flag, *teacher) == 0
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.think == "never"
    text = torch.arange(1, 6)[None]
    output = model.generate(text, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert not output.thinks.any()
    before = QuietStarForCausalLM.from_pretrained(thinking)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.equal(model.mixing_head[0].weight, before.mixing_head[0].weight)  # no thought was trained
    assert (tmp_path / "out" / "checkpoint-4" / "teacher.safetensors").exists() == own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "16:8"], "stages must be like 16-8:50,12-4:50"),
        (["--stages", "2-0:4"], "lookahead in stages must be an integer >= 1, got 0"),
        (["--stages", "2-1:4", "--max_steps", 5], "max_steps must be 4, the steps of stages together, or left out"),
        (["--stages", "2-1:4", "--lookahead", 2], "lookahead must be left out with stages"),
        (["--stages", "2-1:4", "--distil"], "stages must be left out with distil"),
        (["--stages", "200000-1:4"], "max_position_embeddings = 131072, got 200000-1:4"),
        (["--stages", "131070-1:4"], "max_position_embeddings = 131072, got 131070-1:4 behind texts of 10"),
        (["--stages", "2-1:3,2-1:1", "--policy_updates", 2, "--clip_ratio", 0.2], "multiples of policy_updates = 2"),
        (["--advantage", "leave_one_out"], "num_thoughts must be at least 2 with advantage 'leave_one_out', got 1"),
        (["--policy_updates", 2], "clip_ratio must be a number with policy_updates 2, got None"),
        (["--anchor_choice", "entropy"], "anchors_per_text must be a number with anchor_choice 'entropy', got None"),
        (["--anchor_choice", "given"], "argument --anchor_choice"),
        (["--teacher_decay", 2], r"teacher_decay must be in \[0, 1\], got 2.0"),
        (["--clip_ratio", -1], "clip_ratio must be > 0, got -1.0"),
        (["--reward", "all"], "argument --reward"),
        (["--distil", "all"], "argument --distil"),
        (["--teacher", "none"], "teacher must be left out without baseline teacher, kl_weight or distil, got none"),
        (["--teacher", "none", "--distil"], "teacher must be the folder or hub name of a Quiet-STaR checkpoint"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_contradict_each_other(run, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unset = ["--thought_length"] if "--stages" in flags else []
    try:
        code = run(*flags, without=unset)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
