"""A model and its optimizer, on one process, on several (DistributedDataParallel), or through DeepSpeed.

All three have the same calls, so that a script reads alike whatever it was started with:

    with engine.micro_step(last):                   gradients cross the ranks once a step, in the last micro-batch
        output = engine(**inputs)                   forward, in the run's precision
        engine.backward(loss)
    grad_norm = engine.clip_grad_norm(1.0)
    engine.step(); engine.zero_grad()

Gradients are means over the ranks, so a loss is divided by the targets of the step per rank (Step.targets).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.runtime.distributed import world_size


class Engine:
    """Plain PyTorch: one process, or one of several replicas that agree on every gradient."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, run, compiled: bool):
        self.model, self.optimizer, self.run = model, optimizer, run
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.net = replicate(model, run) if world_size() > 1 else model
        self.net = torch.compile(self.net) if compiled else self.net

    def __call__(self, **inputs):
        with self.run.autocast():
            return self.net(**inputs)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch; gradients are exchanged in the last one alone."""
        with nullcontext() if last or world_size() == 1 else self.net.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradient down to this norm (0: leave it) -> the norm it had, the same on every rank."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or float("inf"))

    def step(self) -> None:
        self.scaler.step(self.optimizer)

    def zero_grad(self) -> None:
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

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
        self.scaler.load_state_dict(state["scaler"])


def replicate(model: nn.Module, run) -> DistributedDataParallel:
    """One replica per process; the gradients of all of them are averaged in buckets while backward goes on.

    DDP regroups its buckets after the first step, which changes the order of the sums over three and more ranks: a
    resumed run would differ in the last bit. Where exactness is promised the buckets stay as they are, which DDP does
    when it has to look for unused parameters.
    """
    if run.args.deterministic or run.device.type != "cuda":
        model = WithUnused(model).to(run.device)
        return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


class WithUnused(nn.Module):
    """A model and a parameter that nothing uses: DDP warns every user when it looks for some and finds none."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.unused = model, nn.Parameter(torch.zeros(()))

    def forward(self, **inputs):
        return self.model(**inputs)


def on_cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value
