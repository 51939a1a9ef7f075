"""The windows of a run for training and evaluation, mixed from all sources."""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from datasets import Dataset, Features, IterableDataset, interleave_datasets
from transformers import PreTrainedTokenizerBase

from quietstar.training.arguments import DataArguments
from quietstar.training.data import load_documents, pack_dataset, split_documents
from quietstar.training.sources import explained, with_weights

SHUFFLED_TOGETHER = 1000  # windows of a stream

Documents = Dataset | IterableDataset


class StreamedWindows(torch.utils.data.IterableDataset):
    """Windows of a stream. Errors in the text become a DataError when it is read.

    Args:
        windows: iterable dataset of windows.
        sources: names of its sources, for messages.
    """

    def __init__(self, windows: IterableDataset, sources: Sequence[str]):
        self.windows, self.sources = windows, sources

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        with explained(*self.sources):
            yield from self.windows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order; called by transformers and accelerate."""
        self.windows.set_epoch(epoch)


class EndlessWindows(torch.utils.data.IterableDataset):
    """All epochs of a stream as a single one, so that a resumed trainer finds its place in any of them.

    (The trainer knows neither the length of an epoch nor the epoch of a checkpoint.)
    """

    def __init__(self, windows: StreamedWindows):
        self.windows = windows

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for epoch in count():
            self.windows.set_epoch(epoch)
            empty = True
            for window in self.windows:
                empty = False
                yield window
            if empty:
                return


class Corpus:
    """The text of a run.

    Args:
        arguments: the text and how it is cut into windows.
        seed: seed of the held-out split, of the mixture and, for a stream, of the order.

    Raises:
        ValueError: text does not exist or cannot be used; the message names the argument.
    """

    def __init__(self, arguments: DataArguments, seed: int):
        self.arguments, self.seed = arguments, seed
        self.sources, self.weights = with_weights("data", arguments.data)
        self.held_out_sources, self.held_out_weights = with_weights("eval_data", arguments.eval_data or [])
        self._documents = [self._load(name, arguments.data_config, arguments.data_split) for name in self.sources]
        self._held_out = [
            self._load(name, arguments.data_config if name in self.sources else None, arguments.eval_data_split)
            for name in self.held_out_sources
        ]
        if not self._held_out and arguments.held_out_fraction > 0:
            pairs = [split_documents(part, arguments.held_out_fraction, seed) for part in self._documents]
            self._documents, self._held_out = ([pair[i] for pair in pairs] for i in range(2))
            self.held_out_sources, self.held_out_weights = self.sources, self.weights

    def _load(self, name: str, config: str | None, split: str) -> Documents:
        return load_documents(name, config, split, self.arguments.text_column, self.arguments.streaming)

    def windows(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[Dataset | StreamedWindows, Dataset]:
        """Return windows to train on, and windows to evaluate on (None if nothing is held out).

        Raises:
            ValueError: as in ``quietstar.training.data.pack_dataset``.
        """
        training = self._mixed(
            self._documents, self.sources, self.weights, tokenizer, vocab_size, ends_with_the_first=True
        )
        held_out = None
        if self._held_out:
            names = self.held_out_sources
            if not self.arguments.eval_data:
                names = [f"what is held out of {name}" for name in names]
            held_out = self._mixed(self._held_out, names, self.held_out_weights, tokenizer, vocab_size)
            held_out = self._first(held_out, self.arguments.max_held_out_windows, self.held_out_sources)
        if self.arguments.streaming:
            self._first(training, 1, self.sources)
            training = training.shuffle(seed=self.seed, buffer_size=SHUFFLED_TOGETHER)
            training = StreamedWindows(training, self.sources)
        return training, held_out

    def _mixed(
        self, parts: list[Documents], names: list[str], weights: list[float] | None,
        tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends_with_the_first: bool = False,
    ) -> Documents:  # fmt: skip
        """Mix windows of all parts, in turn or by weights, until all (or one, ``ends_with_the_first``) are used up."""
        arguments = self.arguments
        windows = []
        for part, name in zip(parts, names, strict=True):
            try:
                windows.append(
                    pack_dataset(
                        part, tokenizer, arguments.block_size, arguments.workers,
                        separate=arguments.separate_documents, vocab_size=vocab_size,
                    )
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{error}, in {name}") from error
        if len(windows) == 1:
            return windows[0]
        if any("labels" in part.column_names for part in windows):
            windows = [_labelled(part) for part in windows]
        shares = weights and [weight / sum(weights) for weight in weights]
        stop = "first_exhausted" if weights and ends_with_the_first else "all_exhausted_without_replacement"
        return interleave_datasets(windows, probabilities=shares, seed=self.seed, stopping_strategy=stop)

    def _first(self, windows: Documents, count: int, sources: Sequence[str]) -> Dataset:
        """Take at most ``count`` windows; there must be at least one."""
        if isinstance(windows, Dataset):
            return windows.select(range(min(len(windows), count)))
        with explained(*sources):
            first = list(windows.take(count))
        if not first:
            raise ValueError(
                f"block_size must be no longer than the text: less than {self.arguments.block_size} tokens in "
                f"{', '.join(sources)}, or in what is held out of them"
            )
        return Dataset.from_list(first)


def _labelled(windows: Documents) -> Documents:
    """Add labels (the tokens) to windows without them, since all parts of a mixture need the same columns."""
    if "labels" in windows.column_names:
        return windows
    features = Features(windows.features | {"labels": windows.features["input_ids"]})
    return windows.map(lambda rows: {"labels": rows["input_ids"]}, batched=True, features=features)
