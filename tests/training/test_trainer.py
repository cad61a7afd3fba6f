"""The loop: it learns, resumes exactly, stops on NaN, and follows the clock when told to."""

import json
import math
from pathlib import Path

import pytest
import torch

from foveal.core.errors import ConfigError, LoadError
from foveal.training.config import Recipe
from foveal.training.run import resume_run, start_run
from foveal.training.trainer import CHECKPOINT, Diverged, HeldoutRecord, Trainer, TrainRecord

TEXT = "".join(f"def double_{i}(x):\n    return x * 2\n\n" for i in range(60))

TINY = {
    "model": {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
              "mlp_width": 64, "max_positions": 64},
    "data": {"context": 32},
    "optimiser": {"lr": 1e-2, "warmup": 0.1, "decay": 0.3},
    "run": {"steps": 10, "batch": 4, "accumulate": 2, "log_every": 2, "evaluate_every": 4,
            "evaluate_rows": 2, "checkpoint_every": 3},
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def tiny(**changes: object) -> Recipe:
    return Recipe.from_dict(TINY).override(changes)


def ignore(record: TrainRecord | HeldoutRecord) -> None:
    """An observer that looks away."""


def never() -> bool:
    return False


def stop_after(trainer: Trainer, step: int):
    return lambda: trainer.counters.step >= step


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_tiny_model_learns_a_tiny_text_by_heart(text: Path, tmp_path: Path) -> None:
    recipe = tiny(run_steps=150, run_accumulate=1)
    trainer = start_run(recipe, [text], tmp_path / "run")
    losses: list[float] = []
    trainer.run(lambda r: losses.append(r.loss) if isinstance(r, TrainRecord) else None, never)
    assert losses[0] == pytest.approx(torch.tensor(258.0).log().item(), abs=0.1)
    assert losses[-1] < 0.6
    assert trainer.evaluate(100).bits_per_byte < 1.5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopping_and_resuming_changes_nothing(precision: str, text: Path, tmp_path: Path) -> None:
    recipe = tiny(run_precision=precision)
    whole = start_run(recipe, [text], tmp_path / "whole")
    assert whole.run(ignore, never)
    parts = start_run(recipe, [text], tmp_path / "parts")
    assert not parts.run(ignore, stop_after(parts, 5))
    torch.rand(3)  # the random state, too, comes from the checkpoint
    resumed = resume_run(tmp_path / "parts")
    assert resumed.counters.step == 5
    assert resumed.run(ignore, never)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_bfloat16_rounds_the_products_and_nothing_else(text: Path, tmp_path: Path) -> None:
    full = start_run(tiny(), [text], tmp_path / "full")
    half = start_run(tiny(run_precision="bfloat16"), [text], tmp_path / "half")
    first, second = full.step(), half.step()
    assert first.loss != second.loss
    assert second.loss == pytest.approx(first.loss, rel=1e-3)
    assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=2e-2)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    states = half.optimiser.state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


def test_a_resumed_curve_repeats_no_step(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(), [text], tmp_path / "run")
    trainer.run(ignore, stop_after(trainer, 5))
    at_five = (tmp_path / "run" / CHECKPOINT).read_bytes()
    trainer.run(ignore, stop_after(trainer, 8))
    (tmp_path / "run" / CHECKPOINT).write_bytes(at_five)  # as if killed before the next save
    resumed = resume_run(tmp_path / "run")
    resumed.run(ignore, never)
    lines = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10]
    assert [r["step"] for r in records if r["kind"] == "heldout"] == [4, 8]


def test_accumulation_equals_one_large_batch(text: Path, tmp_path: Path) -> None:
    split = start_run(tiny(), [text], tmp_path / "split")
    large = start_run(tiny(run_batch=8, run_accumulate=1), [text], tmp_path / "large")
    first, second = split.step(), large.step()
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-5)
    assert split.counters.row == large.counters.row == 8


