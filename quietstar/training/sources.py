"""Reading of text from files, folders and named datasets, with messages that explain what cannot be read."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from quietstar._numbers import Interval

LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OPTIONS = {  # utf-8-sig is UTF-8 with or without a byte-order mark
    "text": {"sample_by": "paragraph", "encoding": "utf-8-sig"},
    "csv": {"keep_default_na": False, "encoding": "utf-8-sig"},  # a document may say "NA"
}
_WEIGHT = Interval(float, "(0, inf)")
_ABOUT_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


class DataError(ValueError):
    """Raised for text that cannot be read or used, when it is read."""


def with_weights(argument: str, sources: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split sources of the form ``NAME:WEIGHT`` or ``NAME`` into names and weights.

    If a file with the whole name exists, it has no weight; nor does the colon of a Windows drive start one.

    Raises:
        ValueError: a weight is not positive and finite, or only some of the sources have one.
    """
    names, weights = [], []
    for source in sources:
        name, _, number = source.rpartition(":")
        weight = _number(number) if name and not Path(source).exists() else None
        if weight is not None:
            _WEIGHT.check(f"the weight of {name} in {argument}", weight)
        names.append(source if weight is None else name)
        weights.append(weight)
    if all(weight is None for weight in weights):
        return names, None
    if None in weights:
        raise ValueError(f"{argument} must have weights for all sources or for none, got {' '.join(sources)}")
    return names, weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read(data: str, config: str | None, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Read the rows of ``data``, see ``quietstar.training.data.load_documents``.

    Raises:
        ValueError: the text does not exist or cannot be read; the message names file and line if they are known.
    """
    if streaming and "[" in split:
        raise ValueError(f"data_split must be a whole split with streaming, got {split!r}")
    path = Path(data)
    if has_magic(data) or path.is_file() or _ending(path) in LOADERS:
        loader, files = _files(data)
        if config is not None:
            raise ValueError(f"data_config must be left out with a file, got {config!r}")
        location, options = loader, {"data_files": [str(file) for file in files]}
    elif path.is_dir():
        loader = _loader_of_folder(path)
        location, options = data, {}
        if (path / "state.json").is_file():  # from Dataset.save_to_disk; load_dataset reads those of a DatasetDict
            location, options = "arrow", {"data_files": sorted(map(str, path.glob("*.arrow")))}
    elif path.is_absolute() or data.startswith("."):
        raise ValueError(f"data must be a file, a folder or the name of a dataset, got nothing at {data}")
    else:
        location, loader, options = data, None, {}
    with explained(data):
        dataset = load_dataset(
            location, config, split=split, streaming=streaming, **options, **_OPTIONS.get(loader, {})
        )
    if loader == "text":
        dataset = dataset.map(
            _split_at_blank_lines, batched=True, remove_columns=dataset.column_names, features=dataset.features
        )
    return dataset


def _ending(file: Path) -> str:
    """Return the file name extension that tells a file's format, without that of a compression."""
    return (Path(file.stem) if file.suffix in COMPRESSED else file).suffix


def _files(data: str) -> tuple[str, list[Path]]:
    """Return the loader for a file, or for the files that match a pattern, and the files."""
    there = [data] if Path(data).is_file() else glob(data, recursive=True)
    files = sorted(file for file in map(Path, there) if file.is_file())
    if not files:
        raise ValueError(f"data must be a file or the name of a dataset, got no file at {data}")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"data must hold text, got an empty file: {file}")
        if _ending(file) not in LOADERS:
            raise ValueError(f"data must be a file ending in {', '.join(LOADERS)}, got {file}")
    loaders = {LOADERS[_ending(file)] for file in files}
    if len(loaders) > 1:
        raise ValueError(f"data must be files of one kind, got {' and '.join(sorted(loaders))} at {data}")
    return loaders.pop(), files


def _loader_of_folder(folder: Path) -> str | None:
    """Return the loader for a folder's files, if it is one of ours and nothing else says how to read them."""
    if (folder / "README.md").is_file():  # it may list the files, and datasets reads it
        return None
    files = (file for file in folder.rglob("*") if file.name not in _ABOUT_DATA)
    loaders = {LOADERS[_ending(file)] for file in files if _ending(file) in LOADERS}
    if len(loaders) > 1:  # datasets would read one kind and ignore the others
        raise ValueError(f"data must be a folder of one kind of files, got {' and '.join(sorted(loaders))} in {folder}")
    return loaders.pop() if loaders else None


def _split_at_blank_lines(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    """Split text into paragraphs; the loader of text files does not treat lines of white space as blank."""
    parts = (part for text in batch["text"] for part in re.split(r"\n\s*\n", text))
    return {"text": [part for part in parts if part.strip()]}


@contextmanager
def explained(*sources: str) -> Iterator[None]:
    """Turn errors of the readers of all formats into a DataError that says what is wrong with the sources."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(_what_is_wrong(sources, error)) from error


def _what_is_wrong(sources: Sequence[str], error: BaseException) -> str:
    """Describe the invalid line of a file or, if there is none, the first error of the chain."""
    for file in (file for data in sources for file in _files_of(data)):
        if file.suffix in (".txt", ".jsonl", ".csv") and (found := _bad_line(file)):
            return f"data must be {'JSON Lines' if file.suffix == '.jsonl' else 'text'} in UTF-8, got {found}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"data cannot be read from {', '.join(sources)}: {type(error).__name__}: {error}"


def _files_of(data: str) -> list[Path]:
    path = Path(data)
    return [path] if path.is_file() else sorted(path.rglob("*") if path.is_dir() else map(Path, glob(data)))


def _bad_line(file: Path) -> str | None:
    """Find and describe the first invalid line of a file that has one row per line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig")
                if file.suffix == ".jsonl" and text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        return f"a {type(row).__name__} instead of an object in line {number} of {file}"
            except json.JSONDecodeError as error:
                return f"line {number} of {file}: {error.msg} at column {error.colno}"
            except UnicodeDecodeError as error:
                return f"line {number} of {file}: {error}"
    return None
