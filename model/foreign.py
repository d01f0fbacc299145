"""The classes of transformers that compute what MiniMind computes: Llama, and GraniteMoeShared for a mixture.

    as_minimind(model)              a Llama or Granite as MiniMindForCausalLM, on the very tensors of it
    to_llama(model), to_granite     a model of MiniMind's in the class that other programs know

The names of a dense model's weights are the same. Granite keeps the experts of a layer as one tensor, and shared
experts, which stand side by side, as one wider network.

Shapes: D hidden   I intermediate   E routed experts   S shared experts
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from .errors import UsageError
from .LMConfig import MiniMindConfig
from .model_minimind import MiniMindForCausalLM

SHARED_FIELDS = (  # of the configs of Llama, Granite and MiniMind
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def own_config(config: PretrainedConfig) -> MiniMindConfig:
    """The config of a model in MiniMind's words; UsageError for one that computes what MiniMind does not."""
    if isinstance(config, MiniMindConfig):
        return config
    if config.model_type not in ("llama", "granitemoeshared"):
        raise UsageError(only_these(config))
    granite = config.model_type == "granitemoeshared"
    rope, head_dim = dict(config.rope_parameters), config.hidden_size // config.num_attention_heads
    theta, yarn = rope.pop("rope_theta"), rope["rope_type"] == "yarn"
    for other, what in (
        (rope["rope_type"] not in ("default", "yarn"), f"rope_type {rope['rope_type']}"),
        (config.attention_bias or getattr(config, "mlp_bias", False), "biases"),
        ((getattr(config, "head_dim", None) or head_dim) != head_dim, "head_dim"),
        (granite and not is_unscaled(config), "scales, or shared experts of another size"),
    ):
        if other:
            raise UsageError(f"{only_these(config)}, with its {what}")
    trained = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    trained = trained or min(2048, config.max_position_embeddings)  # nobody said: MiniMind's usual
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields |= {"rope_theta": theta, "original_max_position_embeddings": trained}
    if yarn:
        fields |= {"inference_rope_scaling": True, "rope_scaling": rope}
    if granite:
        fields |= {
            "use_moe": True, "n_routed_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "n_shared_experts": config.shared_intermediate_size // config.intermediate_size,
        }  # fmt: skip
    return MiniMindConfig(**fields)


def only_these(config: PretrainedConfig) -> str:
    """The beginning of a sentence that refuses a model."""
    known = "MiniMind's own class, plain Llamas and GraniteMoeShareds"
    return f"MiniMind runs {known}, not this {config.model_type} model"


def is_unscaled(config: GraniteMoeSharedConfig) -> bool:
    """Whether the numbers that Granite multiplies by leave all as it is, and its shared network is whole experts."""
    scales = [config.attention_multiplier * math.sqrt(config.hidden_size // config.num_attention_heads)]
    scales += [config.embedding_multiplier, config.residual_multiplier, config.logits_scaling]
    whole = config.shared_intermediate_size % config.intermediate_size == 0
    return whole and all(math.isclose(scale, 1) for scale in scales)


def as_minimind(model: PreTrainedModel, **changes: Any) -> MiniMindForCausalLM:
    """The same model as MiniMindForCausalLM, its tensors shared, not copied; UsageError where own_config says so.

    changes: config fields in place of the model's, among those that weights do not depend on.
    """
    if isinstance(model, MiniMindForCausalLM):
        return model
    config = own_config(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    state = model.state_dict()
    with torch.device("meta"):  # no memory, no random numbers: the model brings every value
        own = MiniMindForCausalLM(config)
    own.load_state_dict(separate_experts(state, config) if config.use_moe else state, assign=True)
    own.tie_weights()
    own.generation_config = model.generation_config
    return own.train(model.training)


def separate_experts(state: dict[str, Tensor], config: MiniMindConfig) -> dict[str, Tensor]:
    """The weights of a Granite by MiniMind's names: each expert gets its part of the tensors that hold all of them."""
    own = {name: x for name, x in state.items() if ".block_sparse_moe." not in name and ".shared_mlp." not in name}
    for layer in (f"model.layers.{number}." for number in range(config.num_hidden_layers)):
        routed, shared = layer + "block_sparse_moe.", layer + "shared_mlp."
        own[layer + "mlp.gate.weight"] = state[routed + "router.weight"]
        gate, up = state[routed + "experts.gate_up_proj"].chunk(2, dim=1)  # (E, I, D)
        own |= expert_weights(layer + "mlp.experts", gate, up, state[routed + "experts.down_proj"])
        if config.n_shared_experts:
            sizes = (config.n_shared_experts, config.intermediate_size)
            gate, up = (x.unflatten(0, sizes) for x in state[shared + "input_linear.weight"].chunk(2))  # (S, I, D)
            down = state[shared + "output_linear.weight"].unflatten(1, sizes).transpose(0, 1)  # (S, D, I)
            own |= expert_weights(layer + "mlp.shared_experts", gate, up, down)
    return own


def expert_weights(prefix: str, gates: Tensor, ups: Tensor, downs: Tensor) -> dict[str, Tensor]:
    """The weights of n networks by name: gates and ups (n, I, D), downs (n, D, I)."""
    kinds = {"gate_proj": gates, "up_proj": ups, "down_proj": downs}
    return {f"{prefix}.{i}.{kind}.weight": x.contiguous() for kind, stack in kinds.items() for i, x in enumerate(stack)}


# ----------------------------------------------------------------------------------------------------------------------
# And back


def fields_of(config: MiniMindConfig) -> dict:
    """A config in the words of Llama and Granite, with the length that the model was trained at."""
    rope = config.yarn_parameters() or {"rope_type": "default"}
    trained = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
    return {
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        "rope_parameters": {**rope, "rope_theta": config.rope_theta}, "original_max_position_embeddings": trained,
    }  # fmt: skip


def to_llama(model: MiniMindForCausalLM) -> LlamaForCausalLM:
    """A dense model."""
    llama = LlamaForCausalLM(LlamaConfig(**fields_of(model.config), attention_bias=False, mlp_bias=False))
    llama.load_state_dict(model.state_dict())
    return llama


def to_granite(model: MiniMindForCausalLM) -> GraniteMoeSharedForCausalLM:
    """A mixture. The router's softmax over the chosen experts equals ours over all, renormalised."""
    config = model.config
    if not config.norm_topk_prob:
        raise UsageError("a mixture with norm_topk_prob false has no equal in transformers: it cannot be exported")
    granite = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            **fields_of(config), attention_multiplier=1 / math.sqrt(config.head_dim),
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


def gate_up(expert: nn.Module) -> Tensor:
    return torch.cat((expert.gate_proj.weight, expert.up_proj.weight))
