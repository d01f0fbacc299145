"""LoRA (arXiv 2106.09685): beside a frozen weight W (out, in) stands the trained product of two thin matrices.

    W' = W + (alpha / r) B A        A (r, in) starts as normal(0, 0.02), B (out, r) as zero: at first W' = W

The base keeps the names of its weights. The adapter's are `<module path>.lora.A.weight` and `.lora.B.weight`, those of
the public MiniMind files. merge() adds the product to W itself: the engine of model/generation.py packs the weights and
would not see an adapter beside them.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError, UsageError
from .LMConfig import CONFIG_FIELDS
from .loading import FORMAT, half_precision, json_bytes, read_info, read_state_dict, unwrap, write_files
from .model_minimind import Attention

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = ("q_proj", "o_proj")
DEFAULT_RANK = 8
KEY = re.compile(r"(?:module\.|_orig_mod\.)*(.+)\.lora\.([AB])\.weight")  # with what DDP and compile put in front
PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
PEFT_PLAIN = (  # what PEFT's config may say and the formula above holds all the same; all else must be unset
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
)  # fmt: skip
PEFT_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # others (PiSSA ...) change the base itself


class LoRA(nn.Module):
    """x (..., in) -> (alpha / r) B A x, (..., out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        kind = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Linear(base.in_features, rank, **kind)
        self.B = nn.Linear(rank, base.out_features, **kind)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x) * (self.alpha / self.rank))  # scaled where it is narrow

    def product(self) -> Tensor:
        """(alpha / r) B A in float32: (out, in)."""
        return (self.B.weight.float() @ self.A.weight.float()) * (self.alpha / self.rank)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; the weight is the base layer's own parameter, frozen."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight of its own
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora = LoRA(base, rank, alpha)
        self.register_buffer("original", None, persistent=False)  # the base weight, while it is merged
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.original is not None else y.add_(self.lora(x))

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + (alpha / r) B A; a second call changes nothing."""
        if self.original is None:
            self.original = self.weight.detach().clone()
            self.weight.copy_(self.weight.float() + self.lora.product())

    @torch.no_grad()
    def unmerge(self) -> None:
        """The base weight again, bit for bit: it was kept, because subtracting would not round back."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


# ----------------------------------------------------------------------------------------------------------------------
# On a model


def target_names(targets: Iterable[str]) -> tuple[str, ...]:
    """["q_proj", "o_proj"], ["q_proj,o_proj"] or ["all"] -> names in the order of TARGETS."""
    names = {name for given in targets for name in given.split(",")}
    names = set(TARGETS) if names == {"all"} else names
    if unknown := sorted(names - set(TARGETS)):
        raise UsageError(
            f"LoRA has no target {', '.join(map(repr, unknown))}: name some of {', '.join(TARGETS)}, or all"
        )
    return tuple(name for name in TARGETS if name in names)


def linear_layers(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers of these names by their path, those of all experts included."""
    layers = {path: module for path, module in model.named_modules() if path.rpartition(".")[2] in targets}
    return {path: module for path, module in layers.items() if isinstance(module, nn.Linear)}


def adapted(model: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def attach(
    model: nn.Module, rank: int = DEFAULT_RANK, alpha: float | None = None, targets: Iterable[str] = DEFAULT_TARGETS
) -> None:
    """Give every target an adapter (alpha: rank) and freeze all else, which then computes as in eval: no dropout."""
    targets = target_names(targets)
    layers = linear_layers(model, targets)
    if missing := set(targets) - {path.rpartition(".")[2] for path in layers}:
        raise InputError(f"this {type(model).__name__} has no linear layer called {min(missing)} to adapt")
    if any(adapted(model)):
        raise UsageError("the model has an adapter already: merge and detach it first")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Attention):
            module.dropout = 0.0
    for path, layer in layers.items():
        model.set_submodule(path, LoRALinear(layer, rank, rank if alpha is None else alpha))


def merge(model: nn.Module) -> None:
    """Add every adapter to its weight: the same logits (to 1e-5) from plain products."""
    for module in adapted(model):
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Take every adapter out of its weight again, which then has the bits that it had."""
    for module in adapted(model):
        module.unmerge()


def detach(model: nn.Module) -> None:
    """Plain linear layers in place of the adapted ones; their weights stay as they are, merged or not."""
    for path, module in [pair for pair in model.named_modules() if isinstance(pair[1], LoRALinear)]:
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        layer.weight, layer.bias = module.weight, module.bias
        model.set_submodule(path, layer.train(module.training))


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """{"rank", "alpha", "targets"} of the adapters on a model."""
    lora = next(adapted(model)).lora
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(target_names(names))}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save_lora(
    model: nn.Module,
    path: str | Path,
    *,
    stage: str,
    tokens_seen: int,
    data_path: str | Path,
    data_hash: str,
    trained_length: int,
    vocabulary: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    base: dict[str, str] | None = None,
) -> None:
    """Write the adapter alone, in half precision, and its JSON; called like model.loading.save_weights.

    base: name and hash of the weights that it was trained on.
    """
    path, model = Path(path), unwrap(model)
    values = dict(model.named_parameters()) if state is None else state
    values = half_precision({name: value for name, value in values.items() if KEY.fullmatch(name)}, path)
    info = {"format": FORMAT, "stage": stage, "lora": adapter_settings(model), "base": base}
    info |= {"tokens_seen": tokens_seen, "trained_length": trained_length}
    info |= {"data_file": Path(data_path).name, "data_hash": data_hash, "vocabulary": vocabulary}
    info["config"] = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    text = json_bytes(info)
    write_files({path: lambda f: torch.save(values, f), path.with_suffix(".json"): lambda f: f.write(text)})


