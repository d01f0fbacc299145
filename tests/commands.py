"""A script as a command, in this process or as one of its own, and rows for it to read."""

import json
import os
import subprocess
import sys
from pathlib import Path

from model.errors import run_script as run_in_process

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"第{i}句话：the quick brown fox jumps over {i} dogs." for i in range(12)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def ends(module, flags, capsys):
    """(exit code, stdout, stderr) of a script run in this process as from the command line."""
    code = 0
    try:
        run_in_process(lambda: module.parse_args([str(flag) for flag in flags]), module.main)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(arguments, cwd=ROOT, stdin=subprocess.DEVNULL):
    """A script as a process of its own, not waited for."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=env, text=True, **pipes)
