"""The experiment: a model that answers questions only after it has thought of the steps in between.

1. A Mistral with one layer is trained on text with facts and questions; some answers come with their steps, some do
   not.
2. Quiet-STaR is trained on text that never spells out a step. At first, thoughts look like the text between dashes,
   which is often idle.
3. The model answers questions that neither training has seen in any form, with and without thoughts, and with controls.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import set_seed

from quietstar.evaluation import text_nll
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.controls import Stage, further_controls
from quietstar.quickstart.measures import (
    Exam,
    answer,
    described_questions,
    measure,
    steps_right,
    steps_thought,
)
from quietstar.quickstart.page import SHOWN, world_page
from quietstar.quickstart.stages import THINKING, Training, new_base, second_seed, train_base, train_thinking
from quietstar.quickstart.table import question_lines, results_table
from quietstar.quickstart.world import PEOPLE, RELATIONS, Shares, World, world_tokenizer
from quietstar.report.page import made, render
from quietstar.report.reading import read

READING = Shares(fact=0.3, terse=0.1, worked=0.4, aside=0.2)
TERSE = Shares(fact=0.4, terse=0.6)
WINDOW = 64  # tokens


class Size(NamedTuple):
    """The sizes of world and model, and the lengths of the trainings."""

    people: int
    hidden_size: int
    windows: int  # for the base model; it reads them several times
    base: Training
    thinking: Training  # per token of a thought; if longer, the model memorises the answers of training questions
    held_out_windows: int


# The base must learn every written step (this takes 500 to 800 steps), or first thoughts are too rarely right.
USUAL = Size(
    people=len(PEOPLE), hidden_size=64, windows=6000, base=Training(1600, 32, 5e-3), thinking=Training(150, 8, 2e-3),
    held_out_windows=96,
)  # fmt: skip
TINY = Size(
    people=5, hidden_size=16, windows=64, base=Training(8, 16, 5e-3), thinking=Training(2, 8, 2e-3), held_out_windows=8
)


def run(folder: Path, size: Size, seed: int, hops: int, controls: bool, command: str) -> str:
    """Create the world, train and measure; saves models, ``results.json`` and ``report.html`` in ``folder``.

    Args:
        folder: output folder.
        size: sizes of world, model and trainings.
        seed: seed of text, weights and thoughts.
        hops: relations in a question.
        controls: whether to run the controls.
        command: the command line, for the report.

    Returns:
        A prompt to try.
    """
    start = time.perf_counter(), time.process_time()
    set_seed(seed)
    streams = [np.random.default_rng([seed, part]) for part in range(3)]  # for the three parts of the text
    world, tokenizer = World(hops, seed, size.people), world_tokenizer()
    thought_length = hops - 1
    thinking, training = THINKING | {"thought_length": thought_length}, size.thinking
    training = training._replace(steps=training.steps * thought_length)
    exam = Exam.of(world, tokenizer)
    print(f"1/4  A world of {len(world.people)} people and {len(RELATIONS)} relations; questions chain {hops} of these")
    corpus = world.windows(tokenizer, size.windows, WINDOW, READING, world.train, streams[0])
    terse = world.windows(tokenizer, training.steps * training.batch_size, WINDOW, TERSE, world.train, streams[1])
    held_out = world.windows(tokenizer, size.held_out_windows, WINDOW, TERSE, world.held_out, streams[2])
    print(f"     {tokenizer.decode(corpus.tokens[0])} ...")

    print("2/4  A Mistral of one layer reads it, from random weights")
    base = new_base(
        tokenizer, hidden_size=size.hidden_size, intermediate_size=4 * size.hidden_size, layers=1, kv_heads=4
    )
    train_base(base, corpus.tokens, size.base, seed)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    right = steps_right(base, exam, tokenizer)
    print(f"     steps of held-out questions right where they are written out: {' '.join(f'{x:.0%}' for x in right)}")

    print("3/4  Quiet-STaR on text that never says a step")
    set_seed(second_seed(seed))
    model = QuietStarForCausalLM.from_base(folder / "base", tokenizer, **thinking)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(".")  # a document ends there
    first = steps_thought(exam, answer(model, exam).thoughts)
    print(f"     first thoughts that name the steps: {first:.0%}")
    trained = train_thinking(model, terse.tokens, training, second_seed(seed))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trained.state.save_to_json(folder / "model" / "trainer_state.json")

    print("4/4  Questions held out of all text, with and without thoughts\n")
    measured, own = measure(model, exam, held_out)
    results = {"seed": seed, "hops": hops, "people": len(world.people), "thought_length": thought_length} | measured
    results |= {"base_steps_right": right, "first_thoughts_that_name_the_steps": first}
    results |= {"tokens_per_second": trained.tokens_per_second}
    results |= {"questions": described_questions(world, exam, own, tokenizer)}
    print(results_table(results), "", *question_lines(results["questions"][:SHOWN]), sep="\n")
    results |= {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    windows = torch.from_numpy(held_out.tokens)
    reading, difficulty = read(model, windows, seed=0), text_nll(base, windows)

    def save() -> None:
        facts = made(command, seed, time.perf_counter() - start[0], model.device)
        page = world_page(tokenizer, results, reading, difficulty, trained.state.log_history, facts)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "report.html").write_text(render(page), encoding="utf-8")

    save()
    if controls:
        stage = Stage(folder, tokenizer, world, exam, terse, training, second_seed(seed), thinking)
        results |= {"controls": further_controls(model, stage, own, terse.tokens.size / trained.tokens_per_second)}
        results |= {"seconds_with_controls": time.perf_counter() - start[0]}
        print("", results_table(results), sep="\n")
        save()
    return str(world.held_out[0])


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the context: steps this small gain nothing from a second one, and may wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
