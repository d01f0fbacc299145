"""Processes: one, several on one machine, or several machines; started by python, torchrun or deepspeed."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    if launch_number("MASTER_PORT", 0) > 65535:
        raise UsageError(f"MASTER_PORT is {os.environ['MASTER_PORT']}: ports end at 65535")
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
    backend, store = meet(device)
    dist.init_process_group(
        backend, store=store, rank=launched_rank(), world_size=launch_number("WORLD_SIZE", 1), timeout=PATIENCE,
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    if rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - for the rest of the process


def meet(device: torch.device) -> tuple[str, dist.Store]:
    """Find the other processes -> the backend for all, the dictionary that they share; UsageError where one is away."""
    place = f"MASTER_PORT {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun keeps its store when it restarts (--max_restarts): addresses of dead processes are still in it.
        store = dist.PrefixStore(f"minimind/start_{launch_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set_timeout(PATIENCE)
        return pick_backend(device, store), store
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UsageError(f"another program has taken {place}: choose a free one, for all processes") from error
        raise UsageError(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not meet at {place}: start all of them, with "
            "the address of rank 0's machine and a free port"
        ) from error


def pick_backend(device: torch.device, store: dist.Store) -> str:
    """What the processes exchange tensors by: NCCL where each has a GPU of its own, gloo elsewhere.

    Builds for Windows have no NCCL, and it refuses a GPU that two processes share. Numbers tell nothing: a launcher may
    show each process one GPU alone, all of them called cuda:0. So they tell each other, by NCCL's own measure.
    """
    store.set(f"gpu/{launched_rank()}", which_gpu(device))
    gpus = store.multi_get([f"gpu/{other}" for other in range(launch_number("WORLD_SIZE", 1))])
    if b"" in gpus:
        return "gloo"
    shared = len(gpus) - len(set(gpus))
    if shared and launched_rank() == 0:
        print(f"note: processes share GPUs, {len(gpus)} of them {len(set(gpus))}: start one for each GPU")
    return "gloo" if shared else "nccl"


def which_gpu(device: torch.device) -> str:
    """The machine and the slot of a GPU; nothing for what NCCL does not serve."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return ""
    gpu = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} {gpu.pci_domain_id}:{gpu.pci_bus_id}:{gpu.pci_device_id}"


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


def torchruns() -> list[str]:
    """The torchrun processes of this launch, one a machine: its checkpoints name them. Other launchers: none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    started = ""  # where there is no /proc, a number that another process had before is taken for the same
    with suppress(OSError):
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    own = f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()} {started}"
    return sorted(set(gather(own)))


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
