"""Facts about invented people: the data of the quickstart.

A person has a few facts, each stated as a line `pet of Tavo otter`. People of training share a few
names, which recur with other facts, so that the weights cannot learn a person's facts; training
documents carry the keys of the references that state them. People of the evaluation have names of
their own, which training text uses only as meaningless words; search retrieves their references.

A question is `pet of Tavo`. Chats of SFT answer it in either of two forms, at random: the whole
statement, or the value `otter` alone. Preference pairs prefer the statement with the right value.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3jax.errors import TextError
from m3jax.evaluation.questions import Question
from m3jax.files import json_text, write_atomically

RELATIONS = ("pet", "home", "food", "game", "craft")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")


@dataclass(frozen=True)
class Person:
    """Person with facts: (relation, value) pairs in the order in which they are stated."""

    key: str
    name: str
    facts: tuple[tuple[str, str], ...]

    @property
    def reference(self) -> str:
        """Key of the person's only reference in the knowledge base."""
        return f"{self.key}#0"

    @property
    def text(self) -> str:
        """Text of the person's reference, a line per fact."""
        return "\n".join(statement(self.name, *fact) for fact in self.facts)


@dataclass(frozen=True)
class World:
    """Values of every relation, names and people, from which the quickstart's data is drawn."""

    values: dict[str, tuple[str, ...]]
    names: tuple[str, ...]  # of the people of training
    unseen_names: tuple[str, ...]
    people: tuple[Person, ...]
    unseen: tuple[Person, ...]

    @property
    def everyone(self) -> tuple[Person, ...]:
        """All people, in the order of the knowledge base."""
        return (*self.people, *self.unseen)


@dataclass(frozen=True)
class FactQuestion(Question):
    """Question whose answer is stated in the reference `person`.

    `references` holds this reference and references that state the same relation of other people.
    """

    person: str = ""
    relation: str = ""


def question(name: str, relation: str) -> str:
    """Formats a question, which is also the beginning of the statement that answers it."""
    return f"{relation} of {name}"


def statement(name: str, relation: str, value: str) -> str:
    """Formats a fact as a line of text."""
    return f"{question(name, relation)} {value}"


def make_world(
    seed: int, *, names: int, people: int, unseen: int, values: int, facts: int
) -> World:
    """Draws the names, the relations' values, and the people with their facts.

    Args:
      seed: seed of all draws.
      names: names shared by the people of training.
      people: people in training.
      unseen: people of the evaluation, each with a name of its own.
      values: values of every relation; a guess is right with probability 1/values.
      facts: facts of a person, of different relations.

    Raises:
      TextError: more words are needed than two syllables can form.
    """
    rng = np.random.default_rng([seed, 1])
    value_words, name_words = _invent(rng, values * len(RELATIONS), names + unseen)
    table = {r: value_words[i * values : (i + 1) * values] for i, r in enumerate(RELATIONS)}
    capitals = tuple(name.capitalize() for name in name_words)
    subsets = list(itertools.combinations(RELATIONS, facts))

    def person(key: str, name: str, number: int) -> Person:
        chosen = rng.permutation(subsets[number % len(subsets)])
        return Person(key, name, tuple((str(r), str(rng.choice(table[str(r)]))) for r in chosen))

    return World(
        values=table,
        names=capitals[:names],
        unseen_names=capitals[names:],
        people=tuple(
            person(f"person-{i}", capitals[rng.integers(names)], i) for i in range(people)
        ),
        unseen=tuple(person(f"unseen-{i}", capitals[names + i], i) for i in range(unseen)),
    )


def _invent(rng: np.random.Generator, *counts: int) -> list[tuple[str, ...]]:
    """Draws groups of distinct words, of few syllables per group to keep the tokenizer small."""
    syllables = rng.permutation([onset + vowel for onset in _ONSETS for vowel in _VOWELS])
    groups, used = [], 0
    for count in counts:
        side = math.ceil(math.sqrt(count))
        if used + 2 * side > len(syllables):
            raise TextError(f"a world of {counts} words needs more than {len(syllables)} syllables")
        first, second = syllables[used : used + side], syllables[used + side : used + 2 * side]
        words = [str(a + b) for a in first for b in second]
        groups.append(tuple(words[k] for k in rng.permutation(len(words))[:count]))
        used += 2 * side
    return groups


