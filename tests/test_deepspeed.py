"""DeepSpeed: every ZeRO stage trains as one plain process does, and all of them share one checkpoint format.

The real launcher starts two of the runs here (it takes long); the others are processes with a launcher's environment.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("DeepSpeed is a Linux package", allow_module_level=True)

from processes import PATIENCE, ROOT, Training, free_port, wait_for

from model.errors import InputError, UsageError
from trainer import train_pretrain
from trainer.runtime import deepspeed_engine, engine
from trainer.runtime.deepspeed_engine import check_deepspeed, read_settings, zero_stage
from trainer.runtime.flags import choose_defaults
from trainer.runtime.run import Run

TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--optimizer=adamw"]
TINY += ["--max_seq_len=64", "--packing=0", "--from_weight=none", "--eval_interval=5", "--log_interval=1"]
STEPS = 12  # of 8 rows; an epoch of 37 rows has 8 8 8 8 5: the second rank gets a blank row in its last step
SPLIT = ["--batch_size=2", "--accumulation_steps=2"]  # of a step, over two processes
ALONE = ["--batch_size=4", "--accumulation_steps=2"]
SPOILED = 4  # the step that has an infinite loss on one of the ranks
STAGES = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},  # else small weights stay whole
    "stage 2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
OFFLOADED_3 = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


def spoil(step):
    """An infinite loss in the first of the two micro-batches of a step."""
    for kind in engine.Engine, deepspeed_engine.DeepSpeedEngine:
        kind.backward = spoiled(kind.backward, 2 * step - 1)


def spoiled(backward, call):
    calls = [0]

    def counted(self, loss):
        calls[0] += 1
        backward(self, loss * float("inf") if calls[0] == call else loss)

    return counted


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": f"第{i}句话：" + "the quick brown fox jumps. " * (1 + i % 4)} for i in range(37)]
    for name, part in ("texts", rows), ("texts_val", rows[:7]):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def flags_of(data, out_dir, *flags):
    return [*TINY, f"--data_path={data / 'texts.jsonl'}", f"--out_dir={out_dir}", f"--max_steps={STEPS}", *flags]


def config_file(folder, settings):
    path = folder / "config.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def checkpoint_of(out_dir):
    """The content, weights and optimizer of the one model on top."""
    content = torch.load(out_dir / "checkpoints" / "pretrain_64_resume.pth", weights_only=True)
    return content | content["engines"]["model"]


def log_of(out_dir):
    return [json.loads(line) for line in (out_dir / "logs" / "pretrain_64.jsonl").read_text().splitlines()]


def assert_close(expected, found, tolerance=1e-5):
    """Weights to this relative difference. (Moments stand further apart: torch's norm is not exact on a CPU.)"""
    assert expected["weights"].keys() == found["weights"].keys()
    assert expected["optimizer"].keys() == found["optimizer"].keys()
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= tolerance * weight.norm(), name
        for key, value in expected["optimizer"][name].items():
            apart = (found["optimizer"][name][key] - value).norm()
            assert apart <= 100 * tolerance * value.norm(), f"{key} of {name}"


def assert_same_bits(expected, found):
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, found["weights"][name]), name
        for key, value in expected["optimizer"][name].items():
            assert torch.equal(value, found["optimizer"][name][key]), f"{key} of {name}"


def trained(flags, output, ranks=2, hook=None):
    run = Training("pretrain", flags, output, ranks, hook)
    assert set(run.wait()) == {0}, run.err()
    return run


# ------------------------------------------------------------------------------------------- as one plain process does


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    trained(flags_of(data, folder, *ALONE), folder / "run", ranks=1, hook=(spoil, SPOILED))
    return folder


@pytest.fixture(scope="module", params=STAGES)
def zero(request, data, tmp_path_factory):
    """A run of each stage on two ranks, one of which has an infinite loss in one step."""
    folder = tmp_path_factory.mktemp("zero")
    config = config_file(folder, {"zero_optimization": STAGES[request.param]})
    run = trained(flags_of(data, folder, *SPLIT, f"--deepspeed={config}"), folder / "run", hook=(spoil, SPOILED))
    return folder, run


def test_ends_with_the_weights_of_a_plain_process(plain, zero):
    assert_close(checkpoint_of(plain), checkpoint_of(zero[0]))
    before, after = (torch.load(folder / "pretrain_64.pth", weights_only=True) for folder in (plain, zero[0]))
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}


def test_skips_a_step_whose_gradient_is_not_finite_on_one_rank(plain, zero):
    for folder in plain, zero[0]:
        log = log_of(folder)
        assert [line.get("skipped_steps", 0) for line in log] == [0] * (SPOILED - 1) + [1] * (STEPS - SPOILED + 1)
        assert log[SPOILED - 1]["grad_norm"] is None  # not finite
        assert all(kept["step"] == STEPS - 1 for kept in checkpoint_of(folder)["optimizer"].values())


