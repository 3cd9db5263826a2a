r"""Prepares a workdir: tokenizer, token corpus, references and retrieval index from documents.

    python launch/prepare.py --config=configs/wiki_small.py --workdir=runs/wiki \
        --documents=articles.jsonl.gz

Finished parts are kept, so a stopped run goes on with the same command.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import launching
from m3jax.config import validate
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.")
_DOCUMENTS = flags.DEFINE_string(
    "documents",
    None,
    "Documents to train on: comma-separated .jsonl, .jsonl.gz or .txt files, globs, folders, or"
    " tfds:NAME[:SPLIT].",
)
_KNOWLEDGE = flags.DEFINE_string(
    "knowledge", None, "Documents of the knowledge base, as --documents; default: the same."
)
_LIMIT = flags.DEFINE_integer(
    "limit_documents", None, "Use only this many documents of each spec.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Prepares the text, then the index over its references."""
    from m3jax.data.embedders import make_embedder
    from m3jax.data.knowledge import require_unedited
    from m3jax.retrieval.index import build_index

    config = validate(_CONFIG.value)
    workdir = Path(str(_WORKDIR.value))
    require_unedited(workdir)
    # First: what is wrong with an encoder or a checkpoint is known at once.
    embedder = make_embedder(config, workdir)
    prepare_text(config, workdir, str(_DOCUMENTS.value), _KNOWLEDGE.value, _LIMIT.value)

    references = References.open(workdir / "references")
    build_index(references, embedder, workdir / "index", config)
    print(f"index: {len(references)} references in {workdir / 'index'}")


if __name__ == "__main__":
    launching.run(main, required=["config", "workdir", "documents"])
