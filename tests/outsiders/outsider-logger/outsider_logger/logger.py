"""One line a step."""

from pathlib import Path
from typing import Any

from zoo.train.metrics import Values


class Outsider:
    def __init__(self, run: Path, recipe: dict[str, Any]) -> None:
        self.path = run / "outsider.txt"

    def log(self, step: int, values: Values) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {' '.join(values)}\n")

    def finish(self) -> None:
        self.log(-1, {"finished": 1})
