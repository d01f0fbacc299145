"""The one way weights are written and read: out/<stage>_<hidden>[_moe].pth with its JSON, public .pth, folders.

A .pth is a state dict in half precision, nothing else. The JSON beside it holds the config and where the weights come
from, so that nobody repeats sizes on a command line; what a caller asks for all the same must agree with it. The
tokenizer belongs to the weights too: an id means nothing without the vocabulary that gave it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError, UsageError
from .formats import FREE_FIELDS, agree, check_state, load_folder, read_state_dict, reason, sizes_from_shapes
from .LMConfig import CONFIG_FIELDS, MiniMindConfig
from .model_minimind import MiniMindForCausalLM

FORMAT = 1  # of the JSON; raised when an older reader would misunderstand it
NONE = type(None)
INFO_TYPES: dict[str, tuple[type, ...]] = {  # of the JSON, the parts before what they hold; config checks its own
    "format": (int,), "tokens_seen": (int, NONE), "trained_length": (int, NONE),
    "config": (dict,), "config.num_hidden_layers": (int, NONE),
    "lora": (dict, NONE), "lora.rank": (int,), "lora.alpha": (int, float), "lora.targets": (list,),
    "base": (dict, NONE), "base.name": (str,), "base.hash": (str,),
    "vocabulary": (dict, NONE), "vocabulary.tokenizer": (str,), "vocabulary.entries": (int,), "vocabulary.hash": (str,),
}  # fmt: skip

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

SHIPPED = Path(__file__).parent  # the tokenizer's folder
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")  # what dataset/chat.py puts around a turn

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
    vocabulary: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the weights in half precision and their JSON; a failure leaves the former files as they were.

    vocabulary: what vocabulary_of says of the tokenizer that they are trained with, None where nobody knows.
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
        "vocabulary": vocabulary,
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
    wanted = wanted_sizes(preset, config_overrides or {})
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


def wanted_sizes(preset: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config fields that a caller asks for: overrides, and those of the preset, if any, that weights depend on."""
    if preset is None:
        return dict(overrides)
    known = MiniMindConfig.from_preset(preset)
    fields = {name: getattr(known, name) for name in CONFIG_FIELDS if name not in FREE_FIELDS}
    if "hidden_size" in overrides:  # which this one follows
        del fields["intermediate_size"]
    return fields | overrides


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
    if config.tie_word_embeddings and hasattr(model, "lm_head") and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # others write tied weights once
    check_state(path, state, model)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model, {**info, "path": str(path)}


def read_info(path: Path) -> dict[str, Any]:
    """The JSON beside a .pth, {} if there is none."""
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        wrong = wrong_type(info)
    except ValueError as error:
        wrong = reason(error)
    if wrong:
        raise InputError(
            f"{path} is cut short or not the JSON that belongs to weights ({wrong}): copy it again, or remove it"
        )
    if info["format"] > FORMAT:
        raise InputError(f"{path} has format {info['format']}, this version reads up to {FORMAT}: update MiniMind")
    return info


def wrong_type(info: Any) -> str:
    """The first value that contradicts INFO_TYPES, in words; empty if none does."""
    if not isinstance(info, dict):
        return "no object"
    for place, kinds in INFO_TYPES.items():
        part, _, name = place.rpartition(".")
        holder = info.get(part) if part else info
        if holder is not None and type(holder.get(name)) not in kinds:  # not isinstance: true is an int there
            return f"{place} is {json.dumps(holder[name])[:80]}" if name in holder else f"{place} is not there"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by default the shipped one; InputError where texts and chats need what it has not."""
    folder = SHIPPED if path is None else Path(path)
    tokenizer = read_tokenizer(folder)
    known = tokenizer.get_vocab()
    lacking = [name for name in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking := lacking + [token for token in TURN_TOKENS if token not in known]:
        raise InputError(
            f"the tokenizer in {folder} has no {', no '.join(lacking)}, which texts and chats are written with: "
            "add them to it, or train another with scripts/train_tokenizer.py"
        )
    if "ByteLevel" not in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)):
        raise InputError(
            f"the tokenizer in {folder} is not byte-level, its tokens cannot be read here as the bytes that they stand "
            "for: take a byte-level BPE, such as scripts/train_tokenizer.py trains"
        )
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever it is fit for."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: name another --tokenizer_path or run scripts/train_tokenizer.py"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception
        raise InputError(f"the tokenizer in {folder} cannot be read ({reason(error)})") from error


def open_tokenizer(named: str | Path | None, path: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of the weights in path: the named one, else the one beside them, else the shipped one; checked."""
    tokenizer = load_tokenizer(named or tokenizer_beside(path))
    check_vocab(tokenizer, model.config, path)
    take_special_ids(model, tokenizer)
    return tokenizer


