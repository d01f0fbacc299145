"""Packing, caching, truncation and the refusal of bad rows."""

import json
from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset import lm_dataset
from dataset.chat import encode_conversation
from dataset.lm_dataset import (
    BLANK,
    DPODataset,
    PretrainDataset,
    SFTDataset,
    encode_texts,
    fit_conversation,
    pack_rows,
    sum_by_pair,
    token_byte_counts,
)
from dataset.rows import read_jsonl
from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import load_tokenizer
from model.model_minimind import MiniMindForCausalLM

TEXTS = [f"第{i}句话。" + "The quick brown fox jumps over the lazy dog. " * (i % 5) for i in range(40)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def chats(tmp_path):
    return write_rows(tmp_path / "chats.jsonl", [chat(f"问题{i}?", "答" * (i + 1)) for i in range(30)])


def documents_of(dataset):
    """All documents of an epoch as tuples of ids."""
    found = []
    for row in (dataset[i] for i in range(len(dataset))):
        for number in range(1, int(row["attention_mask"].max()) + 1):
            found.append(tuple(row["input_ids"][row["attention_mask"] == number].tolist()))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_once_in_each_epoch(texts, tmp_path, tokenizer, packing):
    dataset = PretrainDataset(texts, tokenizer, 256, tmp_path / "cache", packing)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    wanted = sorted((bos, *tokenizer(text, add_special_tokens=False).input_ids, eos) for text in TEXTS)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(documents_of(dataset))
        assert sorted(orders[-1]) == wanted
    assert orders[0] != orders[1]
    dataset.set_epoch(0)
    assert documents_of(dataset) == orders[0]


def test_long_document_is_cut_into_pieces_and_loses_nothing(texts, tmp_path, tokenizer):
    dataset = PretrainDataset(texts, tokenizer, 16, tmp_path / "cache")
    pieces = documents_of(dataset)
    assert max(map(len, pieces)) == 16
    assert sum(map(len, pieces)) == len(dataset.cache.ids)


def test_labels_of_a_pretraining_row(texts, tmp_path, tokenizer):
    dataset = PretrainDataset(texts, tokenizer, 128, tmp_path / "cache")
    for row in (dataset[i] for i in range(len(dataset))):
        mask, previous = row["attention_mask"], torch.nn.functional.pad(row["attention_mask"], (1, -1))
        target = (mask > 0) & (mask == previous)
        assert torch.equal(row["labels"], torch.where(target, row["input_ids"], -100))
        assert (row["input_ids"][mask == 0] == tokenizer.pad_token_id).all()


def test_labels_of_a_chat_row_are_those_of_the_conversation(chats, tmp_path, tokenizer):
    dataset = SFTDataset(chats, tokenizer, 64, tmp_path / "cache")
    wanted = {}
    for _, row in read_jsonl(chats):
        ids, labels, _ = encode_conversation(tokenizer, row["conversations"])
        wanted[tuple(ids)] = labels
    for row in (dataset[i] for i in range(len(dataset))):
        for number in range(1, int(row["attention_mask"].max()) + 1):
            inside = row["attention_mask"] == number
            assert row["labels"][inside].tolist() == wanted.pop(tuple(row["input_ids"][inside].tolist()))
    assert not wanted


def test_packed_row_has_the_losses_of_its_documents_alone(texts, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer))
    model = MiniMindForCausalLM(config).eval()
    dataset = PretrainDataset(texts, tokenizer, 128, tmp_path / "cache")
    row = next(row for row in (dataset[i] for i in range(len(dataset))) if row["attention_mask"].max() >= 3)
    with torch.no_grad():
        packed = model(**{key: value[None] for key, value in row.items()}).token_losses[0]
        for number in range(1, int(row["attention_mask"].max()) + 1):
            inside = row["attention_mask"] == number
            ids = row["input_ids"][inside][None]
            alone = model(ids, labels=ids).token_losses[0]
            torch.testing.assert_close(packed[inside], alone, atol=1e-5, rtol=1e-5)


