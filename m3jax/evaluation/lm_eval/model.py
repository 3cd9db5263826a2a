"""Adapts a checkpoint to lm-evaluation-harness (the extra `eval`).

    from m3jax.evaluation.lm_eval.model import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(session, "memory"), tasks=["arc_easy"])

| mode | the model reads |
|---|---|
| `none` | the context |
| `memory`, or `explicit` | the context, and memories that the context's chunks retrieve |
| `compressed` | the same, from a bank of compressed memories |
| `rag` | references as text in front of the context, retrieved with the whole context |
| `wrong` | the context, and memories drawn at random, none of which the question retrieves |

The continuation to score is never part of the query, and references that overlap too much with the
context are dropped (Memory³ §6.1). Contexts that are too long lose their beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.errors import InferenceError
from m3jax.evaluation.batches import continue_prompts
from m3jax.evaluation.other_references import draw_others
from m3jax.evaluation.scoring import Pair, Scorer, fit
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.rag import rag_prompts
from m3jax.inference.session import Session
from m3jax.memory.bank import Bank
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import BOS, END

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise InferenceError(
        f"lm-evaluation-harness cannot be imported ({error}); pip install 'm3jax[eval]'"
    ) from error

MODES = ("none", "memory", "compressed", "rag", "wrong")
NEW_TOKENS = 256  # tokens to generate if a task sets no limit


class HarnessModel(TemplateLM):
    """Answers the requests of lm-evaluation-harness in one mode.

    Attributes:
      retriever: retriever of references, with counters of its own; None in the mode `none`.
      counts: numbers of `requests`, and of requests whose context was `truncated`.
    """

    def __init__(
        self,
        session: Session,
        mode: str = "memory",
        *,
        overlap: float | None = None,
        references: int = 5,
        batch_size: int = 16,
        bank: str | Path | None = None,
    ) -> None:
        """Opens the bank and the retriever that the mode needs.

        Args:
          session: checkpoint and knowledge.
          mode: one of `MODES`, or `explicit` for `memory`.
          overlap: references whose overlap with the context is above this are dropped; 1 drops
            none; default `retrieval.overlap_evaluation`.
          references: number of references in front of the context in the mode `rag`.
          batch_size: rows that the device works on at once.
          bank: folder of compressed memories, required by the mode `compressed`.

        Raises:
          InferenceError: an unknown mode, `compressed` without `bank`, or a mode that reads
            memories with a session of the warmup stage.
          BankError, RetrievalError, TextError, VersionError: a part is missing or does not fit.
        """
        super().__init__()
        mode = "memory" if mode == "explicit" else mode
        if mode not in MODES:
            raise InferenceError(f"mode {mode!r}; known: {', '.join(MODES)}, explicit")
        if mode == "compressed" and bank is None:
            raise InferenceError(
                "mode 'compressed' needs the folder of a bank of compressed memories; write one"
                " with launch/write_bank.py --config.writer.compression=vector --bank=FOLDER"
            )
        self.session, self.mode, self.references = session, mode, references
        limit = session.config.retrieval.overlap_evaluation if overlap is None else overlap
        self.overlap = float(limit)
        self.bank: Bank | None = None
        if mode in ("memory", "compressed", "wrong"):
            session.require_memories(mode)
            self.bank = session.open_bank(bank) if mode == "compressed" else session.bank
        self.retriever: Retriever | None = None
        if mode != "none":
            self.retriever = session.retriever.with_limit(self.overlap)
        self.longest = session.config.data.sequence_length
        self.scorer = Scorer(
            session.model, session.params, session.tokenizer, self.longest, batch_size
        )
        self.counts = {"requests": 0, "truncated": 0}

    @functools.cached_property
    def _generator(self) -> Generator:
        session, memory_retriever = self.session, None
        if self.bank is not None:
            count = session.config.memory.per_prompt_chunk
            memory_retriever = MemoryRetriever(self.retriever, self.bank, session.tokenizer, count)
        return Generator(
            session.model,
            session.params,
            session.tokenizer,
            memory_retriever,
            longest=self.longest,
        )

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return END

    @property
    def prefix_token_id(self) -> int:
        """Token that begins a text."""
        return BOS

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text without special tokens; BOS is added when the text is scored."""
        return self.session.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability, and whether it is the greedy output."""
        contexts = self._shown([request.args[0] for request in requests])
        encoded = []
        for request, context in zip(requests, contexts, strict=True):
            continuation = request.args[1]
            if context:
                tokens = self._encode_pair(context, continuation)
            else:
                tokens = ([BOS], self.tok_encode(continuation))
            encoded.append((request.args, *tokens))
        questions = [_question(request) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm, questions)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        questions: Sequence[Hashable] | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores tokenized continuations.

        Args:
          requests: (texts, context tokens, continuation tokens) of each request.
          disable_tqdm: show no progress bar.
          questions: for each request the key of its question; default: each context is a question.
        """
        pairs = [self._pair(context, continuation) for _, context, continuation in requests]
        ids = self._retrieve([pair.context for pair in pairs], questions)
        scores = self.scorer.score(pairs, ids, self.bank, progress="" if disable_tqdm else "score")
        return list(zip(scores.logprob.tolist(), scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of whole texts; a chunk retrieves with the chunk before it.

        References are compared with the whole window, also with what is still to come, and dropped
        if they overlap too much with it.

        Raises:
          InferenceError: the mode `rag`, since there is no question to retrieve with.
        """
        if self.mode == "rag":
            raise InferenceError(
                "mode 'rag' has no question to search with in loglikelihood_rolling; take another"
            )
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for inputs, scored in get_rolling_token_windows(tokens, BOS, self.longest, 1):
                context = inputs[: len(inputs) - len(scored) + 1]
                pairs.append(Pair(np.array(context, np.int32), np.array(scored, np.int32)))
                owners.append(number)
        self.counts["requests"] += len(requests)
        rows = [np.concatenate([pair.context, pair.continuation[:-1]]) for pair in pairs]
        ids = self._retrieve(rows, owners, shift=1)
        scores = self.scorer.score(pairs, ids, self.bank, progress="" if disable_tqdm else "score")
        return np.bincount(np.array(owners, int), scores.logprob, len(requests)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context greedily, up to the first of the request's stop strings.

        Raises:
          InferenceError: a request requires sampling.
        """
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(self._new_tokens(request.args[1]), []).append(number)
        shown = self._shown([request.args[0] for request in requests])
        for new, numbers in by_length.items():
            prompts = self._fitting([shown[i] for i in numbers], self.longest - 1 - new)
            questions = [_question(requests[i]) for i in numbers]
            bar = "" if disable_tqdm else "answer"
            texts = self._generate(prompts, new, questions, bar)
            for number, text in zip(numbers, texts, strict=True):
                stops = requests[number].args[1].get("until")
                answers[number] = postprocess_generated_text(text, stops, None)
        return answers

    def _new_tokens(self, settings: dict[str, Any]) -> int:
        """Returns the limit of new tokens of a request, at most half of the model's context."""
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise InferenceError("a task asks for sampling; only greedy generation is scored")
        named = settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS
        return min(int(named), self.longest // 2)

    def _generate(
        self, prompts: list[str], new: int, questions: Sequence[Hashable], progress: str
    ) -> list[str]:
        """Continues prompts in batches of one size, sorted by length."""
        tokens = self.session.tokenizer.encode_batch(prompts)
        options: dict[str, Sequence[Any]] = {}  # for `Generator.generate`, by prompt
        if self.overlap < 1 and self.bank is not None:
            options["against"] = tokens
        if self.mode == "wrong":
            contexts = [np.concatenate([[BOS], row]).astype(np.int32) for row in tokens]
            retrieved = self._retrieve(contexts, questions) or ()
            # Every chunk of the row reads the same references.
            most = self.longest // self.session.config.memory.chunk_length + 1
            options["references"] = [
                [*np.pad(ids, ((0, most), (0, 0)), "edge")] for ids in retrieved
            ]
        rows = self.scorer.batch_size
        return continue_prompts(self._generator, tokens, new, rows, options, progress=progress)

    def _retrieve(
        self,
        contexts: Sequence[np.ndarray],
        questions: Sequence[Hashable] | None = None,
        shift: int = 0,
    ) -> list[np.ndarray] | None:
        """Retrieves the references that contexts read; in the mode `wrong` draws others.

        Returns ids `(chunks, M)` for each context; None without memories. Equal contexts are
        searched once. The overlap filter compares references with the context without BOS. Wrong
        references of a question are the same for all of its contexts and their chunks.
        """
        if self.bank is None or self.retriever is None:
            return None
        keys = [row.tobytes() for row in contexts]
        unique = dict(zip(keys, contexts, strict=True))
        searched = list(unique.values())
        against = [row[row != BOS] for row in searched] if self.overlap < 1 else None
        retrieved = self.scorer.retrieve(searched, self.retriever, against, shift=shift)
        by_key = dict(zip(unique, retrieved, strict=True))
        ids = [by_key[key] for key in keys]
        if self.mode != "wrong":
            return ids
        own: dict[Hashable, set[int]] = {}
        for question, of_context in zip(questions or keys, ids, strict=True):
            own.setdefault(question, set()).update(of_context.ravel().tolist())
        count = self.session.config.memory.per_prompt_chunk
        live = self.retriever.references.live
        drawn = draw_others(
            live, [sorted(of_question) for of_question in own.values()], count, seed=0
        )
        others = dict(zip(own, drawn[:, None], strict=True))
        return [others[question] for question in questions or keys]

    def _shown(self, contexts: Sequence[str]) -> list[str]:
        """Returns contexts as the model reads them: in the mode `rag` behind references.

        Adds to the count of requests.
        """
        self.counts["requests"] += len(contexts)
        if self.mode != "rag" or self.retriever is None:
            return list(contexts)
        unique = [context for context in dict.fromkeys(contexts) if context.strip()]
        against = self.session.tokenizer.encode_batch(unique) if self.overlap < 1 else None
        texts, _ = rag_prompts(self.retriever, unique, self.references, against)
        shown = dict(zip(unique, texts, strict=True))
        return [shown.get(context, context) for context in contexts]

    def _pair(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Makes a pair with BOS in front of the context, which is cut from the left to fit.

        Raises `InferenceError` if the continuation is empty or longer than a row.
        """
        tokens = context[1:] if context[:1] == [BOS] else context
        pair, cut = fit(tokens, continuation, self.longest)
        self.counts["truncated"] += cut
        return pair

    def _fitting(self, prompts: list[str], room: int) -> list[str]:
        """Cuts prompts from the left to at most `room` tokens, and counts the cut ones."""
        tokenizer, fitting = self.session.tokenizer, []
        for text, tokens in zip(prompts, tokenizer.encode_batch(prompts), strict=True):
            keep = room
            if len(tokens) > room:
                self.counts["truncated"] += 1
                while len(tokenizer.encode(text)) > room:  # a cut text may encode to more tokens
                    text = tokenizer.decode(tokens[-keep:]).lstrip("\N{REPLACEMENT CHARACTER}")
                    keep -= 1
            fitting.append(text)
        return fitting


def _question(request: Any) -> Hashable:
    """Returns the key of a request's question, which all choices of the question share."""
    if request.doc_id is None:
        return request.args[0]
    return request.task_name, request.doc_id
