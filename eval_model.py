"""Talk to a trained model: automatic test, typing, or one prompt.

python eval_model.py --model_mode 1                     asks which on a terminal, runs the automatic test elsewhere
python eval_model.py --model_mode 1 --prompt "..."      answers and exits
python eval_model.py --model_mode 0                     the pretrained model continues texts
python eval_model.py --load 1 --weight MiniMind2        a transformers folder (MiniMind's class, Llama, Granite)
python eval_model.py --lora_name lora_identity          with an adapter of trainer/train_lora.py, merged in

Modes: 0 pretrain, 1 full_sft, 2 rlhf, 3 reason, 4 ppo_actor, 5 grpo, 6 spo, 7 distill.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dataset.chat import encode_prompt
from model.errors import InputError, UsageError, check_given_text, run_script
from model.generation import Engine, Request, sample_seed
from model.LMConfig import PRESETS
from model.loading import check_vocab, find_weights, load_model, open_tokenizer
from model.model_lora import base_note, find_lora, merge_lora
from trainer.runtime.devices import DTYPES, pick_device, pick_dtype
from trainer.runtime.flags import COUNT, MAX_SEED, ROOT, SWITCH, number
from trainer.runtime.start import given_sizes, weights_file_hash

STAGES = dict(enumerate(("pretrain", "full_sft", "rlhf", "reason", "ppo_actor", "grpo", "spo", "distill")))
ANSWER = 256  # tokens of an answer at most, where nobody says
BEGINNINGS = ["法国的首都是", "The capital of Japan is", "水的化学", "春天来了，", "Once upon a time"]
QUESTIONS = [  # what the demo data teach, then what users of MiniMind have long compared their models by
    "你是谁？", "法国的首都是哪里？", "金的元素符号是什么？", "7 加 8 等于多少？", "手被烫伤了怎么办？",
    "《静夜思》是谁写的？",
    "Who are you?", "What is the capital of Japan?", "What is the past tense of go?", "Thank you for your help!",
    "请介绍一下自己。", "你更擅长哪一个学科？", "鲁迅的《狂人日记》是如何批判封建礼教的？",
    "我咳嗽已经持续了两周，需要去医院检查吗？", "详细的介绍光速的物理概念。", "推荐一些长沙的特色美食吧。",
    "请为我讲解“大语言模型”这个概念。", "如何理解ChatGPT？", "Introduce the history of the United States, please.",
    "你知道长江吗？", "第一颗人造卫星是哪个国家发射的？", "你知道泰山在哪里吗？", "世界上最高的山峰是什么？",
    "万有引力是谁提出的？", "你知道大熊猫的主要食物是什么吗？", "海水为什么是咸的？",
]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ", ".join(f"{mode} {stage}" for mode, stage in STAGES.items())
    share = number(float, 0, 1)
    add = parser.add_argument
    add("--model_mode", type=int, choices=STAGES, default=1, help=f"which stage's weights: {modes} (default: 1)")
    add("--load", type=int, choices=(0, 1), default=0, help="0: weights of out/, 1: a transformers folder (default: 0)")
    add("--out_dir", type=Path, default=ROOT / "out", help="where the weights are (default: out/)")
    add(
        "--weight",
        type=Path,
        help="a .pth file or a transformers folder (default: the stage's newest weights; with --load 1: MiniMind2)",
    )
    add(
        "--lora_name",
        help="adapter of out/lora/ to merge in, or a .pth file, or a folder of PEFT's; made for these very weights",
    )
    add("--tokenizer_path", type=Path, help="folder of a tokenizer (default: the one beside the weights, else model/)")
    add("--preset", choices=PRESETS, help="size of the weights to look for (default: the newest of any size)")
    add("--hidden_size", type=COUNT, help="width of the weights to look for")
    add("--num_hidden_layers", type=COUNT, help="depth that the weights must have")
    add("--use_moe", **SWITCH, help="look for a mixture of experts")
    add("--prompt", help="answer this and exit")
    add(
        "--history_cnt",
        type=number(int, 0),
        help="earlier messages that a question carries along, questions and answers (default: all)",
    )
    add(
        "--max_new_tokens",
        type=COUNT,
        help=f"tokens of an answer at most (default: {ANSWER}, or what the context has left behind the prompt)",
    )
    add("--max_seq_len", type=COUNT, help="tokens of conversation and answer at most (default: the model's context)")
    add(
        "--truncate", default=False, **SWITCH,
        help="leave out the oldest messages until there is room for --max_new_tokens; where that is not given, for "
        f"{ANSWER} or half the context, or for what the last question alone leaves",
    )  # fmt: skip
    add("--temperature", type=number(float, 0), default=0.7, help="0: always the likeliest token (default: 0.7)")
    add("--top_p", type=number(float, 0.01, 1), default=0.9, help="sample from this share of the probability (0.9)")
    add("--top_k", type=number(int, 0), default=0, help="sample from so many tokens (default: 0, all)")
    add("--min_p", type=share, default=0.0, help="sample from tokens with this share of the best (default: 0, all)")
    add("--repetition_penalty", type=number(float, 0.01, 100), default=1.0, help="above 1: repeat less (default: 1)")
    add(
        "--reasoning", default=True, **SWITCH,
        help="0: the thought of each reply is opened and closed for the model, so that it answers at once (default: 1)",
    )  # fmt: skip
    add("--inference_rope_scaling", default=False, **SWITCH, help="YaRN: read further than the model was trained")
    add("--quant", choices=["none", "int8"], default="none", help="int8: faster on a CPU, a little less exact")
    add("--device", default="auto", help="auto, cuda, mps, cpu (default: auto)")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights (default: auto; on a CPU float32, with the weights of a file kept as small as they are)",
    )
    add("--seed", type=number(int, 0, MAX_SEED), default=42, help="of the sampling (default: 42)")
    add("--debug", default=False, **SWITCH, help="show tracebacks of errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Weights
    check_given_text(args.prompt or "", "--prompt")
    device = pick_device(args.device)
    dtype = torch.float32 if (args.dtype, device.type) == ("auto", "cpu") else pick_dtype(args.dtype, device)
    sizes = given_sizes(args)
    path = args.weight or (
        Path("MiniMind2")
        if args.load
        else find_weights(args.out_dir, STAGES[args.model_mode], preset=args.preset, **sizes)
    )
    if args.load and path.suffix == ".pth":
        raise UsageError(f"--load 1 reads a transformers folder, {path} is a .pth file: leave --load out")
    model, info = load_model(
        path, preset=args.preset, config_overrides=sizes, device=device, dtype=dtype,
        inference_rope_scaling=args.inference_rope_scaling,
    )  # fmt: skip
    tokenizer = open_tokenizer(args.tokenizer_path, path, model)
    parameters = sum(p.numel() for p in model.parameters())
    adapter = "" if args.lora_name is None else merge_adapter(model, path, tokenizer, args)
    seen = f"{info.get('tokens_seen') or 0:,} tokens seen"
    print(f"{path}{adapter}: {parameters / 1e6:.1f}M parameters, {seen}, on {device}\n")

    # 2. Questions
    engine = Engine(
        model, tokenizer, max_batch=1, context=args.max_seq_len, quantize=None if args.quant == "none" else args.quant
    )
    if args.prompt is not None:
        answer(engine, tokenizer, [args.prompt], args)
        return
    replies = chat(engine, tokenizer, args) if ask_for_typing() else automatic_test(engine, tokenizer, args)

    # 3. What it came to
    ids = [ids for ids, _ in replies]
    tokens, seconds = sum(map(len, ids)), sum(seconds for _, seconds in replies)
    if tokens:
        print(
            f"{len(ids)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s; "
            f"{repetition(ids):.1%} of the 4-token pieces stood in the same answer before"
        )


def merge_adapter(model: torch.nn.Module, base: Path, tokenizer, args: argparse.Namespace) -> str:
    """Add the adapter that --lora_name means to the model's weights -> " + its file", and whether others are below."""
    path = find_lora(args.out_dir, args.lora_name, model.config)
    info = merge_lora(model, path)
    check_vocab(tokenizer, model.config, path, info.get("vocabulary"))
    return f" + {path}{base_note(info, base, weights_file_hash(base))}"


