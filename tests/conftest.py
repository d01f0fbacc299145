"""Shared by all tests: the repository on sys.path, one thread, no network, what several of them stand on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests marked cuda are skipped, with a line that says so, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here (pytest -m cuda on a machine with one)"))


@pytest.fixture(scope="session")
def tokenizer():
    from model.loading import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="module")
def dense():
    from small_engine import make_model

    return make_model()


@pytest.fixture(scope="module", params=["dense", "moe", "yarn"])
def model(request):
    from small_engine import KINDS, make_model

    return make_model(**KINDS[request.param])


@pytest.fixture(scope="session")
def run_script():
    """run_script("trainer/train_pretrain.py", flags, cwd=...) -> the finished process, text captured."""

    def run(script: str, flags: list[str], cwd: Path = ROOT, **keys) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, **keys
        )

    return run
