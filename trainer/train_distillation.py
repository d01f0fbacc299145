"""White-box distillation: a small student learns the whole distribution of a large teacher, token by token.

    loss = 1/N sum_t m_t [ alpha CE_t + (1 - alpha) tau^2 KL_t ]
    CE_t = - log p_student(x_t | x_<t)
    KL_t = sum_v p_teacher(v) log(p_teacher(v) / p_student(v))     both softmax(logits / tau), v over the vocabulary
           m_t = 1 on each assistant turn's content and its closing <|im_end|>, N = sum of m_t over the optimizer step

The factor tau^2 keeps the size of the gradient: that of KL alone shrinks with 1/tau^2 (arXiv 1503.02531). alpha 1 is
plain fine-tuning, alpha 0 the teacher alone. Teacher and student must have one vocabulary, because probabilities are
compared id by id. The student starts from its pretrained weights, as train_full_sft.py does: the loss has fine-tuning
in it, so that no fine-tuned student is needed (--from_weight full_sft goes on from one, none starts from nothing).

    python trainer/train_distillation.py                        teacher: out/full_sft_768.pth (preset minimind2)
    python trainer/train_distillation.py --teacher ../MiniMind2 --alpha 0.2 --temperature 2
    python trainer/train_distillation.py --help
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import SFTDataset
from model.attention import positions_from_mask, visible_keys
from model.errors import InputError
from model.LMConfig import PRESETS
from model.loading import check_vocab, find_weights, load_model, missing
from model.loss import shifted_targets
from model.model_minimind import MiniMindForCausalLM
from model.outputs import MiniMindOutput
from trainer.runtime.checkpoint import config_hash
from trainer.runtime.flags import COUNT, common_parser, number
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training, weights_file_hash
from trainer.runtime.steps import MicroBatch

CHUNK = 1024  # targets whose float32 probabilities exist at one time
READ = ("input_ids", "attention_mask", "document_bounds")  # what both models take
WHOLE_LOGITS = 5  # the student's, the teacher's, the gradient in chunks and joined; what a chunk takes beside these


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha CE + (1 - alpha) tau^2 KL of each target, CE and KL: logits (N, V), targets (N,) -> three of (N,)."""
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    ce = F.cross_entropy(student_logits, targets, reduction="none")
    student, teacher = (F.log_softmax(logits / tau, dim=-1) for logits in (student_logits, teacher_logits))  # (N, V)
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    return alpha * ce + (1 - alpha) * tau**2 * kl, ce, kl


class Targets(NamedTuple):
    """The N tokens that a batch teaches, in the order of its rows."""

    ids: Tensor  # (N,)
    places: Tensor  # (N,), flat: where they stand
    sources: tuple[Tensor, Tensor]  # rows and columns, (N,): what predicts them; only its logits are ever computed
    shape: torch.Size  # (B, T)


