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

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic a x + b x^3 + c x^5: singular values in (0, 1] to about 1 in 5 steps


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> torch.Tensor:
    """Push all singular values of a stack of matrices (N, n, m) towards 1; bfloat16 is precise enough."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, n, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b X X^T + c (X X^T)^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


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
        for shape, same in by_shape.items():  # equal shapes in one batched product
            nesterov = torch.stack([p.grad.lerp(self.state[p]["momentum"], mu) for p in same])
            size = 0.2 * max(shape) ** 0.5
            for p, update in zip(same, newton_schulz(nesterov, self.dtype), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * size)

    def adamw_step(self, params: list[nn.Parameter], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
            denominator = (state["square"] / correction2).sqrt_().add_(group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["mean"], denominator, value=-group["lr"] / correction1)


def build_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """The optimizer `name` ("muon" or "adamw") over a model's trainable parameters, one learning rate for all.

    Weight decay falls on matrices alone; embeddings, norms and the head have none. With "muon" the matrices inside the
    layers take Muon, but for the router of a mixture (its rows compete, so they keep AdamW). dtype: what the run
    multiplies matrices in.
    """
    matrices, rest = [], []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for key, p in model.named_parameters():  # tied weights come once
        if p.requires_grad:
            inner = p.dim() >= 2 and id(p) not in embeddings and "lm_head" not in key
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
