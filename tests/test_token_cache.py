"""The token cache: what its key knows, whole or made anew, names of its own, and nothing half made left behind."""

import errno
import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
from commands import TEXTS, chat, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataset import lm_dataset, token_cache
from dataset.lm_dataset import DPODataset, PretrainDataset, SFTDataset
from dataset.token_cache import file_hash
from model.errors import InputError, run_script
from model.loading import load_tokenizer

PAIRS = [
    {side: chat(f"{i}?", f"{side} {i}")["conversations"] for side in ("chosen", "rejected")} for i in range(9)
]  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def word_tokenizer(size):
    """Words w0, w1, ... as the ids 3, 4, ... of a vocabulary of this size."""
    names = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(size - 3))]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# --------------------------------------------------------------------------------------------------- what the key knows


@pytest.mark.parametrize("size", [1000, 65_536, 65_537, 70_000])
def test_ids_of_large_vocabularies_come_back(size, tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"text": f"w0 w{size - 4} w7"}])
    dataset = PretrainDataset(path, word_tokenizer(size), 8, tmp_path / "cache")
    assert dataset[0]["input_ids"].tolist() == [1, 3, size - 1, 10, 2, 0, 0, 0]
    assert dataset.cache.ids.dtype == (np.uint16 if size <= 65_536 else np.uint32)


def test_another_tokenizer_has_a_cache_of_its_own(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"text": "w5 w6"}])
    small, large = word_tokenizer(10), word_tokenizer(8)
    assert PretrainDataset(path, small, 8, tmp_path / "cache").cache.ids.tolist() == [1, 8, 9, 2]
    assert PretrainDataset(path, large, 8, tmp_path / "cache").cache.ids.tolist() == [1, 0, 0, 2]


def test_chats_cut_at_another_length_have_a_cache_of_their_own(tmp_path, tokenizer):
    path = write_rows(tmp_path / "f.jsonl", [chat("why?", "because " * 60)])
    lengths = [len(SFTDataset(path, tokenizer, length, tmp_path / "cache").cache.ids) for length in (32, 48, 32)]
    assert lengths == [32, 48, 32]


def test_kinds_of_rows_do_not_share_a_cache(tmp_path, tokenizer):
    path = write_rows(tmp_path / "f.jsonl", [{"text": "a text", **chat("a", "b")}])
    assert PretrainDataset(path, tokenizer, 64, tmp_path / "cache").cache.targets is None
    assert SFTDataset(path, tokenizer, 64, tmp_path / "cache").cache.targets is not None


def test_other_first_and_last_tokens_have_a_cache_of_their_own(tmp_path):
    """The vocabulary is the same: which of its tokens these are stands in the tokenizer's configuration."""
    path = write_rows(tmp_path / "f.jsonl", [{"text": "w0 w1"}])
    for names, ids in (
        ({}, [1, 3, 4, 2, 0]),
        ({"bos_token": "w4"}, [7, 3, 4, 2, 0]),
        ({"eos_token": "w5"}, [1, 3, 4, 8, 0]),
        ({"pad_token": "w6"}, [1, 3, 4, 2, 9]),
    ):
        named = word_tokenizer(10)
        for name, token in names.items():
            setattr(named, name, token)
        assert PretrainDataset(path, named, 5, tmp_path / "cache")[0]["input_ids"].tolist() == ids
    assert len(list((tmp_path / "cache").iterdir())) == 3  # padding is put in later


def test_special_tokens_read_as_text_have_a_cache_of_their_own(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"text": "<|im_end|> a"}])
    lengths = []
    for split in False, True, False:
        tokenizer = load_tokenizer()
        tokenizer.backend_tokenizer.encode_special_tokens = split
        lengths.append(len(PretrainDataset(path, tokenizer, 64, tmp_path / "cache").cache.ids))
    assert lengths[0] == lengths[2] < lengths[1]


@pytest.mark.parametrize("kind", [SFTDataset, DPODataset])
def test_another_system_prompt_has_a_cache_of_its_own(kind, tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "f.jsonl", PAIRS if kind is DPODataset else [chat("a", "b")])
    before = len(kind(path, tokenizer, 128, tmp_path / "cache").cache.ids)
    monkeypatch.setattr("dataset.chat.DEFAULT_SYSTEM_PROMPT", "You are a helpful, learned and polite assistant.")
    assert len(kind(path, tokenizer, 128, tmp_path / "cache").cache.ids) > before


