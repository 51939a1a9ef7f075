"""The command ``quietstar estimate``: print what a training step costs, for people or as JSON."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

from quietstar._command_line import SuggestingParser
from quietstar.estimate.configs import PRESETS, read_config
from quietstar.estimate.devices import GPUS, Prediction, this_cpu
from quietstar.estimate.flops import model_flops
from quietstar.estimate.memory import step_memory
from quietstar.estimate.step import DTYPES, OPTIMIZERS, SHARDINGS, TrainingStep

# Above these a step is a slip of the hand: numbers overflow, and the tables of anchors fill the memory.
LARGEST = {
    "batch": 10**6, "num_thoughts": 64, "thought_length": 10**4, "lookahead": 10**4, "anchors_per_text": 10**6,
    "lora_r": 10**5,
}  # fmt: skip

# Fields of the configuration that cost something, and what they say; flags of `quietstar train` too.
FIELDS = {
    "num_thoughts": (int, "independent thoughts per position"),
    "thought_length": (int, "sampled tokens in a thought"),
    "lookahead": (int, "real tokens predicted after a thought"),
    "anchors_per_text": (int, "positions of a text that think, all where the configuration says nothing"),
    "prediction": (str, "after a thought: mixed, or the thought's alone"),
    "base_loss_weight": (float, "of the loss without thought; 0 spares its gradients"),
    "talk_loss_weight": (float, "of the loss after a thought, likewise"),
    "baseline": (str, "what thoughts are rewarded against: self, teacher or none"),
    "kl_weight": (float, "above 0 a teacher says how likely thoughts are"),
    "gain_weight": (float, "above 0 there is a gain head"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code: 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        prediction = _predict(options)
    except (ImportError, TypeError, ValueError) as error:
        print(f"quietstar estimate: {error}", file=sys.stderr)
        return 2
    facts = report(prediction)
    print(json.dumps(facts, indent=1) if options.json else "\n".join(_lines(facts)))
    return 0


def _predict(options: argparse.Namespace) -> Prediction:
    for name, most in LARGEST.items():
        if (value := getattr(options, name)) is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")
    overrides = {name: value for name in FIELDS if (value := getattr(options, name)) is not None}
    try:
        config = read_config(options.config, **overrides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config {options.config}: {error}") from error
    on_cpu = options.device == "cpu"
    step = TrainingStep(
        config,
        options.batch,
        options.length,
        DTYPES[options.dtype or ("float32" if on_cpu else "bfloat16")],
        options.checkpointing,
        options.optimizer,
        "cpu" if on_cpu else "cuda",
        gpus=options.gpus,
        sharding=options.sharding,
        lora_r=options.lora_r,
        load_in_4bit=options.load_in_4bit,
        distil=options.distil,
    )
    try:
        _ = step.dry_run
    except (ArithmeticError, AssertionError, KeyError, RuntimeError) as error:  # of sizes that do not go together
        raise ValueError(f"--config {options.config}: its decoder cannot be run: {error}") from error
    return Prediction(step, this_cpu(step.dtype) if on_cpu else GPUS[options.device])


def report(prediction: Prediction) -> dict:
    """Everything that is predicted, as JSON knows it: FLOPs, bytes and seconds, in units without prefix."""
    step, device = prediction.step, prediction.device
    config, memory = step.config, step_memory(step)
    return {
        "model": {"parameters": step.parameters, "dtype": str(step.dtype).removeprefix("torch.")},
        "step": {
            "batch": step.batch, "length": step.length, "num_thoughts": config.num_thoughts,
            "thought_length": config.thought_length, "lookahead": config.lookahead,
            "anchors_per_text": config.anchors_per_text,
            "checkpointing": step.checkpointing, "optimizer": step.optimizer, "helpful_thoughts": step.helpful,
            "gpus": step.gpus, "sharding": step.sharding,
        },
        "trained": {
            "parameters": step.skeleton.whole.trained, "lora_r": step.lora_r, "load_in_4bit": step.load_in_4bit,
            "teacher": step.has_teacher, "distil": step.distil,
        },
        "parts": [
            {"name": part.name, "flops": part.flops, "bytes": part.bytes, "seconds": device.seconds(part, step.dtype)}
            for part in prediction.parts
        ],
        "model_flops": model_flops(step),
        "peak_memory": {
            "bytes": memory.peak, "phase": memory.peak_phase, "parts": memory.peak_parts,
            "phases": {phase: sum(parts.values()) for phase, parts in memory.peaks.items()},
        },
        "device": {
            "name": device.name, "peak_flops": device.peak_flops(step.dtype), "bandwidth": device.bandwidth,
            "memory": device.memory, "usable_memory": prediction.usable_memory,
            "assumed_flops_share": device.flops_share, "assumed_bandwidth_share": device.bandwidth_share,
        },
        "seconds": prediction.seconds,
        "tokens_per_s": prediction.tokens_per_s,
        "model_flop_utilisation": prediction.utilisation,
        "largest_batch": prediction.largest_batch(),
    }  # fmt: skip


def _lines(facts: dict) -> Iterable[str]:
    model, step, memory, device = facts["model"], facts["step"], facts["peak_memory"], facts["device"]
    trained = facts["trained"]
    adapters = (
        f"{trained['parameters'] / 1e6:,.1f} M in adapters of rank {trained['lora_r']} and small heads on "
        f"{'weights of 4 bits of ' if trained['load_in_4bit'] else ''}"
    )
    yield (
        f"A training step of {adapters if trained['lora_r'] else ''}{model['parameters'] / 1e6:,.1f} M parameters in "
        f"{model['dtype']}{', with a teacher' if trained['teacher'] else ''}: {step['batch']} × "
        f"{step['length']} tokens, {step['num_thoughts']} thoughts of {step['thought_length']} tokens "
        f"{'per position' if (chosen := step['anchors_per_text']) is None else f'at {chosen} positions of each'}, "
        f"lookahead {step['lookahead']}, optimizer {step['optimizer']}, "
        f"{'with' if step['checkpointing'] else 'without'} gradient checkpointing, on {device['name']}"
        + (f", one of {step['gpus']} by {step['sharding']}" if step["gpus"] > 1 else "")
    )
    yield f"\n{'':<32}{'TFLOP':>12}{'GB moved':>12}{'ms':>12}"
    total = {key: sum(part[key] for part in facts["parts"]) for key in ("flops", "bytes", "seconds")}
    for part in [*facts["parts"], {"name": "together", **total}]:
        tera, giga, milli = part["flops"] / 1e12, part["bytes"] / 1e9, part["seconds"] * 1e3
        yield f"{part['name']:<32}{tera:>12.3f}{giga:>12.2f}{milli:>12.2f}"
    yield f"\n{'at the peak: ' + memory['phase']:<60}{'MiB':>12}"
    for name, size in [*memory["parts"].items(), ("together", memory["bytes"])]:
        yield f"{name:<60}{size / 2**20:>12,.1f}"
    yield f"\n{'most held in':<60}{'MiB':>12}"
    for phase, size in memory["phases"].items():
        yield f"{phase:<60}{size / 2**20:>12,.1f}"
    fits = memory["bytes"] <= device["usable_memory"]
    yield (
        f"\nmemory       {memory['bytes'] / 2**30:.2f} GiB of tensors, {'fits' if fits else 'does not fit'}: "
        f"{device['usable_memory'] / 2**30:.1f} of {device['memory'] / 2**30:.1f} GiB are taken to be usable"
    )
    yield f"batch        at most {facts['largest_batch']} sequences of {step['length']} tokens fit"
    yield f"speed        {facts['seconds']:.3f} s per step, {facts['tokens_per_s']:,.0f} tokens of text per second"
    yield (
        f"utilisation  {facts['model_flop_utilisation']:.1%} of {device['peak_flops'] / 1e12:,.2f} TFLOP/s by the "
        f"{facts['model_flops'] / 1e12:.3f} TFLOP that the objective needs once"
    )
    yield (
        f"assumed      {device['assumed_flops_share']:.0%} of the peak in products, "
        f"{device['assumed_bandwidth_share']:.0%} of {device['bandwidth'] / 1e12:.3f} TB/s in all else"
        f"{', nothing for what GPUs send each other' if step['gpus'] > 1 else ''}; "
        f"{step['helpful_thoughts']:.0%} of thoughts help"
    )


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="quietstar estimate",
        description="Predict FLOPs, memory and time of a training step from its sizes, before it is run.",
    )
    parser.add_argument(
        "--config",
        required=True,
        help=f"of a decoder or a Quiet-STaR model: {', '.join(PRESETS)}, a folder, a JSON file or a hub name",
    )
    parser.add_argument("--batch", type=int, required=True, help="sequences per step, on each GPU")
    parser.add_argument("--length", type=int, required=True, help="tokens of text per sequence")
    for name, (kind, meaning) in FIELDS.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: the configuration's)")
    parser.add_argument("--lora_r", type=int, help="adapters of this rank are trained instead of the weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="the weights below adapters have 4 bits")
    parser.add_argument(
        "--distil", choices=("kl", "reward"), nargs="?", const="kl", help="learn from thinking to do without"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="compute activations again in the backward instead of keeping them (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw",
        help="adamw keeps two numbers per weight in the dtype of the weights, as PyTorch does (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=[*GPUS, "cpu"], default="h200", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="that train together; everything printed is of one of them")
    parser.add_argument(
        "--sharding", choices=SHARDINGS, default="ddp",
        help="how they share the model: nothing (ddp), gradients and optimizer states (zero2), or weights too "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, FLOPs and seconds")
    return parser
