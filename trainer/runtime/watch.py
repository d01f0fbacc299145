"""Checks of a reinforcement-learning run while it runs: a note where something looks wrong, the end where it is wrong.

Each is one sentence that says what to change. The state is a part of the checkpoint.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import InputError
from trainer.runtime.distributed import gather, sum_over_ranks, world_size
from trainer.runtime.reference import weights_hash
from trainer.runtime.run import Run

MOST_APART = 1e-3  # log-probabilities sampled and scored, in float32
DEAD_STEPS = 20  # without any advantage
CUT_STEPS = 5  # in which every reply was cut
REPLICA_STEPS = 5  # between two comparisons of the replicas
WINDOW = 20  # steps, of which means are compared


class Watch:
    """What was seen so far. Every rank calls every method, at the same time: all come to the same conclusions."""

    def __init__(self, run: Run):
        args = run.args
        self.run = run
        # Where sampling leaves tokens out, one at the edge may fall on either side by rounding.
        self.truncated = args.top_k > 0 or args.top_p < 1 or args.min_p > 0
        self.dead = self.cut = 0  # steps in a row
        self.told: list[str] = []
        self.means: dict[str, list[float]] = {"first": [], "last": [], "count": [0.0]}

    def state_dict(self) -> dict[str, Any]:
        means = {name: list(values) for name, values in self.means.items()}
        return {"dead": self.dead, "cut": self.cut, "told": list(self.told), "means": means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dead, self.cut, self.told = state["dead"], state["cut"], list(state["told"])
        self.means = {name: list(values) for name, values in state["means"].items()}

    def note(self, kind: str, text: str) -> None:
        """Say something once in a run."""
        if kind not in self.told:
            self.told.append(kind)
            print(f"note: step {self.run.step}: {text}", flush=True)

    # ------------------------------------------------------------------------------------------------------ the checks

    def first_minibatch(self, log_ratio: Tensor) -> None:
        """log_ratio (n,): of the tokens in the first minibatch after a rollout, where the ratio has to be 1."""
        if not log_ratio.numel():
            return
        apart = float(log_ratio.abs().mean() if self.truncated else log_ratio.abs().max())
        if self.run.dtype == torch.float32 and not apart < MOST_APART:
            raise InputError(
                f"what was sampled is not what is scored: before the first update of step {self.run.step} their "
                f"log-probabilities are up to {apart:.2g} apart, so that no ratio would be right; this is a fault of "
                "the program (temperature, mask, dropout), not of your data"
            )
        if not apart < 1.0:
            self.note(
                "precision",
                f"log-probabilities of sampling and scoring are up to {apart:.2g} apart in {self.run.dtype}: "
                "try --dtype float32",
            )

    def replicas(self, model: nn.Module) -> None:
        """Whether all ranks hold the same weights, every few steps."""
        whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO 3 cuts them up
        if world_size() == 1 or self.run.step % REPLICA_STEPS or not whole:
            return
        hashes = gather(weights_hash(model))
        if len(set(hashes)) > 1:
            apart = next(rank for rank, found in enumerate(hashes) if found != hashes[0])
            raise InputError(
                f"after step {self.run.step} process {apart} has other weights than process 0: gradients no longer "
                "cross the processes; resume from the last checkpoint, and report it if it comes again"
            )

    def rollout(self, values: dict[str, Tensor], signal: Tensor) -> None:
        """values: of each real reply of this rank, (n,): reward, reply_tokens, cut, repetition, entropy, and accuracy
        of those whose answer is known; signal (n,): whether the reply has an advantage."""
        names = ("reward", "reply_tokens", "cut", "entropy", "repetition", "accuracy")
        own = [(float(values[name].sum()), values[name].numel()) for name in names]
        totals = sum_over_ranks([x for pair in own for x in pair] + [float(signal.sum())], self.run.device)
        mean = {name: totals[2 * i] / (totals[2 * i + 1] or 1) for i, name in enumerate(names)}
        mean["has_answers"] = float(totals[2 * names.index("accuracy") + 1] > 0)
        self.cut = self.cut + 1 if mean["cut"] == 1 else 0
        self.dead = self.dead + 1 if totals[-1] == 0 else 0
        limit = f"--max_new_tokens {self.run.args.max_new_tokens}"
        if self.dead >= DEAD_STEPS:
            why = (
                f"in every group all rewards were equal ({mean['reward']:.3g} on average): take easier prompts or "
                "better --from_weight where nothing is right, harder prompts where all is, a higher --temperature, or "
                "other --rewards"
            )
            why = f"every reply was cut at {limit}: raise it" if self.cut >= DEAD_STEPS else why
            raise InputError(f"nothing was learned in {DEAD_STEPS} steps, no reply was better than others; {why}")
        if self.cut >= CUT_STEPS:
            self.note(
                "cut",
                f"every reply of {CUT_STEPS} steps was cut at {limit}: raise it, or start from weights "
                "that end their answers (full_sft)",
            )
        self.compare(mean)

    def compare(self, mean: dict[str, float]) -> None:
        """The latest steps with the first ones."""
        keys = ("reward", "accuracy", "reply_tokens", "repetition", "entropy")
        now = [mean[key] for key in keys]
        count = self.means["count"][0] = self.means["count"][0] + 1
        first, last = self.means["first"] or now, self.means["last"] or now
        if count <= WINDOW:
            first = [a + (b - a) / count for a, b in zip(first, now, strict=True)]
        last = [a + (b - a) / min(count, WINDOW) for a, b in zip(last, now, strict=True)]
        self.means |= {"first": first, "last": last}
        if count <= WINDOW:
            return
        before, after = dict(zip(keys, first, strict=True)), dict(zip(keys, last, strict=True))
        longer = abs(math.log(max(after["reply_tokens"], 1) / max(before["reply_tokens"], 1))) > math.log(1.5)
        repeats = after["repetition"] < before["repetition"] - 0.1
        gained = after["reward"] > before["reward"] + 0.1
        learned = mean["has_answers"] and after["accuracy"] > before["accuracy"] + 0.01
        if gained and not learned and (longer or repeats):
            self.note(
                "hacked",
                f"the reward rose from {before['reward']:.2f} to {after['reward']:.2f} by length or repetition alone "
                f"(right answers {before['accuracy']:.0%} to {after['accuracy']:.0%}, {before['reply_tokens']:.0f} to "
                f"{after['reply_tokens']:.0f} tokens a reply): give length and repetition more weight in --rewards",
            )
        if after["entropy"] < 0.1 * before["entropy"] and after["entropy"] < 0.05:
            self.note(
                "entropy",
                f"the entropy fell from {before['entropy']:.3f} to {after['entropy']:.3f} nats a token, so that groups "
                "become alike: lower --learning_rate, raise --temperature or --beta, or stop here",
            )
