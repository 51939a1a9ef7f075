"""The command ``quietstar quickstart``: from nothing to a model that thinks, on a CPU, in a few minutes."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from quietstar._numbers import SEED
from quietstar.evaluation import HeldOutNll, hardest, held_out_nll, token_mean
from quietstar.generate import thought_lines
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.corpus import standard_library, train_tokenizer, windows_of
from quietstar.quickstart.stages import THINKING, TINY, USUAL, Size, train_base, train_thinking

HELD_OUT_SHARE = 0.05
PROMPT = 'def read_lines(path):\n    """Return the lines of a file."""\n'


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        SEED.check("--seed", options.seed)
    except ValueError as error:
        print(f"quietstar quickstart: {error}", file=sys.stderr)
        return 2
    folder = Path(options.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"quietstar quickstart: --output_dir must be new or empty, got {folder}", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    set_seed(options.seed)
    start = time.perf_counter()
    quickstart(folder, TINY if options.tiny else USUAL, options.seed)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\nDone in {minutes} min {seconds} s. The model is in {folder / 'model'}; go on with\n")
    print(f'  quietstar generate --model {folder / "model"} --prompt "import os" --show-thoughts')
    return 0


def quickstart(folder: Path, size: Size, seed: int) -> None:
    """Corpus, tokenizer, base model, Quiet-STaR, and what came of it; the model is saved in ``folder / "model"``."""
    print("1/4  The standard library of this Python: source files to train on, others held out")
    train_texts, held_out_texts = (part[: size.files] for part in standard_library(seed, HELD_OUT_SHARE))
    tokenizer = train_tokenizer(train_texts, size.vocabulary)
    windows = windows_of(train_texts, tokenizer, size.length, "train")
    held_out = windows_of(held_out_texts, tokenizer, size.length, "held out")
    chosen = np.random.default_rng(seed).permutation(len(held_out))[: size.held_out_windows]
    held_out = torch.from_numpy(held_out[chosen])
    print(f"     {len(train_texts)} files, {windows.size:,} tokens; held out {len(held_out_texts)} files")

    print("2/4  A small Mistral, from random weights")
    base = train_base(windows, tokenizer, size, folder / "base", seed)
    base.save_pretrained(folder / "base")

    print("3/4  Quiet-STaR on top of it")
    model = QuietStarForCausalLM.from_base(folder / "base", tokenizer, **THINKING)
    before = held_out_nll(model, held_out)
    speed = train_thinking(model, windows, size, folder / "training", seed)
    model.eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    print("4/4  Held-out text, with and without thoughts")
    after = held_out_nll(model, held_out, progress=lambda batches: tqdm(batches, unit="batch"))
    print(results_table(before, after, speed))
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(
        **prompt, max_new_tokens=24, do_sample=True, temperature=0.7, pad_token_id=tokenizer.pad_token_id,
        return_thoughts=True,
    )  # fmt: skip
    print(f"\nA continuation of {PROMPT!r}, token by token with the thought in front of it:\n")
    print(*thought_lines(tokenizer, generated.steps(), dim=sys.stdout.isatty()), sep="\n")


def results_table(before: HeldOutNll, after: HeldOutNll, speed: float) -> str:
    """What was measured, whichever way it came out.

    Args:
        before, after: of the same windows, before and after Quiet-STaR. The hardest tokens are those of the model
            before, so that neither prediction chooses its own.
        speed: tokens of text per second in the training of Quiet-STaR.
    """
    hard = hardest(before.base)
    rows = [
        ("base model, before Quiet-STaR", before.base),
        ("after Quiet-STaR, without thoughts", after.base),
        ("after Quiet-STaR, after a thought", after.mixed),
        ("gain of the thought", after.base - after.mixed),
    ]
    lines = [f"{'nll per held-out token (nats)':<36} {'all tokens':>18} {'hardest tenth':>18}"]
    for name, nll in rows:
        means = [token_mean(nll, chosen) for chosen in (None, hard)]
        lines.append(f"{name:<36} " + " ".join(f"{mean.value:>9.4f} ± {mean.error:.4f}" for mean in means))
    lines.append(f"{nll.numel():,} tokens; ± is the standard error over windows; hardest for the model before")
    lines.append(f"Quiet-STaR training: {speed:,.0f} tokens/s")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quietstar quickstart",
        description="Train a small model on the source code of Python's standard library, teach it to think, and see "
        "what the thoughts do. On a CPU, nothing downloaded, about four minutes on two cores.",
    )
    parser.add_argument("--output_dir", default="quickstart", help="new folder for the models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and thoughts (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model, to see that everything runs")
    return parser
