"""`ModelConfig`: everything that makes one decoder differ from another, as frozen data.

One decoder serves all families, so a family is a way to fill this record. Training from scratch
fills it directly. `block(layer)` derives what the layers below need to know.
"""

from dataclasses import dataclass

from foveal.attention.spec import AttentionSpec
from foveal.core.errors import ConfigError
from foveal.kv.cache import CacheShape
from foveal.nn.attention import AttentionConfig
from foveal.nn.block import BlockConfig
from foveal.nn.mlp import MLPConfig
from foveal.nn.norm import NormConfig, NormKind
from foveal.nn.rope import RopeConfig
from foveal.nn.scaling import DynamicScaling, LongScaling, YarnScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer. Raises `ConfigError` for sizes that do not fit together."""

    family: str
    """Whose files it reads and writes, such as "llama"."""
    vocab_size: int
    width: int
    """E: size of a token's vector between blocks."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    """F: size between the matrices of an MLP."""
    max_positions: int
    """Tokens per sequence that the model was made for."""

    rope: RopeConfig | None = None
    """Rotary positions; None means learned ones, `max_positions` of them, added to the tokens."""
    window_rope: RopeConfig | None = None
    """Rotary positions of the layers that have a window, where they differ (Gemma 3)."""
    windows: tuple[int | None, ...] = ()
    """Per layer, how many keys a query sees, its own included; None is all. () is all for all."""
    attention_scale: float | None = None
    """Factor on q . k; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    norm: NormKind = NormKind.RMS
    norm_eps: float = 1e-5
    post_norms: bool = False
    """Normalise what attention and MLP add, too (Gemma 2 and 3)."""
    head_norm: bool = False
    """Normalise query and key heads (Qwen3, Gemma 3)."""

    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    tied: bool = False
    """The output matrix is the token embedding."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "mlp_width", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: got {value!r}; accepted: an integer of at least 1")
        if self.windows and len(self.windows) != self.num_layers:
            got = f"{len(self.windows)} windows"
            raise ConfigError(f"windows: got {got}; accepted: one for each of {self.num_layers}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"windows: got {self.windows}; accepted: at least 1 each, or None")
        for rope in (self.rope, self.window_rope):
            if rope is not None and rope.dim > self.head_dim:
                raise ConfigError(f"rope: got dim {rope.dim}; accepted: up to {self.head_dim}")
        for layer in range(self.num_layers):
            self.block(layer)

    @property
    def context(self) -> int:
        """Tokens that a sequence may have: `max_positions`, stretched where the rotary scaling
        goes beyond it (dynamic NTK and YaRN; other kinds have it in `max_positions` already)."""
        scaling = None if self.rope is None else self.rope.scaling
        if isinstance(scaling, DynamicScaling | YarnScaling):
            return max(self.max_positions, int(scaling.original_length * scaling.factor))
        return self.max_positions

    @property
    def restart_length(self) -> int | None:
        """Tokens beyond which every key must be computed anew, because the rotary frequencies of
        the whole sequence change there (LongRoPE); None where that never happens."""
        scaling = None if self.rope is None else self.rope.scaling
        return scaling.original_length if isinstance(scaling, LongScaling) else None

    @property
    def stream_refusal(self) -> str | None:
        """Why this model cannot read a stream longer than its context; None if it can."""
        if self.rope is None:
            return f"it has {self.max_positions} learned positions, and none beyond them"
        for rope in (self.rope, self.window_rope):
            if rope is not None and rope.scaling.length_dependent:
                kind = type(rope.scaling).__name__
                return f"its rotary frequencies change with the length of the text ({kind})"
        return None

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, its own included; None is all."""
        return self.windows[layer] if self.windows else None

    def rotary(self, layer: int) -> RopeConfig | None:
        """The rotary positions of this layer."""
        if self.window_rope is not None and self.window(layer) is not None:
            return self.window_rope
        return self.rope

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary positions of every layer; none where positions are learned."""
        return tuple(rope for rope in map(self.rotary, range(self.num_layers)) if rope is not None)

    def spec(self, layer: int) -> AttentionSpec:
        """The attention of this layer."""
        window = self.window(layer)
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            causal=True,
            window=None if window is None else (window - 1, None),
            scale=self.attention_scale,
            softcap=self.attention_softcap,
        )

    def norm_of(self, size: int) -> NormConfig:
        """A normalisation of this model over `size` elements."""
        return NormConfig(size=size, eps=self.norm_eps, kind=self.norm)

    def block(self, layer: int) -> BlockConfig:
        """The block of this layer."""
        attention = AttentionConfig(
            width=self.width,
            spec=self.spec(layer),
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            head_norm=self.norm_of(self.head_dim) if self.head_norm else None,
        )
        mlp = MLPConfig(
            width=self.width,
            inner=self.mlp_width,
            activation=self.activation,
            gated=self.gated,
            bias=self.mlp_bias,
        )
        return BlockConfig(
            attention=attention,
            mlp=mlp,
            norm=self.norm_of(self.width),
            post_norms=self.post_norms,
        )

    def cache_shape(self, batch: int) -> CacheShape:
        """The sizes of the keys and values of `batch` sequences."""
        return CacheShape(
            num_layers=self.num_layers,
            batch=batch,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
        )
