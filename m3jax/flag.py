"""Flags of launch scripts: kinds, bounds, lists, folders, config files."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from m3jax.errors import ConfigError

WIDTH = 100  # of help texts


# -- flags -----------------------------------------------------------------------------------------
class _ListParser(flags.ArgumentParser):
    """Parses values with commas between them, each by the same parser."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def parse(self, argument: Any) -> list[Any]:
        """Returns the values; a list is one already."""
        if isinstance(argument, str):
            argument = [word.strip() for word in argument.split(",") if word.strip()]
        return [self.item.parse(value) for value in argument]


class _FolderParser(flags.ArgumentParser):
    """Parses local folders; a path library would turn `gs://b/x` into the folder `gs:/b/x`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def parse(self, argument: Any) -> Path:
        """Returns the path.

        Raises:
          ConfigError: it is empty, a file, or in a bucket.
        """
        if not str(argument).strip():
            raise ConfigError(f"--{self.name} is empty; name a folder ('.' is the current one)")
        if Path(argument).is_file():
            raise ConfigError(f"--{self.name}={argument} is a file; name a folder")
        if "://" in str(argument):
            raise ConfigError(
                f"--{self.name}={argument}: workdirs in buckets are not supported yet; mount the"
                " bucket (Cloud Storage FUSE) and name the folder"
            )
        return Path(argument)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of launch scripts.

    Attributes:
      name: without dashes.
      help: its meaning, with unit.
      kind: type of a value: str, int, float, bool, Path (a local folder) or ConfigDict (a config
        file).
      default: of the value; None where the help says what stands for it; a switch is off.
      choices: accepted values.
      low, high: bounds of a number, inclusive.
      many: "comma" for a list of values, "repeat" for a flag that may be given more than once.
    """

    name: str
    help: str
    kind: type = str
    default: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    many: str = ""

    def with_help(self, text: str) -> Flag:
        """Returns the flag with a sentence behind its help, such as its default in a script."""
        return dataclasses.replace(self, help=f"{self.help} {text}")

    def with_default(self, default: Any) -> Flag:
        """Returns the flag with another default."""
        return dataclasses.replace(self, default=default)

    def define(self, values: flags.FlagValues, argv: Sequence[str]) -> None:
        """Defines it in `values`; overrides of config fields are read from `argv`."""
        if self.kind is ConfigDict:
            config_flags.DEFINE_config_file(
                self.name, None, self.help, flag_values=values, sys_argv=list(argv)
            )
            return
        if self.kind is bool:
            flags.DEFINE_boolean(self.name, bool(self.default), self.help, flag_values=values)
            return
        parser: Any = flags.ArgumentParser()
        if self.choices:
            parser = flags.EnumParser(list(self.choices))
        elif self.kind is Path:
            parser = _FolderParser(self.name)
        elif self.kind is not str:
            number = flags.IntegerParser if self.kind is int else flags.FloatParser
            parser = number(self.low, self.high)  # type: ignore[arg-type]
        if self.many == "repeat":
            define: Any = flags.DEFINE_multi
            define(parser, None, self.name, self.default, self.help, flag_values=values)
            return
        if self.many == "comma":
            parser = _ListParser(parser)
        flags.DEFINE(parser, self.name, self.default, self.help, flag_values=values)

    def describe(self, required: bool) -> str:
        """Returns name, accepted values, default and meaning, for `--help`."""
        if self.kind is bool:
            title = f"--[no]{self.name}" if self.default else f"--{self.name}"
        else:
            kinds = {int: "N", float: "X", Path: "FOLDER", ConfigDict: "FILE[:OPTIONS]"}
            value = "|".join(self.choices) or kinds.get(self.kind, "TEXT")
            title = f"--{self.name}={value}" + (f",{value}" if self.many == "comma" else "")
            title += " …" if self.many else ""
            if self.default not in (None, "", []):
                default = self.default
                default = ",".join(map(str, default)) if isinstance(default, list) else default
                title += f"  (default {default})"
        title += "  (required)" if required else ""
        indent = " " * 6
        text = textwrap.fill(self.help, WIDTH, initial_indent=indent, subsequent_indent=indent)
        return f"  {title}\n{text}"
