"""A data file's token ids on disk, made once: an mmap away for every later run, process and worker.

The folder of a cache is named by a hash of all that its content follows from: the file's content, the tokenizer with
its first and last token, the settings of the rows, FORMAT_VERSION. So a file may be far larger than memory. What is
named is whole: it is written beside, flushed to the disk, then renamed; the meta data holds the size of every file, and
where one differs (a power cut, a half copy) the cache is made anew.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataset.rows import note_unread, read_jsonl
from model.errors import InputError

FORMAT_VERSION = 3  # part of the cache key: raise it when the meaning of a cached file changes
ROWS_PER_READ, BYTES_PER_READ = 1024, 1 << 20  # what the tokenizer is given at once; it takes 100 times the bytes
LEFTOVER_AGE = 24 * 3600  # seconds since anything was written: whoever did is dead


class Encoded(NamedTuple):
    """One document: ids (n,), 1 where the token is a target (None: all are), where the second one of a pair begins.

    lost: how many tokens were cut off.
    """

    ids: list[int] | array
    is_target: list[bool] | None
    border: int | None = None
    lost: int = 0


class TokenCache:
    """Token ids of all documents of a file: ids (N,) and targets (N,) memory-mapped, bounds (documents + 1,), and the
    line of the file that each came from, (documents,). A document that is a pair has its border in borders."""

    def __init__(self, folder: Path, path: Path):
        """path: the data file as it is called now; the cache knows its content alone."""
        self.folder, self.path = folder, path
        self.meta = json.loads((folder / "meta.json").read_text())
        self.ids = np.memmap(folder / "ids.bin", dtype=self.meta["dtype"], mode="r")
        self.targets = np.memmap(folder / "targets.bin", dtype=bool, mode="r") if self.meta["masked"] else None
        self.bounds = np.load(folder / "bounds.npy")
        self.lines = np.load(folder / "lines.npy")
        self.borders = np.load(folder / "borders.npy") if (folder / "borders.npy").exists() else None

    def kept(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that follows from the documents and from its name, made once and kept beside them."""
        path = self.folder / f"{name}.npy"
        with suppress(OSError, ValueError, EOFError):  # not there or not whole
            values = np.load(path)
            if values.shape == shape:
                return values
        values = make()
        scratch = path.with_name(f"{name}.{uuid.uuid4().hex}.tmp")
        with suppress(OSError):  # no room, or a folder that others own: it is made anew at each start
            try:
                with open(scratch, "wb") as file:
                    np.save(file, values)
                remove_leftovers(scratch)
                flush(scratch)
                scratch.replace(path)
            finally:
                scratch.unlink(missing_ok=True)
        return values

    def __reduce__(self):
        return TokenCache, (self.folder, self.path)  # a loader's worker process maps the files again, no copies


