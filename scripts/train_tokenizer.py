"""Train the tokenizer: byte-level BPE, 6400 entries, from JSON lines or plain text of any size.

1. Every file is read twice as a stream. The first pass checks it and measures its Chinese and English bytes; the second
   draws about --sample_mb of it, --chinese_share of that Chinese, so that neither language takes all the merges.
2. Merges are learned with every digit and every newline cut off. So numbers are read digit by digit, and the tokens of
   a reply do not depend on the "assistant" line before it. The saved tokenizer needs no such rule any more: it is plain
   GPT-2 byte-level BPE, which llama.cpp knows as "gpt-2".
   The words of the chat format are mixed in, so that "assistant" is one entry.
3. Ids: 0 <|endoftext|> (pad), 1 <|im_start|> (bos), 2 <|im_end|> (eos), then the eight tags, the 256 bytes, the merges.
   Control tokens are special: decode(skip_special_tokens=True) drops them and keeps the tags. As all 256 bytes are
   entries, any text comes back exactly.

The shipped model/tokenizer.json: pretraining text, conversations, Python sources and written sums, with
    python scripts/train_tokenizer.py --data_path pretrain.jsonl sft.jsonl code.txt sums.txt \\
        --sample_mb 40 20 0.5 0.2 --chinese_share 0.9 --eval_path held_out.jsonl --out_dir model --overwrite
It reads 1.30 Chinese and 2.76 English characters per token on held-out pretraining text.
"""

import argparse
import codecs
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.chat import (
    DEFAULT_SYSTEM_PROMPT,
    ROLES,
    TAGS,
    TOOLS_PREFIX,
    TOOLS_SUFFIX,
    chat_template,
    check_text,
)
from dataset.demo_data import ensure_demo_data
from dataset.rows import read_jsonl, refuse_packed
from model.errors import InputError, UsageError, run_script

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMALLEST_VOCAB = len(CONTROL_TOKENS) + len(TAGS) + 256
LONGEST_PIECE = 1 << 20  # bytes of one line of plain text that are held in memory at a time
LONGEST_WORD = 1024  # bytes of one word that merges are learned within: their time is quadratic in it
MOST_COPIES = 4.0  # of one text, where a language is rare in a file
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def is_chinese(text: str) -> bool:
    """Whether at least a fifth of the characters are Chinese ones."""
    return 5 * len(CJK.findall(text)) >= len(text)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a .jsonl file ("text", or "conversations" contents) or the lines of any other file, as a stream."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give --data_path the .jsonl or .txt files to learn from")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give one that holds text")
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            for text in row_texts(row, f"{path}:{number}"):
                check_text(text, f"{path}:{number}: ")
                yield text
        return
    with path.open("rb") as file:
        refuse_packed(path, file.peek(8))
        yield from read_plain(file, path)


def row_texts(row: dict, where: str) -> list[str]:
    """The strings that one JSON row contributes."""
    if isinstance(row.get("text"), str) and row["text"]:
        return [row["text"]]
    if isinstance(row.get("conversations"), list):
        turns = [turn for turn in row["conversations"] if isinstance(turn, dict)]
        texts = [turn["content"] for turn in turns if isinstance(turn.get("content"), str) and turn["content"]]
        if texts:
            return texts
    raise InputError(f'{where}: the row has no text; expected {{"text": "..."}} or {{"conversations": [turns]}}')


def read_plain(file: object, path: Path) -> Iterator[str]:
    """Lines of plain text; a very long line comes in pieces that never cut a character."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    while piece := file.readline(LONGEST_PIECE):
        try:
            text = decoder.decode(piece, final=piece.endswith(b"\n"))
        except UnicodeDecodeError:
            raise InputError(f"{path}:{number}: the line is not UTF-8; convert the file to UTF-8") from None
        number += piece.endswith(b"\n")
        if text:
            yield text
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError(f"{path}:{number}: the file ends inside a UTF-8 character; it seems cut off") from None


def survey(path: Path) -> dict[bool, int]:
    """Bytes of text in a file: {True: Chinese, False: English and the rest}."""
    sizes = {True: 0, False: 0}
    for text in read_texts(path):
        sizes[is_chinese(text)] += len(text.encode())
    if not any(sizes.values()):
        raise InputError(f"{path}: the file holds only blank lines; give one that holds text")
    return sizes


def copies_wanted(sizes: dict[bool, int], sample_mb: float, chinese_share: float) -> dict[bool, float]:
    """How often a text of either language is to be taken on average, so that the sample has the wanted size and mix."""
    share = chinese_share if all(sizes.values()) else float(sizes[True] > 0)
    size = min(sample_mb * 1e6, sum(sizes.values()))
    wanted = {True: size * share, False: size * (1 - share)}
    return {key: min(wanted[key] / sizes[key], MOST_COPIES) if sizes[key] else 0.0 for key in sizes}


def draw(path: Path, copies: dict[bool, float], seed: str) -> Iterator[str]:
    """The sample of one file: each text floor(copies) times, and once more by chance for the fraction."""
    generator = random.Random(seed)
    for text in read_texts(path):
        whole, fraction = divmod(copies[is_chinese(text)], 1)
        for _ in range(int(whole) + (generator.random() < fraction)):
            yield text


def chat_words() -> str:
    """The fixed words of the chat format, which every conversation pays for, without the tags."""
    text = "\n".join([*ROLES, DEFAULT_SYSTEM_PROMPT, TOOLS_PREFIX, TOOLS_SUFFIX])
    return re.sub("|".join(TAGS), "", text)


def with_chat_words(texts: Iterable[str]) -> Iterator[str]:
    """The same texts, with the words of the chat format after every 4 kB and a line of progress after every 10 MB."""
    size, words, shown = 0, 0, 0
    for text in texts:
        yield text
        size += len(text.encode())
        for _ in range(size // 4000 - words):
            yield chat_words()
        words = size // 4000
        if size // 10**7 > shown:
            shown = size // 10**7
            print(f"read {size / 1e6:.0f} MB of the sample", flush=True)


def train(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """Learn the merges and return the tokenizer in the form in which it is used."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split("\n", "isolated"), byte_level,
            pre_tokenizers.FixedLength(LONGEST_WORD),
        ]
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*CONTROL_TOKENS, *TAGS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.pre_tokenizer = byte_level
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(settings))


