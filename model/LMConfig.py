"""MiniMindConfig: every number that defines a MiniMind model, and the six published sizes as presets.

The field names are those of the public MiniMind2 checkpoints, so that their config.json loads as it is. A key that
nobody knows is refused: a misspelt `num_hiden_layers` must not quietly train the default depth.
"""

import dataclasses
import inspect
import math
from typing import Any

from transformers import PretrainedConfig

from .errors import UsageError

# Sizes that differ from the defaults of MiniMindConfig, by published name.
PRESETS: dict[str, dict[str, Any]] = {
    "minimind2-small": {},
    "minimind2": {"hidden_size": 768, "num_hidden_layers": 16},
    "minimind2-moe": {"hidden_size": 640, "use_moe": True},
    "minimind-v1-small": {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e4},
    "minimind-v1-moe": {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_theta": 1e4,
        "use_moe": True,
        "n_shared_experts": 2,
    },
    "minimind-v1": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_theta": 1e4,
    },
}

# YaRN stretches the trained length by this factor. A model that has never seen a longer text than the trained one
# keeps its quality up to about four times that length; a larger factor costs quality at every length.
YARN_DEFAULTS = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}

# Keys that transformers itself writes into config.json or passes on while loading; they never change the mathematics.
_TRANSFORMERS_KEYS = {field.name for field in dataclasses.fields(PretrainedConfig)} | {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_from_auto",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


class MiniMindConfig(PretrainedConfig):
    """Sizes and settings of a MiniMind model; impossible combinations raise UsageError.

    intermediate_size None means 8/3 * hidden_size rounded up to a multiple of 64.
    original_max_position_embeddings is the length that the weights were trained at: YaRN starts from it.
    inference_rope_scaling turns YaRN on; rope_scaling overrides its numbers (see `yarn_parameters`).
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ("past_key_values", "token_losses", "aux_loss", "expert_load")
    rope_scaling = None  # a plain attribute again: transformers 5 makes it an alias of rope_parameters

    def __init__(
        self,
        hidden_size: int = 512,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        vocab_size: int = 6400,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        max_position_embeddings: int = 32768,
        original_max_position_embeddings: int = 2048,
        inference_rope_scaling: bool = False,
        rope_scaling: dict[str, Any] | None = None,
        dropout: float = 0.0,
        flash_attn: bool = True,
        hidden_act: str = "silu",
        tie_word_embeddings: bool = True,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = 0,
        use_cache: bool = True,
        **transformers_keys: Any,
    ) -> None:
        unknown = sorted(set(transformers_keys) - _TRANSFORMERS_KEYS)
        if unknown:
            raise UsageError(f"MiniMindConfig does not know {', '.join(unknown)}: correct or remove it")
        super().__init__(**transformers_keys)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.vocab_size = vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.original_max_position_embeddings = original_max_position_embeddings
        self.inference_rope_scaling = inference_rope_scaling
        self.rope_scaling = rope_scaling
        self.dropout = dropout
        self.flash_attn = flash_attn
        self.hidden_act = hidden_act
        self.tie_word_embeddings = tie_word_embeddings
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.use_cache = use_cache
        self.intermediate_size = intermediate_size
        self._check_types()
        self._check_ranges()
        self.intermediate_size = intermediate_size or 64 * math.ceil(8 / 3 * hidden_size / 64)
        self._check_combinations()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MiniMindConfig":
        """The published size `name`, with single fields replaced by `overrides`."""
        if name not in PRESETS:
            raise UsageError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def yarn_parameters(self) -> dict[str, Any] | None:
        """What YaRN computes with, in the words of transformers' `rope_parameters`, or None while it is off."""
        if not self.inference_rope_scaling:
            return None
        given = {("rope_type" if key == "type" else key): value for key, value in (self.rope_scaling or {}).items()}
        yarn = {**YARN_DEFAULTS, "original_max_position_embeddings": self.original_max_position_embeddings, **given}
        if yarn.get("attention_factor") is None:
            yarn["attention_factor"] = 0.1 * math.log(yarn["factor"]) + 1.0
        return yarn

    def _check_types(self) -> None:
        switches = ("inference_rope_scaling", "flash_attn", "tie_word_embeddings", "use_moe", "seq_aux")
        for name in (*switches, "norm_topk_prob", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("rms_norm_eps", "rope_theta", "dropout", "aux_loss_alpha"):
            if not is_number(getattr(self, name)):
                raise UsageError(f"{name} must be a number, not {getattr(self, name)!r}")
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, ids in (
            ("bos_token_id", [self.bos_token_id]), ("eos_token_id", ends), ("pad_token_id", [self.pad_token_id])
        ):  # fmt: skip
            if not all(i is None or isinstance(i, int) for i in ids):
                raise UsageError(f"{name} must be a token's number, not {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        lengths = ("max_position_embeddings", "original_max_position_embeddings")
        for name in (*sizes, *lengths, "num_experts_per_tok", "n_routed_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a positive whole number, not {value!r}")
        if self.intermediate_size is not None and not isinstance(self.intermediate_size, int):
            raise UsageError(f"intermediate_size must be a positive whole number, not {self.intermediate_size!r}")
        if not isinstance(self.n_shared_experts, int) or self.n_shared_experts < 0:
            raise UsageError(f"n_shared_experts must be 0 or more, not {self.n_shared_experts!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)!r}")
        for name, only in (("hidden_act", "silu"), ("scoring_func", "softmax")):
            if getattr(self, name) != only:
                raise UsageError(f"{name} must be {only!r} (nothing else is implemented), not {getattr(self, name)!r}")

    def _check_combinations(self) -> None:
        def refuse(problem: str) -> None:
            raise UsageError(f"impossible model sizes: {problem}")

        if self.intermediate_size < 1:
            refuse(f"intermediate_size {self.intermediate_size} is not positive")
        if self.hidden_size % self.num_attention_heads:
            refuse(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}")
        if self.head_dim % 2:
            refuse(f"a head of hidden_size / num_attention_heads = {self.head_dim} numbers cannot be rotated in pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            refuse(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than n_routed_experts {self.n_routed_experts}"
            )
        self._check_rope_scaling()

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, dict):
            raise UsageError(f"rope_scaling must hold YaRN's numbers by name, not {self.rope_scaling!r}")
        known = {*YARN_DEFAULTS, "type", "original_max_position_embeddings", "attention_factor"}
        unknown = sorted(set(self.rope_scaling) - known)
        if unknown:
            raise UsageError(f"rope_scaling does not know {', '.join(unknown)}: correct or remove it")
        kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "yarn"))
        if kind != "yarn":
            raise UsageError(f"rope_scaling must be of type 'yarn' (nothing else is implemented), not {kind!r}")
        for name in known - {"type", "rope_type"}:
            if not is_number(self.rope_scaling.get(name) or 0):
                raise UsageError(f"rope_scaling {name} must be a number, not {self.rope_scaling[name]!r}")
        if not self.rope_scaling.get("factor", YARN_DEFAULTS["factor"]) >= 1:
            raise UsageError(f"rope_scaling factor must be 1 or more, not {self.rope_scaling['factor']!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Every field by name, for whoever stores or compares configs.
CONFIG_FIELDS = tuple(
    name for name in inspect.signature(MiniMindConfig.__init__).parameters if name not in ("self", "transformers_keys")
)
