"""Several updates on the same thoughts (``policy_updates``): batches are repeated together with their thoughts."""

from collections.abc import Iterator, Sized
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler, Sampler

from quietstar.models import QuietStarOutput

# The outputs of a batch's first update that the other updates reuse.
_GIVEN = "anchors", "thought_tokens", "thought_lengths", "baseline_nll", "teacher_logprobs"
_TEXT = "input_ids"


class RepeatedRows(Sampler):
    """Repeats every group of ``rows`` rows of another sampler ``times`` times; an incomplete last group is dropped.

    A random order depends only on seed and epoch, so that it is the same on all processes and when training resumes in
    the middle of an epoch.
    """

    def __init__(self, sampler: Sampler, count: int, rows: int, times: int, seed: int):
        self.sampler, self.count, self.rows, self.times, self.seed, self.epoch = sampler, count, rows, times, seed, 0

    def __len__(self) -> int:
        return self.count // self.rows * self.rows * self.times

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.sampler, RandomSampler):
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = list(self.sampler)
        for first in range(0, len(order) - self.rows + 1, self.rows):
            for _ in range(self.times):
                yield from order[first : first + self.rows]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order."""
        self.epoch = epoch


class RepeatedStream(IterableDataset):
    """Does the same as ``RepeatedRows`` for a stream of rows."""

    def __init__(self, dataset: IterableDataset, rows: int, times: int):
        self.dataset, self.rows, self.times = dataset, rows, times

    def __iter__(self) -> Iterator[object]:
        group = []
        for row in self.dataset:
            group.append(row)
            if len(group) == self.rows:
                for _ in range(self.times):
                    yield from group
                group = []

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the stream."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def repeated(sampler: Sampler, dataset: Sized, rows: int, times: int, seed: int) -> RepeatedRows:
    """Create a sampler that gives each group of ``rows`` rows to ``times`` updates.

    Raises:
        ValueError: there are fewer than ``rows`` rows.
    """
    if len(dataset) < rows:
        raise ValueError(
            f"train_dataset must have the {rows} rows of an optimizer step with policy_updates {times}, got "
            f"{len(dataset)}"
        )
    return RepeatedRows(sampler, len(dataset), rows, times, seed)


class KeptThoughts:
    """The thoughts of one optimizer step, and their log-probabilities when they were sampled.

    Steps are counted from 0. Thoughts are sampled at steps that are multiples of ``updates``.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._next = 0
        self._batches: list[dict[str, Tensor]] = []

    def recall(self, step: int, updates: int, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the stored thoughts for the next batch of a step; None if the model is to sample new ones.

        Raises:
            RuntimeError: the batch is not the one that was stored.
        """
        if step != self._step:
            self._step, self._next = step, 0
            if step % updates == 0:
                self._batches = []
        if step % updates == 0:
            return None
        kept = dict(self._batches[self._next]) if self._next < len(self._batches) else {}
        self._next += 1
        text = kept.pop(_TEXT, None)
        if text is None or not torch.equal(text.to(inputs[_TEXT].device), inputs[_TEXT]):
            raise RuntimeError(
                f"policy_updates must get the same batches {updates} times, got another one in step {step + 1}: does "
                "anything else choose the order of the training data?"
            )
        return {name: tensor.to(inputs[_TEXT].device) for name, tensor in kept.items()}

    def keep(self, inputs: dict[str, Tensor], output: QuietStarOutput) -> None:
        """Store a batch as it was given to the model, and the model's thoughts."""
        kept = {name: inputs[name] for name in (_TEXT, *_GIVEN) if inputs.get(name) is not None}
        for name in _GIVEN[:3]:
            if (value := getattr(output, name, None)) is not None:
                kept[name] = value
        self._batches.append(kept | {"old_logprobs": output.thought_logprobs.detach()})

    def save(self, folder: str | PathLike, rank: int, processes: int) -> None:
        """Write this process's thoughts into a checkpoint."""
        tensors = {
            f"{i}.{name}": tensor.contiguous().clone()
            for i, batch in enumerate(self._batches) for name, tensor in batch.items()
        }  # fmt: skip
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / _file_name(rank, processes))

    def load(self, folder: str | PathLike, rank: int, processes: int) -> None:
        """Load what ``save`` wrote.

        Raises:
            ValueError: the checkpoint was not written by the same number of processes.
        """
        file = Path(folder) / _file_name(rank, processes)
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint must hold {file.name} between updates on the same thoughts, got none in "
                f"{folder}: go on with as many processes and updates as before, or from another checkpoint"
            )
        self._step, self._next, self._batches = None, 0, []
        for key, tensor in sorted(load_file(file).items(), key=lambda item: int(item[0].split(".")[0])):
            number, name = key.split(".", 1)
            while len(self._batches) <= int(number):
                self._batches.append({})
            self._batches[int(number)][name] = tensor


def _file_name(rank: int, processes: int) -> str:
    return f"thoughts-{rank}-of-{processes}.safetensors"
