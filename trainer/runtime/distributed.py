"""Processes: one, several on one machine, or several machines; started by python, torchrun or deepspeed."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UsageError

PATIENCE = timedelta(minutes=10)  # with a process that says nothing more, its machine having dropped off
TOKENISING = timedelta(hours=2)  # of a large file by one process, while the others wait


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """The rank that a launcher gave this process, before anything is initialised."""
    return launch_number("RANK", 0)


def local_rank() -> int:
    return launch_number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Processes of this launch on this machine."""
    return launch_number("LOCAL_WORLD_SIZE", 0) or launch_number("LOCAL_SIZE", 1)


def launch_number(name: str, otherwise: int) -> int:
    """A number that launchers give in the environment."""
    value = os.environ.get(name) or str(otherwise)
    if not value.isdecimal():
        raise UsageError(
            f"the environment variable {name} is {value!r}, not a number: start with torchrun, or unset it"
        )
    return int(value)


def check_launch() -> None:
    """UsageError where the environment has a part alone of what launchers set, or numbers that cannot be."""
    if "RANK" not in os.environ:
        return
    together = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in together if not os.environ.get(name)]:
        raise UsageError(
            f"launchers set {', '.join(together)} together, but of these environment variables {', '.join(missing)} "
            "has no value: start with torchrun, or unset RANK"
        )
    launch_number("MASTER_PORT", 0)
    if launched_rank() >= launch_number("WORLD_SIZE", 1):
        raise UsageError(f"RANK is {launched_rank()} and WORLD_SIZE {os.environ['WORLD_SIZE']}: ranks count from 0")


def start_processes(device: torch.device, *, always: bool = False) -> None:
    """Join the other processes of this launch; `always`: also where there are none (DeepSpeed wants a group).

    Only rank 0 prints: the others' standard output ends here. Their errors are still heard.
    """
    if dist.is_initialized() or ("RANK" not in os.environ and not always):
        return
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if device.type == "mps" and int(os.environ["WORLD_SIZE"]) > 1:
        raise UsageError("several processes cannot share Apple's GPU: start one, or add --device cpu")
    backend = pick_backend(device)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if backend == "nccl" else None)
    if rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - for the rest of the process


def pick_backend(device: torch.device) -> str:
    """What the processes exchange tensors by: NCCL between GPUs, gloo elsewhere.

    Builds for Windows have no NCCL, and it refuses a GPU that two processes share.
    """
    own_gpu = device.type == "cuda" and local_world_size() <= torch.cuda.device_count()
    return "nccl" if own_gpu and dist.is_nccl_available() else "gloo"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each number summed over all processes, the same everywhere."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    values = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


@contextmanager
def local_main_first() -> Iterator[None]:
    """The first process of each machine runs the body before the others do: it tokenises, they find the cache."""
    if world_size() == 1:
        yield
        return
    patient, waits = dist.new_group(timeout=TOKENISING, backend="gloo"), local_rank() != 0
    if waits:
        dist.barrier(patient)
    yield
    if not waits:
        dist.barrier(patient)


def is_restart_of_writer(path: Path) -> bool:
    """Whether torchrun has started this process in place of one that failed (--max_restarts) and had written the file.

    Only a file that is younger than the launcher is of this launch; where nobody can tell, it is taken to be.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    try:
        started = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])  # ticks from boot
    except OSError:  # not on Linux
        return True
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return path.stat().st_mtime > time.time() - age


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if not dist.is_initialized() or world_size() == 1:
        return False
    if isinstance(error, dist.DistError):  # NCCL, timeouts
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in said for word in ("gloo", "connection closed", "reset by peer")
    )