def test_padding_is_under_three_percent(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    rows = [chat("问" * int(n), "答" * int(m)) for n, m in rng.integers(1, 60, (600, 2))]
    dataset = SFTDataset(write_rows(tmp_path / "f.jsonl", rows), tokenizer, 256, tmp_path / "cache")
    assert dataset.padding_share() < 0.03
    shares = [float((dataset[i]["attention_mask"] == 0).float().mean()) for i in range(len(dataset))]
    assert np.mean(shares) == pytest.approx(dataset.padding_share())


@pytest.mark.parametrize("low, high", [(1, 60), (20, 30), (60, 100), (100, 100), (1, 3)])
def test_packing_takes_each_piece_once_never_overfills_and_wastes_little(low, high):
    lengths = np.random.default_rng(1).integers(low, high + 1, 2000)
    rows = pack_rows(lengths, 100)
    assert sorted(piece for row in rows for piece in row) == list(range(2000))
    filled = [lengths[row].sum() for row in rows]
    assert max(filled) <= 100
    if low < 60:  # above, hardly two fit together
        assert len(rows) <= 1.02 * lengths.sum() / 100 + 1


def test_packing_finds_an_exact_fit():
    assert [sorted(row) for row in pack_rows(np.array([60, 50, 30, 40, 20]), 100)] == [[0, 3], [1, 2, 4]]


def test_conversation_is_cut_after_a_whole_exchange(tokenizer):
    turns = chat("一?", "甲乙丙")["conversations"] + chat("二?", "丁" * 300)["conversations"]
    encoded = encode_conversation(tokenizer, turns)
    kept = fit_conversation(encoded, len(encoded.ids) - 2)
    first, _, _ = encode_conversation(tokenizer, turns[:2])
    question_end = encoded.turn_ends[-2]  # the second question fits too and does no harm
    assert kept.ids in (first, encoded.ids[:question_end])
    assert kept.ids[: len(first)] == first and kept.is_target == [
        label != -100 for label in encoded.labels[: len(kept.ids)]
    ]


def test_an_exchange_that_fits_exactly_is_kept_whole(tokenizer):
    turns = chat("一?", "甲乙丙")["conversations"] + chat("三?", "戊己")["conversations"]
    alone = encode_conversation(tokenizer, turns)
    kept = fit_conversation(alone, len(alone.ids))
    assert (kept.ids, kept.lost) == (alone.ids, 0)
    assert [i for i, is_target in zip(kept.ids, kept.is_target, strict=True) if is_target][-1] == tokenizer.eos_token_id
    longer = encode_conversation(tokenizer, turns + chat("二" * 20 + "?", "丁" * 300)["conversations"])
    kept = fit_conversation(longer, len(alone.ids))
    assert (kept.ids, kept.lost) == (alone.ids, len(longer.ids) - len(alone.ids))


@pytest.mark.parametrize("more", [0, 1])
def test_an_exchange_that_fits_without_its_last_newline_is_kept(more, tokenizer):
    turns = chat("一?", "甲乙丙")["conversations"] + chat("三?", "戊己")["conversations"]
    whole = encode_conversation(tokenizer, turns)
    longer = encode_conversation(tokenizer, turns + more * chat("二?", "丁" * 300)["conversations"])
    kept = fit_conversation(longer, len(whole.ids) - 1)
    assert kept.ids == whole.ids[:-1] and kept.lost == len(longer.ids) - len(kept.ids)
    assert kept.ids[-1] == tokenizer.eos_token_id and kept.is_target == [label != -100 for label in whole.labels[:-1]]


def test_an_exchange_whose_answer_is_not_learned_is_not_the_last_one_kept_alone(tokenizer):
    first, second = chat("一?", "甲乙丙")["conversations"], chat("二?", "丁" * 300)["conversations"]
    first[1]["weight"] = 0
    encoded = encode_conversation(tokenizer, first + second)
    kept = fit_conversation(encoded, 64)
    assert len(kept.ids) == 64 and kept.is_target[-1] and not any(kept.is_target[: encoded.turn_ends[3]])
    assert fit_conversation(encoded, encoded.turn_ends[3]) is None


def test_cut_answers_are_told(tmp_path, tokenizer, capsys):
    long = "word " * 400
    chats = write_rows(tmp_path / "chats.jsonl", [chat(f"{i}?", long) for i in range(20)] + [chat("a", "b")])
    one = len(encode_conversation(tokenizer, chat("1?", long)["conversations"]).ids) - 128
    lost = 20 * one + 10  # a digit more in ten of the questions
    for _ in range(2):  # the second time from the cache
        SFTDataset(chats, tokenizer, 128, tmp_path / "cache")
        out, err = capsys.readouterr()
        assert f"{chats}: 20 of 21 rows are longer than 128 tokens and are cut: {lost:,} tokens are lost" in out
        assert err == "" and out.count("\n") == 1
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [pair("1?", long, "short"), pair("1?", "a", "b"), pair("1?", "a", long)]
    )
    DPODataset(pairs, tokenizer, 256, tmp_path / "cache")
    assert f"{pairs}: 2 of 3 rows are longer than 128 tokens and are cut: {2 * one:,} tokens" in capsys.readouterr().out
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": long}])
    PretrainDataset(texts, tokenizer, 128, tmp_path / "cache")  # in pieces: nothing is lost
    SFTDataset(chats, tokenizer, 1024, tmp_path / "cache")
    assert capsys.readouterr() == ("", "")


