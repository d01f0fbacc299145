"""How a stage script starts: its process, model, engine and data."""

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.demo_data import ensure_demo_data
from dataset.lm_dataset import PackedDataset, file_hash
from model.errors import InputError, run_script
from model.LMConfig import MiniMindConfig
from model.loading import (
    check_vocab,
    find_weights,
    load_model,
    open_tokenizer,
    take_special_ids,
    vocabulary_of,
    wanted_sizes,
    weights_path,
)
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.checkpoint import (
    agree,
    checkpoint_path,
    find_checkpoint,
    is_of_launch,
    read_checkpoint,
    verify_resume,
)
from trainer.runtime.devices import pick_device, pick_dtype
from trainer.runtime.distributed import (
    is_lost_peer,
    launched_rank,
    local_main_first,
    stop_processes,
)
from trainer.runtime.engine import Engine, wants_compile
from trainer.runtime.flags import ROOT
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run


def run_training(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """How a training script starts: main(args), --verify_resume in its place; one sentence for an error, no hang.

    A process that only lost its peer says so last: the peer's own sentence is the one to read.
    """

    def start(args: argparse.Namespace) -> None:
        try:
            verify_resume(args) if args.verify_resume else main(args)
        except Exception as error:
            if launched_rank() != 0 or is_lost_peer(error):
                time.sleep(3)  # rank 0 may be saying the same; the launcher ends us when another rank has died
            if is_lost_peer(error):
                raise InputError("another process of this run ended; its own message says why") from error
            raise
        stop_processes()

    run_script(parse_args, start)


# ----------------------------------------------------------------------------------------------------------- the model


def given_sizes(args: argparse.Namespace) -> dict[str, int]:
    """The sizes that flags name, in place of a preset's."""
    flags = {key: getattr(args, key) for key in ("hidden_size", "num_hidden_layers", "use_moe")}
    return {key: value for key, value in flags.items() if value is not None}


def build_model(run: Run, longest: int | None = None) -> MiniMindForCausalLM:
    """The run's model on its device, float32: that of --from_resume, the weights of --from_weight, or a new one.

    longest: tokens of the longest document that it will see (default: --max_seq_len).
    """
    args, tokenizer, path, recorded = run.args, run.tokenizer, None, None
    longest = longest or args.max_seq_len
    sizes = given_sizes(args)
    found = find_checkpoint(args.out_dir, run.stage, args.preset, sizes, any_size=args.from_weight != "none")
    resumed = found if found and (args.from_resume or is_of_launch(found, run.launchers)) else None
    if args.from_resume and not resumed:
        print(f"no checkpoint of {run.stage} to resume in {args.out_dir / 'checkpoints'}: starting anew")
    if resumed:
        model, path, recorded = resumed_model(resumed, args, run), resumed, run.checkpoint.get("vocabulary")
    elif args.from_weight == "none":
        config = MiniMindConfig.from_preset(args.preset or "minimind2-small", **sizes)
        config.original_max_position_embeddings = longest
        model = MiniMindForCausalLM(config)
    else:
        path = find_weights(args.out_dir, args.from_weight, preset=args.preset, **sizes)
        print(f"starting from {path}")
        model, info = load_model(path, preset=args.preset, config_overrides=sizes)
        run.tokens = info.get("tokens_seen") or 0
        model.config.original_max_position_embeddings = max(info.get("trained_length") or 0, longest)
    check_vocab(tokenizer, model.config, path, recorded)
    take_special_ids(model, tokenizer)
    run.vocabulary = vocabulary_of(tokenizer)
    run.name = weights_path(args.out_dir, run.stage, model.config).stem
    unfinished = checkpoint_path(args.out_dir, run.weights)
    run.claim_files()
    if not resumed and run.is_main and unfinished.exists():
        print(f"note: {unfinished} of an earlier run will be replaced (--from_resume 1 would go on with it)")
    return model.to(run.device).train()


def open_model(args: argparse.Namespace, **overrides) -> tuple[Path, nn.Module, dict, PreTrainedTokenizerBase]:
    """What add_weight_flags names, to be read: its path, the model in eval mode, what is known of it, the tokenizer.

    overrides: config fields in place of the file's, among those that weights do not depend on.
    """
    device = pick_device(args.device)
    path = args.weight or find_weights(args.out_dir, args.stage, preset=args.preset, **given_sizes(args))
    model, info = load_model(
        path, preset=args.preset, config_overrides={**given_sizes(args), **overrides}, device=device,
        dtype=pick_dtype(args.dtype, device),
    )  # fmt: skip
    return path, model, info, open_tokenizer(args.tokenizer_path, path, model)


def resumed_model(path: Path, args: argparse.Namespace, run: Run) -> MiniMindForCausalLM:
    """The model of a checkpoint, its values still to come (Run.begin), and the run set to where it stopped."""
    print(f"resuming from {path}")
    run.checkpoint = read_checkpoint(path)
    config = MiniMindConfig(**run.checkpoint["config"])
    asked = wanted_sizes(args.preset, given_sizes(args))
    agree(path, {key: getattr(config, key) for key in asked}, asked)
    place = run.checkpoint["place"]
    run.step, run.epoch, run.row, run.tokens = (place[key] for key in ("step", "epoch", "row", "tokens"))
    run.skipped_steps, run.logs.elapsed_before = place["skipped_steps"], place["elapsed_s"]
    return MiniMindForCausalLM(config)


def make_engine(model: nn.Module, run: Run, learning_rate: float | None = None) -> Engine:
    """A model with its optimizer, at this peak learning rate (default: --learning_rate).

    The engine is the one that flags and launcher ask for: plain, replicated over the processes, or DeepSpeed's.
    """
    args = run.args
    rate = run.learning_rate if learning_rate is None else learning_rate
    optimizer = build_optimizer(model, args.optimizer, rate, args.weight_decay, run.dtype)
    if args.deepspeed is not None:
        from trainer.runtime.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer, run)
    return Engine(model, optimizer, run, compiled=wants_compile(run))


# ------------------------------------------------------------------------------------------------------------ the data


def weights_file_hash(path: Path) -> str:
    """The hash of a .pth, or of what makes a transformers folder the model that it is."""
    if path.is_file():
        return file_hash(path)
    files = sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")])
    return hashlib.blake2b("".join(map(file_hash, files)).encode(), digest_size=16).hexdigest()


def resolve_data(args: argparse.Namespace, default_name: str, demo_name: str) -> tuple[Path, Path | None]:
    """The training file and the held-out file (or None): the flags', else dataset/<default>, else the embedded data."""
    train = args.data_path or ROOT / "dataset" / default_name
    if args.data_path is None and not train.exists():
        train = ensure_demo_data() / demo_name
        print(f"dataset/{default_name} is not there: training on the embedded data, {train}")
    held_out = train.parent / f"{train.stem}_val{train.suffix}"  # with_name refuses "."
    return train, args.val_path or (held_out if held_out.exists() else None)


def open_data(
    kind: Callable[..., PackedDataset], default_name: str, demo_name: str, run: Run
) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and held-out rows of resolve_data's files, tokenised by one process of each machine."""
    args = run.args
    paths = resolve_data(args, default_name, demo_name)
    how = run.tokenizer, args.max_seq_len, run.cache_dir, args.packing, args.seed
    with local_main_first():
        train_set, val_set = (path and kind(path, *how) for path in paths)
    return train_set, val_set
