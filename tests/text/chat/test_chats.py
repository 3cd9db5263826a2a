"""Chats and pairs from JSON lines: every form, and every mistake by file and line."""

import gzip
import json

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


BAD_CHATS = {
    "json": [
        *(b"{", b"[1]", b'"text"', b'{"messages": "\xff"}', b"\x00\x01"),
        b'{"prompt": "Hello", "response": "Hi", "id": ' + b"1" * 5000 + b"}",
    ],
    "form": [{"text": "Hello"}, {"messages": "Hello"}, {"messages": ["Hello"]}, {}],
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


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(TextError, match=r"not JSON lines; give \.jsonl"):
        list(read_chats(str(tmp_path / "a.txt"), 8))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 10_000)[:-9])
    with pytest.raises(TextError, match="truncated or damaged"):
        list(read_chats(str(tmp_path / "a.jsonl.gz"), 8))
