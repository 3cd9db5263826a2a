"""Program of a stage: model, optimizer, its step and the state that it starts with."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3jax.checkpoint import restore_params
from m3jax.config import prefix_tokens
from m3jax.make_model import make_model
from m3jax.memory.reader import Dequantize
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.optimizer import make_optimizer
from m3jax.train.progress import Progress
from m3jax.train.state import TrainState, abstract_state, init_state
from m3jax.train.step import Step, make_step


class Program:
    """Makes the step of a stage, and the state that it starts with."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = make_model(config, prefix_tokens(config), mesh)
        self.optimizer = make_optimizer(config)
        self.abstract = abstract_state(self.model, self.optimizer, mesh)

    def step(self, dequantize: Dequantize | None) -> Step:
        """Returns the step for batches of a pipeline; see `make_step`."""
        return make_step(
            self.config, self.model, self.mesh, self.optimizer, self.abstract, dequantize
        )

    def start(
        self, checkpoints: Checkpoints, init_from: str | Path | None, progress: Progress
    ) -> TrainState:
        """Returns the newest checkpoint, else the parameters of `init_from`, else random ones."""
        stage, latest = self.config.stage, checkpoints.latest_step()
        if latest is not None:
            steps = self.config.train.steps
            progress.message(f"{stage}: continuing from step {latest} of {steps}")
            return checkpoints.restore(self.abstract)
        params = None
        if init_from is not None:
            tokenizer = checkpoints.tokenizer_fingerprint
            params, meta = restore_params(
                init_from, self.model, mesh=self.mesh, tokenizer_fingerprint=tokenizer
            )
            checkpoints.check_reads(meta, init_from)
            progress.message(f"{stage}: starting from step {meta['step']} of {init_from}")
        return init_state(self.config, self.model, self.optimizer, self.abstract, params)
