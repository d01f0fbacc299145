"""Attention over rows of documents: who sees whom, and the products, each in the form that the machine has for it.

An attention mask (B, S) holds 0 for padding and k >= 1 for a token of the k-th document of the row.

Shapes:  B batch   T tokens of this call   S cached + current tokens   H query heads   K key/value heads   d head width
         N = B * T
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import compute_dtype
from .LMConfig import MiniMindConfig

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None
# What it takes differs: window_size since torch 2.11, enable_gqa (heads that share keys) since 2.12.
VARLEN_TAKES = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()

# ----------------------------------------------------------------------------------------------------------------------
# Who sees whom


def document_numbers(attention_mask: Tensor) -> Tensor:
    """The document each place belongs to, holes and padding behind it included: (B, S) -> (B, S)."""
    return attention_mask.cummax(dim=-1).values


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Running count of the real tokens within their own document, from 0: (B, S) -> (B, S)."""
    real = (attention_mask > 0).long()
    count = real.cumsum(dim=-1)  # real tokens of the row up to this place
    documents = document_numbers(attention_mask)
    opens = documents != F.pad(documents, (1, -1), value=0)
    before = ((count - real) * opens).cummax(dim=-1).values  # real tokens before the own document
    return (count - 1 - before).clamp(min=0)


def visible_keys(attention_mask: Tensor, queries: int) -> Tensor:
    """Boolean mask of the last `queries` places over all places: (B, S) -> (B, 1, T, S).

    A place sees the real tokens of its own document that stand left of it, and itself. Padding sees something too (the
    tokens or the padding before it), so that no row is empty; nobody reads what padding computes.
    """
    documents = document_numbers(attention_mask)
    same = documents[:, -queries:, None] == attention_mask[:, None, :]  # (B, T, S)
    return (same & causal_keys(queries, attention_mask.shape[-1], attention_mask.device)).unsqueeze(1)


@torch.compiler.disable
def document_bounds(attention_mask: Tensor) -> Tensor | None:
    """Where each document (or run of padding) begins in the B * T places, and their end: (B, T) -> (n + 1,) int32.

    None where padding stands inside a document, which is then no run of places. Reads values: once a forward, where a
    mask over T x T places would be built and read in every layer.
    """
    before = F.pad(attention_mask, (1, -1), value=-1)
    opens = attention_mask != before
    opens[:, 0] = True
    resumed = opens & (attention_mask > 0) & (before == 0) & (attention_mask == document_numbers(before))
    if resumed.any():
        return None
    starts = opens.flatten().nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=attention_mask.numel()).int()
    torch._dynamo.maybe_mark_dynamic(bounds, 0)  # else the layers would be compiled for this n, and then for any
    return bounds


def causal_keys(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean causal mask of the last `queries` of `keys` places: (T, S)."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


# ----------------------------------------------------------------------------------------------------------------------
# The products


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, dropout: float, by_kernel: bool = False
) -> Tensor:
    """Causal attention within each run: q (B, T, H, d), k, v (B, T, K, d), bounds (n + 1,) -> (B, T, H, d).

    by_kernel: in one kernel for all runs, which GPUs have; otherwise run by run.
    """
    shape = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (N, H or K, d)
    if by_kernel:
        longest, groups, more = shape[1], q.shape[1] // k.shape[1], {}
        if groups > 1 and "enable_gqa" in VARLEN_TAKES:
            more["enable_gqa"] = True
        elif groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (N, H, d)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **more).view(shape)
    lengths = bounds.diff().tolist()
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)  # (H or K, n, d)
    parts = [flash_attention(q[None], k[None], v[None], None, True, dropout)[0] for q, k, v in documents]
    return torch.cat([part.transpose(0, 1) for part in parts]).view(shape)


def takes_documents(x: Tensor, config: MiniMindConfig, training: bool) -> bool:
    """Whether attention over runs of places exists here: on CPUs in eager mode, on GPUs in half precision."""
    if not config.flash_attn or x.device.type not in ("cpu", "cuda"):
        return False
    if x.device.type == "cpu":
        return not torch.compiler.is_compiling()
    half = compute_dtype(x) in (torch.bfloat16, torch.float16)
    # Wider heads have no backward on sm_86. Builds without the kernel (Windows) have varlen_attn all the same.
    fits = config.head_dim % 8 == 0 and config.head_dim <= 192 and not (config.dropout and training)
    there = "window_size" in VARLEN_TAKES and torch.backends.cuda.is_flash_attention_available()
    return half and fits and there and torch.cuda.get_device_capability(x.device) >= (8, 0)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """The same as plain_attention in one kernel, which never holds all scores."""
    if mask is not None and q.device.type == "cuda":  # its fast kernels take a mask or shared heads, not both
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, d)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out: q (B, H, T, d), k, v (B, K, S, d), mask (B, 1, T, S) -> (B, H, T, d)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, d)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if causal:
        mask = causal_keys(q.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype)
    return weights @ v
