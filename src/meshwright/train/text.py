"""Text: the documents that a run learns from, and those held out from it.

With nothing named, the text is one that every machine has: the source of Python's standard library. Otherwise files, or
folders whose text files are taken. A document is one file. What is found, and in which order, depends on names and
contents alone, so two machines with the same files train on the same documents.

Held out are the documents that hash lowest: the choice does not move when other documents come or go, and says nothing
about their place in the alphabet.
"""

import platform
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import fail

LIBRARY_BYTES = 4_000_000
"""How much of the standard library is read when the configuration does not say."""
_BULK = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
}
_TABLES = {"encodings", "pydoc_data"}
"""Folders of the standard library with few lines that a person wrote."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text, and what of it is used."""

    data: tuple[Path, ...] = ()
    """Text files, and folders of them. None: the source of Python's standard library."""
    max_bytes: int | None = None
    """Stop reading after this many bytes. None: 4 000 000 of the standard library, all of DATA."""
    tokenizer_bytes: int = 2_000_000
    """How much of the text the tokenizer is trained on."""
    held_out: float = 0.05
    """Share of the documents held out from training; at least one is."""

    def __post_init__(self) -> None:
        for field in ("max_bytes", "tokenizer_bytes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise fail(f"TextConfig: {field} is {value}; it must be at least 1.")
        if not 0 < self.held_out < 1:
            raise fail(f"TextConfig: held_out is {self.held_out}; it is a share, more than 0 and less than 1.")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """The length of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def rank(self) -> int:
        """A number that looks random and depends on the contents alone."""
        return zlib.crc32(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """The documents of a run."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]
    origin: str
    """What the text is, for people."""
    num_skipped: int
    """Files in the folders named that are not UTF-8 text."""
    cut: bool
    """Whether there was more text than ``max_bytes``."""

    def __str__(self) -> str:
        documents = self.training + self.held_out
        megabytes = sum(d.num_bytes for d in documents) / 1e6
        cut = ", the rest left out" if self.cut else ""
        skipped = f"; {self.num_skipped} files skipped that are not text" if self.num_skipped else ""
        count = "1 document" if len(documents) == 1 else f"{len(documents)} documents"
        return f"{self.origin}: {count}, {megabytes:.1f} MB{cut}, {len(self.held_out)} held out{skipped}"


def read(config: TextConfig) -> Corpus:
    """The corpus that ``config`` names.

    Raises:
        ValueError: a path does not exist, a named file is not UTF-8 text, or there is no text.
    """
    if config.data:
        files, origin = list(_named(config.data)), ", ".join(map(str, config.data))
    else:
        files, origin = _library(), f"the source of Python {platform.python_version()}'s standard library"
    limit = config.max_bytes or (None if config.data else LIBRARY_BYTES)
    documents, num_skipped, cut = _read_files(files, limit)
    if not documents:
        raise fail(f"There is no text in {origin}: {len(files)} files, {num_skipped} of them not UTF-8 text.")
    training, held_out = hold_out(documents, config.held_out)
    return Corpus(training, held_out, origin, num_skipped, cut)


def hold_out(documents: Sequence[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training documents and held-out ones. A single document is cut in two at the end of a line."""
    if len(documents) == 1:
        return _cut(documents[0], share)
    num = min(max(1, round(share * len(documents))), len(documents) - 1)
    out = sorted(range(len(documents)), key=lambda i: (documents[i].rank, i))[:num]
    held = set(out)
    return (
        tuple(d for i, d in enumerate(documents) if i not in held),
        tuple(documents[i] for i in sorted(out)),
    )


def _cut(document: Document, share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    text = document.text
    at = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or max(1, int(len(text) * (1 - share)))
    if not text[at:]:
        raise fail(f"The text of {document.name} is too short ({len(text)} characters) to hold a part of it out.")
    return (Document(document.name, text[:at]),), (Document(document.name, text[at:]),)


def _library() -> list[tuple[Path, bool]]:
    """The standard library's files, in an order that mixes its packages, so that a part stands for the whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not (_BULK | _TABLES) & set(p.relative_to(root).parts)]

    def rank(path: Path) -> tuple[int, str]:
        name = path.relative_to(root).as_posix()
        return zlib.crc32(name.encode()), name

    return [(path, False) for path in sorted(files, key=rank)]


def _named(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Each file, and whether it was named itself. Hidden files and folders inside a folder are left alone."""
    for path in paths:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file())
            yield from ((p, False) for p in sorted(inside) if not _hidden(p.relative_to(path)))
        elif path.exists():
            yield path, True
        else:
            raise fail(f"--data: there is no file or folder {str(path)!r}.")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_files(files: Sequence[tuple[Path, bool]], limit: int | None) -> tuple[list[Document], int, bool]:
    documents: list[Document] = []
    num_skipped = num_bytes = 0
    for path, named in files:
        if limit is not None and num_bytes >= limit:
            return documents, num_skipped, True
        text = _decode(path)
        if text is None and named:
            raise fail(f"--data: {str(path)!r} is not UTF-8 text.")
        if text is None:
            num_skipped += 1
        elif text.strip():
            documents.append(Document(str(path), text))
            num_bytes += documents[-1].num_bytes
    return documents, num_skipped, False


def _decode(path: Path) -> str | None:
    """The file's text, or None when it is something else."""
    held = path.read_bytes()
    if b"\0" in held:
        return None
    try:
        return held.decode()
    except UnicodeDecodeError:
        return None
