r"""Compares the index of a workdir with exact search: how much of the result it finds, how fast.

    python launch/check_index.py --config=configs/wiki_small.py --workdir=runs/wiki
    python launch/check_index.py … --queries=questions.jsonl --least_recall=0.95

Queries are the second halves of sampled references' texts, or the texts of a file of JSON lines.
Ends with exit code 1 if the recall is below --least_recall.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_QUERIES = flags.DEFINE_string(
    "queries",
    None,
    "JSON lines with `question` or `text`, from which --sample are taken; default: halves of"
    " references.",
)
_SAMPLE = flags.DEFINE_integer("sample", 200, "Most queries.", lower_bound=1)
_K = flags.DEFINE_integer("k", 5, "References per query.", lower_bound=1)
_LEAST_RECALL = flags.DEFINE_float(
    "least_recall", 0.0, "Exit with code 1 below this share found.", lower_bound=0, upper_bound=1
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")


def main(argv: list[str]) -> None:
    """Prints a table and writes JSON."""
    from m3jax.config import validate
    from m3jax.files import write_atomically
    from m3jax.retrieval.checkpoint_embedders import load_embedder
    from m3jax.retrieval.index import Index
    from m3jax.retrieval.recall import read_queries, recall_report, table
    from m3jax.retrieval.tune import sample_queries
    from m3jax.text.references import References

    validate(_CONFIG.value)
    workdir = Path(str(_WORKDIR.value))
    references = References.open(workdir / "references")
    index = Index.open(workdir / "index", references, load=load_embedder)
    if _QUERIES.value is None:
        queries = sample_queries(references, index.embedder, _SAMPLE.value)
    else:
        queries = index.embedder.embed_queries(read_queries(_QUERIES.value, _SAMPLE.value))
    report = recall_report(index, queries, _K.value)
    print(table(report))
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())
    if report["recall"] < _LEAST_RECALL.value:
        print(
            f"recall {report['recall']:.3f} is below --least_recall={_LEAST_RECALL.value}",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
