"""STaR in the quickstart's world: python runs/star_world.py --seed 0.

The base model is the quickstart's, which was trained on text with worked answers ("is --- Quin Sue --- Mia."). Four of
those stand in front of the questions in the first round; rationales are sampled, as the likeliest one of this base is
right already. Accuracies are of the quickstart's held-out questions.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from quietstar.evaluation.tasks import Qa
from quietstar.quickstart.experiment import READING, USUAL, WINDOW, Size, one_thread
from quietstar.quickstart.measures import Exam
from quietstar.quickstart.stages import new_base, train_base
from quietstar.quickstart.world import Question, World, world_tokenizer
from quietstar.star import Example, Format, Settings, Writer, problems_of, star

FORM = Format("{question} is", hint="{answer}. {question}", separator="---", stop=".")
# The quickstart's batch of 8 windows of 64 tokens is about 40 such texts.
SETTINGS = Settings(
    rounds=3, steps=40, learning_rate=2e-3, warmup_steps=10, batch_size=64, gradient_accumulation_steps=1,
    max_new_tokens=10, temperature=1.0, examples="first",
)  # fmt: skip
EXAMPLES = 4


def star_on_world(
    seed: int, folder: Path | None = None, *, hops: int = 3, size: Size = USUAL, settings: Settings = SETTINGS
) -> dict[str, object]:
    """Train the quickstart's base and STaR on top of it; what was measured.

    Args:
        seed: of world, text, weights and rationales.
        folder: keep the models there, new or empty; default nowhere.

    Returns:
        Of ``base`` and ``star`` each the shares of held-out questions answered right: ``at_once`` (the likeliest
        person right behind the question; chance is 5 %), ``with_rationale`` (greedily) and ``with_sampled_rationale``;
        the ``rounds`` as :func:`quietstar.star.star` returns them; ``base_seconds`` and ``seconds`` of STaR alone.
    """
    if folder is None:
        with TemporaryDirectory() as scratch:
            return star_on_world(seed, Path(scratch), hops=hops, size=size, settings=settings)
    start = time.perf_counter()
    world, tokenizer = World(hops, seed, size.people), world_tokenizer()
    base = _train_base(world, tokenizer, size, seed)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base_seconds = time.perf_counter() - start

    train, held_out = _task(world, world.train, "the world"), _task(world, world.held_out, "its held-out questions")
    examples = [FORM.example(_worked(world, question), str(question)) for question in world.train[:EXAMPLES]]
    settings = Settings(**vars(settings) | {"seed": seed})
    results = star(folder / "base", train, examples, folder / "star", form=FORM, settings=settings)
    trained = AutoModelForCausalLM.from_pretrained(folder / "star" / "model")
    exam = Exam.of(world, tokenizer)
    return {
        "seed": seed,
        "base": _measure(base, tokenizer, world, exam, held_out, examples, settings),
        "star": _measure(trained, tokenizer, world, exam, held_out, [], settings),
        "rounds": results["rounds"],
        "base_seconds": base_seconds,
        "seconds": results["seconds"],
    }


def _train_base(world: World, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int) -> PreTrainedModel:
    """As the quickstart does it, with the same text."""
    set_seed(seed)
    rng = np.random.default_rng([seed, 0])
    corpus = world.windows(tokenizer, size.windows, WINDOW, READING, world.train, rng)
    width = size.hidden_size
    base = new_base(tokenizer, hidden_size=width, intermediate_size=4 * width, layers=1, kv_heads=4)
    train_base(base, corpus.tokens, size.base, seed)
    return base


def _task(world: World, questions: list[Question], source: str) -> Qa:
    rows = [{"question": str(question), "answer": world.steps(question)[-1]} for question in questions]
    return Qa(((f"question {number} of {source}", row) for number, row in enumerate(rows, 1)), source)


def _worked(world: World, question: Question) -> str:
    *between, answer = world.steps(question)
    return f"{question} --- {' '.join(between)} --- {answer}."


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, exam: Exam, held_out: Qa,
    examples: list[Example], settings: Settings,
) -> dict[str, float]:  # fmt: skip
    problems = problems_of(held_out, FORM)
    writer = Writer(
        tokenizer, FORM, examples, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        temperature=1.0,
    )  # fmt: skip
    people = torch.tensor(tokenizer.convert_tokens_to_ids(world.people))
    with torch.no_grad():
        logits = model.eval()(exam.prompts, logits_to_keep=1).logits[:, -1, people]
    shares = {"at_once": (people[logits.argmax(dim=-1)] == exam.steps[:, -1]).float().mean().item()}
    set_seed(settings.seed)
    for name, greedy in (("with_rationale", True), ("with_sampled_rationale", False)):
        written = writer.write(model, problems, held_out, greedy=greedy)
        right = [rationale.answer == problem.answer for rationale, problem in zip(written, problems, strict=True)]
        shares[name] = sum(right) / len(right)
    return shares


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hops", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="keep the models here (default: nowhere)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with one_thread():
        print(json.dumps(star_on_world(options.seed, options.output_dir, hops=options.hops), indent=1))


if __name__ == "__main__":
    main()
