"""Where the model that ships with the package lies, so that every command works offline at once."""

from pathlib import Path

from foveal.core.errors import LoadError


def bundled_model() -> Path:
    """The directory of the bundled model. Raises `LoadError` if this installation has none."""
    directory = Path(__file__).resolve().parents[1] / "data" / "model"
    if not (directory / "config.json").is_file():
        raise LoadError(
            f"{directory}: the bundled model is missing from this installation. Name a Hugging "
            "Face directory instead (--model DIR, LLM(path)), or make one with `foveal train`"
        )
    return directory
