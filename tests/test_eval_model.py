"""eval_model.py: answers, typing, modes, folders, history, context, thoughts, figures at the end."""

import io
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, ends, start
from transformers import LlamaConfig, LlamaForCausalLM

import eval_model
from dataset.chat import encode_prompt
from dataset.lm_dataset import file_hash
from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, load_tokenizer, save_weights
from model.model_lora import attach, export_peft, load_lora, save_lora
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
        return ends(eval_model, [f"--out_dir={weights}", "--device=cpu", "--max_new_tokens=6", *flags], capsys)

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
            eval_model,
            "encode_prompt",
            lambda tokenizer, turns, **keys: seen.append(turns) or encode_prompt(tokenizer, turns, **keys),
        )
        return seen

    return type_these


def ask(weights, capsys, *flags):
    """What eval_model prints behind its first lines."""
    common = [f"--out_dir={weights}", "--device=cpu", "--dtype=float32", "--max_new_tokens=8"]
    code, out, err = ends(eval_model, [*common, *flags], capsys)
    assert (code, err) == (0, "")
    header, answer = out.split("\n\n", 1)
    return header, answer


@pytest.mark.parametrize(("mode", "stage"), [(0, "pretrain"), (1, "full_sft")])
def test_prompt_answers_with_the_weights_of_the_mode(mode, stage, weights, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    header, answer = ask(weights, capsys, f"--model_mode={mode}", "--prompt=Hello")
    assert f"{stage}_64.pth" in header and "0.9M parameters" in header and answer.strip()


def test_weight_path_wins_over_the_mode(weights, capsys):
    header, answer = ask(weights, capsys, f"--weight={weights / 'pretrain_64.pth'}", "--prompt=Hello")
    assert "pretrain_64.pth" in header and answer.strip()


def test_sampling_repeats_with_its_seed_and_greedy_always(weights, capsys):
    one, again, other = (ask(weights, capsys, "--prompt=Hello", f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert one == again != other
    one, other = (ask(weights, capsys, "--prompt=Hello", "--temperature=0", f"--seed={seed}")[1] for seed in (1, 2))
    assert one == other


def test_greedy_answer_is_that_of_the_model(weights, capsys, tokenizer):
    """The printed text is the argmax continuation of the prompt that dataset/chat.py builds."""
    from model.loading import load_model

    model, _ = load_model(weights / "full_sft_64.pth")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    begin = len(ids)
    while len(ids) < begin + 8 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    _, answer = ask(weights, capsys, "--prompt=Hello", "--temperature=0")
    assert answer.strip()
    assert answer.strip() == tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("mode", [0, 1])
def test_automatic_test_where_nobody_can_answer(mode, weights, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    _, out = ask(weights, capsys, f"--model_mode={mode}", "--max_new_tokens=2")
    prompts = eval_model.QUESTIONS if mode else eval_model.BEGINNINGS
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == prompts


def test_typing_keeps_the_turns(weights, capsys, monkeypatch):
    lines, prompts = iter(["1", "Hello", "Again", ""]), []
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(
        eval_model, "encode_prompt", lambda t, turns, **keys: prompts.append(turns) or encode_prompt(t, turns, **keys)
    )
    ask(weights, capsys)
    assert [[turn["role"] for turn in turns] for turns in prompts] == [["user"], ["user", "assistant", "user"]]
    assert [turns[-1]["content"] for turns in prompts] == ["Hello", "Again"]


@pytest.mark.parametrize("script", [["0"], [], ["1"], ["1", "Hello"]])
def test_end_of_input_leaves(script, weights, capsys, monkeypatch):
    """Ctrl-D at any question; "0" chooses the automatic test."""
    lines = iter(script)

    def type_line(*_):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    _, out = ask(weights, capsys, "--max_new_tokens=2")
    assert ("> " + eval_model.QUESTIONS[0] in out) == (script[:1] != ["1"])


def test_typing_on_a_terminal(weights):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    flags = [f"--out_dir={weights}", "--device=cpu", "--max_new_tokens=3"]
    process = start([ROOT / "eval_model.py", *flags], stdin=theirs)
    os.write(ours, b"1\nHello\nAnd again\n\n")
    out, err = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0 and "Traceback" not in err
    assert "[0] automatic test, [1] type: " in out and out.count("> ") == 3


def test_prompt_beyond_the_context_is_refused(weights, capsys):
    flags = [f"--out_dir={weights}", "--device=cpu", "--prompt=" + "word " * 600]
    code, _, err = ends(eval_model, flags, capsys)
    assert code == 1 and err.startswith("error: the prompt has") and "512" in err


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


@pytest.fixture
def adapter(weights, tmp_path):
    """An adapter of the full_sft weights that makes another model of them, in both formats."""
    base = weights / "full_sft_64.pth"
    model = load_model(base)[0]
    attach(model, rank=4, targets=["all"])
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(value, std=0.2)
    path = tmp_path / "out" / "lora" / "lora_x_64.pth"
    keys = {"stage": "lora_x", "tokens_seen": 7, "data_path": "x", "data_hash": "h", "trained_length": 64}
    save_lora(model, path, **keys, base={"name": base.name, "hash": file_hash(base)})
    shutil.copy(base, tmp_path / "out")
    export_peft(model, tmp_path / "peft")
    return path


def test_an_adapter_is_merged_in(run, adapter, monkeypatch):
    """By name, by file and as a folder of PEFT's; the engine gets the weights with the product added."""
    packed = []
    engine = eval_model.Engine
    monkeypatch.setattr(
        eval_model, "Engine", lambda model, *args, **keys: packed.append(model) or engine(model, *args, **keys)
    )
    out_dir = adapter.parents[1]
    expected = load_model(out_dir / "full_sft_64.pth")[0]
    plain = expected.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    load_lora(expected, adapter)
    ids = torch.arange(5, 25)[None]
    answers = []
    for name in ("lora_x", adapter, out_dir.parent / "peft"):
        code, out, err = run(f"--out_dir={out_dir}", f"--lora_name={name}", "--prompt=Hello", "--temperature=0")
        first, answer = out.split("\n\n", 1)
        assert (code, err) == (0, "") and "full_sft_64.pth + " in first and "note" not in out
        assert (str(out_dir.parent / "peft") if name == out_dir.parent / "peft" else str(adapter)) in first
        torch.testing.assert_close(packed[-1](ids).logits, expected(ids).logits, atol=5e-3, rtol=5e-3)
        assert not torch.equal(packed[-1].state_dict()["model.layers.1.mlp.up_proj.weight"], plain)
        answers.append(answer)
    assert answers[0] == answers[1] == answers[2]
    assert run(f"--out_dir={out_dir}", "--prompt=Hello", "--temperature=0")[1].split("\n\n", 1)[1] != answers[0]


def test_an_adapter_on_other_weights_than_its_own_is_noted(run, weights, adapter):
    code, out, _ = run("--model_mode=2", f"--lora_name={adapter}", "--prompt=Hello")
    assert code == 0 and f"{adapter} (note: trained on other weights, full_sft_64.pth)" in out.split("\n")[0]


def test_missing_and_unfit_adapters(run, weights, adapter, tmp_path):
    code, _, err = run(f"--out_dir={adapter.parents[1]}", "--lora_name=lora_y", "--prompt=Hello")
    assert (
        code == 1 and "lora_y_64.pth does not exist" in err and "--lora_name lora_y" in err and "lora_x_64.pth" in err
    )
    other = tmp_path / "full_sft_128.pth"
    model = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, "hidden_size": 128}))
    save_weights(model, other, stage="full_sft", tokens_seen=7, data_path="x", data_hash="h", trained_length=64)
    code, _, err = run(f"--weight={other}", f"--lora_name={adapter}", "--prompt=Hello")
    assert code == 1 and "hidden size 64 with 2 layers, this one has 128 and 2" in err and err.count("\n") == 1
    adapter.write_bytes(adapter.read_bytes()[:500])
    code, _, err = run(f"--out_dir={adapter.parents[1]}", "--lora_name=lora_x", "--prompt=Hello")
    assert code == 1 and f"{adapter} is cut short" in err


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


@pytest.fixture
def plain(weights, capsys, monkeypatch):
    """plain(flags) -> (exit code, the engine's requests, stderr), with no --max_new_tokens among the flags."""
    requests, stream = [], eval_model.Engine.stream
    monkeypatch.setattr(eval_model.Engine, "stream", lambda *args: requests.append(args[1]) or stream(*args))

    def run(*flags):
        requests.clear()
        code, _, err = ends(eval_model, [f"--out_dir={weights}", "--device=cpu", "--temperature=0", *flags], capsys)
        return code, requests, err

    return run


def test_a_reply_ends_with_the_context_unless_its_length_is_named(plain, monkeypatch, tokenizer):
    drawn = []
    pieces = eval_model.pieces
    monkeypatch.setattr(eval_model, "pieces", lambda e, r, ids: drawn.append(ids) or pieces(e, r, ids))
    length = len(encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}]))
    for left in (1, 9):
        code, _, err = plain("--prompt=Hello", f"--max_seq_len={length + left}")
        assert (code, err) == (0, "") and len(drawn[-1]) == left
    named = f"--max_seq_len={length + 9}"
    assert plain("--prompt=Hello", named, "--max_new_tokens=9")[0] == 0 and len(drawn[-1]) == 9
    code, requests, err = plain("--prompt=Hello", named, "--max_new_tokens=10")
    sentence = f"the prompt has {length} tokens; with --max_new_tokens 10 that passes the context of {length + 9}"
    assert code == 1 and not requests and err == f"error: {sentence}: shorten it\n"


