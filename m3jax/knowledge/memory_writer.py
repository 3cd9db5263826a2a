"""Chooses and restores the weights that write memories for a checkpoint: its writer.

A checkpoint that was trained on memories of a bank has learned to read memories of that bank's
writer. It records the writer, which also writes all later memories for it. Other checkpoints write
their own memories.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.checkpoint import reads, restore_params, stage_of
from m3jax.checkpoint_folder import Folder, to_folder
from m3jax.config import PREFIX_TOKENS
from m3jax.errors import BankError, CheckpointError
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.binding import writer_fingerprint
from m3jax.memory.document_context import writer_settings
from m3jax.memory.write import write_bank
from m3jax.mesh import writer_mesh
from m3jax.mirror import Mirror
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.text.references import References


class Writer(NamedTuple):
    """The weights that write memories: parameters, and stage folder, step and run of them."""

    params: Params
    folder: Folder
    step: int
    run: str  # "" of a checkpoint of an earlier version


def restore_writer(checkpoint: Folder | str, model: Model, tokenizer: str) -> Writer:
    """Restores a checkpoint's writer.

    `tokenizer` is the fingerprint that the checkpoint's tokenizer must have.

    Raises:
      CheckpointError: there is no such checkpoint, or it has another shape or tokenizer.
      BankError: the recorded writer's checkpoint is neither at its recorded path nor in the
        checkpoint's workdir, or its weights have changed.
    """
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    writer = meta["writer"]
    if writer is None:
        return _writer(params, stage_of(checkpoint), meta)
    weights = _restore_recorded(writer, stage_of(checkpoint).parent, model)
    if weights is None:
        raise BankError(
            f"checkpoint {checkpoint} reads memories of the writer {writer['hash'][:12]}, which was"
            f" step {writer['step']} of {writer['path']}, but that is not there now. Put it back,"
            " or train again from the checkpoint that is to write"
        )
    return weights


class MemoryWriter:
    """Writes memories of references with the weights of one writer, which are restored once.

    Args:
      config: a validated config.
      workdir: folder of the run.
      checkpoint: checkpoint whose writer is used. None: the writer of the base bank if its weights
        still exist, otherwise the writer of `workdir/warmup`.
      itself: use the checkpoint's own weights, even if it reads memories of another writer.
      like_base: use compression and document context of the base bank, not of `config.writer`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | Path,
        checkpoint: str | Path | None = None,
        *,
        itself: bool = False,
        like_base: bool = False,
    ) -> None:
        self.config, self.workdir, self.checkpoint = config, Path(workdir), checkpoint
        self.itself, self.like_base = itself, like_base
        self.model = make_model(config, PREFIX_TOKENS, writer_mesh(config))
        self.writer: Writer | None = None

    def restore(self, tokenizer: str, base: Bank | None = None) -> Writer:
        """Returns the writer, which is restored at the first call.

        Raises `CheckpointError` or `BankError` as `restore_writer` does.
        """
        if self.writer is None:
            self.writer = self._restore(tokenizer, base)
        return self.writer

    def __call__(
        self,
        references: References,
        folder: str | Path,
        base: Bank | None = None,
        keep: Int[np.ndarray, " n"] | None = None,
    ) -> dict[str, Any]:
        """Writes the memories of references by `m3jax.memory.write.write_bank` with this writer."""
        writer = self.restore(references.tokenizer_fingerprint, base)
        config = self.config.copy_and_resolve_references()
        if self.like_base and base is not None:
            with config.unlocked():
                config.writer.compression = base.codec.name
                config.writer.update(writer_settings(base.binding.layout))
        return write_bank(
            config,
            self.model,
            writer.params,
            references,
            folder,
            writer_path=str(writer.folder),
            writer_step=writer.step,
            writer_run=writer.run,
            base=base,
            keep=keep,
        )

    def _restore(self, tokenizer: str, base: Bank | None) -> Writer:
        if self.checkpoint is None and base is not None:
            workdir = to_folder(Mirror.of(self.workdir).place)
            recorded = _restore_recorded(base.writer, workdir, self.model)
            if recorded is not None:
                return recorded
        checkpoint = self.checkpoint or Mirror.of(self.workdir).url("warmup")
        if not self.itself:
            return restore_writer(checkpoint, self.model, tokenizer)
        params, meta = restore_params(checkpoint, self.model, tokenizer_fingerprint=tokenizer)
        return _writer(params, stage_of(checkpoint), meta)


def _writer(params: Params, folder: Folder, meta: Mapping[str, Any]) -> Writer:
    return Writer(params, folder, meta["step"], meta.get("run", ""))


def _restore_recorded(writer: Mapping[str, Any], workdir: Folder, model: Model) -> Writer | None:
    """Restores the weights that a checkpoint or bank records as its writer.

    Looks at the recorded path, then for a folder of that name in `workdir`; None if neither has
    these weights.
    """
    recorded = writer["path"]
    for folder in (to_folder(recorded), workdir / Path(recorded).name):
        try:
            params, meta = restore_params(folder, model, writer["step"])
        except CheckpointError:
            continue
        if writer_fingerprint(params, model.memory) == writer["hash"]:
            return _writer(params, folder, meta)
    return None


def check_reader(bank: Bank | None, meta: dict[str, Any], checkpoint: Folder) -> None:
    """Raises `BankError` if the checkpoint has learned to read another writer than the bank's."""
    if bank is not None and not reads(meta, checkpoint, bank.writer):
        written, read = bank.binding.writer, meta["writer"]["hash"]
        raise BankError(
            f"bank {bank.folder} was written by other weights ({written[:12]}) than those"
            f" that {checkpoint} reads ({read[:12]}, step {meta['writer']['step']} of"
            f" {meta['writer']['path']}); write it again: launch/write_bank.py"
            f" --checkpoint={checkpoint}"
        )