def test_an_answer_longer_than_a_row_keeps_its_beginning_without_an_end_token(tokenizer):
    encoded = encode_conversation(tokenizer, chat("一?", "丁" * 300)["conversations"])
    kept = fit_conversation(encoded, 64)
    assert len(kept.ids) == 64 and kept.is_target[-1] and kept.ids[-1] != tokenizer.eos_token_id
    assert fit_conversation(encode_conversation(tokenizer, chat("问" * 300, "丁")["conversations"]), 64) is None


def test_second_run_reads_the_cache(texts, tmp_path, tokenizer, monkeypatch):
    first = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    monkeypatch.setattr("dataset.token_cache.write_documents", None)
    second = PretrainDataset(texts, tokenizer, 64, tmp_path / "cache")
    assert np.array_equal(first.cache.ids, second.cache.ids)
    assert isinstance(second.cache.ids, np.memmap)


def test_changed_file_is_tokenised_anew(texts, tmp_path, tokenizer):
    before = len(PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache.ids)
    write_rows(texts, [{"text": "短"}])
    assert len(PretrainDataset(texts, tokenizer, 64, tmp_path / "cache").cache.ids) < before


def test_text_that_brings_its_own_end_tokens_gets_no_second_ones(tmp_path, tokenizer):
    path = write_rows(tmp_path / "f.jsonl", [{"text": "<|im_start|>你好<|im_end|>"}])
    ids = PretrainDataset(path, tokenizer, 64, tmp_path / "cache").cache.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 1


PIECES = [
    *"ab1你。!\t ", "\n", "\n", "\n\n", "a\nb", "\r\n", "  ", "\x1c", "\x85", "\u2028", "\u3000", " 42", "7", "'s",
    "人工", "<|im_end|>", "<|im_start|>", "<think>", "|>", " the", "    x",
]  # fmt: skip


@lru_cache
def tokenizers():
    """The shipped one, and one with entries of several blanks and newlines."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    texts = ["x\n\n\n\n\n  y\r\n\r\n\n", "a\n\n", "a \n \n \nb", "!\n.\n\t\t\n 人工\n"]
    inner.train_from_iterator(texts * 50, trainer)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return load_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.mark.parametrize("which", [0, 1])
@given(text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=40).map("".join), size=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_a_huge_text_is_tokenized_in_pieces_with_the_ids_of_the_whole(which, text, size):
    tokenizer, texts = tokenizers()[which], ["short", text, "x\ny" * 9]
    with mock.patch.object(lm_dataset, "PIECE", 1000):
        whole = encode_texts(tokenizer, texts)
    with mock.patch.object(lm_dataset, "PIECE", size):
        assert [list(document.ids) for document in encode_texts(tokenizer, texts)] == [d.ids for d in whole]


class Backend:
    """A tokenizer's, which notes what it is given at once."""

    def __init__(self, backend):
        self.backend, self.given = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **keys):
        self.given += texts
        return self.backend.encode_batch_fast(texts, **keys)


