"""Every configuration field of m3jax, declared once, with its meaning, unit and accepted values.

A file in `configs/` calls `default()`, changes fields and returns the result; `validate` refuses
what cannot work before anything is allocated. Paths are never part of a config: they are flags of
the launch scripts. The exceptions are `retrieval.encoder` and `retrieval.checkpoint`, which are a
choice of what to compute as the embedder's name is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict as ConfigDict

from m3jax.errors import ConfigError

# One entry per field: (default, meaning and unit, accepted values or None).
# Accepted values are a tuple of choices, or a (low, high) pair written as a string interval.
_FIELDS: dict[str, tuple[Any, str, Any]] = {
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
        "rows V of the embedding and LM head; ≥ the tokenizer's",
        "[5, inf)",
    ),
    "model.rope_base": (10000.0, "base of the RoPE frequencies", "(0, inf)"),
    "model.norm_epsilon": (1e-5, "epsilon of RMSNorm", "(0, 1)"),
    "model.tied_embeddings": (False, "LM head shares the embedding matrix", None),
    "model.embedding_scale": (1.0, "factor on embedding outputs", "(0, inf)"),
    "model.attention_bias": (False, "biases on query, key and value (as Qwen2 has)", None),
    "model.qk_norm": (
        False,
        "whether queries and keys pass an RMSNorm of their own, with a scale over head_dim, before"
        " RoPE (Henry et al., arXiv 2010.04245; as Qwen3 has): attention scores cannot grow without"
        " bound. Memories keep normed keys",
        None,
    ),
    "model.previous_token_head": (
        0.0,
        "0, or the size of query/key biases that start one key-value head of the first layer as a"
        " previous-token head (needs attention_bias); a shortcut for tiny models",
        "[0, inf)",
    ),
    "model.init_exponent": (
        -0.5,
        "weights start with standard deviation fan_in ** this; Memory³ §7 advises less than -0.5",
        "[-2, 0]",
    ),
    "model.param_dtype": ("float32", "dtype of parameters", ("float32", "bfloat16")),
    "model.compute_dtype": ("float32", "dtype of activations", ("float32", "bfloat16")),
    "model.attention": (
        "blocked",
        "attention implementation: naive holds all scores; blocked runs anywhere; splash is the TPU"
        " kernel, splash_interpret the same in plain operations (for tests); cudnn the kernel for"
        " NVIDIA GPUs, xla the same call without it; auto takes splash on TPU, cudnn on GPU in"
        " bfloat16, else blocked",
        ("naive", "blocked", "splash", "splash_interpret", "cudnn", "xla", "auto"),
    ),
    "model.attention_block": (
        256,
        "queries per block of the blocked and the splash attention, tokens",
        "[1, inf)",
    ),
    "model.attention_kv_block": (
        256,
        "keys per block of the splash attention, tokens",
        "[1, inf)",
    ),
    "model.remat": (
        "none",
        "what the backward pass recomputes: nothing, all but matrix products (dots), all but the"
        " attention kernel's output (attention), or everything (full)",
        ("none", "dots", "attention", "full"),
    ),
    "model.prefix": (
        "with_memory",
        "where rows begin with the constant prefix `<s>Reference:`: in stages with memory (the"
        " paper), or in all stages, so that the writer has seen the marker during warmup",
        ("with_memory", "always"),
    ),
    # -- memory -----------------------------------------------------------------------------------
    "memory.source": (
        "none",
        "where a batch gets memories: none (warmup), precomputed (the bank), online (encoded in"
        " the step, with gradient), stop_gradient (encoded in the step, without)",
        ("none", "precomputed", "online", "stop_gradient"),
    ),
    "memory.first_layer": (0, "first memory layer", "[0, inf)"),
    "memory.layers": (2, "memory layers, counted from first_layer", "[1, inf)"),
    "memory.heads": (
        "",
        "key-value heads that have memories: LAYER:HEAD+HEAD, or LAYER for all of its heads, with"
        " commas between layers, all counted from 0 (0:1+3,2), as launch/select_heads.py prints"
        " them (Memory³ §7). The bank stores these, and the others see no memories; empty = all"
        " heads of the memory layers",
        None,
    ),
    "memory.reference_length": (
        128,
        "most tokens W of a reference, prefix not counted",
        "[1, inf)",
    ),
    "memory.kept_tokens": (8, "tokens P kept per layer and key-value head", "[1, inf)"),
    "memory.chunk_length": (64, "tokens Q of a chunk; divides data.row_length", "[1, inf)"),
    "memory.per_chunk": (1, "memories M each training chunk retrieves", "[1, inf)"),
    "memory.window": (
        5,
        "chunks whose memories a training query reads: its own and the window − 1 before it",
        "[1, inf)",
    ),
    "memory.per_prompt_chunk": (5, "memories a prompt chunk retrieves at inference", "[1, inf)"),
    "memory.selection": (
        "exact",
        "token weight of the writer: sum of softmax attention, or of exp scores (Memory³ §3.3)",
        ("exact", "approximate"),
    ),
    "memory.dropout": (
        0.0,
        "share of chunks whose memories are hidden in training, so that copying from the context"
        " is not forgotten",
        "[0, 1)",
    ),
    "memory.dtype": ("bfloat16", "dtype of memories in the bank", ("float32", "bfloat16")),
    "memory.cache_bytes": (
        0,
        "RAM in which each process keeps the memories of the bank that it read last, bytes; 0 ="
        " none. For banks on servers, in buckets and on slow drives: the system itself keeps local"
        " files that were read",
        "[0, inf)",
    ),
    # -- writer -----------------------------------------------------------------------------------
    "writer.batch_references": (256, "references encoded by one call of the writer", "[1, inf)"),
    "writer.shard_memories": (256, "memories per shard file of the bank", "[1, inf)"),
    "writer.context": (
        "reference",
        "what a reference attends to while its memory is written: itself alone (Memory³ §3.3), or"
        " what stands before it in its document, too (§10); not for online memories",
        ("reference", "document"),
    ),
    "writer.context_tokens": (
        1024,
        "tokens of a document that are encoded together, in whole references; each further part of"
        " a longer document is encoded behind the document's first reference",
        "[1, inf)",
    ),
    "writer.compression": (
        "none",
        "how the bank stores keys and values: as memory.dtype, in int8 with a scale a vector, or by"
        " the vector quantizer (Memory³ §3.3)",
        ("none", "int8", "vector"),
    ),
    "writer.coarse_bits": (14, "bits of the quantizer's index of half a vector", "[1, 16]"),
    "writer.fine_bits": (10, "bits of its index of an eighth of what is left", "[1, 16]"),
    "writer.codebook_vectors": (
        640_000,
        "keys, and as many values, that the quantizer is trained on, if there are as many",
        "[1, inf)",
    ),
    # -- text -------------------------------------------------------------------------------------
    "text.vocabulary": (
        1024,
        "most entries of the trained tokenizer, specials included",
        "[260, inf)",
    ),
    "text.min_frequency": (2, "least count of a pair that the tokenizer merges", "[1, inf)"),
    "text.tokenizer_bytes": (200_000_000, "bytes of text the tokenizer is trained on", "[1, inf)"),
    "text.validation_share": (
        0.01,
        "share of documents, by hash, held out for validation",
        "[0, 1)",
    ),
    "text.shards": (4, "ArrayRecord shards of the token corpus", "[1, 100000)"),
    "text.shuffle": (
        0,
        "order of the documents in the corpus: 0 = as they are read, else the seed of an order"
        " that depends on ids and texts alone",
        "[0, 1000000000]",
    ),
    # -- clean: rules of Memory³ §7; a word is a run of signs without white space, or one sign of
    #    Chinese or Japanese ----------------------------------------------------------------------
    "clean.enabled": (
        False,
        "whether documents are repaired, filtered and freed of near-duplicates before anything is"
        " made of them; needs the extra `clean`",
        None,
    ),
    "clean.unreadable_share": (
        0.01,
        "share of lines, rows and files that may be unreadable (not JSON, not UTF-8, without text);"
        " they are counted and left out, and more of them are refused",
        "[0, 1]",
    ),
    "clean.repair": (True, "whether damaged Unicode is repaired (ftfy)", None),
    "clean.characters_max": (
        10_000_000,
        "documents of more characters are dropped, before their words are looked at",
        "[1, inf)",
    ),
    "clean.words_min": (50, "documents of fewer words are dropped; 0 = none", "[0, inf)"),
    "clean.word_length_max": (
        10.0,
        "documents whose words have more characters on average are dropped",
        "(0, inf)",
    ),
    "clean.nonalphabetic_max": (
        0.7,
        "documents with a larger share of characters that are no letters, white space not counted,"
        " are dropped; 1 = none",
        "[0, 1]",
    ),
    "clean.unique_max": (
        0.9,
        "documents with a larger share of different words among all are dropped; 1 = none",
        "(0, 1]",
    ),
    "clean.entropy_min": (
        3.0,
        "documents whose words have less unigram entropy, nats, are dropped; 0 = none",
        "[0, inf)",
    ),
    "clean.quality_min": (
        0.0,
        "documents of a lower learned quality score, 0 … 5, are dropped; 0 = no score is computed",
        "[0, 5]",
    ),
    "clean.similarity": (
        0.8,
        "near-duplicates: a document is dropped when its similarity (Jaccard, estimated by MinHash)"
        " with an earlier one is at least this; 0 = none is dropped",
        "[0, 1]",
    ),
    "clean.shingle_words": (5, "neighbouring words that are one item of the comparison", "[1, 64]"),
    "clean.permutations": (128, "MinHash values of a document", "[16, 4096]"),
    # -- knowledge: which references of the knowledge base are kept; words as of `clean` -----------
    "knowledge.enabled": (
        False,
        "whether references are selected by the rules below, once they are cut and before they are"
        " embedded; needs the extra `clean` where near-duplicates are looked for",
        None,
    ),
    "knowledge.words_min": (8, "references of fewer words are dropped; 0 = none", "[0, inf)"),
    "knowledge.nonalphabetic_max": (
        0.5,
        "references with a larger share of characters that are no letters, white space not counted,"
        " are dropped; 1 = none",
        "[0, 1]",
    ),
    "knowledge.listed_max": (
        0.7,
        "references with a larger share of their characters in lines of lists, tables and markup"
        " (lines that begin with a mark of those, or are shorter than 80 bytes and do not end as a"
        " sentence; not such that are longer and do) are dropped; 1 = none",
        "[0, 1]",
    ),
    "knowledge.repeated_max": (
        0.5,
        "references are dropped of whose runs of three words a larger share occurs again in them;"
        " 1 = none",
        "[0, 1]",
    ),
    "knowledge.contamination": (
        0.8,
        "references whose overlap (Memory³ §6.1, of words) with a question of launch/prepare.py"
        " --questions is above this, or of the question with them, are dropped, if the words in"
        " common carry a larger share of the information, too; 1 = none",
        "(0, 1]",
    ),
    "knowledge.question_words": (
        8,
        "questions of fewer words are not compared, and references of fewer are not looked for in"
        " questions: too much text shares a few words",
        "[1, inf)",
    ),
    "knowledge.similarity": (
        0.8,
        "near-duplicates: a reference is dropped when its similarity with an earlier one, as of"
        " clean.similarity, is at least this; 0 = none is dropped. clean.shingle_words and"
        " clean.permutations say how it is estimated",
        "[0, 1]",
    ),
    # -- retrieval --------------------------------------------------------------------------------
    "retrieval.ids": (
        "search",
        "where a training chunk's references come from: searched in the pipeline, or stored with"
        " the documents",
        ("search", "stored"),
    ),
    "retrieval.shift": (
        0,
        "whose text is a chunk's query in training: 0 its own, 1 the previous chunk's (causal)",
        (0, 1),
    ),
    "retrieval.embedder": (
        "lexical",
        "embedder of queries and references: lexical (words, no model), bert (a pretrained encoder"
        " of the BERT family), model (hidden states of a checkpoint of our own) or attention (its"
        " queries search the keys that its memories keep)",
        ("lexical", "bert", "model", "attention"),
    ),
    "retrieval.dimension": (
        512,
        "width of the lexical embedding, and the most that model and attention have; with bert the"
        " index has the encoder's own width, and only launch/plan.py reads this field",
        "[8, inf)",
    ),
    "retrieval.encoder": (
        "",
        "folder of the encoder (config.json, model.safetensors, tokenizer.json); empty with others",
        None,
    ),
    "retrieval.checkpoint": (
        "",
        "with model and attention: stage folder, or checkpoints/STEP in it; empty is"
        " WORKDIR/warmup",
        None,
    ),
    "retrieval.layer": (
        0,
        "with model: the layer, counted from 1, whose output is taken; 0 = the last memory layer",
        "[0, inf)",
    ),
    "retrieval.rerank": (
        False,
        "with attention: whether candidates are put in order by the queries' scores with all keys"
        " that the bank keeps of them",
        None,
    ),
    "retrieval.pooling": (
        "auto",
        "how the encoder's tokens become one vector: their mean, the first one (cls), or what its"
        " folder says in 1_Pooling/config.json (auto)",
        ("auto", "mean", "cls"),
    ),
    "retrieval.encoder_batch": (
        16,
        "texts that one device encodes at a time; fewer above 512 tokens. A single query costs as"
        " much as a whole batch, so that its embedding never depends on company",
        "[1, inf)",
    ),
    "retrieval.encoder_dtype": (
        "float32",
        "dtype of the encoder's weights and products",
        ("float32", "bfloat16"),
    ),
    "retrieval.candidates": (16, "references fetched before the overlap filter", "[1, inf)"),
    "retrieval.overlap_train": (
        0.9,
        "references above this overlap with their row are dropped",
        "(0, 1]",
    ),
    "retrieval.overlap_evaluation": (2 / 3, "the same against an evaluation question", "(0, 1]"),
    "retrieval.exact_below": (1000, "references up to which search is exact", "[0, inf)"),
    "retrieval.index_parts": (
        1,
        "parts of the index, each a range of references, which hosts can open separately",
        "[1, 100000)",
    ),
    "retrieval.recall": (
        0.97,
        "share of the five best that an approximate index is tuned to find when it is built; less"
        " is faster",
        "(0, 1)",
    ),
    "retrieval.keep_embeddings": (
        True,
        "whether an approximate index keeps the float32 embeddings that exact scores need; without"
        " them it has 8 bits a number, and scores and order are ScaNN's",
        None,
    ),
    # -- data -------------------------------------------------------------------------------------
    "data.row_length": (2048, "tokens T of a row", "[1, inf)"),
    "data.batch_rows": (16, "rows B of a step, over all hosts", "[1, inf)"),
    "data.packing": (
        "concat",
        "what rows hold: documents one after the other and cut (concat); each in rows of its own,"
        " padded (document); several whole chats that do not see each other (chats, for SFT), or so"
        " several preference pairs (pairs, for DPO)",
        ("concat", "document", "chats", "pairs"),
    ),
    "data.threads": (4, "threads that load batches", "[1, 1024]"),
    "data.prefetch": (4, "batches loaded ahead", "[1, 1024]"),
    # -- chat -------------------------------------------------------------------------------------
    "chat.user": ("\nUser:", "marker in front of a user's turn; not empty", None),
    "chat.assistant": (
        "\nAssistant:",
        "marker in front of an answer; not empty, unlike the other markers",
        None,
    ),
    "chat.system": ("\nSystem:", "marker in front of a system turn", None),
    "chat.most_rounds": (
        8,
        "rounds (question and answer) that a chat may have (Memory³ §6.3)",
        "[1, inf)",
    ),
    "chat.bad_share": (
        0.01,
        "share of unusable chats or pairs up to which they are left out and reported; with more,"
        " preparing is refused",
        "[0, 1)",
    ),
    # -- preference -------------------------------------------------------------------------------
    "preference.beta": (
        0.01,
        "weight β of the log-probability ratios in DPO (Memory³ §6.4)",
        "(0, inf)",
    ),
    # -- optimizer --------------------------------------------------------------------------------
    "optimizer.name": (
        "adamw",
        "update rule; muon for matrices, adamw for the rest",
        ("adamw", "muon"),
    ),
    "optimizer.learning_rate": (1e-3, "peak learning rate", "(0, inf)"),
    "optimizer.muon_learning_rate": (0.01, "peak learning rate of Muon's matrices", "(0, inf)"),
    "optimizer.schedule": (
        "wsd",
        "linear rise, then constant and a fast fall (warmup-stable-decay), or cosine",
        ("wsd", "cosine"),
    ),
    "optimizer.rise_steps": (100, "steps of the linear rise", "[0, inf)"),
    "optimizer.rise_share": (
        0.0,
        "the linear rise as a share of all steps, with train.epochs; 0 = optimizer.rise_steps",
        "[0, 1]",
    ),
    "optimizer.fall_share": (0.1, "share of all steps in which wsd falls", "[0, 1]"),
    "optimizer.final_share": (0.0, "last learning rate as a share of the peak", "[0, 1]"),
    "optimizer.beta1": (0.9, "decay of the first moment", "[0, 1)"),
    "optimizer.beta2": (0.95, "decay of the second moment", "[0, 1)"),
    "optimizer.epsilon": (1e-8, "Adam's epsilon", "(0, 1)"),
    "optimizer.weight_decay": (
        0.1,
        "decoupled weight decay; norms and biases have none",
        "[0, inf)",
    ),
    "optimizer.clip_norm": (
        1.0,
        "global gradient norm above which gradients are scaled down",
        "(0, inf)",
    ),
    # -- train ------------------------------------------------------------------------------------
    "train.steps": (1000, "optimizer steps of the stage", "[1, inf)"),
    "train.epochs": (
        0.0,
        "passes over the rows, from which launch/train.py counts the steps; 0 = train.steps",
        "[0, inf)",
    ),
    "train.microbatches": (1, "parts a batch is split into, gradients added up", "[1, inf)"),
    "train.reduce_dtype": (
        "float32",
        "dtype in which devices add up gradients: bfloat16 halves their traffic, but sums of many"
        " devices lose their low bits (8 bits of mantissa; small gradients vanish beside large)",
        ("float32", "bfloat16"),
    ),
    "train.loss_block": (
        256,
        "tokens of a row whose logits exist at a time; the loss and its gradient are computed"
        " block by block",
        "[1, inf)",
    ),
    "train.z_loss": (
        0.0,
        "factor of the squared logarithm of the softmax normaliser that is added to the loss that"
        " is minimised (PaLM, arXiv 2204.02311, §5), so that logits do not drift; 1e-4 there. The"
        " reported loss is without it",
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
        "steps after which the run writes the memories of the bank anew with its own weights, as a"
        " version of the knowledge; 0 = never",
        "[0, inf)",
    ),
    "train.evaluate_every": (500, "steps between two evaluations; 0 = never", "[0, inf)"),
    # -- guard ------------------------------------------------------------------------------------
    "guard.on": (
        False,
        "whether training watches itself: where the loss is not a number any more, jumps or creeps"
        " up, the run goes back to a checkpoint before that, lowers the learning rate, leaves out"
        " the batches around it and goes on (docs/stability.md)",
        None,
    ),
    "guard.window": (
        128,
        "last steps whose median and median absolute deviation (MAD) say what is normal",
        "[16, 100000]",
    ),
    "guard.loss_deviations": (
        6.0,
        "a step is bad whose loss is this many deviations (1.4826 · MAD) above the median",
        "(0, inf)",
    ),
    "guard.norm_deviations": (
        8.0,
        "the same of the logarithm of the gradient norm, where the loss is above its median, too",
        "(0, inf)",
    ),
    "guard.least_deviation": (
        0.02,
        "what a deviation counts as at least; nats of loss, or of the norm's natural logarithm",
        "(0, inf)",
    ),
    "guard.patience": (
        3,
        "bad steps, among twice as many in a row, that make a spike; 1 = the first one does",
        "[1, 10000]",
    ),
    "guard.rise_deviations": (
        5.0,
        "slow divergence: the median loss of the last quarter of the window is this many deviations"
        " above its lowest value of the run",
        "(0, inf)",
    ),
    "guard.factor": (0.5, "factor on the learning rate, each time the run goes back", "(0, 1]"),
    "guard.skip_before": (
        2,
        "batches before the first bad step that are left out, too",
        "[0, inf)",
    ),
    "guard.skip_after": (8, "batches after the last bad step that are left out, too", "[0, inf)"),
    "guard.tries": (
        8,
        "how often a run goes back; when it goes wrong once more it ends with an error",
        "[0, 1000]",
    ),
    # -- evaluation -------------------------------------------------------------------------------
    "evaluation.batches": (8, "validation batches of an evaluation", "[1, inf)"),
    "evaluation.batch_rows": (
        16,
        "rows of an evaluation batch; `wrong` memories are those of another row",
        "[2, inf)",
    ),
    "evaluation.shift": (1, "retrieval_shift of reported losses", (0, 1)),
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


def default() -> ConfigDict:
    """A config with every field at its default, locked against unknown fields."""
    config = ConfigDict()
    for path, (value, _, _) in _FIELDS.items():
        node, *rest = path.split(".")
        if rest:
            if node not in config:
                config[node] = ConfigDict()
            config[node][rest[0]] = value
        else:
            config[node] = value
    return config.lock()


def describe() -> str:
    """All fields with default, accepted values and meaning, for `--help` and the docs."""
    lines = []
    for path, (value, meaning, accepted) in _FIELDS.items():
        allowed = (
            f"; one of {', '.join(map(repr, accepted))}" if isinstance(accepted, tuple) else ""
        )
        allowed = f"; in {accepted}" if isinstance(accepted, str) else allowed
        lines.append(f"{path} = {value!r}{allowed}\n    {meaning}")
    return "\n".join(lines)


def _flatten(config: ConfigDict) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{sub}": leaf for sub, leaf in value.items()})
        else:
            flat[key] = value
    return flat


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _check_field(path: str, value: Any) -> None:
    initial, meaning, accepted = _FIELDS[path]
    kind = type(initial)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right_type = is_number if kind is float else type(value) is kind
    if not right_type:
        raise ConfigError(
            f"config.{path} = {value!r} has type {type(value).__name__}; expected {kind.__name__}"
            f" ({meaning})"
        )
    if isinstance(accepted, tuple) and value not in accepted:
        raise ConfigError(f"config.{path} = {value!r}; accepted: {', '.join(map(repr, accepted))}")
    if isinstance(accepted, str) and not _inside(value, accepted):
        raise ConfigError(f"config.{path} = {value!r}; accepted: {accepted} ({meaning})")


def _require(condition: bool, field: str, value: Any, why: str) -> None:
    if not condition:
        raise ConfigError(f"config.{field} = {value!r}: {why}")


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config, or raises `ConfigError` naming the field, its value and the remedy."""
    flat = _flatten(config)
    for path in flat:
        if path not in _FIELDS:
            section = path.split(".")[0] if "." in path else ""
            known = [name for name in _FIELDS if name.startswith(section + ".")] or list(_FIELDS)
            raise ConfigError(f"config.{path} is not a field; known: {', '.join(known)}")
    for path in _FIELDS:
        if path not in flat:
            raise ConfigError(f"config.{path} is missing; start from m3jax.config.default()")
        _check_field(path, flat[path])

    for check in (_check_model, _check_references, _check_chats, _check_training):
        check(config)
    return config


