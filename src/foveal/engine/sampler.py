"""From logits to tokens, for a batch in which every request has parameters of its own.

In this order, that of `transformers`:

    logit bias -> repetition penalty -> frequency and presence penalties
        -> greedy: the likeliest token (of several, the lowest id)
        -> else: temperature -> top-k -> top-p -> min-p -> draw

All of it in float32, the draw in float64. A draw inverts the cumulative distribution at one
uniform number from the request's own generator, so what a request draws depends on its seed, its
logits and its parameters, and on nothing else in the batch. Reported log-probabilities are those
of the model before all of this.
"""

import random
from collections.abc import Sequence

import torch

from foveal.engine.request import SamplingParams, TokenLogprobs


class Draw:
    """One request's side of sampling: its parameters, its random numbers, the tokens so far."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`device` is that of the logits."""
        self.params = params
        self._random = random.Random(params.seed)
        size = vocab_size if params.penalised else 0
        self.counts = torch.zeros(size, device=device)
        """float32 [V]: how often each token is in the answer; empty where nothing depends on it."""
        self.prompted = torch.zeros(size, dtype=torch.bool, device=device)
        """bool [V]: which tokens are in the prompt."""
        if params.penalised:
            self.prompted[torch.tensor(prompt, dtype=torch.int64, device=device)] = True

    def record(self, token_id: int) -> None:
        """Count a token of the answer."""
        if self.params.penalised:
            self.counts[token_id] += 1

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return self._random.random()


@torch.inference_mode()
def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each request, from `logits` [B, V] in any floating dtype.

    The tokens are not recorded; see `Draw.record`.
    """
    logits = logits.to(torch.float32, copy=True)
    for row, draw in zip(logits, draws, strict=True):
        if bias := draw.params.logit_bias:
            row[list(bias)] += torch.tensor(list(bias.values()), device=row.device)
    if penalised := [at for at, draw in enumerate(draws) if draw.params.penalised]:
        logits[penalised] = penalise(logits[penalised], [draws[at] for at in penalised])
    ids = logits.argmax(-1)
    if drawing := [at for at, draw in enumerate(draws) if not draw.params.greedy]:
        ids[drawing] = _draw(logits[drawing], [draws[at] for at in drawing])
    return [int(token_id) for token_id in ids.tolist()]


@torch.inference_mode()
def report(
    logits: torch.Tensor, ids: Sequence[int], draws: Sequence[Draw]
) -> list[TokenLogprobs | None]:
    """Log-probabilities under `logits` [B, V] of the tokens `ids` and of the likeliest ones, for
    each request that asks for them."""
    wanted = [draw.params.logprobs for draw in draws]
    asked = [at for at, count in enumerate(wanted) if count is not None]
    reports: list[TokenLogprobs | None] = [None] * len(ids)
    if not asked:
        return reports
    logprobs = logits[asked].float().log_softmax(-1)
    top = logprobs.topk(min(max(wanted[at] or 0 for at in asked), logprobs.shape[-1]))
    rows = zip(asked, logprobs, top.indices.tolist(), top.values.tolist(), strict=True)
    for at, row, top_ids, values in rows:
        pairs = tuple(zip(top_ids, values, strict=True))[: wanted[at]]
        reports[at] = TokenLogprobs(ids[at], float(row[ids[at]]), pairs)
    return reports


def penalise(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`logits` [B, V] after repetition, frequency and presence penalties."""
    repetition, frequency, presence = (
        torch.tensor(values, device=logits.device).unsqueeze(-1)
        for values in (
            [draw.params.repetition_penalty for draw in draws],
            [draw.params.frequency_penalty for draw in draws],
            [draw.params.presence_penalty for draw in draws],
        )
    )
    counts = torch.stack([draw.counts for draw in draws])
    answered = counts > 0
    seen = answered | torch.stack([draw.prompted for draw in draws])
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, scaled, logits) - frequency * counts - presence * answered


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """ids [B] drawn after temperature and filters."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(-1)

    vocab_size = logits.shape[-1]
    params = [draw.params for draw in draws]
    logits = logits / column([p.temperature for p in params])
    if any(p.top_k for p in params):
        logits = keep_top_k(logits, [min(p.top_k or vocab_size, vocab_size) for p in params])
    if any(p.top_p < 1 for p in params):
        logits = keep_top_p(logits, column([p.top_p for p in params]))
    if any(p.min_p > 0 for p in params):
        logits = keep_min_p(logits, column([p.min_p for p in params]))
    uniform = torch.tensor([draw.uniform() for draw in draws], dtype=torch.float64)
    return invert(logits, uniform.to(logits.device))


def keep_top_k(logits: torch.Tensor, k: Sequence[int]) -> torch.Tensor:
    """Hide all but the `k[b]` likeliest tokens of row b and those that tie with the last."""
    rank = torch.tensor(k, device=logits.device).unsqueeze(-1) - 1
    threshold = logits.topk(max(k)).values.gather(-1, rank)
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Hide all but the fewest likeliest tokens whose probabilities reach `p` [B, 1] (Holtzman et
    al. 2020). A row with p = 1 keeps every token. Of equal ones the lower id comes first."""
    ordered, ids = logits.sort(stable=True, dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    hidden = (before >= p) & (p < 1)
    hidden[..., 0] = False
    return logits.masked_fill(torch.empty_like(hidden).scatter_(-1, ids, hidden), -torch.inf)


def keep_min_p(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Hide tokens below `share` [B, 1] of the likeliest one's probability (Nguyen et al. 2024)."""
    threshold = logits.amax(-1, keepdim=True) + share.log()
    return logits.masked_fill(logits < threshold, -torch.inf)


def invert(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative distribution of `logits` [B, V] passes `uniform` [B]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # At most (1 - 2^-53) times the total, which rounds to less than the total: an entry passes it.
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