def test_a_huge_text_is_cut_only_at_single_newlines_in_a_line_of_words(monkeypatch):
    monkeypatch.setattr(lm_dataset, "PIECE", 4)
    backend = Backend(load_tokenizer().backend_tokenizer)
    list(lm_dataset.encode_plain(backend, ["a\nbcd\nef \ng\n\nhi\n j\nk\nlmnopq\nr"]))
    assert backend.given == ["a\nbcd", "\nef \ng\n\nhi\n j", "\nk\nlmnopq", "\nr"]


OTHERS = {
    "normalizer": lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
    "other words": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)),
    "blank in front": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(True)),
    "no bytes": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "takes blanks in": lambda backend: backend.add_tokens([AddedToken("<tag>", rstrip=True)]),
    "token of newlines": lambda backend: backend.add_tokens([AddedToken("a\nb")]),
    "cut short": lambda backend: backend.enable_truncation(3),
}


@pytest.mark.parametrize("change", OTHERS)
def test_other_tokenizers_are_given_a_huge_text_whole(change, monkeypatch):
    monkeypatch.setattr(lm_dataset, "PIECE", 4)
    backend = Backend(load_tokenizer().backend_tokenizer)
    OTHERS[change](backend.backend)
    list(lm_dataset.encode_plain(backend, ["a\nb\nc\nd\ne\nf"]))
    assert backend.given == ["a\nb\nc\nd\ne\nf"]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path, tokenizer):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    dataset = PretrainDataset(path, tokenizer, 64, tmp_path / "cache")
    assert len(dataset.cache.bounds) == 3
    assert dataset.describe(0) in (f"{path}:1, 4", f"{path}:4, 1")


BAD_PRETRAIN = {
    "half a line": (b'{"text": "ok"}\n{"text": "br', ":2", "not a whole JSON object"),
    "not utf-8": (b'{"text": "ok"}\n{"text": "\xff\xfe"}\n', ":2", "UTF-8"),
    "a list": (b'["text"]\n', ":1", "JSON object"),
    "null": (b"null\n", ":1", "JSON object"),
    "no text": (b'{"txt": "x"}\n', ":1", '"text"'),
    "text is a number": (b'{"text": 3}\n', ":1", '"text"'),
    "blank text": (b'{"text": "  "}\n', ":1", '"text"'),
    "empty file": (b"", "", "empty"),
    "only blank lines": (b"\n\n", "", "empty"),
}


