"""Continues prompts, recalling memories while it writes, and says where the text came from.

    python launch/generate.py --config=configs/wiki_small.py:stage=continual --workdir=runs/wiki \\
        --prompt="Paris is"
    python launch/generate.py … --prompts=prompts.jsonl --html=sources.html --explain
    python launch/generate.py … --mode=none          # or cold, rag, long_context

    python launch/generate.py --config=configs/wiki_small.py:stage=sft --workdir=runs/wiki --chat \\
        --prompt="What is the capital of France?"

Prompts are JSON lines with `prompt`, or a text file with one a line. With --chat they are questions
to a model after SFT, put into its chat template; JSON lines may then be chats that end with a
question. The text goes to standard output; sources follow it.
"""

from __future__ import annotations

import functools
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_BANK = flags.DEFINE_string(
    "bank", None, "Folder or URL of a bank of explicit memories; default WORKDIR/bank."
)
_VERSION = flags.DEFINE_multi_integer(
    "bank_version",
    None,
    "Version of the knowledge, of launch/edit_bank.py list; default current. Given twice, the text"
    " is generated from both.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "memory",
    ["none", "memory", "cold", "rag", "long_context"],
    "What the model reads: nothing, memories of the bank, memories written when they are first"
    " found, references as text in the prompt, or, for texts longer than its context, memories of"
    " their own older part.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A prompt; may be given more than once.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts, .jsonl or one a line.")
_CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Prompts are questions, or chats (messages or conversations in .jsonl) that end with one: they"
    " are put into the template of config.chat, and the answer is printed.",
)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Most tokens generated a prompt.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Prompts generated together.", lower_bound=1)
_GROUPS = flags.DEFINE_integer(
    "groups",
    1,
    "Parts of a batch that take turns on the device: while one computes, memories of another are"
    " found and loaded.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the likeliest tokens; 0 = all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability together.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws, with a temperature.")
_REFERENCES = flags.DEFINE_integer(
    "references", 5, "References in the prompt, with --mode=rag.", lower_bound=1
)
_WINDOW = flags.DEFINE_integer(
    "window",
    None,
    "Tokens that stay as they are when a text outgrows the context, with --mode=long_context;"
    " default"
    " half of the context.",
    lower_bound=1,
)
_CUT = flags.DEFINE_integer(
    "cut",
    None,
    "Most tokens of a memory of the older text, with --mode=long_context; default"
    " config.memory.reference_length.",
    lower_bound=1,
)
_STREAM = flags.DEFINE_bool(
    "stream", True, "Print text while it is generated, for a single prompt."
)
_SOURCES = flags.DEFINE_bool("sources", True, "Print what was read, and how much attention it got.")
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Generate again without each reference: by how many nats it helped."
)
_BY_HEAD = flags.DEFINE_bool("by_head", False, "Attention by layer and head, in --json.")
_JSON = flags.DEFINE_string("json", None, "Write texts and sources to this file.")
_HTML = flags.DEFINE_string("html", None, "Write a page with the text coloured by source.")
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Generates and prints."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.inference.cli import Request, read_chat_prompts, read_prompts, run
    from m3jax.inference.sampling import Sampling

    config = validate(_CONFIG.value)
    read = functools.partial(read_chat_prompts, config) if _CHAT.value else read_prompts
    request = Request(
        prompts=[*(_PROMPT.value or []), *(read(_PROMPTS.value) if _PROMPTS.value else [])],
        chat=_CHAT.value,
        mode=_MODE.value,
        new=_NEW.value,
        batch=_BATCH.value,
        groups=_GROUPS.value,
        references=_REFERENCES.value,
        window=_WINDOW.value,
        cut=_CUT.value,
        sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value),
        stream=_STREAM.value,
        sources=_SOURCES.value,
        explain=_EXPLAIN.value,
        by_head=_BY_HEAD.value,
        json=_JSON.value,
        html=_HTML.value,
    )
    run(
        config,
        Path(str(_WORKDIR.value)),
        request,
        checkpoint=_CHECKPOINT.value,
        bank=_BANK.value,
        versions=_VERSION.value or [None],
    )


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
