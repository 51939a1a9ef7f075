"""A saved folder loads where quietstar is installed and nobody has imported it, in transformers' own loaders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import word_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.cli import main
from quietstar.models.folder import AUTO_MAP

CODE = "modeling_quietstar.py"
PACKAGE = Path(__file__).parents[2]

# Runs where quietstar can be imported and was not; prints "OK" where all is as it should be.
ELSEWHERE = """
import sys
from threading import Thread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

folder = sys.argv[1]


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "quietstar":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refusal(**options):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


assert "quietstar" not in sys.modules
message = refusal()
assert message.startswith("ValueError") and "`trust_remote_code=True`" in message, message
sys.meta_path.insert(0, NotInstalled())
message = refusal(trust_remote_code=True)
assert message.startswith("ImportError") and "pip install quietstar" in message, message
sys.meta_path.pop(0)

pipe = pipeline("text-generation", folder, trust_remote_code=True)
options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
always, never = (pipe("the cat", think=think, **options)[0]["generated_text"] for think in ("always", "never"))
assert always != never, always
assert pipe("the cat", **options)[0]["generated_text"] == never  # what the folder says
streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True)
thread = Thread(target=pipe, args=("the cat",), kwargs={"think": "always", "streamer": streamer} | options)
thread.start()
assert "".join(streamer) == always
thread.join()

import quietstar

assert type(pipe.model) is quietstar.QuietStarForCausalLM
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is quietstar.QuietStarConfig
print("OK")
"""


@pytest.fixture
def folder(tmp_path):
    return word_model.save(tmp_path / "model")


def run_elsewhere(script, folder, tmp_path):
    """What ``script`` prints in a process of its own, offline."""
    settings = {
        "PYTHONPATH": f"{PACKAGE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # with which importing torch imports a part of quietstar
    }
    run = subprocess.run(
        [sys.executable, "-c", script, folder], env=os.environ | settings, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_it_loads_where_quietstar_was_not_imported(folder, tmp_path):
    model = QuietStarForCausalLM.from_pretrained(folder, think="never", thought_temperature=0.0)
    model.mixing_head[-1].weight.data *= 100  # so that thoughts change the text
    model.save_pretrained(folder)
    assert run_elsewhere(ELSEWHERE, folder, tmp_path).endswith("OK\n")


def test_what_a_folder_holds(folder):
    assert json.loads((Path(folder) / "config.json").read_text())["auto_map"] == AUTO_MAP
    names = {}
    exec(compile((Path(folder) / CODE).read_text(), CODE, "exec"), names)
    for auto_class, name in AUTO_MAP.items():
        module, _, class_name = name.partition(".")
        assert f"{module}.py" == CODE
        assert names[class_name] is {"AutoConfig": QuietStarConfig}.get(auto_class, QuietStarForCausalLM)


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_the_file_is_not_run_where_quietstar_was_imported(folder, options):
    (Path(folder) / CODE).write_text("raise RuntimeError('run')\n")
    assert type(AutoConfig.from_pretrained(folder, **options)) is QuietStarConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder, **options)) is QuietStarForCausalLM


def test_what_is_saved_again_names_no_other_folder_and_copies_no_code(folder, tmp_path):
    config = json.loads((Path(folder) / "config.json").read_text())
    config["auto_map"] = {name: f"somebody/model--{value}" for name, value in AUTO_MAP.items()}  # as from the hub
    (Path(folder) / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.register_for_auto_class("AutoModelForCausalLM")  # both as transformers does behind trust_remote_code
    model.config.register_for_auto_class()
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == [CODE]


def test_folders_of_before_load(folder):
    (Path(folder) / CODE).unlink()
    config = json.loads((Path(folder) / "config.json").read_text())
    ours = {"auto_map", "think", "draft_length", "base_model_name_or_path", "base_vocab_size"}
    (Path(folder) / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ours}))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.config.think, loaded.config.draft_length) == ("always", None)


def test_merged_adapters_are_saved_with_it(folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        QuietStarForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert type(again.get_base_model()) is QuietStarForCausalLM
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / CODE).is_file()


COMMANDS = {
    "generate": lambda folder, out: ["generate", "--model", folder, "--prompt", "the"],
    "export": lambda folder, out: ["export", folder, "--base", str(out)],
    "train": lambda folder, out: [
        "train", "--model", folder, "--data", str(out.with_suffix(".txt")), "--held_out_fraction", "0",
        "--output_dir", str(out),
    ],
}  # fmt: skip


def lose_a_shard(folder):
    QuietStarForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="3KB")
    (folder / "model.safetensors").unlink()
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    return lost.name


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(3)])
    tokenizer.save_pretrained(folder)
    return "tokenizer must be that of the model, whose vocabulary has 9 tokens, got one with token 9"


def move_thought_tokens(folder):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|startthought|>", "<|endthought|>"])
    tokenizer.save_pretrained(folder)
    config |= {"start_thought_token_id": 8, "end_thought_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    return r"tokenizer must be that of the model, where <\|startthought\|> is token 8, got token 7"


@pytest.mark.parametrize("damage", [lose_a_shard, add_tokens, move_thought_tokens])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_wrong_with_a_folder(folder, tmp_path, capsys, command, damage):
    (tmp_path / "out.txt").write_text("the cat\n")
    problem = damage(Path(folder))
    assert main(COMMANDS[command](folder, tmp_path / "out")) == 2
    assert re.search(problem, capsys.readouterr().err)
    if damage is lose_a_shard:
        for load in (QuietStarForCausalLM, AutoModelForCausalLM):
            with pytest.raises(OSError, match=problem):
                load.from_pretrained(folder)