def memory_heads(config: ConfigDict) -> tuple[tuple[int, int], ...] | None:
    """Layer and key-value head of all that have memories, ascending; None: all of memory layers.

    Raises:
      ConfigError: `memory.heads` names others, or is no list of heads.
    """
    first, count = config.memory.first_layer, config.memory.layers
    return parse_heads(config.memory.heads, range(first, first + count), config.model.kv_heads)


def stored_heads(config: ConfigDict) -> int:
    """How many key-value heads, over all layers, have memories."""
    chosen = memory_heads(config)
    return config.memory.layers * config.model.kv_heads if chosen is None else len(chosen)


def parse_heads(text: str, layers: range, kv_heads: int) -> tuple[tuple[int, int], ...] | None:
    """`memory_heads` of a text, of the heads in these layers; the inverse of `format_heads`."""
    found = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, colon, heads = part.partition(":")
        numbers = heads.split("+") if colon else [str(head) for head in range(kv_heads)]
        right = all(number.isdecimal() for number in (name, *numbers))
        pairs = {(int(name), int(head)) for head in numbers} if right else {(-1, 0)}
        _require(
            all(layer in layers and head < kv_heads for layer, head in pairs),
            "memory.heads",
            text,
            f"{part!r} is not LAYER:HEAD+HEAD or LAYER with memory layers {layers.start} …"
            f" {layers.stop - 1} and heads 0 … {kv_heads - 1}",
        )
        found |= pairs
    return None if len(found) in (0, len(layers) * kv_heads) else tuple(sorted(found))