def find_lora(out_dir: str | Path, name: str | Path, config: Any) -> Path:
    """What --lora_name means: a .pth file, a folder of PEFT's, or out_dir/lora/<name>_<hidden>[_moe].pth."""
    given = Path(name)
    if given.suffix == ".pth" or len(given.parts) > 1 or (given / "adapter_config.json").exists():
        return given
    moe = "_moe" if getattr(config, "use_moe", False) else ""  # other classes of transformers have no such field
    return Path(out_dir) / "lora" / f"{name}_{config.hidden_size}{moe}.pth"


def load_lora(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Put the adapter of a .pth file (with or without its JSON) or of a folder of PEFT's onto a model.

    Returns what is known of it. The tensors must be exactly those that the model's layers of these names take.
    """
    path = Path(path)
    if path.is_dir():
        return import_peft(model, path)
    if not path.exists():
        there = sorted(file.name for file in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        name = re.sub(r"_\d+(_moe)?$", "", path.stem)
        raise InputError(
            f"{path} does not exist: train it with trainer/train_lora.py --lora_name {name} "
            f"({path.parent} holds {', '.join(there) if there else 'no adapters'})"
        )
    state, info = read_state_dict(path), read_info(path.with_suffix(".json"))
    depth, settings = info.get("config", {}).get("num_hidden_layers"), info.get("lora") or {}
    install(model, path, state, KEY, settings.get("alpha"), depth)
    return {**info, "lora": adapter_settings(model), "path": str(path)}


def merge_lora(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """load_lora, merged into plain weights for good -> what is known of the adapter."""
    info = load_lora(model, path)
    merge(model)
    detach(model)
    return info


def base_note(info: dict[str, Any], base: Path, base_hash: str) -> str:
    """What to say of an adapter that names other weights than these, to which it may have been added already."""
    trained_on = info.get("base")
    if not trained_on or trained_on["hash"] == base_hash:
        return ""
    if base.is_dir() and trained_on["name"].endswith(".pth"):
        return f" (note: trained on {trained_on['name']}; whether {base} holds the same weights is not known)"
    return f" (note: trained on other weights, {trained_on['name']})"


def install(
    model: nn.Module,
    path: Path,
    state: dict[str, Tensor],
    pattern: re.Pattern,
    alpha: float | None,
    depth: int | None = None,
) -> None:
    """Attach an adapter with these tensors; InputError, before anything is changed, unless all of them fit.

    depth: layers of the model that it was trained on, where that is known.
    """
    if other := [name for name, value in state.items() if not pattern.fullmatch(name) or value.dim() != 2]:
        raise InputError(f"{path} is no LoRA adapter: it holds {other[0]}")
    values = {f"{m[1]}.lora.{m[2]}.weight": value for name, value in state.items() if (m := pattern.fullmatch(name))}
    paths = {name.split(".lora.")[0] for name in values}
    targets = {layer.rpartition(".")[2] for layer in paths}
    ranks = {value.shape[0] for name, value in values.items() if name.endswith(".A.weight")}
    if unknown := targets - set(TARGETS):
        raise InputError(f"{path} adapts {min(unknown)}: MiniMind has {', '.join(TARGETS)}")
    if len(ranks) != 1:
        raise InputError(f"{path} has the ranks {sorted(ranks)}: one for all is known here")
    (rank,) = ranks
    check_size(model, path, values, depth)
    layers = linear_layers(model, targets)
    if paths < layers.keys():
        left_out = min(layers.keys() - paths)
        raise InputError(
            f"{path} adapts {len(paths)} of the {len(layers)} layers of these names, not {left_out}: only adapters on "
            "all of them can be read here; merge it with PEFT, or load the model that it belongs to"
        )
    expected = {f"{layer}.lora.A.weight": (rank, module.in_features) for layer, module in layers.items()}
    expected |= {f"{layer}.lora.B.weight": (module.out_features, rank) for layer, module in layers.items()}
    for problem, names in (
        ("lacks", expected.keys() - values.keys()),
        ("has the unknown", values.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{path} {problem} {min(names)} ({len(names)} such tensors): it belongs to another model")
    for name, shape in expected.items():
        if values[name].shape != shape:
            raise InputError(f"{path} does not fit: {name} is {tuple(values[name].shape)}, the model takes {shape}")
    attach(model, rank, alpha, targets)
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


def check_size(model: nn.Module, path: Path, values: dict[str, Tensor], depth: int | None) -> None:
    """Raise InputError, naming both, where an adapter's tensors come from a model of another width or depth."""
    layers = 1 + max((int(m[1]) for name in values if (m := re.search(r"layers\.(\d+)\.", name))), default=0)
    reads, writes = r"\.(q|k|v|gate|up)_proj\.lora\.A", r"\.(o|down)_proj\.lora\.B"  # from and to the hidden states
    widths = [value.shape[1] for name, value in values.items() if re.search(reads, name)]
    widths += [value.shape[0] for name, value in values.items() if re.search(writes, name)]
    here = model.config
    if not widths:
        return
    if depth is None:  # it may leave the last layers out
        depth = max(layers, here.num_hidden_layers) if widths[0] == here.hidden_size else layers
    if (widths[0], depth) != (here.hidden_size, here.num_hidden_layers):
        raise InputError(
            f"{path} belongs to a model of hidden size {widths[0]} with {depth} layers, this one has "
            f"{here.hidden_size} and {here.num_hidden_layers}: load it onto the weights that it was trained on"
        )


def export_peft(model: nn.Module, folder: str | Path, base_name: str = "") -> None:
    """Write the adapter as PEFT keeps them: peft.PeftModel.from_pretrained(base, folder) has the same logits."""
    model, folder, settings = unwrap(model), Path(folder), adapter_settings(unwrap(model))
    state = {
        f"base_model.model.{m[1]}.lora_{m[2]}.weight": value.detach().float().cpu().contiguous()
        for name, value in model.named_parameters()
        if (m := KEY.fullmatch(name))
    }
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True,
        "r": settings["rank"], "lora_alpha": settings["alpha"], "target_modules": settings["targets"],
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    content = safetensors.torch.save(state, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    tensors, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    write_files({tensors: lambda f: f.write(content), settings: lambda f: f.write(text.encode())})


def import_peft(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Put an adapter that PEFT has saved onto a model -> what is known of it."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no adapter of PEFT's: it has no {name}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        if not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise TypeError(f"r {rank!r}, lora_alpha {alpha!r}")
        alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # PEFT divides by sqrt(r) there
        state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} is cut short or no adapter of PEFT's ({error!r:.100}): copy it again") from error
    plain = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": PEFT_STARTS}
    plain |= dict.fromkeys(config.keys() - plain.keys() - set(PEFT_PLAIN), (None, False, 0, "", [], {}))
    if beyond := [name for name, values in plain.items() if config.get(name, values[0]) not in values]:
        said = f"{folder / 'adapter_config.json'} sets {beyond[0]} to {config[beyond[0]]}"
        raise InputError(f"{said:.200}: only plain LoRA on the base as it is can be read")
    if found := {x.shape[0] for name, x in state.items() if name.endswith(".lora_A.weight")} - {rank}:
        raise InputError(f"{folder}: adapter_config.json says r {rank}, its tensors have {found.pop()}: copy it again")
    install(model, folder, state, PEFT_KEY, alpha)
    return {"lora": adapter_settings(model), "path": str(folder)}
