"""Sources as text and as a page: what a document says does not act on a terminal or a page."""

import numpy as np

from m3jax.inference.attribution import AttributedReference, as_page, as_text
from m3jax.inference.generate import Generation
from m3jax.text.references import Reference
from m3jax.text.tokenizer import Tokenizer

EVIL = "\x1b[31m<script>|`\u202e\x9b\ud800"


def test_hostile_sources_and_texts_are_shown() -> None:
    tokenizer = Tokenizer.train(["<script> text. " * 9], 300, 2, 10_000)
    tokens = tokenizer.encode("\x1b[1m<script>\u202e")
    none = np.empty(0, np.int64)
    generation = Generation(EVIL, none, tokens, np.zeros(len(tokens)), EVIL, False, [])
    reference = Reference(f"{EVIL}#0", EVIL, EVIL, 0, 9, f"{EVIL}\n{EVIL}", tokens)
    sources = [AttributedReference(0, reference, (0,), 0.5, 0.1)]
    page = as_page([(generation, sources)], tokenizer)
    lines = as_text(sources)
    assert len(lines.split("\n")) == 2 and lines.count("·[31m<script>|`···") == 4
    assert page.count("·[31m&lt;script&gt;|`···") == 6 and "<script" not in page
    assert "·[1m&lt;script&gt;·" in page
    for shown in (page, lines):
        assert not set(shown) & {"\x1b", "\u202e", "\x9b", "\ud800"}
