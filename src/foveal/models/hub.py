"""From what a user types to a directory on this machine: a path, or a name on the Hugging Face hub.

Only the files that are read are downloaded: settings, tokenizers, safetensors. Pickles never are.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from foveal.core.errors import LoadError

_WANTED = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def locate(path_or_name: str | Path) -> Path:
    """The directory of a checkpoint. Raises `LoadError` if there is none and no way to get it."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise LoadError(f"{path}: is a file; give the directory that holds config.json")
    if isinstance(path_or_name, Path) or not _HUB_NAME.fullmatch(path_or_name):
        raise LoadError(f"{path}: no such directory")
    try:
        return Path(snapshot_download(path_or_name, allow_patterns=list(_WANTED)))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise LoadError(
            f"{path_or_name}: no such directory, and the hub gave nothing: {reason}"
        ) from error
