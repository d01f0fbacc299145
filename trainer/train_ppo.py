"""Proximal policy optimisation (arXiv 1707.06347) from rewards: a critic says what was to be expected of each token.

    R_t   = - beta (log pi_old(y_t) - log ref(y_t)), and at the last token of the reply plus its score
    delta = R_t + gamma V_{t+1} - V_t             V_t: the critic before token t is there; 0 behind the last one
    A_t   = delta_t + gamma lambda A_{t+1}        generalised advantage estimation, gamma 1, lambda 0.95
    G_t   = A_t + V_t                             what V_t learns; then A is whitened over all tokens of the step

    r_t   = pi(y_t) / pi_old(y_t)
    policy loss = mean over tokens of max(- r_t A_t, - clip(r_t, 1 - eps, 1 + eps) A_t)
    value loss  = mean over tokens of 1/2 max((V - G)^2, (clip(V, V_old - eps_v, V_old + eps_v) - G)^2)

The actor is the policy; the critic has layers of its own, those of the policy or of --critic_weight, a scalar head that
starts at zero, and its own optimizer; ref is the policy as it began. A rollout serves --inner_epochs passes of
--minibatches updates; they end early once the mean KL to pi_old passes --target_kl.

A reply that was cut at --max_new_tokens ends there like any other, V behind it is 0, and --cut_penalty is taken off its
score. A step in which all rewards are equal says nothing of which reply is better; such steps are counted.

    python trainer/train_ppo.py
    torchrun --nproc_per_node 2 trainer/train_ppo.py --reasoning 1 --from_weight reason
    deepspeed --num_gpus 2 trainer/train_ppo.py --deepspeed

Shapes: N replies of this rank, B of a micro-batch, T tokens of the longest prompt with its reply.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import IGNORED
from model.errors import InputError
from model.heads import MiniMindForScoring
from model.loading import find_weights, load_model
from model.outputs import ScoringOutput
from trainer.rollout import as_batch, in_parts, prompts_of, token_logprobs, without_dropout
from trainer.runtime.distributed import sum_over_ranks
from trainer.runtime.engine import Engine
from trainer.runtime.flags import number
from trainer.runtime.rl import Task, parse_rl, report, rl_parser, unequal
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, run_training
from trainer.runtime.steps import MicroBatch


def token_rewards(scores: Tensor, old: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Scores (N,), log-probabilities (N, T) under pi_old and the reference, mask (N, T) -> R (N, T)."""
    is_last = mask & ~F.pad(mask, (0, 1))[:, 1:]  # a reply is one run of tokens
    return scores[:, None] * is_last - beta * (old - ref).masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """R, V and the mask of the replies, (N, T) each -> advantages and returns (N, T), 0 outside."""
    values = values.masked_fill(~mask, 0.0)  # so V behind the last token is 0
    advantages, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(after)
        delta = rewards[:, t] + gamma * following - values[:, t]
        after = advantages[:, t] = (delta + gamma * lam * after) * mask[:, t]
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the tokens of all ranks: (N, T) -> (N, T), 0 outside the mask."""
    chosen = values[mask].cpu().double()  # (MPS knows no float64)
    own = [float(chosen.sum()), float((chosen**2).sum()), float(len(chosen))]
    total, squares, count = sum_over_ranks(own, values.device)
    mean = total / max(count, 1)
    deviation = max(squares - count * mean**2, 0.0) / max(count - 1, 1)
    return ((values - mean) / (deviation**0.5 + 1e-4)).masked_fill(~mask, 0.0)


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, dict]:
    """Log-probabilities, advantages, mask (B, T) -> loss of each token (B, T), and what is logged (B, T)."""
    log_ratio = (new - old).masked_fill(~mask, 0.0)  # before exp: elsewhere there is anything
    ratio = log_ratio.exp()
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - eps, 1 + eps) * advantages) * mask
    clipped = ((ratio > 1 + eps) & (advantages > 0)) | ((ratio < 1 - eps) & (advantages < 0))
    return losses, {"kl_old": (ratio - 1 - log_ratio).detach(), "clip_fraction": clipped.float()}


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, eps: float) -> Tensor:
    """V now, V when it was rolled out, G, mask (B, T) -> loss of each token (B, T)."""
    near = old + (values - old).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).masked_fill(~mask, 0.0)


def token_values(critic: Engine, batch: MicroBatch) -> tuple[Tensor, ScoringOutput]:
    """V of every token, from the place before it, which has not seen it: (B, T); and the critic's whole output."""
    output = critic(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"])
    return F.pad(output.scores, (1, -1)), output


def make_critic(args: argparse.Namespace, policy: nn.Module, run: Run) -> MiniMindForScoring:
    """The critic before it has learned anything: layers of the policy as it is or of --critic_weight, its head zero."""
    if args.critic_weight == "policy":
        critic = MiniMindForScoring.from_language_model(copy.deepcopy(policy))
    else:
        path = find_weights(args.out_dir, args.critic_weight)
        critic, _ = load_model(path, device=run.device, kind=MiniMindForScoring)
        nn.init.zeros_(critic.score.weight)
        if critic.config.vocab_size != policy.config.vocab_size:
            raise InputError(
                f"{path} has a vocabulary of {critic.config.vocab_size}, the policy one of {policy.config.vocab_size}: "
                "give --critic_weight of the same tokenizer"
            )
    return without_dropout(critic.requires_grad_(True).train())


def explained(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """The share of the variance of this rank's returns that the critic foresaw, (1,): 1 at best, 0 for a constant."""
    if mask.sum() < 2 or returns[mask].var() < 1e-8:
        return torch.zeros(1)
    return (1 - (returns - values)[mask].var() / returns[mask].var())[None]


# ------------------------------------------------------------------------------------------------------------ training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = rl_parser(__doc__, generations=4, inner_epochs=2)
    group = parser.add_argument_group("policy optimisation")
    group.add_argument("--critic_weight", default="policy", help="layers of the critic: policy, or a stage or a file")
    group.add_argument("--critic_learning_rate", type=number(float, 0), help="peak (default: three times the policy's)")
    group.add_argument("--gamma", type=number(float, 0, 1), default=1.0, help="discount of a token (default: 1)")
    group.add_argument("--lam", type=number(float, 0, 1), default=0.95, help="lambda of the advantages (default: 0.95)")
    group.add_argument("--eps", type=number(float, 0, 1), default=0.2, help="clip of the ratio (default: 0.2)")
    group.add_argument("--eps_value", type=number(float, 0), default=0.2, help="clip of the value (default: 0.2)")
    group.add_argument("--beta", type=number(float, 0), default=0.05, help="weight of the KL reward (default: 0.05)")
    group.add_argument("--cut_penalty", type=number(float, 0), default=1.0, help="of a reply cut short (default: 1)")
    group.add_argument("--target_kl", type=number(float, 0), default=0.05, help="ends the updates (default: 0.05)")
    return parse_rl(parser, argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "ppo_actor")

    # 2. The policy and the critic
    policy = build_model(run)
    critic_model = make_critic(args, policy, run)

    # 3. Prompts, what replies are rewarded for, the engine that samples; the reference: the policy as it is now, frozen
    task = Task(policy, run, critic_model)

    # 4. The loop: a step samples replies, and learns from them in several updates
    actor = make_engine(policy, run)
    rate = 3 * run.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
    critic = make_engine(critic_model, run, rate)
    totals, engines = task.totals(actor), {"actor": actor, "critic": critic}
    with run.training(engines, task.prompts, task.val_set, totals, extra={"watch": task.watch}) as steps:
        for step in steps:
            # a. The policy answers, its replies are rewarded
            replies, rewards = task.answer(actor, prompts_of(step.batches), args.num_generations, draw=(step.number,))
            rewards["reward"] -= args.cut_penalty * torch.tensor([float(reply.cut) for reply in replies])

            # b. As a batch; what the reference and the critic say of every token; advantages and returns
            rollout = as_batch(replies, task.prompts, run.device)
            mask, old = rollout.inputs["labels"] != IGNORED, rollout.extra["old"]
            ref = task.reference_logprobs(rollout) if task.reference else old
            values = in_parts(lambda part: token_values(critic, part)[0], rollout, run)
            R = token_rewards(rewards["reward"].to(run.device), old, ref, mask, args.beta)
            advantages, returns = gae(R, values, mask, args.gamma, args.lam)
            rollout.extra.update(values=values, returns=returns, advantages=whiten(advantages, mask))
            differ = unequal(rewards["reward"], replies)
            report(step, task.watch, replies, rewards, differ, differ)
            step.note_samples(kl=(old - ref)[mask], value=values[mask], explained=explained(values, returns, mask))

            # c. Updates of both from shuffled parts of the rollout
            updates = step.updates(rollout, mask.sum(1), args.inner_epochs, args.minibatches)
            for count, update in enumerate(updates, start=1):
                for batch in update.micro_batches(actor, critic):
                    extra = batch.extra
                    new, mask, output = token_logprobs(actor, batch, args)
                    if count == 1:
                        task.watch.first_minibatch((new.detach() - extra["old"])[mask])
                    losses, logged = policy_loss(new, extra["old"], extra["advantages"], mask, args.eps)
                    actor.backward(losses.sum() / update.targets + update.balance(output, batch))
                    V, judged = token_values(critic, batch)  # once the policy's activations are gone
                    value_losses = value_loss(V, extra["values"], extra["returns"], mask, args.eps_value)
                    critic.backward(value_losses.sum() / update.targets + update.balance(judged, batch))
                    totals_of = {name: (x * mask).sum() for name, x in logged.items()}
                    update.note(batch, output, losses, value_loss=value_losses.sum(), **totals_of)
                actor.update(args.grad_clip)
                critic.update(args.grad_clip)
                if update.mean("kl_old") > args.target_kl:
                    break
            step.note_samples(updates=torch.tensor([float(count)]))
            task.finish(step)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 4 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
