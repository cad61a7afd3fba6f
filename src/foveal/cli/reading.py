"""One run of `foveal stream`: the loop, its progress bar, and what is said of it afterwards."""

import io
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from foveal.core.errors import ArgumentError, FovealError
from foveal.core.files import write_text
from foveal.core.signals import interruptible
from foveal.core.units import format_bytes, format_s
from foveal.engine.llm import LLM
from foveal.engine.session import Session
from foveal.engine.trail import Point, Trail
from foveal.text.blocks import Block, read_blocks

_BAR_WIDTH = 18
"""Columns for the bar and the time that is left."""


@dataclass(slots=True)
class Result:
    """How a run went."""

    trail: Trail
    next_byte: int | None
    """Where to go on in the file; None where a limit ended the run within a block."""
    stopped: bool = False
    """By Ctrl-C."""
    failure: FovealError | None = None
    """What ended the reading early: the text is not UTF-8, or a tolerance was exceeded."""


def heading(session: Session) -> str:
    """What is remembered, and what that takes."""
    config, need = session.config, session.need
    policy = config.policy
    beside = f", up to {format_bytes(need.disk_bytes)} on disk" if need.disk_bytes else ""
    if need.reference_bytes:
        beside += f", a reference of {format_bytes(need.reference_bytes)}"
    elif config.tolerance is not None:
        beside += f"; {config.kv} rounds nothing here, so there is nothing to measure"
    return (
        f"policy {policy.name} keeps {policy.keeps}\nit costs {policy.costs}\n"
        f"{config.sinks} sinks, window {config.window}, in {config.kv}: "
        f"cache {format_bytes(need.cache_bytes)}, a step of {config.chunk} tokens about "
        f"{format_bytes(need.step_bytes)} (estimate){beside}"
    )


def read(
    session: Session,
    llm: LLM,
    source: io.FileIO,
    *,
    offset: int,
    limit: int | None,
    console: Console,
) -> Result:
    """Feed the source from here to its end, to the limit, or until Ctrl-C."""
    result = Result(Trail(session.config.chunk), offset)
    with interruptible() as stop, _Monitor(session, source, result, limit, console) as monitor:
        blocks = read_blocks(source, stop.is_set, start=offset)
        pending = session.opening
        try:
            for ids in _steps(blocks, llm, pending, session.config.chunk, limit, result):
                _step(session, ids, result.trail)
                monitor.show()
        except FovealError as error:
            result.failure, result.next_byte = error, None
        result.stopped = stop.is_set()
    return result


def _steps(
    blocks: Iterator[Block],
    llm: LLM,
    pending: list[int],
    chunk: int,
    limit: int | None,
    result: Result,
) -> Iterator[list[int]]:
    """The tokens to feed, step by step. Text that is not UTF-8 ends them, and is noted."""
    left = limit or math.inf
    try:
        for block in blocks:
            pending += llm.tokenizer.encode(block.text, special=False)
            result.next_byte = block.end
            while len(pending) >= chunk and left >= chunk:
                left -= chunk
                yield pending[:chunk]
                del pending[:chunk]
            if len(pending) >= left:
                break
    except ArgumentError as error:
        result.failure = error
    if len(pending) > left:
        del pending[int(left) :]
        result.next_byte = None
    for at in range(0, len(pending), chunk):
        yield pending[at : at + chunk]


def _step(session: Session, ids: list[int], trail: Trail) -> None:
    started = perf_counter()
    bits = session.feed(ids)
    seconds = perf_counter() - started
    known = bits[~bits.isnan()]
    resident = psutil.Process().memory_info().rss
    trail.add(Point(len(ids), seconds, float(known.double().sum()), known.numel(), resident))