def format_heads(pairs: Iterable[tuple[int, int]]) -> str:
    """Layers and key-value heads as `memory.heads` takes them."""
    ordered = sorted(set(pairs))
    layers = {layer: [str(h) for at, h in ordered if at == layer] for layer, _ in ordered}
    return ",".join(f"{layer}:{'+'.join(heads)}" for layer, heads in layers.items())


def _check_model(config: ConfigDict) -> None:
    """The shape of the model and of its memories."""
    model, memory = config.model, config.memory
    _require(
        model.query_heads % model.kv_heads == 0,
        "model.kv_heads",
        model.kv_heads,
        f"must divide model.query_heads = {model.query_heads}",
    )
    _require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "must be even (RoPE)")
    _require(
        model.previous_token_head == 0 or model.attention_bias,
        "model.previous_token_head",
        model.previous_token_head,
        "needs model.attention_bias = True",
    )
    _require(
        memory.first_layer + memory.layers <= model.layers,
        "memory.layers",
        memory.layers,
        f"memory layers {memory.first_layer}…{memory.first_layer + memory.layers - 1} do not exist;"
        f" model.layers = {model.layers}",
    )
    _require(
        memory_heads(config) is None or config.mesh.tensor == 1,
        "mesh.tensor",
        config.mesh.tensor,
        f"must be 1 with memory.heads = {memory.heads!r}: a bank of some heads is not split by"
        " heads; or store all (memory.heads = '')",
    )
    _require(
        memory.kept_tokens <= memory.reference_length,
        "memory.kept_tokens",
        memory.kept_tokens,
        f"a reference has at most memory.reference_length = {memory.reference_length} tokens",
    )
    _require(
        config.text.vocabulary <= model.vocabulary,
        "model.vocabulary",
        model.vocabulary,
        f"must be at least text.vocabulary = {config.text.vocabulary}",
    )


