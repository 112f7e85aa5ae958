"""Files that have a public JSON schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def check_schema(name: str, *files: Path) -> None:
    """Fail unless the files follow a schema that check-jsonschema brings with it, so that nothing is fetched."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
