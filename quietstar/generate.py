"""The command ``quietstar generate``: continues a prompt and, if requested, shows the thoughts."""

import argparse
import json
import math
import sys
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from quietstar._command_line import SuggestingParser, attach_texts
from quietstar._numbers import SEED, Interval, check_numbers
from quietstar.models import QuietStarForCausalLM
from quietstar.models.adapters import is_adapter, load_merged
from quietstar.models.checkpoint import check_tokenizer
from quietstar.models.defaults import CHECKS
from quietstar.models.outputs import QuietStarGenerateOutput, ThoughtStreamer, TokenStep

# Valid ranges of the flags; `generate` checks everything else.
INTERVALS = {
    "max_new_tokens": Interval(int, "[1, 1000000]"),
    "temperature": Interval(float, "[0, inf)"),
    "top_k": Interval(int, "[1, inf)"),
    "top_p": Interval(float, "(0, 1]"),
    "thought_temperature": Interval(float, "[0, inf)"),
    "seed": SEED,
}

_DIM, _PLAIN = "\033[2m", "\033[0m"


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    parser = SuggestingParser(prog="quietstar generate", description="Continue a prompt, thinking before every token.")
    add_arguments(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--thoughts", default="own", metavar="WHAT",
        help="own, random, or a text to use as the thought before every token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--stream", action="store_true", help="print text as it is generated")
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or with --stream one per line")
    options = parser.parse_args(attach_texts(arguments, "--prompt", "--thoughts"))
    logging.disable_progress_bar()
    try:
        _generate(options)
    except ValueError as error:
        print(f"quietstar generate: {error}", file=sys.stderr)
        return 2
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that generates text, for ``Generator``."""
    parser.add_argument("--model", required=True, help="folder or hub name of a Quiet-STaR checkpoint")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k most likely (default: %(default)s)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from this probability mass (default: %(default)s)"
    )
    parser.add_argument("--thought_temperature", type=float, help="temperature of the thoughts (default: the model's)")
    parser.add_argument(
        "--draft_length", type=number_or("auto", int), metavar="N",
        help="let the base model draft N tokens, then think after all of them at once: the same text, faster; or auto "
        "(default: the model's, usually no drafts)",
    )  # fmt: skip
    parser.add_argument(
        "--think", type=number_or("always never learned", float), metavar="WHEN",
        help="when to think: always, never, a threshold in nats (only where the base prediction has more entropy), or "
        "learned (only where the gain head expects a thought to gain more than --gain_threshold) (default: the "
        "model's, usually always)",
    )  # fmt: skip
    add_gain_threshold(parser)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--show-thoughts", action="store_true", help="print the thought before each new token")


def add_gain_threshold(parser: argparse.ArgumentParser) -> None:
    """Add ``--gain_threshold``, which goes with ``--think``."""
    parser.add_argument(
        "--gain_threshold",
        type=float,
        metavar="NATS",
        help="gain to expect with --think learned (default: the model's, usually 0.1)",
    )


def check_thinking(options: argparse.Namespace) -> None:
    """Check ``--draft_length``, ``--think`` and ``--gain_threshold`` as ``generate`` does."""
    try:
        for name, check in CHECKS.items():
            if (value := getattr(options, name)) is not None:
                check(value)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def number_or(words: str, number: type):
    """Create an argparse type that accepts one of some words or a number."""

    def parse(text: str) -> float | str:
        return text if text in words.split() else number(text)

    parse.__name__ = f"{number.__name__}, {words.replace(' ', ', ')}"  # argparse says "invalid ... value"
    return parse


def load_model(name: str, **fields: object) -> tuple[PreTrainedTokenizerBase, QuietStarForCausalLM]:
    """Load tokenizer and model, on the GPU if there is one. Adapters are merged into their base model.

    Args:
        name: folder or hub name.
        fields: fields of the configuration that replace the saved ones.

    Raises:
        ValueError: there is no Quiet-STaR checkpoint or no tokenizer, the tokenizer is another model's, or PEFT, which
            adapters need, is not installed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        load = load_merged if is_adapter(name) else QuietStarForCausalLM.from_pretrained
        model = load(name, **fields)
        check_tokenizer(tokenizer, model.config)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"cannot load --model {name}: {error}") from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


