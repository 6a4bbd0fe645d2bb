"""Where the text comes from: shards, the documents in them, and the split.

A shard is a file. Its documents are its JSON lines, or pieces of a plain text, or the
whole of a source file; `(shard, line)` names a position that can be returned to.
Documents that cannot be used are skipped and counted, and no line of a shard is held
whole in memory if it is longer than a document may be.
"""

import collections
import dataclasses
import glob
import gzip
import hashlib
import json
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator

from examples.llama.config import UsageError
from examples.llama.shard_hashes import shard_hashes

TRAIN, VALIDATION = "train", "validation"
_HELD_OUT = 20  # one document in so many is for validation
_LONGEST = 1_000_000  # characters; what follows in a document is left out
_LONGEST_LINE = 4 * _LONGEST  # bytes of a JSON line; a character has up to four
_PIECE = 65_536  # characters of a plain text that make a document
_HARMLESS = {"empty", "cut short"}
_LARGEST_BAD_SHARE = 0.01
_PATIENCE = 200  # documents seen before the bad share can stop a run
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


class Counts(collections.Counter[str]):
    """Documents read, and skipped ones by reason."""

    def check(self, corpus: str, finished: bool = False) -> None:
        """Stops when more than one document in a hundred was bad."""
        bad = {k: v for k, v in self.items() if k not in _HARMLESS | {"read"}}
        seen, number = self["read"] + sum(bad.values()), sum(bad.values())
        if number > _LARGEST_BAD_SHARE * seen and (finished or seen >= _PATIENCE):
            reasons = ", ".join(f"{v} {k}" for k, v in sorted(bad.items()))
            raise UsageError(
                f"corpus {corpus}: {number} of {seen} documents cannot be used "
                f"({reasons}); at most 1 in 100 is let pass"
            )

    def __str__(self) -> str:
        skipped = [f"{v} {k}" for k, v in sorted(self.items()) if k != "read"]
        return ", ".join([f"{self['read']} documents", *skipped])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Shards in order; their names do not depend on where they lie."""

    name: str
    paths: tuple[pathlib.Path, ...]
    names: tuple[str, ...]
    whole_files: bool = False
    text_key: str = "text"
    split: str | None = TRAIN  # None: nothing is held out

    def of(self, split: str | None) -> "Corpus":
        return dataclasses.replace(self, split=split)

    def part(self, host: int, hosts: int) -> "Corpus":
        """The shards of one of several hosts."""
        return dataclasses.replace(
            self, paths=self.paths[host::hosts], names=self.names[host::hosts]
        )

    def fingerprint(self, cache_dir: str = "") -> str:
        """Hash of names, sizes and contents.

        What was read once is noted in the folder, if one is named; a shard is read
        again when its size or its time is another.
        """
        # Small files are read faster than noted.
        cache_dir = "" if self.whole_files else cache_dir
        try:
            contents = shard_hashes(self.paths, cache_dir)
        except OSError as error:
            raise _unreadable(pathlib.Path(error.filename), error) from error
        digest = hashlib.sha256()
        for name, (size, content) in zip(self.names, contents, strict=True):
            digest.update(f"{name}\0{size}\0".encode())
            digest.update(bytes.fromhex(content))
        return digest.hexdigest()[:16]

    def documents(
        self, shard: int, start: int, counts: Counts
    ) -> Iterator[tuple[int, str]]:
        """(line, text) of the shard's usable documents of this split, from `start`."""
        name = self.names[shard]
        if self.whole_files and not self._holds(name):
            return
        read = _json_texts if ".json" in name else _plain_texts
        try:
            for line, raw in read(self.paths[shard], self.whole_files, start, counts):
                where = name if self.whole_files else f"{name}:{line}"
                if line < start or not self._holds(where):
                    continue
                if text := self._usable(raw, counts):
                    yield line, text
                counts.check(self.name)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            counts["damaged gzip"] += 1
        except OSError as error:
            raise _unreadable(self.paths[shard], error) from error

    def texts(self) -> Iterator[str]:
        """All usable texts, in order."""
        counts = Counts()
        for shard in range(len(self.paths)):
            for _, text in self.documents(shard, 0, counts):
                yield text
        counts.check(self.name, finished=True)

    def _holds(self, where: str) -> bool:
        if self.split is None:
            return True
        # By a hash of the name: the split is the same in every run and every epoch.
        number = int.from_bytes(hashlib.sha256(where.encode()).digest(), "big")
        return (number % _HELD_OUT == 0) == (self.split == VALIDATION)

    def _usable(self, raw: str | bytes, counts: Counts) -> str | None:
        if isinstance(raw, bytes) and len(raw) > _LONGEST_LINE:
            text, problem = "", f"line of more than {_LONGEST_LINE:,} bytes"
        elif isinstance(raw, bytes):
            text, problem = _parse(raw, self.text_key)
        else:
            text, problem = raw, ""
        if not problem and "\0" in text:
            problem = "NUL byte"
        if not problem:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            problem = _encoding_problem(raw, text)
        if not problem and not text.strip():
            problem = "empty"
        counts[problem or "read"] += 1
        if problem:
            return None
        if len(text) > _LONGEST:
            counts["cut short"] += 1
        return text[:_LONGEST]


