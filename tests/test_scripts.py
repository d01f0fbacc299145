"""Every script from outside: help, flags, usage errors, any working directory; eval_model, inspect_data, quickstart."""

import argparse
import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_model
from dataset.chat import encode_prompt
from model.errors import InputError
from model.errors import run_script as run_in_process
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import inspect_data, quickstart
from trainer import train_full_sft, train_pretrain
from trainer.runtime.flags import boolean, number

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    path.relative_to(ROOT)
    for path in [ROOT / "eval_model.py", *sorted(ROOT.glob("trainer/*.py")), *sorted(ROOT.glob("scripts/*.py"))]
    if "def parse_args(" in path.read_text(encoding="utf-8")
]
TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--max_seq_len=64"]
TEXTS = [f"第{i}句话：the quick brown fox jumps over {i} dogs." for i in range(12)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def module_of(script):
    return importlib.import_module(".".join(script.with_suffix("").parts))


def ends(module, flags, capsys):
    """(exit code, stdout, stderr) of a script run in this process as from the command line."""
    code = 0
    try:
        run_in_process(lambda: module.parse_args([str(flag) for flag in flags]), module.main)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ----------------------------------------------------------------------------------------------------------- the flags


class Caught(Exception):
    """Carries a parser out of parse_args."""


def parsers_of(script, monkeypatch):
    """The parser of a script, or those of its commands."""
    parser = parser_of(script, monkeypatch)
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in commands for leaf in action.choices.values()] or [parser]


def parser_of(script, monkeypatch):
    def catch(self, *args, **keys):
        raise Caught(self)

    with monkeypatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        module_of(script).parse_args([])
    return caught.value.args[0]


def test_all_scripts_are_found():
    names = {path.as_posix() for path in SCRIPTS}
    assert {"eval_model.py", "trainer/train_pretrain.py", "trainer/train_full_sft.py"} <= names
    assert {"scripts/quickstart.py", "scripts/inspect_data.py", "scripts/make_demo_data.py"} <= names
    assert "trainer/runtime/run.py" not in names and "scripts/demo_templates.py" not in names


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory):
    """--help of every script from its own folder, of some from the root and from elsewhere too, four at a time."""
    elsewhere = tmp_path_factory.mktemp("nowhere")
    jobs = [(script, (ROOT / script).parent) for script in SCRIPTS] + [(Path("trainer/train_pretrain.py"), ROOT)]
    jobs += [(Path(f"scripts/{name}.py"), elsewhere) for name in ("quickstart", "make_demo_data", "train_tokenizer")]
    finished = {}
    for first in range(0, len(jobs), 4):
        some = jobs[first : first + 4]
        started = [start([os.path.relpath(ROOT / script, cwd), "--help"], cwd) for script, cwd in some]
        for (script, _), process in zip(some, started, strict=True):
            finished.setdefault(script, []).append((*process.communicate(), process.returncode))
    return finished


