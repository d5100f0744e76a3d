"""Text as bytes: the running Python's standard library, or a file or folder of the user's."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["Corpus", "list_files", "load_corpus"]

VALIDATION_SHARE = 0.05
"""Share of the bytes that is held out, at least."""

SECONDS_WITHOUT_PROGRESS = 2.0
"""After this long a progress bar appears."""

# Tests hold generated tables, and the rest are programs or installers that some systems leave out.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
_SEPARATOR = b"\0"


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on.

    Attributes:
        train: Bytes, ``uint8`` of shape ``(num_bytes,)``.
        validation: Bytes held out, ``uint8`` of shape ``(num_bytes,)``.
        split: What went where: names, sizes and digests, for ``json.dump``.
    """

    train: Tensor
    validation: Tensor
    split: dict[str, Any]


def load_corpus(text: Path | None = None, *, window_size: int) -> Corpus:
    """Read and split a text.

    The split is by whole files: in the order of the digest of their names, files are held out until
    they are 5 % of the bytes. Files of equal content count once. A single file is cut: its last 5 %
    are held out.

    Args:
        text: A file, or a folder whose text files are all read. ``None``: the standard library of
            the running Python, without its tests.
        window_size: Inputs in a window; each part must hold one window and its last target.

    Raises:
        FileNotFoundError: If ``text`` does not exist.
        ValueError: If ``text`` holds no text, or too little for one window.
    """
    root, files = list_files(text)
    contents = {}
    with tqdm(
        total=sum(path.stat().st_size for path in files.values()),
        desc=f"Reading {root}",
        unit="B",
        unit_scale=True,
        delay=SECONDS_WITHOUT_PROGRESS,
    ) as progress:
        for name, path in files.items():
            contents[name] = path.read_bytes()
            progress.update(len(contents[name]))
    train, validation = _split(contents)
    if not any(train.values()):
        raise ValueError(f"text must hold at least one byte of text, and {root} holds none.")
    corpus = _make_corpus(
        train, validation, "Python standard library" if text is None else str(text)
    )
    for name, data in (("train", corpus.train), ("validation", corpus.validation)):
        if len(data) <= window_size:
            raise ValueError(
                f"text must be longer than one window of {window_size} bytes in both parts: the "
                f"{name} part of {root} has {len(data)} bytes. Give a longer text."
            )
    return corpus


def list_files(text: Path | None = None) -> tuple[Path, dict[str, Path]]:
    """Return the file or folder that :func:`load_corpus` reads, and its files by their names.

    Args:
        text: As for :func:`load_corpus`.

    Raises:
        FileNotFoundError: If ``text`` does not exist.
    """
    root = Path(sysconfig.get_path("stdlib")) if text is None else text
    if not root.exists():
        raise FileNotFoundError(f"text must be a file or a folder, and {root} does not exist.")
    if root.is_file():
        return root, {root.name: root}
    paths = _stdlib_sources(root) if text is None else _text_files(root)
    return root, {path.relative_to(root).as_posix(): path for path in paths}


def _stdlib_sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def _text_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not is_hidden and not _looks_binary(path):
            yield path


def _looks_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _split(contents: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    unique = {content: name for name, content in reversed(contents.items()) if content}
    files = {name: content for content, name in unique.items()}
    if len(files) == 1:
        [(name, content)] = files.items()
        cut = len(content) - int(len(content) * VALIDATION_SHARE)
        return {name: content[:cut]}, {name: content[cut:]}
    wanted = VALIDATION_SHARE * sum(map(len, files.values()))
    validation: dict[str, bytes] = {}
    for name in sorted(files, key=_digest_of_name)[:-1]:
        if sum(map(len, validation.values())) >= wanted:
            break
        validation[name] = files[name]
    train = {name: files[name] for name in sorted(files) if name not in validation}
    return train, dict(sorted(validation.items()))


def _digest_of_name(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _make_corpus(train: dict[str, bytes], validation: dict[str, bytes], source: str) -> Corpus:
    joined = [_SEPARATOR.join(part.values()) for part in (train, validation)]
    split = {
        "source": source,
        "train_bytes": len(joined[0]),
        "validation_bytes": len(joined[1]),
        "train_sha256": hashlib.sha256(joined[0]).hexdigest(),
        "validation_sha256": hashlib.sha256(joined[1]).hexdigest(),
        "validation_files": list(validation),
        "train_files": list(train),
    }
    tensors = [torch.frombuffer(bytearray(part or b"\0"), dtype=torch.uint8) for part in joined]
    return Corpus(tensors[0], tensors[1], split)
