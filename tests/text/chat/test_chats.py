"""Chats and pairs from JSON lines: every form, and every mistake by file and line."""

import gzip
import json
from collections import Counter

import pytest

from m3jax.errors import TextError
from m3jax.text.chat.chats import REMEDIES, ChatError, Turn, question, read_chats, read_pairs
from m3jax.text.chat.chats import read_questions as read_asked

HELLO = (Turn("user", "Hello"), Turn("assistant", "Hi"))


def write(path, *records):
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def test_all_forms_of_chats_are_one(tmp_path):
    forms = [
        {"messages": [user(" Hello\n"), answer("Hi")]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        {"prompt": "Hello", "response": "Hi", "other": 3},
        {"prompt": [user("Hello")], "response": "Hi", "id": "mine"},
    ]
    path = write(tmp_path / "a.jsonl", *forms)
    found = list(read_chats(path, 8))
    assert [chat.turns for chat in found] == [HELLO] * 4
    assert [chat.id for chat in found] == ["a:1", "a:2", "a:3", "mine"]
    assert found[1].where == f"{path}:2" and found[0].rounds == 1
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert [chat.turns for chat in read_chats(str(packed), 8)] == [HELLO] * 4


def test_all_forms_of_pairs_are_one(tmp_path):
    forms = [
        {"prompt": "Hello", "chosen": "Hi", "rejected": "No"},
        {"prompt": [user("Hello")], "chosen": [answer("Hi")], "rejected": answer("No")},
        {"chosen": [user("Hello"), answer("Hi")], "rejected": [user("Hello"), answer("No")]},
        {
            "conversations": [{"from": "human", "value": "Hello"}],
            "chosen": {"from": "gpt", "value": "Hi"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        {  # as in UltraFeedback
            "prompt": "Hello ",
            "chosen": [user("Hello"), answer("Hi")],
            "rejected": [user("Hello"), answer("No")],
        },
    ]
    found = list(read_pairs(write(tmp_path / "a.jsonl", *forms), 8))
    assert [pair.chosen.turns for pair in found] == [HELLO] * 5
    assert [pair.rejected.turns[-1].text for pair in found] == ["No"] * 5
    assert found[0].chosen.id == "a:1/chosen"


def system(text):
    return {"role": "system", "content": text}


def test_a_field_system_is_the_first_turn(tmp_path):
    told = (Turn("system", "Be terse"), *HELLO)
    chats = [
        {"system": "Be terse", "messages": [user("Hello"), answer("Hi")]},
        {"system": " Be terse\n", "conversations": [user("Hello"), answer("Hi")]},
        {"system": "Be terse", "prompt": "Hello", "response": "Hi"},
        {"system_prompt": "Be terse", "prompt": "Hello", "response": "Hi"},
        {"system": "Be terse", "messages": [system("Be terse"), user("Hello"), answer("Hi")]},
    ]
    assert [c.turns for c in read_chats(write(tmp_path / "a.jsonl", *chats), 8)] == [told] * 5
    none = {"system": " ", "prompt": "Hello", "response": "Hi"}
    assert [c.turns for c in read_chats(write(tmp_path / "b.jsonl", none), 8)] == [HELLO]
    pairs = [
        {"prompt": "Hello", "chosen": "Hi", "rejected": "No"},
        {"chosen": [user("Hello"), answer("Hi")], "rejected": [user("Hello"), answer("No")]},
        {
            "prompt": "Hello",
            "chosen": [system("Be terse"), user("Hello"), answer("Hi")],
            "rejected": [user("Hello"), answer("No")],
        },
    ]
    path = write(tmp_path / "p.jsonl", *({"system": "Be terse", **pair} for pair in pairs))
    for pair in read_pairs(path, 8):
        assert pair.chosen.turns == told and pair.rejected.turns[:2] == told[:2]
    own = [system("Be terse"), user("Hello"), answer("Hi")]
    pairs = [
        {"prompt": "Hello", "chosen": own, "rejected": [*own[:2], answer("No")]},
        {"prompt": own[:2], "chosen": own[1:], "rejected": [*own[:2], answer("No")]},
        {"prompt": own[:2], "chosen": "Hi", "rejected": [answer("No")]},
    ]
    for pair in read_pairs(write(tmp_path / "s.jsonl", *pairs), 8):
        assert pair.chosen.turns == told and pair.rejected.turns[:2] == told[:2]
    (asked,) = read_asked(write(tmp_path / "q.jsonl", {"system": "Be terse", "prompt": "Hello"}), 8)
    assert asked.turns == told[:2]


def test_fields_that_mean_the_same_must_agree(tmp_path):
    rounds = [user("Hello"), answer("Hi")]
    chats = [  # as in UltraChat
        {"prompt": "Hello", "messages": rounds},
        {"prompt": "Hello", "messages": [system("Be kind"), *rounds]},
        {"messages": rounds, "conversations": [{"from": "human", "value": "Hello"}]},
    ]
    read = list(read_chats(write(tmp_path / "a.jsonl", *chats), 8))
    assert [chat.turns[-2:] for chat in read] == [HELLO] * 3
    pair = {"prompt": "Hello", "messages": rounds, "chosen": rounds}  # as in UltraFeedback
    pair["rejected"] = [user("Hello"), answer("No")]
    (read,) = read_pairs(write(tmp_path / "p.jsonl", pair), 8)
    assert read.chosen.turns == HELLO and read.rejected.turns[-1].text == "No"


def test_an_answer_keeps_its_indentation(tmp_path):
    texts = {"    return x\n": "    return x", "\n \n\tx\n  y": "\tx\n  y", " Hi ": "Hi"}
    lines = [{"prompt": " Hello ", "response": text} for text in texts]
    read = list(read_chats(write(tmp_path / "a.jsonl", *lines), 8))
    assert [chat.turns[1].text for chat in read] == list(texts.values())
    assert {chat.turns[0].text for chat in read} == {"Hello"}


def test_what_is_not_read_is_counted(tmp_path):
    turns = [user("Hello"), {**answer("Hi"), "weight": 0}]
    lines = [{"messages": turns, "margin": 1}, b"", {"messages": turns, "margin": 2}, b" "]
    unread = Counter()
    assert len(list(read_chats(write(tmp_path / "a.jsonl", *lines), 8, unread))) == 2
    assert unread == {"blank lines": 2, "field 'margin'": 2, "field 'weight' of a turn": 2}


BAD_CHATS = {
    "json": [
        *(b"{", b"[1]", b'"text"', b'{"messages": "\xff"}', b"\x00\x01"),
        b'{"prompt": "Hello", "response": "Hi", "id": ' + b"1" * 5000 + b"}",
    ],
    "form": [
        *({"text": "Hello"}, {"messages": "Hello"}, {"messages": ["Hello"]}, {}),
        {"prompt": "Hello", "completion": "Hi"},
        {"instruction": "Hello", "input": "", "output": "Hi"},
        {"question": "Hello", "answer": "Hi"},
        {"prompt": "Bye", "messages": [user("Hello"), answer("Hi")]},
        {"system": "a", "messages": [system("b"), user("Hello"), answer("Hi")]},
        {"system": "a", "system_prompt": "b", "prompt": "Hello", "response": "Hi"},
        {"system": 1, "prompt": "Hello", "response": "Hi"},
        {"messages": [{**user("Hello"), "value": "Bye"}, answer("Hi")]},
        {"messages": [{**user("Hello"), "from": "gpt"}, answer("Hi")]},
    ],
    "role": [{"messages": [{"role": "cook", "content": "x"}]}, {"messages": [{"content": "x"}]}],
    "empty": [
        {"prompt": " ", "response": "Hi"},
        {"prompt": "Hello", "response": "\n"},
        {"messages": [user("Hello"), {"role": "assistant", "content": None}]},
    ],
    "order": [
        {"messages": [answer("Hi"), user("Hello")]},
        {"messages": [user("Hello")]},
        {"prompt": "Hello"},
        {"messages": []},
        {"messages": [user("Hello"), user("Hello"), answer("Hi")]},
        {"messages": [user("Hello"), answer("Hi"), answer("Hi")]},
        {"messages": [{"role": "system", "content": "Be kind"}]},
        {"messages": [user("a"), {"role": "system", "content": "b"}, answer("c")]},
    ],
    "rounds": [{"messages": [user("a"), answer("b")] * 9}],
}


@pytest.mark.parametrize(
    ("reason", "record"), [(r, record) for r, records in BAD_CHATS.items() for record in records]
)
def test_a_bad_chat_is_named_with_its_remedy(tmp_path, reason, record):
    path = write(tmp_path / "a.jsonl", {"prompt": "Hello", "response": "Hi"}, record)
    good, bad = read_chats(path, 8)
    assert good.turns == HELLO
    assert isinstance(bad, ChatError) and bad.reason == reason
    assert str(bad).startswith(f"{path}:2: ") and str(bad).endswith(REMEDIES[reason])


def test_eight_rounds_and_a_system_turn_are_fine(tmp_path):
    system = {"role": "system", "content": "Be kind"}
    path = write(tmp_path / "a.jsonl", {"messages": [system, *[user("a"), answer("b")] * 8]})
    (chat,) = read_chats(path, 8)
    assert chat.rounds == 8 and chat.turns[0].role == "system"


BAD_PAIRS = {
    "equal": [{"prompt": "Hello", "chosen": "Hi", "rejected": " Hi "}],
    "form": [
        {"prompt": "Hello", "chosen": "Hi"},
        {"prompt": "Hello", "chosen": "Hi", "rejected": 3},
        {"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("d")]},
    ],
    "empty": [{"prompt": "Hello", "chosen": "Hi", "rejected": ""}],
    "order": [
        {"chosen": "Hi", "rejected": "No"},
        {"prompt": "a", "chosen": [user("b"), answer("c")], "rejected": [user("b"), answer("d")]},
    ],
    "json": [b"no"],
}


@pytest.mark.parametrize(
    ("reason", "record"), [(r, record) for r, records in BAD_PAIRS.items() for record in records]
)
def test_a_bad_pair_is_named_with_its_remedy(tmp_path, reason, record):
    (bad,) = read_pairs(write(tmp_path / "a.jsonl", record), 8)
    assert (
        isinstance(bad, ChatError) and bad.reason == reason and f"{tmp_path}/a.jsonl:1" in str(bad)
    )


def test_questions_end_with_a_question(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Hello"}, {"messages": [user("a"), answer("b")]})
    with pytest.raises(ChatError, match=r"a\.jsonl:2: the last turn is of assistant"):
        read_asked(path, 8)
    assert question(" Hello ").turns == (Turn("user", "Hello"),)
    with pytest.raises(ChatError, match="empty"):
        question(" ")


def test_known_forms_are_named(tmp_path):
    for line, words in (
        ({"prompt": "a", "completion": "b"}, "a line of TRL; name the completion `response`"),
        ({"instruction": "a", "output": "b"}, "a line of Alpaca"),
        ({"question": "a", "answer": "b"}, "name them `prompt` and `response`"),
    ):
        (bad,) = read_chats(write(tmp_path / "a.jsonl", line), 8)
        assert words in str(bad)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(TextError, match=r"a\.txt has an unknown ending; accepted: \.jsonl"):
        list(read_chats(str(tmp_path / "a.txt"), 8))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 10_000)[:-9])
    with pytest.raises(TextError, match="truncated or damaged"):
        list(read_chats(str(tmp_path / "a.jsonl.gz"), 8))
