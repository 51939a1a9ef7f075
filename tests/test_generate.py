"""The command ``quietstar generate``."""

import json
import re
import shutil

import pytest
import word_model
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.cli import main

WORDS = set(word_model.WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return word_model.save(tmp_path_factory.mktemp("model"))


def run(capsys, *arguments):
    code = main(["generate", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("options", [[], ["--stream"], ["--draft_length", "2", "--stream"]], ids=" ".join)
def test_continues_the_prompt(folder, capsys, options):
    code, out, err = run(capsys, "--model", folder, "--prompt", "the cat", "--max_new_tokens", "5", *options)
    assert code == 0
    assert out.startswith("the cat")
    assert len(out.split()) == 7
    assert set(out.split()) <= WORDS
    assert ("drafts accepted" in err) == ("--draft_length" in options)


def test_thinks_as_the_model_says_unless_told_otherwise(folder, tmp_path, capsys):
    quiet = tmp_path / "quiet"
    shutil.copytree(folder, quiet)
    QuietStarForCausalLM.from_pretrained(folder, think="never", draft_length=2).save_pretrained(quiet)
    options = ["--model", str(quiet), "--prompt", "the cat", "--max_new_tokens", "4", "--json"]
    said = {think: json.loads(run(capsys, *options, *think)[1]) for think in ((), ("--think", "always"))}
    assert [statistics["thought_share"] for statistics in said.values()] == [0, 1]
    assert said[()]["acceptance_rate"] == 1  # of the drafts of a model that does not think


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=" ".join)
def test_shows_a_thought_for_every_token(folder, capsys, stream):
    options = [
        *["--model", folder, "--prompt", "the cat", "--max_new_tokens", "5", "--temperature", "1", "--show-thoughts"],
        *stream,
    ]
    code, out, _ = run(capsys, *options)
    *lines, empty, text = out.splitlines()
    assert (code, empty) == (0, "")
    tokens = []
    for line in lines:
        token, thought = re.fullmatch(
            r"'(.+)' +weight [+-]\d\.\d{3}  gain [+-]\d\.\d{3}  thought '(.+)'", line
        ).groups()
        assert {token, *thought.split()} <= WORDS
        tokens.append(token)
    assert text.split() == ["the", "cat", *tokens]
    assert len(tokens) == 5
    assert run(capsys, *options)[1] == out  # the same seed, the same text
    assert run(capsys, *options, "--seed", "1")[1] != out


def test_a_terminal_shows_thoughts_dimmed(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    options = ["--model", folder, "--prompt", "the cat", "--max_new_tokens", "2", "--show-thoughts"]
    assert run(capsys, *options)[1].count("\033[2mweight") == 2


def test_thinks_where_it_is_told_to(folder, capsys):
    options = ["--model", folder, "--prompt", "the cat", "--max_new_tokens", "5", "--show-thoughts", "--think"]
    _, never, err = run(capsys, *options, "never")
    assert never.count("no thought") == 5
    assert err == "a thought in front of 0% of 5 tokens\n"
    _, out, err = run(capsys, *options, "0")
    assert "no thought" not in out
    assert err == ""


def test_thinks_where_it_has_learned_to(folder, tmp_path, capsys):
    model = QuietStarForCausalLM.from_pretrained(folder, gain_weight=1.0)
    model.gain_head[-1].bias.data.fill_(0.5)  # nats, everywhere
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--prompt", "the cat", "--max_new_tokens", "5", "--think", "learned", "--json"]
    for flags, share in ((["--gain_threshold", "0.6"], 0), (["--gain_threshold", "-1"], 1), ([], 1)):
        assert json.loads(run(capsys, *options, *flags)[1])["thought_share"] == share
    code, _, err = run(capsys, *options[:-3], "--gain_threshold", "0")
    assert (code, "think must be 'learned' with gain_threshold 0.0, got 'always'" in err) == (2, True)


def test_thinks_what_it_is_told_to(folder, capsys):
    options = ["--model", folder, "--prompt", "the cat", "--max_new_tokens", "5", "--show-thoughts", "--thoughts"]
    assert run(capsys, *options, "mat sat")[1].count("thought 'mat sat'") == 5
    thoughts = [re.findall("thought '(.*)'", run(capsys, *options, "random", "--seed", seed)[1]) for seed in "001"]
    assert len(set(thoughts[0])) > 1
    assert thoughts[0] == thoughts[1] != thoughts[2]


def test_json(folder, capsys):
    options = [
        *["--model", folder, "--prompt", "the cat", "--max_new_tokens", "4", "--json", "--thought_temperature", "0"],
        *["--draft_length", "2"],
    ]
    whole = json.loads(run(capsys, *options)[1])
    assert whole.keys() == {"text", "steps", "thought_share", "acceptance_rate"}
    assert whole["text"].split() == ["the", "cat", *(step["text"] for step in whole["steps"])]
    assert whole["thought_share"] == 1
    for step in whole["steps"]:
        assert step.keys() == {"token", "text", "thought", "mixing_weight", "base_logprob", "logprob"}
        assert set(step["thought"].split()) <= WORDS
    *steps, summary = map(json.loads, run(capsys, *options, "--stream")[1].splitlines())
    assert steps == whole.pop("steps")
    assert summary == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt must hold at least one token, got ''"),
        (["--prompt", "the", "--max_new_tokens", "0"], "--max_new_tokens must be an integer in [1, 1000000], got 0"),
        (
            ["--prompt", "the", "--max_new_tokens", "9" * 20],
            "--max_new_tokens must be an integer in [1, 1000000], got 99",
        ),
        (["--prompt", "the", "--temperature", "nan"], "--temperature must be >= 0, got nan"),
        (["--prompt", "the", "--temperature", "inf"], "--temperature must be finite, got inf"),
        (["--prompt", "the", "--top_p", "0"], "--top_p must be in (0, 1], got 0.0"),
        (["--prompt", "the", "--top_p", "nan"], "--top_p must be in (0, 1], got nan"),
        (["--prompt", "the", "--top_k", "0"], "--top_k must be an integer >= 1, got 0"),
        (["--prompt", "the", "--thought_temperature", "nan"], "--thought_temperature must be >= 0, got nan"),
        (["--prompt", "the", "--seed", "-1"], "--seed must be an integer in [0, 4294967295], got -1"),
        (
            ["--prompt", "the", "--think", "nan"],
            "--think must be 'always', 'never' or a threshold in nats >= 0, got nan",
        ),
        (
            ["--prompt", "the", "--think", "learned"],
            "for it to have the gain head of think='learned', got a model without",
        ),
        (["--prompt", "the", "--gain_threshold", "nan"], "--gain_threshold must be a finite number of nats, got nan"),
        (["--prompt", "the", "--temperature", "-1"], "--temperature must be >= 0, got -1.0"),
        (["--prompt", "the", "--thought_temperature", "-1"], "thought_temperature must be >= 0, got -1.0"),
        (["--prompt", "the", "--model", "./nowhere"], "cannot load --model ./nowhere"),
        (["--prompt", "the", "--draft_length", "0"], "draft_length must be None, 'auto' or an integer >= 1, got 0"),
        (["--prompt", "the", "--think", "-1"], "think must be 'always', 'never' or a threshold in nats >= 0, got -1.0"),
        (["--prompt", "the", "--thoughts", ""], "--thoughts must hold at least one token, got ''"),
        (["--prompt", "the", "--thoughts", "shuffled"], "thoughts must not be 'shuffled' with a single prompt"),
        (["--prompt", "the", "--thoughts", "a", "--think", "never"], "thoughts must be left out with think='never'"),
        (["--prompt", "the cat " * 20], "input_ids must have at most max_position_embeddings = 32 tokens, got 40"),
    ],
)
def test_bad_input_is_named(folder, capsys, arguments, message):
    code, _, err = run(capsys, "--model", folder, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("option", "value"), [("--draft_length", "four"), ("--think", "often")])
def test_a_word_that_is_not_known_is_named(folder, capsys, option, value):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(capsys, "--model", folder, "--prompt", "the", option, value)
    assert f"argument {option}: invalid" in capsys.readouterr().err