def test_logs_what_a_plain_process_logs(plain, zero):
    for expected, found in zip(log_of(plain), log_of(zero[0]), strict=True):
        assert expected.keys() == found.keys()
        for key in ("loss", "grad_norm", "val_loss"):
            known = expected.get(key)  # None: not finite, or no evaluation
            assert found.get(key) == (known and pytest.approx(known, rel=1e-3)), f"{key} of step {expected['step']}"


def test_only_the_first_rank_speaks_and_deepspeed_only_of_the_skipped_step(zero):
    lines = zero[1].out().splitlines()
    assert sum(line.startswith("pretrain ") for line in lines) == STEPS
    assert [line.split("]")[-1][:10] for line in lines if "INFO" in line or "WARNING" in line] in ([], [" OVERFLOW!"])
    assert zero[1].out(rank=1) == ""
    assert "deprecated" not in zero[1].err()


# ----------------------------------------------------------------------------------------------------------- resuming


class Launch:
    """The real `deepspeed` command with the real script; killed with all it has started if it does not end."""

    def __init__(self, flags, output):
        command = [sys.executable, Path(sys.executable).with_name("deepspeed")]
        command += ["--num_gpus=2", f"--master_port={free_port()}", ROOT / "trainer" / "train_pretrain.py", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
        self.output = output
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self):
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def kill_at(self, words):
        wait_for(words, self.output, lambda: self.process.poll() is None)
        assert self.process.poll() is None, self.output.read_text()
        self.kill()


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The out folder of a run with the built-in settings, killed with its launcher, and how it would have ended."""
    folder = tmp_path_factory.mktemp("killed")
    launch = Launch(flags_of(data, folder / "out", *SPLIT, "--deepspeed", "--save_interval=3"), folder / "launch.txt")
    launch.kill_at("pretrain 8/")
    flags = flags_of(data, folder / "whole", *SPLIT, "--deepspeed")
    trained(flags, folder / "run")
    return folder / "out", checkpoint_of(folder / "whole")


def resumed(killed, data, tmp_path, ranks, *flags):
    out_dir = tmp_path / "out"
    shutil.copytree(killed[0], out_dir)
    run = trained(flags_of(data, out_dir, "--from_resume=1", *flags), tmp_path / "run", ranks)
    assert "resumed after step 6:" in run.out()
    return checkpoint_of(out_dir)


def test_resumes_bit_for_bit_after_a_kill(killed, data, tmp_path):
    assert_same_bits(killed[1], resumed(killed, data, tmp_path, 2, *SPLIT, "--deepspeed"))


def test_a_checkpoint_of_two_ranks_goes_on_in_one_plain_process(killed, data, tmp_path):
    assert_close(killed[1], resumed(killed, data, tmp_path, 1, *ALONE))


def test_a_checkpoint_goes_on_in_another_stage_and_world_size(killed, data, tmp_path):
    """Three ranks: weights of 64 numbers cannot be dealt out evenly. Its steps are larger, so others than before."""
    config = config_file(tmp_path, {"zero_optimization": OFFLOADED_3})
    found = resumed(killed, data, tmp_path, 3, *SPLIT, f"--deepspeed={config}")
    assert_close(killed[1], found, 1)
    assert all(kept["step"] == STEPS for kept in found["optimizer"].values())


def test_python_alone_trains_through_deepspeed(data, tmp_path):
    settings = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb"}, "gradient_clipping": "auto"}
    flags = flags_of(data, tmp_path, "--max_steps=2", f"--deepspeed={config_file(tmp_path, settings)}")
    run = trained(flags, tmp_path / "run", ranks=1)
    assert "optimizer (--optimizer counts)" in run.out()
    assert checkpoint_of(tmp_path)["optimizer"]["model.norm.weight"]["step"] == 2


def test_the_launcher_without_the_flag_replicates_the_model(data, plain, tmp_path):
    launch = Launch(flags_of(data, tmp_path / "out", *SPLIT, "--max_steps=2"), tmp_path / "launch.txt")
    assert launch.wait() == 0, launch.output.read_text()
    assert "2 processes x 2 x 2 rows" in launch.output.read_text()
    for expected, found in zip(log_of(plain), log_of(tmp_path / "out"), strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- errors

STAGE_2 = {"zero_optimization": {"stage": 2}}
WRONG = {
    "{broken": (InputError, "is no JSON"),
    "[1]": (InputError, "no DeepSpeed configuration"),
    "{}": (UsageError, "ZeRO stage 0"),
    json.dumps({"zero_optimization": {"stage": 4}}): (UsageError, "ZeRO stage 4"),
    json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}): (UsageError, "nvme"),
    json.dumps({**STAGE_2, "train_micro_batch_size_per_gpu": 8}): (UsageError, "to 8, but --batch_size is 2"),
    json.dumps({**STAGE_2, "train_batch_size": 32}): (UsageError, "to 32, but .* is 4"),
    json.dumps({**STAGE_2, "gradient_accumulation_steps": 4}): (UsageError, "to 4, but --accumulation_steps is 2"),
    json.dumps({**STAGE_2, "gradient_clipping": 0.5}): (UsageError, "to 0.5, but --grad_clip is 1.0"),
    json.dumps({**STAGE_2, "fp16": {"enabled": True}}): (UsageError, "float16, but --dtype is float32"),
    json.dumps({**STAGE_2, "bf16": True}): (InputError, r'sets bf16 to true, which must be .* as \{"enabled": true\}'),
    json.dumps({**STAGE_2, "fp16": "auto"}): (InputError, 'sets fp16 to "auto", which'),
    json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}): (
        InputError,
        r'sets zero_optimization.offload_optimizer to "cpu", .* as \{"device": "cpu"\}',
    ),
    json.dumps({"zero_optimization": {"stage": "2"}}): (UsageError, 'ZeRO stage "2": set'),
    json.dumps({"zero_optimization": {"stage": True}}): (UsageError, "ZeRO stage true: set"),
    json.dumps({"zero_optimization": {"stage": 2.0}}): (UsageError, "ZeRO stage 2.0: set"),
    json.dumps({"zero_optimization": 2}): (InputError, "no DeepSpeed configuration"),
    "[" * 100_000: (InputError, "is no JSON"),
}


@pytest.mark.parametrize("settings", WRONG)
def test_a_wrong_file_is_refused_before_anything_is_written(settings, data, tmp_path):
    kind, words = WRONG[settings]
    args = train_pretrain.parse_args(
        flags_of(data, tmp_path / "out", *SPLIT, f"--deepspeed={config_file(tmp_path, settings)}")
    )
    with pytest.raises(kind, match=words) as error:
        Run(args, "pretrain")
    assert error.type is kind
    assert not (tmp_path / "out").exists()


def test_auto_and_equal_numbers_are_accepted(data, tmp_path):
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto", "train_batch_size": 4}
    settings |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "gradient_clipping": 1}
    config = config_file(tmp_path, {**STAGE_2, **settings})
    args = train_pretrain.parse_args(flags_of(data, tmp_path, *SPLIT, f"--deepspeed={config}"))
    check_deepspeed(args, torch.float32)


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        (["--deepspeed_config=FILE"], 3),
        (["--deepspeed", "--deepspeed_config", "FILE"], 3),  # as DeepSpeed's own examples have it
        (["--deepspeed_config", "FILE", "--deepspeed"], 3),
        (["--deepspeed=FILE", "--deepspeed_config=FILE"], 3),
        (["--deepspeed", "--local-rank=0"], None),  # as torch.distributed.launch passes it
        (["--deepspeed", "--local_rank=0"], None),
    ],
)
def test_other_ways_to_name_the_file_and_the_rank(flags, stage, data, tmp_path):
    config = config_file(tmp_path, {"zero_optimization": {"stage": 3}})
    args = train_pretrain.parse_args(flags_of(data, tmp_path, *(flag.replace("FILE", str(config)) for flag in flags)))
    choose_defaults(args, torch.device("cpu"))
    settings = read_settings(args.deepspeed)
    assert zero_stage(settings) == stage or (stage is None and settings is deepspeed_engine.DEFAULT)


def test_two_different_files_are_refused(data, tmp_path):
    args = train_pretrain.parse_args(flags_of(data, tmp_path, "--deepspeed=a.json", "--deepspeed_config=b.json"))
    with pytest.raises(UsageError, match=r"--deepspeed a\.json and --deepspeed_config b\.json"):
        choose_defaults(args, torch.device("cpu"))


def test_the_built_in_stage_exchanges_gradients_once_a_step():
    """Stages 2 and 3 do in every micro-batch: they keep no whole gradient."""
    assert zero_stage(read_settings("default")) == 1


def test_what_deepspeed_refuses_is_one_sentence(data, tmp_path):
    config = config_file(tmp_path, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}})
    run = Training("pretrain", flags_of(data, tmp_path / "out", f"--deepspeed={config}"), tmp_path / "run")
    assert run.wait() == [1]
    assert run.err().startswith(f"error: DeepSpeed refuses {config}")
    assert "reduce_bucket_size" in run.err() and "Traceback" not in run.err()


def test_the_missing_package_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = train_pretrain.parse_args(flags_of(data, tmp_path, "--deepspeed"))
    with pytest.raises(InputError, match="pip install deepspeed"):
        check_deepspeed(args, torch.float32)
