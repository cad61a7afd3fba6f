"""The backends there are, in the order in which ties are broken. A new one is one line here."""

from foveal.attention.backend import Backend
from foveal.attention.backends.flash import Flash
from foveal.attention.backends.flex import Flex
from foveal.attention.backends.fused import Fused
from foveal.attention.backends.unfused import Unfused

BACKENDS: tuple[Backend, ...] = (Unfused(), Flash(), Fused(), Flex())

BY_NAME: dict[str, Backend] = {backend.name: backend for backend in BACKENDS}
