"""A run as a folder: made, taken up again, and finished.

OUT/tokenizer/               the tokenizer, copied or written
OUT/data/                    the token streams (`data.py`)
OUT/checkpoint.safetensors   the last state (`checkpoint.py`)
OUT/curve.jsonl              the loss curve (`curve.py`)
OUT/model/                   the finished model, a Hugging Face directory
OUT/result.json              what it was trained on, for how long, and how good it is
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foveal.core.errors import ConfigError
from foveal.core.files import write_text
from foveal.hardware.detect import detect
from foveal.models.decoder import Decoder
from foveal.text.bytes import write_byte_tokenizer
from foveal.text.tokenizer import load_tokenizer
from foveal.training.card import model_card
from foveal.training.checkpoint import read_header
from foveal.training.config import Recipe
from foveal.training.corpus import documents, standard_library
from foveal.training.data import read_streams, write_streams
from foveal.training.export import copy_tokenizer, export_model
from foveal.training.trainer import CHECKPOINT, Observer, Trainer


def start_run(
    recipe: Recipe, paths: Sequence[Path], out: Path, *, backend: str = "auto"
) -> Trainer:
    """A new run in `out` on the text in `paths`, or on the standard library if there are none.

    Raises `ConfigError` if the folder already holds a checkpoint.
    """
    if (out / CHECKPOINT).exists():
        accepted = "a folder without a checkpoint, or --resume"
        raise ConfigError(f"out: got {out}, which holds a run; accepted: {accepted}")
    if recipe.data.tokenizer == "bytes":
        write_byte_tokenizer(out / "tokenizer")
    else:
        copy_tokenizer(Path(recipe.data.tokenizer), out / "tokenizer")
    exclude = recipe.data.exclude
    found = documents(paths, exclude) if paths else standard_library(exclude)
    write_streams(found, load_tokenizer(out / "tokenizer"), out / "data")
    trainer = _trainer(recipe, out, backend)
    trainer.curve.path.unlink(missing_ok=True)
    return trainer


def resume_run(
    out: Path, changes: Mapping[str, Any] | None = None, *, backend: str = "auto"
) -> Trainer:
    """The run in `out` at its last checkpoint, by its own recipe. Raises `LoadError`.

    `changes` as for `Recipe.override`; its length is what a run already begun may change.
    """
    header, _ = read_header(out / CHECKPOINT)
    recipe = Recipe.from_dict(header["recipe"]).override(changes or {})
    trainer = _trainer(recipe, out, backend)
    trainer.resume()
    return trainer


def finish_run(trainer: Trainer, observe: Observer) -> dict[str, Any]:
    """Evaluate on all held-out text, export the model, and write `result.json`: its content."""
    model, out = trainer.model, trainer.out
    heldout = trainer.evaluate(trainer.heldout.num_rows)
    observe(heldout)
    tokenizer = load_tokenizer(out / "tokenizer")
    export_model(model, tokenizer, out / "tokenizer", out / "model")
    result = {
        "heldout_bits_per_byte": heldout.bits_per_byte,
        "heldout_loss": heldout.loss,
        "steps": trainer.counters.step,
        "tokens": trainer.counters.step * trainer.tokens_per_step,
        "seconds": trainer.counters.seconds,
        "parameters": model.num_parameters,
        "model_bytes": sum(path.stat().st_size for path in (out / "model").iterdir()),
        "train_text": asdict(trainer.streams.train_facts),
        "heldout_text": asdict(trainer.streams.heldout_facts),
        "recipe": trainer.recipe.to_dict(),
        "machine": detect().cpu_name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_text(out / "model" / "README.md", model_card(result))
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _trainer(recipe: Recipe, out: Path, backend: str) -> Trainer:
    vocab_size = load_tokenizer(out / "tokenizer").vocab_size
    model = Decoder(recipe.model.config(vocab_size))
    model.initialise(recipe.run.seed)
    torch.manual_seed(recipe.run.seed)
    return Trainer(model, read_streams(out / "data"), recipe, out, backend=backend)
