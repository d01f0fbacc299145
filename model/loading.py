"""The one way weights are written and read: out/<stage>_<hidden>[_moe].pth with its JSON, public .pth, folders.

A .pth is a state dict in half precision, nothing else. The JSON beside it holds the config and where the weights come
from, so that nobody repeats sizes on a command line; what a caller asks for all the same must agree with it.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError, UsageError
from .LMConfig import CONFIG_FIELDS, MiniMindConfig
from .model_minimind import MiniMindForCausalLM

FORMAT = 1  # of the JSON; raised when an older reader would misunderstand it

TRAINED_BY = {
    "pretrain": "train_pretrain.py",
    "full_sft": "train_full_sft.py",
    "rlhf": "train_dpo.py",
    "reason": "train_distill_reason.py",
    "distill": "train_distillation.py",
    "reward": "train_reward.py",
    "ppo_actor": "train_ppo.py",
    "grpo": "train_grpo.py",
    "spo": "train_spo.py",
}

# Settings that weights do not depend on: a caller may choose them anew.
FREE_FIELDS = {
    "aux_loss_alpha",
    "dropout",
    "flash_attn",
    "inference_rope_scaling",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_scaling",
    "seq_aux",
    "use_cache",
}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def weights_path(out_dir: str | Path, stage: str, config: MiniMindConfig) -> Path:
    """Where a stage keeps its weights: out_dir/<stage>_<hidden>[_moe].pth."""
    return Path(out_dir) / f"{stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def save_weights(
    model: nn.Module,
    path: str | Path,
    *,
    stage: str,
    tokens_seen: int,
    data_path: str | Path,
    data_hash: str,
    trained_length: int,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the weights in half precision and their JSON; a failure leaves the former files as they were.

    state: the values by parameter name where the model itself does not hold them whole (DeepSpeed).
    """
    path = Path(path)
    model = unwrap(model)
    state = half_precision(model.state_dict() if state is None else with_tied(state, model), path)
    config = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    info = {
        "format": FORMAT,
        "stage": stage,
        "tokens_seen": tokens_seen,
        "trained_length": trained_length,
        "data_file": Path(data_path).name,
        "data_hash": data_hash,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "config": {**config, "original_max_position_embeddings": trained_length},
    }
    text = json_bytes(info)
    write_files({path: lambda f: torch.save(state, f), path.with_suffix(".json"): lambda f: f.write(text)})


def json_bytes(content: Any) -> bytes:
    """JSON in UTF-8, readable as it stands; half a character in it (a file name's bytes) is escaped as JSON does."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def with_tied(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Values by parameter name, where tied weights stand once, as a state dict, where each name has its entry."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: state[first[id(parameter)]] for name, parameter in every}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and DeepSpeed."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        inner = getattr(model, "module", None) if inner is None else inner
        if inner is None:
            return model
        model = inner


def half_precision(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict on the CPU in float16, bfloat16 where float16 cannot hold a value; tied weights stay tied."""
    for dtype in (torch.float16, torch.bfloat16):
        cast: dict[int, Tensor] = {}
        for tensor in state.values():
            if tensor.data_ptr() not in cast:
                cast[tensor.data_ptr()] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if all(tensor.isfinite().all() for tensor in cast.values()):
            return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}
    broken = next(name for name, tensor in state.items() if not tensor.isfinite().all())
    raise InputError(f"{path} was not written: {broken} holds NaN or infinity")


