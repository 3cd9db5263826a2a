"""All configuration fields, each declared once: default, meaning with unit, accepted values.

Paths are never part of a config: they are flags of the launch scripts. The exceptions are
`retrieval.encoder` and `retrieval.checkpoint`, which choose what to compute as
`retrieval.embedder` does.
"""

from __future__ import annotations

from typing import Any

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
    "model.attention_kv_block": (256, "keys per block of the splash attention, tokens", "[1, inf)"),
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
    "memory.chunk_length": (64, "tokens Q of a chunk; divides data.sequence_length", "[1, inf)"),
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
    "writer.document_context": (
        False,
        "whether a reference attends to what stands before it in its document while its memory is"
        " written (Memory³ §10), or to itself alone (§3.3); not for online memories",
        None,
    ),
    "writer.document_context_tokens": (
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
    "data.sequence_length": (2048, "tokens T of a row", "[1, inf)"),
    "data.batch_size": (16, "rows B of a step, over all hosts", "[1, inf)"),
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
    "optimizer.lr_warmup_steps": (100, "steps of the linear rise", "[0, inf)"),
    "optimizer.lr_warmup_share": (
        0.0,
        "the linear rise as a share of all steps, with train.epochs; 0 = optimizer.lr_warmup_steps",
        "[0, 1]",
    ),
    "optimizer.lr_decay_share": (0.1, "share of all steps in which wsd falls", "[0, 1]"),
    "optimizer.min_lr_ratio": (0.0, "last learning rate as a share of the peak", "[0, 1]"),
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
    "evaluation.batch_size": (
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
