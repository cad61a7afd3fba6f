"""One logger, silent by default below warnings. `FOVEAL_LOG=debug` makes it speak."""

import logging
import os
from functools import cache

from foveal.core.errors import ConfigError

_LEVELS = ("debug", "info", "warning", "error")


@cache
def logger() -> logging.Logger:
    """The package's logger. Level from `$FOVEAL_LOG` (debug, info, warning, error)."""
    level = os.environ.get("FOVEAL_LOG", "warning").lower()
    if level not in _LEVELS:
        raise ConfigError(f"FOVEAL_LOG: got {level!r}; accepted: {', '.join(_LEVELS)}")
    log = logging.getLogger("foveal")
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("foveal: %(levelname)s: %(message)s"))
        log.addHandler(handler)
    return log


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time that this very message comes up."""
    logger().warning(message)
