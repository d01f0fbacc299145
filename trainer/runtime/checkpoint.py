"""Exact resume: out/checkpoints/<stage>_<hidden>[_moe]_resume.pth, and the self-test that proves it.

One file, replaced at once or not at all: float32 weights and optimizer state by parameter name, the loss scaler, the
random states of every rank, the place in the data and in the schedule. At the same world size a killed and resumed run
ends with the bits of an uninterrupted one; at another world size or batch size it sees the same remaining rows.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from model.errors import InputError, UsageError
from model.formats import FREE_FIELDS
from model.LMConfig import CONFIG_FIELDS, MiniMindConfig
from model.loading import weights_path, write_files
from trainer.runtime.distributed import local_world_size, world_size

FORMAT = 2  # raised when an older reader would misunderstand the file
KEYS = {"format", "config", "engines", "extra", "place", "identity", "random"}


def checkpoint_path(out_dir: Path, weights: Path) -> Path:
    """out/checkpoints/<name>_resume.pth for weights called <name>.pth."""
    return out_dir / "checkpoints" / f"{weights.stem}_resume.pth"


def find_checkpoint(
    out_dir: Path, stage: str, preset: str | None, sizes: dict[str, int], any_size: bool
) -> Path | None:
    """The checkpoint of a stage: of the size that flags name, or (any_size, none named) the one written last."""
    named = {key: value for key, value in sizes.items() if key in ("hidden_size", "use_moe")}  # what file names tell
    if preset or named or not any_size:
        config = MiniMindConfig.from_preset(preset or "minimind2-small", **named)
        path = checkpoint_path(out_dir, weights_path(out_dir, stage, config))
        return path if path.exists() else None
    pattern = re.compile(rf"{re.escape(stage)}_\d+(_moe)?_resume\.pth")
    found = [path for path in (out_dir / "checkpoints").glob("*_resume.pth") if pattern.fullmatch(path.name)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def write_checkpoint(path: Path, config: MiniMindConfig, parts: dict[str, Any]) -> None:
    """Write what a run is made of; a kill or a full disk at any moment leaves the former file whole.

    config: of the model that is the stage's; parts: engines (what Engine.state() gives, by name), extra (other state by
    name), place (counters of the run), identity (what a resumed run must agree with), random (states of all ranks),
    vocabulary (of the tokenizer, with which it must agree too), launchers (the torchruns that it was started by).
    """
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS}
    content = {"format": FORMAT, "config": fields, **parts}
    write_files({path: lambda file: torch.save(content, file)})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; its tensors stay on disk until they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content = upgrade(content) if content.get("format") == 1 else content
        whole = content.keys() >= KEYS
    except PermissionError:
        raise
    except Exception as error:  # a damaged archive fails in the zip reader, the unpickler or the tensor factory
        raise InputError(
            f"{path} is cut short or no checkpoint ({str(error).splitlines()[0][:100]}): start without --from_resume"
        ) from error
    if not whole:
        raise InputError(f"{path} is no checkpoint of a training run: weights are given with --from_weight")
    if content["format"] > FORMAT:
        raise InputError(f"{path} has format {content['format']}, this version reads up to {FORMAT}: update MiniMind")
    return content


def is_of_launch(path: Path, launchers: list[str]) -> bool:
    """Whether one of these torchruns wrote a checkpoint: they start anew what failed, or when machines come and go.

    They count the former alone (TORCHELASTIC_RESTART_COUNT), so the count is not asked.
    """
    try:
        return not set(launchers).isdisjoint(read_checkpoint(path).get("launchers", [])) if launchers else False
    except InputError:  # nobody asked for this file
        return False


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of format 1, which had one model, in today's form."""
    engine = {key: content.pop(key) for key in ("weights", "optimizer", "scaler")}
    place = content["place"]
    sums, told_at = place["meters"]  # sums of means over steps
    meters = {name: (total, place["step"] - told_at) for name, total in sums.items()}
    return {**content, "engines": {"model": engine}, "extra": {}, "place": {**place, "meters": meters}}


def check_parts(path: Path, saved: dict[str, Any], engines: dict[str, Any], extra: dict[str, Any]) -> None:
    """InputError unless a checkpoint has the engines, of these sizes, and the extra state of the run."""
    for kind, parts in ("engines", engines), ("extra", extra):
        if saved[kind].keys() != parts.keys():
            raise InputError(f"{path} holds {sorted(saved[kind])}, this stage has {sorted(parts)}: resume its own file")
    for name, engine in engines.items():
        shapes = {key: tuple(weight.shape) for key, weight in saved["engines"][name]["weights"].items()}
        if shapes != engine.shapes():
            raise InputError(f"{path} was written with another size of the {name}: start it from the same weights")


# Fields of a config in which models that compute alike may differ.
UNCOMPUTED = FREE_FIELDS - {"inference_rope_scaling", "rope_scaling"} | {"bos_token_id", "eos_token_id", "pad_token_id"}


def computed_with(config: PretrainedConfig) -> dict[str, Any]:
    """What a model computes with beside its weights: heads, rotary base, experts of a token and the like, by field."""
    return {name: getattr(config, name, None) for name in CONFIG_FIELDS if name not in UNCOMPUTED}


def config_hash(config: PretrainedConfig) -> str:
    """The hash of computed_with(config)."""
    return hashlib.blake2b(json.dumps(computed_with(config), default=str).encode(), digest_size=16).hexdigest()


