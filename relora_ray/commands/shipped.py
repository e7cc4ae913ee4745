"""The configs that come with the package: list them, show one, copy one out.

    relora-ray configs [NAME [OUT]]
    relora-ray configs --schema > relora-ray.schema.json

A name is a path in `configs/` without its ending, such as quickstart or relora/60m; `launch` takes it too.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from relora_ray import cli
from relora_ray.config.section import nearest
from relora_ray.config.sizes import LLAMA_SIZES
from relora_ray.errors import ConfigError


def folder() -> Path:
    """`configs/`: inside the package where that is installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Of the configs: the quickstart first, then by folder, small models before large ones."""
    found = [str(path.relative_to(folder()).with_suffix("").as_posix()) for path in folder().rglob("*.yaml")]
    sizes = {size: number for number, size in enumerate(LLAMA_SIZES, 1)}
    return sorted(found, key=lambda name: (name.rpartition("/")[0], sizes.get(name.rpartition("/")[2], 0), name))


def find(given: str) -> str:
    """The path of a config: of a file as it is, or of a config that comes with the package. ConfigError if neither."""
    if Path(given).exists() or given.endswith((".yaml", ".yml")):
        return given  # what is wrong with a file is said where it is read
    path = folder() / f"{given}.yaml"
    if given in names():
        return str(path)
    raise ConfigError(
        f"{given!r} is neither a file nor a config that comes with the package.{nearest(given, names())} `relora-ray "
        f"configs` lists those."
    )


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    summary = "The configs that come with the package: list them, show one, copy one out."
    parser = cli.parser("configs", summary, "", "relora/60m", "quickstart mine.yaml", "--path", "--schema")
    parser.add_argument("name", metavar="NAME", nargs="?", help="such as quickstart or relora/60m; left out: all names")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write; left out: it is printed")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configs, for editors")
    parser.add_argument("--path", action="store_true", help="print the folder that they lie in, or the config's path")
    args = parser.parse_args(argv)
    if args.schema:
        if args.name is not None:
            raise ConfigError(f"--schema is of all configs: leave {args.name!r} out.")
        # `find` is used by rooms below the one that knows all keys.
        print(json.dumps(resolve_name("relora_ray.commands.reference:schema")(), indent=1))
    elif args.path:
        print(find(args.name) if args.name else folder())
    elif args.name is None:
        for name in names():
            first = (folder() / f"{name}.yaml").read_text().splitlines()[0]
            print(f"{name:24}{first.removeprefix('#').strip() if first.startswith('#') else ''}")
    elif args.out is None:
        print(Path(find(args.name)).read_text(), end="")
    elif Path(args.out).exists():
        raise ConfigError(f"{args.out!r} is there. Give another name, or remove it.")
    else:
        shutil.copyfile(find(args.name), args.out)


if __name__ == "__main__":
    sys.exit(main())
