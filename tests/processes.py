"""Training runs as real processes: forked from a server that has imported torch already, so that many can be killed.

The functions at the end are hooks: a process calls one before it trains, to die or to fail at a chosen moment.
"""

import errno
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer.train_pretrain", "trainer.train_full_sft", "processes"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ["OMP_NUM_THREADS"] = "1"
PATIENCE = 240  # seconds, for what should take five


def free_port():
    from trainer.runtime.distributed import free_port

    return free_port()


def body(stage, flags, output, env, hook):
    """What a process does: trainer/train_<stage>.py with these flags, its streams into <output>.out and .err."""
    os.environ.update(env)
    for descriptor, kind in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    own = ROOT / "tests" / f"{stage}.py"  # a script made for the tests
    script = importlib.import_module(stage if own.exists() else f"trainer.train_{stage}")
    sys.argv = [script.__file__, *flags]
    if hook is not None:
        hook[0](*hook[1:])
    models, build = [], script.build_model
    script.build_model = lambda *args: models.append(build(*args)) or models[0]
    script.run_training(lambda: script.parse_args(flags), script.main)
    torch.save(models[0].state_dict(), f"{output}.model")


class Training:
    """A training run of one or more ranks; `hook`: (function, *arguments) for rank 0."""

    def __init__(self, stage, flags, output, ranks=1, hook=None):
        port, self.output = free_port(), Path(output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.ranks = []
        for rank in range(ranks):
            env = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {name: str(value) for name, value in env.items()} if ranks > 1 else {}
            args = (stage, list(map(str, flags)), f"{output}.{rank}", env, hook if rank == 0 else None)
            self.ranks.append(SERVER.Process(target=body, args=args))
        for process in self.ranks:
            process.start()

    def wait(self):
        """Exit codes of the ranks."""
        for process in self.ranks:
            process.join(PATIENCE)
        late = [process for process in self.ranks if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"still running: {self.err()}"
        return [process.exitcode for process in self.ranks]

    def signal_at(self, words, number, rank=0):
        """Send a signal when rank 0 has printed these words."""
        wait_for(words, Path(f"{self.output}.0.out"), lambda: self.ranks[0].is_alive())
        if self.ranks[rank].is_alive():
            os.kill(self.ranks[rank].pid, number)
        return self

    def out(self, rank=0):
        path = Path(f"{self.output}.{rank}.out")
        return path.read_text() if path.exists() else ""

    def err(self, rank=0):
        return Path(f"{self.output}.{rank}.err").read_text()

    def weights(self, rank=0):
        """All weights of a rank as it ended, float32, in one vector."""
        state = torch.load(f"{self.output}.{rank}.model", weights_only=True)
        return torch.cat([value.flatten() for value in state.values()])


def exchange_gradients(output, rank, ranks, port):
    """Three steps of a replicated model that stays as it is, on data that stay -> the averaged gradient of each."""
    from types import SimpleNamespace

    from model.LMConfig import MiniMindConfig
    from model.model_minimind import MiniMindForCausalLM
    from trainer.runtime.distributed import start_processes
    from trainer.runtime.engine import replicate

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    start_processes(cpu)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    net = replicate(
        model, SimpleNamespace(args=SimpleNamespace(deterministic=False, exchange_dtype="float32"), device=cpu)
    )
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(rank))
    gradients = []
    for _ in range(3):
        net(input_ids=ids, labels=ids, return_logits=False).token_losses.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        model.zero_grad()
    torch.save(gradients, f"{output}.{rank}")


def wait_for(words, path, is_alive):
    """Until a file holds these words, or the process has ended."""
    began = time.monotonic()
    while is_alive() and not (path.exists() and words in path.read_text(errors="replace")):
        assert time.monotonic() - began < PATIENCE, f"{path} never said {words!r}"
        time.sleep(0.01)


class Torchrun:
    """The real launcher with the real script; it is killed with all its ranks if it does not end."""

    def __init__(self, launcher_flags, stage, flags, output):
        self.output = Path(output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        script = ROOT / "trainer" / f"train_{stage}.py"
        command = [sys.executable, "-m", "torch.distributed.run", *launcher_flags, script, *flags]
        with open(f"{output}.out", "w") as out, open(f"{output}.err", "w") as err:
            self.process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, start_new_session=True)

    def wait(self, timeout=PATIENCE):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            children = self.children()
            for pid in [self.process.pid, *children]:
                os.kill(pid, signal.SIGKILL)
            raise

    def children(self):
        """Process ids of the ranks, in order of rank."""
        return list(map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()))

    def wait_for(self, words):
        wait_for(words, Path(f"{self.output}.out"), lambda: self.process.poll() is None)

    def out(self):
        return Path(f"{self.output}.out").read_text()

    def err(self):
        return Path(f"{self.output}.err").read_text()


