"""A model and its optimizer, on one process, on several (DistributedDataParallel), or through DeepSpeed.

All three have the same calls, so that a script reads alike whatever it was started with:

    for batch in step.micro_batches(engine):        gradients cross the ranks once a step, in the last micro-batch
        output = engine(**batch.inputs)             forward, in the run's precision
        engine.backward(loss)
    engine.update(1.0)                              clip to this norm, step unless it is not finite, clear

Gradients are means over the ranks, so a loss is divided by the targets of the step per rank (Update.targets).
"""

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from model.errors import UsageError
from trainer.runtime.distributed import world_size

COMPILE_TOKENS = 32_000_000  # on a process, which win back the minute or two of compiling (a 26M model)


class Engine:
    """Plain PyTorch: one process, or one of several replicas that agree on every gradient."""

    skipped_in_a_row = 0  # updates whose gradient was not finite, up to now
    grad_norm: Tensor | float = 0.0  # of the last update, before it was clipped

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, run, compiled: bool = False):
        self.model, self.optimizer, self.run = model, optimizer, run
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.net = replicate(model, run) if world_size() > 1 else model
        self.net = torch.compile(self.net) if compiled else self.net

    def __call__(self, **inputs):
        with self.run.autocast():
            return self.net(**inputs)

    def micro_step(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a micro-batch; gradients are exchanged in the last one alone."""
        return nullcontext() if last or world_size() == 1 else self.net.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, max_norm: float) -> None:
        """Scale the gradient down to this norm (0: leave it), take the step unless it is not finite, clear it."""
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or float("inf"))
        if self.run.accepts(self):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def gathered(self) -> AbstractContextManager:
        """Around what reads the weights outside a forward, as sampling does: they lie here whole already."""
        return nullcontext()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def state(self) -> dict:
        """Float32 weights and optimizer state by parameter name, on the CPU; every rank has to call it."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            "weights": {name: parameter.detach().cpu() for parameter, name in names.items()},
            "optimizer": {
                names[parameter]: {key: on_cpu(value) for key, value in state.items()}
                for parameter, state in self.optimizer.state.items()
            },
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """Go back to what state() gave, bit for bit."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state["weights"][name])
            kept = state["optimizer"].get(name)
            if kept is not None:
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in kept.items()
                }
        if state["scaler"]:  # empty where none was at work: this run's begins anew
            self.scaler.load_state_dict(state["scaler"])


def wants_compile(run) -> bool:
    """Whether to torch.compile: where asked for, and on CUDA where it is possible and pays."""
    args = run.args
    if args.use_compile == "0" or (args.use_compile == "auto" and run.device.type != "cuda"):
        return False
    missing = missing_for_compile(run.device)
    if args.use_compile == "1":
        if missing:
            raise UsageError(f"--use_compile 1 needs {missing}, which is not here: install it or leave the flag out")
        return True
    tokens = (run.total_steps - run.step) * args.batch_size * args.accumulation_steps * args.max_seq_len
    if missing and tokens >= COMPILE_TOKENS:
        print(f"not compiled, which would be faster: torch.compile needs {missing}")
    return not missing and tokens >= COMPILE_TOKENS


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile builds its code with and this machine lacks."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if device.type == "cuda":
        if not importlib.util.find_spec("triton"):
            return "Triton"
        compilers = [os.environ.get("CC"), "gcc", "clang", "cc", "cl"]  # Triton's own: it builds a launcher in C
    found = any(name and shutil.which(name) for name in compilers)
    return None if found else "a C compiler" if device.type == "cuda" else "a C++ compiler"


def replicate(model: nn.Module, run) -> DistributedDataParallel:
    """One replica per process; the gradients of all of them are averaged in buckets while backward goes on.

    DDP regroups its buckets after the first step, which changes the order of the sums over three and more ranks: a
    resumed run would differ in the last bit. Where exactness is promised the buckets stay as they are, which DDP does
    when it has to look for unused parameters.
    """
    fixed = run.args.deterministic or run.device.type != "cuda"
    model = WithUnused(model).to(run.device) if fixed else model
    net = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=fixed)
    if run.args.exchange_dtype == "bfloat16":
        net.register_comm_hook(None, in_bfloat16)
    return net


def in_bfloat16(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over the ranks, half as many bytes on the way. (DDP refuses torch's own hook with gloo.)"""
    return bf16_compress_hook(None, bucket)


class WithUnused(nn.Module):
    """A model and a parameter that nothing uses: DDP warns every user when it looks for some and finds none."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.unused = model, nn.Parameter(torch.zeros(()))

    def forward(self, **inputs):
        return self.model(**inputs)


def on_cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value
