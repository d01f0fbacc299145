"""The loss of next tokens: values, gradients, memory, against whole logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import PretendedCuda
from small_model import CLOSE, make_model, random_ids

from model.LMConfig import MiniMindConfig
from model.loss import LinearCrossEntropy, target_places
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.steps import MicroBatch, collate


@pytest.fixture(scope="module")
def model():
    return make_model()


def naive_token_losses(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return F.pad(losses, (1, 0))


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("on_cpu_path", [True, False])
def test_losses_and_gradients_for_any_token_weights(monkeypatch, chunk, on_cpu_path):
    monkeypatch.setattr("model.loss.LOSS_CHUNK", chunk)
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


def test_known_places_of_the_targets_change_no_bit(monkeypatch):
    """Found before the batch was on its device, or here: the same losses and gradients."""
    model, ids = make_model(), random_ids(3, 15)
    mask = torch.tensor([[1] * 5 + [2] * 10, [0] * 3 + [1] * 12, [1] * 9 + [0] * 6])
    labels = ids.masked_fill(torch.rand(3, 15, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    places = target_places(labels, mask)
    by_hand = [
        15 * b + t
        for b in range(3)
        for t in range(15)
        if mask[b, t] and labels[b, t] >= 0 and mask[b, t] in mask[b, :t].tolist()
    ]
    assert places.tolist() == by_hand
    results = []
    for keys in {}, {"target_places": places}:
        out = model(ids, attention_mask=mask, labels=labels, return_logits=False, **keys)
        results.append([out.token_losses, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_gpu_computes_the_logits_of_targets_alone():
    """Where the batch brings their places: 5 of 30 tokens here."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = make_model().train(), random_ids(2, 15)
    labels = ids.masked_fill(torch.arange(30).view(2, 15) % 6 != 1, -100)
    model.config.num_hidden_layers, model.model.layers = 0, torch.nn.ModuleList()
    flops = []
    for keys in {"target_places": target_places(labels, None)}, {}:
        with PretendedCuda(), FlopCounterMode(display=False) as counter:
            model(ids, labels=labels, return_logits=False, **keys).loss.backward()
        flops.append(counter.get_total_flops())
    assert flops[1] == 6 * flops[0] > 2 * 30 * 64 * 97


def test_a_batch_brings_its_places_and_keeps_its_samples():
    """What is picked of a batch, by rows, leaves behind what counts in the whole of it."""
    rows = [
        {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([1] * 6 + [2] * 9)}
        for ids in random_ids(3, 15)
    ]
    batch = collate(rows)
    assert batch["document_bounds"].tolist() == [0, 6, 15, 21, 30, 36, 45]
    assert batch["target_places"].tolist() == [i for i in range(45) if i % 15 not in (0, 6)]
    some = MicroBatch([0, 1, 2], batch, {}, 45, 39).take(np.array([2, 0]), 1.0)
    assert some.inputs.keys() == {"input_ids", "labels", "attention_mask"}
    assert torch.equal(some.inputs["input_ids"], batch["input_ids"][[2, 0]])
    holes = [{**row, "attention_mask": torch.tensor([1] * 6 + [0] + [1] * 8)} for row in rows]
    assert "document_bounds" not in collate(holes)
    prompts = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    assert collate(prompts).keys() == {"input_ids", "attention_mask"}  # of rows without targets


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

    monkeypatch.setattr("model.loss.LOSS_CHUNK", 32)
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


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_at_a_temperature_are_those_of_divided_logits(temperature, equal, autocast):
    """Values and the gradients of all weights, for equal and for other weights of the tokens."""
    model, ids = make_model(), random_ids(3, 15)
    model.model.norm.weight.data.mul_(8)  # logits apart enough for a temperature to matter
    labels = ids.masked_fill(torch.rand(3, 15, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    wanted = labels[:, 1:] >= 0
    weights = torch.ones(3, 15) if equal else torch.rand(3, 15, generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    expected = F.pad(-logprobs.gather(-1, ids[:, 1:, None])[..., 0] * wanted, (1, 0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids, labels=labels, equal_weights=equal, temperature=temperature)
        plain = model(ids, labels=labels)
    close = {"atol": 0.1, "rtol": 0.05} if autocast else CLOSE
    torch.testing.assert_close(out.token_losses, expected, **close)
    torch.testing.assert_close(out.loss, expected.sum() / wanted.sum(), **close)
    assert torch.equal(out.logits, plain.logits) and (out.loss - plain.loss).abs() > 0.05
    got = torch.autograd.grad((out.token_losses * weights).sum(), list(model.parameters()))
    exact = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours - theirs).norm() < (0.05 if autocast else 1e-5) * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_temperature_one_leaves_every_bit(autocast):
    model, ids = make_model(), random_ids(2, 9)
    results = []
    for keys in ({}, {"temperature": 1.0}, {"temperature": 1}):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(ids, labels=ids, **keys)
        results.append([out.token_losses, out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_a_temperature_of_zero_is_refused(model):
    with pytest.raises(ValueError, match="temperature must be above 0, not 0"):
        model(random_ids(1, 4), labels=random_ids(1, 4), temperature=0)
