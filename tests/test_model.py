"""The model: same numbers as Llama, masks, cache, loss, and life inside transformers."""

import copy
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from model import model_minimind
from model.errors import UsageError
from model.LMConfig import PRESETS, MiniMindConfig
from model.model_minimind import LinearCrossEntropy, MiniMindForCausalLM, MiniMindOutput, plain_attention

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(**overrides) -> MiniMindForCausalLM:
    """A small model in eval mode whose weights are large enough for logits that differ clearly."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **overrides}))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def llama(model):
    config = model.config
    names = [*SIZES, "intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings"]
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, tie_word_embeddings=True))
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("minimind2-small", 25_829_888),
        ("minimind2", 104_030_976),
        ("minimind2-moe", 145_029_760),
        ("minimind-v1-small", 26_878_464),
        ("minimind-v1-moe", 113_402_368),
        ("minimind-v1", 108_749_568),
    ],
)
def test_presets(name, parameters):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig.from_preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(PRESETS) == {"minimind2-small", "minimind2", "minimind2-moe"} | {
        f"minimind-v1{end}" for end in ("", "-small", "-moe")
    }


def test_unknown_config_keys_are_refused():
    """Mistake 11."""
    with pytest.raises(UsageError, match="num_hiden_layers, width"):
        MiniMindConfig(num_hiden_layers=4, width=3)
    with pytest.raises(UsageError, match="minimind3"):
        MiniMindConfig.from_preset("minimind3")


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"hidden_size": 100}, "hidden_size 100"),
        ({"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "in pairs"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "6400"}, "vocab_size"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_impossible_configs_are_refused(fields, named):
    with pytest.raises(UsageError, match=named):
        MiniMindConfig(**fields)


def test_config_round_trip(tmp_path):
    config = MiniMindConfig.from_preset(
        "minimind-v1-moe",
        dropout=0.1,
        inference_rope_scaling=True,
        rope_scaling={"type": "yarn", "factor": 8},
        original_max_position_embeddings=340,
    )
    config.save_pretrained(tmp_path)
    again = MiniMindConfig.from_pretrained(tmp_path)
    ours = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    assert {key: again.to_dict()[key] for key in ours} == ours
    assert again.rope_theta == 1e4
    assert again.yarn_parameters() == config.yarn_parameters()
    assert again.yarn_parameters()["original_max_position_embeddings"] == 340


def test_public_config_loads():
    """What the public MiniMind2 folders hold, and what transformers 4 and 5 add."""
    public = {
        "architectures": ["MiniMindForCausalLM"],
        "auto_map": {"AutoConfig": "LMConfig.MiniMindConfig"},
        "aux_loss_alpha": 0.1,
        "bos_token_id": 1,
        "dropout": 0.0,
        "eos_token_id": 2,
        "flash_attn": True,
        "hidden_act": "silu",
        "hidden_size": 768,
        "inference_rope_scaling": False,
        "intermediate_size": 2048,
        "max_position_embeddings": 32768,
        "model_type": "minimind",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "torch_dtype": "float16",
        "transformers_version": "4.48.0",
        "use_moe": False,
        "vocab_size": 6400,
    }
    config = MiniMindConfig(**public)
    assert (config.hidden_size, config.rope_theta, config.tie_word_embeddings) == (768, 1e6, True)


def test_weight_keys():
    dense = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, "num_hidden_layers": 1})).state_dict()
    layer = "model.layers.0."
    assert set(dense) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"{layer}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    moe = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, "num_hidden_layers": 1}, use_moe=True, n_shared_experts=2))
    experts = [f"experts.{e}" for e in range(4)] + [f"shared_experts.{s}" for s in range(2)]
    assert {name for name in moe.state_dict() if ".mlp." in name} == {
        f"{layer}mlp.gate.weight",
        *(f"{layer}mlp.{expert}.{name}_proj.weight" for expert in experts for name in ("gate", "up", "down")),
    }


def test_initialisation():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=256, num_hidden_layers=2, vocab_size=500))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02)
    ids = torch.randint(500, (2, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(500), rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Same numbers as Llama


def test_logits_and_gradients_equal_llama(model, llama):
    ids = random_ids(2, 33)
    ours, theirs = model(ids, labels=ids), llama(ids, labels=ids)
    assert theirs.logits.std() > 0.1
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss)
    got = torch.autograd.grad(ours.loss, list(model.parameters()))
    wanted = dict(
        zip(dict(llama.named_parameters()), torch.autograd.grad(theirs.loss, list(llama.parameters())), strict=True)
    )
    for name, gradient in zip(dict(model.named_parameters()), got, strict=True):
        torch.testing.assert_close(gradient, wanted[name], **CLOSE)


def test_plain_attention_equals_flash(model):
    plain = make_model(flash_attn=False)
    ids = random_ids(2, 12)
    for mask in (None, torch.tensor([[0] * 3 + [1] * 9, [1] * 5 + [2] * 7])):
        real = slice(None) if mask is None else mask > 0
        torch.testing.assert_close(plain(ids, mask).logits[real], model(ids, mask).logits[real], **CLOSE)
    cache = plain(ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(plain(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:], **CLOSE)


def test_plain_attention_by_hand():
    """Two query heads share one key/value head; the second token averages by its scores."""
    q = torch.tensor([[[[0.0], [0.0]], [[0.0], [2.0]]]])  # (1, 2, 2, 1)
    k = torch.tensor([[[[0.0], [1.0]]]])
    v = torch.tensor([[[[10.0], [20.0]]]])
    out = plain_attention(q, k, v, None, True, 0.0)
    share = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(out.flatten(), torch.tensor([10.0, 15.0, 10.0, 10 + 10 * share]))


@pytest.mark.parametrize("flash", [True, False])
def test_half_precision_weights_and_autocast(flash):
    model = make_model(flash_attn=flash)
    ids = random_ids(2, 16)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.token_losses.dtype == torch.float32
    assert (out.logits - exact).abs().max() < 0.1 * exact.std()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half(ids).logits - exact).abs().max() < 0.15 * exact.std()


def test_autocast_keeps_query_key_and_value_in_one_dtype(model, monkeypatch):
    """Mistake 7, under autocast: no float32 copy of q and k reaches the attention."""
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **keys: seen.append((q, k, v)) or attention(q, k, v, **keys)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(random_ids(1, 8))
    assert {x.dtype for triple in seen for x in triple} == {torch.bfloat16}


def test_norm_is_taken_in_float32():
    norm = model_minimind.RMSNorm(64, 1e-5).to(torch.float16)
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # squares overflow float16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


def test_dropout_in_training_only():
    model = make_model(dropout=0.5)
    ids = random_ids(1, 20)
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


# ----------------------------------------------------------------------------------------------------------------------
# Masks, documents, positions


def test_left_padded_right_padded_and_alone(model):
    """Also mistake 13: no NaN rows, in any precision."""
    rows = [random_ids(n, seed=n) for n in (3, 7, 11)]
    alone = [model(row[None]).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
        for b, row in enumerate(rows):
            part = slice(11 - len(row), 11) if side == "left" else slice(0, len(row))
            ids[b, part], mask[b, part] = row, 1
        logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        for b, expected in enumerate(alone):
            torch.testing.assert_close(logits[b][mask[b] > 0], expected, **CLOSE)
        torch.testing.assert_close(model(ids, attention_mask=mask.bool()).logits, logits)
        for flash in (True, False):
            half = make_model(flash_attn=flash).to(torch.float16)
            assert half(ids, attention_mask=mask).logits.isfinite().all()


def test_padding_gives_finite_gradients():
    for flash in (True, False):
        model = make_model(flash_attn=flash)
        mask = torch.tensor([[0] * 6 + [1] * 2, [0] * 8])
        model(random_ids(2, 8), attention_mask=mask, labels=random_ids(2, 8)).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_packed_row_equals_documents_apart(model):
    documents = [random_ids(1, n, seed=n) for n in (4, 1, 9)]
    row = torch.cat([*documents, torch.zeros(1, 2, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 4 + [2] + [3] * 9 + [0] * 2])
    packed = model(row, attention_mask=mask, labels=row)
    alone = [model(document, labels=document) for document in documents]
    torch.testing.assert_close(packed.logits[:, :14], torch.cat([out.logits for out in alone], 1), **CLOSE)
    losses = torch.cat([out.token_losses for out in alone], 1)
    torch.testing.assert_close(packed.token_losses[:, :14], losses, **CLOSE)
    assert (packed.token_losses[:, [0, 4, 5, 14, 15]] == 0).all()
    torch.testing.assert_close(packed.loss, losses.sum() / (3 + 0 + 8))


MASKS = {
    "documents": [[1] * 4 + [2] + [3] * 7, [1] * 12],
    "padding behind and before": [[0] * 3 + [1] * 9, [1] * 5 + [2] * 3 + [0] * 4],
    "nothing but padding": [[0] * 12, [1] * 12],
}


@pytest.mark.parametrize("name", MASKS)
def test_document_bounds_see_what_the_mask_sees(name):
    """Real tokens: the runs of places, causal, are exactly the mask over T x T places."""
    mask = torch.tensor(MASKS[name])
    bounds = model_minimind.document_bounds(mask)
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == mask.numel()
    run = torch.bucketize(torch.arange(mask.numel()), bounds, right=True).view(mask.shape)
    seen = (run[:, :, None] == run[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    expected = model_minimind.visible_keys(mask, 12)[:, 0]
    assert torch.equal(seen[mask > 0], expected[mask > 0])
    assert not (run[0][:, None] == run[1][None]).any()  # no run reaches into the next row


def test_padding_inside_a_document_has_no_bounds():
    assert model_minimind.document_bounds(torch.tensor([[1] * 4, [1, 0, 1, 1]])) is None
    assert model_minimind.document_bounds(torch.tensor([[2, 0, 0, 2], [1] * 4])) is None
    assert model_minimind.document_bounds(torch.tensor([[1, 0, 0, 2], [1] * 4])) is not None


def varlen_on_cpu(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What varlen_attn is documented to compute, document by document: (N, H, d) -> (N, H, d)."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32 and q.shape == k.shape == v.shape
    assert max_q == max_k >= cu_seq_q.diff().max()
    parts = zip(*(x.transpose(0, 1).split(cu_seq_q.diff().tolist(), 1) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*(x[None] for x in part), None, True, 0.0)[0] for part in parts], 1).transpose(
        0, 1
    )


@pytest.mark.parametrize("way", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_by_documents_equals_the_mask(monkeypatch, name, way):
    """Values and gradients, by the loop of a CPU and by the call of a GPU's kernel, a stand-in taking its place."""
    mask = torch.tensor(MASKS[name])
    q, k, v = (torch.randn(2, 12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    weights = torch.randn(2, 12, 4, 8) * (mask > 0)[..., None, None]
    expected = plain_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), model_minimind.visible_keys(mask, 12), False, 0.0
    )
    monkeypatch.setattr(model_minimind, "varlen_attn", varlen_on_cpu)
    bounds = model_minimind.document_bounds(mask)
    out = model_minimind.document_attention(q, k, v, bounds, 0.0, by_kernel=way == "cuda")
    torch.testing.assert_close(out[mask > 0], expected.transpose(1, 2)[mask > 0], **CLOSE)
    got = torch.autograd.grad((out * weights).sum(), [q, k, v])
    wanted = torch.autograd.grad((expected.transpose(1, 2) * weights).sum(), [q, k, v])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_training_on_packed_rows_builds_no_mask(monkeypatch):
    """No T x T mask where attention takes documents; with a cache, or padding inside a document, it is needed."""
    built = []
    visible_keys = model_minimind.visible_keys
    monkeypatch.setattr(model_minimind, "visible_keys", lambda *keys: built.append(1) or visible_keys(*keys))
    model, ids = make_model().train(), random_ids(2, 12)
    for mask in MASKS.values():
        model(ids, attention_mask=torch.tensor(mask), labels=ids)
    assert not built
    model(ids, attention_mask=torch.tensor([[1] * 12, [1] * 4 + [0] + [1] * 7]), labels=ids)
    assert len(built) == 1
    model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert len(built) == 2


