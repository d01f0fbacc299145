"""`scripts/benchmark.py generate`: tokens/s of the engine, beside transformers' generate and llama.cpp.

    python scripts/benchmark.py generate
    python scripts/benchmark.py generate --weight out/full_sft_512.pth --natural
    python scripts/benchmark.py generate --batch 1 --gguf minimind-f16.gguf minimind-q8_0.gguf

All of them continue the same prompts, of unequal length, greedily, in turn in one process: what else the machine does
meets all. generate runs in each precision that the device has; the ratio is to the fastest of them.

prefill    tokens of the prompts / time until every reply has its first token
decode     tokens of the replies behind their first one / time from there to the end. Without --natural no reply may
           end early. With it replies end where the model ends them: generate carries the ended ones along until the
           last has ended, the engine does not.
same       share of the replies' tokens that equal those of generate in float32
limit      share of what the machine could do: time to read the weights and the keys and values of a step once from
           memory, or to multiply (whichever is longer, each alone as fast as this machine was seen to do it) / time
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria

from dataset.chat import encode_prompt
from dataset.demo_data import ensure_demo_data
from dataset.rows import read_jsonl
from model.errors import InputError, UsageError
from model.generation import Engine, Request
from model.LMConfig import PRESETS, MiniMindConfig
from model.loading import load_model, load_tokenizer, open_tokenizer
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.devices import pick_device, synchronize
from trainer.runtime.flags import COUNT, SWITCH, number

REFERENCE = "generate float32"


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--weight", type=Path, help="a .pth file or a transformers folder (default: new weights)")
    group.add_argument("--preset", choices=PRESETS, default="minimind2-small", help="of new weights (minimind2-small)")
    group.add_argument("--gguf", type=Path, nargs="+", default=[], help="files for llama.cpp, at batch 1")
    group = parser.add_argument_group("work")
    group.add_argument("--batch", type=COUNT, nargs="+", default=[1, 8, 64], help="replies at a time (default: 1 8 64)")
    group.add_argument("--prompts", type=Path, help="chat rows whose last question is asked (default: the demo data's)")
    group.add_argument(
        "--prompt_tokens", type=number(int, 2), default=64,
        help="mean length of prompts, which go from 2 to twice that (default: 64); with --natural they stay whole",
    )  # fmt: skip
    group.add_argument("--new_tokens", type=number(int, 2), default=64, help="of a reply, at most (default: 64)")
    group.add_argument("--natural", **SWITCH, default=False, help="let replies end where the model ends them")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--rounds", type=COUNT, default=5, help="times that each is timed (default: 5)")
    group.add_argument("--json", type=Path, help="write the figures to this file too")
    group.add_argument("--seed", type=number(int, 0), default=42, help="of new weights (default: 42)")
    group.add_argument("--debug", **SWITCH, default=False, help="show tracebacks of errors")


class Run(NamedTuple):
    """One pass over all prompts: seconds of both phases, and the replies."""

    prefill: float
    decode: float
    decoded: int  # tokens behind the first one of each reply
    replies: list[list[int]]


# ------------------------------------------------------------------------------------------------------ the contenders


def run_engine(engine: Engine, prompts: list[list[int]], new_tokens: int, natural: bool) -> Run:
    """The engine of this project."""
    ends = {} if natural else {"stop_ids": ()}
    began = time.perf_counter()
    handles = [engine.submit(Request(p, max_new_tokens=new_tokens, temperature=0, **ends)) for p in prompts]
    while not all(handle.results[0].ids for handle in handles):
        engine.step()
    read, first = time.perf_counter(), sum(len(handle.results[0].ids) for handle in handles)
    while engine.step():
        pass
    ended, replies = time.perf_counter(), [handle.results[0].ids for handle in handles]
    return Run(read - began, ended - read, sum(map(len, replies)) - first, replies)


class Clock(StoppingCriteria):
    """Notes when generate has its first token, and stops nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        if not self.first:
            synchronize(input_ids.device)
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def run_generate(model, prompts: list[list[int]], new_tokens: int, natural: bool) -> Run:
    """transformers' generate on a left-padded batch."""
    pad, end = 0, model.config.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.generation_config.eos_token_id = end if natural else None  # where the config below says None, this one counts
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=end if natural else None
    )
    clock = Clock()
    began = time.perf_counter()
    output = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[clock])
    synchronize(model.device)
    ended = time.perf_counter()
    replies = [row[: row.index(end) + 1] if natural and end in row else row for row in output[:, width:].tolist()]
    return Run(clock.first - began, ended - clock.first, sum(map(len, replies)) - len(replies), replies)