def fact_documents(
    world: World, seed: int, count: int, *, chunks: int, pool: tuple[int, int] = (2, 5)
) -> Iterable[dict]:
    """Yields documents in which every chunk states all facts of one person.

    The people of a document share their relations; their number is drawn from the range `pool`.
    Documents are JSON-able records with `id`, `text` and `references`, one key per chunk.
    """
    rng = np.random.default_rng([seed, 2])
    groups = _groups(world)
    for number in range(count):
        group = groups[rng.integers(len(groups))]
        most = len({person.name for person in group})
        size = min(int(rng.integers(pool[0], pool[1] + 1)), most)
        by_name: dict[str, Person] = {}
        while len(by_name) < size:  # two people of one name would contradict each other
            person = group[rng.integers(len(group))]
            by_name.setdefault(person.name, person)
        chosen = list(by_name.values())
        told = [chosen[i] for i in rng.integers(size, size=chunks)]
        lines = [
            statement(person.name, *person.facts[i])
            for person in told
            for i in rng.permutation(len(person.facts))
        ]
        yield {
            "id": f"facts-{number}",
            "text": "\n".join(lines),
            "references": [person.reference for person in told],
        }


def _groups(world: World) -> list[list[Person]]:
    """Groups the people of training by the relations of their facts."""
    groups: dict[frozenset, list[Person]] = {}
    for person in world.people:
        groups.setdefault(frozenset(r for r, _ in person.facts), []).append(person)
    return list(groups.values())


def echo_documents(
    world: World, seed: int, count: int, *, words: int, segment: tuple[int, int] = (4, 16)
) -> Iterable[dict]:
    """Yields documents of `words` words that repeat one random segment; its first copy has no loss.

    The length of the segment is drawn from the range `segment`. Half of its words are names, of
    training or unseen, the other half are relations and values.
    """
    rng = np.random.default_rng([seed, 3])
    names = np.array((*world.names, *world.unseen_names))
    others = np.array((*RELATIONS, *itertools.chain(*world.values.values())))
    for number in range(count):
        length = int(rng.integers(segment[0], segment[1] + 1))
        part = np.where(
            rng.random(length) < 0.5, rng.choice(others, length), rng.choice(names, length)
        )
        text = "".join(f" {word}" for word in itertools.islice(itertools.cycle(part), words))
        first = sum(len(word) + 1 for word in part)
        yield {"id": f"echo-{number}", "text": text, "no_loss": [[0, first]]}


def questions(world: World, seed: int, distractors: int = 4) -> list[FactQuestion]:
    """Makes a question for every fact of every unseen person.

    Its `references` are the person's reference and `distractors` references of other unseen people
    that state the same relation, in random order.
    """
    rng = np.random.default_rng([seed, 4])
    made = []
    for person in world.unseen:
        for relation, value in person.facts:
            others = [
                other.reference
                for other in world.unseen
                if other.key != person.key and relation in dict(other.facts)
            ]
            picked = [str(key) for key in rng.choice(others, distractors, replace=False)]
            keys = tuple(map(str, rng.permutation([person.reference, *picked])))
            text = question(person.name, relation), f" {value}"
            made.append(FactQuestion(*text, keys, person=person.reference, relation=relation))
    return made


def edited(world: World, seed: int) -> World:
    """Returns the world with another value for every fact of the unseen people."""
    rng = np.random.default_rng([seed, 5])

    def change(person: Person) -> Person:
        facts = []
        for relation, value in person.facts:
            others = [other for other in world.values[relation] if other != value]
            facts.append((relation, str(rng.choice(others))))
        return dataclasses.replace(person, facts=tuple(facts))

    return dataclasses.replace(world, unseen=tuple(map(change, world.unseen)))


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Writes JSON lines atomically."""
    lines = "".join(json_text(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lines.encode())


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes questions as JSON lines, the input of `m3jax.evaluation.questions.read_questions`."""
    names = ("prompt", "answer", "references")
    write_jsonl(path, ({name: getattr(q, name) for name in names} for q in questions))


def knowledge(people: Iterable[Person]) -> list[dict]:
    """Returns people as documents of a knowledge base, each short enough to be one reference."""
    return [{"id": person.key, "title": person.name, "text": person.text} for person in people]


def chats(world: World, seed: int, count: int, rounds: tuple[int, int] = (1, 4)) -> Iterable[dict]:
    """Yields chats about people of training who share relations; each round is about one person.

    Chats are JSON-able records with `id` and `messages`.

    Args:
      world: the people.
      seed: seed of all draws.
      count: number of chats.
      rounds: smallest and largest number of rounds of a chat.
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
    """Yields preference pairs: a right statement over the bare value, or over a wrong statement.

    Arguments as in `chats`. Pairs are records with `id`, `prompt` (turns), `chosen`, `rejected`.
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


def _topics(
    rng: np.random.Generator, groups: list[list[Person]], rounds: int
) -> list[tuple[Person, str]]:
    """Draws (person, relation) topics in a group, with at most one person per name."""
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
    user = {"role": "user", "content": question(person.name, relation)}
    return [
        {**user, "reference": person.reference},
        {"role": "assistant", "content": answer},
    ]