def _plain_texts(
    path: pathlib.Path, whole: bool, start: int, counts: Counts
) -> Iterator[tuple[int, str]]:
    del start, counts
    opener = gzip.open if path.suffix == ".gz" else open
    # Bytes that are no UTF-8 become lone surrogates, by which `_encoding_problem` knows
    # them; a byte order mark is dropped.
    with opener(
        path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        at = 0
        while piece := file.read(-1 if whole else _PIECE):
            # Up to the end of the line, so that few pieces end inside of one.
            yield at, piece if whole else piece + file.readline(_PIECE)
            at += 1


def _json_texts(
    path: pathlib.Path, whole: bool, start: int, counts: Counts
) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank; of a very long one, more than it may have."""
    del whole
    at, rest = 0, b""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        # `read1` gives what it has: a damaged gzip is read up to the damage.
        while block := file.read1(2**20):
            if (
                not rest and not block.strip()
            ):  # nothing but line ends: passed over fast
                behind = at + block.count(b"\n")
                counts["empty"] += max(behind - max(at, start), 0)
                at = behind
                continue
            first, *others = block.split(b"\n")
            rest += first[: _LONGEST_LINE + 1 - len(rest)]
            for line in others:
                if rest.strip():
                    yield at, rest
                elif at >= start:
                    counts["empty"] += 1
                at, rest = at + 1, line
    if rest.strip():
        yield at, rest


def _parse(line: bytes, key: str) -> tuple[str, str]:
    """(text, "") or ("", what is wrong with the line)."""
    try:
        decoded = line.decode("utf-8-sig")
        text = json.loads(decoded)[key] if decoded.strip() else ""
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "invalid JSON"
    except (KeyError, TypeError, IndexError):
        return "", "without a text"
    return (text, "") if isinstance(text, str) else ("", "without a text")


def _encoding_problem(raw: str | bytes, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone surrogate" if isinstance(raw, bytes) else "not UTF-8"
    return ""


def _unreadable(path: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read shard {path}: {error.strerror or error}")


def stdlib() -> Corpus:
    """The sources of this Python's standard library, without its tests."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(root).parts)
    }
    if not found:
        raise UsageError(f"no sources of the standard library under {root}; use --data")
    names = tuple(sorted(found))
    return Corpus("stdlib", tuple(found[n] for n in names), names, whole_files=True)


def matching(pattern: str, text_key: str) -> Corpus:
    """The shards that a glob names, sorted."""
    pattern = str(pathlib.Path(pattern).expanduser())
    paths = sorted(
        pathlib.Path(p) for p in glob.glob(pattern, recursive=True)
        if not pathlib.Path(p).is_dir()
    )  # fmt: skip
    if not paths:
        raise UsageError(f"no file matches {pattern!r}")
    for path in paths:
        if path.exists() and not path.is_file():  # a pipe or device may never end
            raise UsageError(f"{path} is no file: a shard is read again every epoch")
    strange = [p for p in paths if not p.name.endswith(_SUFFIXES)]
    if strange:
        raise UsageError(
            f"{strange[0]} is no shard: expected one of {', '.join(_SUFFIXES)}"
        )
    names = tuple(p.name for p in paths)
    return Corpus(pattern, tuple(paths), names, text_key=text_key)


def load_corpora(data: str, val_data: str, text_key: str) -> tuple[Corpus, Corpus]:
    """Training and validation text."""
    both = matching(data, text_key) if data else stdlib()
    if val_data:
        return both.of(None), matching(val_data, text_key).of(None)
    return both.of(TRAIN), both.of(VALIDATION)
