"""MuonAdamW against torch's own Muon and AdamW, and which parameter goes where."""

import pytest
import torch
from torch import nn

from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime import optimizers
from trainer.runtime.optimizers import MuonAdamW, build_optimizer, by_gram, by_matrix, newton_schulz

SHAPES = [(16, 16), (16, 16), (8, 24), (24, 8)]


def two_copies(shapes):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def run_steps(ours, theirs, our_optimizer, their_optimizer, steps=5):
    for _ in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        our_optimizer.step()
        their_optimizer.step()


def test_muon_equals_torch_muon():
    ours, theirs = two_copies(SHAPES)
    optimizer = MuonAdamW([{"params": ours, "muon": True, "weight_decay": 0.1}], lr=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    run_steps(ours, theirs, optimizer, reference)
    for p, q in zip(ours, theirs, strict=True):  # the orthogonalisation runs in bfloat16 in both
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
        assert (p - q).abs().mean() < 3e-4


def test_adamw_equals_torch_adamw():
    ours, theirs = two_copies([(7,), (5, 3)])
    optimizer = MuonAdamW([{"params": ours, "weight_decay": 0.1}], lr=0.01)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    run_steps(ours, theirs, optimizer, reference)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 16, 64), (3, 64, 16)])
def test_newton_schulz_makes_singular_values_equal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)).float())
    assert values.max() < 1.35 and values.median() > 0.6


@pytest.mark.parametrize("rank", [24, 3])
def test_gram_form_equals_the_plain_form(rank):
    """Also for a matrix of low rank, whose Gram matrix has eigenvalues of nothing but rounding."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, rank) @ torch.randn(2, rank, 72)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    exact = by_matrix(x.double(), 5)
    torch.testing.assert_close(by_gram(x.double(), 5), exact, atol=1e-9, rtol=0)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(by_gram(x, 5).double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "shape, dtype, way",
    [((24, 64), torch.float32, "by_gram"), ((64, 24), torch.float32, "by_gram"), ((24, 32), torch.float32, "by_matrix"),
     ((24, 64), torch.bfloat16, "by_matrix")],
)  # fmt: skip
def test_the_way_with_fewer_products_is_taken(monkeypatch, shape, dtype, way):
    """And never the Gram matrix in bfloat16, which has no room for squared singular values."""
    taken = []
    for name in ("by_gram", "by_matrix"):
        form = getattr(optimizers, name)
        monkeypatch.setattr(
            optimizers, name, lambda x, steps, form=form, name=name: taken.append(name) or form(x, steps)
        )
    newton_schulz(torch.randn(1, *shape), dtype)
    assert taken == [way]


def test_one_kernel_for_all_parameters_of_adamw():
    """Not several launches for each norm, router and embedding."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4))
    optimizer = build_optimizer(model, "muon", 1e-3, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    group = next(group for group in optimizer.param_groups if not group["muon"])
    with torch.profiler.profile() as profile:
        optimizer.adamw_step(group["params"], group)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert len(group["params"]) == 10 and calls["aten::_fused_adamw_"] == 1
    assert not {"aten::mul_", "aten::addcmul_", "aten::addcdiv_", "aten::lerp_", "aten::sqrt"} & set(calls)


def test_a_parameter_without_gradient_keeps_its_own_step():
    ours, theirs = two_copies([(7,), (5, 3)])
    optimizer = MuonAdamW([{"params": ours}], lr=0.01)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    for active in (slice(0, 2), slice(1, 2), slice(0, 2)):
        optimizer.zero_grad()
        reference.zero_grad()
        run_steps(ours[active], theirs[active], optimizer, reference, steps=1)
    assert [optimizer.state[p]["step"] for p in ours] == [2, 3]
    assert set(optimizer.state[ours[0]]) == {"step", "mean", "square"}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_state_survives_a_round_trip():
    ours, theirs = two_copies([(8, 8), (4,)])

    def make(params):
        return MuonAdamW([{"params": params[:1], "muon": True}, {"params": params[1:]}], lr=0.01)

    first, second = make(ours), make(theirs)
    run_steps(ours, theirs, first, second, steps=2)
    restored = make(theirs)
    restored.load_state_dict(second.state_dict())
    run_steps(ours, theirs, first, restored, steps=2)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(name, use_moe):
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_moe=use_moe)
    model = MiniMindForCausalLM(config)
    optimizer = build_optimizer(model, name, 1e-3, weight_decay=0.1)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        group = group_of[id(p)]
        inner_matrix = p.dim() == 2 and "embed" not in key
        assert (group["weight_decay"] > 0) == inner_matrix, key
        assert group.get("muon", False) == (name == "muon" and inner_matrix and not key.endswith("mlp.gate.weight")), (
            key
        )


def adamw_by_hand(start, gradients, rate, decay):
    """The formula of Loshchilov and Hutter with betas 0.9 and 0.95, in float64."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        w = w - rate * decay * w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizer_of_a_run_takes_the_steps_of_the_formula(name):
    """Embedding and norm have no decay; with adamw the matrices do."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    optimizer = build_optimizer(model, name, 0.02, weight_decay=0.1)
    chosen = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 0.0}
    chosen |= {"model.layers.0.self_attn.q_proj.weight": 0.1} if name == "adamw" else {}
    parameters = {key: p for key, p in model.named_parameters() if key in chosen}
    starts = {key: p.detach().clone() for key, p in parameters.items()}
    torch.manual_seed(0)
    gradients = {key: [torch.randn_like(p) * 10**i for i in (0, -1, 1)] for key, p in parameters.items()}
    for step in range(3):
        for key, p in parameters.items():
            p.grad = gradients[key][step].clone()
        optimizer.step()
    for key, decay in chosen.items():
        expected = adamw_by_hand(starts[key], gradients[key], 0.02, decay)
        torch.testing.assert_close(parameters[key].detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_head_of_its_own_is_no_inner_matrix(name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = MiniMindForCausalLM(MiniMindConfig(**sizes, tie_word_embeddings=False))
    groups = build_optimizer(model, name, 1e-3, weight_decay=0.1).param_groups
    for weight in model.lm_head.weight, model.model.embed_tokens.weight:
        (group,) = [group for group in groups if any(p is weight for p in group["params"])]
        assert group["weight_decay"] == 0 and not group.get("muon")


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, "muon", 1e-3, 0.0)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(model[1].weight)]
