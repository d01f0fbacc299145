"""eval_model.py: modes, folders, history, context, thoughts, figures at the end."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eval_model
from dataset.chat import encode_prompt
from model.errors import run_script
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}


def random_model(seed=0):
    """A tiny model; its head is apart from its embedding, else it would repeat the last token for ever."""
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**SIZES, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a model of each stage."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, stage in eval_model.STAGES.items():
        path = folder / f"{stage}_64.pth"
        keys = {"tokens_seen": 7, "data_path": "x", "data_hash": "h", "trained_length": 64}
        save_weights(random_model(seed), path, stage=stage, **keys)
    return folder


@pytest.fixture
def run(weights, capsys):
    """run(flags) -> (exit code, stdout, stderr)."""

    def run(*flags):
        argv = [f"--out_dir={weights}", "--device=cpu", "--max_new_tokens=6", *flags]
        code = 0
        try:
            run_script(lambda: eval_model.parse_args(argv), eval_model.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def typing(monkeypatch):
    """typing("1", "Hello"): what is typed; returns the list of the prompts' turns."""
    seen = []

    def type_these(*lines):
        lines = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda *_: next(lines))
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(
            eval_model, "encode_prompt", lambda tokenizer, turns: seen.append(turns) or encode_prompt(tokenizer, turns)
        )
        return seen

    return type_these


@pytest.mark.parametrize("mode", range(8))
def test_every_mode_has_its_weights(mode, run):
    code, out, err = run(f"--model_mode={mode}", "--prompt=Hello")
    assert (code, err) == (0, "") and f"{eval_model.STAGES[mode]}_64.pth" in out and out.split("\n\n", 1)[1].strip()


@pytest.mark.parametrize("mode", range(8))
def test_absent_stages_name_their_script(mode, run, tmp_path):
    code, _, err = run(f"--model_mode={mode}", f"--out_dir={tmp_path}", "--prompt=Hello")
    assert code == 1 and eval_model.STAGES[mode] in err and "train it with trainer/train_" in err


def test_folders_of_both_classes(run, tmp_path):
    own, llama = tmp_path / "own", tmp_path / "llama"
    random_model().save_pretrained(own)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=192, vocab_size=6400)).save_pretrained(llama)
    for folder in (own, llama):
        code, out, err = run("--load=1", f"--weight={folder}", "--prompt=Hello")
        assert code == 0 and "Traceback" not in err and str(folder) in out  # (transformers shows its progress there)
    code, _, err = run("--load=1", f"--weight={tmp_path / 'none'}", "--prompt=Hello")
    assert code == 1 and "none does not exist" in err
    code, _, err = run("--load=1", "--weight=x.pth", "--prompt=Hello")
    assert code == 2 and "--load 1 reads a transformers folder" in err


@pytest.mark.parametrize(("count", "roles"), [(0, 1), (1, 1), (2, 3), (4, 5), (100, 7)])
def test_history_keeps_so_many_messages(count, roles, run, typing):
    prompts = typing("1", "one", "two", "three", "four")
    assert run(f"--history_cnt={count}")[0] == 0
    assert len(prompts[-1]) == roles and prompts[-1][-1] == {"role": "user", "content": "four"}
    assert [turn["role"] for turn in prompts[-1]] == ["user", "assistant"] * (roles // 2) + ["user"]


def test_truncate_leaves_whole_messages_out(run, typing):
    prompts = typing("1", "one " * 20, "two " * 20, "three " * 20)
    code, _, err = run("--max_seq_len=100")
    assert code == 1 and re.search(r"the prompt has \d+ tokens.*context of 100.*give --truncate", err)
    prompts.clear()
    typing("1", "one " * 20, "two " * 20, "three " * 20)
    code, _, err = run("--max_seq_len=100", "--truncate")
    assert (code, err) == (0, "")
    asked = prompts[-1]  # the last try is the one that fits
    assert asked[0]["role"] == "user" and asked[-1]["content"] == ("three " * 20).strip() and len(asked) < 5


def test_a_single_message_that_is_too_long(run):
    code, _, err = run("--max_seq_len=20", "--truncate", "--prompt=" + "long " * 50)
    assert code == 1 and err.count("\n") == 1 and "context of 20: shorten it" in err


def test_figures_at_the_end(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    code, out, err = run("--model_mode=0", "--temperature=0", "--quant=int8")
    found = re.search(r"\n5 answers, (\d+) tokens, [\d.]+ tokens/s; ([\d.]+)% of the 4-token pieces", out)
    assert (code, err) == (0, "") and 5 <= int(found[1]) <= 30 and 0 <= float(found[2]) <= 100
    assert "tokens/s" not in run("--prompt=Hello")[1]


def test_questions_draw_apart_and_repeat_with_the_seed(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    monkeypatch.setattr(eval_model, "QUESTIONS", ["Same?", "Same?"])
    texts = [run("--temperature=1.5")[1].rsplit("\n", 2)[0] for _ in range(2)]
    first, second = texts[0].split("> Same?")[1:]
    assert texts[0] == texts[1] and first != second


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain <b>", [(False, "plain <b>")]),
        ("<think>\nhm\n</think>\n\nyes", [(True, "hm\n"), (False, "yes")]),
        ("<think>\n\n</think>\n\nyes", [(False, "yes")]),
        ("a<think>b</think>c<think>d", [(False, "a"), (True, "b"), (False, "c"), (True, "d")]),
        ("</think> 1 < 2 <th", [(False, "</think> 1 < 2 <th")]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_apart(text, parts, size):
    joined = []
    for thought, piece in eval_model.split_thoughts(text[i : i + size] for i in range(0, len(text), size)):
        if joined and joined[-1][0] == thought:
            joined[-1] = (thought, joined[-1][1] + piece)
        else:
            joined.append((thought, piece))
    assert joined == parts


def test_thoughts_are_shown_apart_and_not_remembered(run, typing, monkeypatch):
    monkeypatch.setattr(eval_model, "pieces", lambda *_: iter(["<thi", "nk>\nhm\n</thi", "nk>\n\nYes."]))
    prompts = typing("1", "one", "two")
    _, out, _ = run()
    assert out.count("[thought]\nhm\n\n[answer]\nYes.\n") == 2
    assert prompts[-1][1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(("rows", "share"), [([], 0), ([[1, 2, 3]], 0), ([[1] * 8], 0.8), ([[1, 2, 3, 4, 5]], 0)])
def test_repetition(rows, share):
    assert eval_model.repetition(rows) == pytest.approx(share)
