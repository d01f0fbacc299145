"""Mixture of experts: routing, balance loss, dispatch, gradients."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from model import model_minimind
from model.errors import UsageError
from model.functional import grouped_experts
from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM, MoEFeedForward, balance_loss

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_config(**overrides) -> MiniMindConfig:
    return MiniMindConfig(**{**SIZES, "vocab_size": 61, "use_moe": True, **overrides})


def make_model(**overrides) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(make_config(**overrides))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.25)
    return model.eval()


def reference(layer: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """Ten lines: each token alone through its best experts."""
    k, rows = layer.config.num_experts_per_tok, []
    for token in x.flatten(0, 1):
        p = F.softmax(layer.gate.weight @ token, dim=0)
        best = p.argsort(descending=True)[:k].tolist()
        total = sum(p[e] for e in best) if layer.config.norm_topk_prob else 1.0
        y = sum(p[e] / total * layer.experts[e](token) for e in best)
        rows.append(y + sum(expert(token) for expert in layer.shared_experts))
    return torch.stack(rows).view_as(x)


@pytest.fixture(params=["slices", "grouped", "every expert"])
def dispatch(request, monkeypatch):
    """Each of the three ways of dispatch, on the CPU."""
    if request.param == "grouped":
        monkeypatch.setattr(model_minimind, "each_expert", grouped_experts)
    if request.param == "every expert":
        monkeypatch.setattr(MoEFeedForward, "route", MoEFeedForward.route_all)
    return request.param


@pytest.mark.parametrize("experts, k, shared, renormalise", [(4, 2, 1, True), (4, 1, 2, True), (5, 3, 0, False)])
def test_equals_reference_loop(dispatch, experts, k, shared, renormalise):
    torch.manual_seed(1)
    config = make_config(
        n_routed_experts=experts, num_experts_per_tok=k, n_shared_experts=shared, norm_topk_prob=renormalise
    )
    layer = MoEFeedForward(config)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    layer.experts[0].gate_proj.weight.data.mul_(3)
    x = torch.randn(2, 9, 32, requires_grad=True)
    weights = torch.randn(2, 9, 32)
    out, _, load = layer(x, None)
    expected = reference(layer, x)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert load.sum() == 2 * 9 * k
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-4, rtol=1e-3)


def test_expert_without_tokens_gets_zero_gradient(dispatch):
    layer = MoEFeedForward(make_config(num_experts_per_tok=1))
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[2] = 1.0
    x = torch.rand(1, 6, 32) + 0.1  # positive: expert 2 wins everywhere
    out, _, load = layer(x, None)
    assert load.tolist() == [0, 0, 6, 0]
    out.sum().backward()
    for e, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.abs().sum() > 0) == (e == 2)


def test_eval_mode_has_gradients():
    """Mistake 4: experts under no_grad outside training."""
    model = make_model()
    ids = torch.randint(3, 61, (2, 12))
    out = model(ids, labels=ids)
    (out.loss + out.aux_loss).backward()
    loads = out.expert_load
    for number, layer in enumerate(model.model.layers):
        assert layer.mlp.gate.weight.grad.abs().sum() > 0
        for e, expert in enumerate(layer.mlp.experts):
            for parameter in expert.parameters():
                assert (parameter.grad.abs().sum() > 0) == (loads[number, e] > 0)


def test_large_activations_stay_finite_under_bfloat16(dispatch):
    """Mistake 1: expert outputs in a float16 buffer overflow at 65504."""
    layer = MoEFeedForward(make_config())
    for parameter in layer.parameters():
        parameter.data.normal_(std=1.0)
    x = 100 * torch.randn(2, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out, aux_loss, _ = layer(x.bfloat16(), None)
    assert out.isfinite().all() and aux_loss.isfinite()
    assert out.abs().max() > 65504


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_decides_in_float32_under_autocast(dtype):
    """Scores of 32 and 32 + 1/32: bfloat16, with steps of 1/4 there, would take them for the same."""
    layer = MoEFeedForward(make_config(num_experts_per_tok=1))
    layer.gate.weight.data[:] = torch.tensor([1.0, 1 + 2**-10, 1 - 2**-10, 1.0])[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        _, _, load = layer(torch.ones(2, 5, 32, dtype=dtype), None)
    assert load.tolist() == [0, 10, 0, 0]


def test_balance_loss_by_hand():
    """Two rows of two tokens and three experts, top 1."""
    config = make_config(n_routed_experts=3, num_experts_per_tok=1, aux_loss_alpha=0.5)
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], [[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]])
    chosen = scores.argmax(-1, keepdim=True)
    # row 1: f = (1/2, 1/2, 0) * 3, P = (.4, .5, .1) -> 1.35;  row 2: f = (1, 0, 0) * 3, P = (.65, .25, .1) -> 1.95
    loss, load = balance_loss(scores, chosen, None, config)
    assert loss.item() == pytest.approx(0.5 * (1.35 + 1.95) / 2)
    assert load.tolist() == [3, 1, 0]
    # over all tokens at once: f = (3/4, 1/4, 0) * 3, P = (.525, .375, .1)
    config.seq_aux = False
    loss, _ = balance_loss(scores, chosen, None, config)
    assert loss.item() == pytest.approx(0.5 * 3 * (0.75 * 0.525 + 0.25 * 0.375))


@pytest.mark.parametrize("seq_aux", [True, False])
def test_padding_counts_nowhere(seq_aux):
    """Mistake 12: pad tokens in the balance loss."""
    model = make_model(seq_aux=seq_aux)
    ids = torch.randint(3, 61, (1, 7))
    alone = model(ids)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), 1)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    left = model(padded, attention_mask=mask)
    right = model(padded.roll(-5, 1), attention_mask=mask.flip(1))
    empty_row = model(torch.cat((padded, padded)), attention_mask=torch.cat((mask, mask * 0)))
    for out in (left, right, empty_row):
        torch.testing.assert_close(out.aux_loss, alone.aux_loss)
        assert out.expert_load.tolist() == alone.expert_load.tolist()
    torch.testing.assert_close(left.logits[:, 5:], alone.logits, atol=1e-5, rtol=1e-5)


def test_balanced_router_costs_alpha_per_layer():
    model = make_model(aux_loss_alpha=0.3)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal scores: P_i = 1 / E, and so sum f_i P_i = 1
    assert model(torch.randint(3, 61, (2, 8))).aux_loss.item() == pytest.approx(0.3 * 2)


def test_aux_loss_is_not_in_the_loss():
    model = make_model()
    ids = torch.randint(3, 61, (2, 8))
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.aux_loss > 0
    assert MiniMindForCausalLM(MiniMindConfig(**SIZES))(ids, labels=ids).aux_loss is None


def test_packed_row_equals_documents_apart():
    model = make_model()
    first, second = torch.randint(3, 61, (1, 5)), torch.randint(3, 61, (1, 8))
    row = torch.cat((first, second), 1)
    packed = model(row, attention_mask=torch.tensor([[1] * 5 + [2] * 8]), labels=row)
    for part, ids in ((slice(0, 5), first), (slice(5, 13), second)):
        alone = model(ids, labels=ids)
        torch.testing.assert_close(packed.logits[:, part], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed.token_losses[:, part], alone.token_losses, atol=1e-5, rtol=1e-5)


def test_cached_equals_full_and_generate_runs():
    model = make_model()
    ids = torch.randint(3, 61, (2, 10))
    full = model(ids).logits
    cache, pieces = None, []
    for part in ids.split([4, 1, 3, 2], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5, rtol=1e-5)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 14)


def test_no_host_synchronisation_outside_the_cpu_branch(monkeypatch):
    """Mistake 6: the ways that a GPU takes hold no read of a value (meta tensors have none to read)."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta tensors know no autocast
    for group in (True, False):
        monkeypatch.setattr(model_minimind, "can_group", lambda x, weight, group=group: group)
        with torch.device("meta"):
            model = MiniMindForCausalLM(make_config()).to(torch.bfloat16)
            ids = torch.zeros(2, 8, dtype=torch.long)
            out = model(ids, attention_mask=torch.ones_like(ids), labels=ids, return_logits=False)
            (out.loss + out.aux_loss).backward()
        assert out.expert_load.shape == (2, 4)


def test_more_choices_than_experts_is_refused():
    with pytest.raises(UsageError, match="num_experts_per_tok 5"):
        make_config(num_experts_per_tok=5)
