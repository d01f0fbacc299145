"""JSON lines -> token cache on disk -> packed rows with document isolation.

A file is validated and tokenised once (token_cache.py). Whole documents are packed into rows of max_seq_len tokens; a
document is cut only where it is longer than a row.

Shapes: T tokens in a row. A row is {"input_ids": (T,), "labels": (T,), "attention_mask": (T,)}, int64:
labels are unshifted and -100 where nothing is to be predicted (padding, prompts, the first token of a document);
attention_mask is 0 on padding and k = 1, 2, ... on the k-th document of the row, which sees itself alone and whose
positions start at 0.
"""

import re
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch.utils.data import Dataset

from dataset.chat import EncodedConversation, chat_template, encode_conversations, encode_prompt
from dataset.rows import (
    note_unread,
    read_jsonl,
    row_answer,
    row_conversation,
    row_pair,
    row_prompt,
    row_text,
    tell_unread,
)
from dataset.token_cache import Encoded, TokenCache, tokenize_file
from dataset.token_cache import file_hash as file_hash  # also found here
from model.errors import InputError

IGNORED = -100
PIECE = 1 << 18  # characters of a text that the tokenizer is given at once; it takes 100 times the bytes
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
BLANK = -1  # number of a row of padding, for a process that has no row left in a step


def encode_texts(tokenizer, texts: list[str]) -> list[Encoded]:
    """Pretraining documents: <|im_start|> text <|im_end|>, each once even where the text brings its own."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = []
    for ids in encode_plain(tokenizer.backend_tokenizer, texts):
        if list(ids[:1]) != [bos]:
            ids.insert(0, bos)
        if ids[-1] != eos:
            ids.append(eos)
        documents.append(Encoded(ids, None))
    return documents


def encode_plain(backend: Tokenizer, texts: list[str]) -> Iterator[list[int] | array]:
    """The ids of each text. One that is longer than PIECE is tokenized in pieces, where the ids are the same."""
    if max(map(len, texts)) <= PIECE or not parts_at_line_ends(backend):
        yield from (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
        return
    for text in texts:
        ids, begin = array("I"), 0
        while begin < len(text):
            cut = LINE_END.search(text, begin + PIECE)
            end = cut.start() if cut else len(text)
            ids.extend(backend.encode_batch_fast([text[begin:end]], add_special_tokens=False)[0].ids)
            begin = end
        yield ids


def parts_at_line_ends(backend: Tokenizer) -> bool:
    """Whether no token reaches over a single newline between two other characters, and none knows what is beyond it.

    It is so of GPT-2's splitting into words, as long as no added token takes blanks or newlines in.
    """
    words, added = backend.pre_tokenizer, backend.get_added_tokens_decoder().values()
    return (
        isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex and not words.add_prefix_space
        and backend.normalizer is None and backend.truncation is None and backend.padding is None
        and not any(token.lstrip or token.rstrip or "\n" in token.content for token in added)
    )  # fmt: skip


def fit_conversation(encoded: EncodedConversation, max_seq_len: int) -> Encoded | None:
    """Cut a conversation to max_seq_len tokens: after its last whole exchange that fits, else inside its first answer.

    A turn fits without the newline behind its end token. An answer that is cut has no end token, so that nobody learns
    to stop in mid-sentence. None if no target is left.
    """
    ids, is_target = encoded.ids, [label != IGNORED for label in encoded.labels]
    if len(ids) > max_seq_len and any(is_target):
        first = next(end for end in encoded.turn_ends if any(is_target[:end]))  # of the turns that are learned
        newline = is_target[:first][::-1].index(True)
        cut = max((end for end in encoded.turn_ends if first <= end <= max_seq_len + newline), default=max_seq_len)
        ids, is_target = ids[: min(cut, max_seq_len)], is_target[: min(cut, max_seq_len)]
    return Encoded(ids, is_target, lost=len(encoded.ids) - len(ids)) if any(is_target) else None


def encode_chats(tokenizer, conversations: list[list[dict]], max_seq_len: int) -> list[Encoded | None]:
    """Conversations rendered by the chat template, cut to max_seq_len; the targets are the assistant's words."""
    return [fit_conversation(encoded, max_seq_len) for encoded in encode_conversations(tokenizer, conversations)]


def fit_answer(encoded: EncodedConversation, limit: int) -> Encoded | None:
    """A conversation whose last turn alone is the target, cut to `limit` tokens in it; None if none of it is left."""
    begin = encoded.turn_ends[-2]  # the default system turn is written too, so there are at least three
    is_target = [place >= begin and label != IGNORED for place, label in enumerate(encoded.labels)][:limit]
    lost = max(len(encoded.ids) - limit, 0)
    return Encoded(encoded.ids[:limit], is_target, lost=lost) if any(is_target) else None


