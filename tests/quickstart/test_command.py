"""``quietstar quickstart``: tiny models from beginning to end, and the real one."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer, MistralForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.report.text_page import signed

FIGURES = ["Gain by difficulty", "Weight of the thoughts", "Training"]


def quickstart(folder, *options):
    return main(["quickstart", "--output_dir", str(folder), *map(str, options)])


def load(folder):
    return QuietStarForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")


def test_from_nothing_to_a_model_that_generates_and_trains_on(tmp_path, capsys):
    folder, threads = tmp_path / "quickstart", torch.get_num_threads()
    assert quickstart(folder, "--tiny") == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    for row in ("without thoughts", "after a thought", "after another question's thought"):
        assert re.search(rf"{row} +\d+\.\d% ± \d+\.\d%  +\d+\.\d{{3}} ± \d+\.\d{{3}}\n", output), row
    assert output.count("  thought: ") == 8

    results = json.loads((folder / "results.json").read_text())
    names = [f"accuracy_{kind}" for kind in ("with", "without", "shuffled")]
    names += ["nll_with", "nll_without", "other_tokens_gain", "seconds"]
    assert all(isinstance(results[name], float) for name in names)
    model, tokenizer = load(folder)
    assert model.config.thought_length == 2
    assert model.mixing_head[-1].weight.any()  # it was trained
    assert MistralForCausalLM.from_pretrained(folder / "base").config.vocab_size == len(tokenizer) - 2
    for question in results["questions"]:
        assert len(tokenizer(question["answer"])["input_ids"]) == 1
        assert question["prompt"] in output or question not in results["questions"][:8]

    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<dd>quietstar quickstart --output_dir {folder} --tiny</dd>" in page
    assert f"The report is {folder / 'report.html'}" in output
    assert re.findall(r"<figure><h3>(.*?)</h3>", page) == FIGURES
    history = json.loads((folder / "model" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "talk_nll_0" in log] == [1, 2, 3, 4]

    prompt = results["questions"][0]["prompt"]
    assert f'--prompt "{prompt}" --show-thoughts' in output
    assert main(["generate", "--model", str(folder / "model"), "--prompt", prompt, "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith(prompt)
    text = tmp_path / "more.txt"
    text.write_text(f"{prompt} Ann.\n\n" * 40)
    more = [
        "--data",
        text,
        "--output_dir",
        tmp_path / "more",
        "--block_size",
        16,
        "--max_steps",
        1,
        "--report_to",
        "none",
    ]
    assert main(["train", "--model", str(folder / "model"), *map(str, more)]) == 0

    assert quickstart(folder, "--tiny") == 2
    assert "--output_dir must be new or empty" in capsys.readouterr().err


def test_controls_and_other_worlds(tmp_path, capsys):
    assert quickstart(tmp_path / "new", "--tiny", "--controls", "--hops", 2, "--seed", 2**32 - 1) == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["questions"][0]["prompt"].count("'s") == results["hops"] == 2
    names = [control["name"] for control in results["controls"]]
    assert [name for name in names if "length" in name] == [f"trained with thoughts of length {k}" for k in (0, 2, 3)]
    assert len(names) == 7
    table = capsys.readouterr().out
    for control in results["controls"]:
        assert re.search(rf"{control['name']} +{control['accuracy']:.1%} ± ", table)
    assert load(tmp_path / "new")[0].config.thought_length == 1
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<figure><h3>(.*?)</h3>", page) == [FIGURES[0], "Thought length", *FIGURES[1:]]
    assert all(f'<th scope="row">{name}<' in page for name in names)


@pytest.mark.parametrize("own", [False, True])
def test_on_text(tmp_path, capsys, own):
    source = "stdlib"
    if own:
        source = tmp_path / "text"
        source.mkdir()
        for i in range(40):
            (source / f"{i}.txt").write_text("".join(f'The "{j}" of $HOME is {i * j}.\n' for j in range(60)))
    assert quickstart(tmp_path / "new", "--tiny", "--text", source) == 0
    output = capsys.readouterr().out
    for row in ("before Quiet-STaR", "without thoughts", "after a thought", "gain of the thought"):
        assert re.search(rf"{row} +-?\d+\.\d{{4}} ± \d+\.\d{{4}} +-?\d+\.\d{{4}} ± \d+\.\d{{4}}\n", output), row
    assert "may not help" in output
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<figure><h3>(.*?)</h3>", page) == FIGURES
    assert "model from before Quiet-STaR, so that no prediction" in page
    gain = re.search(r"gain of the thought +(-?[\d.]+) ± ([\d.]+)", output)
    assert signed(float(gain[1])) + f" ± {gain[2]}" in page
    assert len(re.findall(r"weight [+-]\d\.\d{3}  gain [+-]\d\.\d{3}  thought '", output)) == 24
    if own:
        assert r'--prompt "The \"0\" of \$HOME is 0." --show-thoughts' in output
    _, tokenizer = load(tmp_path / "new")
    assert tokenizer.convert_ids_to_tokens(list(load(tmp_path / "new")[0].config.thought_token_ids)) == [
        "<|startthought|>", "<|endthought|>"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere"], "text must be 'stdlib', or a file or folder of two texts at least, got nowhere"),
        (["--text", "stdlib", "--hops", "2"], "--hops and --controls belong to the world of questions"),
        (["--seed", "-1"], "--seed must be an integer in [0, 4294967295], got -1"),
        (["--seed", "4294967296"], "--seed must be an integer in [0, 4294967295], got 4294967296"),
        (["--text", "stdlib", "--controls"], "--hops and --controls belong to the world of questions"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, options, message):
    assert quickstart(tmp_path / "new", "--tiny", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thinking_helps(tmp_path, seed):
    assert quickstart(tmp_path / "new", "--seed", seed) == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["accuracy_with"] >= 0.9
    assert results["accuracy_without"] <= 0.1
    assert results["accuracy_shuffled"] <= 0.1
    assert results["nll_with"] < 0.5 < 2.9 < results["nll_without"]
    assert abs(results["other_tokens_gain"]) <= 0.002
    assert results["accuracy_think_above_2"] >= results["accuracy_with"] - 0.03
    assert results["share_think_above_2"] <= 0.3

    # What the saved model generates is as often right.
    model, tokenizer = load(tmp_path / "new")
    questions = results["questions"]
    inputs = tokenizer([question["prompt"] for question in questions], return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(1)
    said = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1]
    right = [token == tokenizer.convert_tokens_to_ids(q["answer"]) for token, q in zip(said, questions, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["accuracy_with"], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("hops", [2, 4])
def test_thinking_helps_in_other_worlds(tmp_path, hops):
    assert quickstart(tmp_path / "new", "--hops", hops) == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["accuracy_with"] >= 0.9
    assert results["accuracy_without"] <= 0.15
