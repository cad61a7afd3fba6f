"""Logits and greedy tokens equal those of transformers, for every family and variant."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import CHECKPOINTS, SIZES, VOCABULARY, directory, randomised, reference

from foveal.models.decoder import Decoder
from foveal.models.load import load_model
from foveal.models.save import save_model

TOLERANCE = 1e-4

NAMES = list(CHECKPOINTS)


def prompt(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=rng)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def greedy(model: Decoder, ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Prefill, then one token at a time through the cache."""
    out, cache, restart = ids, model.new_cache(len(ids)), model.config.restart_length
    new = ids
    for _ in range(num_tokens):
        if restart is not None and cache.length <= restart < out.shape[1]:
            cache.reset()
            new = out
        hidden = model.hidden(new, cache=cache)
        new = model.logits(hidden[:, -1:]).argmax(-1)
        out = torch.cat([out, new], dim=1)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    ids = prompt(40)
    ours, theirs = load_model(directory(name))(ids), reference(name)(ids).logits
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < TOLERANCE


GROUPED = {
    hf.LlamaConfig: {},
    hf.MistralConfig: {"sliding_window": 8},
    hf.Qwen2Config: {},
    hf.Qwen3Config: {"head_dim": 14},
    hf.Gemma2Config: {"head_dim": 18, "sliding_window": 6},
    hf.Gemma3TextConfig: {"head_dim": 10, "sliding_window": 6},
    hf.Phi3Config: {"sliding_window": 7},
}


@pytest.mark.parametrize("kind", GROUPED, ids=lambda kind: kind.model_type)
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_with_every_grouping(
    kind: type, num_kv_heads: int, tied: bool, tmp_path: Path
) -> None:
    changes = {"hidden_size": 60, "intermediate_size": 37, "num_attention_heads": 6}
    changes |= {"num_key_value_heads": num_kv_heads, "tie_word_embeddings": tied}
    theirs = randomised(kind(**{**SIZES, **changes, **GROUPED[kind]}), seed=num_kv_heads)
    theirs.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path), prompt(20)
    assert ours.config.tied == tied
    assert (ours(ids) - theirs(ids).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name: str) -> None:
    ids = prompt(12)
    theirs = reference(name).generate(ids, max_new_tokens=64, do_sample=False)
    assert torch.equal(greedy(load_model(directory(name)), ids, 64), theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str) -> None:
    ids, lengths = prompt(19, batch=3), (19, 11, 4)
    mask = torch.tensor([[1] * n + [0] * (19 - n) for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    positions = torch.where(mask == 1, mask.cumsum(1) - 1, -1)
    ours = load_model(directory(name))(ids, positions=positions)
    theirs = reference(name)(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    assert (ours - theirs)[mask == 1].abs().max() < TOLERANCE
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_padded_batch_decodes_as_alone(name: str) -> None:
    model = load_model(directory(name))
    ids, num_pads = prompt(9, batch=2), 5
    positions = torch.arange(9).repeat(2, 1)
    positions[1] -= num_pads
    cache = model.new_cache(2)
    together = [model(ids, positions=positions.clamp(min=-1), cache=cache)[:, -1]]
    new = prompt(6, seed=1)
    together += [model(new[:, i : i + 1], cache=cache)[:, -1] for i in range(6)]
    for row, pads in enumerate((0, num_pads)):
        alone = model(torch.cat([ids[row : row + 1, pads:], new[row : row + 1]], dim=1))
        got = torch.stack(together, dim=1)[row]
        assert (got - alone[0, -7:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill_equals_whole(name: str) -> None:
    model, ids = load_model(directory(name)), prompt(21)
    cache = model.new_cache(2)
    chunks = torch.cat([model(part, cache=cache) for part in ids.split([1, 7, 3, 10], 1)], dim=1)
    assert (chunks - model(ids)).abs().max() < TOLERANCE
    assert cache.length == 21


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_is_read_by_transformers_and_by_us(name: str, tmp_path) -> None:
    model, ids = load_model(directory(name)), prompt(40)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))
    theirs = type(reference(name)).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert (theirs(ids).logits - reference(name)(ids).logits).abs().max() < TOLERANCE
