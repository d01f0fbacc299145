"""JSON lines -> rows that have been checked: every complaint names file:line, the reason and what to do."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.chat import render_assistant, validate_conversation
from model.errors import InputError


def read_jsonl(path: str | Path, on_bytes: Callable[[int], object] = lambda n: None) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row) for every row; blank lines are passed over, anything else that is no row is an error.

    on_bytes is told the size of every line read, for a progress bar.
    """
    path = Path(path)
    empty = True
    for number, line in read_lines(path):
        on_bytes(len(line))
        row = parse_line(line, f"{path}:{number}")
        if row is not None:
            empty = False
            yield number, row
    if empty:
        raise InputError(f"{path} is empty: it holds no row")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a file, without its byte order mark."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; give a JSON lines file with --data_path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def parse_line(line: bytes, where: str) -> dict | None:
    """The JSON object of a line, None for a blank one."""
    try:
        text = line.decode("utf-8")
        if not text.strip():
            return None
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a whole JSON object ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def row_text(row: dict, where: str) -> str:
    """The text of a pretraining row."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: a pretraining row needs a non-empty "text", this one has the keys {sorted(row)}')
    return text


def row_conversation(row: dict, where: str) -> list[dict]:
    """The turns of a chat row, validated."""
    if "conversations" not in row:
        raise InputError(f'{where}: a chat row needs "conversations", this one has the keys {sorted(row)}')
    validate_conversation(row["conversations"], where=where)
    return row["conversations"]


def row_pair(row: dict, where: str) -> tuple[list[dict], list[dict]]:
    """The two conversations of a preference row, validated: one prompt, two different answers to it."""
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f'{where}: a preference row needs "chosen" and "rejected", this one has the keys {sorted(row)}'
        )
    for side in ("chosen", "rejected"):
        validate_conversation(row[side], where=f"{where}: {side}")
        last = row[side][-1]
        if last["role"] != "assistant":
            raise InputError(f"{where}: {side}: the last turn is the {last['role']}'s, it must be the answer")
        if not render_assistant(last).strip():
            raise InputError(f"{where}: {side}: the last turn, the answer, is blank")
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{where}: chosen and rejected differ before their last turn: give both the same prompt")
    if render_assistant(chosen[-1]) == render_assistant(rejected[-1]):
        raise InputError(f"{where}: chosen and rejected are the same answer: there is nothing to prefer")
    return chosen, rejected