def run_llama_cpp(llama, prompts: list[list[int]], new_tokens: int, natural: bool) -> Run:
    """llama.cpp through llama-cpp-python, one prompt."""
    from llama_cpp import llama_get_logits_ith

    (prompt,) = prompts
    end, size, reply = llama.token_eos(), llama.n_vocab(), []
    llama.reset()
    began = time.perf_counter()
    llama.eval(prompt)
    while True:
        reply.append(int(np.ctypeslib.as_array(llama_get_logits_ith(llama.ctx, -1), (size,)).argmax()))
        if len(reply) == 1:
            read = time.perf_counter()
        if len(reply) == new_tokens or (natural and reply[-1] == end):
            return Run(read - began, time.perf_counter() - read, len(reply) - 1, [reply])
        llama.eval(reply[-1:])


def open_gguf(path: Path, context: int):
    """A GGUF file in llama.cpp, with as many threads as torch has."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError("--gguf needs llama.cpp: pip install llama-cpp-python")
    from llama_cpp import Llama

    if not path.is_file():
        raise InputError(f"{path} does not exist: give a GGUF file of the same weights")
    threads = torch.get_num_threads()
    return Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False)


def contenders(args, model, prompts: list[list[int]], batch: int) -> dict[str, Callable[[], Run]]:
    """Name -> what runs the prompts once."""
    work = (prompts, args.new_tokens, args.natural)
    quants = [None, "int8"] if model.device.type == "cpu" else [None]
    engines = {q: Engine(model, max_batch=batch, prefill_chunk=8192, quantize=q) for q in quants}
    runs = {f"engine{f' {q}' if q else ''}": partial(run_engine, engine, *work) for q, engine in engines.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        copy = model if dtype == torch.float32 else duplicate(model, dtype)
        runs[f"generate {str(dtype).removeprefix('torch.')}"] = partial(run_generate, copy, *work)
    if batch == 1:
        context = len(prompts[0]) + args.new_tokens
        for path in args.gguf:
            runs[f"llama.cpp {path.stem}"] = partial(run_llama_cpp, open_gguf(path, context), *work)
    return runs


def duplicate(model, dtype: torch.dtype):
    """The same model in another precision."""
    copy = type(model)(model.config).to(model.device)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


# ---------------------------------------------------------------------------------------------------------- the limits


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The least time of a piece of work."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def machine_limits(device: torch.device) -> tuple[float, float]:
    """Bytes per second that a sum reads, and flop/s of a large product in the faster of float32 and bfloat16."""
    numbers = torch.ones(128 * 2**20, dtype=torch.float32, device=device)  # 512 MB, more than any cache
    bandwidth = numbers.nbytes / best_seconds(numbers.sum, device)
    size = 8192 if device.type == "cuda" else 2048

    def rate(dtype: torch.dtype, size: int) -> float:
        a = torch.randn(size, size, device=device).to(dtype)
        return 2 * size**3 / best_seconds(lambda: a @ a, device, repeats=2)

    # A small product tells which: some CPUs take minutes for a large one in bfloat16.
    faster = max((torch.float32, torch.bfloat16), key=lambda dtype: rate(dtype, size // 4))
    return bandwidth, rate(faster, size)


def least_step_seconds(
    model, batch: int, length: float, weight_bytes: int, cache_bytes: int, limits: tuple[float, float]
) -> float:
    """What a decoding step of so many sequences, each with so many tokens, takes at the limits of the machine."""
    config, (bandwidth, peak) = model.config, limits
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    weights += config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    kv_size = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * kv_size * length * batch
    flops = batch * (2 * weights + 4 * config.num_hidden_layers * config.hidden_size * length)
    return max((weights * weight_bytes + cached * cache_bytes) / bandwidth, flops / peak)


WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def widths(name: str, device: torch.device) -> tuple[int, int]:
    """Bytes of a weight and of a cached number, for a contender: (4, 4) ... (1, 4)."""
    if name.startswith("engine"):
        return WIDTHS.get(name.split()[-1], 2), 4 if device.type == "cpu" else 2
    width = WIDTHS.get(name.split()[-1], 2)
    return width, width


# ------------------------------------------------------------------------------------------------------------- the run


def open_weights(args: argparse.Namespace):
    """The weights in float32, every one of them a number that float16 holds, as in a .pth file."""
    device = pick_device(args.device)
    if args.weight:
        return load_model(args.weight, device=device)[0]
    torch.manual_seed(args.seed)
    model = MiniMindForCausalLM(MiniMindConfig.from_preset(args.preset))
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model.to(device).eval()


def make_prompts(args: argparse.Namespace, tokenizer, count: int) -> list[list[int]]:
    """So many prompts; their lengths go evenly from little to twice the mean, unless they stay whole."""
    rows = [row for _, row in read_jsonl(args.prompts or ensure_demo_data() / "sft_val.jsonl")]
    every = max(len(rows) // count, 1)
    texts = [encode_prompt(tokenizer, rows[i * every % len(rows)]["conversations"][:-1]) for i in range(count)]
    if args.natural:
        return texts
    lengths = (
        [args.prompt_tokens] if count == 1 else torch.linspace(2, 2 * args.prompt_tokens - 2, count).int().tolist()
    )
    return [(ids * (length // len(ids) + 1))[-length:] for ids, length in zip(texts, lengths, strict=True)]


def measure(args: argparse.Namespace, model, prompts: list[list[int]], limits: tuple[float, float]) -> dict[str, dict]:
    """Figures of every contender at one batch size."""
    runs = contenders(args, model, prompts, len(prompts))
    times: dict[str, list[Run]] = defaultdict(list)
    for _ in range(args.rounds + 1):
        for name, once in runs.items():
            gc.collect()
            times[name].append(once())
    wanted = times[REFERENCE][0].replies
    tokens = sum(map(len, prompts))
    figures = {}
    for name, (_, *rounds) in times.items():  # the first was to warm up
        replies, decoded = rounds[0].replies, rounds[0].decoded
        decode = statistics.median(run.decode for run in rounds)
        equal = sum(a == b for x, y in zip(wanted, replies, strict=True) for a, b in zip(x, y, strict=False))
        length = (tokens + decoded / 2) / len(prompts)
        least = least_step_seconds(model, len(prompts), length, *widths(name, model.device), limits)
        figures[name] = {
            "prefill_tokens_per_s": tokens / statistics.median(run.prefill for run in rounds),
            "decode_tokens_per_s": decoded / decode,
            "same_tokens": equal / sum(map(len, wanted)),
            "share_of_limit": least * decoded / len(prompts) / decode,
            "decode_s": [run.decode for run in rounds],
        }
    fastest = [min(figures[name]["decode_s"][i] for name in figures if "generate" in name) for i in range(args.rounds)]
    for each in figures.values():
        ratios = sorted(theirs / own for theirs, own in zip(fastest, each["decode_s"], strict=True))
        each["over_generate"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return figures


def print_figures(batch: int, figures: dict[str, dict]) -> None:
    print(f"\n{f'batch {batch}':20s}{'prefill/s':>12s}{'decode/s':>12s}{'over generate':>24s}{'same':>8s}{'limit':>8s}")
    for name, each in figures.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*each["over_generate"])
        print(
            f"{name:20s}{each['prefill_tokens_per_s']:>12,.0f}{each['decode_tokens_per_s']:>12,.0f}{ratio:>24s}"
            f"{each['same_tokens']:>8.1%}{each['share_of_limit']:>8.0%}"
        )


def benchmark_generate(args: argparse.Namespace) -> None:
    if args.natural and not args.weight:
        raise UsageError("--natural needs a trained model, that ends its replies: give --weight")
    model = open_weights(args)
    tokenizer = open_tokenizer(None, args.weight, model) if args.weight else load_tokenizer()
    work = [make_prompts(args, tokenizer, batch) for batch in args.batch]
    longest, context = max(len(ids) for prompts in work for ids in prompts), model.config.max_position_embeddings
    if longest + args.new_tokens > context:  # the engine would end there, generate would not
        raise UsageError(
            f"prompts of up to {longest} tokens with --new_tokens {args.new_tokens} pass the context of {context}: "
            f"lower --new_tokens or {'take shorter --prompts' if args.natural else '--prompt_tokens'}"
        )
    limits = machine_limits(model.device)
    bandwidth, peak = limits
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {model.device}, "
        f"{torch.get_num_threads()} threads; memory {bandwidth / 1e9:.1f} GB/s, products {peak / 1e9:,.0f} GFLOP/s"
    )
    report = {"torch": torch.__version__, "device": str(model.device), "threads": torch.get_num_threads()}
    report |= {"bandwidth": bandwidth, "peak": peak, "figures": {}}
    for batch, prompts in zip(args.batch, work, strict=True):
        figures = measure(args, model, prompts, limits)
        print_figures(batch, figures)
        report["figures"][batch] = figures
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
