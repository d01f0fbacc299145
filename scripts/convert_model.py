"""Weights of this project as a transformers folder of a class that other programs know, and back.

    python scripts/convert_model.py out/full_sft_512.pth exported/       dense: Llama; a mixture: GraniteMoeShared
    python scripts/convert_model.py exported/ out/full_sft_512.pth       back, of these classes or MiniMind's own
    python scripts/convert_model.py out/full_sft_512.pth exported/ --lora_name lora_identity   an adapter merged in
    python scripts/convert_model.py out/full_sft_512.pth adapter/ --lora_name lora_identity --peft   it alone

Both classes compute exactly what MiniMind computes. The folder holds safetensors in the precision of the .pth (float32
with an adapter, whose sum half precision would round), config and tokenizer, readable by transformers 4 and 5. It is
loaded again and its logits are compared before it is called done.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import (
    AutoModelForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from model.decoder import own_config
from model.errors import InputError, UsageError, run_script
from model.LMConfig import PRESETS, MiniMindConfig
from model.loading import copy_tokenizer, load_model, open_tokenizer, recorded_vocabulary, save_weights
from model.model_lora import export_peft, find_lora, load_lora, merge_lora
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.flags import SWITCH
from trainer.runtime.start import weights_file_hash

TOLERANCE = 1e-4  # of logits in float32
SHARED_FIELDS = (  # of the configs of Llama, Granite and MiniMind
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


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


def sizes(config: MiniMindConfig) -> dict:
    """The sizes of a model in the words of Llama and Granite."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {name: getattr(config, name) for name in SHARED_FIELDS} | {"rope_parameters": rope}


def to_llama(model: MiniMindForCausalLM) -> LlamaForCausalLM:
    """A dense model: the names of the weights are the same."""
    llama = LlamaForCausalLM(LlamaConfig(**sizes(model.config), attention_bias=False, mlp_bias=False))
    llama.load_state_dict(model.state_dict())
    return llama


def to_granite(model: MiniMindForCausalLM) -> GraniteMoeSharedForCausalLM:
    """A mixture: shared experts side by side are one wider network; the router's softmax over the chosen experts
    equals ours over all, renormalised."""
    config = model.config
    if not config.norm_topk_prob:
        raise UsageError("a mixture with norm_topk_prob false has no equal in transformers: it cannot be exported")
    granite = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            **sizes(config), attention_multiplier=1 / math.sqrt(config.head_dim),
            embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0,
            num_local_experts=config.n_routed_experts, num_experts_per_tok=config.num_experts_per_tok,
            shared_intermediate_size=config.n_shared_experts * config.intermediate_size,
        )
    )  # fmt: skip
    state = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    for number, block in enumerate(model.model.layers):
        mlp, layer = block.mlp, f"model.layers.{number}."
        experts = layer + "block_sparse_moe."
        state |= {
            experts + "router.weight": mlp.gate.weight,
            experts + "experts.gate_up_proj": torch.stack([gate_up(expert) for expert in mlp.experts]),
            experts + "experts.down_proj": torch.stack([expert.down_proj.weight for expert in mlp.experts]),
        }
        if len(mlp.shared_experts):
            gates = [expert.gate_proj.weight for expert in mlp.shared_experts]
            ups = [expert.up_proj.weight for expert in mlp.shared_experts]
            downs = [expert.down_proj.weight for expert in mlp.shared_experts]
            state[layer + "shared_mlp.input_linear.weight"] = torch.cat([*gates, *ups])
            state[layer + "shared_mlp.output_linear.weight"] = torch.cat(downs, dim=1)
    granite.load_state_dict(state)
    return granite


def gate_up(expert) -> Tensor:
    return torch.cat((expert.gate_proj.weight, expert.up_proj.weight))


def from_llama(model: PreTrainedModel, info: dict) -> MiniMindForCausalLM:
    """A dense model, or one of MiniMind's own class."""
    config = own_config(model.config)
    config.original_max_position_embeddings = info.get("trained_length") or config.original_max_position_embeddings
    own = MiniMindForCausalLM(config)
    own.load_state_dict(model.state_dict())
    return own


