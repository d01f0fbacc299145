"""Every script from outside: what scripts/ holds, help, flags, usage errors, any working directory."""

import argparse
import ast
import importlib
import os
import re
from pathlib import Path

import pytest
from commands import ROOT, TEXTS, chat, ends, start, write_rows

import eval_model
from scripts import inspect_data, quickstart
from trainer import train_full_sft, train_pretrain
from trainer.runtime.flags import boolean, number

SCRIPTS = [
    path.relative_to(ROOT)
    for path in [ROOT / "eval_model.py", *sorted(ROOT.glob("trainer/*.py")), *sorted(ROOT.glob("scripts/*.py"))]
    if "def parse_args(" in path.read_text(encoding="utf-8")
]


def module_of(script):
    return importlib.import_module(".".join(script.with_suffix("").parts))


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
    assert "trainer/runtime/run.py" not in names and "scripts/benchmark_train.py" not in names


def imported_from_scripts(path):
    """Modules of scripts/ that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "scripts":
            names |= {f"scripts.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.removeprefix("scripts.") for name in names if name.split(".")[0] == "scripts"}


def test_scripts_are_commands_that_nothing_imports():
    """A long command may have parts, <command>_<part>.py beside it, for itself and for one another alone."""
    packages = [path for folder in ("model", "dataset", "trainer") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in [ROOT / "eval_model.py", *packages] if imported_from_scripts(path)]
    commands, parts = {script.stem for script in SCRIPTS if script.parts[0] == "scripts"}, set()
    for path in sorted(ROOT.glob("scripts/*.py")):
        taken = imported_from_scripts(path)
        command = next((name for name in commands if path.stem.startswith(f"{name}_")), path.stem)
        assert all(name.startswith(f"{command}_") for name in taken), path
        parts |= taken
    assert {path.stem for path in ROOT.glob("scripts/*.py")} == commands | parts and not commands & parts


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
    sources = [path for folder in ("model", "dataset", "trainer", "scripts") for path in (ROOT / folder).rglob("*.py")]
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
