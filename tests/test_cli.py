"""Command lines: flags, commands, help, and errors of the user that end with the message alone."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import jax
import processes
import pytest
from absl import flags

from m3jax import cli, hardware
from m3jax.cli import Command, Flag
from m3jax.errors import CommandError, ConfigError, UserError

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/wiki_small.py"


def add(given: flags.FlagValues) -> None:
    """Adds documents."""


def drop(given: flags.FlagValues) -> None:
    """Drops documents."""


COMMANDS = {
    "add": Command(
        add,
        (
            cli.CONFIG,
            cli.WORKDIR,
            cli.counts("sizes", "Sizes.", [1, 2]),
            Flag("mode", "Mode.", default="a", choices=("a", "b")),
            Flag("limits", "Limits.", float, [], many="comma"),
            Flag("prompt", "Prompts.", default=[], many="repeat"),
            Flag("fast", "Faster.", bool),
            Flag("exact", "More exact.", bool, True),
        ),
    ),
    "compact": Command(
        drop,
        (
            Flag("sizes", "Others.", int, 7),
            Flag("keys", "Keys.", required=True),
            *(cli.BANK, *cli.PROCESSES),
        ),
    ),
}


def parse(*words: str, commands: Any = COMMANDS) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.parse("Edits.", commands, ["edit.py", *words], values)
    return values


def test_values_of_flags() -> None:
    given = parse("add", CONFIG, "--workdir=runs/x", "--config.train.steps=700", "--fast")
    assert given.config.train.steps == 700 and given.workdir == Path("runs/x")
    assert (given.sizes, given.mode, given.limits) == ([1, 2], "a", [])
    assert (given.fast, given.exact, given.prompt) == (True, True, [])
    more = "--sizes=3,4", "--limits=1,0.5", "--noexact", "--prompt=a,b", "--prompt=c"
    given = parse("add", CONFIG, "--workdir=x", *more)
    assert (given.sizes, given.limits, given.exact) == ([3, 4], [1.0, 0.5], False)
    assert given.prompt == ["a,b", "c"]
    given = parse("compact", "--keys=k")
    assert given.sizes == 7 and "workdir" not in given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no command given; give one of add, compact"),
        (("--keys=k",), "no command given; give one of add, compact"),
        (("edit", "--keys=k"), "'edit' is no command; give one of add, compact"),
        (("collect", "--keys=k"), "the command collect is now compact"),
        (("add", CONFIG), "edit.py add needs --workdir"),
        (("compact", "--keys=k", "--workdir=x"), "--workdir is a flag of add, not of compact"),
        (("compact", "--kes=k"), "Unknown command line flag 'kes'. Did you mean: keys"),
        (("compact", "--keys=k", "more"), "unknown argument 'more'; every option begins with --"),
        (("compact", "--keys=k", "--sizes=x"), "--sizes=x: invalid literal"),
        (("add", "--sizes=3,0"), "--sizes=3,0: 0 is not a positive integer"),
        (("compact", "--keys=k", "--processes=0"), "--processes=0: 0 is not a positive integer"),
        (("compact", "--keys=k", "--process_id=-1"), "--process_id=-1: -1 is not a non-negative"),
        (("compact", "--keys=k", "--heartbeat_timeout=0"), "--heartbeat_timeout=0: 0 is not a pos"),
        (("compact", "--keys=k", "--bank="), "--bank is empty; name a folder ('.' is this one)"),
        (("compact", "--keys=k", "--coordinator="), "--coordinator is empty; leave it out, or"),
        (("compact", "--keys=k\udcff"), r"'--keys=k\udcff': bytes that are not UTF-8"),
        (("add", "--workdir=x", "--config"), "--config needs a value, such as configs/wiki_small"),
        (("add", "--png=3"), "--png is now --picture"),
        (("add", "--mode=context"), "--mode=context is now --mode=long_context"),
        (("add", "--mode=d"), "--mode=d: value should be one of <a|b>"),
        (
            ("add", CONFIG, "--config.optimizer.rise_steps=5"),
            "--config.optimizer.rise_steps is now --config.optimizer.lr_warmup_steps",
        ),
        (
            ("add", CONFIG, "--config.train.step=5"),
            "--config.train.step: no such field; did you mean train.steps",
        ),
        (("add", CONFIG, "--config.train.steps=a"), "--config.train.steps=a: invalid literal"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (f"{CONFIG}:stage=neither", "config option 'stage=neither' is unknown"),
        ("--config=nowhere.py", "--config=nowhere.py: there is no such file; check the name"),
        ("--config=gs://b/x.py", "--config=gs://b/x.py: gs:// is not supported here; name a local"),
        (f"--config={ROOT}", f"--config={ROOT} is a folder; name a file"),
        (f"{CONFIG} --config.mesh.fsdp=0", "config.mesh.fsdp = 0: must be -1 or at least 1"),
    ],
)
def test_unfit_configs_are_named(config: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("add", "--workdir=x", *config.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_are_paths_are_read_as_flags_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bert = (CONFIG, "--workdir=x", "--config.retrieval.embedder=bert")
    given = parse("add", *bert, "--config.retrieval.encoder=~/a [1]")
    assert given.config.retrieval.encoder == f"{tmp_path}/a [1]"
    with pytest.raises(ConfigError, match=r"config.retrieval.encoder = 'gs://b/x': gs:// is not"):
        parse("add", *bert, "--config.retrieval.encoder=gs://b/x")


def test_a_script_without_commands_takes_no_words() -> None:
    with pytest.raises(
        CommandError, match="unknown argument 'compact'; every option begins with --"
    ):
        parse("compact", commands={"": COMMANDS["compact"]})
    assert parse("--keys=k", commands={"": COMMANDS["compact"]}).keys == "k"


@pytest.mark.parametrize(
    ("words", "shown", "hidden"),
    [
        (("--help",), ["Edits.", "  add      Adds documents.", "COMMAND --help"], ["--sizes"]),
        (
            ("add", "--help", "--unknown"),
            ["Adds documents.", "--config=FILE[:OPTIONS]  (required)", "--[no]exact", "--fast"]
            + ["--sizes=N,N …  (default 1,2)", "--mode=a|b  (default a)"],
            ["Edits.", "--keys"],
        ),
        (("add", "--config_help"), ["model.layers = 4", "mesh.fsdp = -1"], []),
        (
            ("compact", "--config_help=guard"),
            ["guard.on = False    accepts False | True"],
            ["mesh."],
        ),
    ],
)
def test_help(words: tuple[str, ...], shown: list[str], hidden: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(part in text for part in shown) and not any(part in text for part in hidden)


def test_help_of_an_unknown_section_names_all() -> None:
    with pytest.raises(
        ConfigError, match=r"gard is no section of the config; known: model, memory"
    ):
        parse("add", "--config_help=gard")


@pytest.mark.parametrize(("error", "code"), [(ConfigError("config.seed = -1"), 2), (KeyError(), 1)])
def test_an_error_ends_with_its_message(error: Exception, code: int, capsys: Any) -> None:
    assert cli.show_error(error) == code
    shown = capsys.readouterr().err
    assert isinstance(error, UserError) == (shown == "ConfigError: config.seed = -1\n")
    assert isinstance(error, UserError) != ("Traceback" in shown or "KeyError" in shown)


def test_figures_go_to_a_file(tmp_path: Path, capsys: Any) -> None:
    cli.show("a table", {"loss": 1.5}, None)
    cli.show("a table", {"loss": 1.5}, tmp_path / "a.json")
    assert capsys.readouterr().out == "a table\n" * 2
    assert (tmp_path / "a.json").read_text() == '{\n  "loss": 1.5\n}\n'


def test_compilation_cache_is_made_and_used(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    hardware.use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.chdir(tmp_path)
    try:
        hardware.use_compilation_cache(Path("some/cache"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "some" / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (tmp_path / "some" / "cache").is_dir()


def test_compilation_cache_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gs://bucket/cache: pip install gcsfs"):
        hardware.use_compilation_cache("gs://bucket/cache")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.mesh.fsdp=0", "ConfigError: config.mesh.fsdp = 0: must be -1 or at least 1\n"),
        ("--help", ""),
    ],
)
def test_a_script_ends_with_one_message(word: str, message: str, tmp_path: Path) -> None:
    done = processes.call(["python", "launch/train.py", f"--workdir={tmp_path}", CONFIG, word])
    assert done.returncode == (cli.USER_ERROR if message else 0) and done.stderr == message


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("open('/nowhere/a')", 2, "MachineError: /nowhere/a: No such file or directory; check the"),
        ("sys.stdout.write('³')", 0, "\\xb3"),
        ("{}['a']", 1, "KeyError: 'a'"),
        ("signal.raise_signal(signal.SIGINT)", 130, "interrupted; the same command goes on"),
    ],
)
def test_how_a_script_ends(statement: str, code: int, message: str, tmp_path: Path) -> None:
    lines = [
        "import signal, sys",
        "from m3jax import cli",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # a shell may ignore it
        f"main = lambda given: {statement} and None",
        "cli.run('', {'': cli.Command(main, (cli.WORKDIR,))})",
    ]
    command = ["python", "-c", "\n".join(lines), f"--workdir={tmp_path}"]
    done = processes.call(command, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == code and message in done.stderr + done.stdout
    assert ("Traceback" in done.stderr) == (code == 1) or done.stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["--help", "--config_help"])
def test_help_may_be_cut_off(word: str) -> None:
    script = f"{sys.executable} launch/train.py {word} | true"
    done = processes.call(["bash", "-o", "pipefail", "-c", script])
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(options=''): return 3", "returns no ConfigDict|seed does not exist"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this"),
        ("def get_config(options=''", r"is no Python file: '\(' was never closed"),
        ("def get_config(options=''): return {}['seed']", "KeyError"),
    ],
)
@pytest.mark.parametrize("override", [False, True])
def test_config_files_that_fail_are_named(
    text: str, message: str, override: bool, tmp_path: Path
) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    words = ["--config.seed=1"] if override else []
    with pytest.raises(UserError, match="--config") as caught:
        parse("add", f"--config={file}", "--workdir=x", *words)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(("folder", "message"), [("", "is empty"), ("gs://b/x", "or mount it")])
def test_folders_that_are_none_are_refused(folder: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse("add", CONFIG, f"--workdir={folder}")


def test_values_are_not_taken_for_fields() -> None:
    given = parse("add", CONFIG, "--workdir=x", "--prompt", "-3.5 degrees")
    assert given.prompt == ["-3.5 degrees"]
