"""Names of fields, flags and commands of earlier versions, and values, with the present ones."""

# Field names from before the first release → present names.
RENAMED = {
    "data.row_length": "data.sequence_length",
    "data.batch_rows": "data.batch_size",
    "evaluation.batch_rows": "evaluation.batch_size",
    "optimizer.rise_steps": "optimizer.lr_warmup_steps",
    "optimizer.rise_share": "optimizer.lr_warmup_share",
    "optimizer.fall_share": "optimizer.lr_decay_share",
    "optimizer.final_share": "optimizer.min_lr_ratio",
    "writer.context": "writer.document_context (True or False)",
    "writer.context_tokens": "writer.document_context_tokens",
}

# Earlier flags (or values) and commands → their present names.
RENAMED_FLAGS = {
    **{"at": "--k", "mode=context": "--mode=long_context", "png": "--picture"},
    "shift": "--config.evaluation.shift",
}
RENAMED_COMMANDS = {"collect": "compact"}

_BY_MODEL = "the model itself ranks what an index finds with retrieval.rerank, a weight such as 2"
# Values that earlier versions accepted → what serves instead.
REMOVED_VALUES = {
    "retrieval.embedder": {"model": _BY_MODEL, "attention": _BY_MODEL},
}
