"""What a model writes behind questions, and when it counts."""

import pytest
from star_questions import FORM, SAID, SAID_WITH_HINT
from transformers import AutoModelForCausalLM, AutoTokenizer

from quietstar.star import Problem, Rationale, Writer, problems_of


@pytest.fixture
def model(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder)


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def make_writer(tokenizer, examples):
    return lambda **options: Writer(tokenizer, FORM, examples, **{"max_new_tokens": 8, "batch_size": 3} | options)


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_rationales_without_and_with_hints(make_writer, model, tokenizer, task, batch_size):
    """Questions are of different lengths, so that batches are padded."""
    writer, problems = make_writer(batch_size=batch_size), problems_of(task, FORM)
    written = writer.write(model, problems, task)
    assert [rationale.text for rationale in written] == [said.removesuffix(".") for said in SAID]
    assert [tokenizer.decode(rationale.tokens) for rationale in written] == SAID
    assert [rationale.answer for rationale in written] == ["Cem", "Fay", None, None]  # Ian and Ned answer nothing here
    hinted = writer.write(model, problems, task, hints=True)
    assert [rationale.text + "." for rationale in hinted] == SAID_WITH_HINT
    assert [rationale.answer for rationale in hinted] == ["Cem", "Fay", "Jo", None]


@pytest.mark.parametrize(("most", "answer"), [(4, None), (5, "Cem")])
def test_an_answer_counts_when_the_text_has_come_to_its_end(make_writer, model, task, most, answer):
    problem = problems_of(task, FORM)[:1]
    assert make_writer(max_new_tokens=most).write(model, problem, task)[0].answer == answer


def test_the_end_of_text_token_ends_it_too(make_writer, model, tokenizer, task):
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Cem")]
    (rationale,) = make_writer().write(model, problems_of(task, FORM)[:1], task)
    assert (tokenizer.decode(rationale.tokens), rationale.answer) == ("--- Ben ---", None)


def test_what_comes_behind_the_stop_is_left_out(make_writer, tokenizer, task):
    """As in a batch whose other rows are longer, of a model without an end-of-text token."""
    new = tokenizer("--- Ben --- Cem. Ann's boss")["input_ids"]
    rationale = make_writer()._read(new, [None], task)
    assert (rationale.tokens, rationale.text, rationale.answer) == (new[:5], "--- Ben --- Cem", "Cem")


def test_samples_follow_the_temperature(make_writer, model, task):
    problems = problems_of(task, FORM)
    writer = make_writer(temperature=50.0)
    assert writer.write(model, problems, task) != writer.write(model, problems, task)
    assert writer.write(model, problems, task, greedy=True) == make_writer().write(model, problems, task)


def test_the_text_to_learn_has_neither_examples_nor_hint(make_writer, tokenizer):
    rationale = Rationale(tokenizer("--- Kim --- Jo.")["input_ids"], "--- Kim --- Jo", "Jo")
    tokens, question = make_writer().training_row(Problem("Gus's boss", "Jo", "line 3"), rationale)
    assert tokenizer.decode(tokens) == "Gus's boss is --- Kim --- Jo. <eos>"
    assert tokenizer.decode(tokens[:question]) == "Gus's boss is"


def test_prompts_must_fit_the_model(make_writer, model, task):
    problems = problems_of(task, FORM)
    model.config.max_position_embeddings = 22  # 2 more tokens are the hint's, twice
    make_writer().check(model, problems, hints=False)  # 9 of the example, 4 of Dora's question, 8 new ones
    message = (
        "few_shot must leave room within the model's 22 positions, got 10 tokens of examples, 6 of the question in "
    )
    with pytest.raises(ValueError, match=f"{message}line 2 of .* and max_new_tokens = 8"):
        make_writer().check(model, problems, hints=True)
    model.resize_token_embeddings(20)
    with pytest.raises(
        ValueError, match="tokenizer must be that of the model, which has 20 tokens, got one with token"
    ):
        make_writer().check(model, problems, hints=False)
