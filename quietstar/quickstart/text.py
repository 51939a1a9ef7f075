"""Quiet-STaR on real text: the standard library's sources, or the user's own."""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, set_seed

from quietstar.evaluation import HeldOutNll, hardest, held_out_nll, token_mean
from quietstar.generate import thought_lines
from quietstar.models import QuietStarForCausalLM
from quietstar.quickstart.corpus import read_texts, split_texts, train_tokenizer, windows_of
from quietstar.quickstart.stages import THINKING, Training, new_base, second_seed, train_base, train_thinking
from quietstar.report.page import made, render
from quietstar.report.reading import read
from quietstar.report.text_page import Source, text_page

HELD_OUT_SHARE = 0.05
PROMPT_TOKENS, NEW_TOKENS = 16, 24  # lengths of the continuation that is shown
SHOWN = 16  # number of windows in the report
PROMPT_CHARACTERS = 40  # length of the suggested prompt


class Size(NamedTuple):
    """The size of the model and the lengths of its trainings."""

    texts: int | None  # largest number of texts; None means all of them
    vocabulary: int
    hidden_size: int
    layers: int
    length: int  # tokens per window
    base: Training
    thinking: Training
    held_out_windows: int


# These take about four minutes on two cores, and a few seconds (for tests).
USUAL = Size(
    texts=None, vocabulary=2048, hidden_size=128, layers=3, length=128, base=Training(800, 16, 3e-3),
    thinking=Training(250, 8, 2e-3), held_out_windows=160,
)  # fmt: skip
TINY = Size(
    texts=40, vocabulary=512, hidden_size=32, layers=1, length=64, base=Training(8, 16, 3e-3),
    thinking=Training(4, 8, 2e-3), held_out_windows=8,
)  # fmt: skip


def run(folder: Path, size: Size, seed: int, source: str, command: str) -> str:
    """Train tokenizer, base model and Quiet-STaR on text, and measure; saves models and ``report.html`` in ``folder``.

    Args:
        folder: output folder.
        size: sizes of model and trainings.
        seed: seed of text, weights and thoughts.
        source: a file, a folder, or "stdlib"; see ``read_texts``.
        command: the command line, for the report.

    Returns:
        A prompt to try.

    Raises:
        ValueError: there is no text, or too little of it.
    """
    start = time.perf_counter()
    set_seed(seed)
    print(f"1/4  The text, {source}: some to train on, some held out")
    parts = split_texts(read_texts(source), seed, HELD_OUT_SHARE)
    train_texts, held_out_texts = (part[: size.texts] for part in parts)
    tokenizer = train_tokenizer(train_texts, size.vocabulary)
    windows = windows_of(train_texts, tokenizer, size.length, "train")
    held_out = windows_of(held_out_texts, tokenizer, size.length, "held out")
    chosen = np.random.default_rng(seed).permutation(len(held_out))[: size.held_out_windows]
    held_out = torch.from_numpy(held_out[chosen])
    print(f"     {len(train_texts)} texts, {windows.size:,} tokens; held out {len(held_out_texts)} texts")

    print("2/4  A small Mistral, from random weights")
    base = new_base(
        tokenizer, hidden_size=size.hidden_size, intermediate_size=3 * size.hidden_size, layers=size.layers, kv_heads=2
    )
    train_base(base, windows, size.base, seed)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    print("3/4  Quiet-STaR on top of it")
    model = QuietStarForCausalLM.from_base(folder / "base", tokenizer, thought_length=1, **THINKING)
    before = held_out_nll(model, held_out)
    trained = train_thinking(model, windows, size.thinking, second_seed(seed))
    model.eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trained.state.save_to_json(folder / "model" / "trainer_state.json")

    print("4/4  Held-out text, with and without thoughts")
    reading = read(model, held_out, seed=0, progress=lambda batches, title: tqdm(batches, title, unit="batch"))
    print(results_table(before, reading.own, trained.tokens_per_second))
    print_continuation(model, tokenizer, held_out[0, :PROMPT_TOKENS])
    note = f"{len(held_out[:SHOWN])} windows of held-out text."
    facts = made(command, seed, time.perf_counter() - start, model.device)
    about = Source(
        f"A model of minutes thinks about {source}", [note], 1, before.base, trained.state.log_history, facts
    )  # fmt: skip
    page = render(text_page(tokenizer, reading, about, joined=False, shown=SHOWN))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return held_out_texts[0].strip().splitlines()[0][:PROMPT_CHARACTERS]


def results_table(before: HeldOutNll, after: HeldOutNll, speed: float) -> str:
    """Format the measurements, whether or not thoughts help.

    Args:
        before, after: measurements of the same windows before and after Quiet-STaR. The hardest tokens are chosen by
            the model before, so that neither prediction chooses its own.
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
    lines.append(
        "The thoughts of minutes of training may not help on text whose steps the model never saw written out."
    )
    lines.append(f"Quiet-STaR training: {speed:,.0f} tokens/s")
    return "\n".join(lines)


def print_continuation(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: torch.Tensor) -> None:
    """Continue a held-out text, int64 [L], and print every thought."""
    generated = model.generate(
        prompt[None], max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None, return_thoughts=True,
    )  # fmt: skip
    text = tokenizer.decode(prompt)
    print(f"\nA continuation of {text!r}, token by token with the thought in front of it:\n")
    print(*thought_lines(tokenizer, generated.steps(), dim=sys.stdout.isatty()), sep="\n")
