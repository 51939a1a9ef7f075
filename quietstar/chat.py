"""The command ``quietstar chat``: an interactive conversation with a model that thinks."""

import sys

from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from quietstar._command_line import SuggestingParser
from quietstar.generate import Generator, StepPrinter, add_arguments, report

_HELP = "/new starts anew, /exit or the end of input leaves"


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for invalid arguments."""
    parser = SuggestingParser(prog="quietstar chat", description=f"Talk with a Quiet-STaR model. {_HELP}.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        generator = Generator.load(options)
        _chat(generator, options.show_thoughts)
    except ValueError as error:
        print(f"quietstar chat: {error}", file=sys.stderr)
        return 2
    return 0


def _chat(generator: Generator, show_thoughts: bool) -> None:
    tokenizer = generator.tokenizer
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    talk = Conversation(tokenizer)
    streamer = (
        StepPrinter(tokenizer) if show_thoughts else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    while (said := _listen()) not in (None, "/exit"):
        if said == "/new":
            talk = Conversation(tokenizer)
        elif said:
            inputs = talk.ask(said)
            output = generator(inputs, streamer)
            new = output.sequences[0, inputs["input_ids"].shape[1] :]
            talk.answer(tokenizer.decode(new, skip_special_tokens=True))
            report(output)


def _listen() -> str | None:
    """Read the next line without surrounding white space; None at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


class Conversation:
    """The conversation so far as a prompt, in the tokenizer's chat template or, without one, as plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> BatchEncoding:
        """Add the user's message and return the prompt for the answer."""
        self.messages.append({"role": "user", "content": text})
        if self.tokenizer.chat_template is None:
            said = "\n".join(message["content"] for message in self.messages) + "\n"
            return self.tokenizer(said, return_tensors="pt", return_token_type_ids=False)
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True,
            tokenizer_kwargs={"return_token_type_ids": False},
        )  # fmt: skip

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self.messages.append({"role": "assistant", "content": text})
