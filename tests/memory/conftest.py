"""Encoders of one config are compiled once."""

from collections.abc import Iterator

import jax
import pytest

from m3jax.memory import encode


@pytest.fixture(scope="module")
def compile_once() -> Iterator[None]:
    """Encoders of one config share a compiled function: compiling is most of a tiny build."""
    original, compiled = encode.Encoder.__init__, {}  # none with codebooks

    def cached(self, config, model, params, references, codec):
        key = (config.to_json(), model.prefix_tokens, model.mesh)
        if key not in compiled:
            original(self, config, model, params, references, codec)
            compiled[key] = dict(vars(self))
        vars(self).update(compiled[key])
        self.references = references
        self.params = jax.device_put({name: params[name] for name in self.params})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode.Encoder, "__init__", cached)
        yield
