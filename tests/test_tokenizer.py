"""The shipped tokenizer (ids, digits, round trip, GPT-2 splitting) and the script that trains one."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dataset.chat import TAGS, chat_template
from model.errors import InputError, UsageError
from scripts import train_tokenizer

MODEL_DIR = Path(train_tokenizer.ROOT) / "model"
SHIPPED = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
SAMPLES = [
    "Hello world, it's 2024 and we'll see what they've done.",
    "1234567890 12 3.14 x1 1x 第3章 二〇二四年 Ⅷ ½ ² ①",
    "  two spaces\tand\ttabs \n\n\n    def f(x):\n        return x ** 2\r\n",
    "你好，世界！今天天气很好。“引号”《书名》……",
    "emoji 👩‍👩‍👧 🇨🇳 é é ñ ü \u00a0nbsp\u3000ideographic \u2028 line",
    "\x00\x01\x7f control \ufeff bom \u200b zero",
    "a<think>b</think> <answer>4</answer><tool_call>{}</tool_call>",
    'print("hi")  # 注释\n\n\nclass A:\n\tpass',
    "العربية עברית हिन्दी ไทย 한국어 ひらがな",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        [*TAGS, "\n", "\n\n", "  ", "\t", " 42", "7", "你好", " the", "don't", "🙂", "\r\n", "    return x"]
    )
).map("".join)


def ids_of(text: str) -> list[int]:
    return SHIPPED.encode(text, add_special_tokens=False).ids


def test_size_and_fixed_ids():
    assert SHIPPED.get_vocab_size(with_added_tokens=True) == 6400
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS]
    assert [SHIPPED.token_to_id(name) for name in names] == list(range(11))
    assert all(ids_of(name) == [number] for number, name in enumerate(names))
    assert all(ids_of(f"x{name}y")[1] == number for number, name in enumerate(names))


def test_opens_with_transformers():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.is_fast and len(tokenizer) == 6400 and tokenizer.model_max_length == 32768
    assert tokenizer("你好 world 42")["input_ids"] == ids_of("你好 world 42")  # nothing is added in front or behind
    text = "<|im_start|>a <think> b</think><|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "a <think> b</think>"


def test_config_is_what_the_script_writes_and_transformers_4_reads():
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == chat_template()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "extra_special_tokens"} & set(config)


def test_no_entry_joins_a_digit_or_a_newline_to_anything():
    for number in range(11, SHIPPED.get_vocab_size()):
        text = SHIPPED.decode([number], skip_special_tokens=False)
        assert len(text) == 1 or not regex.search(r"[0-9\n]", text), text


@pytest.mark.parametrize("text", ["2024", " 2024", "x2024y", "3.14", "1 2", "第12章", "12,345", " 7"])
def test_digits_are_read_one_by_one(text):
    tokens = [SHIPPED.decode([number]) for number in ids_of(text)]
    assert [token for token in tokens if regex.search("[0-9]", token)] == regex.findall("[0-9]", text)


def test_words_of_the_chat_format_are_single_entries():
    assert all(len(ids_of(word)) == 1 for word in ("system", "user", "assistant"))


def test_plain_gpt2_splitting_is_shipped():
    settings_ = json.loads(SHIPPED.to_str())
    assert settings_["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert settings_["normalizer"] is None and settings_["post_processor"] is None
    assert settings_["model"]["type"] == "BPE" and not settings_["model"]["byte_fallback"]


class Gpt2Reference:
    """Byte-level BPE from its definition: split by the GPT-2 pattern, then merge the best pair while there is one."""

    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self) -> None:
        model = json.loads((MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        self.vocab = model["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}

    def merge(self, word: str) -> list[str]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(self.ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in regex.split("(" + "|".join(TAGS) + ")", text):
            parts = [piece] if piece in TAGS else [p for word in self.pattern.findall(piece) for p in self.merge(word)]
            ids += [self.vocab[part] for part in parts]
        return ids


REFERENCE = Gpt2Reference()


@pytest.mark.parametrize("text", SAMPLES)
def test_equals_an_independent_gpt2_tokenizer(text):
    assert ids_of(text) == REFERENCE.encode(text)


@given(st.lists(st.sampled_from(" \n\t\r'sdl19.,!?<>你好，éñ🙂_-")).map("".join))
@settings(max_examples=200, deadline=None)
def test_equals_an_independent_gpt2_tokenizer_on_mixtures(text):
    assert ids_of(text) == REFERENCE.encode(text)


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly(text):
    assert SHIPPED.decode(ids_of(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_come_back_exactly_with_and_without_special_tokens(text):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert tokenizer.decode(ids_of(text)) == text
    assert tokenizer.decode(ids_of(text), skip_special_tokens=True) == text


# The training script


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    rows = [{"text": f"The cat number {n} sat on the mat in 20{n}.\n\nIt was happy."} for n in range(60)]
    rows += [{"text": f"第{n}只猫坐在垫子上，它很高兴。"} for n in range(60)]
    turns = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "On the mat."}]
    rows += [{"conversations": turns}] * 20
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


def run(*flags: object) -> None:
    train_tokenizer.main(train_tokenizer.parse_args([str(flag) for flag in flags]))


def test_trains_end_to_end_from_another_directory(tmp_path, run_script):
    corpus = write_corpus(tmp_path)
    flags = ["--data_path", "corpus.jsonl", "--out_dir", "made", "--vocab_size", 400, "--eval_path", corpus]
    done = run_script("scripts/train_tokenizer.py", flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Chinese: 60 texts" in done.stdout and "100 of 100 come back exactly" in done.stdout
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(made) <= 400 and made.convert_tokens_to_ids("<|im_end|>") == 2
    assert made.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False).endswith("cat<|im_end|>\n")
    entries = [made.decode([number]) for number in range(11, len(made))]
    assert not [entry for entry in entries if len(entry) > 1 and regex.search(r"[0-9\n]", entry)]

    refused = run_script("scripts/train_tokenizer.py", flags, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--overwrite" in refused.stderr


def test_same_input_gives_the_same_bytes_and_overwrite_is_obeyed(tmp_path):
    corpus = write_corpus(tmp_path)
    plain = tmp_path / "lines.txt"
    plain.write_text("".join(f"line {n} of the text\n" for n in range(200)))
    flags = ["--data_path", corpus, plain, "--vocab_size", 320, "--sample_mb", 0.004, 0.002, "--chinese_share", 0.5]
    run(*flags, "--out_dir", tmp_path / "a")
    run(*flags, "--out_dir", tmp_path / "b")
    first = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert first == (tmp_path / "b" / "tokenizer.json").read_bytes()
    with pytest.raises(UsageError, match="already holds a tokenizer"):
        run(*flags, "--out_dir", tmp_path / "a", "--seed", 1)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == first
    run(*flags, "--out_dir", tmp_path / "a", "--seed", 1, "--overwrite")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() != first


def test_sample_has_the_wanted_size_and_mix(tmp_path):
    path = tmp_path / "mixed.jsonl"
    texts = ["a line of English text, forty letters ok"] * 500 + ["一行中文字符共十个字吗"] * 500
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = train_tokenizer.survey(path)
    assert sizes == {False: 20000, True: 16500}
    drawn = list(train_tokenizer.draw(path, train_tokenizer.copies_wanted(sizes, 0.02, 0.25), "0"))
    chinese = sum(len(text.encode()) for text in drawn if train_tokenizer.is_chinese(text))
    assert chinese == pytest.approx(5000, rel=0.2)
    assert sum(len(text.encode()) for text in drawn) - chinese == pytest.approx(15000, rel=0.1)


def test_long_plain_lines_come_in_pieces_that_keep_characters_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "LONGEST_PIECE", 7)
    path = tmp_path / "long.txt"
    path.write_text("\ufeff你好世界，一行很长的文字\nsecond line", encoding="utf-8")
    assert "".join(train_tokenizer.read_texts(path)) == "你好世界，一行很长的文字\nsecond line"


@pytest.mark.parametrize(("letters", "merged"), [(1022, True), (1023, False)])
def test_merges_do_not_reach_beyond_a_kilobyte_of_one_word(letters, merged):
    """Learning is quadratic in a word: 600,000 letters took over nine minutes. q stands on its byte 1023 or 1024."""
    made = train_tokenizer.train(["x" * letters + "qz"] * 3, vocab_size=300, min_frequency=2)
    assert any("qz" in entry for entry in made.get_vocab()) == merged
    long = "qz" * 60_000
    assert made.decode(made.encode(long, add_special_tokens=False).ids) == long


def test_words_of_the_chat_format_become_entries_whatever_the_text(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"第{n}行 line {n}: Der Hund beisst den Mann.\n" for n in range(2000)), encoding="utf-8")
    run("--data_path", path, "--out_dir", tmp_path / "made", "--vocab_size", 800)
    made = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    for word in ("system", "user", "assistant"):
        assert len(made.encode(word, add_special_tokens=False).ids) == 1
        first = made.encode(f"{word}\n\nHi", add_special_tokens=False).ids[0]
        assert made.decode([first]) == word


BAD_FILES = {
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "blank.txt": (b"", "blank.txt: the file is empty"),
    "blank.jsonl": (b"\n \n", "blank.jsonl is empty: it holds no row"),
    "half.jsonl": (b'{"text": "ok"}\n{"text": "half', "half.jsonl:2: not a whole JSON object"),
    "latin.jsonl": (b'{"text": "ok"}\n\n{"text": "caf\xe9"}\n', "latin.jsonl:3: byte 14 of the line is not UTF-8"),
    "latin.txt": (b"fine\ncaf\xe9\n", "latin.txt:2: the line is not UTF-8"),
    "cut.txt": ("fine\n你".encode()[:-1], "cut.txt:2: the file ends inside a UTF-8 character"),
    "textless.jsonl": (b'{"text": "ok"}\n{"title": "x"}\n', "textless.jsonl:2: the row has no text"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: the row has no text"),
    "list.jsonl": (b"[1]\n", "list.jsonl:1: a row must be a JSON object"),
    "silent.jsonl": (b'{"conversations": [{"role": "user"}]}\n', "silent.jsonl:1: the row has no text"),
    "surrogate.jsonl": (b'{"text": "\\ud83d"}\n', "surrogate.jsonl:1: the text holds half of a surrogate pair"),
    "bigint.jsonl": (
        b'{"text": "ok", "id": ' + b"7" * 9999 + b"}",
        "bigint.jsonl:1: a number of more than 4,300 digits",
    ),
    "deep.jsonl": (b'{"text": ' + b"[" * 9999, "deep.jsonl:1: brackets nested too deeply"),
    "array.jsonl": (b'[\n  {\n    "text": "ok"\n  }\n]\n', "array.jsonl is JSON over several lines"),
    "text.jsonl.gz": (gzip.compress(b'{"text": "ok"}\n'), "text.jsonl.gz is a gzip archive"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_sentence_with_the_place(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=regex.escape(message)) as caught:
        run("--data_path", path, "--out_dir", tmp_path / "made")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_missing_file_and_bad_flags(tmp_path, capsys):
    with pytest.raises(InputError, match="no such file"):
        run("--data_path", tmp_path / "none.jsonl", "--out_dir", tmp_path / "made")
    with pytest.raises(UsageError, match="2 numbers for 1 files"):
        run("--data_path", write_corpus(tmp_path), "--sample_mb", 1, 2, "--out_dir", tmp_path / "made")
    for flags in (["--vocab_size", "100"], ["--chinese_share", "2"], ["--sample_mb", "0"], ["--colour", "red"]):
        with pytest.raises(SystemExit) as caught:
            run(*flags)
        assert caught.value.code == 2
    capsys.readouterr()


def test_default_data_falls_back_to_the_demo_text_with_a_line(tmp_path, monkeypatch, capsys):
    from dataset.demo_data import ensure_demo_data

    ensure_demo_data()
    capsys.readouterr()
    monkeypatch.setattr(train_tokenizer, "ROOT", tmp_path)
    assert any("大" in text for text in train_tokenizer.read_texts(train_tokenizer.default_data()))
    assert capsys.readouterr().out.count("\n") == 1
    own = tmp_path / "dataset" / "tokenizer_train.jsonl"
    own.parent.mkdir()
    own.touch()
    assert train_tokenizer.default_data() == own and not capsys.readouterr().out