def agree(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError where a resumed run would not go on with what was begun, as far as it was recorded."""
    for name, value in now.items():
        if name in saved and saved[name] != value:
            raise InputError(
                f"{path} was written with {name} {saved[name]}, now it is {value}: "
                "resume with the same, or start anew without --from_resume"
            )


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of this process, as weights_only can read them."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def resume_command() -> str:
    """What to type to go on with the run that this process was started for."""
    if world_size() > local_world_size():
        return "start it on all machines as before, with --from_resume 1"
    launcher = ["python"] if world_size() == 1 else ["torchrun", "--nproc_per_node", str(local_world_size())]
    flags = without(sys.argv[1:], "--from_resume", "--local_rank", "--local-rank")
    return shlex.join([*launcher, sys.argv[0], *flags, "--from_resume", "1"])


def without(flags: list[str], *names: str) -> list[str]:
    """A command line without these flags and their values."""
    kept, dropping = [], False
    for flag in flags:
        if flag.startswith("--"):
            dropping = flag.split("=")[0] in names
        if not dropping:
            kept.append(flag)
    return kept


# ------------------------------------------------------------------------------------------------------- the self-test

VERIFY_STEPS = 12
VERIFY_KILLS = 4


def verify_resume(args: argparse.Namespace) -> None:
    """--verify_resume: the run of this command line, once in peace and once killed at random moments and resumed.

    Compares weights, optimizer and place bit by bit. Works in a temporary folder, for --max_steps (default: 12) steps.
    The weights of --out_dir can be started from there too.
    """
    if "RANK" in os.environ:
        raise UsageError("--verify_resume starts and kills processes itself: start it with python, not with a launcher")
    steps, rng = args.max_steps or VERIFY_STEPS, random.Random()
    flags = without(sys.argv[1:], "--verify_resume", "--from_resume", "--out_dir", "--max_steps", "--save_interval")
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as folder:
        flags += [f"--max_steps={steps}", "--save_interval=2", "--log_interval=1", f"--out_dir={folder}"]
        command = [sys.executable, sys.argv[0], *flags]
        print(f"{steps} steps in peace", flush=True)
        link_weights(args.out_dir, Path(folder))
        pace = run_until(command, None)
        expected = read_whole(Path(folder))
        for path in (Path(folder) / "checkpoints").iterdir():
            path.unlink()
        link_weights(args.out_dir, Path(folder))
        print("the same again, killed and resumed", flush=True)
        command += ["--from_resume=1"]
        kills = 0
        for last_step in sorted(rng.sample(range(1, steps), min(VERIFY_KILLS, steps - 1))):
            if run_until(command, last_step, delay=rng.uniform(0, pace)) is not None:
                break  # it was at its end before the kill came
            kills += 1
            print(f"  killed after step {last_step}", flush=True)
        else:
            run_until(command, None)
        same_bits(expected, read_whole(Path(folder)))
    print(f"resume is exact: after {kills} kills every weight and every number of the optimizer has the same bits")


def link_weights(source: Path, folder: Path) -> None:
    """Links in the folder to the weights of another, in place of what a run wrote there under their names."""
    for path in [*source.glob("*.pth"), *source.glob("*.json")]:
        link = folder / path.name
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows allows few users to
            shutil.copyfile(path, link)


def run_until(command: list[str], last_step: int | None, delay: float = 0.0) -> float | None:
    """Run a training command to its end -> seconds a step; or kill it `delay` seconds after a step's line -> None."""
    told, killed = [], False  # when each progress line came
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    for line in process.stdout:
        if progress := re.match(r"\S+ (\d+)/\d+  ", line):
            told.append(time.monotonic())
            if last_step is not None and int(progress[1]) >= last_step:
                time.sleep(delay)
                process.kill()
                killed = True
                break
    _, errors = process.communicate()
    if killed and process.returncode:  # -9, or on Windows 1; 0: it had ended before
        return None
    if process.returncode:
        raise InputError(f"a run of the test failed: {errors.strip().splitlines()[-1] if errors.strip() else command}")
    return (told[-1] - told[0]) / max(len(told) - 1, 1)


def read_whole(out_dir: Path) -> dict[str, Any]:
    """Weights and checkpoint of the one run in out_dir, in memory."""
    (checkpoint,) = (out_dir / "checkpoints").glob("*_resume.pth")
    (weights,) = out_dir.rglob(checkpoint.name.replace("_resume.pth", ".pth"))  # those of an adapter are in lora/
    content = torch.load(checkpoint, weights_only=True)
    del content["place"]["elapsed_s"]
    return {"weights in half precision": torch.load(weights, weights_only=True), **content}


def same_bits(expected: Any, found: Any, name: str = "checkpoint") -> None:
    """InputError that names the first number in which two nested structures differ."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key in expected:
            same_bits(expected[key], found[key], f"{name}: {key}")
    elif isinstance(expected, torch.Tensor):
        if not torch.equal(expected, found):
            apart = (expected.double() - found.double()).abs().max()
            raise InputError(f"resume is not exact here: {name} differs by up to {apart:.2g}")
    elif isinstance(expected, list | tuple) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found, strict=True)):
            same_bits(*pair, f"{name}: {number}")
    elif expected != found:
        raise InputError(f"resume is not exact here: {name} is {found}, not {expected}")
