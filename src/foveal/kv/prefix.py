"""The name of a page's contents: a SHA-256 chain over everything that its values depend on.

    digest_n = SHA-256(digest_{n-1} | tokens of page n)         digest_0 = SHA-256(salt)

A key or value depends on every token before it, so equal digests mean equal pages, up to a
collision of SHA-256; a cheaper hash would let one tenant guess another's prompt or forge it.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Salt:
    """What a page's values depend on beside its tokens. Pages under different salts never meet."""

    model: str
    """A fingerprint of the weights, not only their name."""
    adapter: str = ""
    weight_format: str = ""
    """Dtype or quantisation in which the model computes."""
    key_format: str = ""
    value_format: str = ""
    window: str = ""
    """What each layer may see: windows, sinks and policy, as text."""
    tenant: str = ""
    """Requests of different tenants share nothing, not even timing."""

    def digest(self) -> bytes:
        """The start of the chain: 32 bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()


def chain(start: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """One digest for each full page of `tokens`; those that do not fill a page have none.

    `start` is the salt's digest, or the last digest of the pages before `tokens`.
    """
    digests: list[bytes] = []
    for end in range(page_size, len(tokens) + 1, page_size):
        page = array("q", tokens[end - page_size : end])
        start = hashlib.sha256(start + page.tobytes()).digest()
        digests.append(start)
    return digests
