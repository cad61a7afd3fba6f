"""Options that several commands share: those that describe one attention call.

Only their names, types and help texts; `shape` makes a call of them. Kept apart so that `--help`
need not import PyTorch.
"""

from typing import Annotated

import typer

Heads = Annotated[int | None, typer.Option(help="Query heads. Default: 8.")]
KvHeads = Annotated[int | None, typer.Option(help="Key/value heads. Default: as --heads.")]
HeadDim = Annotated[int | None, typer.Option(help="Size of a head. Default: 64.")]
Batch = Annotated[int | None, typer.Option(help="Sequences. Default: 1.")]
QLen = Annotated[int | None, typer.Option(help="Queries; 1 is decoding. Default: --kv-len.")]
KvLen = Annotated[int | None, typer.Option(help="Keys. Default: 1024.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: float32.")]
Causal = Annotated[
    bool | None,
    typer.Option("--causal/--full", help="Whether a query sees no key behind it. Default: causal."),
]
Window = Annotated[int | None, typer.Option(help="Keys seen to the left of a query.")]
Sinks = Annotated[int | None, typer.Option(help="First keys that stay visible.")]
Softcap = Annotated[float | None, typer.Option(help="Squeeze scores into this range.")]
Grad = Annotated[bool | None, typer.Option("--grad", help="Forward and backward pass.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
