"""The quickstart's model asked in every way there is: all of them agree on how often it is right."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.cli import main
from quietstar.evaluation import score
from quietstar.quickstart.world import PEOPLE

pytestmark = pytest.mark.slow
SCORED = 200  # questions whose 20 choices are scored one by one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "new"
    assert main(["quickstart", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def questions(folder):
    return json.loads((folder / "results.json").read_text())["questions"]


def by_score(folder, questions, think):
    """Which of all people has the highest log p."""
    model, tokenizer = QuietStarForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for question in questions[:SCORED]:
        scores = [score(model, tokenizer, f"{question['prompt']} {person}") for person in PEOPLE]
        logprobs = [x.base_logprobs[-1] if think == "never" else x.logprobs[0, -1] for x in scores]
        right += PEOPLE[int(torch.stack(logprobs).argmax())] == question["answer"]
    return right / SCORED, SCORED


def by_generate(folder, questions, think):
    model, tokenizer = QuietStarForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([question["prompt"] for question in questions], return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(1)
    said = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, think=think)[:, -1]
    right = [tokenizer.decode(token) == question["answer"] for token, question in zip(said, questions, strict=True)]
    return sum(right) / len(right), len(right)


def by_evaluate(folder, questions, think, measure):
    rows = [{"question": question["prompt"], "answer": question["answer"]} for question in questions]
    data, output = folder / "questions.jsonl", folder / "evaluated.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "qa", "--data", data, "--think", think, "--samples", 3, "--batch_size", 100, "--overwrite"]
    assert main(["evaluate", "--model", str(folder), "--output", str(output), *map(str, options)]) == 0
    return json.loads(output.read_text())[measure], len(rows)


def by_lm_eval(folder, questions, think, kind):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate

    from quietstar.evaluation.lm_eval import QuietStarLM

    task = {
        "task": "people", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}",
        "dataset_kwargs": {"data_files": {"test": str(folder / "asked.jsonl")}},
        "doc_to_target": "answer", "output_type": kind,
    }  # fmt: skip
    task |= {"doc_to_choice": PEOPLE} if kind == "multiple_choice" else {}
    task |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 1}} if kind == "generate_until" else {}
    (folder / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    model = QuietStarLM(str(folder), think=think, draft_length=8, batch_size=50, device="cpu")
    results = simple_evaluate(model, tasks=[task], bootstrap_iters=0)["results"]["people"]
    return results["acc,none" if kind == "multiple_choice" else "exact_match,none"], len(questions)


WAYS = {
    "score": by_score,
    "generate": by_generate,
    "evaluate, exact match": lambda *asked: by_evaluate(*asked, "exact_match"),
    "evaluate, probability": lambda *asked: by_evaluate(*asked, "answer_probability"),
    "evaluate, samples": lambda *asked: by_evaluate(*asked, "sampled"),
    "lm-eval, choices": lambda *asked: by_lm_eval(*asked, "multiple_choice"),
    "lm-eval, generated": lambda *asked: by_lm_eval(*asked, "generate_until"),
}


@pytest.mark.parametrize("think", ["always", "never", 2.0])
def test_every_way_of_asking_gives_the_same_accuracy(folder, questions, think):
    name = {"never": "accuracy_without"}.get(think, "accuracy_with")
    wanted = json.loads((folder / "results.json").read_text())[name]
    ways = {way: ask for way, ask in WAYS.items() if not (way == "score" and think == 2.0)}
    measured = {way: ask(folder / "model", questions, think) for way, ask in ways.items()}
    print({way: f"{accuracy:.4f} of {count}" for way, (accuracy, count) in measured.items()})
    for way, (accuracy, count) in measured.items():
        error = math.sqrt(max(wanted * (1 - wanted), 0.01) / count)
        assert accuracy == pytest.approx(wanted, abs=3 * error), way
