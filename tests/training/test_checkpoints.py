"""Which checkpoints are whole, and whose folder it is."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from quietstar.training.checkpoints import (
    check_output_dir,
    checkpoints,
    fault,
    last_whole,
    remove_checkpoints,
    to_resume,
)

FILES = "model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"


def write(folder, shards=False):
    """What the Trainer writes, as far as anyone looks at it."""
    folder.mkdir(parents=True)
    weights = {"weight": torch.ones(20, 20)}
    if shards:
        save_file(weights, folder / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": {"weight": "model-1.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(20)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))


@pytest.fixture
def output_dir(tmp_path):
    """Whole checkpoints of steps 2, 9 and 10, and what only looks like one."""
    folder = tmp_path / "run"
    for step in (10, 2, 9):
        write(folder / f"checkpoint-{step}")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-11").write_text("no folder")
    return folder


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def test_the_newest_is_that_of_the_last_step(output_dir, tmp_path):
    assert [folder.name for folder in checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert last_whole(output_dir).name == "checkpoint-10"
    assert to_resume("last", output_dir) == str(output_dir / "checkpoint-10")
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [None, 0, 0.1, 0.6, 0.99], ids=str)
def test_a_broken_one_is_passed_over_and_refused_by_name(output_dir, file, share):
    newest = output_dir / "checkpoint-10"
    if share is None:
        (newest / file).unlink()
    else:
        cut(newest / file, share)
    found = f"no {file}" if share is None else f"{file} is broken"
    assert fault(newest) == found
    assert to_resume("last", output_dir) == str(output_dir / "checkpoint-9")
    message = f"resume_from_checkpoint must be the folder of a checkpoint, got '{newest}': {found}; the last whole one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} is .*checkpoint-9$"):
        to_resume(newest, output_dir.parent)
    optional = file in ("optimizer.pt", "scheduler.pt", "rng_state.pth") and share is None
    assert (fault(newest, model_only=True) is None) == optional


def test_without_a_whole_one_each_says_why(output_dir, tmp_path):
    for folder in checkpoints(output_dir):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"without a whole checkpoint in .*run \(checkpoint-2: no optimizer.pt, check"):
        to_resume("last", output_dir)
    with pytest.raises(ValueError, match=r"must not be 'last' without a checkpoint in .*nowhere$"):
        to_resume("last", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"got '.*nowhere': no such folder$"):
        to_resume(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("broken", ["missing", "cut", "index"])
def test_shards_must_be_there(tmp_path, broken):
    folder = tmp_path / "checkpoint-1"
    write(folder, shards=True)
    assert fault(folder) is None
    if broken == "missing":
        (folder / "model-1.safetensors").unlink()
        assert fault(folder) == "no model-1.safetensors"
    else:
        file = folder / ("model-1.safetensors" if broken == "cut" else "model.safetensors.index.json")
        cut(file, 0.5)
        assert fault(folder) == f"{file.name} is broken"


def test_another_runs_folder_is_refused(output_dir, tmp_path):
    message = r"output_dir must not hold the checkpoints of another run, got checkpoint-2 to checkpoint-10 in .*: go on"
    elsewhere = tmp_path / "other" / "checkpoint-1"
    write(elsewhere)
    for resume in (None, str(elsewhere)):
        with pytest.raises(ValueError, match=message):
            check_output_dir(output_dir, resume, overwrite=False)
    check_output_dir(output_dir, str(output_dir / "checkpoint-2"), overwrite=False)
    check_output_dir(output_dir, None, overwrite=True)
    check_output_dir(tmp_path / "new", None, overwrite=False)
    with pytest.raises(ValueError, match="overwrite_output_dir cannot be used together with resume_from_checkpoint"):
        check_output_dir(output_dir, str(output_dir / "checkpoint-2"), overwrite=True)
    with pytest.raises(ValueError, match="output_dir must be a folder, got a file"):
        check_output_dir(output_dir / "checkpoint-11", None, overwrite=False)


def test_only_checkpoints_are_removed(output_dir):
    remove_checkpoints(output_dir)
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-11", "checkpoint-best"]


def test_the_trainer_goes_on_from_its_last_whole_checkpoint(make_model, make_trainer):
    arguments = {"max_steps": 4, "save_steps": 1}
    whole, resumed = make_model(), make_model()
    trainer = make_trainer(whole, **arguments)
    trainer.train()
    folders = checkpoints(trainer.args.output_dir)
    assert [fault(folder) for folder in folders] == [None] * 4
    cut(folders[3] / "model.safetensors", 0.5)
    (folders[2] / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no trainer_state\.json; the last whole one is .*checkpoint-2"):
        make_trainer(resumed, **arguments).train(resume_from_checkpoint=str(folders[2]))
    make_trainer(resumed, **arguments).train(resume_from_checkpoint=True)
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert [fault(folder) for folder in checkpoints(trainer.args.output_dir)] == [None] * 4
