"""What is measured in the world, against one question after the other."""

import numpy as np
import pytest
import torch

from quietstar.quickstart.measures import (
    Answers,
    answer,
    answer_at_once,
    described_questions,
    measure,
    steps_right,
    steps_thought,
    think_where_unsure,
)
from quietstar.quickstart.table import question_lines, results_table
from quietstar.quickstart.world import Shares


@pytest.fixture
def held_out(world, tokenizer):
    return world.windows(tokenizer, 6, 40, Shares(0.4, 0.6), world.held_out, np.random.default_rng(0))


def of_the_right_answer(logits, exam, row):
    right = exam.steps[row, -1]
    return logits.argmax() == right, -logits.log_softmax(-1)[right]


def test_the_exam_is_the_held_out_questions(world, tokenizer, exam):
    for question, prompt, steps in zip(world.held_out, exam.prompts, exam.steps, strict=True):
        assert tokenizer.decode(prompt) == str(question)
        assert tokenizer.decode(steps) == " ".join(world.steps(question))


@torch.no_grad()
def test_answers_after_thoughts_and_at_once(model, exam):
    own = answer(model, exam, seed=3)
    assert torch.equal(own.thoughts, answer(model, exam, seed=3).thoughts)
    assert not torch.equal(own.thoughts, answer(model, exam, seed=4).thoughts)
    given = own.thoughts.flip(0)
    for answers, thoughts in ((own, own.thoughts), (answer(model, exam, given), given)):
        for row in range(0, len(thoughts), 10):
            output = model(exam.prompts[row, None], thought_tokens=thoughts[row, None, None, None], logits_to_keep=1)
            right, nll = of_the_right_answer(output.logits[0, 0], exam, row)
            assert answers.right[row] == right
            assert answers.nll[row] == pytest.approx(float(nll), rel=1e-4)
    at_once = answer_at_once(model, exam)
    generated = model.generate(exam.prompts, max_new_tokens=1, do_sample=False, think="never", pad_token_id=0)
    assert torch.equal(at_once.tokens, generated[:, -1])
    logits = model.lm_head(model.model(exam.prompts[:1]).last_hidden_state[0, -1])
    assert at_once.nll[0] == pytest.approx(float(of_the_right_answer(logits, exam, 0)[1]), rel=1e-4)
    assert at_once.thoughts.shape == (len(exam.prompts), 0)


def test_means_of_answers():
    right = torch.tensor([True, False, False, True, True])
    means = Answers(right, right, torch.tensor([0.0, 1, 2, 3, 4]), right[:, None]).means("_x")
    errors = [float(values.double().std()) / 5**0.5 for values in (right, torch.arange(5))]
    expected = {"accuracy_x": 0.6, "accuracy_x_error": errors[0], "nll_x": 2, "nll_x_error": errors[1]}
    assert means == pytest.approx(expected)


def test_thoughts_that_name_the_steps(exam):
    thoughts = exam.steps[:, :2].clone()
    assert steps_thought(exam, thoughts) == 1
    thoughts[: len(thoughts) // 4, 1] += 1
    assert steps_thought(exam, thoughts) == pytest.approx(0.75)
    longer = torch.cat([thoughts, thoughts], dim=1)
    assert steps_thought(exam, longer) == pytest.approx(0.75)


@torch.no_grad()
def test_steps_that_the_base_model_gets_right(base, exam, world, tokenizer):
    named = torch.tensor(tokenizer.convert_tokens_to_ids(world.people))
    heads = base.lm_head.weight[named]
    base.lm_head.weight.zero_()[named] = heads  # it says people, so that it is right now and then
    counts = torch.zeros(3)
    for question in world.held_out:
        first, second, last = world.steps(question)
        known = "---", f"--- {first}", f"--- {first} {second} ---"
        for i, (before, step) in enumerate(zip(known, (first, second, last), strict=True)):
            ids = torch.tensor([tokenizer(f"{question} {before}")["input_ids"]])
            counts[i] += tokenizer.decode(base(ids).logits[0, -1].argmax()) == step
    expected = counts / len(world.held_out)
    assert len(expected.unique()) == 3
    assert steps_right(base, exam, tokenizer) == pytest.approx(expected.tolist())


@torch.no_grad()
def test_everything_together(model, world, exam, tokenizer, held_out):
    results, own = measure(model, exam, held_out)
    assert results["accuracy_with"] == pytest.approx(float(own.right.double().mean()))
    assert results["accuracy_without"] == pytest.approx(float(answer_at_once(model, exam).right.double().mean()))
    assert len({results[f"nll_{kind}"] for kind in ("with", "without", "shuffled")}) == 3

    windows, answers = (torch.from_numpy(array) for array in held_out)
    torch.manual_seed(0)
    output = model(windows, labels=windows, thought_tokens=model.sample_thoughts(windows))
    others = ~answers[:, 1:]
    gains = (output.base_nll - output.talk_nll[:, 0, :, 0])[others]
    assert results["other_tokens_gain"] == pytest.approx(float(gains.mean()), rel=1e-3)
    assert results["mixing_weight_other_tokens"] == pytest.approx(
        float(output.mixing_weight[:, 0, :, 0][others].mean())
    )

    results |= {"questions": described_questions(world, exam, own, tokenizer), "people": 4}
    table = results_table(results | {"controls": [{"name": "control"} | own.means()]})
    assert table.count(f"{results['nll_with']:.3f} ± {results['nll_with_error']:.3f}") == 2
    assert f"{results['accuracy_shuffled']:.1%} ± {results['accuracy_shuffled_error']:.1%}" in table
    assert f"gain {results['other_tokens_gain']:+.4f} ± {results['other_tokens_gain_error']:.4f} nats" in table
    assert "chance is 25.0%, 1.386 nats" in table


@torch.no_grad()
def test_thinking_where_unsure(model, exam, held_out):
    windows = torch.from_numpy(held_out.tokens)
    model.lm_head.weight.mul_(0.4)  # so that the model is sure of some tokens
    result = think_where_unsure(model, exam, windows)
    logp = model.lm_head(model.model(windows).last_hidden_state[:, :-1]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert result["share"] == pytest.approx(float((entropy > 2).double().mean()))
    assert 0 < result["share"] < 1


def test_questions_are_shown_with_thought_and_answer():
    question = {"prompt": "Ann's boss is", "thought": "Eli", "said": "Kim", "answer": "Kim"}
    lines = question_lines([question, question | {"prompt": "Dora's aunt is", "answer": "Sue", "thought": "Hana"}])
    assert lines == [
        "Ann's boss is   thought: Eli   -> Kim",
        "Dora's aunt is  thought: Hana  -> Kim (wrong: Sue)",
    ]
