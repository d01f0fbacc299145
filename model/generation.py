"""The inference engine: many requests of unequal length through one model, one token of each at every step.

    engine = Engine(model, tokenizer)
    results = engine.generate([Request(encode_prompt(tokenizer, turns), temperature=0.7, seed=1)])
    for chunk in engine.stream(Request(prompt)):
        print(chunk.text, end="")
    handle = engine.submit(request)           # a server: submit, step, read handle.chunks, handle.cancel()
    while engine.step(): ...

Every step is one forward pass over a ragged batch: one token of each running sequence, and up to prefill_chunk tokens
of prompts that are joining, so a long prompt delays the running ones by one chunk at most. Sequences that end leave at
once. A sequence draws its random numbers from its own generator: the same seed gives the same text whatever shares the
batch and whenever it joins, up to ties within the rounding of a matrix product (float32 on a CPU: about 1e-6).

decoder.py holds the weights and the cache, sampling.py what a request is and how its tokens are drawn; there are no
threads inside.
"""

import codecs
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .decoder import Decoder, Segment
from .errors import InputError, UsageError
from .sampling import Request, Sampler, likeliest, penalise

# ----------------------------------------------------------------------------------------------------------------------
# What comes out, and what is refused


@dataclass
class Result:
    """One sample. ids holds the end token too; logprobs are those of the distribution that each token was drawn from.

    (Of a greedy reply, for which that would always be 0: of the distribution at temperature 1.)
    finish_reason: "stop" (end token or stop text), "length", "cancelled"; None while it runs.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None


class Chunk(NamedTuple):
    """What one step added to sample `index` of a request; text may lag behind, see TextStream."""

    index: int
    text: str
    id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]
    finish_reason: str | None


RANGES = {
    "max_new_tokens": (int, 1, math.inf),
    "temperature": (float, 0, 1e4),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, math.inf),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 1e3),
    "presence_penalty": (float, -100, 100),
    "frequency_penalty": (float, -100, 100),
    "seed": (int, -(2**63), 2**64 - 1),
    "n": (int, 1, 4096),
    "top_logprobs": (int, 0, 1000),
}


def check_request(request: Request, vocab_size: int, context: int) -> None:
    """Raise UsageError or InputError, in one sentence, for a request that cannot be served."""
    for name, (kind, low, high) in RANGES.items():
        value = getattr(request, name)
        if value is None and name in ("seed", "max_new_tokens"):
            continue
        right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UsageError(f"{name} must be {what} {span}, not {value!r}")
    if isinstance(request.stop, str) or not all(isinstance(text, str) and text for text in request.stop):
        raise UsageError(f"stop must be a list of texts that are not empty, not {request.stop!r}")
    if not request.prompt:
        raise InputError("the prompt is empty: give at least one token")
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
        raise InputError(f"the prompt holds token ids outside the vocabulary of {vocab_size}")
    if len(request.prompt) >= context:
        raise InputError(
            f"the prompt has {len(request.prompt)} tokens, which leaves no room for a reply in the context of "
            f"{context}: shorten it, or leave out its oldest messages"
        )


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**64


class Handle:
    """A submitted request: its results so far, and in `chunks` what each step added, for whoever wants to stream."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request = request
        self.limit = limit  # tokens of a reply at most
        self.seed = random.getrandbits(63) if request.seed is None else request.seed
        self.results = [Result() for _ in range(request.n)]
        self.pending = deque(range(request.n))  # samples not started
        self.prompt_logits: Tensor | None = None  # (V,) behind the prompt, once it is read
        self.chunks: deque[Chunk] = deque()
        self.cancelled = False

    @property
    def done(self) -> bool:
        return all(result.finish_reason for result in self.results)

    def cancel(self) -> None:
        """End every sample that still runs or waits; its slot is free from the next step on."""
        self.cancelled = True
        self.pending.clear()
        for result in self.results:
            result.finish_reason = result.finish_reason or "cancelled"


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to text


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token stands for, b"" for special ones. Tags such as <think> are not special: they show."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    table = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in special:
            table.append(b"")
        elif i in added or any(char not in byte_of for char in token):
            table.append(tokenizer.decode([i]).encode())
        else:
            table.append(bytes(byte_of[char] for char in token))
    return table


