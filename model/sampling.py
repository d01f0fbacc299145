"""A request and its way from logits to tokens: penalties, temperature, top-k, top-p, min-p, and one draw per sequence.

Every row is computed apart from the others, so a sequence gets the same token whoever shares the batch.

Shapes:  B sequences   V vocabulary
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY = 1e-5  # a temperature below this one is 0; divided by it, logits could overflow
CANDIDATES = 256  # tokens that top-p looks at before it sorts the whole vocabulary


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    max_new_tokens None: up to the end of the context, where every reply ends. temperature 0: always the likeliest
    token. top_k 0, top_p 1, min_p 0: off; they act in the order top_k, top_p, min_p, behind penalties and temperature.
    repetition_penalty counts prompt and reply, presence_ and frequency_penalty the reply alone. seed None: a new one
    each time; sample i of n draws with sample_seed(seed, i). stop: texts that end the reply and are cut from it.
    stop_ids None: the model's end tokens. top_logprobs: how many alternatives to report per token.
    """

    prompt: list[int]
    max_new_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] | list[str] = ()
    stop_ids: tuple[int, ...] | list[int] | None = None
    top_logprobs: int = 0


class Truncation(NamedTuple):
    """What sampling takes away, where training scores what was sampled: as in Request."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def columns(self, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The settings as keep_likely takes them, (1, 1) each."""
        top_k = min(self.top_k, vocab_size) or vocab_size
        return (
            torch.tensor([[top_k]], device=device),
            torch.tensor([[float(self.top_p) if self.top_p < 1 else math.inf]], device=device),
            torch.tensor([[float(self.min_p)]], device=device),
        )


class Sampler:
    """The settings of B sequences as tensors (B, 1)."""

    def __init__(self, requests: list[Request], vocab_size: int, device: torch.device) -> None:
        def column(values: list) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        greedy = [request.temperature < GREEDY for request in requests]
        cut = [not g and (r.top_k > 0 or r.top_p < 1 or r.min_p > 0) for g, r in zip(greedy, requests, strict=True)]
        self.all_greedy, self.cuts = all(greedy), any(cut)
        temperatures = [1.0 if g else float(r.temperature) for g, r in zip(greedy, requests, strict=True)]
        self.plain = all(temperature == 1 for temperature in temperatures)
        self.greedy, self.temperature = column(greedy), column(temperatures)
        if self.cuts:
            pairs = list(zip(cut, requests, strict=True))
            self.top_k = column([min(r.top_k, vocab_size) if c and r.top_k else vocab_size for c, r in pairs])
            self.top_p = column([float(r.top_p) if c and r.top_p < 1 else math.inf for c, r in pairs])
            self.min_p = column([float(r.min_p) if c else 0.0 for c, r in pairs])

    def logprobs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the distribution to draw from: (B, V) -> (B, V), -inf for what cannot be drawn."""
        if not self.plain:
            logits = logits / self.temperature
        if self.cuts:
            logits = keep_likely(logits, self.top_k, self.top_p, self.min_p)
        return logits.log_softmax(dim=-1)

    def draw(self, logprobs: Tensor, uniforms: list[float]) -> Tensor:
        """One token per row, by inverting the cumulative distribution at uniforms in [0, 1): (B, V) -> (B,)."""
        likeliest = logprobs.argmax(dim=-1)
        if self.all_greedy:
            return likeliest
        cumulative = running_sums(logprobs.exp().double())
        places = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, places, right=True)[:, 0]  # the first whose sum is above: never p = 0
        return torch.where(self.greedy[:, 0], likeliest, drawn.clamp(max=logprobs.shape[-1] - 1))  # (NaN comes last)


def running_sums(values: Tensor) -> Tensor:
    """The cumulative sums of each row: on the host where CUDA has to be deterministic, which its own are not."""
    if values.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim=-1).to(values.device)
    return values.cumsum(dim=-1)


def keep_likely(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The top_k likeliest, of them the fewest that hold top_p, of them those above min_p times the best: (B, V) alike.

    All others become -inf. The settings are (B, 1); off: top_k V, top_p inf, min_p 0. Equal logits stay or go together.
    """
    V = logits.shape[-1]
    for width in (min(CANDIDATES, V), V):
        best = logits.topk(width, dim=-1).values  # (B, width), descending
        allowed = torch.arange(width, device=logits.device) < top_k
        best_k = best.masked_fill(~allowed, -math.inf)
        total = torch.where(top_k <= width, best_k.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
        probs = (best_k - total).exp()
        sums = running_sums(probs)
        enough = (top_k <= width) | (sums[:, -1:] >= top_p) | ((top_k == V) & top_p.isinf())
        if width == V or bool(enough.all()):
            break
    kept = allowed & (sums - probs < top_p)
    kept[:, 0] = True
    lowest = best.masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
    lowest = lowest.masked_fill((top_k == V) & top_p.isinf(), -math.inf)
    return logits.masked_fill(logits < torch.maximum(lowest, best[:, :1] + min_p.log()), -math.inf)


def penalise(logits: Tensor, request: Request, reply: list[int]) -> Tensor:
    """Lower the logits of tokens that were there already: (V,) -> (V,)."""
    if request.repetition_penalty != 1:
        seen = torch.tensor([*request.prompt, *reply], device=logits.device).unique()
        scores, penalty = logits[seen], request.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))
    if (request.presence_penalty or request.frequency_penalty) and reply:
        tokens, counts = torch.tensor(reply, device=logits.device).unique(return_counts=True)
        lower = request.presence_penalty + request.frequency_penalty * counts
        logits = logits.index_add(0, tokens, -lower.to(logits.dtype))
    return logits


def likeliest(logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens that can be drawn, with their log-probabilities: (V,) -> up to `count` pairs."""
    if not count:
        return []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return [(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -math.inf]
