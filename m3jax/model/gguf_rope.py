"""RoPE of GGUF files, as `rope_scaling` of Hugging Face's `config.json`.

llama.cpp divides all frequencies by a factor (linear), interpolates as YaRN does, or multiplies
wavelengths by a table, a tensor of the file. The table of Llama 3.1 to 3.3 is computed from four
numbers that the file does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from m3jax.errors import HuggingFaceError
from m3jax.model.rope import Rope

TABLE = "rope_freqs.weight"
# The numbers of Llama 3.1 to 3.3, besides the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192
# Settings of YaRN in `config.json`, and those of the metadata behind `rope.scaling.`.
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
# Further settings of scaling: values that are the same as none.
_UNSUPPORTED = {
    "attn_factor": (1,),
    "alpha": (0,),
    "yarn_ext_factor": (1, -1),
    "yarn_attn_factor": (1, -1),
    "yarn_log_multiplier": (0,),
}


def read_gguf_rope(
    setting: Callable[[str], Any], table: np.ndarray | None, base: float, half: int
) -> dict[str, Any]:
    """Returns `rope_scaling` of `config.json`; {} for RoPE that is not scaled.

    Args:
      setting: value of a key of the metadata behind `ARCHITECTURE.rope.`, or None.
      table: the tensor `TABLE`, by which the wavelengths of the pairs of a head are multiplied;
        None if the file has none.
      base: base of the frequencies.
      half: number of pairs of a head, H/2.

    Raises:
      HuggingFaceError: RoPE is partial, or scaled in a way that is not supported.
    """
    turned = setting("dimension_count")
    if turned not in (None, 2 * half):
        _refuse("dimension_count", turned, f"RoPE here turns whole heads of {2 * half}")
    factor = setting("scaling.factor") or setting("scale_linear") or 1.0
    kind = setting("scaling.type") or "linear"  # as in llama.cpp
    for key, accepted in _UNSUPPORTED.items():
        if setting(f"scaling.{key}") not in (None, *accepted):
            _refuse(f"scaling.{key}", setting(f"scaling.{key}"), "RoPE here has no such setting")
    scaling: dict[str, Any] = {}
    if kind == "yarn":
        numbers = {name: setting(f"scaling.{key}") for name, key in _YARN.items()}
        length = setting("scaling.original_context_length")
        scaling = {"rope_type": kind, "factor": factor, **numbers}
        scaling["original_max_position_embeddings"] = length
    elif kind == "linear" and factor != 1:
        scaling = {"rope_type": kind, "factor": factor}
    elif kind not in ("linear", "none"):
        _refuse("scaling.type", kind, "RoPE here is scaled as linear or yarn, or by a table")
    if table is None or np.allclose(table, 1, rtol=1e-6):
        return scaling
    llama3 = Rope(base, "llama3", float(table.max()), _LLAMA3_LENGTH)
    exact = base ** (-np.arange(half) / half)
    same = table.shape == (half,) and np.allclose(table * llama3.frequencies(half), exact, 1e-4, 0)
    if scaling or not same:
        raise HuggingFaceError(
            f"the tensor {TABLE} is not supported: only the table of Llama 3.1 to 3.3 is; take the"
            " safetensors of the model"
        )
    return {
        **{"rope_type": "llama3", "factor": llama3.factor, **_LLAMA3},
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }


def _refuse(key: str, value: Any, why: str) -> None:
    raise HuggingFaceError(f"rope.{key} = {value!r} is not supported; {why}; choose another model")
