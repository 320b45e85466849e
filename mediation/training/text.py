"""Text to train on: documents from files or from a Hugging Face dataset, a part of them held out.

1. A file is UTF-8 text, cut at blank lines into documents of `DOCUMENT_CHARACTERS` or a little more.
2. Files are shuffled together by a seed, document by document, so that no file dominates a stretch of training.
3. Every `HELD_OUT`-th document is held out: never trained on, kept for figures.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mediation.errors import MediationError

DOCUMENT_CHARACTERS = 4_000
HELD_OUT = 50  # one document in fifty


def documents_of(files: Sequence[Path], seed: int = 0) -> list[str]:
    """Steps 1 and 2."""
    found = [document for file in files for document in _cut(_read(file))]
    random.Random(seed).shuffle(found)
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MediationError(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise MediationError(f"{file} cannot be read: {error.strerror}.") from error


def _cut(text: str) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held, size = [], 0
    if any(held):
        yield "\n\n".join(held)


def dataset_documents(name: str, split: str = "train", column: str = "text", seed: int = 0) -> Iterator[str]:
    """Documents of a Hugging Face dataset in the local cache, or of a folder in a format `datasets` reads."""
    from datasets import DownloadConfig, load_dataset

    try:
        rows = load_dataset(name, split=split, download_config=DownloadConfig(local_files_only=True)).shuffle(seed)
    except Exception as error:  # missing, malformed and unreachable datasets raise whatever their reader raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise MediationError(f"The dataset '{name}' cannot be opened: {reason}.") from error
    if column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise MediationError(f"The dataset '{name}' has no column '{column}'; its columns are {known}.")
    return (row[column] for row in rows)


def kept(documents: Iterable[str]) -> Iterator[str]:
    """The documents to train on."""
    return (document for index, document in enumerate(documents) if index % HELD_OUT != HELD_OUT - 1)


def held_out(documents: Iterable[str]) -> Iterator[str]:
    """The documents kept for figures."""
    return (document for index, document in enumerate(documents) if index % HELD_OUT == HELD_OUT - 1)