def test_holes_do_not_advance_positions(model):
    """Padding inside a document (a padded prompt, then a response) is as if it were not there."""
    ids = random_ids(1, 9)
    holes = torch.cat((ids[:, :4], torch.zeros(1, 3, dtype=torch.long), ids[:, 4:]), 1)
    mask = torch.tensor([[1] * 4 + [0] * 3 + [1] * 5])
    out, alone = model(holes, attention_mask=mask, labels=holes), model(ids, labels=ids)
    torch.testing.assert_close(out.logits[mask > 0], alone.logits[0], **CLOSE)
    torch.testing.assert_close(out.token_losses[mask > 0], alone.token_losses[0], **CLOSE)
    torch.testing.assert_close(out.loss, alone.loss)


def test_given_positions_win(model):
    ids = random_ids(1, 8)
    positions = torch.arange(8)[None] * 3
    assert not torch.allclose(model(ids).logits, model(ids, position_ids=positions).logits, atol=1e-3)
    shifted = model(ids, position_ids=torch.arange(8)[None] + 100)
    torch.testing.assert_close(shifted.logits, model(ids).logits, atol=1e-4, rtol=1e-4)  # only distances matter


def test_no_mask_takes_the_causal_way_and_a_mask_comes_alone(model, monkeypatch):
    """Mistakes 5 and 6: never attn_mask and is_causal at once; one boolean mask for all layers."""
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, **keys):
        seen.append((attn_mask, is_causal))
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **keys)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(random_ids(1, 6))
    assert seen == [(None, True)] * 2
    seen.clear()
    model(random_ids(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.long))
    assert [causal for _, causal in seen] == [False, False]
    assert seen[0][0] is seen[1][0] and seen[0][0].dtype == torch.bool and seen[0][0].shape == (2, 1, 6, 6)