def test_the_rate_of_the_schedule_is_the_optimisers(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(optimiser_weight_decay=0.0), [text], tmp_path / "run")
    before = weights(trainer)
    record = trainer.step()
    assert record.lr == pytest.approx(1e-2 * 0.05 / 0.1), "the middle of the first of ten steps"
    moved = max(float((w - before[name]).abs().max()) for name, w in weights(trainer).items())
    assert moved == pytest.approx(record.lr, rel=1e-3), "Adam's first step is one rate long"


def test_held_out_bits_are_all_bits_of_the_text_over_its_bytes(text: Path, tmp_path: Path) -> None:
    text.write_text(text.read_text().replace("x", "ü"))
    trainer = start_run(tiny(), [text], tmp_path / "run")
    record = trainer.evaluate(10**6)
    tokens = torch.tensor(trainer.streams.heldout.tolist())
    trainer.model.requires_grad_(False)
    bits = 0.0
    for start in range(0, len(tokens), 32):
        row = tokens[start : start + 32]
        logits = trainer.model(torch.cat((torch.tensor([256]), row[:-1])).unsqueeze(0))[0]
        chosen = logits.log_softmax(-1).gather(1, row.unsqueeze(1))
        bits -= float(chosen.sum()) / math.log(2)
    num_bytes = len(bytes(tokens[1:-1].tolist()))
    assert record.bits_per_byte == pytest.approx(bits / num_bytes, rel=1e-5)


def test_the_seed_decides_the_first_weights(text: Path, tmp_path: Path) -> None:
    runs = [(1, "a"), (1, "b"), (2, "c")]
    same, again, other = (
        weights(start_run(tiny(run_seed=seed), [text], tmp_path / name)) for seed, name in runs
    )
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["embedding.tokens.weight"], other["embedding.tokens.weight"])


def test_gradients_are_clipped(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(optimiser_clip=1e-3), [text], tmp_path / "run")
    seen: list[float] = []
    step = trainer.optimiser.step

    def spy() -> None:
        squares = sum(p.grad.square().sum() for p in trainer.model.parameters())
        seen.append(float(squares) ** 0.5)
        step()

    trainer.optimiser.step = spy
    assert trainer.step().gradient_norm > 1e-2
    assert seen[0] == pytest.approx(1e-3, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(), [text], tmp_path / "run")
    trainer.run(ignore, stop_after(trainer, 3))
    kept = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with torch.no_grad():
        trainer.model.norm.weight[0] = torch.nan
    before = weights(trainer)
    with pytest.raises(Diverged, match=r"step 4: loss nan.*is kept.*lower learning rate"):
        trainer.run(ignore, never)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == kept
    for name, weight in weights(trainer).items():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())
    assert resume_run(tmp_path / "run").run(ignore, never)


def test_a_limit_of_time_ends_the_run_with_its_decay(text: Path, tmp_path: Path) -> None:
    recipe = tiny(run_steps=10**6, run_time_limit_s=2.0)
    trainer = start_run(recipe, [text], tmp_path / "run")
    rates: list[float] = []
    assert trainer.run(lambda r: rates.append(r.lr) if isinstance(r, TrainRecord) else None, never)
    assert max(rates) == 1e-2
    assert rates[-1] < 2e-3
    assert trainer.counters.seconds == pytest.approx(2.0, abs=1.0)


def test_a_folder_with_a_run_is_not_overwritten(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(), [text], tmp_path / "run")
    trainer.run(ignore, stop_after(trainer, 1))
    with pytest.raises(ConfigError, match="holds a run"):
        start_run(tiny(), [text], tmp_path / "run")


def test_a_run_can_be_made_longer(text: Path, tmp_path: Path) -> None:
    trainer = start_run(tiny(), [text], tmp_path / "run")
    trainer.run(ignore, stop_after(trainer, 5))
    longer = resume_run(tmp_path / "run", {"run_steps": 20})
    assert longer.progress == 5 / 20
    longer.run(ignore, stop_after(longer, 12))
    assert resume_run(tmp_path / "run").progress == 12 / 20, "the checkpoint knows"


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="not a checkpoint"):
        resume_run(tmp_path)
