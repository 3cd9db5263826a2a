"""The invented world: nobody asked about is in the training facts; one right answer each."""

import numpy as np
import pytest

from m3jax.quickstart import people

WORLD = people.make_world(1, names=20, people=100, unseen=30, values=6, facts=2)


def facts_of(text):
    return [tuple(line.replace(" of", "").split(" ")) for line in text.split("\n")]


def test_facts_of_unseen_people_are_in_no_training_document():
    unseen = set(WORLD.unseen_names)
    assert not unseen & set(WORLD.names)
    for document in people.fact_documents(WORLD, 0, 200, chunks=6):
        assert not unseen & {name for _, name, _ in facts_of(document["text"])}


def test_a_chunk_states_the_facts_of_its_reference_and_names_are_unambiguous():
    by_key = {person.reference: person for person in WORLD.people}
    for document in people.fact_documents(WORLD, 0, 200, chunks=6):
        facts = facts_of(document["text"])
        assert len(facts) == 12 and len(document["references"]) == 6
        told = {}
        for chunk, key in enumerate(document["references"]):
            person = by_key[key]
            stated = {(r, v) for r, name, v in facts[2 * chunk : 2 * chunk + 2]}
            assert stated == set(person.facts)
            assert told.setdefault(person.name, key) == key


def test_echo_documents_repeat_their_segment_and_mark_its_first_copy():
    for document in people.echo_documents(WORLD, 0, 50, words=40):
        words = document["text"].split()
        first = document["text"][: document["no_loss"][0][1]].split()
        assert len(words) == 40
        assert all(word == first[i % len(first)] for i, word in enumerate(words))


def test_questions_ask_about_unseen_people_among_others_with_the_relation():
    by_key = {person.reference: person for person in WORLD.unseen}
    asked = people.questions(WORLD, 0)
    assert len(asked) == 60
    for question in asked:
        relation, name = question.prompt.split(" of ")
        person = by_key[question.person]
        assert person.name == name and f" {dict(person.facts)[relation]}" == question.answer
        assert len(set(question.references)) == 5 and question.person in question.references
        assert all(relation in dict(by_key[key].facts) for key in question.references)


def test_every_edited_fact_changes_its_value_and_nothing_else():
    changed = people.edited(WORLD, 0)
    assert changed.people == WORLD.people
    for old, new in zip(WORLD.unseen, changed.unseen, strict=True):
        assert (old.key, old.name) == (new.key, new.name)
        for (relation, value), (same, other) in zip(old.facts, new.facts, strict=True):
            assert relation == same and value != other and other in WORLD.values[relation]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_is_a_world(seed):
    world = people.make_world(seed, names=20, people=100, unseen=30, values=6, facts=2)
    assert (world == WORLD) == (seed == 1)


def test_half_of_the_echoed_words_are_names_and_no_name_is_left_out():
    documents = list(people.echo_documents(WORLD, 0, 400, words=40))
    words = [word for d in documents for word in d["text"][: d["no_loss"][0][1]].split()]
    names = {*WORLD.names, *WORLD.unseen_names}
    assert np.mean([word in names for word in words]) == pytest.approx(0.5, rel=0.06)
    assert names <= set(words)