def _check_references(config: ConfigDict) -> None:
    """Writing and finding references."""
    model, memory = config.model, config.memory
    _require(
        config.writer.context == "reference" or memory.source not in IN_STEP,
        "writer.context",
        config.writer.context,
        "online memories are encoded without their document; use memory.source = 'precomputed', or"
        " writer.context = 'reference'",
    )
    _require(
        config.writer.context == "reference"
        or config.writer.context_tokens >= 2 * memory.reference_length,
        "writer.context_tokens",
        config.writer.context_tokens,
        f"holds less than two references of memory.reference_length = {memory.reference_length}"
        " tokens; raise it, or set writer.context = 'reference'",
    )
    _require(
        not (config.knowledge.enabled and config.retrieval.ids == "stored"),
        "knowledge.enabled",
        True,
        "documents name references (retrieval.ids = 'stored') that the selection may drop; set"
        " retrieval.ids = 'search'",
    )
    _require(
        config.retrieval.candidates >= max(memory.per_chunk, memory.per_prompt_chunk),
        "retrieval.candidates",
        config.retrieval.candidates,
        "must be at least memory.per_chunk and memory.per_prompt_chunk",
    )
    _require(
        (config.retrieval.embedder == "bert") == bool(config.retrieval.encoder),
        "retrieval.encoder",
        config.retrieval.encoder,
        "names the encoder's folder with retrieval.embedder = 'bert' and is empty with others;"
        f" it is {config.retrieval.embedder!r}",
    )
    _require(
        config.retrieval.embedder in ("model", "attention") or not config.retrieval.checkpoint,
        "retrieval.checkpoint",
        config.retrieval.checkpoint,
        "is read by retrieval.embedder = 'model' and 'attention' only; it is"
        f" {config.retrieval.embedder!r}",
    )
    _require(
        config.retrieval.embedder == "attention" or not config.retrieval.rerank,
        "retrieval.rerank",
        config.retrieval.rerank,
        f"needs retrieval.embedder = 'attention'; it is {config.retrieval.embedder!r}",
    )
    _require(
        config.retrieval.layer <= model.layers,
        "retrieval.layer",
        config.retrieval.layer,
        f"is above model.layers = {model.layers}",
    )


