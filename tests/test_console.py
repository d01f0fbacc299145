"""Consoles that are not UTF-8, and text that is no Unicode: typed, given, printed."""

import io
import sys
from types import SimpleNamespace

import pytest
from commands import chat, ends, write_rows
from small_runs import TINY

import eval_model
from model.errors import UsageError, check_given_text
from model.errors import run_script as run_in_process
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import inspect_data
from trainer import train_pretrain

HALF = "a\ud83d"


@pytest.fixture
def console(monkeypatch):
    """console("gbk") -> the bytes that reach a console of that encoding, so far."""

    def open_console(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        return raw.getvalue

    return open_console


def run(module, flags):
    run_in_process(lambda: module.parse_args([str(flag) for flag in flags]), module.main)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("gbk", "你好 \\U0001f600 \\ud83d".encode("gbk")), ("ascii", b"\\u4f60\\u597d \\U0001f600 \\ud83d")],
)
def test_a_console_shows_what_it_has(encoding, shown, console):
    output = console(encoding)
    run_in_process(lambda: print("你好 😀 \ud83d", end=""), lambda args: print("!", end=""))  # --help prints, too
    assert output() == shown + b"!"


def test_output_that_a_test_or_notebook_stands_in_for(monkeypatch):
    for stand_in in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stand_in)
        run_in_process(lambda: None, lambda args: None)


def test_emoji_in_data_do_not_end_inspect_data(console, tmp_path):
    path = write_rows(tmp_path / "emoji.jsonl", [chat("hi 😀", "好 👍 ok")])
    output = console("gbk")
    run(inspect_data, [path, f"--out_dir={tmp_path}", "--color=0"])
    assert "hi \\U0001f600" in output().decode("gbk") and "好 \\U0001f44d ok" in output().decode("gbk")


def test_questions_and_answers_on_a_console_without_chinese(console, tmp_path, monkeypatch):
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1))
    keys = {"stage": "full_sft", "tokens_seen": 0, "data_path": "x", "data_hash": "h", "trained_length": 64}
    save_weights(model, tmp_path / "full_sft_64.pth", **keys)
    monkeypatch.setattr(eval_model, "QUESTIONS", ["你是谁？"])
    monkeypatch.setattr(eval_model, "pieces", lambda engine, request, ids: iter(["是 ", "😀"]))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    output = console("ascii")
    run(eval_model, [f"--out_dir={tmp_path}", "--device=cpu"])
    assert b"> \\u4f60\\u662f\\u8c01\\uff1f\n\\u662f \\U0001f600\n" in output()


def test_the_last_line_of_a_training_run(console, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "t.jsonl", [{"text": f"Some sentence {i} 😀."} for i in range(8)])
    flags = [*TINY, "--max_seq_len=64", "--max_steps=1", "--batch_size=2", "--from_weight=none", f"--data_path={path}"]
    output = console("gbk")
    run(train_pretrain, [*flags, f"--out_dir={tmp_path / '😀'}"])
    assert "\\U0001f600" in output().decode("gbk").splitlines()[-1] and (tmp_path / "😀" / "pretrain_64.pth").exists()


# ------------------------------------------------------------------------------------------------------ what is no text


@pytest.mark.parametrize("text", [HALF, "\udcc4\udce3"])  # half a character, GBK bytes on a UTF-8 command line
def test_a_prompt_that_is_no_text_is_a_usage_error(text, tmp_path, capsys):
    code, out, err = ends(eval_model, [f"--out_dir={tmp_path}", f"--prompt={text}"], capsys)
    assert code == 2 and not out and err.startswith("error: --prompt is no Unicode text") and err.count("\n") == 1


def test_text_is_text():
    for text in ("", "你好 😀", "\x00"):
        check_given_text(text, "--prompt")
    with pytest.raises(UsageError, match="its character 2"):
        check_given_text(HALF, "--prompt")


def test_a_typed_line_that_is_no_text_is_asked_for_again(monkeypatch, capsys):
    """A strict terminal raises, a lenient one lets lone bytes through."""
    lines = [UnicodeDecodeError("utf-8", b"\xc4\xe3", 0, 1, "invalid"), HALF, "\udcc4", " Hello "]

    def typed(prompt):
        line = lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert eval_model.read_line("> ") == "Hello" and not lines
    assert capsys.readouterr().out.count("type it again") == 3