@pytest.mark.parametrize("size", [0, 100, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_hash_is_that_of_the_whole_file(size, tmp_path):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "f").write_bytes(content)
    assert file_hash(tmp_path / "f") == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_renamed_file_uses_its_cache_under_its_new_name(texts, tmp_path, tokenizer, monkeypatch):
    first = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    moved = texts.rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(token_cache, "write_documents", None)
    second = PretrainDataset(moved, tokenizer, 64, tmp_path / "cache")
    assert (first.data_path, second.data_path) == (str(texts), str(moved))
    assert second.describe(0).startswith(f"{moved}:") and second.data_hash == first.data_hash


# -------------------------------------------------------------------------------------------- damaged, changed, stopped


@pytest.mark.parametrize("size", [0, 0.5, "gone"])
@pytest.mark.parametrize("name", ["ids.bin", "targets.bin", "bounds.npy", "lines.npy", "borders.npy", "meta.json"])
def test_a_damaged_cache_is_made_anew(name, size, tmp_path, tokenizer):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    dataset = DPODataset(path, tokenizer, 128, tmp_path / "cache")
    rows = [dataset[index]["labels"].tolist() for index in range(len(dataset))]
    damaged = dataset.cache.folder / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(len(content) * size)]) if size != "gone" else damaged.unlink()
    dataset = DPODataset(path, tokenizer, 128, tmp_path / "cache")
    assert [dataset[index]["labels"].tolist() for index in range(len(dataset))] == rows
    assert damaged.stat().st_size == len(content)
    assert list((tmp_path / "cache").iterdir()) == [dataset.cache.folder]


@pytest.mark.parametrize("content", ["[]", "{}", '{"sizes": 5}', '{"sizes": {"ids.bin": "x"}}', "5"])
def test_meta_data_of_another_kind_is_made_anew(content, texts, tmp_path, tokenizer):
    cache = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache
    ids = cache.ids.tolist()
    (cache.folder / "meta.json").write_text(content)
    assert PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache.ids.tolist() == ids


def test_what_is_named_has_reached_the_disk(texts, tmp_path, tokenizer, monkeypatch):
    done = []
    fsync, rename = os.fsync, type(tmp_path).rename

    def note_fsync(number):
        fsync(number)
        done.append(os.fstat(number).st_ino)

    def note_rename(self, target):
        done.append("named")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(type(tmp_path), "rename", note_rename)
    folder = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache.folder
    before, after = done[: done.index("named")], done[done.index("named") + 1 :]
    files = ["ids.bin", "targets.bin", "bounds.npy", "lines.npy", "meta.json"]
    assert {(folder / name).stat().st_ino for name in files} < set(before)
    assert before[-1] == folder.stat().st_ino and (tmp_path / "cache").stat().st_ino in after


