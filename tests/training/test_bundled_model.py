"""The model in the package: small, whole, as good as its results say, and writing Python."""

import json
import keyword
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from foveal.core.dtypes import FLOATS
from foveal.models.bundled import bundled_model
from foveal.models.load import load_model
from foveal.text.bytes import BEGIN_ID, END_ID
from foveal.text.tokenizer import load_tokenizer
from foveal.training.config import Recipe
from foveal.training.corpus import standard_library
from foveal.training.data import HeldoutRows
from foveal.training.loss import IGNORE, cross_entropy_sum

RESULT = Path(__file__).parents[2] / "docs" / "results" / "bundled" / "result.json"


def recipe() -> Recipe:
    return Recipe.read(Path(str(files("foveal") / "data" / "recipes" / "bundled.toml")))


def heldout_tokens() -> torch.Tensor:
    """Held-out files of this interpreter's library, as the recipe reads them."""
    tokenizer = load_tokenizer(bundled_model())
    found = [d for d in standard_library(recipe().data.exclude) if d.held_out]
    ids: list[int] = []
    for text in filter(None, (document.read() for document in found)):
        ids += [BEGIN_ID, *tokenizer.encode(text, special=False), END_ID]
    return torch.tensor(ids)


def bits_per_token(dtype: torch.dtype, ids: torch.Tensor, num_rows: int) -> float:
    model = load_model(bundled_model(), dtype=dtype)
    rows = HeldoutRows(ids.numpy(), context=512, begin_id=BEGIN_ID)
    total, scored = 0.0, 0
    with torch.no_grad():
        for inputs, targets in rows.batches(num_rows, 4):
            hidden = model.hidden(inputs)
            total += cross_entropy_sum(model.logits, hidden, targets, vocab_size=258).item()
            scored += int((targets != IGNORE).sum())
    return total / scored / math.log(2)


def test_it_fits_the_package_and_its_recipe() -> None:
    assert sum(path.stat().st_size for path in bundled_model().iterdir()) <= 6_000_000
    config = load_model(bundled_model()).config
    assert config == recipe().model.config(vocab_size=258)
    assert recipe().data.context >= 512


def test_it_predicts_held_out_text_as_well_as_its_results_say() -> None:
    recorded = json.loads(RESULT.read_text())["heldout_bits_per_byte"]
    measured = bits_per_token(torch.float32, heldout_tokens(), num_rows=32)
    assert measured == pytest.approx(recorded, abs=0.3), "a sample, perhaps of another library"


def test_every_dtype_predicts_alike() -> None:
    ids = heldout_tokens()
    bits = {dtype: bits_per_token(dtype, ids, num_rows=2) for dtype in FLOATS}
    for dtype, value in bits.items():
        assert value == pytest.approx(bits[torch.float64], rel=1e-2), dtype


def written(prompt: str, num_tokens: int, seed: int) -> str:
    """A continuation drawn at temperature 0.7."""
    tokenizer, model = load_tokenizer(bundled_model()), load_model(bundled_model())
    random, cache = torch.Generator().manual_seed(seed), model.new_cache()
    ids = tokenizer.encode(prompt)
    step, drawn = torch.tensor([ids]), []
    with torch.no_grad():
        for _ in range(num_tokens):
            weights = (model(step, cache=cache)[0, -1].float() / 0.7).softmax(-1)
            step = torch.multinomial(weights, 1, generator=random).unsqueeze(0)
            drawn.append(int(step))
    return tokenizer.decode(drawn)


def test_its_text_looks_like_python() -> None:
    text = "\n".join(written("class Stack:\n    def __init__(self, ", 400, s) for s in range(3))
    words = re.findall(r"[A-Za-z_]+", text)
    known = sum(word in {*keyword.kwlist, "self"} for word in words) / len(words)
    assert known > 0.08, "real files: 0.04 to 0.18; random letters: none"
    lines = [line for line in text.splitlines() if line.strip()]
    aligned = sum((len(line) - len(line.lstrip(" "))) % 4 == 0 for line in lines) / len(lines)
    assert aligned > 0.7, "real files: 0.74 to 1"
    assert any(word in text for word in ("def ", "return", "raise", "if "))