def _check_training(config: ConfigDict) -> None:
    """Rows, steps, devices."""
    memory, data, train = config.memory, config.data, config.train
    _require(
        data.row_length % memory.chunk_length == 0,
        "data.row_length",
        data.row_length,
        f"must be a multiple of memory.chunk_length = {memory.chunk_length}",
    )
    _require(
        data.batch_rows % train.microbatches == 0,
        "train.microbatches",
        train.microbatches,
        f"must divide data.batch_rows = {data.batch_rows}",
    )
    _require(
        config.retrieval.ids != "stored" or data.packing != "concat",
        "retrieval.ids",
        config.retrieval.ids,
        "ids stored with documents need data.packing = 'document', whose rows begin with one, or"
        " 'chats' or 'pairs'",
    )
    _require(
        config.optimizer.rise_steps <= train.steps,
        "optimizer.rise_steps",
        config.optimizer.rise_steps,
        f"is longer than train.steps = {train.steps}",
    )
    if train.refresh_every:
        _check_refresh(config)
    _require(
        2 * config.guard.patience <= config.guard.window,
        "guard.patience",
        config.guard.patience,
        f"twice as many steps must fit into guard.window = {config.guard.window}",
    )
    _require(config.mesh.fsdp != 0, "mesh.fsdp", config.mesh.fsdp, "must be -1 or at least 1")
    _require(
        config.stage != "" and "/" not in config.stage,
        "stage",
        config.stage,
        "names a folder of the workdir: not empty, no slash",
    )


