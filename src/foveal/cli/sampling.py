"""Options that `generate` and `chat` share: which model, how it is run, how tokens are drawn.

Only their names, types and help texts. Kept apart so that `--help` need not import PyTorch.
"""

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="Hugging Face directory, or hub name. Default: the bundled model."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: as stored.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Store matrices as f32, bf16, f16, int8 or int4; compute in float32."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Backend = Annotated[str, typer.Option(help="Attention backend, or auto.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to make at most.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely beside the best.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: repeat less. 1 is none.")]
PresencePenalty = Annotated[float, typer.Option(help="Off every token already used, -2 to 2.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, for each use of it.")]
Seed = Annotated[int | None, typer.Option(help="Makes the draws reproducible.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the answer; repeatable. $'\\n' is a line.")
]
