"""Which device, which backend, how long to wait, whether to compile; no GPU and no second process is needed here."""

import os
import shutil
import socket
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small_runs import STAGES, TINY, new_run, train, write_data

from model.errors import UsageError
from trainer import train_pretrain
from trainer.runtime import devices, distributed, engine
from trainer.runtime.checkpoint import link_weights, read_whole, run_until
from trainer.runtime.distributed import local_main_first, start_processes
from trainer.runtime.engine import COMPILE_TOKENS, Engine, wants_compile
from trainer.runtime.flags import choose_defaults

CUDA = torch.device("cuda", 0)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(("variables", "index"), [({}, 0), ({"LOCAL_RANK": "3"}, 3)])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_a_number_with_a_launcher_and_without(name, variables, index, monkeypatch):
    """DeepSpeed and init_process_group take no "cuda" alone."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    assert devices.pick_device(name) == torch.device("cuda", index)


def test_a_launcher_may_show_each_process_one_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    assert devices.pick_device("cuda") == CUDA


@pytest.mark.parametrize(
    ("device", "slots", "nccl", "expected"),
    [
        ("cuda:0", (1, 2), True, "nccl"),  # all of them cuda:0, and yet not the same
        ("cuda:0", (1, 1), True, "gloo"),  # two share it
        ("cuda:0", (1, 2, 2), True, "gloo"),
        ("cuda:0", (1, None), True, "gloo"),  # another machine has none, or a build without NCCL
        ("cuda:0", (1,), False, "gloo"),  # a build for Windows
        ("cpu", (None, None), True, "gloo"),
    ],
)
def test_what_gradients_travel_by(device, slots, nccl, expected, monkeypatch, capsys):
    """Ranks tell each other in which slot their GPU is; the first one here, the others before."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)

    def gpu_in(slot):
        gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=slot, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        return distributed.which_gpu(CUDA if slot else torch.device("cpu"))

    store, started = dist.HashStore(), []
    for number, slot in enumerate(slots):
        store.set(f"minimind/start_0/gpu/{number}", gpu_in(slot))
    gpu_in(slots[0])
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **keys: iter([(store, 0, len(slots))]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **keys: started.append((backend, keys)))
    launch = {"RANK": 0, "WORLD_SIZE": len(slots), "LOCAL_RANK": 0, "MASTER_ADDR": "here", "MASTER_PORT": 1}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))
    start_processes(torch.device(device))
    ((backend, keys),) = started
    assert backend == expected and keys["device_id"] == (CUDA if expected == "nccl" else None)
    assert keys["timeout"] == timedelta(minutes=10)  # a machine that drops off does not hold the others for long
    assert (keys["rank"], keys["world_size"]) == (0, len(slots))
    assert keys["store"].underlying_store == store
    assert ("share GPUs" in capsys.readouterr().out) == (None not in slots and len(set(slots)) < len(slots))


def test_a_port_that_another_program_has_is_said(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        launch = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other.getsockname()[1]}
        for name, value in launch.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UsageError, match=rf"^another program has taken MASTER_PORT {launch['MASTER_PORT']} of"):
            new_run(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "99999")
    with pytest.raises(UsageError, match="ports end at 65535"):
        new_run(tmp_path)


def test_a_process_that_stays_away_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=1))
    launch = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": distributed.free_port()}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match=r"^the 2 processes of this run did not meet at MASTER_PORT"):
        new_run(tmp_path)


@pytest.mark.parametrize("local", [0, 1])
def test_patience_is_for_tokenising_alone(local, monkeypatch):
    said = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **keys: keys)
    monkeypatch.setattr(dist, "barrier", said.append)
    with local_main_first():
        said.append("body")
    assert said.index("body") == local and len(said) == 2
    said.remove("body")
    assert said == [{"timeout": timedelta(hours=2), "backend": "gloo"}]


@pytest.mark.parametrize(("device", "way", "expected"), [("cuda", "fork", 1), ("cuda", "spawn", 0), ("cpu", "fork", 0)])
def test_a_loader_has_a_process_where_one_starts_at_once(device, way, expected, monkeypatch):
    """Spawned, it imports torch anew for every epoch and evaluation."""
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: way)
    args = train_pretrain.parse_args([])
    choose_defaults(args, torch.device(device))
    assert args.num_workers == expected


# ------------------------------------------------------------------------------------------------------- torch.compile


def compile_run(wanted="auto", device=CUDA, steps=2001, **keys):
    args = {"use_compile": wanted, "batch_size": 32, "accumulation_steps": 1, "max_seq_len": 512} | keys
    return SimpleNamespace(args=SimpleNamespace(**args), device=device, step=1, total_steps=steps)


@pytest.fixture
def tools(monkeypatch):
    """The programs and packages that this machine is said to have."""
    there = {"triton", "gcc", "g++"}
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    for name in "CC", "CXX":
        monkeypatch.delenv(name, raising=False)
    return there


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (compile_run(), True),
        (compile_run(steps=1901), False),
        (compile_run(steps=501, accumulation_steps=4), True),  # work is counted, not steps
        (compile_run(steps=9001, batch_size=2, max_seq_len=64), False),
        (compile_run("0"), False),
        (compile_run("1", steps=3), True),
        (compile_run(device=torch.device("cpu"), steps=10**6), False),
    ],
)
def test_what_is_worth_compiling(run, expected, tools):
    assert 1900 * 32 * 512 < COMPILE_TOKENS <= 2000 * 32 * 512
    assert wants_compile(run) is expected


