"""The command ``quietstar export``: writes the plain base model, for engines that do not support thoughts."""

import sys
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from quietstar._command_line import SuggestingParser
from quietstar.models import QuietStarForCausalLM
from quietstar.models.checkpoint import check_tokenizer
from quietstar.models.export import check_new, export_base


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    parser = SuggestingParser(
        prog="quietstar export",
        description="Write the base model of a Quiet-STaR model as a plain checkpoint of its own family, for vLLM, "
        "SGLang, llama.cpp and others. It has no thoughts: it predicts what the model predicts with --think never.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a Quiet-STaR checkpoint")
    parser.add_argument("--base", required=True, metavar="DIR", help="new or empty folder for the base model")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        _export(options.model, check_new("--base", options.base))
    except ValueError as error:
        print(f"quietstar export: {error}", file=sys.stderr)
        return 2
    return 0


def _export(name: str, folder: Path) -> None:
    try:
        model, tokenizer = QuietStarForCausalLM.from_pretrained(name), _tokenizer(name)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model.config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {name}: {error}") from error
    family, dtype = model.config.text_config.model_type, str(model.dtype).removeprefix("torch.")
    size = export_base(model, tokenizer, folder)
    print(f"{folder}: the base model, of type {family}, with {size} tokens, in {dtype}")
    if tokenizer is None:
        print(f"quietstar export: no tokenizer in {name}, so none was written", file=sys.stderr)
    print("The thoughts stay behind: it predicts what the model does with --think never.", file=sys.stderr)


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
