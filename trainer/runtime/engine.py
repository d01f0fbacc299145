"""A model and its optimizer, on one process, on several (DistributedDataParallel), or through DeepSpeed.

All three have the same calls, so that a script reads alike whatever it was started with:

    for batch in step.micro_batches(engine):        gradients cross the ranks once a step, in the last micro-batch
        output = engine(**batch.inputs)             forward, in the run's precision
        engine.backward(loss)
    engine.update(1.0)                              clip to this norm, step unless it is not finite, clear

Gradients are means over the ranks, so a loss is divided by the targets of the step per rank (Update.targets).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.runtime.distributed import world_size


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
