"""Where to think, in the quickstart's world.

``python runs/where_to_think.py --seeds 0 1 2 --output curve.json`` trains the quickstart's models with a gain head, and
measures held-out text against the share of positions that think: those where the head expects most, those where the
base prediction is least sure, random ones. About two minutes per seed on one core.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, set_seed

from quietstar.evaluation import CurvePoint, thinking_curve
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.experiment import READING, TERSE, USUAL, WINDOW, Size, one_thread
from quietstar.quickstart.measures import Exam, answer
from quietstar.quickstart.stages import THINKING, new_base, second_seed, train_base, train_thinking
from quietstar.quickstart.world import World, world_tokenizer

SHARES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
HOPS, GAIN_WEIGHT = 3, 0.1


def measured(seed: int, size: Size = USUAL, gain_weight: float = GAIN_WEIGHT) -> dict[str, object]:
    """Train with a seed, and the two curves: of all tokens, and of answers while all positions may think."""
    set_seed(seed)
    streams = [np.random.default_rng([seed, part]) for part in range(3)]  # as in the quickstart
    world, tokenizer = World(HOPS, seed, size.people), world_tokenizer()
    training = size.thinking._replace(steps=size.thinking.steps * (HOPS - 1))
    corpus = world.windows(tokenizer, size.windows, WINDOW, READING, world.train, streams[0])
    terse = world.windows(tokenizer, training.steps * training.batch_size, WINDOW, TERSE, world.train, streams[1])
    held_out = world.windows(tokenizer, size.held_out_windows, WINDOW, TERSE, world.held_out, streams[2])
    model = _untrained(tokenizer, corpus.tokens, size, seed, gain_weight)
    train_thinking(model, terse.tokens, training, second_seed(seed))
    windows, answers = torch.from_numpy(held_out.tokens), torch.from_numpy(held_out.answers[:, 1:])
    curves = {"all tokens": thinking_curve(model, windows, shares=SHARES)}
    curves["answers"] = thinking_curve(model, windows, shares=SHARES, chosen=answers)
    exam = Exam.of(world, tokenizer)
    return {
        "seed": seed,
        "thinking_always": answer(model, exam).means(),
        "thinking_as_learned": _as_learned(model, exam, windows),
        "curves": {
            name: {way: [_described(point) for point in points] for way, points in curve.items()}
            for name, curve in curves.items()
        },
    }


def _untrained(
    tokenizer: PreTrainedTokenizerFast, text: np.ndarray, size: Size, seed: int, gain_weight: float
) -> QuietStarForCausalLM:  # fmt: skip
    """Quiet-STaR on top of the quickstart's base model, which is trained here."""
    base = new_base(
        tokenizer, hidden_size=size.hidden_size, intermediate_size=4 * size.hidden_size, layers=1, kv_heads=4
    )
    train_base(base, text, size.base, seed)
    fields = THINKING | {"thought_length": HOPS - 1, "gain_weight": gain_weight}
    with TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        set_seed(second_seed(seed))
        return QuietStarForCausalLM.from_base(folder, tokenizer, **fields)


@torch.no_grad()
def _as_learned(model: QuietStarForCausalLM, exam: Exam, windows: torch.Tensor) -> dict[str, float]:
    """What ``generate`` does at the usual threshold: held-out questions, and the share of tokens with a thought."""
    output = model.generate(
        exam.prompts, max_new_tokens=1, do_sample=False, think="learned", eos_token_id=None, pad_token_id=0
    )
    expected = model.gain_head(model.model(windows[:, :-1]).last_hidden_state)
    right = (output[:, -1] == exam.steps[:, -1]).float().mean()
    shares = [float((expected > threshold).float().mean()) for threshold in (model.config.gain_threshold, 0)]
    return dict(zip(("accuracy", "share", "share_at_0"), (float(right), *shares), strict=True))


def _described(point: CurvePoint) -> dict[str, float]:
    """Ready for JSON; −inf, where all positions think, is None."""
    threshold = None if point.share == 1 else point.threshold
    means = {"nll": point.nll.value, "accuracy": point.accuracy.value}
    return {"share": point.share, "threshold": threshold} | means


def table(results: list[dict[str, object]], name: str) -> str:
    """One of the two curves, means over seeds, as Markdown."""
    ways = list(results[0]["curves"][name])
    titles = [f"{value}, {way}" for value in ("nll", "accuracy") for way in ways]
    lines = [f"| share that think | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for i, share in enumerate(SHARES):
        means = [
            np.mean([result["curves"][name][way][i][value] for result in results])
            for value in ("nll", "accuracy")
            for way in ways
        ]
        lines.append(f"| {share:.4g} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gain_weight", type=float, default=GAIN_WEIGHT)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with one_thread():
        results = [measured(seed, gain_weight=options.gain_weight) for seed in options.seeds]
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        print(f"\nseed {result['seed']}, think='learned' at its usual threshold: {result['thinking_as_learned']}")
    for name in results[0]["curves"]:
        print(f"\n{name}, means over seeds {', '.join(map(str, options.seeds))}\n\n{table(results, name)}")
