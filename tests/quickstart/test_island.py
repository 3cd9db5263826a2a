"""The encyclopedia of the invented island: one right answer for each question, in one paragraph."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from m3jax.evaluation.answer_recall import AnswerFinder, words
from m3jax.evaluation.questions import read_questions
from m3jax.evaluation.squad_metrics import normalise
from m3jax.evaluation.task_files import read_task
from m3jax.quickstart.island import FOLDER, read_island
from m3jax.retrieval.lexical import LexicalEmbedder

ISLAND = read_island()
TEXTS = {article.id: article.text for article in ISLAND.articles}
EDITS = {article.id: article.text for article in ISLAND.edits}
NEW = {question.question: question for question in ISLAND.edited_questions}
NUMBERS = [
    "five",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "sixteen",
    "seventeen",
    "nineteen",
    "twenty-seven",
    "forty",
    "seventy",
    "ninety",
]
DIGITS = (5, 7, 8, 9, 10, 11, 12, 13, 16, 17, 19, 27, 40, 70, 90)
SPELT = dict(zip(NUMBERS, map(str, DIGITS), strict=True))


def occurs(answers, text):
    """Whether any of the answers is in a text, as whole words, whatever their case."""
    return bool(AnswerFinder(answers).find(text))


def in_digits(text):
    return re.sub(r"[\w-]+", lambda word: SPELT.get(word[0], word[0]), text)


def test_counts():
    kinds = Counter(question.kind for question in ISLAND.questions)
    assert set(kinds) == {"fact", "contradiction"} and kinds["contradiction"] >= 30
    assert (len(ISLAND.articles), kinds.total()) == (60, 200)
    assert (len(ISLAND.edits), len(ISLAND.edited_questions)) == (20, 20)
    assert len(ISLAND.deletions) == 10
    of_article = Counter(question.reference for question in ISLAND.questions)
    assert set(of_article) == set(TEXTS) and set(of_article.values()) == {3, 4}


def test_ids_titles_and_questions_are_unique():
    for name in ("id", "title", "text"):
        assert len({getattr(article, name) for article in ISLAND.articles}) == 60
    assert len({question.question for question in ISLAND.questions}) == 200
    assert len(EDITS) == 20 and len(set(ISLAND.deletions)) == 10
    titles = {article.id: article.title for article in ISLAND.articles}
    assert all(titles[article.id] == article.title for article in ISLAND.edits)


def test_paragraphs_are_short_plain_and_name_their_subject():
    for article in (*ISLAND.articles, *ISLAND.edits):
        assert 60 <= len(article.text.split()) <= 80, article.id
        assert re.fullmatch(r"[\x20-\x7e–]+", article.text), article.id
        subject = re.sub(r" \(.*\)|^The | (on|in) Pell.*| of Pellory|^Pelloran ", "", article.title)
        assert subject.lower().rstrip("s") in article.text.lower(), article.id


def test_the_first_answer_is_quoted_and_the_others_are_spellings_of_it():
    pairs = [(q, TEXTS[q.reference]) for q in ISLAND.questions]
    for question, text in pairs + [(q, EDITS[q.reference]) for q in ISLAND.edited_questions]:
        first, *others = question.answers
        assert re.search(rf"(?<!\w){re.escape(first)}(?!\w)", text), question
        assert all(1 <= len(answer.split()) <= 5 for answer in question.answers), question
        assert len(set(map(normalise, question.answers))) == len(question.answers), question
        for other in others:
            swapped = other == " ".join(reversed(first.split()))  # 14 June, June 14
            tied = occurs([in_digits(other)], in_digits(text)) or other in ("10th", "a song")
            assert swapped or tied, question


def test_questions_do_not_tell_answers_of_their_article():
    for one, two in itertools.product(ISLAND.questions, repeat=2):
        if one.reference == two.reference:
            assert not occurs(one.answers, two.question), (one, two)
            new = NEW.get(one.question)
            assert new is None or not occurs(new.answers, two.question), (new, two)


def shared(question, text):
    """Rarity in the encyclopedia, summed over the words that a question shares with a text."""
    count = {
        word: sum(word in every for every in WORDS.values())
        for word in set(words(question.question))
    }
    return sum(np.log(60 / n) for word, n in count.items() if n and word in text)


WORDS = {name: set(words(text)) for name, text in TEXTS.items()}


def test_no_other_paragraph_with_the_answer_is_about_the_question():
    """A rival holds the answer and more than half of what the question shares with its article."""
    for question in ISLAND.questions:
        most = shared(question, WORDS[question.reference])
        assert most > 0
        for name, text in TEXTS.items():
            if name != question.reference and occurs(question.answers, text):
                assert shared(question, WORDS[name]) < most / 2, (question, name)


@pytest.mark.parametrize("edited", [False, True])
def test_words_find_the_article_of_a_question(edited):
    texts = TEXTS | EDITS if edited else TEXTS
    embedder = LexicalEmbedder(1024)
    embedder.fit(texts.values())
    scores = (
        embedder.embed_queries([q.question for q in ISLAND.questions])
        @ embedder.embed(list(texts.values())).T
    )
    rank = np.argsort(-scores, axis=1)
    gold = np.array([list(texts).index(q.reference) for q in ISLAND.questions])
    missed = [
        q.question for q, i, row in zip(ISLAND.questions, gold, rank, strict=True) if row[0] != i
    ]
    assert not missed


def test_an_edit_changes_the_answer_of_its_question_and_of_no_other():
    asked = {question.question: question for question in ISLAND.questions}
    assert [new.reference for new in ISLAND.edited_questions] == list(EDITS)
    for new in ISLAND.edited_questions:
        old, text = asked[new.question], EDITS[new.reference]
        assert (old.reference, old.kind) == (new.reference, new.kind)
        assert occurs(old.answers, TEXTS[old.reference]) and not occurs(old.answers, text), new
        assert occurs(new.answers, text) and not occurs(new.answers, TEXTS[old.reference]), new
        for other in ISLAND.questions:
            if other.reference == new.reference and other is not old:
                assert other.answers[0] in text, (new, other)
        before, after = TEXTS[old.reference].split(), text.split()
        changed = len(set(before) ^ set(after))
        assert 2 <= changed <= 6, (new, changed)


def test_deleted_articles_exist_and_are_not_edited():
    assert set(ISLAND.deletions) <= set(TEXTS) and not set(ISLAND.deletions) & set(EDITS)


def test_the_file_of_questions_serves_every_command_that_takes_questions():
    path = FOLDER / "questions.jsonl"
    task, read = read_task(path), read_questions(path)
    assert task.kind == "open"
    for question, doc, same in zip(ISLAND.questions, task.docs, read, strict=True):
        assert (doc["question"], tuple(doc["answers"])) == (question.question, question.answers)
        assert (same.query, same.right) == (question.question, question.answers)
        assert (same.prompt, same.answer) == (doc["text"], f" {question.answers[0]}\n")
        assert same.references == (question.reference,)
