"""Samples texts from a checkpoint, as data to train and evaluate its memory model on.

The first part of a text becomes a reference, the rest a document whose first chunk reads this
reference: the continuation is likelier to a model that reads the beginning. The sampling model with
the whole text in its context gives the bound: at temperature 1 no model predicts its texts better
on average.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.errors import ConfigError, InferenceError
from m3jax.files import write_atomically
from m3jax.inference.sampling import Sampling
from m3jax.inference.session import Session
from m3jax.text.documents import Document, is_validation
from m3jax.text.tokenizer import BOS, END
from m3jax.workdir import make_part

REPORT = "report.json"


def open_session(config: ConfigDict, workdir: Path, checkpoint: str | None) -> Session:
    """Opens a session whose checkpoint samples texts.

    Raises:
      ConfigError: the config is of a stage with memories.
      CheckpointError, TextError: a part is missing or does not fit.
    """
    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: texts are sampled from a model"
            " without memories; use the config of the warmup stage"
        )
    return Session(config, workdir, checkpoint=checkpoint)


def describe(report: dict[str, Any]) -> str:
    """Returns the report of `make_texts` as sentences."""
    text = f"{report['kept']} of {report['texts']} texts are longer than their first part"
    if report["held_out"]:
        text += (
            f"\nloss of the whole text's reader: {report['loss_whole']:.4f} nats a token, on"
            f" {report['held_out']} held-out tokens"
        )
    return text


def make_texts(
    session: Session,
    folder: Path,
    *,
    count: int,
    tokens: int,
    split: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 256,
) -> dict[str, Any]:
    """Samples texts and writes them to a folder as `documents.jsonl` and `knowledge.jsonl`.

    * `knowledge`: the first `split` tokens of every text;
    * `documents`: the rest, with the key of that reference for the first chunk of the row. Its end
      is excluded from the loss (`no_loss`), since the model does not end texts as documents end.

    Texts that end within their first part are left out; tokens after a text's end are cut off.
    Equal arguments write equal bytes, and finished files are kept.

    Args:
      session: the checkpoint, of a stage without memory.
      folder: output folder.
      count: number of texts to sample.
      tokens: most tokens of a text, without `<s>`.
      split: number of tokens of the first part.
      temperature: of the sampling; 1 samples from the model's own distribution.
      seed: of the sampling.
      batch: number of texts sampled together; it affects only the speed.

    Returns:
      `texts`, number sampled, and `kept`, number written; `loss_whole`: nats per token of the
      documents that `text.validation_share` holds out, predicted by the sampling model with their
      first parts in its context (None without such documents); `held_out`: number of their tokens.

    Raises:
      InferenceError: `split` is not between 0 and `tokens`, a text is longer than a row, or no text
        is longer than its first part.
    """
    share, row = session.config.text.validation_share, session.config.data.sequence_length
    if not 0 < split < tokens <= row:
        raise InferenceError(
            f"a first part of {split} of at most {tokens} tokens: both parts need some, and"
            f" config.data.sequence_length = {row} is the longest text"
        )
    settings = {"count": count, "tokens": tokens, "split": split, "seed": seed, "share": share}
    settings |= {"temperature": temperature, "checkpoint": str(session.checkpoint)}
    settings |= {"step": session.meta["step"], "tokenizer": session.tokenizer.fingerprint}

    def write(folder: Path) -> None:
        documents: list[dict[str, Any]] = []
        knowledge: list[dict[str, Any]] = []
        nats = [np.zeros(0)]
        samples = sample_texts(session, count, tokens, Sampling(temperature, seed=seed), batch)
        for number, (text, logprobs) in enumerate(samples):
            if len(text) <= split:
                continue
            name = f"text-{number}"
            first = session.tokenizer.decode(text[:split]).rstrip("\N{REPLACEMENT CHARACTER}")
            rest = session.tokenizer.decode(text)[len(first) :].lstrip()
            stored = {"references": [f"{name}#0"], "no_loss": [[len(rest)] * 2]}
            documents.append({"id": name, "text": rest, **stored})
            knowledge.append({"id": name, "text": first})
            if is_validation(Document(name, rest), share):
                nats.append(-logprobs[split:])
        if not documents:
            raise InferenceError(f"all of {count} texts end within {split} tokens; lower the split")
        for part, records in (("documents", documents), ("knowledge", knowledge)):
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_atomically(folder / f"{part}.jsonl", "".join(lines).encode())
        held_out = np.concatenate(nats)
        report = {
            "texts": count,
            "kept": len(documents),
            "held_out": held_out.size,
            "loss_whole": float(held_out.mean()) if held_out.size else None,
        }
        write_atomically(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())

    make_part(folder, settings, write)
    return json.loads((folder / REPORT).read_bytes())


def sample_texts(
    session: Session, count: int, tokens: int, sampling: Sampling, batch: int
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Samples `count` texts of up to `tokens` tokens after `<s>`; yields ids and log-probabilities.

    A text ends at `</s>`, or where the model begins another text; its end token is left out.
    """
    generator = session.generator("none", sampling=sampling, stop=(END, BOS), longest=tokens + 1)
    usable = session.tokenizer.size
    begin_V = jax.jit(session.model.logits)(session.params, jnp.array([[BOS]]))[0, -1]
    logprobs_V = np.asarray(jax.nn.log_softmax(begin_V))
    for low in tqdm(range(0, count, batch), desc="texts", unit=" batches", disable=None):
        numbers = np.arange(low, min(low + batch, count))
        logits_BV = jnp.broadcast_to(begin_V[None, :usable], (len(numbers), usable))
        rows, last = jnp.asarray(numbers, jnp.int32), jnp.int32(2**31 - 1)  # a key of its own
        first = np.asarray(sampling(logits_BV, rows, last))
        generations = generator.generate([*first[:, None]], tokens - 1, row_ids=numbers.tolist())
        for token, rest in zip(first, generations, strict=True):
            text = np.concatenate([[token], rest.tokens]).astype(np.int32)
            logprobs = np.concatenate([logprobs_V[[token]], rest.logprobs])
            length = int(np.append(np.isin(text, generator.stop), True).argmax())
            yield text[:length], logprobs[:length]
