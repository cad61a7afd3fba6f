"""Every window policy, listed once: by name for the command line, as data for saved streams."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from foveal.core.errors import ArgumentError
from foveal.engine.policies.dynamic import Dynamic
from foveal.engine.policies.recall import Recall
from foveal.engine.policies.windowed import Plain, Sinks
from foveal.engine.policy import Policy

POLICIES: tuple[type[Policy], ...] = (Sinks, Plain, Dynamic, Recall)


def find_policy(policy: str | Policy) -> Policy:
    """The policy of this name with its default settings, or the policy itself. Raises
    `ArgumentError` for an unknown name."""
    if not isinstance(policy, str):
        return policy
    for known in POLICIES:
        if known.name == policy:
            return known()
    raise ArgumentError("policy", repr(policy), ", ".join(known.name for known in POLICIES))


def policy_facts(policy: Policy) -> dict[str, Any]:
    """Its name and settings, as JSON can hold them."""
    return {"name": policy.name, **asdict(policy)}


def policy_of(facts: Mapping[str, Any]) -> Policy:
    """The policy that `policy_facts` told. Raises `ArgumentError` for one unknown here."""
    settings = {name: value for name, value in facts.items() if name != "name"}
    return type(find_policy(facts["name"]))(**settings)
