"""Chats and preferences about the invented people of `m3jax.quickstart.people`, for SFT and DPO.

A question is `pet of Tavo`. SFT chats answer in either of two forms, at random: the whole
statement `pet of Tavo otter`, or the value `otter` alone. Preferences want the statement, and the
right value. Turns name the reference that holds the fact.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from m3jax.quickstart.people import Person, World, statement


def chats(world: World, seed: int, count: int, rounds: tuple[int, int] = (1, 4)) -> Iterable[dict]:
    """Chats about people of training who share relations, each round about one of them.

    Args:
      world: the people.
      seed: of all draws.
      count: chats.
      rounds: fewest and most of a chat.

    Yields JSON-able records with `id` and `messages`.
    """
    rng = np.random.default_rng([seed, 6])
    groups = _groups(world)
    for number in range(count):
        topics = _topics(rng, groups, int(rng.integers(rounds[0], rounds[1] + 1)))
        turns = [turn for topic in topics for turn in _round(*topic, bool(rng.integers(2)))]
        yield {"id": f"chat-{number}", "messages": turns}


def preferences(
    world: World, seed: int, count: int, rounds: tuple[int, int] = (1, 2)
) -> Iterable[dict]:
    """Preference pairs: a right statement over the bare value, or over a wrong statement.

    Arguments as of `chats`. Yields records with `id`, `prompt` (turns), `chosen` and `rejected`.
    """
    rng = np.random.default_rng([seed, 7])
    groups = _groups(world)
    for number in range(count):
        *before, (person, relation) = _topics(
            rng, groups, int(rng.integers(rounds[0], rounds[1] + 1))
        )
        turns = [turn for topic in before for turn in _round(*topic, bool(rng.integers(2)))]
        value = dict(person.facts)[relation]
        rejected = value
        if rng.integers(2):
            others = [other for other in world.values[relation] if other != value]
            rejected = statement(person.name, relation, str(rng.choice(others)))
        yield {
            "id": f"preference-{number}",
            "prompt": [*turns, _round(person, relation, True)[0]],
            "chosen": statement(person.name, relation, value),
            "rejected": rejected,
        }


def question(name: str, relation: str) -> str:
    """Writes the question of a user."""
    return f"{relation} of {name}"


def _groups(world: World) -> list[list[Person]]:
    groups: dict[frozenset, list[Person]] = {}
    for person in world.people:
        groups.setdefault(frozenset(r for r, _ in person.facts), []).append(person)
    return list(groups.values())


def _topics(
    rng: np.random.Generator, groups: list[list[Person]], rounds: int
) -> list[tuple[Person, str]]:
    """Draws people of a group, of different names (two of one name would contradict each other)."""
    group = groups[rng.integers(len(groups))]
    by_name: dict[str, Person] = {}
    topics = []
    for _ in range(rounds):
        drawn = group[rng.integers(len(group))]
        person = by_name.setdefault(drawn.name, drawn)
        topics.append((person, str(rng.choice([relation for relation, _ in person.facts]))))
    return topics


def _round(person: Person, relation: str, whole: bool) -> list[dict[str, str]]:
    value = dict(person.facts)[relation]
    answer = statement(person.name, relation, value) if whole else value
    return [
        {
            "role": "user",
            "content": question(person.name, relation),
            "reference": person.reference,
        },
        {"role": "assistant", "content": answer},
    ]
