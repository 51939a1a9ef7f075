"""Training on two processes, on the engines people use: losses, checkpoints and resuming are those of one process."""

import json
import os
import socket
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainingArguments
from two_processes import new_model, run_on_two, texts

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.training import NonFiniteError
from quietstar.training.data import collate_windows

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]


def new_trainer(folder, batch_size, fields=None, **arguments):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, learning_rate=1e-3, max_steps=4, save_steps=2,
        logging_steps=1, eval_strategy="steps", eval_steps=4, use_cpu=True, disable_tqdm=True, report_to=[],
        **arguments,
    )  # fmt: skip
    windows = [{"input_ids": row} for row in texts(24).numpy()]
    return QuietStarTrainer(
        new_model(**fields or {}),
        arguments,
        train_dataset=windows,
        eval_dataset=windows[:4],
        data_collator=collate_windows,
    )


def ddp(folder, fields):
    return new_trainer(folder, 2, fields)


def fsdp(state_dict_type):
    """FSDP2 by accelerate, which has it on accelerators only: it is told that there is one."""

    def start(folder, fields):
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        trainer = new_trainer(folder, 2, fields)
        state = trainer.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=state_dict_type
        )
        trainer.is_fsdp_enabled = True
        return trainer

    return start


def deepspeed(stage):
    def start(folder, fields):
        settings = {
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 0,  # otherwise so small weights are not sharded
            },
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "zero_allow_untested_optimizer": True,
        }
        return new_trainer(folder, 2, fields, deepspeed=settings)

    return start


WAYS = {
    "DDP": ddp,
    "FSDP2, whole checkpoints": fsdp("FULL_STATE_DICT"),
    "FSDP2, sharded checkpoints": fsdp("SHARDED_STATE_DICT"),
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3),
}


def values(trainer):
    """What was logged by step, but for what depends on the time or on how a batch is split."""
    left_out = "epoch", "tokens_per_second", "distinct_thoughts"
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [{"eval_loss": entry["eval_loss"]} for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{name: entry[name] for name in entry if name not in left_out} for entry in steps] + losses


def train(rank, way, folder, port, resume, fields):
    """One of two processes; the first writes down what was logged."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    trainer = WAYS[way](folder, fields)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder / "model")
    if rank == 0:
        (folder / "logged.json").write_text(json.dumps(values(trainer)))
    if rank == 1:  # of its part of a weight, all processes are to know
        with torch.no_grad():
            weight = trainer.model.lm_head.weight
            part = getattr(weight, "ds_tensor", weight)  # DeepSpeed's
            (part.to_local() if hasattr(part, "to_local") else part).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight is not finite after step 4"):
        trainer.save_model(folder / "poisoned")
    dist.destroy_process_group()


def train_on_two(way, folder, resume=None, fields=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_on_two(train, way, folder, port, resume, fields)
    return json.loads((folder / "logged.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process with the batch of both."""
    trainer = new_trainer(tmp_path_factory.mktemp("single"), 4)
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", ["DDP", "FSDP2, whole checkpoints", "FSDP2, sharded checkpoints"])
def test_two_processes_have_the_teacher_of_one(way, tmp_path):
    """It is the moving average of the weights, and what rewards are compared with. All anchors are chosen."""
    fields = {"baseline": "teacher", "kl_weight": 0.1, "teacher_decay": 0.5, "anchors_per_text": 10}
    single = new_trainer(tmp_path / "single", 4, fields)
    single.train()
    logged = train_on_two(way, tmp_path / "two", fields=fields)
    for actual, expected in zip(logged, values(single), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    teachers = [load_file(tmp_path / run / "checkpoint-4" / "teacher.safetensors") for run in ("single", "two")]
    assert teachers[0].keys() == teachers[1].keys()
    for name, expected in teachers[0].items():
        assert (teachers[1][name] - expected).norm() <= 1e-4 * expected.norm(), name
    assert train_on_two(way, tmp_path / "two", str(tmp_path / "two" / "checkpoint-2"), fields) == logged


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_does(way, single, tmp_path):
    if way.startswith("ZeRO") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    logged = train_on_two(way, tmp_path)
    for actual, expected in zip(logged, values(single), strict=True):
        loss = "loss" if "loss" in expected else "eval_loss"
        assert actual[loss] == pytest.approx(expected[loss], rel=1e-5)
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "model")
    for (name, actual), expected in zip(model.named_parameters(), single.model.parameters(), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm(), name
    # The end of the run once more, from its middle.
    assert train_on_two(way, tmp_path, str(tmp_path / "checkpoint-2")) == logged
