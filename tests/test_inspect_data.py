"""scripts/inspect_data.py: marks of what is learned, packed rows, pairs, every bad row by its line."""

import json
import re

import pytest
from commands import TEXTS, chat, ends, write_rows

from scripts import inspect_data


def inspect(path, capsys, *flags):
    return ends(inspect_data, [path, f"--out_dir={path.parent / 'out'}", "--color=0", *flags], capsys)


def test_marks_of_a_conversation(tmp_path, capsys):
    path = write_rows(tmp_path / "chats.jsonl", [chat("Who?", "It is me."), chat("What?", "That.")])
    code, out, err = inspect(path, capsys, "--rows=1")
    assert (code, err) == (0, "")
    assert "2 rows in the sft format, 0 of them repeat" in out
    assert f"{path}:1" in out and f"{path}:2" not in out
    marked = out[out.index(f"{path}:1\n") :]
    assert "[+] It is me.<|im_end|>\n" in marked and marked.count("[+]") == 1
    before, after = marked.split("[+] It is me.<|im_end|>\n")
    assert before.count("[ ]") == 1 and before.rstrip().endswith("<|im_start|>assistant⏎")
    assert after.strip() == "[ ] ⏎"  # the newline behind the end token is not learned
    assert "[x]" not in out


def test_colours_and_cut_off_part(tmp_path, capsys):
    path = write_rows(tmp_path / "chats.jsonl", [chat("Who?", "It is me. " * 30)])
    code, out, _ = inspect(path, capsys, "--max_seq_len=32")
    marked = out[out.index(f"{path}:1\n") :]
    assert code == 0 and [line[:3] for line in marked.splitlines() if line.startswith("[")] == [
        "[ ]",
        "[+]",
        "[x]",
    ]
    assert "<|im_end|>" not in marked.split("[+]")[1].split("[x]")[0]
    _, out, _ = inspect(path, capsys, "--max_seq_len=32", "--color=1")
    assert inspect_data.GREEN in out and inspect_data.RED in out and out.rstrip().endswith(inspect_data.PLAIN)


def test_pretraining_file(tmp_path, capsys):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in [*TEXTS, TEXTS[0]]])
    code, out, err = inspect(path, capsys)
    assert (code, err) == (0, "") and "13 rows in the pretrain format, 1 of them repeat" in out
    assert f"[ ] <|im_start|>\n[+] {TEXTS[0]}<|im_end|>\n" in out


def test_the_first_token_of_a_cut_piece_is_not_learned(tmp_path, capsys, tokenizer):
    """A document of 20 tokens in rows of 8: nothing stands before the tokens 0, 8 and 16."""
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text}])
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]
    wanted = []
    for begin in range(0, len(ids), 8):
        wanted.append("[ ] " + tokenizer.decode(ids[begin : begin + 1]))
        wanted.append("[+] " + tokenizer.decode(ids[begin + 1 : begin + 8]))
    assert len(ids) > 17 and len(ids) % 8 != 1
    code, out, _ = inspect(path, capsys, "--max_seq_len=8")
    assert code == 0 and out[out.index(f"{path}:1\n") :].splitlines()[1:-1] == wanted
    code, out, _ = inspect(path, capsys, "--max_seq_len=8", "--packed", "--rows=9")
    assert code == 0 and all(line in out.splitlines() for line in wanted)


def test_what_is_cut_is_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "chats.jsonl", [chat("Who?", "It is me. " * 60)] * 3 + [chat("Who?", "Me.")])
    code, out, err = inspect(path, capsys, "--max_seq_len=32")
    assert (code, err) == (0, "") and f"{path}: 3 of 4 rows are longer than 32 tokens and are cut: " in out
    code, out, err = inspect(path, capsys, "--max_seq_len=512")
    assert code == 0 and "are cut" not in out


def test_a_repeated_first_row_is_seen_behind_a_byte_order_mark(tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "a"}\n')
    code, out, _ = inspect(path, capsys)
    assert code == 0 and "2 rows in the pretrain format, 1 of them repeat" in out


def test_packed_rows_show_document_borders(tmp_path, capsys):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    code, out, err = inspect(path, capsys, "--packed", "--max_seq_len=256", "--rows=5")
    assert (code, err) == (0, "")
    assert out.count("--- document") == len(TEXTS) and out.count("--- padding") == out.count("packed row ")
    assert out.count("[ ] <|im_start|>\n") == len(TEXTS)
    assert all(f"[+] {text}<|im_end|>\n" in out for text in TEXTS)


