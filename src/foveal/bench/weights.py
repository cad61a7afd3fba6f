"""What narrow weights take, and what they cost in exactness, format by format.

Every format reads the same passages as the float32 weights, in one pass each: how likely the text
is (bits per token), how far the distribution of the next token is from float32's (Kullback-Leibler
divergence, bits, its mean and 99th percentile), and how often both hold the same token for the
likeliest. Beside it stand the bytes of the whole model, and the tokens it decodes in a second, one
sequence alone; formats are timed in turn.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from foveal.bench.finding import Finding, of_samples
from foveal.bench.record import Run
from foveal.hardware.timer import interleave
from foveal.models.decoder import Decoder
from foveal.models.load import load_model

FLOAT32 = "float32"
DECODED = 8
"""Tokens of one sample of the decoding time."""
BUDGET_S = 2.0
"""Of timing, for each format."""


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """One reader's predictions beside the reference's, token by token, in bits."""

    surprise: torch.Tensor
    divergence: torch.Tensor
    agrees: torch.Tensor
    """bool"""

    @property
    def values(self) -> dict[str, float | None]:
        """For a finding."""
        return {
            "text_bits": self.surprise.mean().item(),
            f"KL to {FLOAT32}": self.divergence.mean().item(),
            f"KL p99 to {FLOAT32}": self.divergence.quantile(0.99).item(),
            f"agrees with {FLOAT32}_share": self.agrees.float().mean().item(),
        }


def measure(
    directory: Path,
    formats: Sequence[str],
    passages: Sequence[Sequence[int]],
    run: Run,
    on_format: Callable[[str], object] = lambda name: None,
) -> Iterator[Finding]:
    """A finding for the float32 weights and one for each of `formats`.

    All models are in memory at the end, where they are timed in turn.
    """
    reference = load_model(directory, dtype=torch.float32)
    models: dict[str, Decoder] = {FLOAT32: reference}
    distances = {}
    for name in (FLOAT32, *formats):
        on_format(name)
        if name not in models:
            models[name] = load_model(directory, weights=name)
        distances[name] = distance(reference, models[name], passages)
    on_format("time")
    samples = interleave(
        {name: _decoding(model) for name, model in models.items()},
        budget_s=BUDGET_S * len(models),
    )
    length = len(passages[0]) - 1
    for name, model in models.items():
        yield Finding(
            benchmark="weights",
            part="weights",
            title=f"Weights of {directory.name}; {len(passages)} passages of {length:,} tokens",
            subject={"weights": name},
            values={
                "model_bytes": float(model.weight_bytes),
                "of_a_weight_bits": 8 * model.weight_bytes / model.num_parameters,
                **distances[name].values,
                "decoded_per_s": DECODED / samples[name].median_s,
            },
            curve=of_samples(samples[name]),
            run=run,
        )


@torch.inference_mode()
def distance(reference: Decoder, model: Decoder, passages: Sequence[Sequence[int]]) -> Distance:
    """Both read every passage at once; each token but the first is predicted."""
    parts = []
    for passage in passages:
        ids, following = torch.tensor([passage[:-1]]), torch.tensor(passage[1:])
        theirs, ours = (m(ids)[0].float().log_softmax(-1) for m in (reference, model))
        surprise = -ours.gather(1, following.unsqueeze(1)).squeeze(1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0)  # below 0 by rounding
        parts.append((surprise, divergence, theirs.argmax(-1) == ours.argmax(-1)))
    surprise, divergence, agrees = map(torch.cat, zip(*parts, strict=True))
    return Distance(surprise / math.log(2), divergence / math.log(2), agrees)


def _decoding(model: Decoder) -> Callable[[], None]:
    """Decodes a few tokens of one sequence, from the start of the context."""
    cache, one = model.new_cache(1, DECODED), torch.zeros(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def decode() -> None:
        cache.reset()
        for _ in range(DECODED):
            model(one, cache=cache)

    return decode
