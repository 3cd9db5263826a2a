"""Trains the quickstart's model to chat, by SFT and then DPO, and measures the effect of each.

Every step is the same as in a real run; finished steps are skipped when the command is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.errors import CheckpointError
from m3jax.evaluation.questions import Question
from m3jax.evaluation.scoring import Answerer
from m3jax.files import json_text, write_atomically
from m3jax.inference.generate import Generation
from m3jax.inference.session import Session
from m3jax.quickstart import people
from m3jax.quickstart.run import Demonstration
from m3jax.text.chat.chats import question
from m3jax.text.chat.corpus import prepare_chats
from m3jax.text.chat.template import Template
from m3jax.train.stage import train_stage

CHATS, PAIRS = 6000, 2400
NEW_TOKENS = 8  # a statement has four tokens and `</s>`

LABELS = {
    "format": "answers in one of the two forms",
    "statement": "answers that are whole statements, the form that is preferred",
    "memory": "right answers in chats about people never seen in training",
    "none": "the same without memory",
    "completion": "right completions without the chat template, as in the quickstart",
}


def run(demonstration: Demonstration, *, chats: int = CHATS, pairs: int = PAIRS) -> dict[str, Any]:
    """Runs SFT and DPO in a finished quickstart; returns the content of `report/chat.json`.

    Args:
      demonstration: settings of the quickstart, whose workdir has `continual/` and `bank/`.
      chats: number of chats for SFT.
      pairs: number of preference pairs for DPO.

    Raises:
      CheckpointError: the quickstart was not run in the workdir.
    """
    workdir, seed = demonstration.workdir, demonstration.seed
    if not (workdir / "continual").is_dir():
        raise CheckpointError(
            f"{workdir} holds no finished quickstart; run launch/quickstart.py --workdir={workdir}"
            f" --seed={seed} first"
        )
    world = people.make_world(seed, **demonstration.world)
    started = time.time()
    for stage, before, records in (
        ("sft", "continual", people.chats(world, seed, chats)),
        ("dpo", "sft", people.preferences(world, seed, pairs)),
    ):
        config = demonstration.config(stage)
        path = workdir / "text" / f"{config.data.packing}.jsonl"
        if not path.exists():
            people.write_jsonl(path, records)
        print(f"[{stage}: {path.name}]", flush=True)
        prepare_chats(config, workdir, str(path))
        trained = train_stage(config, workdir, init_from=workdir / before)
    stages = ("continual", "sft", "dpo")
    summary = {
        "seed": seed,
        "questions": sum(len(person.facts) for person in world.unseen),
        "stages": {stage: _measure(demonstration, world, stage) for stage in stages},
        "dpo": trained.evaluation,
        "seconds": round(time.time() - started, 1),
    }
    _write_report(workdir, summary)
    return summary


def _measure(demonstration: Demonstration, world: people.World, stage: str) -> dict[str, float]:
    """Returns the shares of `LABELS` for a stage's chat answers about people unseen in training."""
    config = demonstration.config("sft")  # for its chat template; the model is the same
    session = Session(config, demonstration.workdir, checkpoint=demonstration.workdir / stage)
    facts = [(person, *fact) for person in world.unseen for fact in person.facts]
    texts = [people.question(person.name, relation) for person, relation, _ in facts]
    template = Template(config.chat, session.tokenizer)
    prompts = template.prompts([question(text) for text in texts])
    answers = {mode: _answers(session, mode, prompts) for mode in ("memory", "none")}
    statements, forms = [], []
    for (person, relation, _), answer in zip(facts, answers["memory"], strict=True):
        values = world.values[relation]
        whole = {people.statement(person.name, relation, value) for value in values}
        statements.append(answer in whole)
        forms.append(answer in whole or answer in values)
    right = {
        mode: [
            answer in (value, people.statement(person.name, relation, value))
            for (person, relation, value), answer in zip(facts, answers[mode], strict=True)
        ]
        for mode in answers
    }
    length = session.config.data.sequence_length
    answerer = Answerer(session.model, session.params, session.tokenizer, length)
    completions = [
        Question(text, f" {value}") for text, (_, _, value) in zip(texts, facts, strict=True)
    ]
    ids = answerer.search(completions, session.retriever)
    shares: dict[str, Any] = {
        "format": forms,
        "statement": statements,
        **right,
        "completion": answerer.correct(completions, ids, session.bank),
    }
    return {name: float(np.mean(hits)) for name, hits in shares.items()}


def _answers(session: Session, mode: str, prompts: Sequence[np.ndarray]) -> list[str]:
    """Generates answers as text; an answer that does not end in `NEW_TOKENS` gets a final `…`."""
    generator = session.generator(mode)
    generations: list[Generation] = []
    for low in range(0, len(prompts), 96):
        generations += generator.generate(prompts[low : low + 96], NEW_TOKENS)
    return [g.text.strip() if g.stopped else f"{g.text} …" for g in generations]


def _write_report(workdir: Path, summary: dict[str, Any]) -> None:
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "chat.json", json_text(summary, indent=2).encode())
    stages = summary["stages"]
    rows = "\n".join(
        f"| {label} | {' | '.join(f'{stages[stage][name]:.3f}' for stage in stages)} |"
        for name, label in LABELS.items()
    )
    gains = summary["dpo"]
    text = f"""# Chat report

{summary["questions"]} questions about people whom no fact of the training text mentions. Seed
{summary["seed"]}, {summary["seconds"]:.0f} s.

| share of questions with … | {" | ".join(stages)} |
|---|{"---|" * len(stages)}
{rows}

On validation pairs DPO changed the log-probability of preferred answers by
{gains["gain_chosen"]:+.3f} nats and of rejected ones by {gains["gain_rejected"]:+.3f};
in {gains["accuracy"]:.3f} of the pairs the preferred answer gained more than the rejected one, and
in {gains["preferred"]:.3f} it is now the likelier.
"""
    write_atomically(folder / "CHAT.md", text.encode())