@pytest.mark.parametrize("name", BAD_PRETRAIN)
def test_bad_pretraining_rows_are_named(name, tmp_path, tokenizer):
    content, line, words = BAD_PRETRAIN[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        PretrainDataset(path, tokenizer, 64, tmp_path / "cache")
    assert f"{path}{line}" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-made is left


BAD_CHATS = {
    "wrong role": {"conversations": [{"role": "robot", "content": "x"}]},
    "no assistant": {"conversations": [{"role": "user", "content": "x"}]},
    "no conversations": {"messages": []},
    "not a list": {"conversations": "x"},
    "content missing": {"conversations": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chat_rows_are_named(name, tmp_path, tokenizer):
    path = write_rows(tmp_path / "bad.jsonl", [chat("a", "b"), BAD_CHATS[name]])
    with pytest.raises(InputError) as error:
        SFTDataset(path, tokenizer, 64, tmp_path / "cache")
    assert str(error.value).startswith(f"{path}:2: ")


# ----------------------------------------------------------------------------------------------- pairs of answers


def pair(question, good, bad, *, before=()):
    """A preference row; before: turns of an earlier exchange."""
    asked = [*before, {"role": "user", "content": question}]
    return {
        side: [*asked, {"role": "assistant", "content": text}] for side, text in (("chosen", good), ("rejected", bad))
    }


EARLIER = chat("早?", "早!")["conversations"]
PAIRS = [pair(f"问题{i}?", "好" * (i % 7 + 1), f"No {i}. " * (i % 4 + 1), before=EARLIER * (i % 3)) for i in range(30)]


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [{**row, "answer": "ignored"} for row in PAIRS])


def documents_with_labels(row):
    """[(ids, labels), ...] of the documents of a packed row."""
    inside = [row["attention_mask"] == number for number in range(1, int(row["attention_mask"].max()) + 1)]
    return [(row["input_ids"][mask].tolist(), row["labels"][mask].tolist()) for mask in inside]


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_stay_together_and_only_their_answers_are_targets(packing, pairs, tmp_path, tokenizer):
    dataset = DPODataset(pairs, tokenizer, 192, tmp_path / "cache", packing)
    eos, seen, fullest = tokenizer.eos_token_id, [], 0
    for index in range(len(dataset)):
        documents = documents_with_labels(dataset[index])
        numbers = dataset.pieces_of(index)
        assert len(documents) == 2 * len(numbers)
        assert dataset.count_targets({"attention_mask": dataset[index]["attention_mask"][None]}) == len(numbers)
        fullest = max(fullest, len(numbers))
        for place, number in enumerate(numbers):
            row = PAIRS[dataset.piece_lines[number] - 1]
            seen.append(dataset.piece_lines[number] - 1)
            for side, (ids, labels) in zip(("chosen", "rejected"), documents[2 * place :], strict=False):
                assert ids == encode_conversation(tokenizer, row[side]).ids
                targets = [label for label in labels if label != -100]
                assert targets == [*tokenizer(row[side][-1]["content"], add_special_tokens=False).input_ids, eos]
                assert labels[-1 - len(targets) : -1] == targets  # one run, with the last newline behind it
    assert sorted(seen) == list(range(30)) and fullest == (2 if packing else 1)
    blank = dataset[BLANK]
    assert (
        not blank["attention_mask"].any()
        and dataset.count_targets({"attention_mask": blank["attention_mask"][None]}) == 0
    )


def test_positions_and_attention_of_a_pair_are_those_of_its_sides_alone(pairs, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer))
    model = MiniMindForCausalLM(config).eval()
    dataset = DPODataset(pairs, tokenizer, 192, tmp_path / "cache")
    row = next(row for row in (dataset[i] for i in range(len(dataset))) if row["attention_mask"].max() >= 4)
    with torch.no_grad():
        packed = model(**{key: value[None] for key, value in row.items()}).token_losses[0]
        for number, (ids, labels) in enumerate(documents_with_labels(row), start=1):
            alone = model(torch.tensor([ids]), labels=torch.tensor([labels])).token_losses[0]
            torch.testing.assert_close(packed[row["attention_mask"] == number], alone, atol=1e-5, rtol=1e-5)


def test_long_answers_are_cut_and_long_prompts_are_left_out(tmp_path, tokenizer, capsys):
    rows = [
        pair("一?", "丁" * 300, "短"),  # the answer is cut
        pair("问" * 300, "丁", "短"),  # no room for an answer
        pair("一?", "丁" * 300 + "甲", "丁" * 300 + "乙"),  # what is left of the answers is the same
        pair("二?", "甲", "乙"),
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    dataset = DPODataset(path, tokenizer, 128, tmp_path / "cache")
    assert (
        f"{path}: 2 pairs have no two different answers within 64 tokens each and are left out"
        in capsys.readouterr().out
    )
    assert dataset.cache.lines.tolist() == [1, 4] and int(dataset.cache.borders[0]) == 64
    ids, targets = dataset.cache.ids[:64], dataset.cache.targets[:64]
    assert targets[-1] and tokenizer.eos_token_id not in ids[targets]  # nobody learns to stop in mid-sentence
    prompt = encode_conversation(tokenizer, rows[0]["chosen"]).turn_ends[-2]
    assert not targets[:prompt].any()
    with pytest.raises(InputError, match="no row is left"):
        DPODataset(path, tokenizer, 16, tmp_path / "cache")


def test_pairs_are_read_from_the_cache(pairs, tmp_path, tokenizer, monkeypatch):
    first = DPODataset(pairs, tokenizer, 192, tmp_path / "cache")
    monkeypatch.setattr("dataset.token_cache.write_documents", None)
    second = DPODataset(pairs, tokenizer, 192, tmp_path / "cache")
    assert np.array_equal(first.cache.borders, second.cache.borders)
    assert torch.equal(first[0]["attention_mask"], second[0]["attention_mask"])


def test_sums_by_pair():
    documents = torch.tensor([[1, 1, 2, 3, 3, 4, 0], [1, 2, 2, 0, 0, 0, 0]])
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32, 99], [1, 2, 4, 99, 99, 99, 99]])
    assert sum_by_pair(values, documents).tolist() == [[[3, 4], [24, 32]], [[1, 6], [0, 0]]]
    assert sum_by_pair(values, torch.zeros(2, 7, dtype=torch.long)).shape == (2, 0, 2)


