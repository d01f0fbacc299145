"""Talk to a trained model: automatic test, typing, or one prompt.

python eval_model.py --model_mode 1                     asks which on a terminal, runs the automatic test elsewhere
python eval_model.py --model_mode 1 --prompt "..."      answers and exits
python eval_model.py --model_mode 0                     the pretrained model continues texts
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from transformers import GenerationConfig, TextStreamer, set_seed

from dataset.chat import encode_prompt
from model.errors import InputError, run_script
from model.LMConfig import PRESETS
from model.loading import check_vocab, find_weights, load_model, load_tokenizer
from trainer.trainer_utils import MAX_SEED, ROOT, boolean, given_sizes, number, pick_device, pick_dtype

STAGES = {0: "pretrain", 1: "full_sft"}
BEGINNINGS = ["法国的首都是", "The capital of Japan is", "水的化学", "春天来了，", "Once upon a time"]
QUESTIONS = [
    "你是谁？", "法国的首都是哪里？", "金的元素符号是什么？", "7 加 8 等于多少？", "手被烫伤了怎么办？",
    "《静夜思》是谁写的？",
    "Who are you?", "What is the capital of Japan?", "What is the past tense of go?", "Thank you for your help!",
]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ", ".join(f"{mode} {stage}" for mode, stage in STAGES.items())
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False}
    count = number(int, 1)
    add = parser.add_argument
    add("--model_mode", type=int, choices=STAGES, default=1, help=f"which stage's weights: {modes} (default: 1)")
    add("--out_dir", type=Path, default=ROOT / "out", help="where the weights are (default: out/)")
    add("--weight", type=Path, help="a .pth file or a transformers folder, in place of the stage's newest weights")
    add("--tokenizer_path", type=Path, help="folder of a tokenizer (default: model/)")
    add("--preset", choices=PRESETS, help="size of the weights to look for (default: the newest of any size)")
    add("--hidden_size", type=count, help="width of the weights to look for")
    add("--num_hidden_layers", type=count, help="depth that the weights must have")
    add("--use_moe", type=boolean, nargs="?", const=True, help="look for a mixture of experts")
    add("--prompt", help="answer this and exit")
    add("--max_new_tokens", type=count, default=256, help="tokens of an answer at most (default: 256)")
    add("--temperature", type=number(float, 0), default=0.7, help="0: always the likeliest token (default: 0.7)")
    add(
        "--top_p",
        type=number(float, 0.01, 1),
        default=0.9,
        help="sample from this share of the probability (default: 0.9)",
    )
    add("--inference_rope_scaling", **switch, help="YaRN: read further than the model was trained")
    add("--device", default="auto", help="auto, cuda, mps, cpu (default: auto)")
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="of the weights (default: auto)",
    )
    add("--seed", type=number(int, 0, MAX_SEED), default=42, help="of the sampling (default: 42)")
    add("--debug", **switch, help="show tracebacks of errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer_path)
    sizes = given_sizes(args)
    stage = STAGES[args.model_mode]
    path = args.weight or find_weights(args.out_dir, stage, preset=args.preset, **sizes)
    model, info = load_model(
        path, preset=args.preset, config_overrides=sizes, device=device, dtype=pick_dtype(args.dtype, device),
        inference_rope_scaling=args.inference_rope_scaling,
    )  # fmt: skip
    check_vocab(tokenizer, model.config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {parameters / 1e6:.1f}M parameters, {info.get('tokens_seen') or 0:,} tokens seen, on {device}\n")
    set_seed(args.seed)

    if args.prompt is not None:
        answer(model, tokenizer, [args.prompt], args)
    elif ask_for_typing():
        chat(model, tokenizer, args)
    else:
        for prompt in BEGINNINGS if args.model_mode == 0 else QUESTIONS:
            print(f"> {prompt}")
            answer(model, tokenizer, [prompt], args)


def ask_for_typing() -> bool:
    """Ask "[0] automatic test, [1] type" where somebody can answer; elsewhere the automatic test."""
    return sys.stdin.isatty() and read_line("[0] automatic test, [1] type: ") == "1"


def read_line(prompt: str) -> str:
    """A typed line, empty at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def chat(model, tokenizer, args: argparse.Namespace) -> None:
    """Type line after line; an empty line or the end of input leaves."""
    turns: list[str] = []
    while True:
        line = read_line("> ")
        if not line:
            return
        turns = [*turns, line] if args.model_mode else [line]
        turns.append(answer(model, tokenizer, turns, args))


def answer(model, tokenizer, turns: list[str], args: argparse.Namespace) -> str:
    """Stream the model's reply to the last of the turns (user, assistant, user, ...) and return it."""
    if args.model_mode == 0:
        ids = [tokenizer.bos_token_id, *tokenizer(turns[-1], add_special_tokens=False).input_ids]
    else:
        roles = ("user", "assistant")
        ids = encode_prompt(tokenizer, [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])
    limit = model.config.max_position_embeddings
    if len(ids) + args.max_new_tokens > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens; with --max_new_tokens {args.max_new_tokens} that passes the context "
            f"of {limit}"
        )
    settings = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        **(settings if args.temperature else {"do_sample": False}),
    )  # fmt: skip
    input_ids = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=generation_config, streamer=streamer
        )
    print()
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


if __name__ == "__main__":
    run_script(parse_args, main)
