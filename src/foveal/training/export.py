"""A trained model as a Hugging Face directory: weights, tokenizer, and the ids that end a text."""

import json
import shutil
from pathlib import Path

import torch

from foveal.core.files import write_text
from foveal.models.decoder import Decoder
from foveal.models.save import save_model
from foveal.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                   "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to a tokenizer from one folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_model(
    model: Decoder,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `model`, rounded to `dtype`, and its tokenizer to `directory`."""
    rounded = Decoder(model.config, dtype=dtype)
    rounded.load_state_dict(model.state_dict())
    save_model(rounded, directory)
    copy_tokenizer(tokenizer_folder, directory)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    write_text(directory / "generation_config.json", json.dumps(ids, indent=2) + "\n")