def find_targets(batch: MicroBatch) -> Targets:
    """The tokens whose label is not -100: where they stand was found before the batch was on its device."""
    labels, places = batch.inputs["labels"], batch.inputs["target_places"]
    ids, source = (x.flatten() for x in shifted_targets(labels, batch.inputs["attention_mask"]))
    source, T = source[places], labels.shape[1]
    return Targets(ids[places], places, (source // T, source % T), labels.shape)


def read(model: Callable, batch: MicroBatch, targets: Targets) -> MiniMindOutput:
    """What a MiniMind, or the engine around one, says of packed rows, with the logits for each target alone: (N, V)."""
    inputs = {name: batch.inputs[name] for name in READ if name in batch.inputs}
    return model(**inputs, use_cache=False, logits_to_keep=targets.sources)


def losses_at_targets(
    student_logits: Tensor, teacher_logits: Tensor, targets: Targets, alpha: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """distillation_loss at each target, 0 elsewhere: logits (N, V) -> three of (B, T).

    In chunks, whose float32 probabilities are computed again in the backward pass: those of all N are never kept.
    """
    chunks = zip(*(x.split(CHUNK) for x in (student_logits, teacher_logits, targets.ids)), strict=True)
    losses = [
        checkpoint(distillation_loss, *chunk, alpha, tau, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    whole = (torch.cat(parts) for parts in zip(*losses, strict=True))  # three of (N,)
    return tuple(x.new_zeros(targets.shape.numel()).index_copy(0, targets.places, x).view(targets.shape) for x in whole)


@torch.no_grad()
def teach(teacher: PreTrainedModel, batch: MicroBatch, targets: Targets) -> Tensor:
    """The teacher's logits for each target, on packed rows in which no document sees another: (N, V)."""
    if isinstance(teacher, MiniMindForCausalLM):
        return read(teacher, batch, targets).logits
    input_ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    # Other classes take a mask for padding alone: they are told who sees whom, (B, 1, T, T), and where each one stands.
    visible, positions = visible_keys(mask, mask.shape[1]), positions_from_mask(mask)
    output = teacher(input_ids=input_ids, attention_mask=visible, position_ids=positions, use_cache=False)
    return output.logits[targets.sources]


def held_out(teacher: PreTrainedModel, alpha: float, tau: float, model: torch.nn.Module, batch: MicroBatch) -> dict:
    """The sums of a held-out batch: loss, CE and KL."""
    targets = find_targets(batch)
    student_logits, teacher_logits = read(model, batch, targets).logits, teach(teacher, batch, targets)
    losses = losses_at_targets(student_logits, teacher_logits, targets, alpha, tau)
    return {name: x.sum() for name, x in zip(("loss", "ce", "kl"), losses, strict=True)}


def load_teacher(args: argparse.Namespace, run: Run) -> tuple[PreTrainedModel, Path]:
    """The teacher that the flags name, frozen, and where it was found."""
    sizes = {"hidden_size": args.teacher_hidden_size, "num_hidden_layers": args.teacher_num_hidden_layers}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    preset = args.teacher_preset or (None if sizes else "minimind2")
    path = find_weights(args.out_dir, args.teacher, preset=preset, **sizes)
    if not path.exists():
        size = f", its size is --preset {preset}" if preset and path != Path(args.teacher) else ""
        raise InputError(f"no teacher: {missing(path)}{size}; name another with --teacher or --teacher_hidden_size")
    dtype = run.dtype if run.device.type == "cuda" else torch.float32  # elsewhere autocast finds float32 weights
    teacher, _ = load_model(path, preset=args.teacher_preset, config_overrides=sizes, device=run.device, dtype=dtype)
    parameters = sum(p.numel() for p in teacher.parameters())
    print(f"teacher: {path}, {parameters / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}")
    return teacher.requires_grad_(False), path


def check_same_vocabulary(
    teacher: PreTrainedModel, path: Path, student: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """InputError unless an id means the same token to both."""
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"the teacher {path} has a vocabulary of {teacher.config.vocab_size}, the student one of "
            f"{student.config.vocab_size}: choose a teacher that was trained with the student's tokenizer"
        )
    check_vocab(tokenizer, teacher.config, path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "sft_mini_512.jsonl", "pretrain", 2, lr={"muon": 1e-3, "adamw": 2e-4})
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", default="full_sft", help="stage, .pth or transformers folder (default: full_sft)")
    group.add_argument("--teacher_preset", choices=PRESETS, help="size of the teacher (default: minimind2)")
    group.add_argument("--teacher_hidden_size", type=COUNT, help="width of the teacher, in place of the preset's")
    group.add_argument("--teacher_num_hidden_layers", type=COUNT, help="depth that the teacher must have")
    group.add_argument("--alpha", type=number(float, 0, 1), default=0.5, help="weight of the true token (default: 0.5)")
    group.add_argument("--temperature", type=number(float, 0.01), default=1.0, help="tau: above 1 flatter (default: 1)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "distill")

    # 2. Tokenizer, the student, and the frozen teacher
    student = build_model(run)
    teacher, teacher_path = load_teacher(args, run)
    check_same_vocabulary(teacher, teacher_path, student, run.tokenizer)
    run.settings = {
        "--alpha": args.alpha,
        "--temperature": args.temperature,
        "teacher hash": weights_file_hash(teacher_path),
        "teacher config": config_hash(teacher.config),  # a .pth need not tell it: --teacher_preset does
    }

    # 3. Data: packed rows of whole conversations, labels on the answers
    train_set, val_set = open_data(SFTDataset, "sft_mini_512.jsonl", "sft.jsonl", run)
    run.plan(student, train_set, WHOLE_LOGITS)

    # 4. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(student, run)
    totals = partial(held_out, teacher, args.alpha, args.temperature)
    with run.training({"model": engine}, train_set, val_set, totals, run.tokenizer) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                targets = find_targets(batch)
                with run.autocast():
                    teacher_logits = teach(teacher, batch, targets)  # (N, V)
                output = read(engine, batch, targets)
                losses, ce, kl = losses_at_targets(output.logits, teacher_logits, targets, args.alpha, args.temperature)
                loss = losses.sum() / step.targets
                step.note(batch, output, losses, ce=ce.sum(), kl=kl.sum())
                engine.backward(loss + step.balance(output, batch))
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 7 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
