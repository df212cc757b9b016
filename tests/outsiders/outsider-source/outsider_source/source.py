"""A directory on this machine."""

import shutil
from pathlib import Path

from zoo.sources.base import Fetched, FetchOptions, SourceError


def fetch(address: str, destination: Path, options: FetchOptions) -> Fetched:
    if not Path(address).is_dir():
        raise SourceError(f"there is no {address}.")
    shutil.copytree(address, destination, dirs_exist_ok=True)
    return Fetched(address)
