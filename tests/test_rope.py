"""Rotary positions, YaRN and the positions that an attention mask implies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.attention import positions_from_mask, visible_keys
from model.errors import UsageError
from model.functional import Rotate
from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM, rotary_frequencies, rotary_tables

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama_config(config: MiniMindConfig) -> LlamaConfig:
    rope = config.yarn_parameters() or {"rope_type": "default"}
    return LlamaConfig(
        **{name: getattr(config, name) for name in SIZES},
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=True,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={**rope, "rope_theta": config.rope_theta},
    )


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"type": "yarn", "factor": 16},
        {"rope_type": "yarn", "factor": 2.5, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 64},
        {"factor": 8, "attention_factor": 1.0},
    ],
)
def test_tables_equal_transformers(theta, scaling):
    config = MiniMindConfig(
        **SIZES,
        rope_theta=theta,
        inference_rope_scaling=scaling is not None,
        rope_scaling=scaling or None,
        original_max_position_embeddings=256,
    )
    positions = torch.arange(1500)[None]
    cos, sin = rotary_tables(config, positions, torch.float32)
    cos_llama, sin_llama = LlamaRotaryEmbedding(llama_config(config))(torch.zeros(1), positions)
    half = config.head_dim // 2
    torch.testing.assert_close(cos[:, :, 0], cos_llama, atol=1e-4, rtol=0)  # angles up to 1500 radians in float32
    torch.testing.assert_close(sin[:, :, 0], sin_llama[..., half:], atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[:, :, 0], sin_llama[..., :half], atol=1e-4, rtol=0)


def test_yarn_logits_equal_llama():
    torch.manual_seed(0)
    config = MiniMindConfig(
        **SIZES,
        vocab_size=97,
        max_position_embeddings=256,
        inference_rope_scaling=True,
        original_max_position_embeddings=64,
    )
    model = MiniMindForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    llama = LlamaForCausalLM(llama_config(config)).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    ids = torch.randint(97, (2, 200))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)
    plain = MiniMindForCausalLM(MiniMindConfig(**SIZES, vocab_size=97)).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_yarn_by_hand():
    """Fast pairs keep their frequency, slow ones are divided by the factor, the ramp lies between."""
    config = MiniMindConfig(
        hidden_size=512,
        num_attention_heads=8,
        inference_rope_scaling=True,
        rope_scaling={"factor": 4.0},
        original_max_position_embeddings=512,
    )
    frequencies, attention_factor = rotary_frequencies(config, torch.device("cpu"))
    plain, one = rotary_frequencies(MiniMindConfig(), torch.device("cpu"))
    assert one == 1.0
    assert attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    turns = 512 * plain / (2 * math.pi)
    ratio = plain / frequencies
    assert torch.allclose(ratio[turns > 40], torch.tensor(1.0))
    assert torch.allclose(ratio[turns < 0.6], torch.tensor(4.0))
    assert (ratio.diff() >= -1e-5).all()
    assert ((ratio > 1.05) & (ratio < 3.9)).sum() >= 4


def test_yarn_starts_from_the_trained_length():
    def frequencies(length):
        config = MiniMindConfig(inference_rope_scaling=True, original_max_position_embeddings=length)
        assert config.yarn_parameters()["original_max_position_embeddings"] == length
        return rotary_frequencies(config, torch.device("cpu"))[0]

    assert not torch.allclose(frequencies(512), frequencies(2048))


def test_rope_scaling_is_checked():
    for scaling in ({"type": "linear", "factor": 2}, {"factor": 0.5}, {"fator": 2}):
        with pytest.raises(UsageError, match="rope_scaling"):
            MiniMindConfig(rope_scaling=scaling)


def test_gradient_of_the_rotation():
    """The backward pass is the turn back, attention factor included."""
    config = MiniMindConfig(hidden_size=32, num_attention_heads=4, inference_rope_scaling=True)
    tables = rotary_tables(config, torch.tensor([[0, 3, 900]]), torch.float64)
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, *tables), x)


def test_rotate_depends_on_distance_alone():
    torch.manual_seed(0)
    config = MiniMindConfig(**SIZES)
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, dtype=torch.float64)

    def score(i, j):
        cos, sin = rotary_tables(config, torch.tensor([[i, j]]), torch.float64)
        return (Rotate.apply(q, cos[:, :1], sin[:, :1]) * Rotate.apply(k, cos[:, 1:], sin[:, 1:])).sum().item()

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-3)
    cos, sin = rotary_tables(config, torch.tensor([[7]]), torch.float64)
    assert Rotate.apply(q, cos, sin).norm() == pytest.approx(q.norm().item(), abs=1e-5)


def test_tables_take_the_dtype_of_the_activations():
    """Mistake 7: float32 tables meeting bfloat16 weights turn q and k into float32, v stays bfloat16."""
    config = MiniMindConfig(**SIZES, vocab_size=97)
    model = MiniMindForCausalLM(config).to(torch.bfloat16).eval()
    assert model(torch.arange(9)[None]).logits.dtype == torch.bfloat16
    large = rotary_tables(config, torch.tensor([[30000]]), torch.bfloat16)[0]
    exact = rotary_tables(config, torch.tensor([[30000]]), torch.float32)[0]
    torch.testing.assert_close(large.float(), exact, atol=5e-3, rtol=0)  # the angle itself was float32


masks = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(masks, st.data())
def test_positions_and_visibility_against_loops(rows, data):
    """Random document rows with holes, against the definition written as loops."""
    width = max(map(len, rows))
    rows = [sorted(row) for row in rows]  # numbers rise from left to right ...
    rows = [
        [0 if data.draw(st.booleans()) and i % 3 == 2 else n for i, n in enumerate(row)] for row in rows
    ]  # ... holes
    rows = [[0] * (width - len(row)) + row for row in rows]
    mask = torch.tensor(rows)
    positions = positions_from_mask(mask)
    for queries in {1, width // 2 + 1, width}:
        seen = visible_keys(mask, queries)
        assert seen.shape == (len(rows), 1, queries, width) and seen.dtype == torch.bool
        assert seen.any(-1).all()  # no empty row
        for b, row in enumerate(rows):
            for t in range(width - queries, width):
                if row[t]:
                    expected = [row[s] == row[t] and s <= t for s in range(width)]
                    assert seen[b, 0, t - width + queries].tolist() == expected
    for b, row in enumerate(rows):
        for t in range(width):
            if row[t]:
                assert positions[b, t] == sum(row[s] == row[t] for s in range(t))
    assert (positions >= 0).all()
