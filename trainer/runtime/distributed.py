"""Processes: one, several on one machine, or several machines; started by python, torchrun or deepspeed."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from model.errors import UsageError

PATIENCE = timedelta(hours=2)  # tokenising a large file on one process, while the others wait


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
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", timeout=PATIENCE, device_id=device if on_cuda else None
    )  # fmt: skip
    if rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - for the rest of the process


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
    waits = local_rank() != 0
    if world_size() > 1 and waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


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
