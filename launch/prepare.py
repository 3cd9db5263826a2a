r"""Prepares a workdir: tokenizer, token corpus, references and retrieval index from documents.

    python launch/prepare.py --config=configs/wiki_small.py --workdir=runs/wiki \
        --documents=articles.jsonl.gz

Finished parts are kept, so a stopped run goes on with the same command.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from m3jax.config import validate
from m3jax.text.prepare import make_part, prepare_text
from m3jax.text.references import References

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; made if it does not exist.", required=True
)
_DOCUMENTS = flags.DEFINE_string(
    "documents",
    None,
    "Documents to train on: comma-separated .jsonl, .jsonl.gz or .txt files, globs, folders, or"
    " tfds:NAME[:SPLIT].",
    required=True,
)
_KNOWLEDGE = flags.DEFINE_string(
    "knowledge", None, "Documents of the knowledge base, as --documents; default: the same."
)
_LIMIT = flags.DEFINE_integer(
    "limit_documents", None, "Use only this many documents of each spec.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Prepares the text, then the index over its references."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every option begins with --")
    from m3jax.retrieval.index import build_index

    from m3jax.retrieval.embed import make_embedder

    config = validate(_CONFIG.value)
    workdir = Path(_WORKDIR.value)
    prepare_text(config, workdir, _DOCUMENTS.value, _KNOWLEDGE.value, _LIMIT.value)

    references = References.open(workdir / "references")
    inputs = {"references": references.fingerprint}
    inputs |= {
        f"retrieval.{field}": config.retrieval[field]
        for field in ("embedder", "dimension", "exact_below")
    }
    kept = make_part(
        workdir / "index",
        inputs,
        lambda folder: build_index(references, make_embedder(config), folder, config),
    )
    print(f"index: {len(references)} references ({'finished before, kept' if kept else 'made'})")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