def file_hash(path: str | Path) -> str:
    """BLAKE2b of a file's content, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokenize_file(
    path: Path, tokenizer, cache_dir: Path, settings: str, check_row: Callable, encode: Callable, masked: bool
) -> TokenCache:
    """Validate and tokenise every row of a file once, or open what an earlier run has left in cache_dir."""
    if not path.is_file():
        next(read_jsonl(path))  # raises the sentence that fits
    data_hash = file_hash(path)
    key = cache_key(data_hash, tokenizer, settings)
    folder = cache_dir / key
    if is_whole(folder):
        return TokenCache(folder, path)
    scratch = cache_dir / f"{key}.{uuid.uuid4().hex}.tmp"  # containers may share both a folder and a process number
    scratch.mkdir(parents=True)
    remove_leftovers(scratch)
    with ended_by_sigterm():
        try:
            dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
            counts = write_documents(path, tokenizer, scratch, dtype, check_row, encode, masked)
            if counts["data_hash"] != data_hash:
                raise InputError(f"{path} was changed while it was read; start again when it is written to the end")
            sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
            meta = {"dtype": dtype.name, "masked": masked, **counts, "sizes": sizes}
            (scratch / "meta.json").write_text(json.dumps(meta))
            put_in_place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return TokenCache(folder, path)


def cache_key(data_hash: str, tokenizer, settings: str) -> str:
    """The name of a cache, 32 hex digits. The id of padding is not in it: nothing is padded here."""
    backend = tokenizer.backend_tokenizer
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id  # a tokenizer's configuration names them, not its vocabulary
    parts = [FORMAT_VERSION, data_hash, settings, *ends, backend.encode_special_tokens, backend.to_str()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def remove_leftovers(scratch: Path) -> None:
    """Remove what killed runs were writing beside `scratch`, which was just made, and nobody has touched for a day.

    A lock would not tell sooner: not every shared folder has them. The day is one by the clock of the file system.
    """
    now = scratch.stat().st_mtime
    for path in scratch.parent.glob(f"*.{'[0-9a-f]' * 32}.tmp"):
        with suppress(OSError):  # another run removes it too
            if now - max(file.stat().st_mtime for file in (path, *path.glob("*"))) > LEFTOVER_AGE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_whole(folder: Path) -> bool:
    """Whether a cache is there with all that was written."""
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def put_in_place(scratch: Path, folder: Path) -> None:
    """Name what scratch holds, once it has reached the disk: a power cut must not leave the name alone."""
    for path in [*scratch.iterdir(), scratch]:
        flush(path)
    try:
        scratch.rename(folder)
    except OSError:
        if is_whole(folder):  # another process was faster: its files are the same
            return
        if not folder.exists():
            raise
        shutil.rmtree(folder)  # damaged
        scratch.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM within raises, so that what is half made is removed; it would end the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def raise_terminated(number: int, frame) -> None:
    interrupt = KeyboardInterrupt()
    interrupt.exit_code = 128 + number
    raise interrupt


class Reading:
    """What has been read of a file: its size and its hash."""

    def __init__(self):
        self.size, self.digest = 0, hashlib.blake2b(digest_size=16)

    def __call__(self, line: bytes) -> None:
        self.size += len(line)
        self.digest.update(line)


def read_batches(path: Path, reading: Reading) -> Iterator[list[tuple[int, dict]]]:
    """(line number, row) of all rows, as many at a time as the tokenizer has memory for."""
    batch, begin = [], 0
    for row in read_jsonl(path, on_line=reading):
        batch.append(row)
        if len(batch) == ROWS_PER_READ or reading.size - begin >= BYTES_PER_READ:
            yield batch
            batch, begin = [], reading.size
    if batch:
        yield batch


def write_documents(
    path: Path, tokenizer, folder: Path, dtype: np.dtype, check_row: Callable, encode: Callable, masked: bool
) -> dict:
    """Stream a file through the tokenizer into folder; return what its meta data says of it.

    That is the hash of what was read, how many documents were kept, cut and skipped, how many tokens kept and cut off,
    and where each key that nobody reads stands first.
    """
    bounds, lines, borders = array("q", [0]), array("q"), array("q")
    skipped = cut = lost = 0
    unread: dict[str, int] = {}
    reading = Reading()
    with (
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "targets.bin", "wb") as targets_file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"tokenising {path.name}", disable=None) as bar,
    ):
        for batch in read_batches(path, reading):
            contents = [check_row(row, f"{path}:{number}") for number, row in batch]
            for number, row in batch:
                note_unread(unread, row, check_row, number)
            for (number, _), document in zip(batch, encode(tokenizer, contents), strict=True):
                if document is None:
                    skipped += 1
                    continue
                ids_file.write(np.asarray(document.ids, dtype).tobytes())
                if masked:
                    targets_file.write(np.asarray(document.is_target, bool).tobytes())
                bounds.append(bounds[-1] + len(document.ids))
                lines.append(number)
                cut, lost = cut + (document.lost > 0), lost + document.lost
                if document.border is not None:
                    borders.append(document.border)
            bar.update(reading.size - bar.n)
    if len(bounds) == 1:
        raise InputError(f"{path}: no row is left with anything to learn at this --max_seq_len")
    np.save(folder / "bounds.npy", np.frombuffer(bounds, dtype=np.int64))
    np.save(folder / "lines.npy", np.frombuffer(lines, dtype=np.int64))
    if borders:
        np.save(folder / "borders.npy", np.frombuffer(borders, dtype=np.int64))
    return {
        "data_hash": reading.digest.hexdigest(), "documents": len(bounds) - 1, "tokens": bounds[-1],
        "skipped": skipped, "cut": cut, "lost": lost, "unread": unread,
    }  # fmt: skip
