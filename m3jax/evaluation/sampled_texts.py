"""Samples texts from a checkpoint, to train and measure its memory model on.

The first part of a text becomes a reference, the rest a document that stores this reference for its
first chunk: its continuation is likelier to a reader who knows its beginning. The model itself
bounds how much likelier: at temperature 1 nobody predicts its texts better than it does, with all
of a text in its context.
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
    """Opens a checkpoint that samples texts.

    Raises:
      ConfigError: the config is of a stage with memories.
    """
    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: texts are sampled from a model"
            " without memories; use the config of the warmup stage"
        )
    return Session(config, workdir, checkpoint=checkpoint)


def describe(report: dict[str, Any]) -> str:
    """Returns the report of `make_texts` in words."""
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
    """Writes `documents.jsonl` and `knowledge.jsonl` to a folder.

    * `knowledge`: the first `split` tokens of every text;
    * `documents`: what follows, with the key of that reference for the first chunk of the row. Its
      end is not to be learnt (`no_loss`): the model does not end texts as we do.

    Texts that end within their first part are left out; so are tokens from a text's end on. The
    same arguments write the same bytes, and finished files are kept.

    Args:
      session: the checkpoint, of a stage without memory.
      folder: where to write.
      count: texts to sample.
      tokens: most tokens of a text, `<s>` not counted.
      split: tokens of the first part.
      temperature: of the sampling; 1 samples from the model's own distribution.
      seed: of the sampling.
      batch: texts sampled together; changes nothing but the time.

    Returns:
      `texts` sampled and `kept`; `loss_whole`: nats a token of the documents that
      `text.validation_share` holds out, predicted by the model that has their first parts in its
      context; `held_out` tokens in these.

    Raises:
      InferenceError: a first part that leaves no other, a text longer than a row, or none kept.
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
    """Samples texts of up to so many tokens after `<s>`; yields tokens and log-probabilities.

    A text ends at `</s>`, or where the model begins another one; the end is left out.
    """
    generator = session.generator("none", sampling=sampling, stop=(END, BOS), longest=tokens + 1)
    usable = session.tokenizer.size
    begin_V = jax.jit(session.model.logits)(session.params, jnp.array([[BOS]]))[0, -1]
    logprobs_V = np.asarray(jax.nn.log_softmax(begin_V))
    for low in tqdm(range(0, count, batch), desc="texts", unit=" batches", disable=None):
        numbers = np.arange(low, min(low + batch, count))
        logits_BV = jnp.broadcast_to(begin_V[None, :usable], (len(numbers), usable))
        rows, last = jnp.asarray(numbers, jnp.int32), jnp.int32(2**31 - 1)  # a draw of its own
        first = np.asarray(sampling(logits_BV, rows, last))
        generations = generator.generate([*first[:, None]], tokens - 1, row_ids=numbers.tolist())
        for token, rest in zip(first, generations, strict=True):
            text = np.concatenate([[token], rest.tokens]).astype(np.int32)
            logprobs = np.concatenate([logprobs_V[[token]], rest.logprobs])
            length = int(np.append(np.isin(text, generator.stop), True).argmax())
            yield text[:length], logprobs[:length]
