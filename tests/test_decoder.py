"""The decoder: the model's logits from packed weights, a ragged batch, int8, recorded steps."""

import pytest
import torch
import torch.nn.functional as F
from small_engine import KINDS, SIZES, YARN, make_model, make_prompts
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM, LlamaConfig, LlamaForCausalLM

from model import decoder
from model.decoder import Decoder, Int8Linear, Segment, pack
from model.errors import UsageError
from model.foreign import as_minimind, to_granite, to_llama
from model.generation import Engine, Request

CLASSES = {  # what the decoder runs, in the class of transformers where there is one
    **{kind: (sizes, None) for kind, sizes in KINDS.items()},
    "not renormalised": ({"use_moe": True, "norm_topk_prob": False, "n_shared_experts": 0}, None),
    "Llama": ({}, to_llama),
    "Llama tied": ({"tie_word_embeddings": True}, to_llama),
    "Llama yarn": (YARN, to_llama),
    "Granite": ({"use_moe": True, "n_shared_experts": 2, "n_routed_experts": 5, "num_experts_per_tok": 3}, to_granite),
    "Granite routed": ({"use_moe": True, "n_shared_experts": 0, "tie_word_embeddings": True}, to_granite),
    "Granite yarn": ({"use_moe": True, **YARN}, to_granite),
}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_decoder_gives_the_logits_of_the_model(kind, half):
    """A prompt in pieces, then token by token beside another sequence, far beyond the length YaRN starts from."""
    sizes, convert = CLASSES[kind]
    model = make_model(half=half, **sizes)
    model = convert(model).eval() if convert else model
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


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9},
    ],
)
def test_another_kind_of_rotation_is_refused(rope):
    """It would run, and compute something else."""
    sizes = {**SIZES, "intermediate_size": 96, "vocab_size": 211, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={**rope, "rope_theta": 1e4}))
    model.config.rope_parameters.setdefault("original_max_position_embeddings", 128)
    with pytest.raises(UsageError, match=f"rope_type {rope['rope_type']}|rope_scaling does not know mscale"):
        Decoder(model, None)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_multiplier": 1.0},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.2},
        {"logits_scaling": 8.0},
        {"shared_intermediate_size": 100},
        {"attention_bias": True},
    ],
)
def test_a_granite_that_scales_is_refused(change):
    config = to_granite(make_model(use_moe=True)).config
    with pytest.raises(UsageError, match=r"not this granitemoeshared model, with its (scales|biases)"):
        Decoder(GraniteMoeSharedForCausalLM(GraniteMoeSharedConfig(**config.to_dict() | change)), None)


@torch.no_grad()
def test_another_class_lends_its_own_tensors():
    """Nothing is copied: what is trained as MiniMind is trained in the other class."""
    model = make_model(use_moe=True)
    granite = to_granite(model).eval()
    again = as_minimind(granite)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    again.model.layers[1].mlp.experts[2].up_proj.weight.mul_(2)
    ids = torch.tensor(make_prompts(9))
    torch.testing.assert_close(granite(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-4)
    assert as_minimind(model) is model and not again.training and as_minimind(granite.train()).training


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
