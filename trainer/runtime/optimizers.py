"""Muon for the matrices, AdamW for everything else, in one torch optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum M of a weight matrix by the nearest
semi-orthogonal matrix U V^T (M = U S V^T), so that all its directions learn at the same pace:

    M <- mu M + (1 - mu) G
    O  = newton_schulz((1 - mu) G + mu M)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(n, m)) O

The factor 0.2 sqrt(max(n, m)) gives O the update size that AdamW has in practice (Liu et al. 2025, arXiv 2502.16982,
eq. 4), so one learning rate serves both kinds of parameters.
"""

import torch
from torch import nn
from torch.optim.adamw import adamw

# Quintic a x + b x^3 + c x^5: takes singular values in (0, 1] to about 1 in 5 steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> torch.Tensor:
    """Push all singular values of a stack of matrices (N, n, m) towards 1; bfloat16 is precise enough."""
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    n, m = x.shape[-2:]
    # Products of n^3: 10 m/n + 5 the one way, 2 m/n + 17 the other.
    x = by_gram(x, steps) if dtype == torch.float32 and 2 * m > 3 * n else by_matrix(x, steps)
    return x.mT if tall else x


def by_matrix(x: torch.Tensor, steps: int) -> torch.Tensor:
    """X <- (a + b G + c G^2) X with G = X X^T, so many times: (N, n, m) -> (N, n, m)."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT  # (N, n, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def by_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The same for wide matrices, with products of n x n alone between the first and the last one.

    With P = a + b G + c G^2, the next X is P X and the next G is P G P: only G and the product of all P are carried.
    G has the squares of the singular values, so this needs float32 where by_matrix is content with bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None  # (N, n, n)
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = gram @ polynomial @ polynomial  # all of these commute
    return product @ x


class MuonAdamW(torch.optim.Optimizer):
    """Param groups with `muon: True` take Muon (matrices), the others AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    Each group: params, muon, lr, weight_decay, and momentum (Muon) or betas, eps (AdamW). dtype is that of Muon's
    matrix products: float32 where a CPU is slow at bfloat16.
    """

    def __init__(self, groups: list[dict], lr: float, dtype: torch.dtype = torch.bfloat16):
        defaults = {"lr": lr, "muon": False, "weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self.muon_step if group["muon"] else self.adamw_step)(params, group)
        return loss

    def muon_step(self, params: list[nn.Parameter], group: dict) -> None:
        mu = group["momentum"]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - mu)
            by_shape.setdefault(p.shape, []).append(p)
        for shape, same in by_shape.items():
            size = 0.2 * max(shape) ** 0.5
            # A GPU takes equal shapes in one batched product; a CPU one by one, which its caches hold.
            for batch in [same] if same[0].is_cuda else [[p] for p in same]:
                nesterov = torch.stack([p.grad.lerp(self.state[p]["momentum"], mu) for p in batch])
                updates = newton_schulz(nesterov, self.dtype).to(same[0].dtype)
                torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(batch, list(updates), alpha=-group["lr"] * size)

    def adamw_step(self, params: list[nn.Parameter], group: dict) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
        states = [self.state[p] for p in params]
        adamw(  # torch's own kernel: one launch for all parameters; it counts the step again
            params,
            [p.grad for p in params],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [torch.full((), state["step"] - 1.0, device=p.device) for p, state in zip(params, states, strict=True)],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
        )


def build_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """The optimizer `name` ("muon" or "adamw") over a model's trainable parameters, one learning rate for all.

    Weight decay falls on matrices alone; embeddings, norms and heads (of words, of scores) have none. With "muon" the
    matrices inside the layers take Muon, but for the router of a mixture (its rows compete, so they keep AdamW). dtype:
    what the run multiplies matrices in.
    """
    matrices, rest = [], []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for key, p in model.named_parameters():  # tied weights come once
        if p.requires_grad:
            head = "lm_head" in key or key == "score.weight"
            inner = p.dim() >= 2 and id(p) not in embeddings and not head
            (matrices if inner else rest).append((key, p))
    if name == "adamw":
        groups = [
            {"params": [p for _, p in matrices], "weight_decay": weight_decay},
            {"params": [p for _, p in rest], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True)
    routers = [p for key, p in matrices if key.endswith("mlp.gate.weight")]
    groups = [
        {"params": [p for key, p in matrices if not key.endswith("mlp.gate.weight")], "muon": True},
        {"params": routers},
        {"params": [p for _, p in rest], "weight_decay": 0.0},
    ]
    groups = [{"weight_decay": weight_decay, **g} for g in groups if g["params"]]
    return MuonAdamW(groups, learning_rate, torch.float32 if dtype == torch.float32 else torch.bfloat16)
