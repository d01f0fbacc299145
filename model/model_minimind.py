"""The MiniMind language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, experts, and their stack.

It computes what Llama computes (dense weights give the same logits) and is a transformers model: `generate`,
`save_pretrained`, `from_pretrained`, peft and trl work on it.

Here stands what is computed. How, in the form that machines are fast at, stands beside it: attention.py (who sees whom,
and the products of attention), functional.py (norm, rotation, experts), loss.py (without all logits at once).

Shapes:  B batch   T tokens of this call   S cached + current tokens   D hidden   I intermediate   V vocabulary
         H query heads   K key/value heads   d = D / H head width   E routed experts   N = B * T
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import (
    causal_keys,
    document_attention,
    document_bounds,
    flash_attention,
    plain_attention,
    positions_from_mask,
    takes_documents,
    visible_keys,
)
from .functional import Rotate, are_plain, can_group, compute_dtype, each_expert, grouped_experts, rms_norm
from .LMConfig import MiniMindConfig
from .loss import next_token_losses
from .outputs import MiniMindModelOutput, MiniMindOutput
from .sampling import Truncation

# ----------------------------------------------------------------------------------------------------------------------
# Norm and positions


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension: (..., D) -> (..., D), in the precision of the matrix products.

    The norm is taken in float32. Its result is cast here, once: left to autocast, each projection that reads it would
    cast it again.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: MiniMindConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair of a head, (d/2,), and the factor on cos and sin that YaRN asks for (else 1).

    YaRN ("NTK by parts"): a pair that turns more than beta_fast times within the trained length knows its positions and
    keeps its frequency; one that turns less than beta_slow times is slowed down by `factor`; a ramp lies between.
    """
    dim = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    yarn = config.yarn_parameters()
    if yarn is None:
        return frequencies, 1.0

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns so many times within the trained length."""
        trained = yarn["original_max_position_embeddings"]
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_with(yarn["beta_slow"])), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    slowed = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # share of the slowed frequency, per pair
    return frequencies * (1 - slowed) + frequencies / yarn["factor"] * slowed, yarn["attention_factor"]


def rotary_tables(config: MiniMindConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, alike for all heads: (B, T) -> (B, T, 1, d) and (B, T, 1, d/2).

    Computed in each forward: a table held as a non-persistent buffer would be garbage after `from_pretrained`.
    """
    frequencies, scale = rotary_frequencies(config, positions.device)
    angles = positions[:, :, None, None].float() * frequencies  # (B, T, 1, d/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1).to(dtype), sin.to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Attention and feed-forward