class _Monitor:
    """The progress bar; a context manager, so that the bar ends with it."""

    def __init__(
        self,
        session: Session,
        source: io.FileIO,
        result: Result,
        limit: int | None,
        console: Console,
    ) -> None:
        """`result`, which is filled as it goes, begins at the byte where the source stands."""
        size, self._offset = os.fstat(source.fileno()).st_size, result.next_byte or 0
        total = limit or (size - self._offset if size else None)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._session, self._result, self._limit = session, result, limit
        self._room = console.width - _BAR_WIDTH
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "_Monitor":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self) -> None:
        """Show how far the run is: in tokens if it has a limit, otherwise in bytes of the file."""
        trail, byte = self._result.trail, self._result.next_byte
        total = trail.total
        if not total.tokens:
            return
        resident = trail.points[-1].resident_bytes
        bits = total.bits / max(1, total.num_predicted)
        facts = [
            f"{total.tokens:,} tokens",
            f"{total.tokens / total.seconds:,.0f}/s",
            f"{bits:.3f} bits/token",
            f"resident {format_bytes(resident)}",
            f"cache {self._session.stats.occupancy:.0%}",
        ]
        while len("  ".join(facts)) > self._room and len(facts) > 1:
            facts.pop()  # a narrow terminal shows whole facts, the first ones
        line = "  ".join(facts)
        done = None if byte is None else byte - self._offset
        if self._limit is not None:
            done = total.tokens
        self._progress.update(self._task, description=line, completed=done)


def document(session: Session, llm: LLM, result: Result, file: str) -> dict[str, Any]:
    """All about a run as data that JSON can hold. Times and resident memory are measured."""
    stats = session.stats
    return {
        "model": str(llm.directory),
        "file": file,
        "config": session.config.facts(),
        "summary": result.trail.summary(),
        "stream": {
            "tokens": stats.num_tokens,
            "forgotten": stats.num_forgotten,
            "bits_per_token": stats.bits_per_token,
            "cache": asdict(stats.cache),
            "step_bytes_estimate": stats.need.step_bytes,
            "disk_bytes": stats.need.disk_bytes,
            "reference_bytes": stats.need.reference_bytes,
            "drift": None if stats.drift is None else asdict(stats.drift),
            "remarks": stats.cache.remarks,
        },
        "next_byte": result.next_byte,
        "stopped": result.stopped,
        "failure": None if result.failure is None else str(result.failure),
        "curve": result.trail.curve(),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The document in words."""
    summary, step = found["summary"], found["summary"]["step_s"]
    bits, speed = summary["bits_per_token"], summary["tokens_per_s"]
    words = [f"{summary['tokens']:,} tokens in {format_s(summary['seconds'])}"]
    words += [] if speed is None else [f"{speed:,.0f} tokens/s"]
    words += [] if bits is None else [f"{bits:.3f} bits per token"]
    out = [", ".join(words)]
    if step["p50"] is not None:
        times = ", ".join(f"{name} {format_s(step[name])}" for name in ("min", "p50", "p99", "max"))
        out.append(f"step of {step['tokens']} tokens: {times}")
    early, late = summary["resident_bytes"].values()
    if early and late:
        change = f"{late / early - 1:+.2%}"
        pair = f"{format_bytes(early)} in the second tenth, {format_bytes(late)} in the last"
        out.append(f"resident memory: {pair} ({change})")
    early, late = summary["s_per_token"].values()
    if early and late:
        pair = f"{format_s(early)} in the second tenth, {format_s(late)} in the last"
        out.append(f"time per token: {pair} ({late / early - 1:+.1%})")
    cache = found["stream"]["cache"]
    held, there = format_bytes(cache["used_bytes"]), format_bytes(cache["allocated_bytes"])
    out.append(f"cache: {held} of {there}; {found['stream']['forgotten']:,} tokens forgotten")
    return out + list(found["stream"]["remarks"]) + _drift(found["stream"]["drift"])


def _drift(found: dict[str, Any] | None) -> list[str]:
    """What the looks of a tolerance found: the last one, and those that something came of."""
    if found is None:
        return []
    looks = found["looks"]
    if not looks:
        return ["tolerance: the stream was not looked at"]
    out = [f"tolerance: looked at {found['num_looks']} times"]
    for look in looks:
        if look["outcome"] != "kept" or look is looks[-1]:
            out.append(
                f"  at token {look['position']:,} in {look['kv']}: {look['kl_mean']:.3g} nats from "
                f"the reference, at most {look['kl_max']:.3g}: {look['outcome']}"
            )
    return out


def write(
    session: Session, found: dict[str, Any], state: Path | None, report: Path | None
) -> list[FovealError]:
    """Write state and report, each whether or not the other could be; what could not, and why."""
    failures: list[FovealError] = []
    if state is not None:
        try:
            session.save(state)
        except ArgumentError as error:
            failures.append(error)
    if report is not None:
        from foveal.cli.reading_page import page

        try:
            write_text(report, page(found, lines(found)))
        except OSError as error:
            accepted = f"a file that can be written ({error})"
            failures.append(ArgumentError("report", str(report), accepted))
    return failures