def save(tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, each beside its place and renamed when whole."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(),
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (out_dir / f"{name}.part").write_text(content + "\n", encoding="utf-8", newline="\n")
    for name in contents:
        os.replace(out_dir / f"{name}.part", out_dir / name)


def evaluate(tokenizer: Tokenizer, path: Path) -> None:
    """Print characters and bytes per token by language, and check that every text comes back exactly."""
    rows, characters, sizes, tokens, broken = ({True: 0, False: 0} for _ in range(5))
    for text in read_texts(path):
        language = is_chinese(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows[language] += 1
        characters[language] += len(text)
        sizes[language] += len(text.encode())
        tokens[language] += len(ids)
        broken[language] += tokenizer.decode(ids, skip_special_tokens=False) != text
    for language, name in ((True, "Chinese"), (False, "English")):
        if rows[language]:
            print(
                f"{path.name}, {name}: {rows[language]} texts, "
                f"{characters[language] / tokens[language]:.3f} characters and "
                f"{sizes[language] / tokens[language]:.3f} bytes per token, "
                f"{rows[language] - broken[language]} of {rows[language]} come back exactly"
            )


def default_data() -> Path:
    """dataset/tokenizer_train.jsonl, or the embedded demo text with a line that says so."""
    path = ROOT / "dataset" / "tokenizer_train.jsonl"
    if path.is_file():
        return path
    demo = ensure_demo_data() / "pretrain.jsonl"
    print(f"{path} is absent: learning from the embedded {demo}")
    return demo


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data_path", type=Path, nargs="+", help=".jsonl or text files; dataset/tokenizer_train.jsonl if none is given"
    )
    parser.add_argument(
        "--sample_mb", type=float, nargs="+", default=[40.0], help="MB drawn: one number, or one a file"
    )
    parser.add_argument("--chinese_share", type=float, default=0.9, help="Chinese part of what a mixed file gives")
    parser.add_argument("--vocab_size", type=int, default=6400, help="number of entries")
    parser.add_argument("--min_frequency", type=int, default=2, help="a pair seen less often is not merged")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", help="folder to write")
    parser.add_argument("--eval_path", type=Path, help="held-out file: reports characters and bytes per token")
    parser.add_argument("--seed", type=int, default=42, help="of the drawn sample")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is already in --out_dir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.vocab_size < SMALLEST_VOCAB:
        parser.error(f"--vocab_size must be at least {SMALLEST_VOCAB} (256 bytes, control tokens and tags)")
    if not 0 <= args.chinese_share <= 1:
        parser.error("--chinese_share must lie between 0 and 1")
    if min(args.sample_mb) <= 0:
        parser.error("--sample_mb must be positive")
    return args


def main(args: argparse.Namespace) -> None:
    # 1. Check everything that can be refused before work begins
    existing = [args.out_dir / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if any(path.exists() for path in existing) and not args.overwrite:
        raise UsageError(f"{args.out_dir} already holds a tokenizer; choose another --out_dir or add --overwrite")
    paths = args.data_path or [default_data()]
    sample_mb = args.sample_mb * len(paths) if len(args.sample_mb) == 1 else args.sample_mb
    if len(sample_mb) != len(paths):
        raise UsageError(f"--sample_mb has {len(sample_mb)} numbers for {len(paths)} files; give one, or one a file")
    if args.eval_path:
        survey(args.eval_path)

    # 2. Measure the files and draw
    samples = []
    for number, (path, megabytes) in enumerate(zip(paths, sample_mb, strict=True)):
        sizes = survey(path)
        copies = copies_wanted(sizes, megabytes, args.chinese_share)
        print(
            f"{path}: {sizes[True] / 1e6:.2f} MB Chinese (each text {copies[True]:.2f} times), "
            f"{sizes[False] / 1e6:.2f} MB English and others (each {copies[False]:.2f} times)",
            flush=True,
        )
        samples.append(draw(path, copies, f"{args.seed}:{number}"))

    # 3. Learn
    texts = with_chat_words(text for sample in samples for text in sample)
    tokenizer = train(texts, args.vocab_size, args.min_frequency)
    if tokenizer.get_vocab_size() < args.vocab_size:
        print(f"the data has pairs for {tokenizer.get_vocab_size()} entries only, {args.vocab_size} were asked for")

    # 4. Save, measure
    save(tokenizer, args.out_dir)
    print(f"wrote {tokenizer.get_vocab_size()} entries to {args.out_dir}")
    if args.eval_path:
        evaluate(tokenizer, args.eval_path)


if __name__ == "__main__":
    run_script(parse_args, main)