def test_without_a_context_that_ends_it_a_reply_has_256_tokens(plain):
    code, (request,), _ = plain("--prompt=Hello")
    assert code == 0 and request.max_new_tokens == 256


@pytest.mark.parametrize("flags", [[], ["--truncate"]])
def test_a_prompt_that_fills_the_context_is_refused(flags, plain, tokenizer):
    length = len(encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}]))
    for context in (length, length - 1, 1):
        code, requests, err = plain("--prompt=Hello", f"--max_seq_len={context}", *flags)
        sentence = f"the prompt has {length} tokens, which leaves no room for an answer in the context of {context}"
        assert code == 1 and not requests and err == f"error: {sentence}: shorten it\n"


def test_the_automatic_test_runs_in_a_short_context(plain, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    monkeypatch.setattr(eval_model, "QUESTIONS", eval_model.QUESTIONS[:3])
    code, requests, err = plain("--max_seq_len=100")
    assert (code, err) == (0, "") and len(requests) == 3


def fits(tokenizer, texts, context, *flags):
    """The prompt that eval_model makes of the turns, as text, or its complaint."""
    try:
        ids = eval_model.fitting_prompt(
            SimpleNamespace(context=context), tokenizer, texts, eval_model.parse_args([*flags])
        )
    except InputError as error:
        return str(error)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("size", [20, 100])
def test_truncate_makes_room_for_the_answer_where_it_can(size, tokenizer):
    """Of three questions all stay, two, or the last alone; a conversation of the first size is short of 256 tokens."""
    words = ["first", "second", "third"]
    texts = [f"{words[0]} " * size, "one", f"{words[1]} " * size, "two", f"{words[2]} " * size]
    lengths = [len(eval_model.prompt_ids(tokenizer, texts[i:], eval_model.parse_args([]))) for i in (0, 2, 4)]

    def kept(context, *flags):
        prompt = fits(tokenizer, texts, context, *flags)
        return [word for word in words if f"{word} {word}" in prompt]

    for first in (0, 1):  # half of the context, or 256 tokens where that is less
        enough = lengths[first] + min(lengths[first] - 1, 256)
        assert kept(enough, "--truncate") == words[first:]
        assert kept(enough - 1, "--truncate") == words[first + 1 :]
        assert kept(lengths[first] + 9, "--truncate", "--max_new_tokens=9") == words[first:]
        assert kept(lengths[first] + 8, "--truncate", "--max_new_tokens=9") == words[first + 1 :]
    assert (lengths[0] < 256) == (size == 20)
    assert kept(lengths[2] + 1, "--truncate") == words[2:]  # less is left, and enough
    assert kept(lengths[0] + 1) == words  # nothing is left out unasked


def test_truncate_is_advised_where_it_helps(tokenizer):
    texts = ["first " * 20, "one", "third " * 20]
    whole, last = (len(eval_model.prompt_ids(tokenizer, texts[i:], eval_model.parse_args([]))) for i in (0, 2))
    assert fits(tokenizer, texts, whole).endswith(f"in the context of {whole}: shorten it or give --truncate")
    assert fits(tokenizer, texts, last).endswith(f"in the context of {last}: shorten it")
    assert fits(tokenizer, texts, last, "--truncate").endswith(f"in the context of {last}: shorten it")
    assert fits(tokenizer, texts, last + 9, "--max_new_tokens=9").endswith("shorten it or give --truncate")
    assert fits(tokenizer, texts, last + 9, "--max_new_tokens=10").endswith(": shorten it")


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
        ("<think>\nhm\n</think>\n<answer>\n7\n</answer>", [(True, "hm\n"), (False, "7\n")]),
        ("<think>an <answer> tag</think>x</answer>", [(True, "an <answer> tag"), (False, "x")]),
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


def test_reasoning_can_be_turned_off(run, monkeypatch):
    prompts = []
    stream = eval_model.pieces
    monkeypatch.setattr(eval_model, "pieces", lambda *args: prompts.append(args[1].prompt) or stream(*args))
    run("--prompt=Hello")
    run("--prompt=Hello", "--reasoning=0")
    on, off = prompts
    assert off[: len(on)] == on and load_tokenizer().decode(off[len(on) :]) == "<think>\n\n</think>\n\n"


def test_thoughts_are_shown_apart_and_not_remembered(run, typing, monkeypatch):
    monkeypatch.setattr(eval_model, "pieces", lambda *_: iter(["<thi", "nk>\nhm\n</thi", "nk>\n\nYes."]))
    prompts = typing("1", "one", "two")
    _, out, _ = run()
    assert out.count("[thought]\nhm\n\n[answer]\nYes.\n") == 2
    assert prompts[-1][1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(("rows", "share"), [([], 0), ([[1, 2, 3]], 0), ([[1] * 8], 0.8), ([[1, 2, 3, 4, 5]], 0)])
def test_repetition(rows, share):
    assert eval_model.repetition(rows) == pytest.approx(share)
