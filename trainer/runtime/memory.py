"""How much memory a run will need at its peak, told before its first step; and what to do where it was not there."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, dataloader

from model.decoder import power_of_two
from model.errors import InputError
from model.loss import LOSS_CHUNK
from trainer.runtime.distributed import local_world_size

PROBE_TOKENS = 64  # of one row; and twice as many, for what grows with them
MARGIN = 1.1  # a run is refused only where the estimate is clearly too large


def saved_bytes(model: nn.Module, run, tokens: int) -> int:
    """Bytes that the forward pass of a row keeps for its backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64, device=run.device)
    generators = [run.device] if run.device.type == "cuda" else []
    with (
        torch.random.fork_rng(generators),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        run.autocast(),
    ):
        loss = {"labels": ids, "return_logits": False} if hasattr(model, "lm_head") else {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **loss)
        total = sum(kept.values())  # while they are alive
    del output
    return total


def training_bytes(model: nn.Module, optimizer: str) -> int:
    """Gradients and optimizer state, float32: Muon keeps one number a trained weight beside the gradient, AdamW two."""
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * parameters * (2 if optimizer == "muon" else 3)


def sampling_bytes(model: nn.Module, replies: int, tokens: int, itemsize: int) -> int:
    """What an engine that decodes so many replies of so many tokens holds: its own weights, keys and values."""
    config, numbers = model.config, sum(parameter.numel() for parameter in model.parameters())
    slots, capacity = power_of_two(replies), max(power_of_two(tokens), 128) + 1
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return itemsize * (numbers + slots * capacity * cached)


def row_bytes(model: nn.Module, run) -> tuple[float, float]:
    """(bytes whatever the batch, bytes per row of a micro-batch) of a forward and backward pass at its peak."""
    short, long = (saved_bytes(model, run, tokens) for tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS))
    per_token = (long - short) / PROBE_TOKENS
    backward = per_token / model.config.num_hidden_layers  # gradients of a layer, beside what all layers have kept
    length = run.args.max_seq_len
    return short - per_token * PROBE_TOKENS, (per_token + backward) * length + length**2  # and the boolean mask


def estimate_memory(
    model: nn.Module, run, whole_logits: int = 0, beside: int = 0, critic: nn.Module | None = None
) -> tuple[float, float]:
    """(bytes whatever the batch, bytes per row of a micro-batch) of a training step at its peak.

    The weights are there already. whole_logits: how many times as many numbers as all logits of the targets a loss
    holds at once; most hold those of a chunk alone. beside: bytes that the stage needs beside what trains. critic: a
    model that trains too, on the same rows when those of the first are done.
    """
    trained = [model, critic] if critic else [model]
    once, per_row = map(max, zip(*(row_bytes(net, run) for net in trained), strict=True))
    fixed = once + sum(training_bytes(net, run.args.optimizer) for net in trained) + beside
    fixed += 3 * 4 * LOSS_CHUNK * model.config.vocab_size  # logits, their gradient, a copy
    per_row += whole_logits * run.args.max_seq_len * model.config.vocab_size * run.dtype.itemsize
    return fixed, per_row


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return min(int(lines["MemAvailable"].split()[0]) * 1024, *container_memory())
    except (OSError, KeyError):
        return None


CGROUPS = {  # by version: where its tree is; the files of a limit, of what is used, and of files' share in that
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("", "memory.max", "memory.current", ""),
}


def container_memory(groups: Path = Path("/proc/self/cgroup"), tree: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left within each memory limit that Linux sets a group of processes, as containers are: often none.

    What the group holds of files counts as free, as it does in MemAvailable.
    """
    left = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, used, prefix = CGROUPS[1 if controllers else 2]
        group = tree / folder / place.strip("/")  # perhaps in the host's words: the container's own is then the top
        while group.is_relative_to(tree / folder):
            try:
                files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = int(files[f"{prefix}active_file"]) + int(files[f"{prefix}inactive_file"])
                left.append(max(int((group / limit).read_text()) - int((group / used).read_text()) + cached, 0))
            except (OSError, KeyError, ValueError):  # no such group, or "max": no limit
                pass
            group = group.parent
    return left


def check_memory(model: nn.Module, run, *more) -> None:
    """Print the estimate; InputError, with the batch size that would do, where the free memory cannot hold it.

    more: see estimate_memory().
    """
    fixed, per_row = estimate_memory(model, run, *more)
    needed, free = fixed + per_row * run.batch_size, free_memory(run.device)
    share = local_world_size() if run.device.type == "cpu" else 1  # processes of this machine share its memory
    known = "" if free is None else f" of {free / 2**30:.1f} GB free"
    print(f"memory: about {needed * share / 2**30:.1f} GB more{known}", flush=True)
    if free is None or needed * share <= free * MARGIN:
        return
    rows = int((free / share - fixed) // per_row)
    if rows < 1:
        advice = "not even one row fits: take a smaller model or --max_seq_len"
    else:
        accumulation = -(-run.batch_size * run.args.accumulation_steps // rows)
        advice = f"--batch_size {rows} --accumulation_steps {accumulation} would fit"
    raise InputError(
        f"batch size {run.batch_size} with rows of {run.args.max_seq_len} needs about {needed * share / 2**30:.1f} GB, "
        f"and {free / 2**30:.1f} GB are free: {advice}"
    )


@contextmanager
def told_memory(run) -> Iterator[None]:
    """Memory exhausted within ends with what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise InputError(
            f"out of memory at batch size {run.batch_size}: try --batch_size {max(run.batch_size // 2, 1)} "
            f"--accumulation_steps {run.args.accumulation_steps * 2}, or a smaller --max_seq_len"
        ) from error


def told_shared_memory(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a loader; where its processes lack shared memory to hand them over, that is said."""
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        if not loader.num_workers or not lacks_shared_memory(error):
            raise
        dataloader._MultiProcessingDataLoaderIter._shutdown = True  # one half made would die with a traceback
        raise InputError(
            "the processes of --num_workers need shared memory, and /dev/shm is full or cannot be written: make it "
            "larger (docker run --shm-size 1g), or add --num_workers 0"
        ) from error


def lacks_shared_memory(error: Exception) -> bool:
    """Whether a loader or its process failed for want of shared memory: semaphores, or the tensors of a batch."""
    refused = isinstance(error, OSError) and error.filename is None  # files have a name
    told = ("shared memory", "/torch_", "(shm)", "Bus error")
    return (refused and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES)) or any(
        word in str(error) for word in told
    )
