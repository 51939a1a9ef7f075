"""The command ``quietstar generate``: continue a prompt, showing the thoughts if asked."""

import argparse
import sys

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from quietstar.models import QuietStarForCausalLM
from quietstar.models.generation_output import TokenStep

_DIM, _PLAIN = "\033[2m", "\033[0m"


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()
    try:
        _generate(options)
    except ValueError as error:
        print(f"quietstar generate: {error}", file=sys.stderr)
        return 2
    return 0


def _generate(options: argparse.Namespace) -> None:
    if options.temperature < 0:
        raise ValueError(f"--temperature must be >= 0, got {options.temperature}")
    overrides = {} if options.thought_temperature is None else {"thought_temperature": options.thought_temperature}
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = QuietStarForCausalLM.from_pretrained(options.model, **overrides)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load --model {options.model}: {error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"--prompt must hold at least one token, got {options.prompt!r}")

    torch.manual_seed(options.seed)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    settings["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if options.temperature > 0:
        settings |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    if options.show_thoughts:
        generated = model.generate(**inputs, **settings, return_thoughts=True)
        print(*thought_lines(tokenizer, generated.steps(), dim=sys.stdout.isatty()), sep="\n", end="\n\n")
        print(tokenizer.decode(generated.sequences[0], skip_special_tokens=True))
    else:
        model.generate(**inputs, **settings, streamer=TextStreamer(tokenizer, skip_special_tokens=True))


def thought_lines(tokenizer: PreTrainedTokenizerBase, steps: list[TokenStep], dim: bool) -> list[str]:
    """One line per new token: the token, the weight of its thought, what it gained, and the thought."""
    tokens = [repr(tokenizer.decode([step.token])) for step in steps]
    width = max(map(len, tokens))
    before, after = (_DIM, _PLAIN) if dim else ("", "")
    return [
        f"{token:<{width}}  {before}{describe_thought(tokenizer, step)}{after}"
        for token, step in zip(tokens, steps, strict=True)
    ]


def describe_thought(tokenizer: PreTrainedTokenizerBase, step: TokenStep) -> str:
    """What the model thought in front of a token, in one line."""
    if step.thought is None:
        return "no thought"
    thought = repr(tokenizer.decode(step.thought))
    return f"weight {step.mixing_weight:+.3f}  gain {step.gain:+.3f}  thought {thought}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quietstar generate", description="Continue a prompt, thinking before every token."
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a Quiet-STaR checkpoint")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k likeliest (default: %(default)s)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from this probability mass (default: %(default)s)"
    )
    parser.add_argument("--thought_temperature", type=float, help="temperature of the thoughts (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--show-thoughts", action="store_true", help="print the thought in front of each new token")
    return parser
