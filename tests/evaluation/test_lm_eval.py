"""The model class of lm-eval, against single passes over single texts."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import character_model
import pytest
import torch

from quietstar.evaluation import held_out_nll

pytest.importorskip("lm_eval")
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from quietstar.evaluation.lm_eval import QuietStarLM

PAIRS = [
    ("Kim is", " in"),
    ("Kim is", " out."),
    ("Where was Sue on Monday?\nA:", " at home"),
    ("Ann", " "),
    ("", "No."),
]


@pytest.fixture
def tokenizer():
    return character_model.make_tokenizer()


@pytest.fixture
def make(tokenizer):
    def make(think="always", batch_size=1, fields=None, **options):
        model = character_model.make_model(**fields or {})
        return QuietStarLM(model, tokenizer=tokenizer, think=think, batch_size=batch_size, **options)

    return make


def requests(*arguments, kind="loglikelihood"):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def logprobs(model, tokens, think="always"):
    """Of all tokens but the first, by a pass over this text alone; thoughts are greedy."""
    windows = torch.tensor([tokens])
    nll = held_out_nll(model, windows)
    with torch.no_grad():
        logits = model.lm_head(model.model(windows[:, :-1]).last_hidden_state)
        logits[..., list(model.config.thought_token_ids)] = -torch.inf
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    thinks = entropy > {"always": -1, "never": 99}.get(think, think)
    return -torch.where(thinks, nll.mixed, nll.base)[0]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("think", ["always", "never", 3.0])
def test_loglikelihoods_are_those_of_the_model(make, tokenizer, think, batch_size):
    """Unbatched as batched, with an empty context too."""
    lm = make(think, batch_size)
    answers = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, answers, strict=True):
        before, behind = (tokenizer(text)["input_ids"] for text in (context or "<eos>", continuation))
        wanted = logprobs(lm.model, before + behind, think)[-len(behind) :]
        assert logprob == pytest.approx(float(wanted.sum()), rel=1e-4)
        assert not greedy
    assert len({round(float(logprobs(lm.model, [5, 6, 7, 8], t).sum()), 3) for t in ("always", "never", 3.0)}) > 1


def test_what_generate_says_is_greedy(make, tokenizer):
    lm = make()
    inputs = tokenizer("Kim is", return_tensors="pt")["input_ids"]
    said = tokenizer.decode(lm.model.generate(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 6:])
    [(_, greedy), (_, other)] = lm.loglikelihood(requests(("Kim is", said), ("Kim is", said[:-1] + "~")))
    assert greedy
    assert not other


def test_choices_are_compared_after_the_same_thoughts(make):
    """Alone or beside others, with thoughts that are drawn."""
    lm = make(fields={"thought_temperature": 1.0}, batch_size=2)
    choices = [("Kim is i", letter) for letter in "nstz"]
    together = lm.loglikelihood(requests(*choices))
    assert together == [lm.loglikelihood(requests(choice))[0] for choice in choices]


def test_the_seed_decides_and_nothing_else_is_touched(make):
    lms = [make(fields={"thought_temperature": 1.0}, seed=seed) for seed in (0, 0, 1)]
    state = torch.random.get_rng_state()
    first, again, other = (lm.loglikelihood(requests(*PAIRS)) for lm in lms)
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lms[0].loglikelihood(requests(*PAIRS)) == first  # not what was drawn before


@pytest.mark.parametrize("think", ["always", "never"])
@pytest.mark.parametrize("text", ["Short.", "x" * 16, "The cat sat on a mat, and so did the other cat."])
def test_long_texts_are_read_in_windows(make, tokenizer, think, text):
    """Every token once: behind up to 16 others, the last window as full as the others."""
    lm = make(think, batch_size=2, fields={"max_position_embeddings": 16})
    [total] = lm.loglikelihood_rolling(requests((text,), kind="loglikelihood_rolling"))
    tokens = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 17, 16)]
    rest = (len(tokens) - 1) - 16 * len(windows)
    wanted = [logprobs(lm.model, window, think) for window in windows]
    wanted.append(logprobs(lm.model, tokens[-17:], think)[-rest:])
    assert sum(map(len, wanted)) == len(text)
    assert total == pytest.approx(float(torch.cat(wanted).sum()), rel=1e-4)


def test_long_contexts_are_cut_on_the_left_and_it_is_said(make, tokenizer, caplog):
    lm = make(fields={"max_position_embeddings": 16})
    [(logprob, _)] = lm.loglikelihood(requests(("The cat sat on a mat", " too.")))
    tokens = tokenizer("The cat sat on a mat too.")["input_ids"]
    assert logprob == pytest.approx(float(logprobs(lm.model, tokens[-17:])[-5:].sum()), rel=1e-4)
    assert "1 of 1 contexts are cut on the left, to max_length = 16" in caplog.text
    with pytest.raises(ValueError, match="continuations must have 1 to max_length = 16 tokens, got 17"):
        lm.loglikelihood(requests(("The", "x" * 17)))


@pytest.mark.parametrize("options", [{}, {"draft_length": 3}, {"draft_length": "auto", "batch_size": 2}], ids=str)
@pytest.mark.parametrize("think", ["always", "never", 3.0])
def test_generates_until_a_stop(make, tokenizer, think, options):
    lm = make(think, **options)
    prompts = ["Kim is", "Where was Sue on Monday?\nA:", "Ann"]
    said = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = lm.model.generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, think=think)[0]
        said[prompt] = tokenizer.decode(output[inputs.shape[1] :], skip_special_tokens=True)
    stop = said["Ann"][2:4]
    settings = {"until": [stop], "max_gen_toks": 8}
    texts = lm.generate_until(requests(*((prompt, dict(settings)) for prompt in prompts), kind="generate_until"))
    assert texts == [text.split(stop)[0] for text in said.values()]


def test_thinks_as_the_model_says_unless_told_otherwise(tokenizer):
    model = character_model.make_model(think="never")
    model.generation_config.draft_length = 3
    lm = QuietStarLM(model, tokenizer=tokenizer)
    assert (lm.think, lm.draft_length) == ("never", 3)
    told = QuietStarLM(model, tokenizer=tokenizer, think=2.0, draft_length=None)
    assert (told.think, told.draft_length) == (2.0, None)


def test_finds_the_batch_size(make):
    lm = make(batch_size="auto", max_batch_size=4, fields={"max_position_embeddings": 32})
    assert [answer for answer, _ in lm.loglikelihood(requests(*PAIRS[:2]))] == pytest.approx(
        [answer for answer, _ in make().loglikelihood(requests(*PAIRS[:2]))], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "often"}, "think must be 'always', 'never' or a threshold in nats >= 0, got 'often'"),
        ({"draft_length": 0}, "draft_length must be None, 'auto' or an integer >= 1, got 0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
        ({"peft": "adapter"}, "peft must be left out, got adapter"),
        ({"pretrained": torch.nn.Linear(1, 1)}, "pretrained must be a name or a QuietStarForCausalLM, got Linear"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QuietStarLM(**{"pretrained": "nowhere"} | options)


PEOPLE = ["Ann", "Ben", "Cem"]


@pytest.fixture
def task_folder(tmp_path):
    """A task of ten questions to choose answers of and one to say them; JSON is YAML."""
    rows = [{"question": f"{i}. Who is it?", "answer": PEOPLE[i % 3]} for i in range(10)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{question}}",
    }  # fmt: skip
    choose = {"output_type": "multiple_choice", "doc_to_choice": PEOPLE, "doc_to_target": "answer"}
    say = {"output_type": "generate_until", "doc_to_target": "answer", "generation_kwargs": {"max_gen_toks": 4}}
    read = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}} {{answer}}", "doc_to_text": ""}
    for name, task in {"choose": choose, "say": say, "read": read}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | task | {"task": f"people_{name}"}))
    return tmp_path


def command(model, tasks, output):
    return [
        *("--model", "quietstar", "--model_args", f"pretrained={model},think=always,draft_length=8"),
        *("--tasks", "people_choose,people_say,people_read", "--include_path", str(tasks), "--device", "cpu"),
        *("--batch_size", "4", "--output_path", str(output)),
    ]


def check_results(folder: Path):
    results = json.loads(next(folder.rglob("results_*.json")).read_text())["results"]
    assert results["people_choose"]["sample_len"] == results["people_say"]["sample_len"] == 10
    assert 0 <= results["people_choose"]["acc,none"] <= 1
    assert results["people_read"]["word_perplexity,none"] > 1


@pytest.mark.slow
def test_ten_questions_by_the_command(tmp_path, task_folder, monkeypatch):
    model = character_model.save(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command(model, task_folder, tmp_path / "out")])
    cli_evaluate()
    check_results(tmp_path / "out")


def test_lm_eval_keeps_its_own_models():
    """Told before it has looked for them."""
    code = """
import sys, lm_eval.api.registry
from quietstar.lm_eval_plugin import register
register(), register()
print(*(lm_eval.api.registry.get_model(name).__name__ for name in ("hf", "quietstar")))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["HFLM", "QuietStarLM"]


@pytest.mark.slow
def test_lm_eval_finds_the_model_by_itself(tmp_path, task_folder):
    if "quietstar" not in metadata.entry_points(group="torch.backends").names:
        pytest.skip("a checkout that is not installed has no entry points")
    script = Path(sys.executable).with_name("lm_eval")
    model = character_model.save(tmp_path / "model")
    subprocess.run([script, *command(model, task_folder, tmp_path / "out")], check=True, cwd=tmp_path)
    check_results(tmp_path / "out")


def test_the_model_is_registered():
    assert get_model("quietstar") is QuietStarLM
