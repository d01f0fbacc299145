"""Norm and experts in the forms that a GPU is fast at, on a GPU that is not there."""

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import PretendedCuda
from small_model import CLOSE, make_model, random_ids

from model import model_minimind
from model.functional import Normalise, can_group, grouped_experts, rms_norm


def test_norm_of_a_gpu_is_one_kernel():
    """Where weight and input have one precision; on a CPU the formula stays."""
    x, weight = torch.randn(3, 7, 32, requires_grad=True), torch.rand(32, requires_grad=True)
    expected = rms_norm(x, weight, 1e-5)
    assert torch.equal(expected, Normalise.apply(x, weight, 1e-5, torch.float32))
    grads = torch.autograd.grad(expected.square().sum(), [x, weight])
    with PretendedCuda() as gpu:
        found = rms_norm(x, weight, 1e-5)
        assert gpu.called.count(F.rms_norm) == 1
        assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == torch.bfloat16
        assert gpu.called.count(F.rms_norm) == 1  # it would fall back to many kernels, and warn
    torch.testing.assert_close(found, expected, **CLOSE)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [x, weight]), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("capability", "waits"), [((8, 6), 1), ((9, 0), 0)])
def test_experts_wait_for_a_gpu_once_a_layer_at_most(capability, waits, monkeypatch):
    """Below capability 9 torch has no grouped kernel, and would wait for every product of its stand-in."""
    model, ids, mask = make_model(use_moe=True).train(), random_ids(2, 12), torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    expected = model(ids, attention_mask=mask, labels=ids)
    grouped = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(model_minimind, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(model_minimind, "can_group", lambda x, weight: can_group(x.to(torch.bfloat16), weight))
    monkeypatch.setattr(model_minimind, "grouped_experts", lambda *args: grouped.append(1) or grouped_experts(*args))
    indices = {"target_places": torch.arange(ids.numel())[(mask > 0).flatten() & (torch.arange(24) % 12 > 0)]}
    with PretendedCuda() as gpu:
        out = model(ids, attention_mask=mask, labels=ids, return_logits=False, **indices)
        (out.loss + out.aux_loss).backward()
    layers = model.config.num_hidden_layers
    assert gpu.host_reads == waits * layers and len(grouped) == (1 - waits) * layers
    torch.testing.assert_close(out.token_losses, expected.token_losses, **CLOSE)