def test_forward_and_backward_never_read_a_value():
    """Mistake 6: on meta tensors there is no value to read, so a hidden `.item()` or `if tensor` raises."""
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**SIZES))
        ids = torch.zeros(2, 8, dtype=torch.long)
        for mask in (None, torch.ones_like(ids)):
            for keys in ({"return_logits": False}, {}):
                model(ids, attention_mask=mask, labels=ids, **keys).loss.backward()


def test_mask_of_wrong_length_is_refused(model):
    with pytest.raises(ValueError, match="covers 5 tokens"):
        model(random_ids(1, 8), attention_mask=torch.ones(1, 5, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# Cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("flash", [True, False])
def test_any_split_over_a_cache_equals_one_forward(padded, flash):
    """Mistake 2: a causal mask for as many keys as queries."""
    model = make_model(flash_attn=flash)
    ids = random_ids(3, 14)
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14, [1] * 3 + [0] * 2 + [1] * 4 + [2] * 5]) if padded else None
    full = model(ids, attention_mask=mask).logits
    real = torch.ones(3, 14, dtype=torch.bool) if mask is None else mask > 0
    chance = random.Random(0)
    for sizes in [[1] * 14, [13, 1], [1, 13], *([chance.randint(1, 6) for _ in range(14)] for _ in range(4))]:
        cache, end, pieces = DynamicCache(config=model.config), 0, []
        for size in sizes:
            part = slice(end, min(end + size, 14))
            if part.start < 14:
                end = part.stop
                past_mask = None if mask is None else mask[:, :end]
                pieces.append(model(ids[:, part], attention_mask=past_mask, past_key_values=cache).logits)
        assert cache.get_seq_length() == 14
        torch.testing.assert_close(torch.cat(pieces, 1)[real], full[real], **CLOSE)


