"""`foveal doctor`: what this machine is, what is installed, what is missing and how to get it."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from foveal.core.units import format_bytes, format_count, format_s

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that may be there or not."""

    name: str
    present: bool
    detail: str
    """What was found, or what its absence means."""
    remedy: str = ""
    """How to get it; empty if nothing needs to be done."""


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the peaks: a few seconds for each device.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what this machine is, what is installed, and the remedy for what is missing.

    With --calibrate, measure what the machine can do: the peak of matrix
    products for each dtype and the bandwidth of memory. Every later estimate
    and benchmark is held against these.

    Example: foveal doctor --calibrate
    """
    from foveal.hardware.detect import detect
    from foveal.hardware.peaks import nominal, peaks

    machine = detect()
    devices = ("cpu", "cuda") if machine.gpus else ("cpu",)
    if calibrate:
        for device in devices:
            _calibrate(device)
    rates = {
        device: {
            "peaks": dataclasses.asdict(peaks(machine, device)),
            "nominal": dataclasses.asdict(nominal(machine, device)),
        }
        for device in devices
    }
    facts = {**dataclasses.asdict(machine), "fingerprint": machine.fingerprint}
    findings = _software(facts) + _measurements(devices)
    if as_json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        document = {"machine": facts, "checks": checks, "rates": rates}
        print(json.dumps(document, indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    _print_machine(console, facts)
    _print_findings(console, findings)
    for device in devices:
        _print_rates(console, **rates[device])


def _calibrate(device: str) -> None:
    from foveal.hardware.calibrate import BUDGET_S, calibrate
    from foveal.hardware.detect import detect

    columns = (TextColumn("measuring {task.description}"), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(device, total=BUDGET_S)
        start = time.monotonic()
        calibrate(
            detect(),
            device,
            budget_s=BUDGET_S,
            on_round=lambda: progress.update(task, completed=time.monotonic() - start),
        )


def _software(facts: Json) -> list[Finding]:
    """Python packages and tools that foveal can make use of."""
    return [_torch(facts), _compiler(), _native(), _triton(facts), _matplotlib()]


def _torch(facts: Json) -> Finding:
    import torch

    version = f"{facts['torch_version']}, {facts['num_threads']} threads"
    if torch.version.cuda is None:
        return Finding(name="PyTorch", present=True, detail=f"{version}, built without CUDA")
    if facts["gpus"]:
        return Finding(name="PyTorch", present=True, detail=f"{version}, CUDA {torch.version.cuda}")
    detail = f"{version}, CUDA {torch.version.cuda}, but sees no CUDA device"
    remedy = "if the machine has one: see whether nvidia-smi lists it and the driver is new enough"
    return Finding(name="PyTorch", present=True, detail=detail, remedy=remedy)


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            answer = subprocess.run([path, "--version"], capture_output=True, text=True)
            return Finding(name="C++ compiler", present=True, detail=answer.stdout.split("\n")[0])
    detail = "torch.compile, and FlexAttention with it, cannot build CPU code"
    remedy = "install g++ or clang, for example: apt install g++"
    return Finding(name="C++ compiler", present=False, detail=detail, remedy=remedy)


def _native() -> Finding:
    from foveal.kernels.available import native

    found = native()
    detail = found.detail if found.present else f"portable kernels; {found.detail}"
    return Finding(name="native kernels", present=found.present, detail=detail, remedy=found.remedy)


def _triton(facts: Json) -> Finding:
    present = importlib.util.find_spec("triton") is not None
    if present:
        return Finding(name="Triton", present=True, detail=metadata.version("triton"))
    if not facts["gpus"]:
        return Finding(name="Triton", present=False, detail="not needed without a CUDA device")
    remedy = "pip install 'foveal[gpu]'"
    return Finding(name="Triton", present=False, detail="no CUDA kernels of ours", remedy=remedy)


def _matplotlib() -> Finding:
    if importlib.util.find_spec("matplotlib"):
        return Finding(name="matplotlib", present=True, detail=metadata.version("matplotlib"))
    remedy = "pip install 'foveal[plots]'"
    return Finding(name="matplotlib", present=False, detail="no pictures", remedy=remedy)


def _measurements(devices: tuple[str, ...]) -> list[Finding]:
    """What has been measured on this machine."""
    from foveal.attention.table import load_table
    from foveal.hardware.calibrate import BUSY, load_calibration
    from foveal.hardware.detect import detect

    machine = detect()
    findings = []
    for device in devices:
        known = load_calibration(machine, device)
        good = known is not None and BUSY not in known.source
        findings.append(
            Finding(
                name=f"calibration ({device})",
                present=known is not None,
                detail=known.source if known else "estimates rest on nominal peaks",
                remedy="" if good else "foveal doctor --calibrate, when the machine is quiet",
            )
        )
    num_buckets = len(load_table(machine))
    tuned = f"{num_buckets} kinds of calls" if num_buckets else "backends are chosen by estimate"
    remedy = "" if num_buckets else "foveal tune"
    found = Finding(name="tuning table", present=num_buckets > 0, detail=tuned, remedy=remedy)
    return [*findings, found]


def _print_machine(console: Console, facts: Json) -> None:
    table = Table.grid(padding=(0, 2))
    cores = f"{facts['num_physical_cores']} physical, {facts['num_logical_cores']} logical"
    clock = f", {facts['frequency_hz'] / 1e9:.1f} GHz" if facts["frequency_hz"] else ""
    caches = (f"{name} {format_bytes(size)}" for name, size in facts["cache_bytes"])
    free = format_bytes(psutil.virtual_memory().available)
    table.add_row("processor", f"{facts['cpu_name']} ({facts['architecture']})")
    table.add_row("instructions", " ".join(facts["instruction_sets"]) or "none that matter")
    table.add_row("cores", f"{cores}{clock}")
    table.add_row("caches", ", ".join(caches) or "not reported")
    table.add_row("memory", f"{format_bytes(facts['memory_bytes'])}, {free} free")
    for gpu in facts["gpus"]:
        major, minor = gpu["capability"]
        size = f"{format_bytes(gpu['memory_bytes'])}, {gpu['num_multiprocessors']} multiprocessors"
        table.add_row("GPU", f"{gpu['name']}, {size}, sm_{major}{minor}")
    if not facts["gpus"]:
        table.add_row("GPU", "none")
    table.add_row("fingerprint", facts["fingerprint"])
    console.print(table)


def _print_findings(console: Console, findings: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = "[green]yes[/]" if finding.present else "[yellow]no[/]"
        detail = finding.detail + (f"\n→ {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.name, mark, detail)
    console.print()
    console.print(table)


def _print_rates(console: Console, peaks: Json, nominal: Json) -> None:
    """Measured peaks beside nominal ones; nominal alone where nothing was measured."""
    measured = peaks["source"] != nominal["source"]
    headers = ("measured", "nominal") if measured else ("nominal",)
    table = Table(f"peaks of {peaks['device']}", *headers)
    columns = (peaks, nominal) if measured else (nominal,)
    for dtype, _ in nominal["matmul_flops"]:
        rates = (dict(column["matmul_flops"])[dtype] for column in columns)
        table.add_row(f"matmul {dtype}", *(f"{format_count(rate)}FLOP/s" for rate in rates))
    memory = (f"{format_count(column['bandwidth_bytes'])}B/s" for column in columns)
    table.add_row("read from memory", *memory)
    table.add_row("small operator", *(format_s(column["overhead_s"]) for column in columns))
    console.print()
    console.print(table)
    for column in columns:
        console.print(column["source"])
