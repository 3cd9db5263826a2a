"""Commands of launch scripts in this process, on workdirs in a bucket."""

import re
import runpy
from pathlib import Path

from absl import flags
from launch.test_commands import SMALL

from m3jax import cli

_OWN = r"^\.mirror/|/begun\.json$"
ROOT = Path(__file__).parents[2]


def command(words: str, *arguments: object) -> None:
    """Runs a command, such as "prepare chats"; errors are raised, not printed."""
    script, *name = words.split()
    commands = runpy.run_path(str(ROOT / "launch" / f"{script}.py"))["COMMANDS"]
    values = flags.FlagValues()
    argv = [f"{script}.py", *name, *map(str, arguments)]
    chosen = cli.parse("", commands, argv, values)
    cli.check_places(chosen, values)
    chosen.main(values)


def write_config(folder: Path) -> Path:
    """Writes the smallest config file."""
    path = folder / "small.py"
    path.write_text(SMALL)
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Returns the files of a workdir or mirror by their paths, without what stays on a host."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not re.search(_OWN, name)}
