"""Special tokens of downloaded tokenizers by family."""

import pytest

from m3jax.text.special_tokens import choose_special

SMOLLM2 = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
    *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"),
    *("<jupyter_script>", "<empty_output>"),
]
LLAMA3 = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|eot_id|>"),
]
QWEN2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>", "<|box_end|>"]
MISTRAL3 = ["<unk>", "<s>", "</s>", "[INST]", "[control_8]"]


@pytest.mark.parametrize(
    ("names", "end", "found", "neutral"),
    [
        (
            SMOLLM2,
            "<|im_end|>",
            ("<jupyter_output>", "<empty_output>", "<jupyter_script>", "<|im_end|>"),
            "bm",
        ),
        (
            LLAMA3,
            "<|eot_id|>",
            (LLAMA3[4], LLAMA3[0], LLAMA3[3], "<|eot_id|>"),
            "m",
        ),
        (LLAMA3, None, (LLAMA3[4], LLAMA3[0], LLAMA3[3], "<|end_of_text|>"), "m"),
        (QWEN2, "<|endoftext|>", (None, QWEN2[4], QWEN2[3], "<|endoftext|>"), "pbm"),
        (MISTRAL3, "</s>", ("<unk>", "<s>", "[control_8]", "</s>"), "m"),
        (["<unk>", "<s>", "</s>"], "</s>", ("<unk>", "<s>", None, "</s>"), "m"),  # Llama 2
        (["<|endoftext|>"], "other", (None, None, None, "<|endoftext|>"), "pbm"),  # GPT-2
        ([], None, (None, None, None, None), "pbme"),
    ],
)
def test_tokens_of_families(
    names: list[str], end: str | None, found: tuple[str | None, ...], neutral: str
) -> None:
    special = choose_special(names, end)
    assert special.names == found
    assert "".join(x for x, new in zip("pbme", special.neutral, strict=True) if new) == neutral