def start(arguments, cwd=ROOT, stdin=subprocess.DEVNULL):
    """A script as a process of its own, not waited for."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=env, text=True, **pipes)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_from_any_directory(script, help_texts, monkeypatch):
    shown = [action for action in parser_of(script, monkeypatch)._actions if action.help != argparse.SUPPRESS]
    flags = [flag for action in shown for flag in action.option_strings]
    for out, err, code in help_texts[script]:
        assert code == 0 and err == ""
        assert all(flag in out for flag in flags)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_flag_has_a_help_text(script, monkeypatch):
    for parser in parsers_of(script, monkeypatch):
        assert parser.description
        silent = [action.dest for action in parser._actions if not (action.help or "").strip()]
        assert not silent
        assert not [action.dest for action in parser._actions if action.type is bool]  # bool("0") is True
        hidden = {action.dest for action in parser._actions if action.help == argparse.SUPPRESS}
        assert hidden <= {"local_rank"}  # passed by the deepspeed launcher, for nobody to type
        assert "--debug" in parser._option_string_actions


def test_no_loose_loads_and_no_blanket_filters():
    """A load that ignores missing weights, or a filter that hides every warning, hides the next mistake."""
    sources = [path for folder in ("model", "dataset", "trainer", "scripts") for path in (ROOT / folder).glob("*.py")]
    for path in [ROOT / "eval_model.py", *sources]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"load_state_dict\([^)]*strict=False|filterwarnings\((?!.*message=)|simplefilter\(", text
        ), path


def attributes_read(script):
    """Names that a script and what it calls in this repository read from its arguments."""
    read, known, waiting = set(), {}, []

    def definitions(path):
        if path not in known:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            known[path] = (tree, {node.name: node for node in tree.body if hasattr(node, "name")})
        return known[path]

    def visit(path, node):
        tree, local = definitions(path)
        imported = {
            alias.asname or alias.name: (path.parent if item.level else ROOT) / f"{item.module.replace('.', '/')}.py"
            for item in ast.walk(tree)
            if isinstance(item, ast.ImportFrom) and item.module
            for alias in item.names
        }
        read.update(arguments_read(node))
        for name in {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}:
            if name in local:
                waiting.append((path, local[name]))
            elif name in imported and imported[name].is_file() and name in definitions(imported[name])[1]:
                waiting.append((imported[name], known[imported[name]][1][name]))

    waiting = [(ROOT / script, node) for node in definitions(ROOT / script)[0].body if not hasattr(node, "name")]
    done = {id(definitions(ROOT / script)[1]["parse_args"])}
    while waiting:
        path, node = waiting.pop()
        if id(node) not in done:
            done.add(id(node))
            visit(path, node)
    return read


def arguments_read(tree):
    """x of every args.x, run.args.x, getattr(args, "x"), and getattr(args, key) for key in ("x", ...)."""

    def is_args(owner):
        return re.fullmatch(r"(\w+\.)?args", ast.unparse(owner))

    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=name, ctx=ast.Load()) if is_args(owner):
                yield name
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(name), *_]) if is_args(owner):
                yield name
            case ast.DictComp() | ast.ListComp() | ast.GeneratorExp() if "getattr(args, key)" in ast.unparse(node):
                for part in (part for generator in node.generators for part in ast.walk(generator.iter)):
                    if isinstance(part, ast.Constant):
                        yield part.value


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_flag_is_read(script, monkeypatch):
    parsers = parsers_of(script, monkeypatch)
    dests = {action.dest for parser in parsers for action in parser._actions} - {"help", "local_rank"}
    assert not dests - attributes_read(script)


def test_the_search_for_reads_finds_what_it_should():
    source = 'def main(args):\n    args.a\n    run.args.b\n    getattr(args, "c", 1)\n    args.d = 1\n    x.e\n'
    source += '    {key: getattr(args, key) for key in ("f", "g")}\n'
    assert set(arguments_read(ast.parse(source))) == {"a", "b", "c", "f", "g"}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_unknown_flag_is_a_usage_error(script, tmp_path, capsys):
    first = {"inspect_data.py": [tmp_path / "x.jsonl"], "benchmark.py": ["train"], "convert_model.py": ["a.pth", "b"]}
    positional = first.get(script.name, [])
    code, _, err = ends(
        module_of(script), [*positional, f"--out_dir={tmp_path / 'new'}", "--no_such_flag", "1"], capsys
    )
    assert code == 2 and "no_such_flag" in err and not any(tmp_path.iterdir())


WRONG = [
    "--batch_size=0", "--batch_size=two", "--warmup_ratio=2", "--warmup_ratio=nan", "--packing=maybe",
    "--use_compile=2", "--max_seq_len=1", "--epochs=0", "--max_steps=0", "--accumulation_steps=-1",
    "--learning_rate=-1", "--learning_rate=inf", "--grad_clip=-1", "--optimizer=sgd", "--dtype=int8", "--seed=-1",
    "--seed=4294967296", "--preset=huge", "--num_workers=-1", "--log_interval=0",
]  # fmt: skip


@pytest.mark.parametrize("module", [train_pretrain, train_full_sft])
@pytest.mark.parametrize("flag", WRONG)
def test_wrong_values_are_usage_errors_before_anything_is_written(module, flag, tmp_path, capsys):
    code, _, err = ends(module, [f"--out_dir={tmp_path / 'new'}", flag], capsys)
    assert code == 2 and flag.split("=")[0] in err and "Traceback" not in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--verify", "--from_res=1", "--max_step=3"])
def test_flags_cannot_be_cut_short(flag, tmp_path, capsys):
    """Commands are written anew from flags, for resuming; a flag under another name would slip through."""
    code, _, err = ends(train_pretrain, [f"--out_dir={tmp_path / 'new'}", flag], capsys)
    assert code == 2 and flag in err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (eval_model, ["--temperature=-1"]),
        (eval_model, ["--top_p=1.5"]),
        (eval_model, ["--model_mode=99"]),
        (eval_model, ["--max_new_tokens=0"]),
        (eval_model, ["--seed=4294967296"]),
        (inspect_data, ["--rows=3"]),
        (inspect_data, ["x.jsonl", "--format=csv"]),
        (inspect_data, ["x.jsonl", "--color=perhaps"]),
        (quickstart, ["--sft_epochs=0"]),
        (quickstart, ["--seed=4294967296"]),
    ],
)
def test_wrong_values_of_other_scripts(module, flags, capsys):
    code, _, err = ends(module, flags, capsys)
    assert code == 2 and "error:" in err


def test_impossible_sizes_are_usage_errors(tmp_path, capsys):
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    flags = [f"--data_path={rows}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--hidden_size=100"]
    code, _, err = ends(train_pretrain, flags, capsys)
    assert code == 2 and err.startswith("error: impossible model sizes") and err.count("\n") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_booleans_and_bare_flags():
    for text, value in {"0": False, "1": True, "true": True, "False": False}.items():
        assert boolean(text) is value
        assert train_pretrain.parse_args([f"--use_moe={text}"]).use_moe is value
        assert train_pretrain.parse_args([f"--packing={text}"]).packing is value
    assert train_pretrain.parse_args(["--use_moe"]).use_moe is True
    assert train_pretrain.parse_args([]).use_moe is None  # the weights decide
    assert number(float, 0, 1)("0.5") == 0.5 and number(int, 0)("7") == 7


# --------------------------------------------------------------------------------------- as a user: other directories


@pytest.fixture(scope="module")
def chain(tmp_path_factory, run_script):
    """pretraining -> fine-tuning -> a question, each its own process, standing in another directory, relative paths."""
    here = tmp_path_factory.mktemp("elsewhere")
    write_rows(here / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_rows(here / "chats.jsonl", [chat(f"Question {i}?", f"Answer {i}.") for i in range(12)])
    common = ["--max_steps", "3", "--out_dir", "mine", "--max_seq_len", "64", "--device", "cpu", "--dtype", "float32"]
    sizes = ["--hidden_size", "64", "--num_hidden_layers", "2"]
    return here, [
        run_script("trainer/train_pretrain.py", ["--data_path", "texts.jsonl", *sizes, *common], cwd=here),
        run_script("trainer/train_full_sft.py", ["--data_path", "chats.jsonl", *common], cwd=here),
        run_script(
            "eval_model.py", ["--out_dir", "mine", "--prompt", "Question 1?", "--max_new_tokens", "5"], cwd=here
        ),
    ]


def test_the_chain_of_stages_from_another_directory(chain):
    here, runs = chain
    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 3
    assert "wrote mine/pretrain_64.pth" in runs[0].stdout and "starting from mine/pretrain_64.pth" in runs[1].stdout
    assert "mine/full_sft_64.pth" in runs[2].stdout
    assert sorted(path.name for path in (here / "mine").iterdir()) == [
        "cache", "checkpoints", "full_sft_64.json", "full_sft_64.pth", "logs", "pretrain_64.json", "pretrain_64.pth",
    ]  # fmt: skip
    assert sorted(path.name for path in here.iterdir()) == ["chats.jsonl", "mine", "texts.jsonl"]


def test_inspect_data_from_another_directory(tmp_path, run_script):
    write_rows(tmp_path / "chats.jsonl", [chat("Hi?", "Hello.")])
    done = run_script("scripts/inspect_data.py", ["chats.jsonl", "--out_dir", "mine"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "chats.jsonl: 1 rows in the sft format" in done.stdout and (tmp_path / "mine" / "cache").is_dir()


# -------------------------------------------------------------------------------------------------------- eval_model


def random_model(seed):
    """A tiny model; its head is apart from its embedding, else it would repeat the last token for ever."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    return MiniMindForCausalLM(MiniMindConfig(**sizes, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a random model of both stages."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, stage in enumerate(("pretrain", "full_sft")):
        model = random_model(seed)
        path = folder / f"{stage}_64.pth"
        save_weights(model, path, stage=stage, tokens_seen=7, data_path="x", data_hash="h", trained_length=64)
    return folder


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