def ask_for_typing() -> bool:
    """Ask "[0] automatic test, [1] type" where somebody can answer; elsewhere the automatic test."""
    return sys.stdin.isatty() and read_line("[0] automatic test, [1] type: ") == "1"


def read_line(prompt: str) -> str:
    """A typed line, empty at the end of input. One with half a character in it is asked for again."""
    while True:
        try:
            line = input(prompt).strip()
            line.encode()
            return line
        except EOFError:
            return ""
        except UnicodeError:  # from input(), or from lone bytes that it has let through
            print("this holds half a character, or bytes of another encoding: type it again")


def automatic_test(engine: Engine, tokenizer, args: argparse.Namespace) -> list[tuple[list[int], float]]:
    """Put every question alone -> token ids and seconds of each answer."""
    replies = []
    for prompt in BEGINNINGS if args.model_mode == 0 else QUESTIONS:
        print(f"> {prompt}")
        _, ids, seconds = answer(engine, tokenizer, [prompt], args, number=len(replies))
        replies.append((ids, seconds))
    return replies


def chat(engine: Engine, tokenizer, args: argparse.Namespace) -> list[tuple[list[int], float]]:
    """Type line after line; an empty line or the end of input leaves. -> token ids and seconds of each answer."""
    turns: list[str] = []
    replies = []
    while line := read_line("> "):
        kept = 0 if args.model_mode == 0 else len(turns) if args.history_cnt is None else args.history_cnt // 2 * 2
        turns = [*turns[len(turns) - min(kept, len(turns)) :], line]
        text, ids, seconds = answer(engine, tokenizer, turns, args, number=len(replies))
        turns.append(text)
        replies.append((ids, seconds))
    return replies


