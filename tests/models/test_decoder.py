"""The decoder itself: initial weights, positions, caches, gradients, precision, bad input."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from checkpoints import directory

from foveal.core.errors import ArgumentError
from foveal.models.config import ModelConfig
from foveal.models.decoder import Decoder
from foveal.models.load import load_model
from foveal.nn.norm import NormKind
from foveal.nn.rope import RopeConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=300,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=96,
    max_positions=128,
    rope=RopeConfig(dim=16),
)
IDS = torch.arange(2 * 12).view(2, 12)


def test_initial_weights() -> None:
    model = Decoder(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
            continue
        writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
        expected = 0.02 / math.sqrt(6) if writes else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.1 * expected


def test_initial_loss_is_that_of_a_guess() -> None:
    model, ids = Decoder(CONFIG), torch.randint(0, 300, (4, 64))
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(300), rel=0.02)


@pytest.mark.parametrize("norm", NormKind)
def test_initial_biases_and_norms_are_neutral(norm: NormKind) -> None:
    fields = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "head_norm": True}
    model = Decoder(replace(CONFIG, norm=norm, post_norms=True, **fields))
    vectors = {n: p for n, p in model.named_parameters() if p.ndim == 1}
    assert len(vectors) > 20
    for name, parameter in vectors.items():
        ones = name.endswith("weight") and norm is not NormKind.RMS_OFFSET
        assert (parameter == float(ones)).all(), name


def test_seeds() -> None:
    one, two = Decoder(CONFIG), Decoder(CONFIG, dtype=torch.bfloat16)
    assert torch.equal(one.embedding.tokens.weight.bfloat16(), two.embedding.tokens.weight)
    two.initialise(seed=1)
    assert not torch.equal(one.embedding.tokens.weight.bfloat16(), two.embedding.tokens.weight)


def test_every_weight_gets_a_gradient() -> None:
    model = Decoder(CONFIG)
    model(IDS).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_forward_is_hidden_and_logits() -> None:
    model = Decoder(CONFIG)
    with torch.inference_mode():
        hidden = model.hidden(IDS)
        assert hidden.shape == (2, 12, 64)
        assert torch.equal(model(IDS), model.logits(hidden))
        last = model.logits(hidden[:, -1])
        assert last.shape == (2, 300)
        assert (last - model(IDS)[:, -1]).abs().max() < 1e-6


def test_positions_given_in_order_change_nothing() -> None:
    model = Decoder(CONFIG)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(IDS[:, :5], positions=torch.arange(5).expand(2, -1), cache=cache)
        assert cache.positions is None
        model(IDS[:, 5:], positions=torch.arange(5, 12).expand(2, -1).int(), cache=cache)
        assert cache.positions is None
        assert cache.length == 12


def test_default_positions_go_on_after_the_last_of_each_sequence() -> None:
    model = Decoder(CONFIG)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(IDS[:, :3], positions=torch.tensor([[0, 1, 2], [-1, -1, 0]]), cache=cache)
        model(IDS[:, :2], cache=cache)
        assert cache.positions.tolist() == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
        cache.truncate(2)
        model(IDS[:, :1], cache=cache)
        assert cache.positions.tolist() == [[0, 1, 2], [-1, -1, 0]]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2"])
def test_truncated_and_forked_caches_go_on_as_if_nothing_had_been(name: str) -> None:
    model = load_model(directory(name))
    ids = IDS[:, :12] + 1
    with torch.inference_mode():
        whole = model(ids)
        cache = model.new_cache(2)
        model(ids[:, :4], cache=cache)
        branch = cache.fork()
        model(ids[:, :7] * 2, cache=branch)
        branch.truncate(4)
        for one in (cache, branch):
            assert (model(ids[:, 4:], cache=one) - whole[:, 4:]).abs().max() < 1e-4


def test_one_sequence_is_not_changed_by_another() -> None:
    model = load_model(directory("qwen3"))
    with torch.inference_mode():
        together, alone = model(IDS), model(IDS[1:])
    assert (together[1] - alone[0]).abs().max() < 1e-4


def test_what_comes_later_does_not_matter() -> None:
    model = load_model(directory("gemma3"))
    with torch.inference_mode():
        changed = IDS.clone()
        changed[:, 7] = 98
        assert torch.equal(model(IDS)[:, :7], model(changed)[:, :7])


def test_empty_input() -> None:
    model = Decoder(CONFIG)
    with torch.inference_mode():
        cache = model.new_cache(2)
        assert model(IDS[:, :0], cache=cache).shape == (2, 0, 300)
        assert model(IDS[:0]).shape == (0, 12, 300)
        assert cache.length == 0


@pytest.mark.parametrize("name", ["llama-llama3", "gemma2", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_reference(name: str, dtype: torch.dtype) -> None:
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        directory(name), dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        exact = load_model(directory(name), dtype=torch.float64)(IDS)
        ours = (load_model(directory(name), dtype=dtype)(IDS).double() - exact).abs()
        reference = (theirs(IDS).logits.double() - exact).abs()
    assert ours.mean() <= 1.5 * reference.mean()
    assert ours.max() <= 2 * reference.max()


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        (IDS[0], {}, r"ids: got torch.int64 of shape \[12\]; accepted: integers \[B, T\]"),
        (IDS.float(), {}, "ids: got torch.float32"),
        (IDS.bool(), {}, "ids: got torch.bool"),
        (IDS + 300, {}, r"ids: got ids from 300 to 323; accepted: 0 to 299"),
        (IDS, {"positions": IDS.float()}, "positions: got torch.float32"),
        (IDS, {"positions": IDS[:, :3]}, r"positions: got shape \[2, 3\]"),
        (IDS, {"backend": "nobody"}, "backend: got 'nobody'"),
    ],
)
def test_bad_input(ids: torch.Tensor, fields: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Decoder(CONFIG)(ids, **fields)


def test_cache_of_another_size_or_with_gradients() -> None:
    model = Decoder(CONFIG)
    with pytest.raises(ArgumentError, match=r"k: got a tensor that requires a gradient"):
        model(IDS, cache=model.new_cache(2))
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"k: got shape \[2, 2"):
        model(IDS, cache=model.new_cache(3))


def test_context_of_learned_positions_ends() -> None:
    model = load_model(directory("gpt2"))
    with torch.inference_mode():
        cache = model.new_cache(1)
        model(torch.ones(1, 128, dtype=torch.int64), cache=cache)
        with pytest.raises(ArgumentError, match=r"positions: got 128; accepted: below 128"):
            model(IDS[:1, :1], cache=cache)


def test_longrope_keys_of_two_lengths_do_not_mix() -> None:
    model = load_model(directory("phi3-longrope"))
    assert model.config.restart_length == 24
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(IDS, cache=cache)
        model(IDS, cache=cache)
        with pytest.raises(ArgumentError, match=r"cache: got 24 cached tokens of 25"):
            model(IDS[:, :1], cache=cache)
        cache.reset()
        model(torch.cat([IDS, IDS, IDS], dim=1), cache=cache)
        model(IDS[:, :1], cache=cache)