ASKED = {"role": "user", "content": "Hi?"}
BAD_PAIRS = {
    "another format": (chat("a", "b"), 'needs "chosen" and "rejected", this one has the keys'),
    "one side": ({"chosen": pair("a", "b", "c")["chosen"]}, 'needs "chosen" and "rejected"'),
    "no list": ({"chosen": "yes", "rejected": "no"}, "chosen: a conversation must be a list"),
    "wrong role": (
        {"chosen": pair("a", "b", "c")["chosen"], "rejected": [{"role": "king", "content": "x"}]},
        "rejected: turn 1 has the role 'king'",
    ),
    "empty answer": (pair("a", "b", ""), "rejected: turn 2 .assistant.: there is neither content nor a tool call"),
    "blank answer": (pair("a", " \n", "c"), "chosen: the last turn, the answer, is blank"),
    "prompt last": (
        {side: [*turns, ASKED] for side, turns in pair("a", "b", "c").items()},
        "chosen: the last turn is the user's, it must be the answer",
    ),
    "two prompts": (
        {"chosen": pair("a", "b", "c")["chosen"], "rejected": pair("A", "b", "c")["rejected"]},
        "differ before their last turn: give both the same prompt",
    ),
    "prompts of other lengths": (
        {"chosen": pair("a", "b", "c")["chosen"], "rejected": pair("a", "b", "c", before=EARLIER)["rejected"]},
        "differ before their last turn",
    ),
    "same answer": (pair("a", "b", "b"), "are the same answer: there is nothing to prefer"),
    "no text": ({"chosen": [{"role": "assistant", "content": 5}], "rejected": []}, "chosen: turn 1"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_named(name, tmp_path, tokenizer):
    row, words = BAD_PAIRS[name]
    path = write_rows(tmp_path / "bad.jsonl", [PAIRS[0], row])
    with pytest.raises(InputError, match=words) as error:
        DPODataset(path, tokenizer, 64, tmp_path / "cache")
    assert str(error.value).startswith(f"{path}:2: ")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_file_and_folder(tmp_path, tokenizer):
    with pytest.raises(InputError, match="does not exist"):
        PretrainDataset(tmp_path / "none.jsonl", tokenizer, 64, tmp_path)
    with pytest.raises(InputError, match="is a folder"):
        PretrainDataset(tmp_path, tokenizer, 64, tmp_path)


def test_token_bytes_add_up_to_the_text(tokenizer):
    text = "深度学习 deep learning 123 🙂\n<think>"
    counts = token_byte_counts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert counts[ids].sum() == len(text.encode())
    assert counts[tokenizer.all_special_ids].sum() == 0
