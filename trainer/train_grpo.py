"""Group relative policy optimisation (arXiv 2402.03300): the rivals of a reply are other replies to the same prompt.

    A_i  = (R_i - mean R) / (std R + 1e-4)       over the G replies to a prompt, std unbiased
    r_t  = pi(y_t) / pi_old(y_t)                 pi_old: the policy that sampled, see rollout.py
    k3_t = ref(y_t) / pi(y_t) - log(ref(y_t) / pi(y_t)) - 1

    loss = mean over replies of 1/|y| sum_t ( - min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) + beta k3_t )

--loss_type, beside grpo:
    dr_grpo   (arXiv 2503.20783) A without / std, and 1/|y| becomes 1/max_new_tokens: no favour for short right replies
    dapo      (arXiv 2503.14476) mean over all tokens of the step, clip higher above (eps_high 0.28), no KL
    cispo     (arXiv 2506.13585) - stop_grad(min(r_t, 1 + eps_high)) A log pi(y_t), mean over all tokens, no KL:
              what is clipped is the weight of a token, none loses its gradient

A rollout serves --inner_epochs passes of --minibatches updates, so r differs from 1 behind the first. Where all replies
to a prompt get the same reward nothing says which is better: such a group gives no gradient, not even that of the KL
term, and a step of such groups alone leaves the weights as they are. --dynamic_sampling asks other prompts instead.

Beyond the paper: --kl_unbiased, r_t k3_t in place of k3_t, whose gradient is that of KL(pi || ref); k3's is not. The
reward is what rewards.py tells; the value of the loss says nothing, as A has mean 0: watch reward and accuracy.

    python trainer/train_grpo.py
    torchrun --nproc_per_node 2 trainer/train_grpo.py --loss_type dapo --dynamic_sampling
    deepspeed --num_gpus 2 trainer/train_grpo.py --deepspeed

Shapes: P prompts of this rank, G replies to each, N = P G; B replies of a micro-batch, T tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import BLANK, IGNORED
from trainer.rewards import Reply
from trainer.rollout import as_batch, prompts_of, token_logprobs
from trainer.runtime.distributed import rank
from trainer.runtime.engine import Engine
from trainer.runtime.flags import SWITCH, number
from trainer.runtime.rl import Task, parse_rl, report, rl_parser
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, run_training
from trainer.runtime.steps import Step

DEFAULTS = {  # of each --loss_type
    "grpo": {"beta": 0.04, "eps_high": 0.2},
    "dr_grpo": {"beta": 0.0, "eps_high": 0.2},
    "dapo": {"beta": 0.0, "eps_high": 0.28},
    "cispo": {"beta": 0.0, "eps_high": 4.0},
}


def group_advantages(rewards: Tensor, group: int, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Rewards (N,), G to a prompt in a row -> advantages (N,), and whether the group has any (N,) bool."""
    rewards = rewards.view(-1, group)  # (P, G)
    signal = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) > 1e-6
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scaled:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return (advantages * signal).flatten(), signal.expand_as(rewards).flatten()


