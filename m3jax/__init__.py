"""m3jax: language models with explicit memory (Memory³, arXiv 2407.01178) in JAX.

An explicit memory is a few more attention keys and values in front of the context.

Axis legend, used in einsums, variable suffixes (`q_BTKGH`) and annotations. A letter never has a
second meaning:

    B batch rows               S key positions                  R references
    T tokens of a row          L layers                         W tokens of a reference
    C chunks of a row          D hidden width                   M memories retrieved by a chunk
    Q tokens of a chunk        F MLP width                      P tokens kept per memory
    N query heads              K key-value heads                H head dim
    G query heads per key-value head (N = K·G)                  V vocabulary
"""

__version__ = "0.1.0"