# --------------------------------------------------------------------------------------------------------------- hooks


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_rename(ending, after):
    """SIGKILL before or after a file whose name ends so gets its name."""
    rename = os.replace

    def deadly(source, target):
        if str(target).endswith(ending) and not after:
            die()
        rename(source, target)
        if str(target).endswith(ending):
            die()

    os.replace = deadly


def slow_steps(seconds=0.2):
    """Time for a signal to arrive before the run is over."""
    from trainer.runtime.engine import Engine

    update = Engine.update
    Engine.update = lambda self, max_norm: time.sleep(seconds) or update(self, max_norm)


def slow_updates(seconds=0.05):
    """The same, of runs that take many updates in a step."""
    slow_steps(seconds)


def cut_short(call, end):
    """The call-th torch.save writes half of its bytes and then calls end()."""
    save, calls = torch.save, [0]

    def counted(content, file, **keys):
        if keys:  # torch itself, for tensors between ranks
            return save(content, file, **keys)
        calls[0] += 1
        if calls[0] < call:
            return save(content, file)
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        end()

    torch.save = counted


def die_in_write(call):
    cut_short(call, die)


def fill_disk_in_write(call):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    cut_short(call, full)


def die_in_log_rewrite():
    """SIGKILL while a resumed run cuts off the log of the run before it."""
    from trainer.runtime import run_log

    write_files = run_log.write_files

    def half(writers):
        def write(file):
            next(iter(writers.values()))(file)
            file.truncate(file.tell() // 2)
            die()

        write_files({path: write for path in writers})

    run_log.write_files = half


def interrupt_twice_in_save():
    """Ctrl-C while a checkpoint is written, and again."""
    from trainer.runtime import checkpoint

    write_files = checkpoint.write_files

    def interrupted(writers):
        def write(file):
            file.write(b"begun")
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        write_files({path: write for path in writers})

    checkpoint.write_files = interrupted


def forget_optimizer():
    """A broken resume, to see whether anybody notices."""
    from trainer.runtime.engine import Engine

    load_state = Engine.load_state
    Engine.load_state = lambda self, state: load_state(self, {**state, "optimizer": {}})


def forget_random_state():
    from trainer.runtime import run

    run.set_random_state = lambda *_: None


def count_buckets(path):
    """Write how many gradient buckets have crossed the ranks to a file."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from trainer.runtime import engine

    replicate, count = engine.replicate, [0]

    def hook(state, bucket):
        count[0] += 1
        Path(path).write_text(json.dumps(count[0]))
        return allreduce_hook(None, bucket)

    def counted(*args):
        net = replicate(*args)
        net.register_comm_hook(None, hook)
        return net

    engine.replicate = counted


def measure_memory(path):
    """Write [estimate, peak of the steps above what was there before them] in bytes to a file."""
    from trainer.runtime import memory, run
    from trainer.runtime.engine import Engine

    told = {}

    def resident(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def check(model, run, *more):
        fixed, per_row = memory.estimate_memory(model, run, *more)
        told.update(estimate=fixed + per_row * run.batch_size, before=resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def measured(self, max_norm):
        update(self, max_norm)
        Path(path).write_text(json.dumps([told["estimate"], resident("VmHWM") - told["before"]]))

    run.check_memory = check
    update, Engine.update = Engine.update, measured