def _check_chats(config: ConfigDict) -> None:
    chat, packing = config.chat, config.data.packing
    for role in ("user", "assistant"):
        others = [chat[name] for name in ("user", "assistant", "system") if name != role]
        _require(
            chat[role] != "" and chat[role] not in others,
            f"chat.{role}",
            chat[role],
            "the markers of users and assistants must be there and differ from the others",
        )
    if packing == "pairs":
        _require(
            config.memory.dropout == 0,
            "memory.dropout",
            config.memory.dropout,
            "must be 0 with data.packing = 'pairs': the model and its reference read the same",
        )
        _require(
            config.train.z_loss == 0,
            "train.z_loss",
            config.train.z_loss,
            "must be 0 with data.packing = 'pairs', whose loss is of whole answers",
        )
        _require(
            config.train.refresh_every == 0,
            "train.refresh_every",
            config.train.refresh_every,
            "must be 0 with data.packing = 'pairs': the model and its reference read the same",
        )
    _require(
        config.optimizer.rise_share == 0 or config.train.epochs > 0,
        "optimizer.rise_share",
        config.optimizer.rise_share,
        "is a share of steps that train.epochs gives; without it set optimizer.rise_steps",
    )


def with_epochs(config: ConfigDict, rows: int) -> ConfigDict:
    """The config with the steps, and the rise, of `train.epochs` passes over so many rows."""
    if not config.train.epochs:
        return config
    resolved = ConfigDict(config.to_dict())
    steps = max(1, round(config.train.epochs * rows / config.data.batch_rows))
    share = config.optimizer.rise_share
    rise = round(share * steps) if share else config.optimizer.rise_steps
    resolved.train.steps, resolved.optimizer.rise_steps = steps, min(rise, steps)
    return validate(resolved).lock()


