"""A training step of Mistral-7B's shape: growing batches until the memory ends, and the sequential baseline.

Random weights, bfloat16 (float32 on a CPU), AdamW, gradient checkpointing for ours; the baseline keeps everything, as
the authors' code does. Tokens are tokens of text. Model-FLOP utilisation counts what the objective needs once, forward
and backward: neither what checkpointing computes again nor what a program computes in vain.

    python benchmarks/training_7b.py [--shape 7b|tiny] [--length 256] [--seconds 600] [--json FILE]

The exit code is 0 unless something failed; that there is no GPU for the large shape, or no time, is said.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from baselines import model_weights, sequential_training_step
from measure import DEVICE, machine, matmul_peak, own_peak_memory, seconds
from torch import Tensor

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.estimate.flops import model_flops
from quietstar.estimate.step import TrainingStep

SHAPES = {
    "7b": {
        "vocab_size": 32002, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 202, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
TIMED_STEPS = 3
LONG = 2.0  # seconds after which a step is timed only once
OURS_SHARE = 2 / 3  # of the time
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def random_model(shape: str) -> QuietStarForCausalLM:
    words = SHAPES[shape]["vocab_size"]
    config = QuietStarConfig(**SHAPES[shape], start_thought_token_id=words - 2, end_thought_token_id=words - 1)
    with torch.device(DEVICE):
        return QuietStarForCausalLM(config).to(DTYPE).train()


def ours(model: QuietStarForCausalLM, text: Tensor) -> Tensor:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model(text, labels=text, output_thought_logprobs=False).loss


def sequential(model: QuietStarForCausalLM, text: Tensor) -> Tensor:
    return sequential_training_step(model_weights(model), model.config, text, text).loss


def measured(model, optimizer, loss_of: Callable[..., Tensor], batch: int, length: int) -> dict | None:
    """Time, speed and memory of a step; None where the memory does not suffice."""
    text = torch.randint(model.config.vocab_size - 2, (batch, length), device=DEVICE)

    def step() -> None:
        loss_of(model, text).backward()
        optimizer.step()
        optimizer.zero_grad()

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        step()  # allocates the optimizer's states and compiles kernels
        times = [seconds(step)]
        while times[0] < LONG and len(times) < TIMED_STEPS:
            times.append(seconds(step))
    except torch.OutOfMemoryError:
        return None
    finally:
        optimizer.zero_grad()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(times)
    flops = model_flops(TrainingStep(model.config, batch, length, DTYPE, device=DEVICE))
    return {
        "batch": batch,
        "seconds_per_step": median,
        "timed_steps": len(times),
        "tokens_per_s": batch * length / median,
        "model_flops_per_s": flops / median,
        "peak_gib": own_peak_memory() / 2**30,
    }


def sweep(model, optimizer, loss_of, length: int, most: int, end: float, row_done: Callable[[dict], None]) -> str:
    """Batches of 1, 2, 4 and so on, each row handed on when it is measured; returns why it went no further.

    ``end`` on ``time.monotonic`` is when all should be over: no batch is begun that will take longer.
    """
    expected = 0.0
    for batch in (2**i for i in itertools.count()):
        if batch > most:
            return f"batch {batch} was not asked for"
        if time.monotonic() + expected > end:
            return f"no time for batch {batch}"
        row = measured(model, optimizer, loss_of, batch, length)
        if row is None:
            return f"no memory for batch {batch}"
        row_done(row)
        expected = 2 * row["seconds_per_step"] * (1 + row["timed_steps"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--most", type=int, default=256, help="largest batch to try (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="for all of it (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there as well, batch by batch")
    options = parser.parse_args(arguments)
    shortest = QuietStarConfig().lookahead + 2
    for name, least in (("length", shortest), ("most", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: {options.json.parent} is no folder")
    if options.shape == "7b" and DEVICE != "cuda":
        print("training_7b.py: no CUDA device here for the shape 7b, nothing was run; --shape tiny runs anywhere")
        return

    begin = time.monotonic()

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))

    model = random_model(options.shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    result = {"machine": machine(), "shape": options.shape, "length": options.length}
    result["matmul_peak_flops_per_s"] = peak = matmul_peak(DTYPE)
    result["ended"] = {}
    for name, loss_of, share in (("ours", ours, OURS_SHARE), ("sequential baseline", sequential, 1)):
        rows = result[name] = []

        def row_done(row: dict, name=name, rows=rows) -> None:
            row["model_flop_utilisation"] = row["model_flops_per_s"] / peak
            print(
                f"{name:<20} batch {row['batch']:>3}: {row['tokens_per_s']:8.1f} tokens/s, {row['peak_gib']:.1f} GiB, "
                f"{row['model_flop_utilisation']:.1%} of the matmul peak",
                flush=True,
            )
            rows.append(row)
            write()

        end = begin + share * options.seconds
        result["ended"][name] = why = sweep(model, optimizer, loss_of, options.length, options.most, end, row_done)
        print(f"{name:<20} ends: {why}", flush=True)
        write()


if __name__ == "__main__":
    sys.exit(main())
