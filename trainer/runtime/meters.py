"""What is told of a run: means over the steps since the last log line and over all ranks."""

import torch
from torch import Tensor

from trainer.runtime.distributed import sum_over_ranks, world_size


class Meters:
    """Sums and what each is a mean over. They stay on the device until they are read, so nothing waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """total: of `count` things, or count 0 where they have been counted already."""
        total = torch.as_tensor(total, dtype=torch.float32, device=self.device).detach()
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def summed(self) -> dict[str, tuple[float, float]]:
        """{name: (sum, count)}, means over the ranks; every rank has to call it."""
        names, n = list(self.sums), len(self.sums)
        totals = sum_over_ranks([*map(float, self.sums.values()), *self.counts.values()], self.device)
        totals = [total / world_size() for total in totals]
        return dict(zip(names, zip(totals[:n], totals[n:], strict=True), strict=True))

    def restore(self, summed: dict[str, tuple[float, float]]) -> None:
        """Go on from what summed() gave, on any number of ranks."""
        self.sums = {name: torch.tensor(total, device=self.device) for name, (total, _) in summed.items()}
        self.counts = {name: count for name, (_, count) in summed.items()}

    def means(self) -> dict[str, float]:
        """{name: mean} of what was added since the last call; every rank has to call it."""
        means = {name: total / (count or 1) for name, (total, count) in self.summed().items()}
        self.sums, self.counts = {}, {}
        return means


def pair_meters(margins: Tensor, there: Tensor) -> dict[str, Tensor]:
    """Of what pairs prefer their chosen answer by, (B, P), and which pairs are there: sums; a tie counts half."""
    right = (margins.sign() + 1) / 2
    return {"accuracy": (right * there).sum(), "margin": margins.sum()}


def peak_expert_load(load: Tensor | None, device: torch.device) -> dict[str, float]:
    """Tokens of the busiest expert of any layer, over an even share: 1 (even) to E (all on one).

    load: (layers, E), how many tokens of a step each expert got on this rank; None of a dense model: nothing to tell.
    """
    if load is None:
        return {}
    load = torch.tensor(sum_over_ranks(load.flatten().tolist(), device)).view(load.shape)
    return {"peak_expert_load": float((load / load.mean(-1, keepdim=True).clamp(min=1)).max())}
