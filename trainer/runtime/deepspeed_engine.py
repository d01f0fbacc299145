"""DeepSpeed behind the calls of trainer/runtime/engine.py: ZeRO cuts the optimizer's state (stage 1), the gradients too
(stage 2) or the weights as well (stage 3) into pieces, one for each rank.

    --deepspeed             the built-in settings below: ZeRO stage 1, which exchanges gradients once a step
    --deepspeed my.json     a JSON file of DeepSpeed's; batch sizes, clipping and precision in it are "auto" or agree
                            with the flags; optimizer and schedule are this project's

Weights and optimizer stay float32, as everywhere here; bfloat16 is autocast. Only float16 is DeepSpeed's own mode, with
a loss scaler, half-precision weights and a float32 copy of them.
"""

import importlib.util
import json
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import InputError, UsageError
from trainer.runtime.distributed import rank, world_size

DEFAULT = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}}
OURS = {  # sections of a user's file that this project has its own for
    "optimizer": "--optimizer",
    "scheduler": "--learning_rate and --warmup_ratio",
    "gradient_allreduce_op": "the mean over the ranks",
    "managed_gradient_accumulation": "--accumulation_steps",
}
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside the number of its steps


class DeepSpeedEngine:
    """The model trained through deepspeed.initialize; its calls are those of engine.py, and so is state()."""

    skipped_in_a_row = 0
    grad_norm: Tensor | float = 0.0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, run):
        self.model, self.optimizer, self.run = model, optimizer, run
        settings = read_settings(run.args.deepspeed)
        self.stage = zero_stage(settings)
        print(f"DeepSpeed: ZeRO stage {self.stage}")
        ignored = [f"{section} ({flag} counts)" for section, flag in OURS.items() if section in settings]
        if ignored:
            print(f"not used of {run.args.deepspeed}: {', '.join(ignored)}")
        exact = weights_of(model) if run.dtype == torch.float16 else None
        self.engine, self.zero = initialize(model, optimizer, run, complete(settings, run.args, run.dtype))
        self.create_optimizer_state()
        if exact:  # the float32 copy was made of weights that were half already
            self.set_weights(exact)
            self.refresh_model()

    def __call__(self, **inputs):
        """Forward; DeepSpeed turns autocast on itself, and switches off the one that it finds."""
        return self.engine(**inputs)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch.

        Stage 1 exchanges gradients in the last one alone. Stages 2 and 3 keep no whole gradient, so they have to
        exchange it in each.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, max_norm: float) -> None:
        """Clip the gradient, take the step and clear the gradient, which are one call to DeepSpeed.

        Where the gradient is not finite DeepSpeed has skipped the step, and the norm is infinite.
        """
        self.zero.clip_grad = max_norm
        self.engine.step()
        self.grad_norm = torch.as_tensor(self.engine.get_global_grad_norm())
        self.run.accepts(self)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def gathered(self) -> AbstractContextManager:
        """Around what reads the weights outside a forward; stage 3 brings their pieces together for it."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(self.model.parameters()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole weights, by name."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def state(self) -> dict:
        """What Engine.state() gives, so that any engine can go on with it; every rank calls it, rank 0 gets it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights, optimizer, pieces = {}, {}, self.piece_of()
        for name, parameter in self.model.named_parameters():
            if parameter in pieces:
                weight = safe_get_full_fp32_param(parameter).cpu()
                kept = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
                kept["step"] = self.optimizer.state[pieces[parameter]]["step"].cpu().clone()
            else:
                weight, kept = self.frozen_weight(parameter), None
            if rank() == 0:
                weights[name] = weight
                if kept:
                    optimizer[name] = kept
        return {"weights": weights, "optimizer": optimizer, "scaler": self.scaler_state()}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """Go back to what state() gave, or Engine.state(), bit for bit."""
        self.set_weights(state["weights"])
        pieces = self.piece_of()
        for name, parameter in self.model.named_parameters():
            kept = state["optimizer"].get(name)
            if kept is not None and parameter in pieces:
                for key in MOMENTS:
                    self.set_piece(parameter, kept[key], key)
                self.optimizer.state[pieces[parameter]]["step"].fill_(float(kept["step"]))
        self.refresh_model()
        self.load_scaler(state["scaler"])

    # ------------------------------------------------------------------------------------------- pieces of the state

    def pieces(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """This rank's flat float32 pieces of the weights, each with the parameters that it has a part of."""
        if self.stage == 3:
            return zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)
        return zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True)

    def piece_of(self) -> dict[nn.Parameter, Tensor]:
        """The piece that each trained parameter belongs to."""
        return {parameter: piece for piece, parameters in self.pieces() for parameter in parameters}

    def create_optimizer_state(self) -> None:
        """AdamW's state before its first step, in the form that AdamW itself gives it.

        So there is something to restore into. And stages 1 and 2 link parameters to their state once, after the first
        parameter group's first step, when the other groups have none yet: theirs could never be read.
        """
        for piece, _ in self.pieces():
            self.optimizer.state[piece] = {key: torch.zeros_like(piece, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[piece]["step"] = torch.zeros((), device=piece.device)
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over float32 weights by name; those of the forward follow in refresh_model()."""
        pieces = self.piece_of()
        for name, parameter in self.model.named_parameters():
            if parameter in pieces:
                self.set_piece(parameter, weights[name])
            else:
                self.set_frozen_weight(parameter, weights[name])

    def set_piece(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Copy this rank's part of a whole float32 weight, or of AdamW's `key` of it, to where it belongs."""
        if self.stage < 3:
            parameter.set_full_hp_param(value, key)
            return
        # DeepSpeed's safe_set_full_... fails where a weight cannot be divided by the ranks: the last part is padded.
        size = parameter.ds_tensor.numel()
        whole = F.pad(value.flatten(), (0, size * world_size() - value.numel()))
        self.zero.set_local_hp_param(whole[size * rank() : size * (rank() + 1)], parameter, key)

    def refresh_model(self) -> None:
        """Bring the weights that the forward uses up to date with the float32 pieces."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:  # small ones stay whole on every rank
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def frozen_weight(self, parameter: nn.Parameter) -> Tensor:
        """A weight that is not trained, whole."""
        if self.stage < 3:
            return parameter.detach().float().cpu()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().float().cpu().clone()

    def set_frozen_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage < 3:
            parameter.copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    # --------------------------------------------------------------------------------------- the loss scale of float16

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler in the terms of torch's GradScaler; empty where none is at work."""
        scaler = self.zero.loss_scaler
        if not scaler.dynamic:
            return {}
        return {
            "scale": float(scaler.cur_scale), "growth_factor": scaler.scale_factor,
            "backoff_factor": 1 / scaler.scale_factor, "growth_interval": scaler.scale_window,
            "_growth_tracker": scaler.cur_iter - scaler.last_overflow_iter - 1, "hysteresis": scaler.cur_hysteresis,
        }  # fmt: skip

    def load_scaler(self, state: dict[str, Any]) -> None:
        scaler = self.zero.loss_scaler
        if not scaler.dynamic or not state:
            return
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = state["_growth_tracker"], -1
        scaler.cur_hysteresis = state.get("hysteresis", scaler.cur_hysteresis)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- the settings


def check_deepspeed(args: Namespace, dtype: torch.dtype) -> None:
    """Say what is wrong with --deepspeed before anything is read or written."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("--deepspeed needs the package of that name (Linux): pip install deepspeed==0.19.8")
    settings = read_settings(args.deepspeed)
    stage = zero_stage(settings)
    if type(stage) is not int or stage not in (1, 2, 3):  # True and 2.0 are equal to some
        raise UsageError(
            f"{args.deepspeed} sets ZeRO stage {json.dumps(stage)}: set zero_optimization.stage to 1, 2 or 3, "
            "or leave --deepspeed out, which replicates the model over the processes"
        )
    device = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    if device not in ("none", "cpu"):
        raise UsageError(f"{args.deepspeed} offloads the optimizer to {device}: cpu is the one place to resume from")
    complete(settings, args, dtype)


def read_settings(file: str) -> dict[str, Any]:
    """The settings of a user's file, or the built-in ones."""
    if file == "default":
        return DEFAULT
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise InputError(f'{file} is no DeepSpeed configuration, such as {{"zero_optimization": {{"stage": 2}}}}')
    zero = settings.get("zero_optimization", {})
    sections = {
        "fp16": settings.get("fp16"), "bf16": settings.get("bf16"),
        "zero_optimization.offload_optimizer": zero.get("offload_optimizer"),
    }  # fmt: skip
    for name, section in sections.items():
        if section and not isinstance(section, dict):
            example = '{"device": "cpu"}' if "offload" in name else '{"enabled": true}'
            raise InputError(
                f"{file} sets {name} to {json.dumps(section)[:60]}, which must be an object such as {example}"
            )
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    return settings.get("zero_optimization", {}).get("stage", 0)


def complete(settings: dict[str, Any], args: Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The settings with what the flags say: batch sizes, clipping, precision. UsageError where the two differ."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    flags = {
        "train_micro_batch_size_per_gpu": ("--batch_size", args.batch_size),
        "gradient_accumulation_steps": ("--accumulation_steps", args.accumulation_steps),
        "train_batch_size": (
            f"--batch_size x --accumulation_steps x {processes} processes",
            args.batch_size * args.accumulation_steps * processes,
        ),
        "gradient_clipping": ("--grad_clip", args.grad_clip),
    }
    for key, (flag, value) in flags.items():
        agree(args.deepspeed, key, settings.get(key, "auto"), flag, value)
    precision = str(dtype).removeprefix("torch.")
    for section, name in PRECISIONS.items():
        if (settings.get(section) or {}).get("enabled", "auto") not in ("auto", False):
            agree(args.deepspeed, f"{section}.enabled to true and so the precision", name, "--dtype", precision)
    kept = {key: value for key, value in settings.items() if key not in {*OURS, *PRECISIONS, "torch_autocast"}}
    kept |= {key: value for key, (_, value) in flags.items()}
    kept |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    kept["zero_optimization"] = {**settings["zero_optimization"], "compute_grad_norm": True}  # update() reads it
    kept.setdefault("steps_per_print", 10**9)  # the run's log tells how far it is
    if dtype == torch.bfloat16:  # the empty list: gradients cross the ranks in float32
        kept["torch_autocast"] = {"enabled": True, "dtype": precision, "lower_precision_safe_modules": []}
    if dtype == torch.float16:
        kept["fp16"] = {**(settings.get("fp16") or {}), "enabled": True}
    return kept


def agree(file: str, key: str, given: Any, flag: str, value: Any) -> None:
    """UsageError where a setting is neither "auto" nor what the flag says."""
    if given not in ("auto", value):
        raise UsageError(f'{file} sets {key} to {given}, but {flag} is {value}: make them equal, or write "auto"')


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, run, config: dict[str, Any]) -> tuple:
    """DeepSpeed's engine on the run's device, and its ZeRO optimizer; a bad value in a user's file is an InputError."""
    deepspeed = import_deepspeed(run.device)
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.init_distributed(verbose=False)  # makes the run's process group DeepSpeed's too
    try:
        DeepSpeedConfig(config)
    except Exception as error:  # pydantic's, assertions, type errors: each value is wrong in its own way
        said = " ".join(str(error).split())
        raise InputError(f"DeepSpeed refuses {run.args.deepspeed}: {said[:300] or repr(error)}") from error
    device = Namespace(device_rank=run.device.index or 0)
    engine, zero, _, _ = deepspeed.initialize(args=device, model=model, optimizer=optimizer, config=config)
    return engine, zero


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, for this device; without its C++ library for inference on CPUs, which it would compile now."""
    os.environ["DS_ACCELERATOR"] = device.type
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed
