"""What a row may carry beside its turns, keys that nobody reads, and files that are no JSON lines."""

import gzip
import json

import pytest
from commands import chat, ends, write_rows

from dataset.chat import encode_conversation, render
from dataset.lm_dataset import DPODataset, PretrainDataset, SFTDataset
from dataset.rows import read_jsonl, row_conversation, row_pair, row_text, unread_keys
from model.errors import InputError
from scripts import inspect_data

TURNS = chat("Hi?", "Hello.")["conversations"]
ASKED, ANSWER = TURNS
WORSE = {"role": "assistant", "content": "Go away."}
PIRATE = {"role": "system", "content": "You are a pirate."}
TOOL = {"type": "function", "function": {"name": "get_rate", "parameters": {"pair": "string"}}}


def said(turns):
    """The texts of a conversation as they are written."""
    return [turn.given + (turn.reply or "") for turn in render(turns)]


# --------------------------------------------------------------------------------- a system prompt and tools of the row


def test_system_and_tools_of_a_row_are_those_of_its_system_turn(tokenizer):
    wanted = [{**PIRATE, "tools": [TOOL]}, *TURNS]
    row = {"conversations": TURNS, "system": "You are a pirate.", "tools": json.dumps([TOOL])}
    turns = row_conversation(row, "f:1")
    assert encode_conversation(tokenizer, turns) == encode_conversation(tokenizer, wanted)
    assert "You are a pirate." in said(turns)[0] and '{"name": "get_rate"' in said(turns)[0]
    chosen, rejected = row_pair({**row, "chosen": TURNS, "rejected": [ASKED, WORSE]}, "f:1")
    assert said(chosen) == said(wanted) and said(rejected) == said([wanted[0], ASKED, WORSE])
    del row["system"]
    for key in ("tools", "functions"):
        turns = row_conversation({"conversations": TURNS, key: [TOOL]}, "f:1")
        assert said(turns) == said([{"role": "system", "content": "", "tools": [TOOL]}, *TURNS])
        turns = row_conversation({"conversations": [PIRATE, *TURNS], key: [TOOL]}, "f:1")
        assert said(turns) == said(wanted)


@pytest.mark.parametrize("nothing", [None, "", "[]", " "])
def test_an_empty_system_and_empty_tools_are_none(nothing):
    row = {"conversations": TURNS, "system": nothing if nothing != "[]" else "", "tools": nothing}
    given = said(row_conversation(row, "f:1"))
    assert given[1:] == said(TURNS)[1:] and given[0].strip() in ("system", said(TURNS)[0])
    same = {"conversations": [PIRATE, *TURNS], "system": "You are a pirate.", "tools": nothing}
    assert said(row_conversation(same, "f:1")) == said([PIRATE, *TURNS])


