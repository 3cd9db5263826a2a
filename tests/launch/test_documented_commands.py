"""Every command that README, docs, scripts and configs show is one that its script takes.

Parsed, not run: the script exists, takes the flags, and the config builds with its options and
changed fields.
"""

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from absl import flags
from ml_collections import ConfigDict

from m3jax import cli
from m3jax.config.fields import FIELDS
from m3jax.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: runpy.run_path(str(path)) for path in sorted(ROOT.glob("launch/*.py"))}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("launch/*.py")),
    *sorted(ROOT.glob("configs/**/*.py")),
]
LAUNCHED = r"(?:launch/)\w+\.(?:py|sh)\b"
ELLIPSIS = ("…", "...")
LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512},
    **{"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "intermediate_size": 172, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True},
}
TPU = {"M3JAX_TPU_NAME": "m3", "M3JAX_TPU_ZONE": "us-west4-a", "M3JAX_TPU_TYPE": "v5litepod-8"}


def texts(page: Path) -> Iterator[str]:
    """A Markdown page, or the docstrings of a Python file."""
    if page.suffix == ".md":
        yield page.read_text("utf-8")
        return
    for node in ast.walk(ast.parse(page.read_text("utf-8"))):
        if isinstance(node, (ast.Module, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Commands of a text, and whether they are whole: lines of code are, parts of prose are not."""
    text = re.sub(r"\\\n\s*", " ", text)
    given = re.findall(r"^\s+(?:export )?([A-Z]+)=([^\s#]+)", text, re.MULTILINE)
    fields = dict(given)
    assert len(set(given)) == len(fields), f"a variable has two values on one page: {given}"
    text = re.sub(r"\$([A-Z]+)", lambda name: fields.get(name[1], name[0]), text)
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)
    for line in [*indented, *fenced.splitlines()]:
        if re.search(LAUNCHED, line) and "`" not in line:
            yield line.strip(), True
    for code in re.findall(r"`([^`]+)`", text):
        code = " ".join(code.split())
        script = re.match(r"(\w+)\.py\b", code)
        if re.search(rf"^(?:python |bash |srun )*{LAUNCHED}", code):
            yield code, False
        elif script and script[1] in SCRIPTS:
            yield f"launch/{code}", False


def completed(words: list[str], flags_: tuple[cli.Flag, ...]):
    """The words of a command that is a part, with values where it leaves them to the reader."""
    given = [word for word in words if not word.endswith(ELLIPSIS)]
    for word in list(given):  # --config.writer.compression=C: any value
        changed = re.fullmatch(r"--config\.([\w.]+)=[A-Z]", word)
        if changed:
            assert changed[1] in FIELDS, word
            given.remove(word)
    names = {word.lstrip("-").partition("=")[0] for word in given}
    values = {ConfigDict: "configs/wiki_small.py:stage=continual", int: "1", float: "1"}
    for flag in flags_:
        valued = f"--{flag.name}={values.get(flag.kind, 'x')}"
        if flag.required and flag.name not in names:
            given.insert(0, valued)
        elif f"--{flag.name}" in given and flag.kind is not bool:
            given[given.index(f"--{flag.name}")] = valued
    return given


def check(command: str, whole: bool, dry_run: bool) -> None:
    """Fails where the command's script would refuse it."""
    command = re.sub(r"[\w.-]+\.whl", "LLAMA", command)  # a downloaded model
    words = shlex.split(command, comments=True)
    at = next((i for i, word in enumerate(words) if re.search(rf"{LAUNCHED}$", word)), None)
    if at is None:  # a command in the quotes of another
        inner = next(word for word in words if re.search(LAUNCHED, word))
        check(inner[re.search(LAUNCHED, inner).start() :], whole, dry_run)
        return
    script, rest = Path(words[at]), words[at + 1 :]
    assert (ROOT / script).is_file(), f"no {script}"
    end = next((i for i, word in enumerate(rest) if word in ("&&", "|", ">", "&", ";")), len(rest))
    rest = rest[:end]
    whole = whole and not any(word.endswith(ELLIPSIS) for word in rest)
    if script.suffix == ".sh":
        if "--" in rest:
            inner = rest[rest.index("--") + 1 :]
            check(shlex.join(inner), whole, dry_run)
        if dry_run and whole and script.name == "tpu_vm.sh":
            processes.succeed(["bash", ROOT / script, "--dry_run", *rest], env=TPU)
        return
    scope = SCRIPTS[script.stem]
    named = rest[:1] if rest and rest[0] in scope["COMMANDS"] else []
    if not whole and not named and "" not in scope["COMMANDS"] and not rest:
        return  # the script by its name
    if not whole and (named or "" in scope["COMMANDS"]):
        chosen = scope["COMMANDS"][named[0] if named else ""]
        if rest[:1] and not rest[0].startswith(("-", *ELLIPSIS)) and not named:
            raise AssertionError(f"{rest[0]} is no command of {script}")
        rest = [*named, *completed(rest[len(named) :], chosen.flags)]
    cli.parse(scope["__doc__"], scope["COMMANDS"], [script.name, *rest], flags.FlagValues())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_can_be_given(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "LLAMA").mkdir()
    (tmp_path / "LLAMA" / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    wrong = []
    for command, whole in (command for text in texts(page) for command in commands(text)):
        try:
            check(command, whole, dry_run=page.suffix == ".md")
        except (AssertionError, UserError, ValueError, StopIteration) as error:
            wrong.append(f"{command}\n    {type(error).__name__}: {error}")
        except SystemExit as ended:  # --help, --config_help
            assert ended.code == 0, command
    assert not wrong, "\n".join(wrong)


def test_commands_are_collected() -> None:
    """The README's, of every form; else the test above tests nothing."""
    found = [command for text in texts(ROOT / "README.md") for command in commands(text)]
    shown = [command for command, whole in found if whole]
    assert len(found) > 25 and any("launch/prepare.py" in command for command in shown)
    assert {command for command, whole in found if not whole} & {"launch/evaluate.py tasks"}


@pytest.mark.parametrize(
    ("command", "whole", "words"),
    [
        ("python launch/nothing.py --config=x", True, "no launch/nothing.py"),
        ("launch/nothing.sh", False, "no launch/nothing.sh"),
        ("python launch/train.py --config=configs/wiki_small.py", True, "needs --workdir"),
        ("python launch/train.py --nothing", False, "nothing"),
        ("launch/evaluate.py nothing", False, "nothing"),
        ("launch/evaluate.py needle --tasks=x", False, "--tasks is a flag of tasks"),
        ("launch/train.py --config.train.step=3", False, "no such field"),
        ("bash launch/tpu_vm.sh run -- python launch/train.py --x", False, "x"),
    ],
)
def test_a_wrong_command_is_noticed(
    command: str, whole: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, UserError), match=words):
        check(command, whole, dry_run=False)


def test_a_variable_with_two_values_on_a_page_is_noticed() -> None:
    page = "    C=a\n    python launch/train.py --config=$C\n\nor\n\n    C=b\n"
    with pytest.raises(AssertionError, match="two values"):
        list(commands(page))
    assert list(commands(page.replace("C=b", "C=a"))) == [
        ("python launch/train.py --config=a", True)
    ]


def test_no_script_hides_a_module() -> None:
    """`python launch/x.py` puts launch/ first on the path of modules, until `cli.run` takes it off.

    So a script named `select.py` would be imported for the module `select` by the standard library.
    """
    assert not SCRIPTS.keys() & (sys.stdlib_module_names | set(sys.builtin_module_names))


def test_a_script_takes_its_folder_off_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may have the name of a script, such as `evaluate`."""
    folder = str(ROOT / "launch")
    monkeypatch.setattr(sys, "argv", [f"{folder}/evaluate.py"])
    monkeypatch.setattr(sys, "path", [folder, str(ROOT), *sys.path])
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: None)
    cli.run(None, {})
    assert folder not in sys.path and str(ROOT) in sys.path