class Generator(NamedTuple):
    """A loaded model with the settings of the command line."""

    tokenizer: PreTrainedTokenizerBase
    model: QuietStarForCausalLM
    settings: dict[str, object]

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Generator":
        """Load a model and set the seed according to the arguments of ``add_arguments``.

        Raises:
            ValueError: an argument is out of range, or the model cannot be loaded.
        """
        check_numbers(INTERVALS, vars(options), prefix="--")
        check_thinking(options)
        overrides = {} if options.thought_temperature is None else {"thought_temperature": options.thought_temperature}
        tokenizer, model = load_model(options.model, **overrides)
        torch.manual_seed(options.seed)
        given = {name: value for name in CHECKS if (value := getattr(options, name)) is not None}
        settings = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0} | given
        settings["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if options.temperature > 0:
            settings |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return cls(tokenizer, model, settings)

    def __call__(self, inputs: dict[str, torch.Tensor], streamer: BaseStreamer | None) -> QuietStarGenerateOutput:
        """Continue a tokenized prompt; the output includes the thoughts."""
        return self.model.generate(
            **inputs.to(self.model.device), **self.settings, return_thoughts=True, streamer=streamer
        )


def _generate(options: argparse.Namespace) -> None:
    generator = Generator.load(options)
    tokenizer = generator.tokenizer
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"--prompt must hold at least one token, got {options.prompt!r}")
    streamer = None
    if options.stream and (options.json or options.show_thoughts):
        streamer = StepPrinter(tokenizer, as_json=options.json)
    elif options.stream:
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)

    generator.settings["thoughts"] = _thoughts(options.thoughts, tokenizer)
    output = generator(inputs, streamer)
    text = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    if options.json:
        summary = {"text": text} | _statistics(output)
        if not options.stream:
            summary["steps"] = [step.describe(tokenizer) for step in output.steps()]
        print(json.dumps(summary))
        return
    if options.show_thoughts and not options.stream:
        print(*thought_lines(tokenizer, output.steps(), dim=sys.stdout.isatty()), sep="\n")
    if options.show_thoughts:
        print()
    if options.show_thoughts or not options.stream:
        print(text)
    report(output)


def _thoughts(what: str, tokenizer: PreTrainedTokenizerBase) -> str | torch.Tensor:
    """Convert ``--thoughts`` to the argument of ``generate``; a given thought becomes int64 [1, k]."""
    if what in ("own", "shuffled", "random"):
        return what
    thought = tokenizer.encode(what, add_special_tokens=False)
    if not thought:
        raise ValueError(f"--thoughts must hold at least one token, got {what!r}")
    return torch.tensor([thought])


def _statistics(output: QuietStarGenerateOutput) -> dict[str, float | None]:
    rate = output.acceptance_rate
    return {"thought_share": output.thought_share, "acceptance_rate": None if math.isnan(rate) else rate}


def report(output: QuietStarGenerateOutput) -> None:
    """Print to stderr how many drafts were accepted and how often the model thought, if it did not always."""
    parts = []
    if output.drafted:
        parts.append(f"{output.acceptance_rate:.0%} of {output.drafted} drafts accepted")
    if output.thought_share < 1:
        parts.append(f"a thought in front of {output.thought_share:.0%} of {int(output.new_tokens.sum())} tokens")
    if parts:
        print("; ".join(parts), file=sys.stderr)


class StepPrinter(ThoughtStreamer):
    """Prints every step as it is generated, as a readable line or a JSON object."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, as_json: bool = False):
        self.tokenizer, self.as_json = tokenizer, as_json

    def put_step(self, step: TokenStep) -> None:
        if self.as_json:
            print(json.dumps(step.describe(self.tokenizer)), flush=True)
        else:
            print(*thought_lines(self.tokenizer, [step], dim=sys.stdout.isatty(), width=16), flush=True)


def thought_lines(
    tokenizer: PreTrainedTokenizerBase, steps: list[TokenStep], dim: bool, width: int | None = None
) -> list[str]:
    """Format one line per new token: the token, the weight of its thought, its gain in nats, and the thought.

    Args:
        tokenizer: the model's tokenizer.
        steps: the steps of one text.
        dim: whether to dim the thought, for terminals.
        width: width of the column of tokens; default that of the widest.
    """
    tokens = [repr(tokenizer.decode([step.token])) for step in steps]
    width = max(map(len, tokens)) if width is None else width
    before, after = (_DIM, _PLAIN) if dim else ("", "")
    return [
        f"{token:<{width}}  {before}{_describe(tokenizer, step)}{after}"
        for token, step in zip(tokens, steps, strict=True)
    ]


def _describe(tokenizer: PreTrainedTokenizerBase, step: TokenStep) -> str:
    if step.thought is None:
        return "no thought"
    return f"weight {step.mixing_weight:+.3f}  gain {step.gain:+.3f}  thought {tokenizer.decode(step.thought)!r}"
