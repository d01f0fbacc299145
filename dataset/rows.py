"""JSON lines -> rows that have been checked: every complaint names file:line, the reason and what to do.

A row may carry beside its turns the system prompt and the tools of their system turn ("system", "tools"), and a row of
two answers what they answer ("prompt"); these become turns here. Keys that nobody reads are found for the user to know.
"""

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.chat import (
    LEARN_KEYS,
    SYSTEM_ROLES,
    check_text,
    is_learned,
    render_assistant,
    tools_of,
    validate_conversation,
    validate_turn,
)
from model.errors import InputError

PACKED = {  # how files begin that hold no lines of text
    b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive", b"\x28\xb5\x2f\xfd": "a zstd archive", b"PAR1": "a parquet file",
}  # fmt: skip


def read_jsonl(path: str | Path, on_line: Callable[[bytes], object] = lambda line: None) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row) for every row; blank lines are passed over, anything else that is no row is an error.

    on_line is given every line read.
    """
    path = Path(path)
    empty = True
    for number, line in read_lines(path):
        on_line(line)
        row = parse_line(line, f"{path}:{number}")
        if row is not None:
            empty = False
            yield number, row
    if empty:
        raise InputError(f"{path} is empty: it holds no row")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a file; one that is no JSON lines at all is refused at its beginning."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give a JSON lines file with --data_path")
    with path.open("rb") as file:
        refuse_packed(path, file.peek(8))
        for number, line in enumerate(file, start=1):
            if number == 1:
                refuse_spread(path, line)
            yield number, line


def refuse_packed(path: Path, head: bytes) -> None:
    """Raise InputError if a file begins as an archive does."""
    for beginning, kind in PACKED.items():
        if head.startswith(beginning):
            raise InputError(f"{path} is {kind}, not lines of text: unpack or convert it first")


def refuse_spread(path: Path, line: bytes) -> None:
    """Raise InputError if a file's first line begins JSON that is written over several lines."""
    beginning = line.removeprefix(codecs.BOM_UTF8).strip()
    if beginning in (b"[", b"[{", b"{"):
        rows = "." if beginning == b"{" else "'.[]'"
        raise InputError(f"{path} is JSON over several lines, each row must be one: jq -c {rows} FILE > NEW.jsonl")


def parse_line(line: bytes, where: str) -> dict | None:
    """The JSON object of a line, None for a blank one."""
    try:
        text = line.decode("utf-8-sig")
        if not text.strip():
            return None
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a whole JSON object ({error.msg}, column {error.colno})") from None
    except ValueError:
        digits = f"more than {sys.get_int_max_str_digits():,} digits"
        raise InputError(f"{where}: a number of {digits}; write it as a string, or leave it out") from None
    except RecursionError:
        raise InputError(f"{where}: brackets nested too deeply to be read; leave the row out") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object on a line of its own, this is a {type(row).__name__}")
    return row


def row_text(row: dict, where: str) -> str:
    """The text of a pretraining row."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: a pretraining row needs a non-empty "text", this one has the keys {sorted(row)}')
    check_text(text, f"{where}: ")
    return text


def row_conversation(row: dict, where: str) -> list[dict]:
    """The turns of a chat row, validated, behind the row's own system prompt and tools."""
    if "conversations" not in row:
        raise InputError(f'{where}: a chat row needs "conversations", this one has the keys {sorted(row)}')
    validate_conversation(row["conversations"], where=where)
    return behind_system(row["conversations"], row, where)


def row_pair(row: dict, where: str) -> tuple[list[dict], list[dict]]:
    """The two conversations of a preference row, validated: one prompt, two different answers to it."""
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f'{where}: a preference row needs "chosen" and "rejected", this one has the keys {sorted(row)}'
        )
    pair = [behind_system(row_side(row, side, where), row, where) for side in ("chosen", "rejected")]
    chosen, rejected = pair
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{where}: chosen and rejected differ before their last turn: give both the same prompt")
    if render_assistant(chosen[-1]) == render_assistant(rejected[-1]):
        raise InputError(f"{where}: chosen and rejected are the same answer: there is nothing to prefer")
    return chosen, rejected


def row_prompt(row: dict, where: str) -> list[dict]:
    """The turns of a chat row that a reply is sampled to: without its last assistant turn, whose words nobody reads."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise InputError(f'{where}: a prompt row needs "conversations", this one has the keys {sorted(row)}')
    if turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    validate_conversation(turns, where=where, require_assistant=False)
    if turns[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{where}: nothing is asked: a prompt ends with a user turn, not with the {turns[-1]['role']}'s"
        )
    return behind_system(turns, row, where)


def row_answer(row: dict, where: str) -> str | None:
    """The answer that makes a row verifiable, if it has one: a text, or a number."""
    answer = row.get("answer")
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f'{where}: the "answer" must be a text or a number, not {type(answer).__name__}')
    check_text(str(answer), f"{where}: ")
    return str(answer).strip()


def row_side(row: dict, side: str, where: str) -> list[dict]:
    """The conversation of one side of a preference row, validated: the row's "prompt", if it has one, and an answer."""
    turns = row[side]
    if row.get("prompt"):
        turns = behind_prompt(as_turns(row["prompt"], "user"), as_turns(turns, "assistant"), f"{where}: {side}: ")
    validate_conversation(turns, where=f"{where}: {side}")
    last = turns[-1]
    if last["role"] != "assistant":
        raise InputError(f"{where}: {side}: the last turn is the {last['role']}'s, it must be the answer")
    if not render_assistant(last).strip():
        raise InputError(f"{where}: {side}: the last turn, the answer, is blank")
    if not is_learned(last):
        raise InputError(f"{where}: {side}: the last turn, the answer, is marked as not learned")
    return turns