def test_a_file_that_changes_while_it_is_read_is_refused(texts, tmp_path, tokenizer, monkeypatch):
    whole, encode = texts.read_bytes(), token_cache.write_documents

    def write_while_somebody_appends(path, *args):
        with path.open("ab") as file:
            file.write(b'{"text": "one more"}\n')
        return encode(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_documents", write_while_somebody_appends)
        with pytest.raises(InputError, match="was changed while it was read") as error:
            PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    assert str(error.value).startswith(str(texts)) and list((tmp_path / "cache").iterdir()) == []
    texts.write_bytes(whole)
    assert len(PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache.bounds) == len(TEXTS) + 1


def test_two_processes_of_one_number_have_folders_of_their_own(texts, tmp_path, tokenizer, monkeypatch):
    """Two containers on one folder, each with its process 1: the first is still writing while the second begins."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    write, scratch = token_cache.write_documents, []

    def write_twice(path, used, folder, *args):
        scratch.append(folder)
        if len(scratch) == 1:
            PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
        return write(path, used, folder, *args)

    monkeypatch.setattr(token_cache, "write_documents", write_twice)
    dataset = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    assert len(set(scratch)) == 2 and len(dataset.cache.bounds) == len(TEXTS) + 1
    assert list((tmp_path / "cache").iterdir()) == [dataset.cache.folder]


def test_a_cache_damaged_while_another_is_made_is_replaced(texts, tmp_path, tokenizer, monkeypatch):
    write = token_cache.write_documents

    def write_and_damage(path, used, folder, *args):
        counts = write(path, used, folder, *args)
        shutil.copytree(folder, str(folder).split(".")[0])  # no meta data yet
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_documents", write_and_damage)
        dataset = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    assert token_cache.is_whole(dataset.cache.folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_tokenising_leaves_nothing_behind(number, code, texts, tmp_path, tokenizer, monkeypatch):
    def stopped(path, used, folder, *args):
        (folder / "ids.bin").write_bytes(b"half")
        signal.raise_signal(number)

    monkeypatch.setattr(token_cache, "write_documents", stopped)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script starts us with &
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: None, lambda args: PretrainDataset(texts, tokenizer, 64, tmp_path / "cache"))
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert ended.value.code == code and list((tmp_path / "cache").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("now", ["now", "by another clock"])
def test_what_a_killed_run_has_left_is_removed_after_a_day(now, texts, tmp_path, tokenizer, monkeypatch):
    """What is younger may be another machine's, which is writing it; its clock may differ from ours."""
    if now == "by another clock":
        monkeypatch.setattr("time.time", lambda: 4e9)
    cache, day = tmp_path / "cache", 24 * 3600
    old, young, grown = (cache / f"{number:032x}.{number:032x}.tmp" for number in range(3))
    for folder, age in (old, 1.1 * day), (young, 0.9 * day), (grown, 1.1 * day):
        folder.mkdir(parents=True)
        (folder / "ids.bin").write_bytes(b"half")
        made = folder.stat().st_mtime - age
        for path in (folder / "ids.bin", folder) if folder != grown else (folder,):
            os.utime(path, (made, made))
    others = cache / "mine.old.tmp", cache / f"{0:032x}"
    for path in others:
        path.mkdir()
        os.utime(path, (0, 0))
    folder = PretrainDataset(texts, tokenizer, 64, cache).cache.folder
    assert set(cache.iterdir()) == {young, grown, *others, folder}
    half = folder / f"rows_48_0.{0:032x}.tmp", folder / f"rows_48_1.{0:032x}.tmp"
    for path, made in zip(half, (1.0, folder.stat().st_mtime), strict=True):
        path.touch()
        os.utime(path, (made, made))
    PretrainDataset(texts, tokenizer, 48, cache)
    assert list(folder.glob("*.tmp")) == [half[1]]


# ----------------------------------------------------------------------------------------------------- rows packed once


def test_rows_are_packed_once(texts, tmp_path, tokenizer, monkeypatch):
    def opened(length=64, seed=0):
        dataset = PretrainDataset(texts, tokenizer, length, tmp_path / "cache", seed=seed)
        return [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]

    wanted = {settings: opened(*settings) for settings in ((64, 0), (64, 1), (48, 0))}
    (folder,) = (tmp_path / "cache").iterdir()
    assert len({str(rows) for rows in wanted.values()}) == 3
    assert len(list(folder.glob("rows_*"))) == 3 and not list(folder.glob("*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(lm_dataset, "pack_rows", None)
        assert {settings: opened(*settings) for settings in wanted} == wanted
    kept = folder / "rows_64_0.npy"
    for content in (b"", kept.read_bytes()[:-8], (folder / "lines.npy").read_bytes()):
        kept.write_bytes(content)
        assert opened() == wanted[64, 0]
    monkeypatch.setattr(token_cache, "flush", no_room)
    kept.unlink()
    assert opened() == wanted[64, 0] and not kept.exists() and not list(folder.glob("*.tmp"))


def no_room(path):
    raise OSError(errno.ENOSPC, "No space left on device")


# --------------------------------------------------------------------------------------------------------------- memory


def test_the_tokenizer_is_given_few_bytes_and_few_rows_at_a_time(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "ROWS_PER_READ", 4)
    monkeypatch.setattr(token_cache, "BYTES_PER_READ", 1000)
    lengths = [10] * 9 + [2000, 10, 300, 300, 300, 300, 300, 10]
    rows = [{"text": chr(97 + number) * length} for number, length in enumerate(lengths)]
    path = write_rows(tmp_path / "f.jsonl", rows)
    batches = list(token_cache.read_batches(path, token_cache.Reading()))
    assert [[number for number, _ in batch] for batch in batches] == [
        [1, 2, 3, 4], [5, 6, 7, 8], [9, 10], [11, 12, 13, 14], [15, 16, 17],
    ]  # fmt: skip
    dataset = PretrainDataset(path, tokenizer, 4096, tmp_path / "cache")
    texts = [tokenizer.decode(dataset.cache.ids[a:b], skip_special_tokens=True) for a, b in bounds_of(dataset)]
    assert texts == [row["text"] for row in rows] and dataset.cache.lines.tolist() == list(range(1, 18))


def bounds_of(dataset):
    return zip(dataset.cache.bounds[:-1], dataset.cache.bounds[1:], strict=True)


# --------------------------------------------------------------------------------------------------------- what is told


def test_meta_data_tell_what_was_cut(tmp_path, tokenizer):
    path = write_rows(tmp_path / "f.jsonl", [chat("a", "word " * 100), chat("a", "b"), chat("word " * 99, "b")])
    meta = json.loads((SFTDataset(path, tokenizer, 64, tmp_path / "cache").cache.folder / "meta.json").read_text())
    whole = SFTDataset(path, tokenizer, 512, tmp_path / "cache").cache
    assert (meta["documents"], meta["cut"], meta["skipped"]) == (2, 1, 1)
    assert meta["lost"] == int(np.diff(whole.bounds)[0]) - 64
    assert (whole.meta["cut"], whole.meta["lost"], whole.meta["skipped"]) == (0, 0, 0)