def _check_refresh(config: ConfigDict) -> None:
    name, every, train = "train.refresh_every", config.train.refresh_every, config.train
    _require(
        config.memory.source == "precomputed",
        name,
        every,
        f"refreshes a bank; memory.source = {config.memory.source!r} reads none",
    )
    _require(
        not config.guard.on,
        name,
        every,
        "a guarded run may go back to before a refresh, to memories that are gone; set guard.on ="
        " False, or 0 here and run launch/write_bank.py --refresh=all between two calls",
    )
    for other in ("checkpoint_every", "keep_every"):  # the checkpoint that wrote must stay
        steps = train[other]
        _require(
            steps > 0 and every % steps == 0,
            name,
            every,
            f"must be a multiple of train.{other} = {steps}: a checkpoint that stays writes",
        )


def use_alignment_settings(config: ConfigDict) -> None:
    """Sets what Memory³ says of SFT and DPO (method §6.3 and §6.4), by `config.stage`, sft or dpo.

    Cosine with a linear rise over 10 %, weight decay 0.1, batches of 512 rows; SFT has a peak of
    5e-5 and 3 epochs, DPO one of 4e-6 and β = 0.01. Of DPO the paper gives no more; its batch,
    rise, decay and one epoch are ours.
    """
    sft = config.stage == "sft"
    config.data.packing = "chats" if sft else "pairs"
    config.data.batch_rows = 512
    config.preference.beta = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 5e-5 if sft else 4e-6
    config.optimizer.rise_share, config.optimizer.rise_steps = 0.1, 0
    config.optimizer.weight_decay = 0.1
    config.train.epochs = 3.0 if sft else 1.0
    config.train.microbatches = 1


