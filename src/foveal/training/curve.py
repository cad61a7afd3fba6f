"""The loss curve as JSON lines: one record per line, appended while the run goes on.

Every line has `kind` ("train", "heldout") and `step`. A resumed run first cuts off what was
written after its checkpoint, so that no step is recorded twice.
"""

import json
from pathlib import Path
from typing import Any

from foveal.core.files import write_text


class Curve:
    """The records of one run, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; on disk when this returns, so that a killed run keeps its curve."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; none if there is no file."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut(self, step: int) -> None:
        """Forget what was recorded after `step`."""
        kept = [json.dumps(record) + "\n" for record in self.read() if record["step"] <= step]
        write_text(self.path, "".join(kept))
