"""What the files of weights hold: the state dict of a .pth file, and a transformers folder."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .errors import InputError, UsageError
from .foreign import as_minimind
from .LMConfig import CONFIG_FIELDS, MiniMindConfig
from .model_minimind import MiniMindForCausalLM

QUANTISED = "quantised weights cannot be read, take the original ones"
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # what DistributedDataParallel and torch.compile put before names
PLAIN_NAMES = {WRAPPERS.pattern: ""}  # the same for from_pretrained(key_mapping=)
WHOLE = re.compile(r"u?int|q|bool|[IU]\d|BOOL")  # how torch and safetensors begin the names of what is no float

# Settings that weights do not depend on: a caller may choose them anew.
FREE_FIELDS = {
    "aux_loss_alpha",
    "bos_token_id",
    "dropout",
    "eos_token_id",
    "flash_attn",
    "inference_rope_scaling",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "pad_token_id",
    "rope_scaling",
    "seq_aux",
    "use_cache",
}


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def agree(known: dict[str, Any], wanted: dict[str, Any], source: Path) -> None:
    """Raise InputError where the caller's sizes contradict those of the file."""
    for name, value in wanted.items():
        if name in known and name not in FREE_FIELDS and value is not None and value != known[name]:
            raise InputError(
                f"{source} says {name} {known[name]}, you ask for {value}: leave it out or load other weights"
            )


# ----------------------------------------------------------------------------------------------------------------------
# A .pth file


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file by name, without the prefixes of a wrapper; nothing executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged archive fails in the zip reader, the unpickler or the tensor factory
        raise InputError(f"{path} is cut short or no weights file ({reason(error)}): copy or train it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no plain state dict of weights (a checkpoint for --from_resume?)")
    for name, tensor in state.items():
        if not tensor.is_floating_point():  # cast to floats, they would be other weights
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{path} holds {name} as {kind}: {QUANTISED}")
    return without_wrappers(path, state)


def without_wrappers(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """What stands under the names of tensors, under their plain names; InputError where two become one."""
    plain = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{path} holds weights both with and without the prefix module. or _orig_mod.: save it again")
    return plain


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


# ----------------------------------------------------------------------------------------------------------------------
# A folder


def load_folder(
    path: Path, wanted: dict[str, Any], dtype: torch.dtype, kind: type[PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A transformers folder: MiniMind's own class, or one that transformers brings; no foreign code.

    What MiniMind computes itself (Llama, GraniteMoeShared) becomes its own class, which all scripts can read.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no transformers folder: it has no config.json")
    try:
        own = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "minimind"
        config = (MiniMindConfig if own else AutoConfig).from_pretrained(path, local_files_only=True)
    except Exception as error:  # of JSON, of ours, or of transformers' own checks of types, which have no common class
        raise InputError(f"{path / 'config.json'}: {reason(error)}") from error
    config.eos_token_id = end_ids(path, getattr(config, "eos_token_id", None))
    agree({name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)}, wanted, path)
    if own:
        for name in wanted.keys() & FREE_FIELDS:
            setattr(config, name, wanted[name])
    elif wanted.get("inference_rope_scaling"):
        stretch_foreign(config)
    if not own and kind is not MiniMindForCausalLM:
        raise InputError(f"{path} is no folder of MiniMind's own: its config.json has another model_type")
    wrapped = check_tensors(path)
    loader = kind if own else AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            path, config=config, local_files_only=True, dtype=dtype, output_loading_info=True, key_mapping=PLAIN_NAMES
        )
    except Exception as error:  # safetensors, zip, JSON and shape errors have no common class
        raise InputError(f"{path} cannot be loaded ({reason(error)}): copy or export it again") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise InputError(
                f"{path} has {problem.replace('_', ' ')} such as {example}: it does not fit its config.json"
            )
    if wrapped:
        model._weight_conversions = None  # save_pretrained would put the prefixes on again
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = config.eos_token_id
    if not own:
        with contextlib.suppress(UsageError):  # MiniMind computes otherwise: it stays what it is
            model = as_minimind(model, **{name: wanted[name] for name in wanted.keys() & FREE_FIELDS})
    length = getattr(config, "original_max_position_embeddings", None)
    return model, {"path": str(path), "trained_length": length, "dtype": str(dtype).removeprefix("torch.")}


def check_tensors(path: Path) -> bool:
    """Whether names in a folder's weights have the prefix of a wrapper.

    InputError for what transformers would take without a word: integers, cast to floats, and two tensors of one name.
    """
    kinds = {}
    for file in weight_files(path):
        for name, kind in kinds_in(file).items():
            if name.endswith(("weight", "_proj")) and WHOLE.match(kind):  # others have buffers of whole numbers
                raise InputError(f"{file} holds {name} as {kind}: {QUANTISED}")
            kinds[name] = kind
    return without_wrappers(path, kinds).keys() != kinds.keys()


def weight_files(path: Path) -> list[Path]:
    """The files of a folder that transformers reads weights from; none where an index is damaged, which it says."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                return sorted({path / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
            return []
    return []


def kinds_in(file: Path) -> dict[str, str]:
    """The number format of each tensor in a folder's file; none where it is damaged: who reads the values says so."""
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as tensors:
                return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        state = torch.load(file, map_location="meta", weights_only=True)
        return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    except Exception:  # as in read_state_dict, and of safetensors
        return {}


def end_ids(path: Path, own: int | list[int] | None) -> int | list[int] | None:
    """The tokens that end a reply: config.json's own and generation_config.json's, where chat models have more."""
    source, told = path / "generation_config.json", None
    if source.is_file():
        try:
            told = json.loads(source.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{source}: {reason(error)}") from error
    ids = [i for given in (own, told) for i in (given if isinstance(given, list) else [given])]
    if not all(i is None or isinstance(i, int) for i in ids):
        raise InputError(f"{source}: eos_token_id must be a whole number or a list of them, not {told!r}")
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def stretch_foreign(config: Any) -> None:
    """Turn YaRN on, with MiniMind's numbers, in a config of another class that is not stretched yet."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind == "yarn":
        return
    if kind != "default":
        raise UsageError(f"YaRN does not go with rope_type {kind} of this {config.model_type}: leave it out")
    trained = getattr(config, "original_max_position_embeddings", None)
    own = MiniMindConfig(
        inference_rope_scaling=True, **({"original_max_position_embeddings": trained} if trained else {})
    )
    config.rope_parameters = {**own.yarn_parameters(), "rope_theta": config.rope_parameters["rope_theta"]}
