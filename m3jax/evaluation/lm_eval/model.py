"""Adapts a checkpoint to lm-evaluation-harness (the extra `eval`).

    from m3jax.evaluation.lm_eval.model import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(session, "memory"), tasks=["arc_easy"])

| mode | the model reads |
|---|---|
| `none` | the context |
| `memory`, or `explicit` | memories that the context's chunks find |
| `compressed` | the same, of a bank with compressed memories |
| `rag` | references as text in front of the context, found with all of it |
| `wrong` | memories that another question finds |

A scored continuation is never part of a query, and references that overlap too much with the
context are dropped (Memory³ §6.1). Contexts that are too long lose their beginning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.errors import InferenceError
from m3jax.evaluation.scoring import Pair, Scorer
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.rag import with_references
from m3jax.inference.retrieval_schedule import retrieval_schedule
from m3jax.inference.session import Session
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import BOS, END

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise InferenceError(
        f"lm-evaluation-harness cannot be imported ({error}); pip install 'm3jax[eval]'"
    ) from error

MODES = ("none", "memory", "compressed", "rag", "wrong")
NEW_TOKENS = 256  # that are generated where a task does not say how many


class HarnessModel(TemplateLM):
    """Answers the requests of lm-evaluation-harness in one mode.

    Attributes:
      retriever: finds the references; its counters are this model's own. None in the mode `none`.
      counts: `requests`; `truncated`: those whose context did not fit.
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
        """Opens what the mode needs.

        Args:
          session: checkpoint and knowledge.
          mode: of `MODES`.
          overlap: references whose overlap with the context is above this are dropped; 1 drops
            none; default `retrieval.overlap_evaluation`.
          references: in front of the context, in the mode `rag`.
          batch_size: rows that the device works on at once.
          bank: folder of compressed memories, which the mode `compressed` needs.

        Raises:
          InferenceError: no such mode, or one that does not fit the session.
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
        self.config, self.tokenizer = session.config, session.tokenizer
        limit = self.config.retrieval.overlap_evaluation if overlap is None else overlap
        self.overlap = float(limit)
        self.bank: Any = None
        self.retriever: Retriever | None = None
        if mode in ("memory", "compressed", "wrong"):
            session.require_memories(mode)
            self.bank = session.open_bank(bank) if mode == "compressed" else session.bank
        if mode != "none":
            retriever = session.retriever
            self.retriever = Retriever(
                retriever.index,
                retriever.references,
                retriever.candidates,
                self.overlap,
                retriever.rank,
            )
        self.scorer = Scorer(
            session.model,
            session.params,
            session.tokenizer,
            session.config.data.sequence_length,
            batch_size,
        )
        self.longest = self.config.data.sequence_length
        self.counts = {"requests": 0, "truncated": 0}
        self._generator: Generator | None = None

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
        """Encodes a text without special tokens: BOS is put in front when it is scored."""
        return self.session.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations: log-probability, and whether each token is the first choice."""
        contexts = [request.args[0] for request in requests]
        encoded = []
        for request, shown in zip(requests, self._shown(contexts), strict=True):
            continuation = request.args[1]
            if shown:
                tokens = self._encode_pair(shown, continuation)
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
        """Scores tokens of contexts and continuations.

        Args:
          requests: texts, context tokens, continuation tokens.
          disable_tqdm: whether to show no bar.
          questions: which question each belongs to; default, each context is one.
        """
        pairs = [self._pair(context, continuation) for _, context, continuation in requests]
        keys = [pair.context.tobytes() for pair in pairs]
        unique = {key: pair.context for key, pair in zip(keys, pairs, strict=True)}
        ids = None
        if self.bank is not None and self.retriever is not None:
            contexts = list(unique.values())
            retrieved = self.scorer.retrieve(contexts, self.retriever, self._against(contexts))
            by_key = dict(zip(unique, retrieved, strict=True))
            ids = self._read([by_key[key] for key in keys], questions or keys)
        scores = self.scorer.score(pairs, ids, self.bank, progress=not disable_tqdm)
        return list(zip(scores.logprob.tolist(), scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts by log-probability; a chunk retrieves with the chunk before it.

        Raises:
          InferenceError: the mode `rag`, as a text has no question.
        """
        if self.mode == "rag":
            raise InferenceError(
                "mode 'rag' has no question to search with in loglikelihood_rolling; take another"
            )
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), BOS, self.longest, 1
            )
            for inputs, scored in windows:
                context = inputs[: len(inputs) - len(scored) + 1]
                pairs.append(Pair(np.array(context, np.int32), np.array(scored, np.int32)))
                owners.append(number)
        self.counts["requests"] += len(requests)
        ids = None
        if self.bank is not None and self.retriever is not None:
            rows = [np.concatenate([pair.context, pair.continuation[:-1]]) for pair in pairs]
            retrieved = self.scorer.retrieve(rows, self.retriever, self._against(rows), shift=1)
            ids = self._read(retrieved, owners)
        scores = self.scorer.score(pairs, ids, self.bank, progress=not disable_tqdm)
        return np.bincount(np.array(owners, int), scores.logprob, len(requests)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context, up to the first of the request's stop strings.

        Raises:
          InferenceError: a request asks for sampling.
        """
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(self._new_tokens(request.args[1]), []).append(number)
        shown = self._shown([request.args[0] for request in requests])
        for new, numbers in by_length.items():
            prompts = self._fitting([shown[i] for i in numbers], self.longest - 1 - new)
            questions = [_question(requests[i]) for i in numbers]
            texts = self._generate(prompts, new, questions)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = _until(text, requests[number].args[1].get("until") or [])
        return answers

    def _new_tokens(self, settings: dict[str, Any]) -> int:
        """Most new tokens of a request; at most half of the model's context."""
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise InferenceError("a task asks for sampling; only greedy generation is scored")
        named = settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS
        return min(int(named), self.longest // 2)

    def _generate(self, prompts: list[str], new: int, questions: Sequence[Hashable]) -> list[str]:
        """Texts of prompts, in batches of one size; long prompts together."""
        if self._generator is None:
            memory_retriever = None
            if self.bank is not None and self.retriever is not None:
                count = self.config.memory.per_prompt_chunk
                memory_retriever = MemoryRetriever(
                    self.retriever, self.bank, self.session.tokenizer, count
                )
            self._generator = Generator(
                self.session.model,
                self.session.params,
                self.session.tokenizer,
                memory_retriever,
                longest=self.config.data.sequence_length,
            )
        tokens = self.session.tokenizer.encode_batch(prompts)
        against = tokens if self._filters and self.bank is not None else None
        references = (
            self._other_references(tokens, new, questions) if self.mode == "wrong" else None
        )
        texts = [""] * len(prompts)
        order = np.argsort([-len(row) for row in tokens], kind="stable")
        rows = self.scorer.batch_size
        for low in range(0, len(prompts), rows):
            part = order[low : low + rows].tolist()
            part += part[-1:] * (rows - len(part))
            generations = self._generator.generate(
                [prompts[i] for i in part],
                new,
                against=None if against is None else [against[i] for i in part],
                references=None if references is None else [references[i] for i in part],
            )
            for i, generation in zip(part, generations, strict=True):
                texts[i] = generation.text
        return texts

    def _other_references(
        self, tokens: Sequence[np.ndarray], new: int, questions: Sequence[Hashable]
    ) -> list[list[np.ndarray]]:
        """References for each prompt's retrievals, found by the chunks of another question."""
        assert self.retriever is not None
        contexts = [np.concatenate([[BOS], row]).astype(np.int32) for row in tokens]
        retrieved = self.scorer.retrieve(contexts, self.retriever, self._against(contexts))
        chunk = self.config.memory.chunk_length
        return [
            [
                ids[min(c, len(ids) - 1)]
                for c in range(len(retrieval_schedule(len(row), new, chunk)))
            ]
            for row, ids in zip(contexts, self._read(retrieved, questions), strict=True)
        ]

    def _read(self, retrieved: list[np.ndarray], questions: Sequence[Hashable]) -> list[np.ndarray]:
        """References that requests read: their own, or in the mode `wrong` another question's."""
        if self.mode != "wrong":
            return retrieved
        first: dict[Hashable, int] = {}
        for number, question in enumerate(questions):
            first.setdefault(question, number)
        order = list(first)
        if len(order) < 2:
            raise InferenceError("mode 'wrong' with a single question; give at least two")
        half = len(order) // 2
        other = {
            question: first[order[(i + half) % len(order)]] for i, question in enumerate(order)
        }
        return [retrieved[other[question]] for question in questions]

    @property
    def _filters(self) -> bool:
        return self.overlap < 1

    def _against(self, contexts: list[np.ndarray]) -> list[np.ndarray] | None:
        """Tokens that no reference may contain: the contexts, without BOS."""
        return [row[row != BOS] for row in contexts] if self._filters else None

    def _shown(self, contexts: Sequence[str]) -> list[str]:
        """Texts that the model reads: in the mode `rag` behind references.

        Counts the requests.
        """
        self.counts["requests"] += len(contexts)
        if self.mode != "rag" or self.retriever is None:
            return list(contexts)
        unique = [context for context in dict.fromkeys(contexts) if context.strip()]
        against = self.session.tokenizer.encode_batch(unique) if self._filters else None
        ids = self.retriever.retrieve(unique, against, self.references)
        texts = with_references(unique, ids, self.session.references)
        shown = dict(zip(unique, texts, strict=True))
        return [shown.get(context, context) for context in contexts]

    def _pair(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Tokens with BOS in front, the context cut from the left to what fits."""
        room = self.longest - len(continuation)  # the last token is only scored, BOS is one more
        if not continuation or room < 0:
            raise InferenceError(
                f"a continuation of {len(continuation)} tokens cannot be scored in rows of"
                f" {self.longest}; leave it out, or raise data.sequence_length"
            )
        tokens = list(context[1:] if context[:1] == [BOS] else context)
        if len(tokens) > room:
            self.counts["truncated"] += 1
            tokens = tokens[len(tokens) - room :]
        return Pair(np.array([BOS, *tokens], np.int32), np.array(continuation, np.int32))

    def _fitting(self, prompts: list[str], room: int) -> list[str]:
        """Texts cut from the left to a number of tokens."""
        encode = self.session.tokenizer.encode
        fitting = []
        for text, tokens in zip(prompts, self.session.tokenizer.encode_batch(prompts), strict=True):
            self.counts["truncated"] += len(tokens) > room
            keep = room
            while len(tokens) > room:  # a text that is cut may have more tokens than were kept
                text = self.session.tokenizer.decode(tokens[-keep:])
                text = text.lstrip("\N{REPLACEMENT CHARACTER}")
                if len(encode(text)) <= room:
                    break
                keep -= 1
            fitting.append(text)
        return fitting


def _question(request: Any) -> Hashable:
    """Identifies the question of a request; all choices of a question share it."""
    if request.doc_id is None:
        return request.args[0]
    return request.task_name, request.doc_id


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Cuts a text at the first of some strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.partition(stop)[0]
    return text
