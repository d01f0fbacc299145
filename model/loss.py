"""The loss: -log p of each next token, from hidden states, without ever holding the logits of all tokens.

Shapes:  B batch   T tokens   D hidden   V vocabulary   N tokens with a target, or B * T   n tokens of a chunk
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import document_numbers
from .functional import compute_dtype
from .sampling import Truncation, keep_likely

LOSS_CHUNK = 1024  # tokens


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(hidden W^T)[target] per token: hidden (N, D), weight (V, D), targets (N,) >= 0 -> (N,) float32.

    With a truncation the softmax is over the tokens that sampling with it could draw, and the target.

    Works through the tokens in chunks, with the logits of one chunk at a time: memory does not grow with N times V.
    With `early` the gradients are computed while a chunk's logits are there, as if each token's loss counted once, and
    the backward pass only scales them; that holds where all losses got one weight, as they do in a mean. Otherwise the
    backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, early: bool, truncation: Truncation | None = None
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grads = new_gradients(hidden, weight, ctx.needs_input_grad[1]) if early else ()
        for part, logits, softmax in chunks_of_logits(hidden, weight, targets, truncation):
            picked, top = logits.gather(-1, targets[part, None]), logits.amax(-1, keepdim=True)
            torch.softmax(logits, dim=-1, dtype=torch.float32, out=softmax)
            log_sum = top - softmax.amax(-1, keepdim=True).log()  # log sum exp(logits)
            losses[part] = (log_sum - picked)[:, 0]
            if early:
                add_gradients(grads, part, softmax, hidden, weight, targets, 1.0)
        ctx.save_for_backward(hidden, weight, targets, *grads)
        ctx.truncation = truncation
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, *grads = ctx.saved_tensors
        if grads and (grad_losses == grad_losses[:1]).all():
            scale = grad_losses[:1].sum()  # 0 where there is no token
            grads = [grad if grad is None else grad * scale for grad in grads]
        else:
            grads = new_gradients(hidden, weight, ctx.needs_input_grad[1])
            for part, logits, softmax in chunks_of_logits(hidden, weight, targets, ctx.truncation):
                torch.softmax(logits, dim=-1, dtype=torch.float32, out=softmax)
                add_gradients(grads, part, softmax, hidden, weight, targets, grad_losses[part, None])
        grad_hidden, grad_weight = grads
        return (
            grad_hidden.to(hidden.dtype),
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
        )


def chunks_of_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, truncation: Truncation | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (which of the N tokens, their logits (n, V), room for as many float32 numbers: the same if it can be).

    What a truncation takes away has the logit -inf.
    """
    room = torch.empty(min(LOSS_CHUNK, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        rows = hidden[part]
        out = room[: len(rows)]
        logits = torch.mm(rows, weight.t(), out=out) if rows.dtype == out.dtype else rows @ weight.t()
        yield part, logits if truncation is None else truncate(logits.float(), targets[part], truncation), out


def truncate(logits: Tensor, targets: Tensor, truncation: Truncation) -> Tensor:
    """logits (n, V) with -inf for what cannot be drawn; a target stays, for a policy that has moved since it was."""
    settings = truncation.columns(logits.shape[-1], logits.device)
    return keep_likely(logits, *settings).scatter(-1, targets[:, None], logits.gather(-1, targets[:, None]))


def new_gradients(hidden: Tensor, weight: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
    """Room for the gradients of hidden and weight (None where it is frozen)."""
    return torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32) if both else None


def add_gradients(grads, part: slice, softmax: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, scale) -> None:
    """Put in what a chunk gives to both: d loss / d logits = softmax - one-hot(target), times the loss's own weight."""
    grad_hidden, grad_weight = grads
    softmax.scatter_add_(-1, targets[part, None], softmax.new_full((len(softmax), 1), -1.0))
    grad_logits = softmax.mul_(scale).to(weight.dtype)
    grad_hidden[part] = grad_logits @ weight
    if grad_weight is None:
        return
    if weight.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden[part])
    else:
        grad_weight += grad_logits.t() @ hidden[part]


def next_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    equal_weights: bool = True,
    places: Tensor | None = None,
    truncation: Truncation | None = None,
) -> tuple[Tensor, Tensor]:
    """-log p(labels[:, t] | what came before t), and the number of targets: hidden (B, T, D), weight (V, D) -> (B, T).

    This is the one shift of labels. Token t is predicted from the last real token before it in its own document; where
    there is none (t opens a document), where labels is -100 and on padding the loss is 0. places: target_places() of
    the labels, if known. truncation: of the distribution that p is.
    """
    targets, source = shifted_targets(labels, attention_mask)
    targets, source = targets.flatten(), source.flatten()
    wanted = targets >= 0
    dtype = compute_dtype(hidden)
    hidden, weight = hidden.flatten(0, 1).to(dtype), weight.to(dtype)
    on_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if places is None and on_cpu:  # (on a GPU, counting them would wait for it)
        places = wanted.nonzero()[:, 0]
    if places is not None:
        early = on_cpu and equal_weights and torch.is_grad_enabled() and hidden.requires_grad
        losses = losses_at(places, hidden, weight, targets, source, early, truncation)
    else:
        rows, wanted_ids = hidden.index_select(0, source), targets.clamp(min=0)
        losses = LinearCrossEntropy.apply(rows, weight, wanted_ids, False, truncation) * wanted
    return losses.view(labels.shape), wanted.sum()


@torch.compiler.disable  # the chunks of a number that differs from batch to batch: compiled for each anew
def losses_at(
    places: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    source: Tensor,
    early: bool,
    truncation: Truncation | None,
) -> Tensor:
    """Losses at the targets alone, which are worth their row of the big matrix product: N of (B T,), 0 elsewhere."""
    rows = hidden.index_select(0, source[places])
    losses = LinearCrossEntropy.apply(rows, weight, targets[places], early, truncation)
    return losses.new_zeros(targets.shape).index_copy(0, places, losses)


def target_places(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where the tokens with a target stand, flat: (B, T) -> (N,). Reads values: best before they are on a GPU."""
    return (shifted_targets(labels, attention_mask)[0].flatten() >= 0).nonzero()[:, 0]


def shifted_targets(labels: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What to predict (-100: nothing), and the flat index of the token that predicts it: (B, T) -> two of (B, T)."""
    B, T = labels.shape
    places = torch.arange(B * T, device=labels.device).view(B, T)
    opens = torch.arange(T, device=labels.device).expand(B, T) == 0
    if attention_mask is None or attention_mask.dim() != 2:
        return labels.masked_fill(opens, -100), (places - 1).clamp(min=0)
    mask = attention_mask[:, -T:].long()
    documents = document_numbers(mask)
    opens = opens | (documents != F.pad(documents, (1, -1), value=0))
    last_real = torch.where(mask > 0, places, 0).cummax(dim=-1).values
    return labels.masked_fill(opens | (mask == 0), -100), F.pad(last_real, (1, -1), value=0)