def answer(
    engine: Engine, tokenizer, turns: list[str], args: argparse.Namespace, number: int = 0
) -> tuple[str, list[int], float]:
    """Stream the reply to the last of the turns (user, assistant, user, ...) -> its text without thought, ids, seconds.

    A thought is shown between lines of its own; later turns do not see it.
    """
    request = Request(
        fitting_prompt(engine, tokenizer, turns, args),
        max_new_tokens=args.max_new_tokens or ANSWER, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=sample_seed(args.seed, number),
    )  # fmt: skip
    ids: list[int] = []
    reply, thinking = "", False
    started = time.perf_counter()
    for thought, text in split_thoughts(pieces(engine, request, ids)):
        if thought != thinking:
            print("[thought]" if thought else "\n[answer]")
            thinking = thought
        print(text, end="", flush=True)
        reply += "" if thought else text
    print("\n")
    return reply, ids, time.perf_counter() - started


def fitting_prompt(engine: Engine, tokenizer, turns: list[str], args: argparse.Namespace) -> list[int]:
    """The token ids of all turns; with --truncate, of as many of the last ones as leave room for the answer.

    An answer of --max_new_tokens must fit whole. Where that is not given, the context may end the answer.
    """
    named, context = args.max_new_tokens, engine.context
    wanted, least = named or min(ANSWER, context // 2), named or 1
    ids = prompt_ids(tokenizer, turns, args)
    while args.truncate and len(ids) + wanted > context and len(turns) > 1:
        turns = turns[2:]
        ids = prompt_ids(tokenizer, turns, args)
    if len(ids) + least <= context:
        return ids
    helps = len(turns) > 1 and len(prompt_ids(tokenizer, turns[-1:], args)) + least <= context
    raise InputError(
        f"the prompt has {len(ids)} tokens"
        + (f"; with --max_new_tokens {named} that passes" if named else ", which leaves no room for an answer in")
        + f" the context of {context}: shorten it{' or give --truncate' if helps else ''}"
    )


def prompt_ids(tokenizer, turns: list[str], args: argparse.Namespace) -> list[int]:
    """The token ids before the reply to the last of the turns; a pretrained model continues that one alone."""
    if args.model_mode == 0:
        return [tokenizer.bos_token_id, *tokenizer(turns[-1], add_special_tokens=False).input_ids]
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return encode_prompt(tokenizer, chat, enable_thinking=args.reasoning)


def pieces(engine: Engine, request: Request, ids: list[int]) -> Iterator[str]:
    """The text of a reply as it comes; its token ids are added to `ids`."""
    for chunk in engine.stream(request):
        ids.append(chunk.id)
        yield chunk.text


def split_thoughts(texts: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Text in pieces -> (whether it stands between <think> and </think>, piece without tags and blanks behind them).

    The tags <answer> and </answer> are left out too. What may be the beginning of a tag waits for the next piece.
    """
    thought = behind_tag = False
    held = ""
    for text in chain(texts, [None]):
        held += text or ""
        while True:
            tags = ("</think>",) if thought else ("<think>", "<answer>", "</answer>")
            place, tag = min(((held.find(tag), tag) for tag in tags if tag in held), default=(-1, ""))
            if place < 0:
                break
            before, held = held[:place], held[place + len(tag) :]
            if before.strip():
                yield thought, before.lstrip() if behind_tag else before
            thought, behind_tag = tag == "<think>", True
        starts = (k for tag in tags for k in range(1, len(tag)) if held.endswith(tag[:k]))
        waiting = 0 if text is None else max(starts, default=0)
        ready, held = held[: len(held) - waiting], held[len(held) - waiting :]
        if behind_tag:
            ready = ready.lstrip()
        if ready:
            behind_tag = False
            yield thought, ready


def repetition(replies: list[list[int]], size: int = 4) -> float:
    """Share of the runs of 4 tokens that occurred in the same reply before."""
    runs = [[tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)] for ids in replies]
    total = sum(map(len, runs))
    return 1 - sum(len(set(row)) for row in runs) / total if total else 0.0


if __name__ == "__main__":
    run_script(parse_args, main)