def encode_pairs(tokenizer, pairs: list[tuple[list[dict], list[dict]]], max_seq_len: int) -> list[Encoded | None]:
    """Chosen and rejected conversation behind one another, each cut to half a row; the targets are their last turns.

    None where the prompt leaves no room for an answer, or where what is left of the two answers is the same.
    """
    encoded = encode_conversations(tokenizer, [conversation for pair in pairs for conversation in pair])
    sides = [fit_answer(conversation, max_seq_len // 2) for conversation in encoded]
    return [
        join_pair(chosen, rejected) if chosen and rejected and chosen.ids != rejected.ids else None
        for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)
    ]


def join_pair(chosen: Encoded, rejected: Encoded) -> Encoded:
    """Two answers as one document."""
    ids, is_target = chosen.ids + rejected.ids, chosen.is_target + rejected.is_target
    return Encoded(ids, is_target, len(chosen.ids), chosen.lost + rejected.lost)


def pack_rows(lengths: np.ndarray, capacity: int, window: int = 128) -> list[list[int]]:
    """Bin packing: lengths (n,), none above capacity -> the numbers of the pieces of each row.

    A row takes the piece that has waited longest, then the subset of the next `window` waiting pieces that fills it
    best: a subset-sum whose reachable sums are the bits of one integer. Time grows with n alone, and the rows come
    out as mixed as the pieces went in.
    """
    sizes, rows = lengths.tolist(), []
    coming = iter(range(len(sizes)))
    waiting = list(islice(coming, window))
    while waiting:
        reachable = [1 << sizes[waiting[0]]]  # bit s of reachable[j]: some subset of waiting[:j + 1] sums to s
        for piece in waiting[1:]:
            if reachable[-1] >> capacity:  # an exact fit
                break
            sums = reachable[-1] | reachable[-1] << sizes[piece]
            reachable.append(sums & ((2 << capacity) - 1))
        total, taken = reachable[-1].bit_length() - 1, []
        for place in range(len(reachable) - 1, 0, -1):
            if not reachable[place - 1] >> total & 1:
                total -= sizes[waiting[place]]
                taken.append(waiting.pop(place))
        rows.append([waiting.pop(0), *reversed(taken)])
        waiting += islice(coming, window - len(waiting))
    return rows


def arrange_rows(lengths: np.ndarray, capacity: int, packing: bool, seed: int) -> np.ndarray:
    """Pieces of these lengths (n,), mixed, row after row, and the row that each is in: (2, n)."""
    shuffled = np.random.default_rng([seed]).permutation(len(lengths))
    if not packing:
        return np.stack([shuffled, np.arange(len(lengths))])
    rows = pack_rows(lengths[shuffled], capacity)
    pieces = shuffled[np.fromiter(chain.from_iterable(rows), np.int64)]
    return np.stack([pieces, np.repeat(np.arange(len(rows)), [len(row) for row in rows])])


class PackedDataset(Dataset):
    """Rows of max_seq_len tokens from a token cache, in an order that set_epoch draws from (seed, epoch).

    packing=False gives one document a row, padded to max_seq_len: the plain way, kept to compare with.
    """

    def __init__(self, cache: TokenCache, max_seq_len: int, pad_id: int, packing: bool = True, seed: int = 0):
        self.cache, self.max_seq_len, self.pad_id, self.packing, self.seed = cache, max_seq_len, pad_id, packing, seed
        # A document longer than a row is cut into pieces of max_seq_len: starts and lengths of all pieces, (pieces,).
        lengths = np.diff(cache.bounds)
        per_document = -(-lengths // max_seq_len)
        document = np.repeat(np.arange(len(lengths)), per_document)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        self.piece_lines = cache.lines[document]
        self.piece_starts = cache.bounds[:-1][document] + nth * max_seq_len
        self.piece_lengths = np.minimum(lengths[document] - nth * max_seq_len, max_seq_len)
        arrange = partial(arrange_rows, self.piece_lengths, max_seq_len, packing, seed)
        kept = partial(cache.kept, f"rows_{max_seq_len}_{seed}", (2, len(document)), arrange)  # packing takes its time
        self.pieces, row = kept() if packing else arrange()  # piece numbers, row after row
        self.row_bounds = np.searchsorted(row, np.arange(row[-1] + 2))
        self.set_epoch(0)

    def tell(self, left_out: str = "", limit: int = 0) -> None:
        """Say what of the file is not learned: documents left out, cut at the limit, keys that nobody reads."""
        path, meta = self.data_path, self.cache.meta
        if meta["skipped"]:
            print(f"{path}: {meta['skipped']:,} {left_out} and are left out")
        if meta["cut"]:
            print(
                f"{path}: {meta['cut']:,} of {meta['documents']:,} rows are longer than {limit} tokens and are cut: "
                f"{meta['lost']:,} tokens are lost, a larger --max_seq_len keeps them"
            )
        tell_unread(path, meta["unread"])

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of the rows. What shares a row stays: documents do not see each other."""
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self))

    def pieces_of(self, index: int) -> np.ndarray:
        """The numbers of the pieces in the index-th row of this epoch."""
        row = self.order[index]
        return self.pieces[self.row_bounds[row] : self.row_bounds[row + 1]]

    def __len__(self) -> int:
        return len(self.row_bounds) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = np.full(self.max_seq_len, self.pad_id, np.int64)
        labels = np.full(self.max_seq_len, IGNORED, np.int64)
        attention_mask = np.zeros(self.max_seq_len, np.int64)
        begin = 0
        for number, piece in enumerate(self.pieces_of(index) if index != BLANK else (), start=1):
            source = slice(self.piece_starts[piece], self.piece_starts[piece] + self.piece_lengths[piece])
            place = slice(begin, begin + self.piece_lengths[piece])
            input_ids[place] = self.cache.ids[source]
            targets = True if self.cache.targets is None else self.cache.targets[source]
            labels[place] = np.where(targets, input_ids[place], IGNORED)
            labels[begin] = IGNORED  # nothing stands before it
            attention_mask[place] = number
            begin = place.stop
        row = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def count_targets(self, batch: dict[str, torch.Tensor]) -> float:
        """What the loss of these rows is a sum over, to be divided by the sum of a whole step."""
        return int((batch["labels"] != IGNORED).sum())

    def padding_share(self) -> float:
        """Share of the tokens of an epoch that are padding."""
        return 1 - self.piece_lengths.sum() / (len(self) * self.max_seq_len)

    def tokens_per_row(self) -> float:
        """Real tokens of a row, on average."""
        return self.max_seq_len * (1 - self.padding_share())

    def summary(self) -> str:
        """What a run says of its data before it starts."""
        size = f"{len(self.cache.ids):,} tokens in {len(self):,} rows of {self.max_seq_len}"
        return f"{size} ({self.padding_share():.1%} padding)"

    def describe(self, index: int) -> str:
        """Where the documents of a row come from: "file:line, line"."""
        lines = dict.fromkeys(self.piece_lines[self.pieces_of(index)].tolist())
        return f"{self.data_path}:" + ", ".join(map(str, lines))

    @property
    def data_path(self) -> str:
        return str(self.cache.path)

    @property
    def data_hash(self) -> str:
        return self.cache.meta["data_hash"]


class PretrainDataset(PackedDataset):
    """{"text": ...} rows; every token but a document's first is a target."""

    def __init__(self, path, tokenizer, max_seq_len: int, cache_dir, packing: bool = True, seed: int = 0):
        cache = tokenize_file(Path(path), tokenizer, Path(cache_dir), "pretrain", row_text, encode_texts, masked=False)
        super().__init__(cache, max_seq_len, tokenizer.pad_token_id, packing, seed)
        self.tell()


class SFTDataset(PackedDataset):
    """{"conversations": ...} rows; the targets are the assistant's turns with their end tokens."""

    def __init__(self, path, tokenizer, max_seq_len: int, cache_dir, packing: bool = True, seed: int = 0):
        def encode(tokenizer, conversations):
            return encode_chats(tokenizer, conversations, max_seq_len)

        settings = f"sft {max_seq_len} {chat_template()}"
        cache = tokenize_file(Path(path), tokenizer, Path(cache_dir), settings, row_conversation, encode, masked=True)
        super().__init__(cache, max_seq_len, tokenizer.pad_token_id, packing, seed)
        self.tell(f"conversations have no answer within {max_seq_len} tokens", max_seq_len)


class DPODataset(PackedDataset):
    """{"chosen": ..., "rejected": ...} rows; the targets are the two answers, each in a document of its own.

    A pair stays in one row: the i-th one is the documents 2i - 1 (chosen) and 2i (rejected), i = 1, 2, ... Where
    `reference` is set, the log-probabilities (pairs, 2) float32 of the two answers under a frozen model, a row holds
    them too: "reference" (T,) float32, at the first token of each document and 0 elsewhere.
    """

    def __init__(self, path, tokenizer, max_seq_len: int, cache_dir, packing: bool = True, seed: int = 0):
        def encode(tokenizer, pairs):
            return encode_pairs(tokenizer, pairs, max_seq_len)

        self.reference: np.ndarray | None = None
        settings = f"dpo {max_seq_len} {chat_template()}"
        cache = tokenize_file(Path(path), tokenizer, Path(cache_dir), settings, row_pair, encode, masked=True)
        super().__init__(cache, max_seq_len, tokenizer.pad_token_id, packing, seed)
        half = max_seq_len // 2
        self.tell(f"pairs have no two different answers within {half} tokens each", half)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        documents, begin = row["attention_mask"], 0
        documents *= 2
        reference = torch.zeros(self.max_seq_len)
        for pair in self.pieces_of(index) if index != BLANK else ():
            border = begin + int(self.cache.borders[pair])
            documents[begin:border] -= 1
            if self.reference is not None:
                reference[begin], reference[border] = self.reference[pair].tolist()
            begin += int(self.piece_lengths[pair])
        return row if self.reference is None else row | {"reference": reference}

    def count_targets(self, batch: dict[str, torch.Tensor]) -> int:
        """Pairs in these rows."""
        return int(batch["attention_mask"].amax(1).sum()) // 2


def sum_by_pair(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Sums over the documents of pairs: values (B, T), documents (B, T) numbered 1, 2, ... -> (B, P, 2).

    P: pairs in the fullest of the rows; a row with fewer has zeros behind them.
    """
    sums = values.new_zeros(len(values), int(documents.max()) + 1)
    return sums.scatter_add(1, documents, values)[:, 1:].unflatten(1, (-1, 2))


class RLAIFDataset(Dataset):
    """Prompts to sample replies to: {"conversations": ..., "answer": ...} rows; the last assistant turn is ignored.

    Prompt i has turns[i], ids[i] (opened for the reply) and answers[i], None where nothing can be verified. A row of
    the dataset is a prompt in the order of the epoch, padding on its left: {"input_ids": (T,), "attention_mask": (T,),
    "prompt": its number, -1 in a BLANK one}. left_out: the lines of prompts that are too long.
    """

    eval_rows_at_once = 64  # sampling is faster with many

    def __init__(
        self, path, tokenizer, max_seq_len: int, cache_dir=None, packing: bool = True, seed: int = 0, reply: int = 0
    ):
        """max_seq_len: of a prompt and its reply of `reply` tokens; longer prompts are left out."""
        room = max_seq_len - reply
        self.data_path, self.data_hash, self.seed, self.pad_id = (
            str(path),
            file_hash(path),
            seed,
            tokenizer.pad_token_id,
        )
        rows, unread = [], {}
        for line, row in read_jsonl(path):
            rows.append((line, row_prompt(row, f"{path}:{line}"), row_answer(row, f"{path}:{line}")))
            note_unread(unread, row, row_prompt, line)
        encoded = [(line, turns, answer, encode_prompt(tokenizer, turns)) for line, turns, answer in rows]
        kept = [row for row in encoded if len(row[3]) <= room]
        if not kept:
            raise InputError(
                f"{path}: every prompt is longer than {room} tokens, what --max_seq_len leaves beside the reply"
            )
        self.lines, self.turns, self.answers, self.ids = (list(column) for column in zip(*kept, strict=True))
        self.left_out = [line for line, *_, ids in encoded if len(ids) > room]
        if self.left_out:
            print(f"{path}: left out {len(self.left_out):,} prompts of more than {room} tokens")
        tell_unread(path, unread)
        self.longest = max(map(len, self.ids))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The order of the prompts: another one in each epoch, the same whenever it is asked for."""
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = int(self.order[index]) if index != BLANK else -1
        ids = self.ids[number] if index != BLANK else []
        input_ids = torch.tensor([self.pad_id] * (self.longest - len(ids)) + ids)
        attention_mask = (torch.arange(self.longest) >= self.longest - len(ids)).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "prompt": torch.tensor(number)}

    def count_targets(self, batch: dict[str, torch.Tensor]) -> int:
        """Prompts in these rows."""
        return int((batch["prompt"] >= 0).sum())

    def tokens_per_row(self) -> float:
        """Tokens of a prompt, on average."""
        return sum(map(len, self.ids)) / len(self)

    def summary(self) -> str:
        """What a run says of its data before it starts."""
        verifiable = sum(answer is not None for answer in self.answers)
        return f"{len(self):,} prompts, {verifiable:,} with an answer to verify"

    def describe(self, index: int) -> str:
        """Where a prompt comes from: file:line."""
        return f"{self.data_path}:{self.lines[self.order[index]]}"


def token_byte_counts(tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for, (V,) int64; special tokens stand for none.

    In a byte-level vocabulary each character of a token's name is one byte.
    """
    special = set(tokenizer.all_special_ids)
    added = tokenizer.get_added_vocab()
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            counts[index] = len(token.encode()) if token in added else len(token)
    return counts