def test_outputs_are_objects_of_their_own(model):
    """Mistake 3: one output object that every call overwrites."""
    first = model(random_ids(1, 5))
    kept = first.logits.clone()
    second = model(random_ids(1, 5, seed=1), use_cache=True)
    assert first is not second and torch.equal(first.logits, kept)
    assert model(random_ids(1, 5), use_cache=False).past_key_values is None
    assert isinstance(second.past_key_values, DynamicCache)
    assert isinstance(first.past_key_values, DynamicCache)  # as other transformers models do, outside training
    assert model(random_ids(1, 5), labels=random_ids(1, 5)).past_key_values is None


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_own_loop(model, cache):
    keys = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    rows = [random_ids(1, n, seed=n) for n in (3, 8)]
    expected = [greedy(model, row, 10) for row in rows]
    assert torch.equal(model.generate(rows[1], **keys), expected[1])
    ids = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), rows[0]), 1), rows[1]))
    mask = torch.tensor([[0] * 5 + [1] * 3, [1] * 8])
    out = model.generate(ids, attention_mask=mask, **keys)
    assert torch.equal(out[:1, 5:], expected[0]) and torch.equal(out[1:], expected[1])


def test_beam_search_and_several_samples_equal_llama(model, llama):
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for keys in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
    ):
        outs = []
        for each in (model, llama):
            torch.manual_seed(1)
            outs.append(
                each.generate(ids, attention_mask=mask, max_new_tokens=7, pad_token_id=0, eos_token_id=2, **keys)
            )
        assert torch.equal(*outs)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def naive_token_losses(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return F.pad(losses, (1, 0))


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("on_cpu_path", [True, False])
def test_losses_and_gradients_for_any_token_weights(monkeypatch, chunk, on_cpu_path):
    monkeypatch.setattr(model_minimind, "LOSS_CHUNK", chunk)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not on_cpu_path)
    model = make_model()
    ids = random_ids(3, 15)
    labels = ids.masked_fill(torch.rand(3, 15, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    weights = torch.randn(3, 15)
    expected = naive_token_losses(model(ids).logits, labels)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for return_logits in (True, False):
        out = model(ids, labels=labels, return_logits=return_logits)
        assert (out.logits is None) == (not return_logits)
        assert out.token_losses.shape == (3, 15) and out.token_losses.dtype == torch.float32
        torch.testing.assert_close(out.token_losses, expected, **CLOSE)
        assert (out.token_losses[labels == -100] == 0).all() and (out.token_losses[:, 0] == 0).all()
        torch.testing.assert_close(out.loss, expected.sum() / (labels[:, 1:] >= 0).sum())
        got = torch.autograd.grad((out.token_losses * weights).sum(), list(model.parameters()))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("early", [True, False])
def test_loss_against_float64(early):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    targets = torch.tensor([0, 8, 3, 3, 1])
    losses = LinearCrossEntropy.apply(hidden, weight, targets, early)
    grad = torch.autograd.grad(losses[1] * 2 - losses[3], [hidden, weight])
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = F.cross_entropy(h @ w.t(), targets, reduction="none")
    for a, b in zip(grad, torch.autograd.grad(exact[1] * 2 - exact[3], [h, w]), strict=True):
        torch.testing.assert_close(a.double(), b, **CLOSE)


@pytest.mark.parametrize("weight, products", [(1.0, 3), (None, 6)])
def test_equal_weights_compute_the_logits_once(weight, products):
    """Three products of the head a chunk; three more only where the tokens' losses are weighted differently."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden, matrix = (torch.randn(n, 16, requires_grad=True) for n in (40, 64))
    weights = torch.rand(40) if weight is None else torch.full((40,), weight)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        losses = LinearCrossEntropy.apply(hidden.bfloat16(), matrix.bfloat16(), torch.arange(40), True)
        (losses * weights).sum().backward()
    assert counter.get_total_flops() == products * 2 * 40 * 16 * 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model()
        model.config.num_hidden_layers, model.model.layers = 0, torch.nn.ModuleList()
        model(random_ids(1, 9), labels=random_ids(1, 9), return_logits=False)
    assert counter.get_total_flops() == 2 * 8 * 64 * 97  # no gradient is wanted, none is computed


@pytest.mark.parametrize("early", [True, False])
def test_frozen_head_gets_no_gradient(early):
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(9, 6)
    LinearCrossEntropy.apply(hidden, weight, torch.arange(5), early).sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_backward_passes_equal_autograd(dtype):
    """RMSNorm and the rotation against the plain formulas, in float64."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(2, 5, 3, 8)
    cos, sin = torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def turn(x, weight):
        a, b = (x * weight).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    ours = {
        norm: lambda x, weight: model_minimind.Normalise.apply(x, weight, 1e-5, dtype),
        turn: lambda x, weight: model_minimind.Rotate.apply(x * weight, torch.cat((cos, cos), -1), sin),
    }
    for formula, own in ours.items():
        inputs = [each.clone().requires_grad_() for each in (x, weight)]
        exact = [each.double().requires_grad_() for each in (x, weight)]
        out, expected = own(*inputs), formula(*exact)
        close = {"atol": 1e-5, "rtol": 1e-5} if out.dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
        torch.testing.assert_close(out.double(), expected, **close)
        for a, b in zip(
            torch.autograd.grad(out, inputs, grad.to(out.dtype)),
            torch.autograd.grad(expected, exact, grad),
            strict=True,
        ):
            torch.testing.assert_close(
                a.double(),
                b,
                **(close if a.dtype == torch.float32 and dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}),
            )


def test_half_precision_loss_matches_naive():
    model = make_model()
    ids = random_ids(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    expected = naive_token_losses(out.logits, ids)
    torch.testing.assert_close(out.token_losses, expected, atol=1e-3, rtol=1e-3)
    got = torch.autograd.grad(out.loss, list(model.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(expected[:, 1:].mean(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("autocast", [True, False])
def test_no_float32_logits_are_held(monkeypatch, autocast):
    """Neither kept for the backward pass nor alive at once: no float32 tensor of tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.float32 = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.float32 = max(self.float32, tensor.numel())
            return out

    monkeypatch.setattr(model_minimind, "LOSS_CHUNK", 32)
    model = make_model(vocab_size=8000, hidden_size=16)
    ids = random_ids(4, 64)
    saved = []
    with (
        Largest() as largest,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        model(ids, labels=ids, return_logits=False).loss.backward()
    assert largest.float32 < 4 * 64 * 8000 / 2
    kept = {x.data_ptr(): x.numel() for x in saved if x.dtype == torch.float32}
    assert sum(kept.values()) < 4 * 64 * 8000 / 2


def test_loss_without_targets_is_zero(model):
    ids = random_ids(2, 6)
    out = model(ids, labels=torch.full_like(ids, -100), return_logits=False)
    assert out.loss == 0 and (out.token_losses == 0).all()
    out.loss.backward()
    assert model(ids).loss is None and model(ids).token_losses is None
    model.zero_grad()


def test_num_items_in_batch_replaces_the_count(model):
    ids = random_ids(2, 6)
    out = model(ids, labels=ids, num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(out.loss, out.token_losses.sum() / 40)


def test_logits_to_keep(model):
    ids = random_ids(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    marked = torch.rand(2, 9) < 0.4
    torch.testing.assert_close(model(ids, logits_to_keep=marked.nonzero(as_tuple=True)).logits, full[marked])


def test_unknown_arguments_are_refused(model):
    """Mistake 9: arguments that change the result swallowed by **kwargs."""
    ids = random_ids(1, 4)
    for keys in ({"lables": ids}, {"output_hidden_states": True}, {"output_attentions": True}, {"token_type_ids": ids}):
        with pytest.raises(TypeError, match=next(iter(keys))):
            model(ids, **keys)
    with pytest.raises(ValueError, match="either"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    model(ids, cache_position=torch.arange(4), output_attentions=False, output_hidden_states=None)
    assert isinstance(model(ids, return_dict=True), MiniMindOutput)
    assert isinstance(model(ids, labels=ids, return_dict=False), tuple)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, model(ids).logits)


# ----------------------------------------------------------------------------------------------------------------------
# Life inside transformers and torch


@pytest.mark.parametrize("use_moe", [False, True])
def test_save_and_load_pretrained(tmp_path, use_moe):
    """Mistake 10: tied weights that nobody declared; also tables that are garbage after meta initialisation."""
    model = make_model(use_moe=use_moe)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again, report = MiniMindForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    ids = random_ids(2, 10)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_untied_weights_stay_untied(tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)


def test_remote_code_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MiniMindConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(MiniMindForCausalLM, "_auto_class", "AutoModelForCausalLM")
    model = make_model()
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    assert {"LMConfig.py", "model_minimind.py", "errors.py"} <= {path.name for path in folder.iterdir()}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(config) is not MiniMindConfig and type(again) is not MiniMindForCausalLM
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = random_ids(2, 7)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        again.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_embeddings_resize_deepcopy_and_pickle():
    model = make_model()
    ids = random_ids(1, 6)
    logits = model(ids).logits
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert torch.equal(twin(ids).logits, logits)
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model.config.vocab_size == 101 and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits[..., :97], logits)


@pytest.mark.parametrize("use_moe", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_moe):
    model = make_model(use_moe=use_moe).train()
    ids = random_ids(2, 10)
    gradients = []
    for enable in (False, True):
        if enable:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(ids, labels=ids)
        total = out.loss + (out.aux_loss or 0)
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    model = make_model().train()
    ids = random_ids(2, 24)
    mask = torch.tensor([[1] * 10 + [2] * 14, [1] * 20 + [0] * 4])
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step(run):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(ids, attention_mask=mask, labels=ids, return_logits=False)
        return out.loss, torch.autograd.grad(out.loss, list(model.parameters()))

    (loss, gradients), (expected, wanted) = step(compiled), step(model)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_training_step_lowers_the_loss():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = random_ids(2, 32)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_peft_lora():
    peft = pytest.importorskip("peft")
    model = make_model()
    ids = random_ids(1, 6)
    logits = model(ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(wrapped(ids).logits, logits)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in wrapped.named_parameters())
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, **CLOSE)


def test_trl_sft(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = make_model(vocab_size=max(6400, len(tokenizer)))
    rows = datasets.Dataset.from_list([{"text": "one two three four"}] * 8)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        max_length=32,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    before = model.model.norm.weight.clone()
    result = trainer.train()
    assert math.isfinite(result.training_loss) and not torch.equal(before, model.model.norm.weight)


@pytest.mark.parametrize("hint", [True, False])
def test_gradients_hold_for_any_weights_of_the_token_losses(hint):
    """equal_weights is a hint about speed: right or wrong, the gradient is that of whole logits."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1, vocab_size=50)).train()
    ids, grads = torch.randint(50, (2, 9)), []
    for weights in torch.ones(2, 9), torch.rand(2, 9):
        model.zero_grad()
        output = model(ids, labels=ids, return_logits=False, equal_weights=hint)
        (output.token_losses * weights).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        whole = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        (whole * weights[:, 1:].flatten()).sum().backward()
        for ours, parameter in zip(grads[-1], model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