def grpo_loss(
    new: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor, args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities (B, T) under three policies, advantages (B,), mask (B, T) of the tokens that count
    -> the share of each token in the loss (B, T), to be divided by replies or tokens, and what is logged (B, T)."""
    log_ratio = (new - old).masked_fill(~mask, 0.0)  # before exp: elsewhere there is anything
    ratio, A = log_ratio.exp(), advantages[:, None]
    if args.loss_type == "cispo":
        clipped = (ratio > 1 + args.eps_high) & (A != 0)
        gain = ratio.clamp(max=1 + args.eps_high).detach() * A * new.masked_fill(~mask, 0.0)
    else:
        gain = torch.minimum(ratio * A, ratio.clamp(1 - args.eps_low, 1 + args.eps_high) * A)
        clipped = ((ratio > 1 + args.eps_high) & (A > 0)) | ((ratio < 1 - args.eps_low) & (A < 0))
    logged = {"kl_old": (ratio - 1 - log_ratio).detach(), "clip_fraction": clipped.float()}
    losses = -gain * mask
    if ref is not None:
        apart = (ref - new).masked_fill(~mask, 0.0)
        k3 = apart.exp() - apart - 1
        logged["kl"] = k3.detach()
        losses = losses + args.beta * (ratio * k3 if args.kl_unbiased else k3)
    if args.loss_type == "grpo":
        losses = losses / mask.sum(1, keepdim=True).clamp(min=1)
    elif args.loss_type == "dr_grpo":
        losses = losses / args.max_new_tokens
    return losses, logged


# ------------------------------------------------------------------------------------------------------------ sampling


def sample_groups(task: Task, actor: Engine, step: Step) -> tuple[list[Reply], dict[str, Tensor]]:
    """G replies to each prompt of this rank in this step (N), and what they are rewarded with, {term: (N,)}.

    With --dynamic_sampling groups without a signal give way to groups of other prompts, as often as it says.
    """
    args, G = task.args, task.args.num_generations
    replies, rewards = task.answer(actor, prompts_of(step.batches), G, draw=(step.number, 0))
    for attempt in range(1, args.dynamic_sampling + 1):
        _, signal = group_advantages(rewards["reward"], G)
        dead = [i for i in range(0, len(replies), G) if not signal[i] and replies[i].row != BLANK]
        rng = np.random.default_rng([args.seed, step.number, attempt, rank()])
        rows = rng.permutation(len(task.prompts))[: len(dead)].tolist()
        others = [(row, int(task.prompts.order[row])) for row in rows]
        fresh, found = task.answer(actor, others, G, draw=(step.number, attempt))
        for i, j in zip(dead, range(0, len(fresh), G), strict=False):
            replies[i : i + G] = fresh[j : j + G]
            for name, values in rewards.items():
                values[i : i + G] = found[name][j : j + G]
    return replies, rewards


# ------------------------------------------------------------------------------------------------------------ training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = rl_parser(__doc__, generations=8, least=2)
    group = parser.add_argument_group("policy optimisation")
    group.add_argument("--loss_type", choices=list(DEFAULTS), default="grpo", help="see above (default: grpo)")
    group.add_argument("--eps_low", type=number(float, 0, 1), default=0.2, help="clip below 1 - eps (default: 0.2)")
    group.add_argument("--eps_high", type=number(float, 0), help="above 1 + eps (default: 0.2; dapo 0.28, cispo 4)")
    group.add_argument("--beta", type=number(float, 0), help="weight of the KL term (default: 0.04 for grpo, else 0)")
    group.add_argument("--kl_unbiased", **SWITCH, default=False, help="r k3 in place of k3 (default: 0)")
    group.add_argument(
        "--dynamic_sampling", type=number(int, 0), nargs="?", const=3, default=0,
        help="so many times a step (bare: 3) groups without a signal give way to other prompts (default: 0)",
    )  # fmt: skip
    args = parse_rl(parser, argv)
    for name, value in DEFAULTS[args.loss_type].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "grpo")

    # 2. The policy
    policy = build_model(run)

    # 3. Prompts, what replies are rewarded for, the engine that samples; the reference: the policy as it is now, frozen
    task = Task(policy, run)

    # 4. The loop: a step samples G replies to each prompt, and learns from them in several updates
    actor = make_engine(policy, run)
    totals, extra = task.totals(actor), {"watch": task.watch}
    with run.training({"actor": actor}, task.prompts, task.val_set, totals, extra=extra) as steps:
        for step in steps:
            # a. The policy answers, its replies are rewarded and compared within their group
            replies, rewards = sample_groups(task, actor, step)
            advantages, signal = group_advantages(rewards["reward"], args.num_generations, args.loss_type != "dr_grpo")
            report(step, task.watch, replies, rewards, advantages, signal)

            # b. As a batch, with the log-probabilities that the tokens were drawn with (old) and those of the reference
            rollout = as_batch(replies, task.prompts, run.device)
            rollout.extra["advantages"], rollout.extra["signal"] = advantages.to(run.device), signal.to(run.device)
            if task.reference:
                rollout.extra["reference"] = task.reference_logprobs(rollout)
            lengths = (rollout.inputs["labels"] != IGNORED).sum(1)
            counts = lengths if args.loss_type in ("dapo", "cispo") else (lengths > 0).long()

            # c. Updates from shuffled parts of the rollout
            for number, update in enumerate(step.updates(rollout, counts, args.inner_epochs, args.minibatches, signal)):
                for batch in update.micro_batches(actor):
                    new, mask, output = token_logprobs(actor, batch, args)
                    old, ref = batch.extra["old"], batch.extra.get("reference")
                    if number == 0:
                        task.watch.first_minibatch((new.detach() - old)[mask])
                    mask = mask & batch.extra["signal"][:, None]
                    losses, logged = grpo_loss(new, old, ref, batch.extra["advantages"], mask, args)
                    update.note(batch, output, losses)
                    step.note_samples(**{name: values[mask] for name, values in logged.items()})
                    actor.backward(losses.sum() / update.targets + update.balance(output, batch))
                actor.update(args.grad_clip)
            task.finish(step)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 5 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
