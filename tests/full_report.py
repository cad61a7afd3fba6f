"""`make test-full`: every test, slow ones and long property runs too, then the outside suite.

    python tests/full_report.py [--outside CHECKOUT_OF_FLASH_ATTENTION]

Writes what came of it, with date, commit, machine and versions, to docs/results/test-full.md.
Exit code: 0 if all passed, else 1.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from foveal.core.units import format_bytes
from foveal.hardware.detect import detect

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "results" / "test-full.md"
PACKAGES = ("foveal", "torch", "transformers", "numpy", "pytest", "hypothesis")
PER_TEST_S = 1800
"""A property test of a thousand examples may take longer than a core test may."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outside", type=Path, metavar="CHECKOUT")
    checkout = parser.parse_args().outside
    ours_passed, ours = own_suite()
    outside_passed, outside = outside_suite(checkout)
    TARGET.write_text(page([*ours, *outside]), encoding="utf-8")
    print(f"written: {TARGET.relative_to(ROOT)}")
    return 0 if ours_passed and outside_passed else 1


def own_suite() -> tuple[bool, list[str]]:
    """Run everything under `tests`; whether it passed, and its lines of the page."""
    command = [sys.executable, "-m", "pytest", "--hypothesis-profile=long"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.perf_counter()
        options = [f"--junitxml={report}", f"--timeout={PER_TEST_S}"]
        code = subprocess.run([*command, *options], cwd=ROOT, check=False).returncode
        seconds = time.perf_counter() - start
        suite = ET.parse(report).find("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    lines = [
        row("foveal, slow tests and long properties", passed, failed, count["skipped"], seconds)
    ]
    return code == 0, lines


def outside_suite(checkout: Path | None) -> tuple[bool, list[str]]:
    """Run flash-attention's tests on each of our own backends, if there is a checkout."""
    lines, passed = [], True
    for backend in ("flash", "unfused") if checkout else ():
        command = [sys.executable, ROOT / "tests" / "outside" / "run.py", "--json"]
        command += ["--flash-attention", checkout, "--backend", backend]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        passed &= done.returncode == 0
        what = f"flash-attention's own tests, a sample, on `{backend}`"
        if done.returncode == 2:
            lines.append(f"| {what} | did not start | | | |")
            continue
        found = json.loads(done.stdout)
        skipped = sum(found["skipped"].values())
        lines.append(row(what, found["passed"], found["failed"], skipped, found["seconds"]))
    return passed, lines or ["| flash-attention's own tests | not run: no checkout given | | | |"]


def row(what: str, passed: int, failed: int, skipped: int, seconds: float) -> str:
    return f"| {what} | {passed} | {failed} | {skipped} | {seconds:.0f} s |"


def page(rows: list[str]) -> str:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    machine = detect()
    memory = format_bytes(machine.memory_bytes)
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            "# The last run of `make test-full`",
            "",
            f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"- Commit: {commit.stdout.strip() or 'unknown'}",
            f"- Machine: {machine.cpu_name}, {machine.num_logical_cores} cores, {memory}, {gpus}",
            f"- Versions: Python {platform.python_version()}, {versions}",
            "",
            "| suite | passed | failed | skipped | took |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Written by `tests/full_report.py`. Property tests draw ten times their usual",
            "examples (where they use `tests/properties.py`); `tests/outside/` says what is",
            "sampled of flash-attention's tests, and how.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