class TextStream:
    """Text of a growing reply; holds back the bytes of half a character and what may be the start of a stop text."""

    def __init__(self, stops: tuple[str, ...] | list[str]) -> None:
        self.stops = stops
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.text = ""
        self.released = 0  # characters handed out
        self.stopped = False

    def feed(self, data: bytes, final: bool = False) -> bool:
        """Add the bytes of a token. Whether a stop text is complete: the reply then ends before it."""
        self.text += self.decode(data, final)
        found = [place for stop in self.stops if (place := self.text.find(stop, self.released)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def release(self, final: bool) -> str:
        """The text not handed out yet, as far as it is certain. Incomplete bytes become U+FFFD at the end."""
        held = 0
        if not final:
            starts = (k for stop in self.stops for k in range(1, len(stop)) if self.text.endswith(stop[:k]))
            held = max(starts, default=0)
        elif not self.stopped:
            self.feed(b"", final=True)
        fresh = self.text[self.released : len(self.text) - held]
        self.released += len(fresh)
        return fresh


# ----------------------------------------------------------------------------------------------------------------------
# The engine


class Sequence:
    """The next sample of a request, in a slot; `length` of its tokens are in the cache."""

    def __init__(self, handle: Handle, slot: int, length: int = 0) -> None:
        self.handle, self.slot, self.length = handle, slot, length
        self.index = handle.pending.popleft()
        self.result = handle.results[self.index]
        self.random = random.Random(sample_seed(handle.seed, self.index))
        self.stream = TextStream(handle.request.stop)

    @property
    def running(self) -> bool:
        """Whether it has a token to go on from; otherwise its prompt is still being read."""
        return bool(self.result.ids)


class Engine:
    """Requests wait, join, run and leave. The sequence active[i] owns slot i; at most one has half a prompt there."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch: int = 32,
        context: int | None = None,
        prefill_chunk: int = 512,
        quantize: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """context: tokens of prompt and reply, by default the model's. tokenizer None: results without text.

        dtype: of the weights while they decode, by default the model's (a trained model's are float32); on a CPU all
        sums are float32.
        """
        if quantize not in (None, "int8"):
            raise UsageError(f"quantize must be 'int8' or None, not {quantize!r}")
        if quantize and model.device.type != "cpu":
            raise UsageError(f"int8 runs on the CPU, not on {model.device.type}: leave it out or choose the CPU")
        self.model, self.quantize = model, quantize
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.decoder = Decoder(model, quantize, dtype)
        config = self.decoder.config
        self.context = min(context or math.inf, config.max_position_embeddings)
        end = config.eos_token_id
        self.stop_ids = end if isinstance(end, list) else [] if end is None else [end]
        self.table = token_bytes(tokenizer) if tokenizer else []
        self.waiting: deque[Handle] = deque()
        self.active: list[Sequence] = []
        self.sampler: tuple[list[Request], Sampler | None] = ([], None)

    def refresh(self) -> None:
        """Take over the weights of the model as they are now (after an optimizer step)."""
        self.decoder.load(self.model, self.quantize)

    def check(self, request: Request) -> None:
        """Raise UsageError or InputError for a request that cannot be served."""
        check_request(request, self.decoder.config.vocab_size, self.context)
        if request.stop and not self.table:
            raise UsageError("stop texts need an engine with a tokenizer")

    def submit(self, request: Request) -> Handle:
        """Put a request in the queue."""
        self.check(request)
        room = self.context - len(request.prompt)
        handle = Handle(request, min(request.max_new_tokens or room, room))
        self.waiting.append(handle)
        return handle

    def generate(self, requests: list[Request]) -> list[Result]:
        """All samples of all requests, in order."""
        for request in requests:
            self.check(request)
        handles = [self.submit(request) for request in requests]
        try:
            while not all(handle.done for handle in handles):
                self.step()
        finally:  # Ctrl-C leaves nobody behind
            for handle in handles:
                handle.cancel()
        return [result for handle in handles for result in handle.results]

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The chunks of one request as they come; closing the iterator cancels it."""
        handle = self.submit(request)
        try:
            while handle.chunks or not handle.done:
                if not handle.chunks:
                    self.step()
                while handle.chunks:
                    yield handle.chunks.popleft()
        finally:
            handle.cancel()

    @torch.inference_mode()
    def step(self) -> bool:
        """Advance every running sequence by one token and read a piece of the joining prompts; whether work is left."""
        self.drop_cancelled()
        decoding = 1 + max((sequence.slot for sequence in self.active if sequence.running), default=-1)
        segments = self.plan_prefill()
        if self.active:
            logits = self.forward(decoding, segments)
            rows = [(row, sequence) for row, sequence in enumerate(self.active[:decoding]) if sequence.running]
            for row, segment in enumerate(segments, start=decoding):
                sequence = self.active[segment.slot]
                if segment.stop == len(sequence.handle.request.prompt):
                    sequence.handle.prompt_logits = logits[row].clone()
                    rows.append((row, sequence))
            if len(rows) < len(logits):  # without those of half-read prompts
                logits = logits[[row for row, _ in rows]]
            born = self.advance([sequence for _, sequence in rows], logits)
            while born := born + self.fork():  # siblings start from the logits behind their prompt
                born = self.advance(born, torch.stack([sequence.handle.prompt_logits for sequence in born]))
        return bool(self.active or self.waiting)

    def plan_prefill(self) -> list[Segment]:
        """The pieces of prompts to read in this step, first come, first served; the last may stay incomplete."""
        segments, budget = [], self.prefill_chunk
        slot = next((sequence.slot for sequence in self.active if not sequence.running), len(self.active))
        while budget:
            if slot == len(self.active):
                if not self.waiting or slot == self.max_batch:
                    break
                self.active.append(Sequence(self.waiting.popleft(), slot))
            sequence = self.active[slot]
            start = sequence.length
            sequence.length = min(len(sequence.handle.request.prompt), start + budget)
            budget -= sequence.length - start
            segments.append(Segment(slot, start, sequence.length))
            slot = len(self.active)
        return segments

    def forward(self, decoding: int, segments: list[Segment]) -> Tensor:
        """Logits behind the last tokens of the first slots and behind each piece: (decoding + segments, V).

        A half-read prompt may stand among the first slots: its row computes nonsense in the scratch column.
        """
        running = [sequence if sequence.running else None for sequence in self.active[:decoding]]
        self.decoder.reserve(len(self.active), 1 + max(sequence.length for sequence in self.active))
        ids = [sequence.result.ids[-1] if sequence else 0 for sequence in running]
        positions = [sequence.length if sequence else self.decoder.capacity for sequence in running]
        slots = list(range(decoding))
        for slot, start, stop in segments:
            ids += self.active[slot].handle.request.prompt[start:stop]
            positions += range(start, stop)
            slots += [slot] * (stop - start)
        for sequence in filter(None, running):
            sequence.length += 1
        return self.decoder(ids, slots, positions, decoding, segments)

    def fork(self) -> list[Sequence]:
        """Fill free slots with samples of requests whose prompt a sibling has in its slot."""
        born = []
        for source in list(self.active):
            while source.running and source.handle.pending and len(self.active) < self.max_batch:
                sequence = Sequence(source.handle, len(self.active), length=len(source.handle.request.prompt))
                self.active.append(sequence)
                self.decoder.reserve(len(self.active), sequence.length)
                self.decoder.copy(source.slot, sequence.slot, sequence.length)
                born.append(sequence)
        return born

    def advance(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        """Draw a token for each, logits (rows, V); samples that end free their slot or pass it to a sibling.

        Returns those siblings: the prompt is in their slot, and they have no token yet.
        """
        if not sequences:
            return []
        requests = [sequence.handle.request for sequence in sequences]
        logits = logits.float() if logits.device.type == "cuda" else logits.float().cpu()  # MPS knows no float64
        if any(r.repetition_penalty != 1 or r.presence_penalty or r.frequency_penalty for r in requests):
            pairs = zip(logits, sequences, strict=True)
            logits = torch.stack([penalise(row, s.handle.request, s.result.ids) for row, s in pairs])
        known, sampler = self.sampler
        if len(known) != len(requests) or any(a is not b for a, b in zip(known, requests, strict=True)):
            sampler = Sampler(requests, logits.shape[-1], logits.device)
            self.sampler = requests, sampler
        logprobs = sampler.logprobs(logits)
        drawn = sampler.draw(logprobs, [sequence.random.getrandbits(52) / 2**52 for sequence in sequences])
        chosen = logprobs.gather(1, drawn[:, None])[:, 0].tolist()
        if any(map(math.isnan, chosen)):
            raise InputError("the model computes NaN: its weights are broken, load others or train it again")
        for sequence, token, logprob, row in zip(sequences, drawn.tolist(), chosen, logprobs, strict=True):
            self.accept(sequence, token, logprob, likeliest(row, sequence.handle.request.top_logprobs))
        return self.replace([sequence for sequence in sequences if sequence.result.finish_reason])

    def accept(self, sequence: Sequence, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Add a token to a sample and decide whether it ends there."""
        result, handle, stream = sequence.result, sequence.handle, sequence.stream
        result.ids.append(token)
        result.logprobs.append(logprob)
        if handle.request.top_logprobs:
            result.top_logprobs.append(top)
        stop_ids = self.stop_ids if handle.request.stop_ids is None else handle.request.stop_ids
        data = self.table[token] if token < len(self.table) else b""
        if token in stop_ids or stream.feed(data):
            result.finish_reason = "stop"
        elif len(result.ids) == handle.limit:
            result.finish_reason = "length"
        text = stream.release(final=result.finish_reason is not None)
        result.text += text
        handle.chunks.append(Chunk(sequence.index, text, token, logprob, top, result.finish_reason))

    def replace(self, ended: list[Sequence]) -> list[Sequence]:
        """Give each slot to the next sample of the same request, whose prompt is still there, or free it."""
        born = []
        for sequence in ended:
            handle, slot = sequence.handle, sequence.slot
            if handle.pending:
                self.active[slot] = Sequence(handle, slot, length=len(handle.request.prompt))
                born.append(self.active[slot])
            else:
                self.free(slot)
        return born

    def free(self, slot: int) -> None:
        """Let the last sequence take the slot."""
        last = self.active.pop()
        if last.slot != slot:
            self.decoder.copy(last.slot, slot, last.length)
            self.active[slot], last.slot = last, slot

    def drop_cancelled(self) -> None:
        """Forget cancelled requests that wait and free the slots of those that run."""
        self.waiting = deque(handle for handle in self.waiting if not handle.cancelled)
        for sequence in [sequence for sequence in self.active if sequence.handle.cancelled]:
            self.free(sequence.slot)
