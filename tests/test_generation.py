"""The engine against one-at-a-time references and transformers' generate; text in pieces, traffic, limits."""

import math
import random
from collections import Counter
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import KINDS, SIZES, YARN, make_model, make_prompts, plain_distribution
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from model.decoder import Decoder
from model.errors import InputError, UsageError
from model.generation import Engine, Request, TextStream, sample_seed, token_bytes
from model.LMConfig import MiniMindConfig

# ------------------------------------------------------------------------------------------------- greedy, transformers


def transformers_greedy(model, prompts, new_tokens):
    """What generate says to a left-padded batch; each row up to its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=2)
    rows = model.generate(ids, attention_mask=mask, generation_config=generation_config)[:, width:].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


def test_greedy_equals_transformers(model):
    prompts = make_prompts(3, 25, 1, 60, 11)
    expected = transformers_greedy(model, prompts, 30)
    assert expected == [transformers_greedy(model, [prompt], 30)[0] for prompt in prompts]
    requests = [Request(prompt, temperature=0, max_new_tokens=30) for prompt in prompts]
    for engine in (Engine(model, max_batch=8), Engine(model, max_batch=2, prefill_chunk=7)):
        results = engine.generate(requests)
        assert [result.ids for result in results] == expected
        assert [result.finish_reason == "stop" for result in results] == [ids[-1] == 2 for ids in expected]
    assert [Engine(model).generate([request])[0].ids for request in requests] == expected


@pytest.mark.parametrize("yarn", [False, True])
def test_llama_folders_run_too(yarn):
    own = MiniMindConfig(**SIZES, **(YARN if yarn else {}))
    rope = {**(own.yarn_parameters() or {"rope_type": "default"}), "rope_theta": 1e4}
    sizes = {**SIZES, "intermediate_size": 96, "vocab_size": 211, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, initializer_range=0.25)).eval()
    prompts = make_prompts(50, 7)
    results = Engine(model).generate([Request(prompt, temperature=0, max_new_tokens=12) for prompt in prompts])
    assert [result.ids for result in results] == transformers_greedy(model, prompts, 12)


def test_greedy_logprobs_are_those_of_the_model(dense):
    (prompt,) = make_prompts(12)
    (result,) = Engine(dense).generate([Request(prompt, temperature=0, top_k=1, max_new_tokens=6, top_logprobs=3)])
    ids = torch.tensor([prompt + result.ids])
    logprobs = dense(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    expected = logprobs.gather(1, torch.tensor(result.ids)[:, None])[:, 0].tolist()
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert [[i for i, _ in row] for row in result.top_logprobs] == logprobs.topk(3).indices.tolist()
    assert [row[0][1] for row in result.top_logprobs] == pytest.approx(expected, abs=1e-4)


def test_refresh_takes_new_weights_over():
    model = make_model()
    engine = Engine(model)
    request = Request(make_prompts(9)[0], temperature=0, max_new_tokens=12)
    before = engine.generate([request])[0].ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    engine.refresh()
    after = engine.generate([request])[0].ids
    assert after != before and after == transformers_greedy(model, [request.prompt], 12)[0]


# ---------------------------------------------------------------------- one at a time, slow and obvious: the property

PIECES = ["a", "b", "ab", " ", "END", "你", "好", "😀", "é"]
TABLE = [b"", b"", b""] + [piece.encode() for piece in PIECES] + [bytes([byte]) for byte in "你😀".encode()]
TINY = {"vocab_size": len(TABLE), "max_position_embeddings": 64}


def plain_generate(model, request, index):
    """(ids, text, logprobs, finish_reason) of one sample, without cache, batch, or streaming."""
    numbers = random.Random(sample_seed(request.seed, index))
    ids, logprobs = [], []
    context = model.config.max_position_embeddings - len(request.prompt)
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt + ids])).logits[0, -1].tolist()
        probs = plain_distribution(logits, request, ids)
        u = numbers.getrandbits(52) / 2**52
        sums = list(accumulate(probs))
        token = next(i for i, total in enumerate(sums) if total > u * sums[-1])
        ids.append(token)
        logprobs.append(math.log(probs[token]))
        text = b"".join(TABLE[i] for i in ids).decode("utf-8", "replace")
        cuts = [text.find(stop) for stop in request.stop if stop in text]
        if token == 2 or cuts:
            return ids, text[: min(cuts)] if cuts else text, logprobs, "stop"
        if len(ids) == min(request.max_new_tokens, context):
            return ids, text, logprobs, "length"


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(3, len(TABLE) - 1), min_size=1, max_size=20),
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0, 0.7, 1.0, 1.6]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 1, 5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0, 0.5]),
    frequency_penalty=st.sampled_from([0, -0.3]),
    seed=st.integers(0, 9),
    n=st.sampled_from([1, 1, 2, 5]),
    stop=st.lists(st.sampled_from(["END", "ab", "你好", "a b", "😀"]), max_size=2, unique=True),
    top_logprobs=st.sampled_from([0, 2]),
)
arrivals = st.tuples(
    requests, st.integers(0, 10), st.none() | st.integers(0, 6)
)  # request, step, steps until cancelled


@pytest.fixture(scope="module", params=["dense", "moe"])
def tiny(request):
    return make_model(**{**TINY, **KINDS[request.param]})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(arrivals, min_size=1, max_size=6), st.integers(1, 4), st.sampled_from([1, 5, 16, 64]))
def test_any_traffic_equals_one_at_a_time(tiny, traffic, max_batch, prefill_chunk):
    engine = Engine(tiny, max_batch=max_batch, prefill_chunk=prefill_chunk)
    engine.table = TABLE
    handles, now = {}, 0
    while now <= 10 or any(not handle.done for handle in handles.values()):
        for number, (request, arrival, _) in enumerate(traffic):
            if now == arrival:
                handles[number] = engine.submit(request)
        for number, (_, arrival, patience) in enumerate(traffic):
            if patience is not None and now == arrival + patience:
                handles[number].cancel()
        engine.step()
        assert len(engine.active) <= max_batch and all(s.slot == i for i, s in enumerate(engine.active))
        now += 1
        assert now < 1000
    assert engine.step() is False
    for number, (request, _, _) in enumerate(traffic):
        handle = handles[number]
        texts = Counter()
        for index, result in enumerate(handle.results):
            ids, text, logprobs, reason = plain_generate(tiny, request, index)
            if result.finish_reason == "cancelled":
                assert result.ids == ids[: len(result.ids)] and text.startswith(result.text)
            else:
                assert (result.ids, result.text, result.finish_reason) == (ids, text, reason)
            if request.temperature:
                assert result.logprobs == pytest.approx(logprobs[: len(result.ids)], abs=1e-3)
            texts[index] = "".join(chunk.text for chunk in handle.chunks if chunk.index == index)
            assert texts[index] == result.text
            assert [chunk.id for chunk in handle.chunks if chunk.index == index] == result.ids


# ------------------------------------------------------------------------------------------------------------- text

SAMPLES = [
    "你好，世界！",
    "😀👩‍👩‍👧🏳️‍🌈",
    "龘靐齉𠮷𪚥",
    "naïve café ☕",
    "<think>\n想\n</think>\n\n<answer>42</answer>",
    "\u0000\x7f",
]


@pytest.fixture(scope="module")
def table(tokenizer):
    return token_bytes(tokenizer)


def stream_text(table, ids, stops=()):
    """Pieces as they are released."""
    stream, pieces = TextStream(stops), []
    for token in ids:
        if stream.feed(table[token]):
            break
        pieces.append(stream.release(final=False))
    return [*pieces, stream.release(final=True)]


@pytest.mark.parametrize("text", SAMPLES)
def test_streamed_characters_are_whole(text, table, tokenizer):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = stream_text(table, ids)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    for cut in range(len(ids)):  # ended in the middle of a character
        assert "".join(stream_text(table, ids[:cut])) == tokenizer.decode(ids[:cut])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6399), max_size=12))
def test_text_of_any_tokens_is_that_of_the_tokenizer(table, tokenizer, ids):
    assert "".join(stream_text(table, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_tags_show_and_control_tokens_do_not(table, tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool_call>", "<|im_end|>", "<|endoftext|>"])
    assert "".join(stream_text(table, ids)) == "<think></think><tool_call>"


@pytest.mark.parametrize(
    ("tokens", "stops", "text", "stopped"),
    [
        ([b"Hello E", b"N", b"D more"], ["END"], "Hello ", True),
        ([b"E", b"N", b"E", b"N", b"D"], ["END"], "EN", True),
        ([b"wait EN", b"T"], ["END"], "wait ENT", False),
        ([b"wait EN"], ["END"], "wait EN", False),
        ([b"x\n", b"\nUser:"], ["\nUser:", "\n\n"], "x", True),
        (["你".encode()[:2], "你".encode()[2:] + b"!"], ["你"], "", True),
        ([b"abc", "好".encode()[:1]], ["c好"], "abc\ufffd", False),
    ],
)
def test_stop_texts_across_tokens(tokens, stops, text, stopped):
    stream, released = TextStream(stops), []
    for token in tokens:
        if stream.feed(token):
            break
        released.append(stream.release(final=False))
        assert text.startswith("".join(released))
    released.append(stream.release(final=True))
    assert "".join(released) == text and stream.stopped is stopped


def test_a_stop_text_ends_the_reply(tokenizer):
    model = make_model(vocab_size=6400)
    engine = Engine(model, tokenizer)
    request = Request([5, 6, 7], seed=3, max_new_tokens=20, temperature=1.0)
    (free,) = engine.generate([request])
    stop = free.text[5:9]
    (result,) = engine.generate([Request([5, 6, 7], seed=3, max_new_tokens=20, stop=[stop])])
    assert result.text == free.text[: free.text.index(stop)] and result.finish_reason == "stop"
    assert result.ids == free.ids[: len(result.ids)] and len(result.ids) < len(free.ids)
    chunks = list(engine.stream(Request([5, 6, 7], seed=3, max_new_tokens=20, stop=[stop])))
    assert "".join(chunk.text for chunk in chunks) == result.text and chunks[-1].finish_reason == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


# -------------------------------------------------------------------------------------------- sharing, joining, leaving


@pytest.fixture
def forwards(monkeypatch):
    """(tokens being decoded, tokens of prompts) of every forward pass from here on."""
    calls, original = [], Decoder.__call__

    def counted(self, ids, slots, positions, decoding, segments):
        calls.append((decoding, sum(segment.stop - segment.start for segment in segments)))
        return original(self, ids, slots, positions, decoding, segments)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return calls


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_samples_share_the_prompt(max_batch, dense, forwards):
    (prompt,) = make_prompts(23)
    results = Engine(dense, max_batch=max_batch).generate([Request(prompt, n=5, seed=11, max_new_tokens=8)])
    assert sum(tokens for _, tokens in forwards) == len(prompt)
    seeds = [sample_seed(11, index) for index in range(5)]
    apart = [Engine(dense).generate([Request(prompt, seed=seed, max_new_tokens=8)])[0] for seed in seeds]
    assert [result.ids for result in results] == [result.ids for result in apart]
    assert len({tuple(result.ids) for result in results}) > 1


def test_a_long_prompt_does_not_stop_the_others(dense, forwards):
    engine = Engine(dense, max_batch=2, prefill_chunk=10)
    first = engine.submit(Request([5], max_new_tokens=100, stop_ids=()))
    engine.step()
    second = engine.submit(Request(make_prompts(95)[0], max_new_tokens=3, stop_ids=()))
    for _ in range(10):
        engine.step()
    assert len(first.results[0].ids) == 11 and len(second.results[0].ids) == 1
    assert max(tokens for _, tokens in forwards) == 10


def test_cancelling_frees_the_slot(dense):
    engine = Engine(dense, max_batch=1)
    first = engine.submit(Request([5], max_new_tokens=100, stop_ids=(), n=3))
    second = engine.submit(Request([6], max_new_tokens=2, stop_ids=()))
    third = engine.submit(Request([7], max_new_tokens=2, stop_ids=()))
    for _ in range(3):
        engine.step()
    first.cancel()
    third.cancel()
    assert first.done and [result.finish_reason for result in first.results] == ["cancelled"] * 3
    assert len(first.results[0].ids) == 3 and first.results[1].ids == []
    assert engine.step() and len(second.results[0].ids) == 1
    assert not engine.step() and second.results[0].finish_reason == "length"
    assert third.results[0].finish_reason == "cancelled" and not engine.active and not engine.waiting


def test_closing_a_stream_cancels_it(dense):
    engine = Engine(dense)
    stream = engine.stream(Request([5], max_new_tokens=100, stop_ids=()))
    next(stream)
    stream.close()
    assert engine.step() is False


def test_two_streams_at_once(dense):
    engine = Engine(dense)
    requests = [Request(prompt, seed=1, max_new_tokens=9) for prompt in make_prompts(4, 7)]
    streams = [engine.stream(request) for request in requests]
    ids = [[chunk.id for chunk in pair] for pair in zip(*streams, strict=False)]
    apart = [engine.generate([request])[0].ids for request in requests]
    assert [list(column) for column in zip(*ids, strict=True)] == [row[: len(ids)] for row in apart]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_broken_weights_end_in_a_sentence(temperature):
    model = make_model()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="NaN"):
        Engine(model).generate([Request([5], temperature=temperature)])


@pytest.mark.parametrize("ends", [[2, 17], [17, 2], 17, None])
def test_every_end_token_of_a_list_ends_a_reply(ends):
    model = make_model()
    (free,) = Engine(model).generate([Request([5], seed=1, max_new_tokens=40, temperature=3.0, stop_ids=())])
    first, second = free.ids[7], free.ids[11]
    assert free.ids.index(first) == 7 and free.ids.index(second) == 11
    chosen = {2: second, 17: first}
    model.config.eos_token_id = [chosen[end] for end in ends] if isinstance(ends, list) else chosen.get(ends)
    (result,) = Engine(model).generate([Request([5], seed=1, max_new_tokens=40, temperature=3.0)])
    assert len(result.ids) == (40 if ends is None else 8)
    assert result.finish_reason == ("length" if ends is None else "stop")


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_an_exception_leaves_no_request_behind(how, monkeypatch):
    """Of a step in the middle, with one running, one waiting; the next call has its slot and the same answer."""
    engine, request = Engine(make_model(), max_batch=1), Request([5, 6], seed=1, max_new_tokens=6, stop_ids=())
    (expected,) = engine.generate([request])
    calls, forward = [], Decoder.__call__

    def broken(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate([request, request, Request([7], n=3)]) if how == "generate" else list(
                engine.stream(request)
            )
    assert engine.step() is False and not engine.active and not engine.waiting
    assert engine.generate([request]) == [expected]


@pytest.mark.parametrize(("cut", "most"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1), ({}, 5)])
def test_what_cannot_be_drawn_is_no_alternative(cut, most, dense):
    """JSON knows no -inf, and the tokens that were cut off are none of the likeliest."""
    (result,) = Engine(dense).generate([Request([5], seed=1, max_new_tokens=6, top_logprobs=5, **cut)])
    assert [len(row) for row in result.top_logprobs] == [most] * len(result.ids)
    assert all(math.isfinite(value) for row in result.top_logprobs for _, value in row)
    for token, row in zip(result.ids, result.top_logprobs, strict=True):
        assert most == 5 or token in dict(row)


def test_a_tiny_temperature_is_greedy(dense):
    greedy, tiny = Engine(dense).generate([Request([5], temperature=t, max_new_tokens=9) for t in (0, 1e-38)])
    assert greedy == tiny


def test_seedless_requests_differ(dense):
    results = Engine(dense).generate([Request([5], max_new_tokens=12, temperature=2.0) for _ in range(3)])
    assert len({tuple(result.ids) for result in results}) == 3


# --------------------------------------------------------------------------------------------------------------- limits


def test_replies_end_with_the_context(dense):
    engine = Engine(dense, context=20)
    for wanted in (None, 500):
        (result,) = engine.generate([Request(make_prompts(15)[0], max_new_tokens=wanted, stop_ids=())])
        assert len(result.ids) == 5 and result.finish_reason == "length"


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ({"prompt": []}, InputError, "empty"),
        ({"prompt": [1] * 20}, InputError, "20 tokens.*context of 20: shorten it, or leave out its oldest messages"),
        ({"prompt": [211]}, InputError, "vocabulary of 211"),
        ({"prompt": [-1]}, InputError, "vocabulary"),
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"temperature": -0.1}, UsageError, "temperature"),
        ({"temperature": math.nan}, UsageError, "temperature"),
        ({"temperature": "hot"}, UsageError, "temperature"),
        ({"top_p": 1.1}, UsageError, "top_p must be a number from 0 to 1, not 1.1"),
        ({"top_k": -1}, UsageError, "top_k"),
        ({"top_k": 2.5}, UsageError, "top_k"),
        ({"min_p": 2}, UsageError, "min_p"),
        ({"repetition_penalty": 0}, UsageError, "repetition_penalty"),
        ({"presence_penalty": math.inf}, UsageError, "presence_penalty"),
        ({"n": 0}, UsageError, "n must be"),
        ({"n": True}, UsageError, "n must be"),
        ({"seed": "x"}, UsageError, "seed"),
        ({"top_logprobs": -1}, UsageError, "top_logprobs"),
        ({"stop": "END"}, UsageError, "stop must be a list"),
        ({"stop": [""]}, UsageError, "stop must be a list"),
        ({"stop": ["END"]}, UsageError, "tokenizer"),
    ],
)
def test_bad_requests_get_one_sentence(wanted, error, words, dense):
    engine = Engine(dense, context=20)
    good = Request([1], max_new_tokens=1)
    with pytest.raises(error, match=words) as caught:
        engine.generate([good, Request(**{"prompt": [1], **wanted})])
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert not engine.waiting and engine.step() is False


def test_bad_engines():
    with pytest.raises(UsageError, match="int8"):
        Engine(make_model(), quantize="int4")
    biased = LlamaConfig(**SIZES, intermediate_size=96, vocab_size=211, attention_bias=True)
    with pytest.raises(UsageError, match="plain Llamas"):
        Engine(LlamaForCausalLM(biased))
