"""Prints the section of .github/CHANGELOG.md that describes one version: python .github/release_notes.py 0.1.0"""

import re
import sys
from pathlib import Path


def notes(changelog: str, version: str) -> str:
    """The version's section without its heading. Raises LookupError where there is none, or it is empty."""
    sections = re.split(r"^## ", changelog, flags=re.M)
    found = [part.partition("\n")[2].strip() for part in sections if part.startswith(f"[{version}]")]
    if not found or not found[0]:
        raise LookupError(f"the changelog says nothing about {version}")
    return found[0]


if __name__ == "__main__":
    try:
        print(notes((Path(__file__).parent / "CHANGELOG.md").read_text(), sys.argv[1]))
    except LookupError as error:
        sys.exit(f"error: {error}")