@pytest.mark.parametrize(("without", "named"), [("triton", "Triton"), ("gcc", "a C compiler")])
def test_what_cannot_be_compiled_is_not(without, named, tools, capsys, monkeypatch):
    tools.remove(without)
    assert not wants_compile(compile_run())
    assert named in capsys.readouterr().out
    with pytest.raises(UsageError, match=named):
        wants_compile(compile_run("1"))
    if without == "gcc":
        tools.add("mycc")
        monkeypatch.setenv("CC", "mycc")
        assert wants_compile(compile_run())


def test_compiling_for_a_cpu_asks_for_a_c_plus_plus_compiler(tools):
    assert wants_compile(compile_run("1", torch.device("cpu")))
    tools.remove("g++")
    with pytest.raises(UsageError, match=r"C\+\+"):
        wants_compile(compile_run("1", torch.device("cpu")))


# ----------------------------------------------------------------------------------------------------- other precisions


def scaled_engine(tmp_path, dtype):
    run = new_run(tmp_path)
    run.dtype = dtype
    model = torch.nn.Linear(2, 2)
    return Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), run)


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [torch.float32, torch.float16])
def test_a_run_goes_on_in_another_precision(before, after, tmp_path):
    """float16 keeps a scale of its losses, the others none."""
    first, second = scaled_engine(tmp_path, before), scaled_engine(tmp_path, after)
    if before == torch.float16:
        first.backward(first.model(torch.ones(1, 2)).sum())
        first.scaler.update(new_scale=32.0)
    second.load_state(first.state())
    expected = 1.0 if after == torch.float32 else 32.0 if before == torch.float16 else 65536.0
    assert second.scaler.get_scale() == expected
    assert torch.equal(first.model.weight, second.model.weight)


def test_gradients_may_cross_in_bfloat16(tmp_path, monkeypatch):
    """On one process: the mean over the ranks is the gradient rounded to bfloat16."""
    run = new_run(tmp_path, "--exchange_dtype=bfloat16")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        grads = []
        for exchange in "float32", "bfloat16":
            run.args.exchange_dtype = exchange
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 2)
            net = engine.replicate(model, run)
            net(input=torch.tensor([[1.0, 2.001, 3.0]])).square().sum().backward()
            grads.append(model.weight.grad.clone())
    finally:
        dist.destroy_process_group()
    assert torch.equal(grads[1], grads[0].bfloat16().float()) and not torch.equal(grads[0], grads[1])


def test_deepspeed_has_its_own_word_for_the_exchange(tmp_path):
    args = train_pretrain.parse_args([*TINY, "--deepspeed", "--exchange_dtype=bfloat16"])
    with pytest.raises(UsageError, match="communication_data_type"):
        choose_defaults(args, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ the self-test's tools


@pytest.mark.parametrize("may_link", [True, False])
def test_the_weights_of_a_run_are_told_from_those_it_starts_from(may_link, tmp_path, monkeypatch):
    """Also where no links may be made, as on Windows."""
    if not may_link:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("privilege not held")))
    out_dir, folder = tmp_path / "out", tmp_path / "test"
    for path in out_dir, folder / "checkpoints", folder / "lora":
        path.mkdir(parents=True)
    torch.save({"w": torch.ones(1)}, out_dir / "full_sft_64.pth")
    (out_dir / "full_sft_64.json").write_text("{}")
    link_weights(out_dir, folder)
    assert (folder / "full_sft_64.json").read_text() == "{}" and (folder / "full_sft_64.pth").is_symlink() == may_link
    torch.save({"w": torch.zeros(1)}, folder / "lora" / "identity_64.pth")
    torch.save({"place": {"elapsed_s": 1.0, "step": 2}}, folder / "checkpoints" / "identity_64_resume.pth")
    found = read_whole(folder)
    assert found["weights in half precision"]["w"] == 0 and found["place"] == {"step": 2}


def test_a_killed_run_is_told_from_one_that_ended(tmp_path):
    """By what was done to it: Windows gives no signal's number."""
    script = tmp_path / "run.py"
    script.write_text("import sys, time\nprint('pretrain 1/2  loss', flush=True)\ntime.sleep(float(sys.argv[1]))")
    assert run_until([sys.executable, str(script), "60"], 1) is None
    assert run_until([sys.executable, str(script), "0"], None) == 0


# -------------------------------------------------------------------------------------------------- torchrun's restarts


@contextmanager
def environment(monkeypatch, **variables):
    with monkeypatch.context() as context:
        for name, value in variables.items():
            context.setenv(name, value)
        yield


@pytest.mark.parametrize("script", STAGES, ids=lambda script: script.__name__)
def test_a_restarted_process_goes_on(script, data, tmp_path, monkeypatch, capsys):
    """torchrun starts anew what failed: with the checkpoint that its launch has written, not with another's."""
    path = data / ("texts.jsonl" if script is train_pretrain else "chats.jsonl")

    def resumed(*flags):
        capsys.readouterr()
        log = train(script, tmp_path, path, *flags).log
        assert log[-1]["step"] == len(log)
        return "resumed after step 2" in capsys.readouterr().out

    train(script, tmp_path, path, "--max_steps=2")
    with environment(monkeypatch, TORCHELASTIC_RUN_ID="none"):
        assert not resumed("--max_steps=2")  # that was no torchrun
        assert resumed("--max_steps=3")
    with environment(monkeypatch, TORCHELASTIC_RUN_ID="other"):
        assert not resumed("--max_steps=2")
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not resumed("--max_steps=2")
        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        checkpoint.write_bytes(b"cut")
        assert not resumed("--max_steps=2")
    assert not resumed("--max_steps=2")
