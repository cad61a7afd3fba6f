"""Run flash-attention's own test file, which its authors wrote for their kernels, on foveal.

    python tests/outside/run.py --flash-attention PATH_TO_CHECKOUT

Their file is copied to a temporary folder with "cuda" read as "cpu", and run by pytest in a
process of its own, with `flash_attention.py` in place of their package and a seeded sample of
their cases (`sampling.py`). Nothing of theirs is kept. Exit code: 0 if all passed, 1 if a case
failed, 2 if the run could not start.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEST_FILE = "tests/test_flash_attn.py"
HOW = """a source tree of flash-attention is needed, for its test file and its Python modules:
  git clone --depth 1 https://github.com/Dao-AILab/flash-attention
  python tests/outside/run.py --flash-attention flash-attention"""


def main() -> int:
    options = arguments()
    checkout = options.flash_attention
    if checkout is None or not (checkout / TEST_FILE).is_file():
        print(HOW if checkout is None else f"{checkout}: no {TEST_FILE}\n{HOW}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("einops") is None:
        print("flash-attention's tests need einops: pip install einops", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, checkout.resolve(), Path(folder))
    if not report["passed"] and not report["failed"]:
        print("no case ran", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else text(report))
    return 1 if report["failed"] else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flash-attention", type=Path, metavar="CHECKOUT")
    parser.add_argument("--sample", type=int, default=8, help="cases per test function (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--backend", default="flash", help="foveal's backend (flash)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def run(options: argparse.Namespace, checkout: Path, folder: Path) -> dict[str, object]:
    """Run the sample; pytest's own output goes to stderr."""
    source = (checkout / TEST_FILE).read_text(encoding="utf-8")
    (folder / "test_flash_attn.py").write_text(on_cpu(source), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no"]
    command += ["-p", "sampling", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    command += [f"--checkout={checkout}", f"--backend={options.backend}"]
    command += [f"--sample={options.sample}", f"--seed={options.seed}", "test_flash_attn.py"]
    paths = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pytest; "
    command[1:3] = ["-c", f"{paths}sys.exit(pytest.main(sys.argv[1:]))"]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False)
    seconds = time.perf_counter() - start
    counts = read(folder / "report.xml")
    about = {name: getattr(options, name) for name in ("backend", "sample", "seed")}
    return {"suite": f"flash-attention {TEST_FILE}", **about, "seconds": seconds, **counts}


def on_cpu(source: str) -> str:
    """Their file for CPU tensors; where it asks for a capability, that of a GPU without limits."""
    source = re.sub(r'torch\.cuda\.get_device_capability\("cuda"\)', "(8, 0)", source)
    return source.replace('"cuda"', '"cpu"')


def read(path: Path) -> dict[str, object]:
    """Counts, the reasons of what was skipped, and the names of what failed."""
    if not path.exists():
        return {"passed": 0, "failed": 0, "skipped": {}, "failures": []}
    passed, skipped, failures = 0, Counter[str](), []
    for case in ET.parse(path).iter("testcase"):
        outcome = next((e for e in case if e.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            skipped[outcome.get("message") or "no reason given"] += 1
        else:
            failures.append(f"{case.get('name')}: {outcome.get('message', '').splitlines()[0]}")
    failed = len(failures)
    return {"passed": passed, "failed": failed, "skipped": dict(skipped), "failures": failures}


def text(report: dict[str, object]) -> str:
    lines = [
        f"{report['suite']} on foveal's {report['backend']} backend, {report['seconds']:.0f} s: "
        f"{report['passed']} passed, {report['failed']} failed, "
        f"{sum(report['skipped'].values())} skipped"
    ]
    lines += [f"  skipped {n}: {reason}" for reason, n in report["skipped"].items()]
    lines += [f"  failed: {name}" for name in report["failures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