class Attention(nn.Module):
    """Grouped-query attention: each key/value head serves H / K query heads. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.flash = config.flash_attn
        self.dropout = config.dropout
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj.feeds_residual = True  # for _init_weights

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        bounds: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        B, T, D = x.shape
        q = Rotate.apply(self.q_proj(x).view(B, T, -1, self.head_dim), *rotary)  # (B, T, H, d)
        k = Rotate.apply(self.k_proj(x).view(B, T, -1, self.head_dim), *rotary)  # (B, T, K, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, d)
        dropout = self.dropout if self.training else 0.0
        if bounds is not None:
            out = document_attention(q, k, v, bounds, dropout, by_kernel=x.device.type == "cuda")
            return self.o_proj(out.reshape(B, T, D))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, d)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, K, S, d)
        # Without a mask: a whole sequence is causal, a single token sees all that came before it.
        causal = mask is None and T > 1
        attention = flash_attention if self.flash else plain_attention
        out = attention(q, k, v, mask, causal, dropout)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). (..., D) -> (..., D)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.feeds_residual = True  # for _init_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEFeedForward(nn.Module):
    """Experts: y = sum over the chosen k routed experts of w_k E_k(x) + all shared experts. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), real (B, T) bool, None if all are -> output (B, T, D), balance loss (scalar), load (E,)."""
        with torch.autocast(x.device.type, enabled=False):  # a router in half precision flips close decisions
            scores = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)  # (B, T, E)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)  # (B, T, k)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        tokens = x.flatten(0, 1)  # (N, D)
        y = self.route(tokens, weights.flatten(0, 1).to(x.dtype), chosen.flatten(0, 1))
        for expert in self.shared_experts:
            y = y + expert(tokens)
        aux_loss, load = balance_loss(scores, chosen, real, self.config)
        return y.view_as(x), aux_loss, load

    def route(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each token through its experts, tokens sorted by expert: x (N, D), weights and chosen (N, k) -> (N, D)."""
        on_cpu, on_cuda = x.device.type == "cpu", x.device.type == "cuda"
        grouped = not on_cpu and can_group(x, self.experts[0].gate_proj.weight) and are_plain(self.experts)
        # On older GPUs E / k times the work costs more than to fetch the counts, once a layer.
        if not (grouped or on_cpu or (on_cuda and not torch.compiler.is_compiling())):
            return self.route_all(x, weights, chosen)
        order = chosen.flatten().argsort(stable=True)  # (N k,)
        counts = (chosen.flatten() == torch.arange(len(self.experts), device=x.device)[:, None]).sum(dim=1)  # (E,)
        run = grouped_experts if grouped else each_expert
        y = run(self.experts, x.index_select(0, order // chosen.shape[1]), counts)  # (N k, D)
        y = y.index_select(0, order.argsort()).view(*chosen.shape, -1)  # back in the order of tokens: (N, k, D)
        return (y * weights[..., None]).sum(dim=1)

    def route_all(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same with every expert on every token: more work, but nothing has to be fetched from the device."""
        shares = [(weights * (chosen == e)).sum(dim=1, keepdim=True) for e in range(len(self.experts))]
        return sum(expert(x) * share for expert, share in zip(self.experts, shares, strict=True))


def balance_loss(scores: Tensor, chosen: Tensor, real: Tensor | None, config: MiniMindConfig) -> tuple[Tensor, Tensor]:
    """alpha * sum_i f_i P_i of one layer, scalar, and the number of real tokens that each expert got, (E,).

    scores (B, T, E), chosen (B, T, k), real (B, T). f_i = share of the choices that fell on expert i, times E: 1 each
    when balanced; P_i = mean score of expert i. Per row and averaged over the rows (seq_aux), or over all tokens at
    once. Padding counts nowhere.
    """
    weight = scores.new_ones(scores.shape[:2]) if real is None else real.to(scores.dtype)  # (B, T)
    hits = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * weight[..., None]  # (B, T, E)
    scores = scores * weight[..., None]
    load = hits.sum(dim=(0, 1))
    if config.seq_aux:
        hits, mass, tokens = hits.sum(1), scores.sum(1), weight.sum(1)[:, None]  # (B, E), (B, E), (B, 1)
    else:
        hits, mass, tokens = load[None], scores.sum(dim=(0, 1))[None], weight.sum()[None, None]
    share = hits * (config.n_routed_experts / config.num_experts_per_tok) / tokens.clamp(min=1)
    per_row = (share * mass / tokens.clamp(min=1)).sum(-1)  # 0 for a row of padding only
    rows = (tokens > 0).sum().clamp(min=1)
    return config.aux_loss_alpha * per_row.sum() / rows, load


# ----------------------------------------------------------------------------------------------------------------------
# The model


class MiniMindBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then + feed-forward(norm(x)). (B, T, D) -> (B, T, D), balance loss, expert load."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        bounds: Tensor | None = None,
        real: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, bounds, past_key_values))
        y = self.post_attention_layernorm(x)
        y, aux_loss, load = self.mlp(y, real) if isinstance(self.mlp, MoEFeedForward) else (self.mlp(y), None, None)
        return x + self.dropout(y), aux_loss, load


class MiniMindPreTrainedModel(PreTrainedModel):
    """What transformers needs to know, and how weights start."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MiniMindBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        every linear layer, embedding, router    normal, std 0.02
        o_proj, down_proj (add to the residual)  normal, std 0.02 / sqrt(2 * layers): the sum keeps its size
        norm weights                             1
        lm_head                                  is the embedding (tied)
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            shrink = math.sqrt(2 * self.config.num_hidden_layers) if getattr(module, "feeds_residual", False) else 1.0
            nn.init.normal_(module.weight, std=0.02 / shrink)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class MiniMindModel(MiniMindPreTrainedModel):
    """Token ids to final hidden states."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        bounds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> MiniMindModelOutput:
        """input_ids (B, T), attention_mask (B, S), position_ids (B, T) -> last_hidden_state (B, T, D).

        attention_mask: 0 for padding, k >= 1 for a token of the k-th document of the row; it covers the cached tokens
        too. Without position_ids, positions count the real tokens of each document. A boolean mask (B, 1, T, S) is used
        as it is. bounds: document_bounds() of the mask, if known: they need not be fetched from a GPU then.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        T = x.shape[1]

        mask = real = None
        known_bounds, bounds = bounds, None
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask
        elif attention_mask is not None:
            if attention_mask.shape[1] != past + T:
                raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, not {past} cached + {T}")
            attention_mask = attention_mask.long()
            real = attention_mask[:, -T:] > 0
            if past_key_values is None and takes_documents(x, self.config, self.training):
                bounds = document_bounds(attention_mask) if known_bounds is None else known_bounds
            if bounds is None:
                mask = visible_keys(attention_mask, T)
        elif past and T > 1:
            mask = causal_keys(T, past + T, x.device)[None, None]
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = positions_from_mask(attention_mask)[:, -T:]
            else:
                position_ids = torch.arange(past, past + T, device=x.device)[None]

        rotary = rotary_tables(self.config, position_ids, compute_dtype(x))
        x = self.dropout(x)
        aux_losses, loads, states = [], [], []
        for layer in self.layers:
            states += [x] if output_hidden_states else []
            x, aux_loss, load = layer(x, rotary, mask=mask, bounds=bounds, real=real, past_key_values=past_key_values)
            aux_losses.append(aux_loss)
            loads.append(load)
        x = self.norm(x)
        moe = self.config.use_moe
        return MiniMindModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
            aux_loss=torch.stack(aux_losses).sum() if moe else None,
            expert_load=torch.stack(loads) if moe else None,
        )


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: hidden states, logits, losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | tuple[Tensor, Tensor] = 0,
        return_logits: bool = True,
        equal_weights: bool = True,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        document_bounds: Tensor | None = None,
        target_places: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **transformers_keys,
    ) -> MiniMindOutput | tuple:
        """input_ids (B, T), labels (B, T) unshifted, -100 ignored -> logits (B, T, V), token_losses (B, T), loss.

        logits_to_keep: logits of the last so many tokens only (0: of all), or of N tokens by row and column, two of
        (N,) -> (N, V). return_logits=False: none, and the losses are computed without ever holding (B, T, V) float32
        numbers. equal_weights: the caller will give all token_losses the same weight, as in a mean (no more than a
        hint: it saves work on a CPU). num_items_in_batch replaces the number of targets that `loss` is divided by.
        temperature, truncation: the losses are those of softmax(logits / temperature) over the tokens that the
        truncation leaves, from which tokens were sampled; the logits returned are the model's own. document_bounds and
        target_places: what the functions of these names give, from before the batch was on a GPU. output_hidden_states:
        what each layer was given and what the head is given, layers + 1 of (B, T, D). The other arguments are those of
        MiniMindModel.
        """
        refuse_unknown(transformers_keys)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            document_bounds,
            output_hidden_states,
        )
        hidden = out.last_hidden_state
        loss = token_losses = logits = None
        if labels is not None:
            scaled = hidden if temperature == 1 else hidden / temperature
            token_losses, targets = next_token_losses(
                scaled,
                self.lm_head.weight,
                labels,
                attention_mask,
                equal_weights,
                target_places,
                truncation,
            )
            loss = token_losses.sum() / (targets.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[keep] if isinstance(keep, tuple) else hidden[:, keep])
        result = MiniMindOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            token_losses=token_losses,
            aux_loss=out.aux_loss,
            expert_load=out.expert_load,
        )
        return result.to_tuple() if return_dict is False else result


def refuse_unknown(keys: dict) -> None:
    """Accept what transformers passes along without meaning, raise TypeError for all else."""
    # The first says what attention_mask and the cache say already; generate() passes the others, which are for itself.
    harmless = {"cache_position", "tokenizer", "assistant_tokenizer"}
    for name, value in keys.items():
        if name in harmless or (name == "output_attentions" and not value):
            continue
        raise TypeError(f"MiniMindForCausalLM.forward() does not take {name}={value!r}")
