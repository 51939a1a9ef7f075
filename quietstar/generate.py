"""The command ``quietstar generate``: continue a prompt, showing the thoughts if asked."""

import argparse
import sys

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from quietstar.models import QuietStarForCausalLM
from quietstar.models.generation import GenerationWithThoughts, generate_with_thoughts

_DIM, _PLAIN = "\033[2m", "\033[0m"


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        overrides = {} if options.thought_temperature is None else {"thought_temperature": options.thought_temperature}
        model = QuietStarForCausalLM.from_pretrained(options.model, **overrides)
    except (OSError, ValueError) as error:
        print(f"quietstar generate: cannot load {options.model}: {error}", file=sys.stderr)
        return 2
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        print(f"quietstar generate: --prompt must hold at least one token, got {options.prompt!r}", file=sys.stderr)
        return 2
    torch.manual_seed(options.seed)
    sampling = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    sampling |= {"max_new_tokens": options.max_new_tokens, "pad_token_id": _pad_token(tokenizer)}
    if options.show_thoughts:
        generated = generate_with_thoughts(model, **inputs, **sampling)
        print("\n".join(thought_lines(tokenizer, generated, dim=sys.stdout.isatty())))
        print()
        print(tokenizer.decode(generated.sequences[0], skip_special_tokens=True))
    else:
        model.generate(**inputs, **sampling, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    return 0


def thought_lines(tokenizer: PreTrainedTokenizerBase, generated: GenerationWithThoughts, dim: bool) -> list[str]:
    """One line per new token of the first sequence: the token, the weight of its thought, and the thought."""
    count = generated.thought_tokens.shape[1]
    tokens = [repr(tokenizer.decode(token)) for token in generated.sequences[0, -count:]]
    thoughts = [repr(tokenizer.decode(thought)) for thought in generated.thought_tokens[0]]
    width = max(map(len, tokens))
    before, after = (_DIM, _PLAIN) if dim else ("", "")
    return [
        f"{token:<{width}}  {before}weight {float(weight):+.3f}  thought {thought}{after}"
        for token, weight, thought in zip(tokens, generated.mixing_weight[0], thoughts, strict=True)
    ]


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


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
