"""Configuration fields of what is prepared before training: text, references, index, chats.

As in `m3jax.config.fields`, of which these are a part.
"""

from __future__ import annotations

from typing import Any

PREPARATION: dict[str, tuple[Any, str, Any]] = {
    # -- text -------------------------------------------------------------------------------------
    "text.vocabulary": (
        1024,
        "most entries of the trained tokenizer, special tokens included",
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
        "seed of the order of documents, which depends on ids and texts alone; 0 = as they"
        " are read",
        "[0, 1000000000]",
    ),
    # -- clean: rules of Memory³ §7; a word is a run of signs without white space, or one sign of
    #    Chinese or Japanese ----------------------------------------------------------------------
    "clean.enabled": (
        False,
        "repair, filter and deduplicate documents before anything is made of them; needs the"
        " extra `clean`",
        None,
    ),
    "clean.unreadable_share": (
        0.01,
        "share of unreadable lines, rows and files (not JSON, not UTF-8, without text) that"
        " are counted and left out; more are refused",
        "[0, 1]",
    ),
    "clean.repair": (True, "repair damaged Unicode (ftfy)", None),
    "clean.characters_max": (
        10_000_000,
        "most characters of a document; longer ones are dropped unread",
        "[1, inf)",
    ),
    "clean.words_min": (50, "fewest words of a document; 0 = any", "[0, inf)"),
    "clean.word_length_max": (
        10.0,
        "largest mean word length of a document, characters",
        "(0, inf)",
    ),
    "clean.nonalphabetic_max": (
        0.7,
        "largest share of characters that are no letters, without white space; 1 = any",
        "[0, 1]",
    ),
    "clean.unique_max": (0.9, "largest share of distinct words among all words; 1 = any", "(0, 1]"),
    "clean.entropy_min": (
        3.0,
        "least unigram entropy of a document's words, nats; 0 = any",
        "[0, inf)",
    ),
    "clean.quality_min": (
        0.0,
        "least learned quality score, 0 … 5; 0 = no score is computed",
        "[0, 5]",
    ),
    "clean.similarity": (
        0.8,
        "near-duplicates: a document is dropped from this Jaccard similarity (MinHash) with"
        " an earlier one on; 0 = none is",
        "[0, 1]",
    ),
    "clean.shingle_words": (5, "neighbouring words that are compared as one item", "[1, 64]"),
    "clean.permutations": (128, "MinHash values of a document", "[16, 4096]"),
    # -- knowledge: which references of the knowledge base are kept; words as of `clean` -----------
    "knowledge.enabled": (
        False,
        "filter references by the rules below after cutting and before embedding; needs the"
        " extra `clean` where near-duplicates are dropped",
        None,
    ),
    "knowledge.words_min": (8, "fewest words of a reference; 0 = any", "[0, inf)"),
    "knowledge.nonalphabetic_max": (
        0.5,
        "largest share of characters that are no letters, without white space; 1 = any",
        "[0, 1]",
    ),
    "knowledge.listed_max": (
        0.7,
        "largest share of a reference's characters in lines of lists, tables and markup:"
        " lines that begin with such a mark, or have less than 80 bytes and no end of a"
        " sentence; 1 = any",
        "[0, 1]",
    ),
    "knowledge.repeated_max": (
        0.5,
        "largest share of word trigrams that are repeated within a reference; 1 = any",
        "[0, 1]",
    ),
    "knowledge.contamination": (
        0.8,
        "largest overlap (Memory³ §6.1, in words, either way) of a reference with a question"
        " of `prepare.py --questions`, if the common words carry a larger share of the"
        " information, too; 1 = any",
        "(0, 1]",
    ),
    "knowledge.question_words": (
        8,
        "fewest words of a question that is compared, and of a reference that is looked for"
        " in questions: much text shares a few words",
        "[1, inf)",
    ),
    "knowledge.similarity": (
        0.8,
        "near-duplicates: a reference is dropped from this similarity (as clean.similarity)"
        " with an earlier one on; 0 = none is. Estimated by clean.shingle_words and"
        " clean.permutations",
        "[0, 1]",
    ),
    # -- retrieval --------------------------------------------------------------------------------
    "retrieval.ids": (
        "search",
        "a training chunk's references: searched in the pipeline, or stored with the documents",
        ("search", "stored"),
    ),
    "retrieval.shift": (
        0,
        "text that is a chunk's query in training: 0 its own, 1 the previous chunk's (causal)",
        (0, 1),
    ),
    "retrieval.embedder": (
        "lexical",
        "embedder of queries and references: lexical (words, no model), bert (a pretrained"
        " encoder of the BERT family), model (hidden states of a checkpoint) or attention (its"
        " queries search the keys that its memories keep)",
        ("lexical", "bert", "model", "attention"),
    ),
    "retrieval.dimension": (
        512,
        "width of the lexical embedding, and the largest of model and attention; bert has the"
        " encoder's own width, and only launch/plan.py reads this field",
        "[8, inf)",
    ),
    "retrieval.encoder": (
        "",
        "folder of the encoder (config.json, model.safetensors, tokenizer.json), with bert",
        None,
    ),
    "retrieval.checkpoint": (
        "",
        "with model and attention: stage folder or checkpoints/STEP; empty = WORKDIR/warmup",
        None,
    ),
    "retrieval.layer": (
        0,
        "with model: layer, counted from 1, whose output is pooled; 0 = the last memory layer",
        "[0, inf)",
    ),
    "retrieval.rerank": (
        False,
        "with attention: order candidates by the scores of queries with all keys that the"
        " bank keeps",
        None,
    ),
    "retrieval.pooling": (
        "auto",
        "pooling of the encoder's tokens: mean, the first token (cls), or as"
        " 1_Pooling/config.json of its folder says (auto)",
        ("auto", "mean", "cls"),
    ),
    "retrieval.encoder_batch": (
        16,
        "texts that a device encodes at a time; fewer above 512 tokens. A single query costs"
        " as much as a batch, so that its embedding never depends on company",
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
        "largest overlap of a reference with its training row",
        "(0, 1]",
    ),
    "retrieval.overlap_evaluation": (
        2 / 3,
        "largest overlap of a reference with an evaluation question",
        "(0, 1]",
    ),
    "retrieval.exact_below": (1000, "references up to which search is exact", "[0, inf)"),
    "retrieval.index_parts": (
        1,
        "parts of the index, each a range of references, which hosts can open separately",
        "[1, 100000)",
    ),
    "retrieval.recall": (
        0.97,
        "recall@5 that an approximate index is tuned to when it is built; less is faster",
        "(0, 1)",
    ),
    "retrieval.keep_embeddings": (
        True,
        "keep the float32 embeddings for exact scores in an approximate index; without them"
        " it has 8 bits a number, and scores and order are ScaNN's",
        None,
    ),
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
        "most rounds (question and answer) of a chat (Memory³ §6.3)",
        "[1, inf)",
    ),
    "chat.bad_share": (
        0.01,
        "share of unusable chats or pairs that are left out and reported; more are refused",
        "[0, 1)",
    ),
}
