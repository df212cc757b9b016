"""The JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.errors import FileFormatError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileFormatError: the file is missing, no JSON, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"can not read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise FileFormatError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise FileFormatError(f"{path} must hold a JSON object, not a {type(data).__name__}.")
    return data
