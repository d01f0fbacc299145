"""Weights of this project as a transformers folder of a class that other programs know, and back.

    python scripts/convert_model.py out/full_sft_512.pth exported/       dense: Llama; a mixture: GraniteMoeShared
    python scripts/convert_model.py exported/ out/full_sft_512.pth       back, of these classes or MiniMind's own
    python scripts/convert_model.py out/full_sft_512.pth exported/ --lora_name lora_identity   an adapter merged in
    python scripts/convert_model.py out/full_sft_512.pth adapter/ --lora_name lora_identity --peft   it alone

Both classes compute exactly what MiniMind computes. The folder holds safetensors in the precision of the .pth (float32
with an adapter, whose sum half precision would round), config and tokenizer, readable by transformers 4 and 5. What is
written, a folder or a .pth, is loaded again and its logits are compared before it gets its name.
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModelForCausalLM, PreTrainedModel

from model.errors import InputError, UsageError, run_script
from model.foreign import own_config, to_granite, to_llama
from model.formats import PLAIN_NAMES, read_state_dict
from model.LMConfig import PRESETS, MiniMindConfig
from model.loading import (
    copy_tokenizer,
    half_precision,
    load_model,
    open_tokenizer,
    recorded_vocabulary,
    save_weights,
)
from model.model_lora import base_note, export_peft, find_lora, load_lora, merge_lora
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.flags import SWITCH
from trainer.runtime.start import weights_file_hash

TOLERANCE = 1e-4  # of logits in float32; rounding grows with the largest of them


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="a .pth file or a transformers folder")
    add("target", type=Path, help="a folder, or a .pth file where the source is a folder")
    add(
        "--tokenizer_path",
        type=Path,
        help="folder of the tokenizer to put beside the weights (default: that beside the source, else model/)",
    )
    add("--preset", choices=PRESETS, help="size of a .pth file that has no JSON beside it")
    add("--lora_name", help="adapter of lora/ beside the source, or a .pth file, to merge into the weights")
    add("--peft", **SWITCH, default=False, help="with --lora_name: write the adapter alone, in the format of PEFT")
    add("--debug", **SWITCH, default=False, help="show tracebacks of errors")
    return parser.parse_args(argv)


@torch.inference_mode()
def difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """The largest difference of logits on some tokens, both in float32; a share of the largest if over 1."""
    ids = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = theirs.float()(ids).logits
    return float((ours.float()(ids).logits - expected).abs().max() / expected.abs().max().clamp(min=1))


def judge(target: Path, ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """The difference of two models that must compute the same; InputError, before there is a target, if they do not."""
    error = difference(ours, theirs)
    if not error <= TOLERANCE:
        raise InputError(f"{target} was not written: its logits are {error:.1e} from those of the source")
    return error


def make_portable(folder: Path, config: MiniMindConfig) -> None:
    """What transformers 4 needs: rope_theta (else it takes 10,000 in silence) and YaRN on their own."""
    path = folder / "config.json"
    known = json.loads(path.read_text(encoding="utf-8")) | {"rope_theta": config.rope_theta}
    if yarn := config.yarn_parameters():
        known["rope_scaling"] = yarn
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def must_be_free(target: Path) -> None:
    """Raise InputError for a target that would be overwritten."""
    for path in (target, target.with_suffix(".json")) if target.suffix == ".pth" else (target,):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is there already: name another target, or remove it")


def stored_dtype(path: Path) -> torch.dtype:
    """The narrowest precision that holds every weight of a .pth as it is."""
    kinds = {tensor.dtype for tensor in read_state_dict(path).values()}
    return kinds.pop() if kinds in ({torch.float16}, {torch.bfloat16}) else torch.float32


def export(model: MiniMindForCausalLM, tokenizer_folder: Path, target: Path, dtype: torch.dtype) -> float:
    """Write a transformers folder, beside its name first -> how far its logits are from the model's."""
    exported = (to_granite if model.config.use_moe else to_llama)(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting") as scratch:
        folder = Path(scratch) / "model"
        exported.to(dtype).save_pretrained(folder)
        make_portable(folder, model.config)
        copy_tokenizer(tokenizer_folder, folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        error = judge(target, model, again)
        if target.is_dir():
            target.rmdir()
        folder.rename(target)
    return error


def open_folder(source: Path, target: Path) -> tuple[MiniMindForCausalLM, dict]:
    """The model of a folder and what is known of it, its logits compared with those of the folder's own class."""
    model, info = load_model(source)
    if not isinstance(model, MiniMindForCausalLM):
        try:
            own_config(model.config)
        except UsageError as error:
            raise InputError(f"{source} cannot become a .pth: {error}") from error
    if json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type") != "minimind":
        theirs = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, key_mapping=PLAIN_NAMES
        )
        judge(target, model, theirs)
    return model, info


def restore(model: MiniMindForCausalLM, info: dict, source: Path, target: Path) -> float:
    """Write a .pth of a folder's model, beside its name first -> how far its logits are: half precision rounds."""
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(half_precision(model.state_dict(), target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting") as scratch:
        written = Path(scratch) / target.name
        save_weights(
            model, written, stage=re.sub(r"_\d+(_moe)?$", "", target.stem), tokens_seen=0, data_path=source,
            data_hash=weights_file_hash(source),
            trained_length=info["trained_length"] or model.config.original_max_position_embeddings,
            vocabulary=recorded_vocabulary(source),
        )  # fmt: skip
        again = load_model(written)[0]
        judge(target, rounded, again)
        for suffix in (".json", ".pth"):
            os.replace(written.with_suffix(suffix), target.with_suffix(suffix))
    return difference(model, again)


def main(args: argparse.Namespace) -> None:
    if args.source.is_dir() == (args.target.suffix != ".pth"):
        raise UsageError("one side must be a .pth file, the other a folder")
    if args.peft and not args.lora_name:
        raise UsageError("--peft writes an adapter: name it with --lora_name")
    must_be_free(args.target)
    from_folder = args.source.is_dir()
    model, info = open_folder(args.source, args.target) if from_folder else load_model(args.source, preset=args.preset)
    if args.lora_name:
        adapter = find_lora(args.source.parent, args.lora_name, model.config)
        known = (load_lora if args.peft else merge_lora)(model, adapter)
        if note := base_note(known, args.source, weights_file_hash(args.source)):
            print(f"{adapter}{note}")
        if args.peft:
            export_peft(model, args.target, base_name=str(args.source))
            print(f"wrote {args.target}, an adapter for the folder that {args.source} is exported to")
            return
    if from_folder:
        error = restore(model, info, args.source, args.target)
    else:
        tokenizer = open_tokenizer(args.tokenizer_path, args.source, model)
        dtype = torch.float32 if args.lora_name else stored_dtype(args.source)
        error = export(model, Path(tokenizer.name_or_path), args.target, dtype)
    print(f"wrote {args.target}; logits within {error:.1e} of {args.source}")


if __name__ == "__main__":
    run_script(parse_args, main)