# Values of memory.source with which references are encoded in the step.
IN_STEP = ("online", "stop_gradient")

# Values of data.packing with several texts in a row that do not see each other.
PACKED = ("chats", "pairs")

# The constant prefix `<s>Reference:` as tokens; m3jax.text.tokenizer reserves these entries.
PREFIX_TOKENS = (1, 2)


def uses_prefix(config: ConfigDict) -> bool:
    """Whether rows of this stage begin with the constant prefix."""
    return config.model.prefix == "always" or config.memory.source != "none"


def prefix_tokens(config: ConfigDict) -> tuple[int, ...]:
    """The prefix of this stage's rows; references always have `PREFIX_TOKENS`."""
    return PREFIX_TOKENS if uses_prefix(config) else ()


def to_json(config: ConfigDict) -> str:
    """The config as stable, readable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`. Unknown or missing fields raise `ConfigError`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"not a config: expected a JSON object, found {text[:40]!r}")
    return validate(ConfigDict(values)).lock()


def parse_options(text: str, **accepted: Any) -> dict[str, Any]:
    """Parses the part of `--config=file.py:TEXT` after the colon.

    Args:
      text: comma-separated words, `name=value` or a bare value of one of the options.
      **accepted: for each option its default first, then its other values: a tuple.

    Returns:
      The chosen value of every option, of the same type as its default.

    Raises:
      ConfigError: an unknown option or value; the message lists what is accepted.
    """
    chosen = {name: values[0] for name, values in accepted.items()}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = word.rpartition("=")
        matches = [
            (option, choice)
            for option, choices in accepted.items()
            for choice in choices
            if str(choice) == value and name in ("", option)
        ]
        if len(matches) != 1:
            listed = "; ".join(f"{o}={'|'.join(map(str, c))}" for o, c in accepted.items())
            raise ConfigError(f"config option {word!r} is unknown or ambiguous; accepted: {listed}")
        chosen[matches[0][0]] = matches[0][1]
    return chosen
