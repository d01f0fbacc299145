"""The decoder: the model's logits from packed weights, a ragged batch, int8, recorded steps."""

import pytest
import torch
import torch.nn.functional as F
from small_engine import KINDS, make_model, make_prompts

from model import decoder
from model.decoder import Decoder, Int8Linear, Segment, pack
from model.generation import Engine, Request


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(**KINDS[request.param])


@pytest.fixture(scope="module")
def dense():
    return make_model()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_gives_the_logits_of_the_model(kind, half):
    """A prompt in pieces, then token by token beside another sequence, far beyond the length YaRN starts from."""
    model = make_model(half=half, **KINDS[kind])
    long, short = make_prompts(150, 40)
    expected = [model(torch.tensor([ids])).logits[0] for ids in (long, short)]
    with torch.inference_mode():
        arranged = Decoder(model, None)
        arranged.reserve(2, 10)  # grows below
        first = arranged(long[:10], [0] * 10, list(range(10)), 0, [Segment(0, 0, 10)])
        arranged.reserve(2, 160)
        both = arranged(
            long[10:120] + short[:25],
            [0] * 110 + [1] * 25,
            [*range(10, 120), *range(25)],
            0,
            [Segment(0, 10, 120), Segment(1, 0, 25)],
        )
        torch.testing.assert_close(first[0], expected[0][9], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(both, torch.stack([expected[0][119], expected[1][24]]), atol=2e-4, rtol=1e-4)
        for i in range(15):
            logits = arranged([long[120 + i], short[25 + i]], [0, 1], [120 + i, 25 + i], 2, [])
            wanted = torch.stack([expected[0][120 + i], expected[1][25 + i]])
            torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


def test_half_precision_model_is_computed_in_float32(dense):
    """A bfloat16 model on a CPU: the decoder is nearer to its exact logits than its own forward."""
    model = make_model().bfloat16()
    exact = make_model()
    exact.load_state_dict(model.state_dict())
    (prompt,) = make_prompts(30)
    wanted = exact(torch.tensor([prompt])).logits[0, -1]
    with torch.inference_mode():
        arranged = Decoder(model, None)
        arranged.reserve(1, 30)
        logits = arranged(prompt, [0] * 30, list(range(30)), 0, [Segment(0, 0, 30)])[0]
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


def test_int8_products_are_near_and_know_no_neighbours():
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64) * 0.02, torch.randn(7, 64) * torch.logspace(-3, 2, 7)[:, None]
    product = Int8Linear(weight)
    exact = F.linear(x, weight)
    error = (product(x) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.02
    assert torch.equal(torch.cat([product(row[None]) for row in x]), product(x))
    assert torch.equal(product(torch.zeros(1, 64)), torch.zeros(1, 96))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_int8_engine_follows_the_exact_one(kind):
    """The logits stay near those of the exact weights, and no sequence changes with its neighbours."""
    model = make_model(**KINDS[kind])
    (prompt,) = make_prompts(40)
    expected = model(torch.tensor([prompt])).logits[0, -1]
    with torch.inference_mode():
        arranged = Decoder(model, "int8")
        arranged.reserve(1, 40)
        logits = arranged(prompt, [0] * 40, list(range(40)), 0, [Segment(0, 0, 40)])[0]
    assert F.cosine_similarity(logits, expected, dim=0) > 0.98
    requests = [Request(p, max_new_tokens=12, seed=i) for i, p in enumerate(make_prompts(5, 30, 1, 9))]
    alone = [Engine(model, max_batch=1, quantize="int8").generate([request])[0].ids for request in requests]
    together = Engine(model, max_batch=3, quantize="int8", prefill_chunk=8).generate(requests)
    assert [result.ids for result in together] == alone


def test_products_keep_float32_weights_that_float16_cannot_hold():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32), torch.randn(5, 32)
    assert torch.equal(pack(weight, None)(x), F.linear(x, weight))
    halved = weight.half().float()
    torch.testing.assert_close(pack(halved, None)(x), F.linear(x, halved), atol=1e-5, rtol=1e-5)


def test_steps_in_recorded_shapes(model, monkeypatch):
    """What CUDA graphs rely on, here without CUDA: rows and spans rounded up, buffers filled anew, scratch rows."""

    shapes = []

    def record(run, device, pool):
        result = run()
        shapes.append(run.args[3:5])
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(decoder, "record", record)
    lengths = {3: 60, 70: 90, 1: 30}
    requests = [
        Request(prompt, temperature=0, max_new_tokens=lengths[len(prompt)], stop_ids=())
        for prompt in make_prompts(*lengths)
    ]
    plain, graphed = Engine(model, max_batch=3, prefill_chunk=40), Engine(model, max_batch=3, prefill_chunk=40)
    graphed.decoder.graphed = True
    expected = [result.ids for result in plain.generate(requests)]
    assert [result.ids for result in graphed.generate(requests)] == expected
    assert {rows for rows, _ in shapes} == {1, 2, 4} and {span for _, span in shapes} == {128, 256}
