"""What a file is known by."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of the content of the file at ``path``, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
