"""Make a folder of emoji with captions, for the preset emoji: ``python -m benchmarks.make_emoji data/emoji``.

The pictures are Google's Noto Emoji, 64 x 64 pixels, under the Apache License 2.0, and the names are Cal Henderson's
emoji-data, under the MIT License; both come in the npm package emoji-datasource-google, which npm fetches and checks.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ms_diffusion.commands.parse import parse
from ms_diffusion.files import write
from ms_diffusion.runtime import UserError, run_program

PACKAGE = "emoji-datasource-google@16.0.0"
PICTURES, NAMES, LICENSE = "package/img/google/64/", "package/emoji.json", "package/LICENSE"


def captions(emoji: dict) -> list[str]:
    """The name of an emoji, its short names and its group, such as "dog face", "dog" and "animal mammal"."""
    texts = [emoji["name"].lower(), *emoji["short_names"], emoji["subcategory"]]
    return list(dict.fromkeys(" ".join(text.replace("_", " ").replace("-", " ").split()) for text in texts))


@dataclass
class Args:
    """Write the pictures of all emoji without a skin tone, and metadata.jsonl with their captions and categories."""

    out: Annotated[Path, tyro.conf.Positional] = Path("data/emoji")
    """Folder to write to."""
    package: Path | None = None
    """The archive that `npm pack` has fetched; by default it is fetched, 74 MB."""
    debug: bool = False
    """Show the traceback of an error."""


def fetch(folder: str) -> Path:
    """The archive of the package, in this folder."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"npm pack {PACKAGE} failed ({e}): install npm, or give the archive by --package") from e
    return next(Path(folder).glob("*.tgz"))


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog="python -m benchmarks.make_emoji")
    with tempfile.TemporaryDirectory() as folder:
        package = args.package or fetch(folder)
        try:
            with tarfile.open(package) as archive:
                files = {member.name: archive.extractfile(member).read() for member in archive if is_wanted(member.name)}
            emoji = [each for each in json.loads(files[NAMES]) if PICTURES + each["image"] in files]
        except (OSError, tarfile.TarError, KeyError, ValueError) as e:
            raise UserError(f"{package} is not the package {PACKAGE} ({e}): leave out --package to fetch it") from e
    lines = [{"file_name": each["image"], "text": captions(each), "label": each["category"]} for each in emoji]
    for each in emoji:
        write(args.out / each["image"], lambda file, each=each: file.write(files[PICTURES + each["image"]]))
    write(args.out / "LICENSE", lambda file: file.write(files[LICENSE]))
    write(args.out / "metadata.jsonl", lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
    print(f"{len(emoji)} pictures in {args.out}")
    return 0


def is_wanted(name: str) -> bool:
    return name in (NAMES, LICENSE) or name.startswith(PICTURES)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
