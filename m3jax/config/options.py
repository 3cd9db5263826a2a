"""Options of config files: `--config=file.py:stage=continual,memories=online`."""

from __future__ import annotations

from typing import Any

from m3jax.errors import ConfigError


def parse_options(text: str, **accepted: Any) -> dict[str, Any]:
    """Parses the part of `--config=file.py:TEXT` after the colon.

    Args:
      text: comma-separated words, `name=value` or a bare value of one of the options.
      **accepted: for each option its default first, then its other values: a tuple.

    Returns:
      The chosen value of every option, of the same type as its default.

    Raises:
      ConfigError: an unknown option or value; the message lists what is accepted.
    """
    chosen = {name: values[0] for name, values in accepted.items()}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = word.rpartition("=")
        matches = [
            (option, choice)
            for option, choices in accepted.items()
            for choice in choices
            if str(choice) == value and name in ("", option)
        ]
        if len(matches) != 1:
            listed = "; ".join(f"{o}={'|'.join(map(str, c))}" for o, c in accepted.items())
            raise ConfigError(f"config option {word!r} is unknown or ambiguous; accepted: {listed}")
        chosen[matches[0][0]] = matches[0][1]
    return chosen