def tokenizer_beside(path: Path) -> Path | None:
    """The folder of the tokenizer that lies in a transformers folder, or in the folder of a .pth file."""
    folder = path if path.is_dir() else path.parent
    names = ["tokenizer.json"]
    if path.is_dir():  # one that cannot be read must not give way to another in silence
        names += ["tokenizer.model", "tokenizer_config.json", "vocab.json"]
    return folder if any((folder / name).is_file() for name in names) else None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What weights remember of their tokenizer: its name, its size, and a hash of which id each token has."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest = hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()
    return {"tokenizer": Path(tokenizer.name_or_path).resolve().name, "entries": len(entries), "hash": digest}


def recorded_vocabulary(path: Path) -> dict[str, Any] | None:
    """vocabulary_of the tokenizer that weights were trained with; None where neither JSON nor folder tells it."""
    if path.is_dir():
        return vocabulary_of(read_tokenizer(path)) if (path / "tokenizer.json").is_file() else None
    return read_info(path.with_suffix(".json")).get("vocabulary")


def check_vocab(
    tokenizer: PreTrainedTokenizerBase,
    config: MiniMindConfig,
    path: Path | None = None,
    recorded: dict[str, Any] | None = None,
) -> None:
    """Raise InputError if the tokenizer has ids that the model has no embedding for, or is not that of the weights.

    path: where the weights come from, None for a new model; recorded: the vocabulary that they were trained with, by
    default what path tells. Weights that nobody knows it of, such as public ones, pass.
    """
    if len(tokenizer) > config.vocab_size:
        advice = "use the tokenizer that the model was trained with"
        if path is None:
            advice = f"train a tokenizer of that size with scripts/train_tokenizer.py --vocab_size {config.vocab_size}"
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the {'' if path else 'new '}model a "
            f"vocabulary of {config.vocab_size}: {advice}"
        )
    recorded = recorded or (path and recorded_vocabulary(path))
    here = vocabulary_of(tokenizer)
    if recorded and recorded["hash"] != here["hash"]:
        told = "{tokenizer!r}, {entries} entries with hash {hash!s:.8}"
        raise InputError(
            f"{path} belongs to another tokenizer ({told.format(**recorded)}), {tokenizer.name_or_path} gives tokens "
            f"other ids ({told.format(**here)}): name the folder of its own with --tokenizer_path"
        )


def take_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model whose special ids are still the defaults those of its tokenizer: <|im_end|> ends a reply anyway."""
    names, config = ("bos_token_id", "eos_token_id", "pad_token_id"), model.config
    if tuple(getattr(config, name) for name in names) != (1, 2, 0):
        return
    ends = list(dict.fromkeys([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]))
    values = (tokenizer.bos_token_id, ends if len(ends) > 1 else ends[0], tokenizer.pad_token_id)
    for holder in filter(None, (config, getattr(model, "generation_config", None))):
        for name, value in zip(names, values, strict=True):
            setattr(holder, name, value)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer of a folder beside weights, so that transformers 4 and 5 read it, its chat template with it."""
    tokenizer, path = read_tokenizer(source), source / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config.pop("backend", None)  # transformers 5 writes it, and a class that transformers 4 does not know
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")  # older folders keep them in a file of their own
    config |= {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    template = tokenizer.chat_template  # may stand in chat_template.jinja alone; several of them have names
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    config |= {"chat_template": template} if template else {}
    shutil.copy(source / "tokenizer.json", target)
    (target / "tokenizer_config.json").write_bytes(json_bytes(config))
