"""Thoughts that end themselves on questions of one, two and three hops, mixed: do lengths follow the hops?

python runs/thought_lengths.py --seeds 0 1 2

As the quickstart, but questions have 1, 2 or 3 hops, equally often, and a thought has at most three tokens. Of these it
needs one less than its question has hops; but one at least is always thought. What the base model reads between dashes
has the right length where it is the people in between, and any length from 1 to 3 where it is an aside.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import set_seed

from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.experiment import READING, TERSE, WINDOW, one_thread
from quietstar.quickstart.measures import Exam, answer, answer_at_once, steps_right, steps_thought
from quietstar.quickstart.stages import THINKING, Training, new_base, second_seed, train_base, train_thinking
from quietstar.quickstart.world import ASIDES, Question, Shares, World, world_tokenizer

HOPS = 1, 2, 3
MOST_TOKENS = 3
BASE, WINDOWS, HIDDEN_SIZE = Training(3200, 32, 5e-3), 9000, 64


class MixedWorld(World):
    """Questions of several hops; asides of one to three words."""

    def document(self, rng: np.random.Generator, shares: Shares, questions: Sequence[Question]) -> tuple[str, bool]:
        kind = shares._fields[rng.choice(len(shares), p=shares)]
        if kind in ("fact", "terse"):
            certain = Shares(*(float(name == kind) for name in shares._fields))
            return super().document(rng, certain, questions)
        question = questions[rng.integers(len(questions))]
        *between, answer = self.steps(question)
        if kind == "aside" or not between:
            between = rng.choice(ASIDES, rng.integers(1, 4) if kind == "aside" else 1).tolist()
        return f"{question} --- {' '.join(between)} --- {answer}.", True


def equally_often(worlds: dict[int, World]) -> list[Question]:
    """Training questions of all hops; those of few hops, which are fewer, repeated."""
    most = max(len(world.train) for world in worlds.values())
    return [question for world in worlds.values() for question in world.train * (most // len(world.train))]


def measured(model: QuietStarForCausalLM, exams: dict[int, Exam]) -> dict[str, dict[str, float]]:
    """Of every number of hops."""
    rows = {}
    for hops, exam in exams.items():
        own = answer(model, exam)
        lengths = (own.thoughts >= 0).sum(dim=1).float()
        rows[str(hops)] = {
            "accuracy_without": float(answer_at_once(model, exam).right.float().mean()),
            "accuracy_with": float(own.right.float().mean()),
            "tokens": float(lengths.mean()),
            "tokens_deviation": float(lengths.std()),
            "name_the_steps": steps_thought(exam, own.thoughts),
        }
    return rows


def run(seed: int, base_training: Training, thinking_steps: int, learned: bool) -> dict[str, object]:
    """Everything of one seed."""
    start = time.perf_counter()
    set_seed(seed)
    streams = [np.random.default_rng([seed, part]) for part in range(2)]
    worlds, tokenizer = {hops: MixedWorld(hops, seed) for hops in HOPS}, world_tokenizer()
    questions, exams = equally_often(worlds), {hops: Exam.of(world, tokenizer) for hops, world in worlds.items()}
    training = Training(thinking_steps, 8, 2e-3)
    corpus = worlds[3].windows(tokenizer, WINDOWS, WINDOW, READING, questions, streams[0])
    terse = worlds[3].windows(tokenizer, training.steps * training.batch_size, WINDOW, TERSE, questions, streams[1])
    base = new_base(
        tokenizer, hidden_size=HIDDEN_SIZE, intermediate_size=4 * HIDDEN_SIZE, layers=1, kv_heads=4
    )  # fmt: skip
    train_base(base, corpus.tokens, base_training, seed)
    written = {hops: steps_right(base, exam, tokenizer) for hops, exam in exams.items() if hops > 1}
    print(f"seed {seed}: written steps right: {written}")
    set_seed(second_seed(seed))
    length = {"thought_length": MOST_TOKENS if learned else max(HOPS) - 1, "learned_thought_end": learned}
    with TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        dash = tokenizer.convert_tokens_to_ids("---")
        model = QuietStarForCausalLM.from_base(folder, tokenizer, **THINKING | length)
    with torch.no_grad():  # the end token stands for the closing dashes, which the text to come has none of
        rows = model.lm_head.weight
        rows[[dash, model.config.end_thought_token_id]] = rows[[model.config.start_thought_token_id, dash]]
    before = measured(model, exams)
    train_thinking(model, terse.tokens, training, second_seed(seed))
    result = {"seed": seed, "learned_thought_end": learned, "base_steps": base_training.steps}
    result |= {"thinking_steps": training.steps, "written_steps_right": written}
    result |= {"before": before, "after": measured(model, exams), "seconds": time.perf_counter() - start}
    for when in ("before", "after"):
        for hops, row in result[when].items():
            print(f"  {when:6} {hops} hops: " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    return result


def main() -> None:
    """Run the seeds and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base_steps", type=int, default=BASE.steps)
    parser.add_argument("--thinking_steps", type=int, default=450)
    parser.add_argument("--fixed", action="store_true", help="thoughts of two tokens that do not end themselves")
    parser.add_argument("--output", type=Path, default=Path("thought_lengths.json"))
    options = parser.parse_args()
    results = []
    with one_thread():
        for seed in options.seeds:
            training = BASE._replace(steps=options.base_steps)
            results.append(run(seed, training, options.thinking_steps, not options.fixed))
            options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