BAD = {
    "two systems": (
        {"conversations": [PIRATE, *TURNS], "system": "x"},
        'the row has a "system" and another system turn',
    ),
    "other tools": (
        {"conversations": [{**PIRATE, "tools": [{"name": "f"}]}, *TURNS], "tools": [TOOL]},
        'the row has "tools" and its system turn has others',
    ),
    "system a list": ({"conversations": TURNS, "system": [1]}, "the content is of type list"),
    "tools no JSON": ({"conversations": TURNS, "tools": "[{"}, '"tools" is not valid JSON'),
    "nameless tool": ({"conversations": TURNS, "tools": [{}]}, "has no name"),
    "half a character": ({"conversations": TURNS, "system": "\ud83d"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    row, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        row_conversation(row, "f:7")
    assert str(error.value).startswith("f:7: ")


# ------------------------------------------------------------------------------------------------ a prompt of the row

PROMPTS = {
    "a system turn": ([PIRATE], TURNS, [ASKED, WORSE], [PIRATE]),
    "turns": ([PIRATE, ASKED], [ANSWER], [WORSE], [PIRATE]),
    "texts": ("Hi?", "Hello.", "Go away.", []),
    "a text and turns": ("Hi?", [ANSWER], [WORSE], []),
    "single turns": ([ASKED], ANSWER, WORSE, []),
    "repeated": ("Hi?", TURNS, [ASKED, WORSE], []),
    "repeated behind a system turn": ("Hi?", [PIRATE, *TURNS], [PIRATE, ASKED, WORSE], [PIRATE]),
    "an earlier exchange": ([ASKED, ANSWER], TURNS, [ASKED, WORSE], [ASKED, ANSWER]),
    "none": (None, TURNS, [ASKED, WORSE], []),
    "empty": ([], TURNS, [ASKED, WORSE], []),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_and_two_answers(name):
    prompt, chosen, rejected, before = PROMPTS[name]
    pair = row_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "f:1")
    assert pair == ([*before, *TURNS], [*before, ASKED, WORSE])


BAD_PROMPTS = {
    "another question": ({"prompt": "Who?", "chosen": TURNS, "rejected": [ASKED, WORSE]}, "another user turn follows"),
    "a number": ({"prompt": 5, "chosen": "a", "rejected": "b"}, "turn 1 must be an object"),
    "an empty answer": ({"prompt": "Hi?", "chosen": "", "rejected": "b"}, "neither content nor a tool call"),
    "no prompt for texts": ({"prompt": "", "chosen": "a", "rejected": "b"}, "a conversation must be a list"),
    "not learned": ({"prompt": "Hi?", "chosen": {**ANSWER, "weight": 0}, "rejected": "b"}, "as not learned"),
    "not learned of two": (
        {"chosen": [*TURNS, ASKED, {**ANSWER, "train": False}], "rejected": [*TURNS, ASKED, WORSE]},
        "chosen: the last turn, the answer, is marked as not learned",
    ),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_named(name):
    row, words = BAD_PROMPTS[name]
    with pytest.raises(InputError, match=words) as error:
        row_pair(row, "f:7")
    assert str(error.value).startswith("f:7: chosen: ")


# ------------------------------------------------------------------------------------------------- keys nobody reads


def test_unread_keys_are_named_with_what_was_meant():
    thought = {"role": "assistant", "content": "4", "thinking": "2 + 2", "weight": 1, "function_call": {"name": "f"}}
    tools = {"role": "user", "content": "2+2?", "tools": [TOOL], "weight": 0, "loss_mask": 1, "name": ""}
    row = {"conversations": [tools, thought], "id": 0, "source": None, "answer": "4", "system": "x", "meta": {}}
    assert sorted(unread_keys(row, row_conversation)) == [
        "'function_call' of assistant turns (tool_calls is read)",
        "'id'",
        "'loss_mask' of user turns",
        "'thinking' of assistant turns (reasoning_content is read)",
        "'tools' of user turns",
    ]
    assert list(unread_keys({"text": "x", "conversations": 5, "id": "a\x1b"}, row_text)) == ["'conversations'", "'id'"]
    row = {"prompt": "Hi?", "chosen": "a", "rejected": {**WORSE, "score": 1}, "margin": 2}
    assert list(unread_keys(row, row_pair)) == ["'margin'", "'score' of assistant turns"]
    named = list(unread_keys({"text": "x", "a\x1b\n\ud83d" * 99: 1}, row_text))
    assert len(named) == 1 and named[0].isprintable() and len(named[0]) < 400


TEXT_ROWS = [{"text": "one"}, {"text": "two", "id": 1}, {"text": "three", "id": 2}]
CHAT_ROWS = [chat("a", "b"), {"conversations": [{**ASKED, "mood": "x"}, ANSWER]}]
FILES = {
    "pretrain": (PretrainDataset, TEXT_ROWS, "'id' (line 2)"),
    "sft": (SFTDataset, CHAT_ROWS, "'mood' of user turns (line 2)"),
    "dpo": (DPODataset, [{"prompt": "Hi?", "chosen": "a", "rejected": "b", "score": 1}], "'score' (line 1)"),
}


@pytest.mark.parametrize("kind", FILES)
def test_training_and_inspect_data_name_unread_keys_once(kind, tmp_path, tokenizer, capsys):
    dataset, rows, told = FILES[kind]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    wanted = f"{path}: keys that nobody reads, each where it stands first: {told}\n"
    for _ in range(2):  # the second time from the cache
        dataset(path, tokenizer, 128, tmp_path / "out" / "cache")
        assert capsys.readouterr() == (wanted, "")
    code, out, err = ends(inspect_data, [path, f"--out_dir={tmp_path / 'out'}", "--color=0"], capsys)
    assert (code, err) == (0, "") and out.count(wanted) == 1


def test_nothing_is_told_of_rows_that_are_read_whole(tmp_path, tokenizer, capsys):
    rows = [{**chat("a", "b"), "answer": "b", "relation": "x", "language": "en", "system": "", "tools": None}]
    SFTDataset(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 128, tmp_path / "cache")
    assert capsys.readouterr() == ("", "")


def test_many_unread_keys_are_not_all_told(tmp_path, tokenizer, capsys):
    rows = [{"text": "one", **{f"key{number}": 1 for number in range(99)}}]
    PretrainDataset(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 128, tmp_path / "cache")
    assert 5 < capsys.readouterr().out.count("key") < 40


# ---------------------------------------------------------------------------------------------- files of other formats

OTHERS = {
    "array.json": (
        b'[\n  {\n    "text": "a"\n  }\n]\n',
        " is JSON over several lines, each row must be one: jq -c '.[]'",
    ),
    "array2.json": (b'\xef\xbb\xbf[{\n    "text": "a"\n  }]\n', " is JSON over several lines"),
    "object.json": (b'{\n  "text": "a"\n}\n', " is JSON over several lines, each row must be one: jq -c . "),
    "line.json": (b'[{"text": "a"}]\n', ":1: a row must be a JSON object on a line of its own, this is a list"),
    "rows.jsonl.gz": (gzip.compress(b'{"text": "a"}\n'), " is a gzip archive"),
    "rows.zip": (b"PK\x03\x04\n", " is a zip archive"),
    "rows.parquet": (b"PAR1\x15\x04", " is a parquet file"),
    "surrogate": (b'{"text": "a"}\n{"text": "cut \\ud83d here"}\n', ":2: the text holds half of a surrogate pair"),
    "bigint": (b'{"text": "a"}\n{"text": "a", "id": ' + b"7" * 5000 + b"}\n", ":2: a number of more than 4,300 digits"),
    "deep": (b'{"text": "a"}\n' + b'{"a":' * 5000 + b"1" + b"}" * 5000, ":2: brackets nested too deeply"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_get_a_sentence_that_fits(name, tmp_path, tokenizer, capsys):
    content, words = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        PretrainDataset(path, tokenizer, 64, tmp_path / "cache")
    assert str(error.value).startswith(f"{path}{words}") and "\n" not in str(error.value)
    code, out, err = ends(inspect_data, [path, "--color=0"], capsys)
    assert code == 1 and f"{path}{words}" in out + err and err.count("\n") == 1


def test_a_byte_order_mark_is_passed_over_on_any_line(tmp_path):
    """Two files of a Windows editor, joined."""
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n')
    assert list(read_jsonl(path)) == [(1, {"text": "a"}), (2, {"text": "b"})]
