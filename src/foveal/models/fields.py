"""`Fields`: a checkpoint's config.json, read field by field, strictly.

What happens to a field:

- a family reads it: an unknown value is a `ConfigError` that names the field and what is accepted;
- it is in `HARMLESS`: it does not change what the model computes, and is ignored;
- it is in `MATTERS` and the family does not read it: it must have the value there that switches it
  off, else `ConfigError`, because some relative of the family computes something else by it;
- nobody knows it: the reference implementation of the family does not read it either (a test
  compares with the configuration classes of transformers), so it is ignored with a warning in the
  log unless it is empty. Names that begin with an underscore are private notes of other tools.

A field that is absent or null has the default of the reference implementation's class, unless it
is a size: those have no defaults but what follows from other sizes.
"""

from collections.abc import Mapping
from typing import TypeVar

from foveal.core.errors import ConfigError
from foveal.core.log import warn_once

T = TypeVar("T")

_HARMLESS = """
    architectures model_type transformers_version torch_dtype dtype name_or_path auto_map
    transformers.js_config tokenizer_class unsloth_version unsloth_fixed

    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id
    use_cache cache_implementation task_specific_params prefix suppress_tokens bad_words_ids
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id max_length min_length do_sample
    num_beams temperature top_k top_p typical_p repetition_penalty length_penalty early_stopping
    no_repeat_ngram_size num_return_sequences num_beam_groups diversity_penalty
    encoder_no_repeat_ngram_size remove_invalid_values

    initializer_range initializer_factor attention_dropout resid_pdrop embd_pdrop attn_pdrop
    hidden_dropout router_aux_loss_coef gradient_checkpointing problem_type id2label label2id
    num_labels finetuning_task

    pretraining_tp torchscript output_attentions output_hidden_states return_dict
    return_dict_in_generate output_scores chunk_size_feed_forward attn_implementation
    reorder_and_upcast_attn tf_legacy_loss use_bfloat16 is_llama_config full_attn_mod
    interpolate_factor

    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout

    n_ctx is_decoder cross_attention_hidden_size tie_encoder_decoder
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Fields that do not change what a model computes: who made it and how it was stored; special
tokens and defaults of generation (read elsewhere); training only; how the reference computes, not
what; heads for other tasks than text; older names and leftovers of encoder-decoders."""

MATTERS: dict[str, tuple[object, ...]] = {
    "quantization_config": (),
    "is_encoder_decoder": (),
    "add_cross_attention": (),
    "pruned_heads": (),
    "use_bidirectional_attention": (),
    "rope_interleaved": (),
    "use_mrope": (),
    "layer_types": (),
    "sliding_window_pattern": (),
    "no_rope_layers": (),
    "lm_head_bias": (),
    "attention_bias": (),
    "mlp_bias": (),
    "partial_rotary_factor": (1.0,),
    "rope_parameters": (),
    "rope_scaling": (),
    "scale_attn_by_inverse_layer_idx": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "num_local_experts": (),
    "num_experts": (),
    "kv_lora_rank": (),
    "clip_qkv": (),
    "alibi": (),
}
"""Accepted values beside the empty ones (null, false, 0, "", [], {}) where nobody reads it."""

_EMPTY: tuple[object, ...] = (None, False, "", [], {})


class Fields:
    """A dictionary of settings that remembers what was read. Raises `ConfigError`."""

    def __init__(self, values: Mapping[str, object], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self.read: set[str] = set()
        """Names of the fields that were asked for."""

    def get(self, name: str) -> object:
        """The value as it stands; None if absent."""
        self.read.add(name)
        return self._values.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer; required if there is no default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(name, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0; required if there is no default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refusal(name, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number above 0, or None if absent or null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """The meaning of a word; required if there is no default."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(name, ", ".join(choices))
        return choices[value]

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A required list of `length` numbers above 0."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != length:
            raise self.refusal(name, f"a list of {length} numbers")
        return tuple(Fields({name: item}, self._where).number(name) for item in value)

    def words(self, name: str, choices: tuple[str, ...], length: int) -> tuple[str, ...] | None:
        """A list of `length` words, or None if absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or set(value) - set(choices):
            raise self.refusal(name, f"a list of {length} of: {', '.join(choices)}")
        return tuple(value)

    def inner(self, name: str) -> "Fields | None":
        """A dictionary inside this one, or None if absent, null or empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "an object")
        return Fields(value, f"{self._where}: {name}") if value else None

    def only(self, name: str, *accepted: object) -> None:
        """Refuse every value but these and the empty ones."""
        value = self.get(name)
        if value not in _EMPTY and value not in accepted:
            words = ", ".join(repr(word) for word in accepted) or "nothing"
            raise self.refusal(name, f"{words} (this family has no such thing)")

    def only_keys(self, known: frozenset[str]) -> None:
        """Refuse a field that is not among these, unless it is empty."""
        for name in sorted(self._values.keys() - known):
            if self._values[name] not in _EMPTY:
                raise self.refusal(name, f"only {', '.join(sorted(known))}")

    def finish(self) -> None:
        """Refuse what matters and was not read; warn of what nobody knows."""
        for name in MATTERS.keys() - self.read:
            self.only(name, *MATTERS[name])
        for name in sorted(self._values.keys() - self.read - HARMLESS):
            if not name.startswith("_") and self._values[name] not in _EMPTY:
                warn_once(f"{self._where}: ignoring the unknown field {name!r}")

    def refusal(self, name: str, accepted: str) -> ConfigError:
        """The error that says what came and what is accepted."""
        got = repr(self._values[name]) if name in self._values else "nothing"
        return ConfigError(f"{self._where}: {name}: got {got}; accepted: {accepted}")

    def _value(self, name: str, default: object) -> object:
        value = self.get(name)
        return default if value is None else value