def as_turns(value: object, role: str) -> list:
    """A list of turns, also from a text (a turn of this role) or a single turn."""
    turn = {"role": role, "content": value} if isinstance(value, str) else value
    return turn if isinstance(turn, list) else [turn]


def behind_prompt(prompt: list, turns: list, at: str) -> list:
    """What a row's "prompt" and one of its sides say together: some files repeat the prompt in each side."""
    if any(turns[begin : begin + len(prompt)] == prompt and turns[begin + len(prompt) :] for begin in (0, 1)):
        return turns
    around = [turn.get("role") for turn in (prompt[-1], *turns[:1]) if isinstance(turn, dict)]
    if around == ["user", "user"]:
        raise InputError(f'{at}another user turn follows the "prompt": give the answer alone, or repeat the prompt')
    return prompt + turns


def behind_system(turns: list[dict], row: dict, where: str) -> list[dict]:
    """Validated turns with the "system" and the "tools" that stand in the row beside them, as their system turn."""
    system, tools = row.get("system") or "", tools_of(row, f"{where}: ")
    if not system and not tools:
        return turns
    has_own = turns[0]["role"] in SYSTEM_ROLES
    own = turns[0] if has_own else {"role": "system", "content": ""}
    if system and own["content"] not in ("", system):
        raise InputError(f'{where}: the row has a "system" and another system turn: leave one of them out')
    if tools and tools_of(own) not in ([], tools):
        raise InputError(f'{where}: the row has "tools" and its system turn has others: leave one of them out')
    own = {**own, "content": own["content"] or system, "tools": tools or tools_of(own)}
    validate_turn(own, f'{where}: "system" and "tools" of the row: ')
    return [own, *turns[has_own:]]


# ------------------------------------------------------------------------------------------------- keys nobody reads

LABELS = {"answer", "relation", "language"}  # by which held-out rows are scored
SYSTEM_KEYS = {"system", "tools", "functions"}
ROW_KEYS = {
    row_text: {"text"},
    row_conversation: {"conversations", *SYSTEM_KEYS, *LABELS},
    row_prompt: {"conversations", *SYSTEM_KEYS, *LABELS},
    row_pair: {"prompt", "chosen", "rejected", *SYSTEM_KEYS, *LABELS},
}
TURN_KEYS = {
    **{role: {"role", "content", "tools", "functions"} for role in SYSTEM_ROLES},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls", *LEARN_KEYS},
    "tool": {"role", "content"},
}
MEANT = {"thinking": "reasoning_content", "reasoning": "reasoning_content", "function_call": "tool_calls"}
MOST_KEYS = 20  # that are told
EMPTY = (None, "", [], {})


def unread_keys(row: dict, check_row: Callable) -> Iterator[str]:
    """What a row that check_row has passed carries and nobody reads, named for the user; empty values do not count."""
    for key, value in row.items():
        if key not in ROW_KEYS[check_row] and value not in EMPTY:
            yield name_key(key)
    for side in ("conversations", "prompt", "chosen", "rejected"):
        turns = row.get(side) if side in ROW_KEYS[check_row] else None
        for turn in as_turns(turns, "user") if turns else ():
            for key in turn.keys() - TURN_KEYS[turn["role"]]:
                not_learned_anyway = key in LEARN_KEYS and not turn[key]
                if turn[key] not in EMPTY and not not_learned_anyway:
                    yield name_key(key, f" of {turn['role']} turns")


def note_unread(unread: dict[str, int], row: dict, check_row: Callable, number: int) -> None:
    """Note where each key that nobody reads stands first."""
    for key in unread_keys(row, check_row):
        if len(unread) < MOST_KEYS:
            unread.setdefault(key, number)


def tell_unread(path: str | Path, unread: dict[str, int]) -> None:
    """Say which keys of a file nobody reads, if any."""
    if unread:
        keys = ", ".join(f"{key} (line {line})" for key, line in unread.items())
        print(f"{path}: keys that nobody reads, each where it stands first: {keys}")


def name_key(key: str, place: str = "") -> str:
    """A key as the user is told of it, with the one that was meant."""
    return f"{key[:40]!r}{place}" + (f" ({MEANT[key]} is read)" if key in MEANT else "")
