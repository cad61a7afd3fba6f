"""A pytest plugin that runs a seeded sample of another project's parametrised tests.

flash-attention multiplies its parameters out to half a million cases, which takes more than a
minute to collect alone. Here each test function's lists of values are first cut to small sizes,
then as many cases as wanted are drawn from them, before anything is multiplied.
"""

import random
from pathlib import Path

import flash_attention
import pytest

MAX_PAIRS, MAX_HEAD_DIM = 260 * 260, 128
"""Pairs of a query and a key in one sequence, and the size of a head."""

REPEATED = {
    "test_flash_attn_race_condition": (260, 40),
    "test_flash_attn_deterministic": (30_000, 40),
    "test_flash_attn_varlen_deterministic": (30_000, 40),
}
"""The same limits for tests that repeat a backward pass 50 to 250 times, the first on 60
sequences. They get a quarter of the cases."""

ABOUT_THE_EXTENSION = {
    "test_flash_attn_generator_arg_must_be_none": "a slot in the argument list of its extension",
    "test_flash_attn_varlen_paged_kv_num_splits": "an argument of its private forward function",
}

Row = dict[str, object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkout", type=Path, help="flash-attention's source tree")
    parser.addoption("--backend", default="auto", help="foveal's backend")
    parser.addoption("--sample", type=int, default=8, help="cases per test function")
    parser.addoption("--seed", type=int, default=0)


def pytest_configure(config: pytest.Config) -> None:
    flash_attention.install(config.getoption("checkout"), config.getoption("backend"))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw the cases, and take away the marks that pytest would multiply out."""
    marks = metafunc.definition.own_markers
    name = metafunc.definition.originalname
    limits = REPEATED.get(name, (MAX_PAIRS, MAX_HEAD_DIM))
    choices = [
        [row for row in _rows(mark) if _small(row, *limits)]
        for mark in marks
        if mark.name == "parametrize"
    ]
    marks[:] = [mark for mark in marks if mark.name != "parametrize"]
    if not choices:
        return
    draw = random.Random(f"{metafunc.config.getoption('seed')} {name}")
    wanted = metafunc.config.getoption("sample")
    cases: dict[str, Row] = {}
    for _ in range(max(1, wanted // 4) if name in REPEATED else wanted):
        case = {key: value for rows in choices for key, value in draw.choice(rows).items()}
        cases[str(case)] = case
    names = sorted(next(iter(cases.values())))
    metafunc.parametrize(names, [tuple(case[key] for key in names) for case in cases.values()])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = ABOUT_THE_EXTENSION.get(item.originalname)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"foveal: {reason}"))


def _rows(mark: pytest.Mark) -> list[Row]:
    """What one parametrize mark may give to its arguments."""
    names = [name.strip() for name in mark.args[0].split(",")]
    return [dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in mark.args[1]]


def _small(row: Row, max_pairs: int, max_head_dim: int) -> bool:
    """Whether the lengths and the head size, where the row has them, are within the limits."""
    length = row.get("seqlen", 1)
    pairs = row.get("seqlen_q", length) * row.get("seqlen_k", length)
    return pairs <= max_pairs and row.get("d", 0) <= max_head_dim
