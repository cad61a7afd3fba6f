"""Makes attention calls, a spec and a workload each, of the options that describe them."""

from dataclasses import dataclass

from foveal.attention.spec import AttentionSpec
from foveal.attention.tune import Call, model_calls
from foveal.attention.workload import Workload
from foveal.core.dtypes import parse_dtype
from foveal.core.errors import ArgumentError
from foveal.models.load import load_config


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeOptions:
    """The options as given; None where the user gave none."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    batch: int | None
    q_len: int | None
    kv_len: int | None
    dtype: str | None
    causal: bool | None
    window: int | None
    sinks: int | None
    softcap: float | None
    grad: bool | None

    @property
    def given(self) -> bool:
        """Whether the user described a call at all."""
        return any(getattr(self, name) is not None for name in self.__slots__)

    def call(self, device: str) -> Call:
        """The spec and workload they describe. Raises `ArgumentError` for what makes no sense."""
        heads, kv_len = self.heads or 8, 1024 if self.kv_len is None else self.kv_len
        spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=self.kv_heads or heads,
            head_dim=self.head_dim or 64,
            causal=self.causal is not False,
            window=None if self.window is None else (self.window, None),
            sinks=self.sinks or 0,
            softcap=self.softcap,
        )
        return spec, Workload(
            batch=self.batch or 1,
            q_len=kv_len if self.q_len is None else self.q_len,
            kv_len=kv_len,
            dtype=parse_dtype(self.dtype or "float32"),
            device=device,
            needs_grad=bool(self.grad),
        )

    def calls_of_model(self, path_or_name: str, device: str) -> tuple[Call, ...]:
        """The calls of generation with a checkpoint. Raises `ArgumentError` if more than dtype and
        batch was described, since the checkpoint says the rest."""
        if any(
            getattr(self, name) is not None for name in set(self.__slots__) - {"dtype", "batch"}
        ):
            accepted = "beside it only --dtype, --batch and --device: the rest is the model's"
            raise ArgumentError("--model", path_or_name, accepted)
        config = load_config(path_or_name)
        return model_calls(
            (config.spec(layer) for layer in range(config.num_layers)),
            dtype=parse_dtype(self.dtype or "float32"),
            device=device,
            batch=self.batch or 1,
            max_length=config.context,
        )
