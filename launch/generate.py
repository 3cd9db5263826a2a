"""Continues prompts, retrieves memories while it generates, and names the sources of the text.

    python launch/generate.py --config=configs/wiki_small.py:stage=continual --workdir=runs/wiki \\
        --prompt="Paris is"
    python launch/generate.py … --prompts=prompts.jsonl --html=sources.html --explain
    python launch/generate.py … --mode=none          # or cold, long_context
    python launch/generate.py … --mode=rag --references=3

    python launch/generate.py --config=configs/wiki_small.py:stage=sft --workdir=runs/wiki --chat \\
        --prompt="What is the capital of France?"

Prompts are JSON lines with `prompt`, or a text file with one a line. With --chat they are questions
to a model after SFT, put into its chat template; JSON lines may then be chats that end with a
question. The text goes to standard output; sources follow it.
"""

from __future__ import annotations

import dataclasses

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, switch

COMMANDS = cli.Commands()
# Fields of `Request`, by their names.
REQUEST = (
    Flag(
        "mode",
        "What the model reads: nothing, memories of the bank, memories written when they are first"
        " retrieved, references as text in the prompt, or, for texts longer than its context,"
        " memories of their own older part.",
        default="memory",
        choices=("none", "memory", "cold", "rag", "long_context"),
    ),
    switch(
        "chat",
        "Prompts are questions, or chats (messages or conversations in .jsonl) that end with one:"
        " they are put into the template of config.chat, and the answer is printed.",
    ),
    count("new_tokens", "Most tokens generated a prompt.", 64),
    dataclasses.replace(cli.BATCH, default=32),
    count(
        "groups",
        "Parts of a batch that take turns on the device: while one computes, memories of another"
        " are retrieved and loaded.",
        1,
    ),
    cli.RAG_REFERENCES,
    cli.WINDOW.with_help("With --mode=long_context."),
    cli.CUT.with_help("With --mode=long_context."),
    Flag("stream", "Print text while it is generated, for a single prompt.", bool, True),
    Flag("sources", "Print what was read, and how much attention it got.", bool, True),
    switch("explain", "Generate again without each reference: by how many nats it helped."),
    switch("by_head", "Attention by layer and head, in --json."),
    cli.JSON.with_help("Texts and sources."),
    Flag("html", "File to write a page to, with the text coloured by source.", places.NEW_FILE),
)


@COMMANDS.add(
    *(*cli.BUCKET_RUN, cli.STAGE_CHECKPOINT, cli.BANK, cli.CACHE, cli.SEED),
    dataclasses.replace(
        cli.BANK_VERSION.with_help("Given twice, the text is generated from both."), many="repeat"
    ),
    Flag("prompt", "A prompt to continue.", default=[], many="repeat"),
    Flag("prompts", "File of prompts, .jsonl or one a line.", places.FILE),
    Flag("temperature", "0 takes the likeliest token.", float, 0.0),
    Flag("top_k", "Only so many of the likeliest tokens; 0 = all.", int, 0),
    Flag("top_p", "Only the likeliest tokens of this probability together.", float, 1.0),
    *REQUEST,
)
def main(given: FlagValues) -> None:
    """Generates texts and prints them with their sources."""
    from m3jax.inference.cli import Request, read_prompts, run
    from m3jax.inference.sampling import Sampling
    from m3jax.mirror import Mirror

    rounds = given.config.chat.most_rounds if given.chat else None
    request = Request(
        prompts=[*given.prompt, *(read_prompts(given.prompts, rounds) if given.prompts else [])],
        sampling=Sampling(given.temperature, given.top_k, given.top_p, given.seed),
        **cli.values_of(given, REQUEST),
    )
    versions = given.bank_version or [None]
    at = given.config, Mirror(given.workdir, given.cache_dir).local
    run(*at, request, checkpoint=given.checkpoint, bank=given.bank, versions=versions)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
