"""Attention: its two forms, padding, packed documents, positions; who sees whom."""

import math

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import PretendedCuda
from small_model import CLOSE, SIZES, make_model, random_ids

from model import attention
from model.attention import document_attention, document_bounds, plain_attention, takes_documents, visible_keys
from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.steps import INDICES, collate


@pytest.fixture(scope="module")
def model():
    return make_model()


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
    bounds = document_bounds(mask)
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == mask.numel()
    run = torch.bucketize(torch.arange(mask.numel()), bounds, right=True).view(mask.shape)
    seen = (run[:, :, None] == run[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    expected = visible_keys(mask, 12)[:, 0]
    assert torch.equal(seen[mask > 0], expected[mask > 0])
    assert not (run[0][:, None] == run[1][None]).any()  # no run reaches into the next row


def test_padding_inside_a_document_has_no_bounds():
    assert document_bounds(torch.tensor([[1] * 4, [1, 0, 1, 1]])) is None
    assert document_bounds(torch.tensor([[2, 0, 0, 2], [1] * 4])) is None
    assert document_bounds(torch.tensor([[1, 0, 0, 2], [1] * 4])) is not None


def varlen_on_cpu(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """What varlen_attn is documented to compute, document by document: q (N, H, d), k and v (N, K, d) -> (N, H, d)."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32 and k.shape == v.shape
    assert enable_gqa == (q.shape[1] != k.shape[1])  # no copy of the shared heads
    assert max_q == max_k >= cu_seq_q.diff().max()
    parts = zip(*(x.transpose(0, 1).split(cu_seq_q.diff().tolist(), 1) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*(x[None] for x in part), None, True, 0.0)[0] for part in parts], 1).transpose(
        0, 1
    )


@pytest.mark.parametrize("way", ["cpu", "cuda", "torch 2.11"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_by_documents_equals_the_mask(monkeypatch, name, way):
    """Values and gradients, by the loop of a CPU and by the call of a GPU's kernel, a stand-in taking its place."""
    mask = torch.tensor(MASKS[name])
    q, k, v = (torch.randn(2, 12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    weights = torch.randn(2, 12, 4, 8) * (mask > 0)[..., None, None]
    expected = plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible_keys(mask, 12), False, 0.0)
    monkeypatch.setattr(attention, "varlen_attn", varlen_on_cpu)
    monkeypatch.setattr(attention, "VARLEN_TAKES", {"window_size"} | ({"enable_gqa"} if way == "cuda" else set()))
    bounds = document_bounds(mask)
    out = document_attention(q, k, v, bounds, 0.0, by_kernel=way != "cpu")
    torch.testing.assert_close(out[mask > 0], expected.transpose(1, 2)[mask > 0], **CLOSE)
    got = torch.autograd.grad((out * weights).sum(), [q, k, v])
    wanted = torch.autograd.grad((expected.transpose(1, 2) * weights).sum(), [q, k, v])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_training_on_packed_rows_builds_no_mask(monkeypatch):
    """No T x T mask where attention takes documents; with a cache, or padding inside a document, it is needed."""
    built = []
    monkeypatch.setattr("model.model_minimind.visible_keys", lambda *keys: built.append(1) or visible_keys(*keys))
    model, ids = make_model().train(), random_ids(2, 12)
    for mask in MASKS.values():
        model(ids, attention_mask=torch.tensor(mask), labels=ids)
    assert not built
    model(ids, attention_mask=torch.tensor([[1] * 12, [1] * 4 + [0] + [1] * 7]), labels=ids)
    assert len(built) == 1
    model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert len(built) == 2


@pytest.mark.parametrize(
    ("missing", "there"),
    [
        ({}, True),
        ({"built": False}, False),
        ({"capability": (7, 5)}, False),
        ({"head": 256}, False),
        ({"takes": {"is_causal"}}, False),
    ],
    ids=str,
)
def test_documents_go_to_the_kernel_of_a_gpu_that_has_it(missing, there, monkeypatch):
    """A build without the kernel (Windows) can import varlen_attn all the same; that of torch 2.10 had other keys."""
    given = {"built": True, "capability": (8, 6), "head": 64, "takes": {"window_size", "enable_gqa"}} | missing
    monkeypatch.setattr(attention, "VARLEN_TAKES", given["takes"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: given["built"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    config = MiniMindConfig(hidden_size=4 * given["head"], num_attention_heads=4, num_key_value_heads=2)
    x = torch.zeros(1, 2, config.hidden_size, dtype=torch.bfloat16)
    with PretendedCuda():
        assert takes_documents(x, config, training=True) is there
        assert not takes_documents(x.float(), config, training=True)


def test_known_bounds_are_not_computed_again(monkeypatch):
    model, ids = make_model(), random_ids(2, 12)
    mask = torch.tensor(MASKS["documents"])
    bounds, expected = document_bounds(mask), model(ids, attention_mask=mask, use_cache=False).logits
    monkeypatch.setattr("model.model_minimind.document_bounds", lambda mask: pytest.fail("it reads values"))
    found = model(ids, attention_mask=mask, document_bounds=bounds, use_cache=False).logits
    assert torch.equal(found, expected)


def kernel_by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """The same as varlen_on_cpu without a read of a value, so that it can be compiled."""
    run = torch.bucketize(torch.arange(len(q)), cu_seq_q, right=True)
    seen = (run[:, None] == run) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return plain_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), seen, False, 0.0)[0].transpose(0, 1)


@pytest.mark.parametrize("known", [True, False])
def test_layers_are_compiled_once_for_any_number_of_documents(known, monkeypatch):
    """As on a GPU: the borders of the documents are an input of the compiled layers, each time of another length."""
    monkeypatch.setattr("model.model_minimind.takes_documents", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel_by_mask)
    monkeypatch.setattr(
        "model.model_minimind.document_attention", lambda *args, by_kernel: document_attention(*args, by_kernel=True)
    )
    graphs, counts = [], []
    torch.compiler.reset()
    model, ids = make_model().train(), random_ids(1, 12)
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for documents in [3, 9], [2, 4, 6], [1, 2, 3, 6], [12]:
        mask = torch.repeat_interleave(torch.arange(1, len(documents) + 1), torch.tensor(documents))[None]
        batch = collate([{"input_ids": ids[0], "labels": ids[0], "attention_mask": mask[0]}])
        if known:
            for name in INDICES:
                torch._dynamo.maybe_mark_dynamic(batch[name], 0)
        else:
            del batch["document_bounds"], batch["target_places"]
        out = compiled(**batch, return_logits=False)
        expected = make_model()(ids, attention_mask=mask, labels=ids).token_losses
        torch.testing.assert_close(out.token_losses, expected, **CLOSE)
        counts.append(len(graphs))
    assert counts[0] > 0 and set(counts) == {counts[0]}
    torch.compiler.reset()


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


def test_a_gpu_is_never_waited_for():
    """A packed batch whose indices were found before it was there: forward and backward of a dense model."""
    model, ids = make_model().train(), random_ids(2, 12)
    pairs = zip(ids, torch.tensor(MASKS["documents"]), strict=True)
    rows = [{"input_ids": row, "labels": row, "attention_mask": mask} for row, mask in pairs]
    batch = collate(rows)
    expected = model(**batch, return_logits=False).loss
    with PretendedCuda() as gpu:
        loss = model(**batch, return_logits=False).loss
        loss.backward()
    assert gpu.host_reads == 0
    torch.testing.assert_close(loss, expected)


def test_mask_of_wrong_length_is_refused(model):
    with pytest.raises(ValueError, match="covers 5 tokens"):
        model(random_ids(1, 8), attention_mask=torch.ones(1, 5, dtype=torch.long))