# ------------------------------------------------------------------------------------------------------ inspect_data


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


# -------------------------------------------------------------------------------------------------------- quickstart


def test_report_is_a_table_whatever_the_model_says():
    gain = {"stage": "dpo", "measure": "m", "before": 0.5, "after": 0.875, "against": "chance", "seconds": 3.2}
    report = {
        "score": 0.5, "device": "cpu", "train_seconds": 61.0, "total_seconds": 70.4, "gains": [gain],
        "by_language": {"en": [1, 2]}, "by_relation": {"capital": [1, 2]},
    }  # fmt: skip
    text = quickstart.format_report(report, [{"question": "a|b?", "answer": "one\ntwo | three", "right": False}])
    assert "50.0% of 2 held-out questions right" in text and "| capital | 1 | 2 | 50% |" in text
    assert "| a\\|b? | one two \\| three | wrong |" in text
    assert "| dpo | m | 50.0% (chance) | 87.5% | 3.2 |" in text
    assert all(line.replace("\\|", "").count("|") in (0, 4, 5, 6) for line in text.splitlines())


def small_demo(demo):
    """Four facts in every format."""
    demo.mkdir()
    facts = [("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Spain", "Madrid")]
    thought = "<think>\n{}.\n</think>\n<answer>\n{}\n</answer>"
    chats = [chat(f"What is the capital of {a}?", f"{b}.") for a, b in facts]
    held_out = [chat(f"{a}: capital?", f"{b}.") | {"answer": b, "language": "en", "relation": "city"} for a, b in facts]
    pairs = [
        {"chosen": row["conversations"], "rejected": [row["conversations"][0], {"role": "assistant", "content": "No."}]}
        for row in chats
    ]
    write_rows(demo / "pretrain.jsonl", [{"text": f"The capital of {a} is {b}."} for a, b in facts])
    for name in "sft", "lora_identity", "lora_medical":
        write_rows(demo / f"{name}.jsonl", chats)
        write_rows(demo / f"{name}_val.jsonl", held_out)
    for suffix in "", "_val":
        write_rows(demo / f"dpo{suffix}.jsonl", pairs)
        rows = [chat(f"{a}?", thought.format(b, b)) | {"answer": b} for a, b in facts]
        write_rows(demo / f"reason{suffix}.jsonl", rows)
    return facts


