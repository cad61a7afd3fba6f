"""The model card of a finished run: what a reader of the directory wants to know, as measured."""

from collections.abc import Mapping
from typing import Any

_CARD = """\
# A small model trained by `foveal train`

| | |
|---|---|
| held-out text | {heldout_bits_per_byte:.3f} bits per byte ({heldout_text[documents]} documents, \
{heldout_text[text_bytes]:,} bytes, never trained on) |
| trained on | {tokens:,} tokens in {steps:,} steps ({epochs:.2f} times the training text: \
{train_text[documents]} documents, {train_text[text_bytes]:,} bytes) |
| parameters | {parameters:,}, stored in bfloat16 |
| shape | {model[num_layers]} layers of width {model[width]}, {model[num_heads]} query and \
{model[num_kv_heads]} KV heads of {model[head_dim]}, MLP {model[mlp_width]}, rotary positions, \
RMSNorm (the Llama layout) |
| context | {data[context]} tokens in training; every text begins with the begin token |
| tokenizer | {data[tokenizer]} |
| machine | {machine}, {threads} thread(s), {minutes:.0f} minutes, {rate:,.0f} tokens per second |

The held-out figure is that of the float32 weights, in rows of {data[context]} tokens, so that a
token is predicted from {half} tokens before it on average.
"""


def model_card(result: Mapping[str, Any]) -> str:
    """The card, in Markdown, of the content of a `result.json`."""
    recipe = result["recipe"]
    return _CARD.format(
        **result,
        model=recipe["model"],
        data=recipe["data"],
        epochs=result["tokens"] / result["train_text"]["tokens"],
        minutes=result["seconds"] / 60,
        rate=result["tokens"] / result["seconds"],
        half=recipe["data"]["context"] // 2,
    )