def test_pairs_are_shown_side_by_side(tmp_path, capsys):
    sides = {"chosen": "It is me.", "rejected": "Go away! " * 20}
    path = write_rows(
        tmp_path / "pairs.jsonl", [{side: chat("Who?", text)["conversations"] for side, text in sides.items()}]
    )
    code, out, err = inspect(path, capsys, "--max_seq_len=80")
    assert (code, err) == (0, "") and "1 rows in the dpo format" in out
    chosen, rejected = out[out.index(f"{path}:1, chosen\n") :].split(f"{path}:1, rejected\n")
    assert "[+] It is me.<|im_end|>\n" in chosen and "[x]" not in chosen
    assert rejected.index("[+] Go away! ") < rejected.index("[x] ") and "<|im_end|>" in rejected.split("[x]")[1]
    code, out, _ = inspect(path, capsys, "--max_seq_len=80", "--packed")
    assert code == 0 and out.count("--- document") == 2
    write_rows(path, [{"chosen": chat("Who?", "Me.")["conversations"]}])
    code, out, _ = inspect(path, capsys)
    assert code == 1 and f'bad: {path}:1: a preference row needs "chosen" and "rejected"' in out


BAD_ROWS = {
    2: '{"conversations": [{"role": "user", "content": "half',
    3: '{"conversations": [{"role": "king", "content": "x"}]}',
    5: '{"conversations": [{"role": "user", "content": "nobody answers"}]}',
    6: '["no object"]',
    8: '{"text": "another format"}',
    9: '{"conversations": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]}',
}


def test_prompts_are_shown_as_the_policy_gets_them(tmp_path, capsys):
    asked = [[{"role": "user", "content": text}] for text in ("1+1?", "Say hello. " * 9, "Who?")]
    rows = [{"conversations": asked[0] + [{"role": "assistant", "content": "unread"}], "answer": 2}]
    rows += [{"conversations": asked[1], "answer": "hello"}, {"conversations": asked[2]}]
    path = write_rows(tmp_path / "rlaif.jsonl", rows)
    code, out, _ = inspect(path, capsys, "--max_seq_len=60", "--max_new_tokens=20", "--rows=1")
    assert code == 0 and "3 rows in the rlaif format" in out and "2 prompts, 1 with an answer to verify" in out
    assert "left out 1 prompts of more than 40 tokens" in out
    assert "\ntoo long: line 2\nwithout an answer: line 3\n" in out
    shown = out[out.index(f"{path}:1, answer: 2") :]
    assert "unread" not in out and "[+]" not in shown and shown.rstrip().endswith("<|im_start|>assistant⏎")
    code, out, err = inspect(path, capsys, "--max_seq_len=60", "--max_new_tokens=60")
    assert code == 2 and "--max_new_tokens 60 leaves no room for a prompt in 60 tokens" in err
    code, out, err = inspect(path, capsys, "--max_seq_len=60", "--max_new_tokens=59")
    assert code == 1 and "every prompt is longer than 1 tokens" in err
    code, out, _ = inspect(write_rows(tmp_path / "rlaif_all.jsonl", rows[:2]), capsys)
    assert code == 0 and "too long" not in out and "without an answer" not in out
    other = write_rows(tmp_path / "sums.jsonl", rows[1:])
    assert "2 rows in the rlaif format" in inspect(other, capsys)[1]
    bad = write_rows(tmp_path / "asked.jsonl", [{"conversations": asked[2]}, rows[0]])
    assert inspect(bad, capsys)[0] == 1  # a conversation without an answer stays a bad row
    bad = write_rows(tmp_path / "rlaif_bad.jsonl", [*rows, {"conversations": asked[0], "answer": ["2"]}])
    code, out, _ = inspect(bad, capsys)
    assert code == 1 and f'{bad}:4: the "answer" must be a text or a number, not list' in out


def test_every_bad_row_is_listed(tmp_path, capsys):
    good = json.dumps(chat("Hi?", "Hello."))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(BAD_ROWS.get(line, "" if line == 7 else good) for line in range(1, 11)), encoding="utf-8")
    with path.open("ab") as file:
        file.write(b"\n\xff\xfe")
    code, out, err = inspect(path, capsys)
    listed = [int(line) for line in re.findall(rf"  bad: {re.escape(str(path))}:(\d+): ", out)]
    assert code == 1 and listed == [*BAD_ROWS, 11]
    assert err.startswith(f"error: 7 bad rows in {path}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("color", ["0", "1"])
def test_control_characters_of_the_data_do_not_reach_the_terminal(color, tmp_path, capsys):
    evil = "a\x1b[2Jb\x07c\x9b31md\u202ee\r\x08"
    rows = [chat(evil, evil), {"conversations": [{"role": evil, "content": evil}]}, {evil: evil}]
    good = write_rows(tmp_path / "good.jsonl", rows[:1])
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    for path, wanted in (good, 0), (bad, 1):
        code, out, err = inspect(path, capsys, f"--color={color}")
        for colour in (inspect_data.GREEN, inspect_data.GREY, inspect_data.RED, inspect_data.PLAIN):
            out = out.replace(colour, "")
        assert code == wanted and not set("\x1b\x07\x9b\u202e\r\x08") & set(out + err)
        assert "a\\x1b[2Jb" in out
