"""Every policy by name, with its settings, as data, and in a session."""

import json
from pathlib import Path

import pytest
import torch

from foveal.core.errors import ArgumentError
from foveal.engine.llm import LLM
from foveal.engine.policies.catalogue import POLICIES, find_policy, policy_facts, policy_of
from foveal.engine.policies.dynamic import Dynamic
from foveal.engine.policies.recall import Recall
from foveal.engine.policies.windowed import Sinks
from foveal.engine.policy import Policy
from foveal.engine.session import Session
from tiny import write_tiny_model

TEXT = list(b"The quick brown fox jumps over the lazy dog. " * 6)
EACH = pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return LLM(path)


@EACH
def test_each_says_what_it_keeps_and_costs(kind: type[Policy]) -> None:
    policy = find_policy(kind.name)
    assert type(policy) is kind and find_policy(policy) is policy
    assert policy.keeps and policy.costs and policy.sinks >= 0
    assert policy_of(json.loads(json.dumps(policy_facts(policy)))) == policy


def test_settings_are_part_of_what_is_saved() -> None:
    for policy in (Dynamic(minimum=7, mass=0.5), Recall(budget=4096, distances="exact")):
        assert policy_of(json.loads(json.dumps(policy_facts(policy)))) == policy
    with pytest.raises(ArgumentError, match="policy: got 'everything'; accepted: sinks, window"):
        find_policy("everything")


@EACH
def test_a_session_of_each_is_saved_forked_and_goes_on(
    kind: type[Policy], llm: LLM, tmp_path: Path
) -> None:
    session = Session(llm, window=32, policy=kind.name, chunk=8)
    session.feed(TEXT[:150])
    session.save(tmp_path / "state")
    loaded, branch = Session.load(tmp_path / "state", llm), session.fork()
    assert loaded.config == branch.config == session.config
    later = session.logits(TEXT[150:])
    assert torch.allclose(loaded.logits(TEXT[150:]), later, atol=1e-4)
    assert torch.allclose(branch.logits(TEXT[150:]), later, atol=1e-4)
    for one in (session, loaded, branch):
        one.close()


def test_a_name_stands_for_the_defaults(llm: LLM) -> None:
    named, made = Session(llm, window=32, policy="sinks"), Session(llm, window=32, policy=Sinks())
    assert named.config == made.config
    assert torch.equal(named.feed(TEXT[:60])[1:], made.feed(TEXT[:60])[1:])
