"""Who writes memories for a checkpoint.

A checkpoint that was trained on memories from a bank has learned to read the writer of that bank,
and records it; every later write uses that writer. Other checkpoints write their own memories.
"""

from __future__ import annotations

from pathlib import Path

from m3jax.memory.bank import writer_fingerprint
from m3jax.memory.storage import BankError
from m3jax.model.transformer import Model, Params
from m3jax.train.checkpoints import CheckpointError, restore_params


def restore_writer(
    checkpoint: str | Path, model: Model, tokenizer: str
) -> tuple[Params, Path, int]:
    """Parameters of a checkpoint's writer, their stage folder and step.

    Args:
      checkpoint: a stage folder or a folder `checkpoints/<step>`.
      model: the model that writes.
      tokenizer: fingerprint of the tokenizer, which must be the checkpoint's.

    Raises:
      CheckpointError: no such checkpoint.
      BankError: the recorded writer is not where it was, or was trained further.
    """
    checkpoint = Path(checkpoint)
    params, meta = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    writer = meta["writer"]
    if writer is None:
        return params, checkpoint.absolute(), meta["step"]
    recorded = Path(writer["path"])
    # A workdir that was moved or copied has the writer beside the checkpoint's stage.
    stage = checkpoint.absolute()
    stage = stage.parents[1] if stage.parent.name == "checkpoints" else stage
    for folder in (recorded, stage.with_name(recorded.name)):
        try:
            params, meta = restore_params(folder, model, writer["step"])
        except CheckpointError:
            continue
        if writer_fingerprint(params, model.config) == writer["hash"]:
            return params, folder, meta["step"]
    raise BankError(
        f"checkpoint {checkpoint} reads memories of the writer {writer['hash'][:12]}, which was"
        f" step {writer['step']} of {recorded}, but is not there now. Put it back, or train again"
        " from the checkpoint that is to write"
    )
