"""An adapter as users name it: a path, and behind it what its files do not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zoo.errors import InputError

_OPTION = re.compile(r",(?=[A-Za-z_]\w*=)")


def split_options(given: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and options of ``lora.pt,alpha=16``; values are YAML: ``lora.pt,alpha=16,enabled=[true, false, true]``.

    A comma, since shells leave it alone. A name that exists as it stands is that file.

    Raises:
        InputError: a value is no YAML, or an option is given twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if Path(given).exists():
        return Path(given), {}
    path, *rest = _OPTION.split(str(given))
    options: dict[str, Any] = {}
    for item in rest:
        name, _, value = item.partition("=")
        if name in options:
            raise InputError(f"{given} has the option {name} twice.")
        try:
            options[name] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            options[name] = None
        if options[name] is None:
            raise InputError(
                f"{given}: {value!r} is no value for {name}.", fix="Such as alpha=16 or enabled=[true,false,true]."
            )
    return Path(path), options