def write_files(writers: dict[Path, Callable[[IO[bytes]], Any]]) -> None:
    """Write files beside their names, then rename them: a kill or a full disk leaves the former ones whole."""
    beside = {path: path.with_name(f"{path.name}.{uuid4().hex}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in beside.items():
            os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save buries the OSError of a full disk under its own error
            raise error.__context__ from None
        raise
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def find_weights(
    out_dir: str | Path,
    name: str | Path,
    *,
    preset: str | None = None,
    hidden_size: int | None = None,
    use_moe: bool | None = None,
    **other_sizes: int,
) -> Path:
    """The file that `name` means: a path, or a stage's weights in out_dir of the size asked for.

    Where no size is asked for, the weights of that stage that were written last. InputError says what is there instead.
    """
    given = Path(name)
    if given.suffix == ".pth" or len(given.parts) > 1 or (given / "config.json").exists():
        return given
    if preset or hidden_size or use_moe is not None:
        sizes = {key: value for key, value in (("hidden_size", hidden_size), ("use_moe", use_moe)) if value is not None}
        return weights_path(out_dir, str(name), MiniMindConfig.from_preset(preset or "minimind2-small", **sizes))
    pattern = re.compile(rf"{re.escape(str(name))}_\d+(_moe)?\.pth")
    found = [path for path in Path(out_dir).glob(f"{name}_*.pth") if pattern.fullmatch(path.name)]
    if not found:
        return weights_path(out_dir, str(name), MiniMindConfig())  # load_model says that it is not there
    return max(found, key=lambda path: path.stat().st_mtime)


def load_model(
    path: str | Path,
    *,
    preset: str | None = None,
    config_overrides: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    inference_rope_scaling: bool = False,
    kind: type[PreTrainedModel] = MiniMindForCausalLM,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A .pth (with or without its JSON) or a transformers folder -> the model in eval mode, and what is known of it.

    kind: the class that the weights must be of, MiniMindForCausalLM or MiniMindForScoring (model/heads.py).
    preset and config_overrides are what the caller believes of the sizes: they fill in what a file does not say, and
    raise InputError where they contradict it.
    """
    path = Path(path)
    wanted = dict(config_overrides or {})
    if preset is not None:
        known = MiniMindConfig.from_preset(preset)
        wanted = {**{name: getattr(known, name) for name in CONFIG_FIELDS if name not in FREE_FIELDS}, **wanted}
        if "intermediate_size" not in (config_overrides or {}) and "hidden_size" in (config_overrides or {}):
            del wanted["intermediate_size"]
    unknown = sorted(wanted.keys() - set(CONFIG_FIELDS))
    if unknown:
        raise UsageError(f"MiniMindConfig does not know {', '.join(unknown)}: correct or remove it")
    if inference_rope_scaling:
        wanted["inference_rope_scaling"] = True
    if not path.exists():
        raise InputError(missing(path))
    if path.is_dir():
        model, info = load_folder(path, wanted, dtype, kind)
    else:
        model, info = load_pth(path, wanted, dtype, kind)
    return model.to(device).eval(), info


def missing(path: Path) -> str:
    """The sentence for weights that are not there: what to train, and what there is."""
    stage = re.sub(r"_\d+(_moe)?$", "", path.stem)
    advice = f"train it with trainer/{TRAINED_BY[stage]}" if stage in TRAINED_BY else "check the name"
    there = sorted(file.name for file in path.parent.glob("*.pth")) if path.parent.is_dir() else []
    return f"{path} does not exist: {advice} ({path.parent} holds {', '.join(there) if there else 'no weights'})"


def load_pth(
    path: Path, wanted: dict[str, Any], dtype: torch.dtype, kind: type[PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a .pth file; its sizes come from the JSON beside it, or from the shapes of its tensors."""
    state = read_state_dict(path)
    info = read_info(path.with_suffix(".json"))
    source = path.with_suffix(".json") if info else path
    known = info["config"] if info else sizes_from_shapes(path, state, wanted)
    agree(known, wanted, source)
    try:
        config = MiniMindConfig(**{**known, **wanted})
    except UsageError as error:
        raise InputError(f"{source}: {error}") from error
    with torch.device("meta"):  # no memory, no random numbers: the file brings every value
        model = kind(config)
    check_state(path, state, model)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model, {**info, "path": str(path)}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file by name, nothing executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged archive fails in the zip reader, the unpickler or the tensor factory
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(f"{path} is cut short or no weights file ({reason}): copy or train it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no plain state dict of weights (a checkpoint for --from_resume?)")
    return state


def read_info(path: Path) -> dict[str, Any]:
    """The JSON beside a .pth, {} if there is none."""
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(info["config"], dict) and isinstance(info["format"], int)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise InputError(f"{path} is cut short or not the JSON that belongs to weights: copy it again, or remove it")
    if info["format"] > FORMAT:
        raise InputError(f"{path} has format {info['format']}, this version reads up to {FORMAT}: update MiniMind")
    return info


def sizes_from_shapes(path: Path, state: dict[str, Tensor], wanted: dict[str, Any]) -> dict[str, Any]:
    """The config fields that the shapes of a public .pth tell; heads come from `wanted`, else from MiniMind2: 8, 2."""
    embedding = "model.embed_tokens.weight"
    first = "model.layers.0."
    dense, expert = (first + name for name in ("mlp.gate_proj.weight", "mlp.experts.0.gate_proj.weight"))
    if embedding not in state or first + "self_attn.k_proj.weight" not in state or not {dense, expert} & set(state):
        raise InputError(f"{path} holds no MiniMind weights: its first tensor is {next(iter(state))}")

    def count(pattern: str) -> int:
        found = [re.match(pattern, name) for name in state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    vocab_size, hidden_size = state[embedding].shape
    kv_rows = state[first + "self_attn.k_proj.weight"].shape[0]
    heads = wanted.get("num_attention_heads", 8)
    kv_heads = wanted.get(
        "num_key_value_heads", 2 if "num_attention_heads" not in wanted else kv_rows * heads // hidden_size
    )
    if kv_rows * heads != kv_heads * hidden_size:
        raise InputError(
            f"{path} has {kv_rows} key rows, but {heads} heads with {kv_heads} key/value heads over hidden size "
            f"{hidden_size} make {kv_heads * hidden_size // heads}: name its preset or its numbers of heads"
        )
    return {
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_hidden_layers": count(r"model\.layers\.(\d+)\."),
        "intermediate_size": state[dense if dense in state else expert].shape[0],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "use_moe": expert in state,
        **(
            {
                "n_routed_experts": count(r"model\.layers\.0\.mlp\.experts\.(\d+)\."),
                "n_shared_experts": count(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\."),
            }
            if expert in state
            else {}
        ),
        "tie_word_embeddings": torch.equal(state[embedding], state.get("lm_head.weight", state[embedding])),
    }


def agree(known: dict[str, Any], wanted: dict[str, Any], source: Path) -> None:
    """Raise InputError where the caller's sizes contradict those of the file."""
    for name, value in wanted.items():
        if name in known and name not in FREE_FIELDS and value is not None and value != known[name]:
            raise InputError(
                f"{source} says {name} {known[name]}, you ask for {value}: leave it out or load other weights"
            )


def check_state(path: Path, state: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Raise InputError, in one sentence, unless the file has exactly the model's tensors."""
    expected = model.state_dict()
    if "score.weight" in state and "score.weight" not in expected:
        raise InputError(f"{path} is a reward model, not a language model: name the weights of another stage")
    if "lm_head.weight" in state and "lm_head.weight" not in expected:
        raise InputError(f"{path} is a language model, not a reward model: train one with trainer/train_reward.py")
    is_moe = any(".experts." in name for name in state)
    if is_moe != model.config.use_moe:
        kinds = ("a dense model", "a model with experts")
        raise InputError(f"{path} holds {kinds[is_moe]}, but the config is that of {kinds[not is_moe]} (use_moe)")
    for problem, names in (
        ("lacks", expected.keys() - state.keys()),
        ("has the unknown", state.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{path} {problem} {min(names)} ({len(names)} such tensors): it does not fit its config")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            shapes = f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the config"
            raise InputError(f"{path} does not fit: {shapes}")
    if (
        "lm_head.weight" in expected
        and model.config.tie_word_embeddings
        and not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    ):
        raise InputError(f"{path} has an lm_head of its own, but its config says tie_word_embeddings")


def load_folder(
    path: Path, wanted: dict[str, Any], dtype: torch.dtype, kind: type[PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A transformers folder: MiniMind's own class, or one that transformers brings (Llama ...); no foreign code."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no transformers folder: it has no config.json")
    try:
        own = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "minimind"
        config = (MiniMindConfig if own else AutoConfig).from_pretrained(path, local_files_only=True)
    except (ValueError, AttributeError, KeyError, UsageError) as error:
        raise InputError(f"{path / 'config.json'}: {error}") from error
    agree({name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)}, wanted, path)
    if own:
        for name in wanted.keys() & FREE_FIELDS:
            setattr(config, name, wanted[name])
    elif wanted.get("inference_rope_scaling"):
        stretch_foreign(config)
    if not own and kind is not MiniMindForCausalLM:
        raise InputError(f"{path} is no folder of MiniMind's own: its config.json has another model_type")
    loader = kind if own else AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            path, config=config, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # safetensors, zip, JSON and shape errors have no common class
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be loaded ({reason}): copy or export it again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise InputError(
                f"{path} has {problem.replace('_', ' ')} such as {example}: it does not fit its config.json"
            )
    length = getattr(config, "original_max_position_embeddings", None)
    return model, {"path": str(path), "trained_length": length, "dtype": str(dtype).removeprefix("torch.")}


def stretch_foreign(config: Any) -> None:
    """Turn YaRN on, with MiniMind's numbers, in a config of another class."""
    trained = getattr(config, "original_max_position_embeddings", None)
    own = MiniMindConfig(
        inference_rope_scaling=True, **({"original_max_position_embeddings": trained} if trained else {})
    )
    config.rope_parameters = {**own.yarn_parameters(), "rope_theta": config.rope_parameters["rope_theta"]}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by default the one shipped beside this file."""
    folder = Path(__file__).parent if path is None else Path(path)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: name another --tokenizer_path or run scripts/train_tokenizer.py"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be read ({reason})") from error


def check_vocab(tokenizer: PreTrainedTokenizerBase, config: MiniMindConfig) -> None:
    """Raise InputError if the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model a vocabulary of "
            f"{config.vocab_size}: use the tokenizer that the model was trained with"
        )