@pytest.fixture
def small_quickstart(tmp_path, monkeypatch):
    """Facts and the commands that quickstart runs: in this process, on four facts, with tiny models."""
    demo, commands = tmp_path / "demo", []
    facts = small_demo(demo)

    def in_process(command, **keys):
        commands.append(command)
        module = importlib.import_module(f"trainer.{Path(command[1]).stem}")
        module.main(module.parse_args(command[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quickstart, "ensure_demo_data", lambda: demo)
    monkeypatch.setattr(quickstart, "CPU_SIZE", {"hidden_size": 64, "num_hidden_layers": 2})
    monkeypatch.setattr(quickstart, "STUDENT", {"hidden_size": 32, "num_hidden_layers": 2})
    monkeypatch.setattr(quickstart.subprocess, "run", in_process)
    return facts, commands


def test_quickstart_from_data_to_report(small_quickstart, tmp_path, capsys, monkeypatch):
    facts, commands = small_quickstart
    monkeypatch.setattr(quickstart, "is_right", lambda response, answer: answer in ("Paris", "Tokyo", "Rome"))
    out_dir = tmp_path / "a place"
    code, out, err = ends(quickstart, [f"--out_dir={out_dir}", "--device=cpu", "--seed=5"], capsys)
    assert (code, err) == (0, "")
    assert [Path(command[1]).name for command in commands] == ["train_pretrain.py", "train_full_sft.py"]
    assert all("--seed=5" in command and command[0] == sys.executable for command in commands)
    report = json.loads((out_dir / "quickstart.json").read_text(encoding="utf-8"))
    assert report["score"] == 0.75 and report["by_language"] == {"en": [3, 4]} and report["device"] == "cpu"
    assert [sample["question"] for sample in report["samples"]] == [f"{a}: capital?" for a, _ in facts]
    assert (out_dir / "quickstart.md").read_text(encoding="utf-8") in out
    assert f"--out_dir '{out_dir}'" in out  # the advice can be pasted
    assert (out_dir / "full_sft_64.pth").exists()


def test_quickstart_measures_every_later_stage(small_quickstart, tmp_path, capsys):
    code, out, _ = ends(quickstart, [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--stages", "all"], capsys)
    assert code == 0
    report = json.loads((tmp_path / "out" / "quickstart.json").read_text(encoding="utf-8"))
    gains = {(gain["stage"], gain["measure"]): gain for gain in report["gains"]}
    measures = {"lora": 4, "dpo": 2, "reward": 1, "distillation": 1, "reason": 2}
    assert {stage: sum(key[0] == stage for key in gains) for stage in measures} == measures
    assert all(0 <= gain[key] <= 1 for gain in gains.values() for key in ("before", "after"))
    dpo = (tmp_path / "out" / "logs" / "rlhf_64.jsonl").read_text().splitlines()
    preferred = gains["dpo", "pairs preferred rightly, against the start"]
    assert (preferred["before"], preferred["after"]) == (0.5, json.loads(dpo[-1])["val_accuracy"])
    assert gains["dpo", "general score"]["before"] == report["score"]
    assert "starting from" in out and "rlhf_64.pth" in out.split("train_distill_reason.py")[1]
    _, commands = small_quickstart
    alone, taught = (command for command in commands if "train_distillation" in command[1])
    assert [flag for flag in alone if flag not in taught] == ["--alpha=1"]  # the teacher is all that differs


def test_quickstart_takes_up_where_it_was(small_quickstart, tmp_path, capsys):
    _, commands = small_quickstart
    flags = [f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    assert ends(quickstart, flags, capsys)[0] == 0
    del commands[:]
    assert ends(quickstart, [*flags, "--stages", "reward", "dpo"], capsys)[0] == 0
    assert [Path(command[1]).name for command in commands] == ["train_dpo.py", "train_reward.py"]


def test_quickstart_ends_when_a_stage_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "ensure_demo_data", lambda: tmp_path)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    code, _, err = ends(quickstart, [f"--out_dir={tmp_path}", "--device=cpu"], capsys)
    assert code == 1 and err == "error: train_pretrain.py ended with exit code 1; its message stands above\n"
    with pytest.raises(InputError):
        quickstart.train("train_pretrain.py", [])
