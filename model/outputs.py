"""What the models return. Shapes: B batch, T tokens, D hidden, E experts."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class MiniMindModelOutput(BaseModelOutputWithPast):
    """last_hidden_state (B, T, D); with experts also aux_loss (scalar) and expert_load (layers, E)."""

    aux_loss: Tensor | None = None
    expert_load: Tensor | None = None


@dataclass
class MiniMindOutput(CausalLMOutputWithPast):
    """loss: mean of token_losses over the targets, never with aux_loss in it; token_losses (B, T) float32.

    aux_loss: balance loss of the experts, times aux_loss_alpha, summed over layers; expert_load (layers, E): how many
    real tokens each expert got. Both None for a dense model.
    """

    token_losses: Tensor | None = None
    aux_loss: Tensor | None = None
    expert_load: Tensor | None = None


@dataclass
class ScoringOutput(ModelOutput):
    """scores (B, T) float32; aux_loss and expert_load as MiniMindOutput has them, None for a dense model."""

    scores: Tensor | None = None
    aux_loss: Tensor | None = None
    expert_load: Tensor | None = None