def from_granite(granite: GraniteMoeSharedForCausalLM) -> MiniMindForCausalLM:
    """to_granite backwards; InputError for one that scales or splits what MiniMind does not."""
    theirs, width = granite.config, granite.config.intermediate_size
    head_dim, rope = theirs.hidden_size // theirs.num_attention_heads, theirs.rope_parameters
    scales = [theirs.attention_multiplier * math.sqrt(head_dim), theirs.logits_scaling]
    scales += [theirs.embedding_multiplier, theirs.residual_multiplier]
    plain = not theirs.attention_bias and theirs.tie_word_embeddings and rope["rope_type"] == "default"
    if not plain or theirs.shared_intermediate_size % width or not all(math.isclose(scale, 1) for scale in scales):
        raise InputError("this Granite has scales, biases or sizes that MiniMind has not: it cannot become a .pth")
    config = MiniMindConfig(
        **{name: getattr(theirs, name) for name in SHARED_FIELDS}, rope_theta=rope["rope_theta"], use_moe=True,
        n_routed_experts=theirs.num_local_experts, num_experts_per_tok=theirs.num_experts_per_tok,
        n_shared_experts=theirs.shared_intermediate_size // width,
    )  # fmt: skip
    state = granite.state_dict()
    own = {name: x for name, x in state.items() if ".block_sparse_moe." not in name and ".shared_mlp." not in name}
    for layer in (f"model.layers.{number}." for number in range(config.num_hidden_layers)):
        routed, shared = layer + "block_sparse_moe.", layer + "shared_mlp."
        own[layer + "mlp.gate.weight"] = state[routed + "router.weight"]
        gate, up = state[routed + "experts.gate_up_proj"].chunk(2, dim=1)  # (E, inner, D)
        own |= expert_weights(layer + "mlp.experts", gate, up, state[routed + "experts.down_proj"])
        if config.n_shared_experts:
            gate, up = (x.unflatten(0, (-1, width)) for x in state[shared + "input_linear.weight"].chunk(2))
            down = state[shared + "output_linear.weight"].unflatten(1, (-1, width)).transpose(0, 1)  # (E, D, inner)
            own |= expert_weights(layer + "mlp.shared_experts", gate, up, down)
    model = MiniMindForCausalLM(config)
    model.load_state_dict(own)
    return model


def expert_weights(prefix: str, gates: Tensor, ups: Tensor, downs: Tensor) -> dict[str, Tensor]:
    """The weights of E networks by name: gates and ups (E, inner, D), downs (E, D, inner)."""
    kinds = {"gate_proj": gates, "up_proj": ups, "down_proj": downs}
    return {f"{prefix}.{i}.{kind}.weight": x for kind, stack in kinds.items() for i, x in enumerate(stack)}


@torch.inference_mode()
def difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """The largest difference of logits on some tokens, both in float32."""
    ids = torch.randint(ours.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    return float((ours.float()(ids).logits - theirs.float()(ids).logits).abs().max())


def make_portable(folder: Path, theta: float) -> None:
    """What transformers 4 needs: rope_theta on its own (else it takes 10,000 in silence)."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"rope_theta": theta}, indent=2) + "\n", encoding="utf-8")


def must_be_free(target: Path) -> None:
    """Raise InputError for a target that would be overwritten."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already: name another folder, or remove it")


def export(model: MiniMindForCausalLM, tokenizer_folder: Path, target: Path, dtype: torch.dtype) -> float:
    """Write a transformers folder, beside its name first -> how far its logits are from the model's."""
    must_be_free(target)
    exported = (to_granite if model.config.use_moe else to_llama)(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting") as scratch:
        folder = Path(scratch) / "model"
        exported.to(dtype).save_pretrained(folder)
        make_portable(folder, model.config.rope_theta)
        copy_tokenizer(tokenizer_folder, folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        error = difference(model, again)
        if not error <= TOLERANCE:
            raise InputError(f"{target} was not written: its logits are {error:.1e} from those of the source")
        if target.is_dir():
            target.rmdir()
        folder.rename(target)
    return error


def restore(model: PreTrainedModel, info: dict, source: Path, target: Path) -> float:
    """Write a .pth of a folder's weights -> how far its logits are from the folder's."""
    must_be_free(target)
    kind = model.config.model_type
    if kind == "granitemoeshared":
        own = from_granite(model)
    elif kind in ("llama", "minimind"):
        own = from_llama(model, info)
    else:
        raise InputError(
            f"{source} holds a {kind} model: only Llama, GraniteMoeShared and MiniMind's own become a .pth"
        )
    own.eval().tie_weights()
    save_weights(
        own, target, stage=re.sub(r"_\d+(_moe)?$", "", target.stem), tokens_seen=0, data_path=source,
        data_hash=weights_file_hash(source), trained_length=own.config.original_max_position_embeddings,
        vocabulary=recorded_vocabulary(source),
    )  # fmt: skip
    return difference(model, load_model(target)[0])


def main(args: argparse.Namespace) -> None:
    if args.source.is_dir() == (args.target.suffix != ".pth"):
        raise UsageError("one side must be a .pth file, the other a folder")
    if args.peft and not args.lora_name:
        raise UsageError("--peft writes an adapter: name it with --lora_name")
    model, info = load_model(args.source, preset=args.preset)
    if args.lora_name:
        adapter = find_lora(args.source.parent, args.lora_name, model.config)
        if args.peft:
            must_be_free(args.target)
            load_lora(model, adapter)
            export_peft(model, args.target, base_name=str(args.source))
            print(f"wrote {args.target}, an adapter for the folder that {args.source} is exported to")
            return
        merge_lora(model, adapter)
    if args.source.is_dir():
        error = restore(model, info, args.source, args.target)
    else:
        tokenizer = open_tokenizer(args.tokenizer_path, args.source, model)
        dtype = torch.float32 if args.lora_name else getattr(torch, info.get("dtype", "float16"))
        error = export(model, Path(tokenizer.name_or_path), args.target, dtype)
    print(f"wrote {args.target}; logits within {error:.1e} of {args.source}")


if __name__ == "__main__":
    run_script(parse_args, main)
