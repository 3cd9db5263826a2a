"""All configuration fields, each declared once: default, meaning with unit, accepted values.

Paths are never part of a config: they are flags of the launch scripts. The exceptions are
`retrieval.encoder` and `retrieval.checkpoint`, which choose what to compute as
`retrieval.embedder` does.
"""

from __future__ import annotations

from typing import Any

from m3jax.config.preparation_fields import PREPARATION

# One entry per field: (default, meaning and unit, accepted values or None).
# Accepted values are a tuple of choices, or a (low, high) pair written as a string interval.
FIELDS: dict[str, tuple[Any, str, Any]] = {
    "name": ("m3jax", "name of the run, used in logs and plots", None),
    "stage": ("warmup", "training stage; also the name of its folder in the workdir", None),
    "seed": (0, "seed of the parameters, the data order and memory dropout", "[0, inf)"),
    # -- model ------------------------------------------------------------------------------------
    "model.layers": (4, "transformer blocks L", "[1, inf)"),
    "model.query_heads": (4, "query heads N", "[1, inf)"),
    "model.kv_heads": (4, "key-value heads K; divides query_heads (GQA)", "[1, inf)"),
    "model.head_dim": (32, "width H of one head; even (RoPE)", "[2, inf)"),
    "model.hidden": (128, "hidden width D", "[1, inf)"),
    "model.mlp_width": (256, "width F of the gated MLP", "[1, inf)"),
    "model.vocabulary": (
        1024,
        "rows V of the embedding and LM head, at least the tokenizer's",
        "[5, inf)",
    ),
    "model.rope_base": (10000.0, "base of the RoPE frequencies", "(0, inf)"),
    "model.norm_epsilon": (1e-5, "epsilon of RMSNorm", "(0, 1)"),
    "model.tied_embeddings": (False, "LM head shares the embedding matrix", None),
    "model.embedding_scale": (1.0, "factor on embedding outputs", "(0, inf)"),
    "model.attention_bias": (False, "biases on query, key and value (as Qwen2 has)", None),
    "model.qk_norm": (
        False,
        "RMSNorm with a scale over head_dim on queries and keys, before RoPE (arXiv"
        " 2010.04245; as Qwen3 has): attention scores stay bounded. Memories keep normed keys",
        None,
    ),
    "model.previous_token_head": (
        0.0,
        "size of the query/key biases that start one key-value head of the first layer as a"
        " previous-token head, a shortcut for tiny models (needs attention_bias); 0 = none",
        "[0, inf)",
    ),
    "model.init_exponent": (
        -0.5,
        "weights start with standard deviation fan_in ** init_exponent; Memory³ §7 advises < -0.5",
        "[-2, 0]",
    ),
    "model.param_dtype": ("float32", "dtype of parameters", ("float32", "bfloat16")),
    "model.compute_dtype": ("float32", "dtype of activations", ("float32", "bfloat16")),
    "model.attention": (
        "blocked",
        "attention implementation: naive holds all scores; blocked runs anywhere; splash is"
        " the TPU kernel, splash_interpret the same in plain operations (tests); cudnn the"
        " kernel for NVIDIA GPUs, xla the same call without it; auto = splash on TPU, cudnn on"
        " GPU in bfloat16, else blocked",
        ("naive", "blocked", "splash", "splash_interpret", "cudnn", "xla", "auto"),
    ),
    "model.attention_block": (
        256,
        "queries per block of the blocked and splash attention, tokens",
        "[1, inf)",
    ),
    "model.attention_kv_block": (256, "keys per block of the splash attention, tokens", "[1, inf)"),
    "model.remat": (
        "none",
        "what the backward pass recomputes: nothing (none), all but matrix products (dots),"
        " all but the attention kernel's output (attention), everything (full)",
        ("none", "dots", "attention", "full"),
    ),
    "model.prefix": (
        "with_memory",
        "rows that begin with the constant prefix `<s>Reference:`: those of stages with"
        " memory (the paper), or of all stages, so that the writer has seen the marker in"
        " warmup",
        ("with_memory", "always"),
    ),
    # -- memory -----------------------------------------------------------------------------------
    "memory.source": (
        "none",
        "source of a batch's memories: none (warmup), precomputed (the bank), online (encoded"
        " in the step, with gradient), stop_gradient (encoded in the step, without)",
        ("none", "precomputed", "online", "stop_gradient"),
    ),
    "memory.first_layer": (0, "first memory layer", "[0, inf)"),
    "memory.layers": (2, "memory layers, counted from first_layer", "[1, inf)"),
    "memory.heads": (
        "",
        "memory heads: LAYER:HEAD+HEAD or LAYER for all heads of a layer, separated by"
        " commas, counted from 0 (0:1+3,2). The bank stores these; other heads see no memories"
        " (Memory³ §7). Empty = all heads of the memory layers",
        None,
    ),
    "memory.reference_length": (
        128,
        "most tokens W of a reference, without the prefix",
        "[1, inf)",
    ),
    "memory.kept_tokens": (8, "tokens P kept per layer and key-value head", "[1, inf)"),
    "memory.chunk_length": (64, "tokens Q of a chunk; divides data.sequence_length", "[1, inf)"),
    "memory.per_chunk": (1, "memories M that a training chunk retrieves", "[1, inf)"),
    "memory.window": (
        5,
        "chunks whose memories a training query reads: its own and the window − 1 before it",
        "[1, inf)",
    ),
    "memory.per_prompt_chunk": (
        5,
        "memories that a prompt chunk retrieves at inference",
        "[1, inf)",
    ),
    "memory.selection": (
        "exact",
        "token weight of the writer: sum of softmax attention, or of exp scores (Memory³ §3.3)",
        ("exact", "approximate"),
    ),
    "memory.dropout": (
        0.0,
        "share of training chunks whose memories are hidden, so that copying from the context"
        " is not forgotten",
        "[0, 1)",
    ),
    "memory.dtype": ("bfloat16", "dtype of memories in the bank", ("float32", "bfloat16")),
    "memory.cache_bytes": (
        0,
        "RAM of each process for the memories that it read last, bytes; 0 = none. For banks"
        " on servers, in buckets and on slow drives; the operating system caches local files",
        "[0, inf)",
    ),
    # -- writer -----------------------------------------------------------------------------------
    "writer.batch_references": (256, "references encoded by one call of the writer", "[1, inf)"),
    "writer.shard_memories": (256, "memories per shard file of the bank", "[1, inf)"),
    "writer.document_context": (
        False,
        "references attend to what stands before them in their document while their memory is"
        " written (Memory³ §10), not to themselves alone (§3.3); not for online memories",
        None,
    ),
    "writer.document_context_tokens": (
        1024,
        "tokens of a document that are encoded together, in whole references; further parts"
        " of a longer document are encoded behind its first reference",
        "[1, inf)",
    ),
    "writer.compression": (
        "none",
        "storage of keys and values: as memory.dtype (none), int8 with a scale a vector, or"
        " the vector quantizer (Memory³ §3.3)",
        ("none", "int8", "vector"),
    ),
    "writer.coarse_bits": (14, "bits of the quantizer's index of half a vector", "[1, 16]"),
    "writer.fine_bits": (10, "bits of its index of an eighth of the residual", "[1, 16]"),
    "writer.codebook_vectors": (
        640_000,
        "keys, and as many values, that the quantizer is trained on, if there are as many",
        "[1, inf)",
    ),
    **PREPARATION,  # text, clean, knowledge, retrieval, chat
    # -- data -------------------------------------------------------------------------------------
    "data.sequence_length": (2048, "tokens T of a row", "[1, inf)"),
    "data.batch_size": (16, "rows B of a step, over all hosts", "[1, inf)"),
    "data.packing": (
        "concat",
        "content of rows: documents end to end, cut (concat); each in rows of its own, padded"
        " (document); whole chats (chats, for SFT) or preference pairs (pairs, for DPO) that"
        " do not see each other",
        ("concat", "document", "chats", "pairs"),
    ),
    "data.threads": (4, "threads that load batches", "[1, 1024]"),
    "data.prefetch": (4, "batches loaded ahead", "[1, 1024]"),
    # -- preference -------------------------------------------------------------------------------
    "preference.beta": (
        0.01,
        "weight β of the log-probability ratios in DPO (Memory³ §6.4)",
        "(0, inf)",
    ),
    # -- optimizer --------------------------------------------------------------------------------
    "optimizer.name": (
        "adamw",
        "update rule; muon for matrices and adamw for the rest",
        ("adamw", "muon"),
    ),
    "optimizer.learning_rate": (1e-3, "peak learning rate", "(0, inf)"),
    "optimizer.muon_learning_rate": (0.01, "peak learning rate of Muon's matrices", "(0, inf)"),
    "optimizer.schedule": (
        "wsd",
        "learning rate: linear warmup, constant, fast decay (warmup-stable-decay), or cosine",
        ("wsd", "cosine"),
    ),
    "optimizer.lr_warmup_steps": (100, "steps of the linear learning-rate warmup", "[0, inf)"),
    "optimizer.lr_warmup_share": (
        0.0,
        "learning-rate warmup as a share of all steps, with train.epochs; 0 = lr_warmup_steps",
        "[0, 1]",
    ),
    "optimizer.lr_decay_share": (0.1, "share of all steps in which wsd decays", "[0, 1]"),
    "optimizer.min_lr_ratio": (0.0, "last learning rate over the peak", "[0, 1]"),
    "optimizer.beta1": (0.9, "decay of the first moment", "[0, 1)"),
    "optimizer.beta2": (0.95, "decay of the second moment", "[0, 1)"),
    "optimizer.epsilon": (1e-8, "Adam's epsilon", "(0, 1)"),
    "optimizer.weight_decay": (
        0.1,
        "decoupled weight decay; none for norms and biases",
        "[0, inf)",
    ),
    "optimizer.clip_norm": (
        1.0,
        "global gradient norm to which larger gradients are scaled down",
        "(0, inf)",
    ),
    # -- train ------------------------------------------------------------------------------------
    "train.steps": (1000, "optimizer steps of the stage", "[1, inf)"),
    "train.epochs": (
        0.0,
        "passes over the rows, from which the steps are counted; 0 = train.steps",
        "[0, inf)",
    ),
    "train.microbatches": (1, "parts of a batch whose gradients are added up", "[1, inf)"),
    "train.reduce_dtype": (
        "float32",
        "dtype in which devices add up gradients: bfloat16 halves their traffic, but sums of"
        " many devices lose low bits (8 bits of mantissa)",
        ("float32", "bfloat16"),
    ),
    "train.loss_block": (
        256,
        "tokens of a row whose logits exist at a time; loss and gradient are computed block"
        " by block",
        "[1, inf)",
    ),
    "train.z_loss": (
        0.0,
        "factor of the squared log of the softmax normaliser in the minimised loss (PaLM,"
        " arXiv 2204.02311, §5: 1e-4), so that logits do not drift; the reported loss is"
        " without it",
        "[0, inf)",
    ),
    "train.log_every": (10, "steps between two lines of metrics", "[1, inf)"),
    "train.checkpoint_every": (500, "steps between two checkpoints", "[1, inf)"),
    "train.keep_last": (2, "newest checkpoints kept", "[1, inf)"),
    "train.keep_every": (
        0,
        "checkpoints at multiples of this step are kept forever; 0 = none",
        "[0, inf)",
    ),
    "train.refresh_every": (
        0,
        "steps between rewrites of the bank's memories with the run's own weights, each a"
        " version of the knowledge; 0 = never",
        "[0, inf)",
    ),
    "train.evaluate_every": (500, "steps between two evaluations; 0 = never", "[0, inf)"),
    # -- guard ------------------------------------------------------------------------------------
    "guard.on": (
        False,
        "stability guard: a run whose loss is not finite, spikes or rises goes back to an"
        " earlier checkpoint, lowers the learning rate, leaves out the batches around it and"
        " goes on (docs/stability.md)",
        None,
    ),
    "guard.window": (
        128,
        "last steps whose median and median absolute deviation (MAD) define normal",
        "[16, 100000]",
    ),
    "guard.loss_deviations": (
        6.0,
        "deviations (1.4826 · MAD) above the median loss from which a step is bad",
        "(0, inf)",
    ),
    "guard.norm_deviations": (
        8.0,
        "the same of the log gradient norm, where the loss is above its median, too",
        "(0, inf)",
    ),
    "guard.least_deviation": (
        0.02,
        "least size of a deviation; nats of loss, or of the log gradient norm",
        "(0, inf)",
    ),
    "guard.patience": (
        3,
        "bad steps, among twice as many in a row, that make a spike",
        "[1, 10000]",
    ),
    "guard.rise_deviations": (
        5.0,
        "slow divergence: deviations of the median loss of the window's last quarter above"
        " its lowest value of the run",
        "(0, inf)",
    ),
    "guard.factor": (0.5, "factor on the learning rate, each time the run goes back", "(0, 1]"),
    "guard.skip_before": (2, "batches left out before the first bad step", "[0, inf)"),
    "guard.skip_after": (8, "batches left out after the last bad step", "[0, inf)"),
    "guard.tries": (8, "times that a run goes back before it ends with an error", "[0, 1000]"),
    # -- evaluation -------------------------------------------------------------------------------
    "evaluation.batches": (8, "validation batches of an evaluation", "[1, inf)"),
    "evaluation.batch_size": (
        16,
        "rows of an evaluation batch; `wrong` memories are those of another row",
        "[2, inf)",
    ),
    "evaluation.shift": (1, "retrieval shift of reported losses", (0, 1)),
    # -- mesh -------------------------------------------------------------------------------------
    "mesh.slice": (1, "slices of a multi-slice run; replicas over the slow network", "[1, inf)"),
    "mesh.data": (1, "data-parallel replicas in a slice", "[1, inf)"),
    "mesh.fsdp": (
        -1,
        "devices over which parameters are sharded; -1 = all that are left",
        "[-1, inf)",
    ),
    "mesh.tensor": (1, "devices over which heads and MLP width are split", "[1, inf)"),
}

# Names of fields before the first release, and what they are called now.
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
