"""Builds an index again and again, killed at every moment of its life; run by test_index.py.

Every build runs in a forked child, so that SIGKILL is real and ScaNN's threads never meet a fork.
Arguments: folder of the references, folder for the indexes `undisturbed`, `0`, `1`, …, and whether
they keep their embeddings (`keep` or `drop`).
"""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from m3jax import config as configs
from m3jax.retrieval import build as building
from m3jax.retrieval import index as indices
from m3jax.retrieval import search, tune
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.text.references import References

ROWS = 64  # per shard of embeddings
CONFIG = configs.default()
CONFIG.retrieval.exact_below = 0
CONFIG.retrieval.index_parts = 2


def build(references, folder):
    building.build_index(References(references), LexicalEmbedder(64), folder, CONFIG)


def killer(call, after):
    """Wraps a function: the call number `after` is the last thing this process does."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == after:
            if call is tune.fit:  # half of its files, one of them half
                call(*args, **kwargs)
                (args[4] / "scann_assets.pbtxt").unlink()
                os.truncate(next(args[4].glob("*dataset.npy")), 100)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapped


# What is called last, and which call of it.
MOMENTS = [
    ("m3jax.text.references.References.texts", References.texts, 2),  # in the fit
    ("m3jax.text.references.References.texts", References.texts, 9),  # in a shard
    *(("m3jax.files.os.replace", os.replace, n) for n in range(1, 11)),  # before each commit
    ("m3jax.retrieval.tune.fit", tune.fit, 1),
    ("m3jax.retrieval.tune.fit", tune.fit, 2),
    ("m3jax.retrieval.index.checksum", indices.checksum, 3),
]


def forked(*args, moment=None):
    """Exit status of a build in a child."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if moment is None:
            build(*args)
        else:
            with mock.patch(moment[0], killer(*moment[1:])):
                build(*args)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(references, folder, keep):
    CONFIG.retrieval.keep_embeddings = keep == "keep"
    for module in (building, indices, search, tune):
        module.SHARD_ROWS = ROWS
    building._BATCH = ROWS // 2
    folder = Path(folder)
    assert forked(references, folder / "undisturbed") == 0
    for i, moment in enumerate(MOMENTS):
        target = folder / str(i)
        status = forked(references, target, moment=moment)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        assert not (target / "manifest.json").exists(), moment
        kept = {path: path.stat().st_mtime_ns for path in target.rglob("embeddings-*.npy")}
        assert forked(references, target) == 0, moment
        # Finished shards were not made again.
        left = {path: path.stat().st_mtime_ns for path in target.rglob("embeddings-*.npy")}
        assert kept.items() <= left.items() if keep == "keep" else not left, moment
        assert not list(target.rglob("*.tmp")), moment
        # At once: a child would write what it finds in the buffer a second time.
        print(moment[0], moment[2], len(kept), "shards kept", flush=True)


if __name__ == "__main__":
    np.seterr(all="raise")
    main(*sys.argv[1:])
