"""The tree of errors. Every error that foveal raises on purpose is a `FovealError`.

    FovealError
    ├── ConfigError      (ValueError)  a setting or a model's configuration is wrong
    ├── ArgumentError    (ValueError)  an argument of a call is wrong
    ├── Unsupported      (ValueError)  nobody can do what was asked; carries every reason
    ├── BudgetExceeded                 a memory budget cannot be kept; carries the numbers
    ├── DriftExceeded                  a stream has left its tolerance; carries the divergence
    ├── OutOfPages                     the page pool is full
    ├── LoadError                      a checkpoint or tokenizer cannot be loaded
    └── RequestError     (ValueError)  a request for text cannot be served

A message names the argument, what came, and what is accepted.
"""

from collections.abc import Mapping


class FovealError(Exception):
    """Root of all errors that foveal raises on purpose."""


class ConfigError(FovealError, ValueError):
    """A setting, or a field of a model's configuration, is wrong or unknown."""


class ArgumentError(FovealError, ValueError):
    """An argument of a call is wrong: says which, what came, and what is accepted."""

    def __init__(self, argument: str, got: object, accepted: str) -> None:
        super().__init__(f"{argument}: got {got}; accepted: {accepted}")
        self.argument = argument
        self.got = got
        self.accepted = accepted


class Unsupported(FovealError, ValueError):
    """Nobody can compute what was asked. `reasons` maps each backend to its refusals."""

    def __init__(self, what: str, reasons: Mapping[str, tuple[str, ...]]) -> None:
        lines = [f"  {name}: {'; '.join(why)}" for name, why in reasons.items()]
        super().__init__("\n".join([what, *lines]))
        self.reasons = dict(reasons)


class BudgetExceeded(FovealError):
    """Nothing fits the memory budget. `needed_bytes` maps each candidate to what it would take."""

    def __init__(self, what: str, budget_bytes: int, needed_bytes: Mapping[str, int]) -> None:
        lines = [f"  {name}: {n:,} bytes" for name, n in needed_bytes.items()]
        super().__init__("\n".join([f"{what}: budget {budget_bytes:,} bytes; needed:", *lines]))
        self.budget_bytes = budget_bytes
        self.needed_bytes = dict(needed_bytes)


class DriftExceeded(FovealError):
    """A stream's cache rounds so much that its predictions have left the tolerance. The stream
    may go on. `kl_mean` and `kl_max` are in nats."""

    def __init__(self, what: str, kl_mean: float, kl_max: float) -> None:
        super().__init__(what)
        self.kl_mean = kl_mean
        self.kl_max = kl_max


class OutOfPages(FovealError):
    """The page pool has no free page left and nothing may be evicted."""


class LoadError(FovealError):
    """A checkpoint, a tokenizer or a saved state cannot be loaded; says which file and why."""


class RequestError(FovealError, ValueError):
    """A request cannot be served as it stands, for example a prompt beyond the model's context."""
