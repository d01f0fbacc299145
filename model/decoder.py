"""The model once more, arranged for decoding: packed weights, preallocated keys and values, a ragged batch.

It computes what MiniMindForCausalLM computes, in fewer and larger products. On a CPU all sums are float32, whatever the
dtype of the model. Weights that float16 holds exactly (those of a .pth file) are kept in float16 where torch has the
product for it, which halves what a step has to read. quantize="int8" rounds weights to 8 bits per row and activations
to 8 bits per token (in a trained minimind2-small the likeliest token stays so at 99 of 100 places). On CUDA, steps
without a prompt are CUDA graphs.

Shapes:  B running sequences   T tokens of one prompt   N tokens of this step, all sequences   S cached tokens
         D hidden   V vocabulary   H query heads   K key/value heads   d head width   C capacity   L layers   E experts
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import causal_keys
from .foreign import as_minimind, own_config
from .model_minimind import MoEFeedForward, rotary_frequencies

Linear = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)


def pack(weight: Tensor, quantize: str | None, dtype: torch.dtype = torch.float32) -> Linear:
    """The product with a weight (out, in), in the fastest form that this machine has for it."""
    if quantize == "int8":
        return Int8Linear(weight.float())
    if weight.device.type != "cpu":  # in its own place, which recorded steps know
        return partial(F.linear, weight=weight.detach().to(dtype, copy=True))
    weight = weight.float()
    halves = all((part.half().float() - part).abs().max() <= 2**-25 for part in (weight[:1], weight))  # a row tells
    if halves and "fbgemm" in torch.backends.quantized.supported_engines:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)  # sums in float32
    return partial(F.linear, weight=weight)


class Int8Linear:
    """A product of whole numbers: weights are rounded to -127..127 per row of theirs, activations per token."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8).t()  # (in, out)

    def __call__(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(127)  # (N, 1)
        return torch._int_mm((x / scale).round_().to(torch.int8), self.weight).mul(scale).mul_(self.scale)


class SwiGLU:
    """down(silu(gate(x)) * up(x)) with gate and up as one product: (N, D) -> (N, D)."""

    def __init__(self, mlp: nn.Module, quantize: str | None, dtype: torch.dtype) -> None:
        self.gate_up = pack(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), quantize, dtype)
        self.down = pack(mlp.down_proj.weight, quantize, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class Experts:
    """MoEFeedForward without its balance loss: (N, D) -> (N, D)."""

    def __init__(self, mlp: MoEFeedForward, quantize: str | None, dtype: torch.dtype) -> None:
        self.config = mlp.config
        self.gate = mlp.gate.weight.detach().to(torch.float32, copy=True)  # (E, D)
        self.experts = [SwiGLU(expert, quantize, dtype) for expert in mlp.experts]
        self.shared = [SwiGLU(expert, quantize, dtype) for expert in mlp.shared_experts]

    def __call__(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.gate).softmax(dim=-1)  # (N, E)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        shares = torch.zeros_like(scores).scatter_(1, chosen, weights).to(x.dtype)
        y = sum(expert(x) for expert in self.shared) if self.shared else torch.zeros_like(x)
        for share, expert in zip(shares.unsqueeze(-1).unbind(dim=1), self.experts, strict=True):  # share (N, 1)
            if x.device.type == "cpu":
                rows = share[:, 0].nonzero()[:, 0]
                if len(rows):
                    y.index_add_(0, rows, expert(x[rows]).mul_(share[rows]))
            else:  # all tokens through all experts: nothing has to be fetched from the device
                y = y + expert(x) * share
        return y


class Layer:
    """The packed weights of one block."""

    def __init__(self, block: nn.Module, quantize: str | None, dtype: torch.dtype) -> None:
        attention = block.self_attn
        self.attention_norm = block.input_layernorm.weight.detach().to(dtype, copy=True)
        self.mlp_norm = block.post_attention_layernorm.weight.detach().to(dtype, copy=True)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = pack(torch.cat([projection.weight for projection in projections]), quantize, dtype)
        self.out = pack(attention.o_proj.weight, quantize, dtype)
        self.mlp = (Experts if isinstance(block.mlp, MoEFeedForward) else SwiGLU)(block.mlp, quantize, dtype)


def tensors_of(part) -> Iterator[Tensor]:
    """The numbers that packed weights consist of, always in the same order."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list):
        for each in part:
            yield from tensors_of(each)
    elif isinstance(part, partial):
        yield part.keywords["weight"]
    elif isinstance(part, Layer | SwiGLU | Experts):
        yield from tensors_of(list(vars(part).values()))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


class Segment(NamedTuple):
    """Tokens start..stop of the prompt in a slot."""

    slot: int
    start: int
    stop: int


class Shared(NamedTuple):
    """What the layers of one forward pass have in common; causal masks (T, S), None where a segment begins a prompt."""

    slots: Tensor  # (N,)
    positions: Tensor  # (N,)
    cos: Tensor  # (N, 1, d)
    sin: Tensor  # (N, 1, d), the first half negative
    mask: Tensor | None  # (B, 1, 1, S)
    segments: list[Segment]
    causal: list[Tensor | None]


class Decoder:
    """Packed weights, and the keys and values of every slot: (L, slots, C + 1, 2K, d).

    Slots and C double when they are needed. The last column is scratch: rows that belong to nobody write there.
    """

    def __init__(self, model: PreTrainedModel, quantize: str | None, dtype: torch.dtype | None = None) -> None:
        """dtype: of weights and cache, by default the model's; on a CPU it is float32."""
        self.config, self.device = own_config(model.config), model.lm_head.weight.device
        self.dtype = torch.float32 if self.device.type == "cpu" else dtype or model.lm_head.weight.dtype
        self.eps = torch.tensor(self.config.rms_norm_eps, device=self.device)
        self.graphed = self.device.type == "cuda"
        self.slots = self.capacity = 0
        self.graphs: dict[tuple[int, int], tuple] = {}
        self.load(model, quantize)

    @torch.inference_mode()
    def load(self, model: PreTrainedModel, quantize: str | None) -> None:
        """Take the weights of the model as they are now, those of a Llama or a Granite too."""
        model = as_minimind(model)
        embedding = model.model.embed_tokens.weight.detach().to(self.dtype, copy=self.graphed)
        layers = [Layer(block, quantize, self.dtype) for block in model.model.layers]
        norm = model.model.norm.weight.detach().to(self.dtype, copy=True)
        weights = [embedding, layers, norm, pack(model.lm_head.weight, quantize, self.dtype)]
        if self.graphs:  # recorded steps read the weights where they were
            for old, new in zip(tensors_of(self.weights), tensors_of(weights), strict=True):
                old.copy_(new)
            return
        self.weights = weights
        self.embedding, self.layers, self.norm, self.head = weights

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for so many tokens in so many slots."""
        if slots <= self.slots and tokens <= self.capacity:
            return
        config, old_slots, old = self.config, self.slots, self.capacity
        self.slots = max(old_slots, power_of_two(slots))
        self.capacity = max(old, power_of_two(tokens), 128)
        shape = (
            config.num_hidden_layers,
            self.slots,
            self.capacity + 1,
            2 * config.num_key_value_heads,
            config.head_dim,
        )
        cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if old:
            cache[:, :old_slots, :old] = self.cache[:, :, :old]
        self.cache = cache
        frequencies, scale = rotary_frequencies(config, self.device)
        angles = torch.arange(self.capacity + 1, device=self.device)[:, None, None] * frequencies  # (C + 1, 1, d/2)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos, self.sin = (torch.cat(pair, dim=-1).to(self.dtype) for pair in ((cos, cos), (-sin, sin)))
        self.graphs = {}  # they read and write the former cache
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of one slot to another."""
        self.cache[:, target, :tokens] = self.cache[:, source, :tokens]

    def __call__(
        self, ids: list[int], slots: list[int], positions: list[int], decoding: int, segments: list[Segment]
    ) -> Tensor:
        """Logits behind each of the `decoding` first tokens and behind each segment: (decoding + segments, V).

        The decoding tokens are those of the slots 0, 1, ...; then come the tokens of the segments.
        """
        if self.graphed and not segments:
            return self.replay(ids, positions)
        lengths = {position + 1 for position in positions[:decoding] if position < self.capacity}
        span = max(lengths, default=1)
        tensors = torch.tensor([ids, slots, positions], device=self.device)
        return self.forward(*tensors, decoding, span, len(lengths) > 1, segments)

    def forward(self, ids, slots, positions, decoding: int, span: int, ragged: bool, segments: list[Segment]) -> Tensor:
        """ids, slots, positions (N,); span: the longest decoding sequence; ragged: whether others are shorter."""
        mask = None
        if ragged:
            unseen = torch.arange(span, device=self.device) > positions[:decoding, None]  # (B, S)
            mask = torch.zeros_like(unseen, dtype=self.dtype).masked_fill_(unseen, -math.inf)[:, None, None]
        causal = [causal_keys(stop - start, stop, self.device) if start else None for _, start, stop in segments]
        shared = Shared(slots, positions, self.cos[positions], self.sin[positions], mask, segments, causal)
        pasts = self.cache[:, :decoding, :span].transpose(2, 3).unbind(0)  # L of (B, 2K, S, d)
        x = self.embedding[ids]  # (N, D)
        for layer, cache, past in zip(self.layers, self.cache.unbind(0), pasts, strict=True):
            x += layer.out(self.attend(layer.qkv(self.normalise(x, layer.attention_norm)), cache, past, shared))
            x += layer.mlp(self.normalise(x, layer.mlp_norm))
        if segments:  # only the last token of a segment is followed by anything
            ends = torch.tensor([segment.stop - segment.start for segment in segments]).cumsum(0) + decoding - 1
            x = x[[*range(decoding), *ends.tolist()]]
        return self.head(self.normalise(x, self.norm))

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / rms(x) * weight, rms in float32: (N, D) -> (N, D). (F.rms_norm takes twice the time on a CPU.)"""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()  # (N, 1)
        return (x * scale).to(self.dtype).mul_(weight)

    def attend(self, qkv: Tensor, cache: Tensor, past: Tensor, shared: Shared) -> Tensor:
        """Store keys and values of the N tokens and let each look back: (N, (H + 2K) d) -> (N, D).

        cache (slots, C + 1, 2K, d): keys, then values; past (B, 2K, S, d): the part of it that decoding tokens see.
        """
        H, K, d = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        qkv = qkv.view(len(qkv), H + 2 * K, d)
        qk = qkv[:, : H + K]
        torch.addcmul(qk * shared.cos, qk.roll(d // 2, dims=-1), shared.sin, out=qk)
        cache[shared.slots, shared.positions] = qkv[:, H:]
        q, B, parts = qkv[:, :H], len(past), []
        if B:  # the H / K query heads that share a key head stand as if they were so many tokens
            grouped = q[:B].view(B, K, H // K, d)
            out = F.scaled_dot_product_attention(grouped, past[:, :K], past[:, K:], attn_mask=shared.mask)
            parts.append(out.reshape(B, H * d))
        first = B
        for (slot, start, stop), causal in zip(shared.segments, shared.causal, strict=True):
            last, seen = first + stop - start, cache[slot, :stop].transpose(0, 1)[None]  # (1, 2K, S, d)
            query = q[first:last].transpose(0, 1)[None]  # (1, H, T, d)
            out = F.scaled_dot_product_attention(
                query, seen[:, :K], seen[:, K:], attn_mask=causal, is_causal=causal is None, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1).reshape(last - first, H * d))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def replay(self, ids: list[int], positions: list[int]) -> Tensor:
        """A decoding step as a CUDA graph; one is recorded for each number of rows and span, both powers of two."""
        rows = min(power_of_two(len(ids)), self.slots)
        span = min(max(64, power_of_two(max(positions) + 1)), self.capacity)
        filler = rows - len(ids)
        inputs = [[*ids, *[0] * filler], list(range(rows)), [*positions, *[self.capacity] * filler]]
        inputs = torch.tensor(inputs, device=self.device)
        if (rows, span) not in self.graphs:
            buffer = inputs.clone()  # all that a recorded step reads has to stay where it is
            run = partial(self.forward, *buffer, rows, span, True, [])
            self.graphs[rows, span] = buffer, *record(run, self.device, self.pool)
        buffer, again, logits = self.graphs[rows, span]
        buffer.copy_(inputs)
        again()
        return logits[: len(ids)]


def record(run: Callable[[], Tensor], device: torch.device, pool) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of run(): what runs it again, and the tensor that its result is in.

    Graphs of one pool share their memory, so a result has to be read before another graph runs. What other threads ask
    of CUDA meanwhile (a loader's pins memory, NCCL's watches) does not end the recording.
    """
    with torch.cuda.device(device):  # a thread begins on the first one
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up before the recording
            run(), run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result
