"""Configuration fields, each declared once: default, meaning with unit, accepted values.

Those of training are in `training_fields.py`.

Paths are never part of a config: they are flags of the launch scripts. The exceptions are
`retrieval.encoder` and `retrieval.checkpoint`, which, like `retrieval.embedder`, choose how
references are found.
"""

from __future__ import annotations

from m3jax.config.training_fields import DTYPES, EVALUATION, GUARD, MESH, OPTIMIZER, TRAIN, Fields

RUN: Fields = {
    "name": ("m3jax", "name of the run, used in logs and plots", None),
    "stage": ("warmup", "training stage; also the name of its folder in the workdir", None),
    "seed": (
        0,
        "seed of parameters, data order, memory dropout and distractors",
        "[0, 18446744073709551616)",
    ),
}
MODEL: Fields = {
    "layers": (4, "transformer blocks L", "[1, inf)"),
    "query_heads": (4, "query heads N", "[1, inf)"),
    "kv_heads": (4, "key-value heads K; divides query_heads (GQA)", "[1, inf)"),
    "head_dim": (32, "width H of one head; even (RoPE)", "[2, inf)"),
    "hidden": (128, "hidden width D", "[1, inf)"),
    "mlp_width": (256, "width F of the gated MLP", "[1, inf)"),
    "vocabulary": (1024, "rows V of embedding and LM head, at least the tokenizer's", "[5, inf)"),
    "rope_base": (10000.0, "base of the RoPE frequencies", "[1, inf)"),
    "rope_scaling": (
        "none",
        "RoPE of models whose context was made longer: all frequencies are divided by rope_factor"
        " (linear), or the low ones, with a transition over rotations (llama3: Llama 3.1) or pairs"
        " of a head (yarn: arXiv 2309.00071)",
        ("none", "linear", "llama3", "yarn"),
    ),
    "rope_factor": (1.0, "divisor of scaled RoPE frequencies", "[1, inf)"),
    "rope_original_length": (8192, "context before RoPE was scaled, tokens", "[1, inf)"),
    "rope_low_rotations": (
        1.0,
        "rotations in the original context up to which a RoPE frequency is divided (llama3, yarn)",
        "(0, inf)",
    ),
    "rope_high_rotations": (
        4.0,
        "rotations in the original context from which it is kept; above rope_low_rotations",
        "(0, inf)",
    ),
    "rope_magnitude": (1.0, "factor on rotated queries and keys (yarn)", "(0, 100]"),
    "no_rope_every": (
        0,
        "every n-th layer (n-1, 2n-1, … from 0) has no RoPE (SmolLM3: 4); 0 = all layers have it",
        "[0, inf)",
    ),
    "norm_epsilon": (1e-5, "epsilon of RMSNorm", "(0, 1)"),
    "tied_embeddings": (False, "LM head shares the embedding matrix", None),
    "embedding_scale": (1.0, "factor on embedding outputs", "(0, 1000000]"),
    "attention_bias": (False, "biases on query, key and value (as Qwen2 has)", None),
    "qk_norm": (
        False,
        "RMSNorm with a scale over head_dim on queries and keys, before RoPE (arXiv 2010.04245; as"
        " Qwen3 has): attention scores stay bounded. Memories keep normed keys",
        None,
    ),
    "previous_token_head": (
        0.0,
        "size of the query/key biases that start one key-value head of the first layer as a"
        " previous-token head, a shortcut for tiny models (needs attention_bias); 0 = none",
        "[0, 1000]",
    ),
    "init_exponent": (
        -0.5,
        "weights start with standard deviation fan_in ** init_exponent; Memory³ §7 advises < -0.5",
        "[-2, 0]",
    ),
    "param_dtype": ("float32", "dtype of parameters", DTYPES),
    "compute_dtype": ("float32", "dtype of activations", DTYPES),
    "attention": (
        "blocked",
        "attention implementation: naive holds all scores; blocked runs anywhere; splash is the"
        " TPU kernel, splash_interpret the same in plain operations (tests); cudnn the kernel for"
        " NVIDIA GPUs, xla the same call without it; auto = splash on TPU, cudnn on GPU in"
        " bfloat16, else blocked",
        ("naive", "blocked", "splash", "splash_interpret", "cudnn", "xla", "auto"),
    ),
    "attention_block": (256, "queries per block of blocked and splash attention", "[1, inf)"),
    "attention_kv_block": (256, "keys per block of the splash attention, tokens", "[1, inf)"),
    "remat": (
        "none",
        "what the backward pass recomputes: nothing (none), all but matrix products (dots), all"
        " but the attention kernel's output (attention), everything (full)",
        ("none", "dots", "attention", "full"),
    ),
    "prefix": (
        "with_memory",
        "rows that begin with the constant prefix `<s>Reference:`: those of stages with memory"
        " (the paper), or of all stages, so that the writer has seen the marker in warmup",
        ("with_memory", "always"),
    ),
}
MEMORY: Fields = {
    "source": (
        "none",
        "source of a batch's memories: none (warmup), precomputed (the bank), online (encoded in"
        " the step, with gradient), stop_gradient (encoded in the step, without)",
        ("none", "precomputed", "online", "stop_gradient"),
    ),
    "first_layer": (0, "first memory layer", "[0, inf)"),
    "layers": (2, "memory layers, counted from first_layer", "[1, inf)"),
    "heads": (
        "",
        "heads with memories of kept_tokens each: LAYER:HEAD+HEAD or LAYER for all heads of a"
        " layer, separated by commas, from 0 (0:1+3,2). The bank stores these; other heads see no"
        " memories (Memory³ §7). Empty = all heads of the memory layers",
        None,
    ),
    "reference_length": (128, "most tokens W of a reference, without the prefix", "[1, inf)"),
    "kept_tokens": (
        8,
        "tokens kept by each key-value head that has memories, if counts is empty",
        "[1, inf)",
    ),
    "counts": (
        "",
        "tokens kept by each key-value head: LAYER:COUNT+COUNT+… for the layers with memories,"
        " separated by commas (4:0+12,5:3+3). launch/select_memory.py counts deals them to the"
        " heads that read facts. Empty = kept_tokens for each of `heads`",
        None,
    ),
    "each": (
        0,
        "of these, tokens that each head keeps by the rule `received`, with selection ="
        " 'reconstruction'; the others by reconstruction",
        "[0, inf)",
    ),
    "chunk_length": (64, "tokens Q of a chunk; divides data.sequence_length", "[1, inf)"),
    "per_chunk": (1, "memories M that a training chunk retrieves", "[1, inf)"),
    "distractors": (
        0,
        "of these, wrong ones, among which a model learns to find the right one: the next best"
        " found, and others; below per_chunk",
        "[0, inf)",
    ),
    "hard_distractors": (0.5, "share of distractors that are the next best found", "[0, 1]"),
    "window": (
        5,
        "chunks whose memories a training query reads: its own and the window − 1 before it",
        "[1, inf)",
    ),
    "per_prompt_chunk": (5, "memories that a prompt chunk retrieves at inference", "[1, inf)"),
    "selection": (
        "exact",
        "token weight of the writer: sum of softmax attention (exact) or of exp scores"
        " (approximate) inside the reference (Memory³ §3.3), attention from behind it times the"
        " size of the value (received), largest attention of a second copy (reconstruction)",
        ("exact", "approximate", "received", "reconstruction"),
    ),
    "key_scale": (
        1.0,
        "factor of the stored keys of heads that keep more than 2 · each tokens: above 1 a query"
        " reads the tokens that fit it best more sharply",
        "(0, 100]",
    ),
    "spacing": (
        0,
        "RoPE positions by which each memory of a chunk stands before the next better one. 0 = all"
        " stand at the same (Memory³ §3.4); reference_length = one behind the other, best last",
        "[0, inf)",
    ),
    "dropout": (
        0.0,
        "share of training chunks whose memories are hidden, so that copying from the context"
        " is not forgotten",
        "[0, 1)",
    ),
    "dtype": ("bfloat16", "dtype of memories in the bank", DTYPES),
    "cache_bytes": (
        0,
        "RAM of each process for the memories that it read last, bytes; 0 = none. For banks on"
        " servers, in buckets and on slow drives; the operating system caches local files",
        "[0, inf)",
    ),
}
WRITER: Fields = {
    "batch_references": (256, "references encoded by one call of the writer", "[1, inf)"),
    "shard_memories": (256, "memories per shard file of the bank", "[1, inf)"),
    "document_context": (
        False,
        "references attend to what stands before them in their document while their memory is"
        " written (Memory³ §10), not to themselves alone (§3.3); not for online memories",
        None,
    ),
    "document_context_tokens": (
        1024,
        "tokens of a document that are encoded together, in whole references; further parts of"
        " a longer document are encoded behind its first reference",
        "[1, inf)",
    ),
    "compression": (
        "none",
        "storage of keys and values: as memory.dtype (none), int8 with a scale a vector, or the"
        " vector quantizer (Memory³ §3.3)",
        ("none", "int8", "vector"),
    ),
    "coarse_bits": (14, "bits of the quantizer's index of half a vector", "[1, 16]"),
    "fine_bits": (10, "bits of its index of an eighth of the residual", "[1, 16]"),
    "codebook_vectors": (
        640_000,
        "keys, and as many values, that the quantizer is trained on, if there are as many",
        "[1, inf)",
    ),
}
TEXT: Fields = {
    "vocabulary": (1024, "most entries of the tokenizer, special tokens included", "[260, inf)"),
    "min_frequency": (2, "least count of a pair that the tokenizer merges", "[1, inf)"),
    "tokenizer_bytes": (200_000_000, "bytes of text the tokenizer is trained on", "[1, inf)"),
    "validation_share": (0.01, "share of documents, by hash, held out for validation", "[0, 1)"),
    "shards": (4, "ArrayRecord shards of the token corpus", "[1, 100000)"),
    "shuffle": (
        0,
        "seed of the order of documents, which depends on ids and texts alone; 0 = as they are"
        " read",
        "[0, 1000000000]",
    ),
}
# Rules of Memory³ §7; a word is a run of characters without white space, or one Chinese or Japanese
# character.
CLEAN: Fields = {
    "enabled": (False, "repair, filter and deduplicate documents; needs the extra `clean`", None),
    "unreadable_share": (
        0.01,
        "share of unreadable lines, rows and files (not JSON, not UTF-8, without text) that are"
        " counted and left out; more are refused",
        "[0, 1]",
    ),
    "repair": (True, "repair damaged Unicode (ftfy)", None),
    "characters_max": (10_000_000, "longest document that is read, characters", "[1, inf)"),
    "words_min": (50, "fewest words of a document; 0 = any", "[0, inf)"),
    "word_length_max": (10.0, "largest mean word length of a document, characters", "(0, inf)"),
    "nonalphabetic_max": (
        0.7,
        "largest share of characters that are no letters, without white space; 1 = any",
        "[0, 1]",
    ),
    "unique_max": (0.9, "largest share of distinct words among all words; 1 = any", "(0, 1]"),
    "entropy_min": (3.0, "least unigram entropy of a document's words, nats; 0 = any", "[0, inf)"),
    "quality_min": (0.0, "least learned quality score, 0 … 5; 0 = no score is computed", "[0, 5]"),
    "similarity": (
        0.8,
        "a document is dropped from this Jaccard similarity (MinHash) to an earlier one on; 0 ="
        " none",
        "[0, 1]",
    ),
    "shingle_words": (5, "neighbouring words that are compared as one item", "[1, 64]"),
    "permutations": (128, "MinHash values of a document", "[16, 4096]"),
}
# Filters of the knowledge base's references; words are counted as in `clean`.
KNOWLEDGE: Fields = {
    "enabled": (False, "filter references before embedding; may need the extra `clean`", None),
    "words_min": (8, "fewest words of a reference; 0 = any", "[0, inf)"),
    "nonalphabetic_max": (
        0.5,
        "largest share of characters that are no letters, without white space; 1 = any",
        "[0, 1]",
    ),
    "listed_max": (
        0.7,
        "largest share of a reference's characters in lines of lists, tables and markup: lines"
        " that begin with such a mark, or have less than 80 bytes and no end of a sentence; 1 ="
        " any",
        "[0, 1]",
    ),
    "repeated_max": (0.5, "largest share of repeated trigrams of words; 1 = any", "[0, 1]"),
    "contamination": (
        0.8,
        "largest overlap (Memory³ §6.1, in words, either way) of a reference with a question of"
        " `prepare.py --questions`, if the common words carry a larger share of the information,"
        " too; 1 = any",
        "(0, 1]",
    ),
    "question_words": (
        8,
        "fewest words of a question that is compared, and of a reference that is looked for in"
        " questions: much text shares a few words",
        "[1, inf)",
    ),
    "similarity": (
        0.8,
        "near-duplicates: a reference is dropped from this similarity (as clean.similarity) with"
        " an earlier one on; 0 = none is. Estimated by clean.shingle_words and clean.permutations",
        "[0, 1]",
    ),
}
RETRIEVAL: Fields = {
    "ids": (
        "search",
        "a training chunk's references: searched in the pipeline, or stored with the documents",
        ("search", "stored"),
    ),
    "shift": (0, "training query of a chunk: 0 its own text, 1 the one before (causal)", (0, 1)),
    "embedder": (
        "lexical",
        "embedder of queries and references: lexical (words, no model) or bert (a pretrained"
        " encoder of the BERT family)",
        ("lexical", "bert"),
    ),
    "dimension": (
        512,
        "width of the lexical embedding; bert has the encoder's own, and only launch/plan.py reads"
        " this field",
        "[8, inf)",
    ),
    "encoder": ("", "with bert: folder of config.json, model.safetensors and tokenizer.json", None),
    "checkpoint": (
        "",
        "with rerank: stage folder, or checkpoints/STEP, of the bank's writer; empty ="
        " WORKDIR/warmup",
        None,
    ),
    "rerank": (
        0.0,
        "weight of the cosine of the writer's attention queries with keys in the bank, added to a"
        " candidate's score in the index; 0 = scores of the index alone",
        "[0, inf)",
    ),
    "pooling": (
        "auto",
        "pooling of the encoder's tokens: mean, the first one (cls), or as its folder says (auto)",
        ("auto", "mean", "cls"),
    ),
    "encoder_batch": (
        16,
        "texts that a device encodes at a time; fewer above 512 tokens. A single query costs as"
        " much as a batch, so that its embedding never depends on company",
        "[1, inf)",
    ),
    "encoder_dtype": ("float32", "dtype of the encoder's weights and products", DTYPES),
    "candidates": (16, "references fetched before the overlap filter", "[1, inf)"),
    "overlap_train": (0.9, "largest overlap of a reference with its training row", "(0, 1]"),
    "overlap_evaluation": (2 / 3, "largest overlap of a reference with a question", "(0, 1]"),
    "exact_below": (1000, "references up to which search is exact", "[0, inf)"),
    "index_parts": (1, "parts of the index, which hosts can open separately", "[1, 100000)"),
    "recall": (0.97, "recall@5 that an approximate index is tuned to; less is faster", "(0, 1)"),
    "keep_embeddings": (
        True,
        "keep the float32 embeddings for exact scores in an approximate index; without them it"
        " has 8 bits a number, and scores and order are ScaNN's",
        None,
    ),
}
DATA: Fields = {
    "sequence_length": (2048, "tokens T of a row", "[1, inf)"),
    "batch_size": (16, "rows B of a step, over all hosts", "[1, inf)"),
    "packing": (
        "concat",
        "content of rows: documents end to end, cut (concat); each in rows of its own, padded"
        " (document); whole chats (chats, for SFT) or preference pairs (pairs, for DPO) that do"
        " not see each other",
        ("concat", "document", "chats", "pairs"),
    ),
    "shares": (
        1,
        "shares into which the shards of the train text are dealt (concat, document); rows of a"
        " batch come from share after share, each shuffled by itself, so that a host needs only"
        " the shares of its rows; 1 = all rows are shuffled",
        "[1, 100000)",
    ),
    "threads": (4, "threads that load batches", "[1, 1024]"),
    "prefetch": (4, "batches loaded ahead", "[1, 1024]"),
}
CHAT: Fields = {
    "user": ("\nUser:", "marker in front of a user's turn; not empty", None),
    "assistant": ("\nAssistant:", "marker in front of an answer; not empty, unlike others", None),
    "system": ("\nSystem:", "marker in front of a system turn", None),
    "most_rounds": (8, "most rounds (question and answer) of a chat (Memory³ §6.3)", "[1, inf)"),
    "bad_share": (0.01, "share of unusable chats or pairs to leave out; more is refused", "[0, 1)"),
}
PREFERENCE: Fields = {
    "beta": (0.01, "weight β of the log-probability ratios in DPO (Memory³ §6.4)", "(0, 1000]"),
}
# Heading and fields of every section; "" holds the fields outside all sections.
SECTIONS = {
    "": ("Run", RUN),
    "model": ("model: shape and attention", MODEL),
    "memory": ("memory: explicit memories and how they are read", MEMORY),
    "writer": ("writer: memories in the bank", WRITER),
    "text": ("text: tokenizer and corpus", TEXT),
    "clean": ("clean: repair and filters of documents", CLEAN),
    "knowledge": ("knowledge: filters of references", KNOWLEDGE),
    "retrieval": ("retrieval: embedder, index, overlap", RETRIEVAL),
    "data": ("data: rows and their loading", DATA),
    "chat": ("chat: template and limits of chats", CHAT),
    "preference": ("preference: DPO", PREFERENCE),
    "optimizer": ("optimizer: update rule and learning rate", OPTIMIZER),
    "train": ("train: steps, checkpoints, evaluation", TRAIN),
    "guard": ("guard: the stability guard", GUARD),
    "evaluation": ("evaluation: validation losses", EVALUATION),
    "mesh": ("mesh: devices", MESH),
}
FIELDS: Fields = {
    f"{section}.{name}".lstrip("."): field
    for section, (_, fields) in SECTIONS.items()
    for name, field in fields.items()
}
