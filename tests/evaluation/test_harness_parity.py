"""Without memory, our model in the harness scores as its own Hugging Face model on our weights."""

import warnings

import numpy as np
import pytest
from model.oracle import oracle_config, random_params
from tolerance import close

from m3jax.evaluation.task_files import LocalTask
from m3jax.inference import session as session_module
from m3jax.inference.session import Session
from m3jax.model.hf import write_folder
from m3jax.text.tokenizer import BOS, END, Tokenizer

pytestmark = pytest.mark.parity

ROW = 24
TEXT = "the quick brown fox jumps over the lazy dog and the cat sits on the red mat. "


@pytest.fixture(scope="module")
def both(tmp_path_factory, require):
    """The same weights and tokenizer as our model of the harness, and as the harness's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        torch, transformers = require("torch"), require("transformers")
        require("lm_eval"), require("accelerate")
        from lm_eval.models.huggingface import HFLM

        from m3jax.evaluation.lm_eval.model import HarnessModel
    folder = tmp_path_factory.mktemp("harness_parity")
    config = oracle_config(
        model__prefix="with_memory",
        model__vocabulary=300,
        text__vocabulary=300,
        data__sequence_length=ROW,
    )
    params = random_params(config)
    tokenizer = Tokenizer.train([TEXT * 4], 300, 2)
    assert tokenizer.size <= config.model.vocabulary
    tokenizer.save(folder / "tokenizer")
    write_folder(folder / "llama", config.model, config.memory, params, positions=ROW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "restore_params", lambda *_, **__: (params, {"step": 0}))
        ours = HarnessModel(Session(config, folder), "none", batch_size=4)
    from tokenizers import Tokenizer as Plain
    from tokenizers.processors import TemplateProcessing

    plain = Plain.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "llama", dtype=torch.float32, attn_implementation="eager"
        )
        model.config.eos_token_id = model.generation_config.eos_token_id = END
        theirs = HFLM(
            pretrained=model,
            tokenizer=transformers.PreTrainedTokenizerFast(
                tokenizer_object=plain,
                bos_token="<s>",
                eos_token="</s>",
                pad_token="<pad>",
                clean_up_tokenization_spaces=False,
            ),
            backend="causal",
            batch_size=3,
            device="cpu",
            max_length=ROW,
            add_bos_token=True,
        )
    return ours, theirs


def ask(model, kind, *arguments):
    from lm_eval.api.instance import Instance

    given = [Instance(kind, {}, one, 0, ("t", n, 1)) for n, one in enumerate(arguments)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(model, kind)(given, disable_tqdm=True)


def test_log_likelihoods(both):
    arguments = [
        ("the quick brown", " fox"),
        ("the quick brown ", "fox jumps over"),
        ("and the cat", " dog"),
        ("\nq", "zz"),
    ]
    ours, theirs = (ask(model, "loglikelihood", *arguments) for model in both)
    close([x for x, _ in ours], [x for x, _ in theirs], 1e-4)
    assert [bool(x) for _, x in ours] == [bool(x) for _, x in theirs]
    ours, theirs = (ask(model, "loglikelihood", ("", "the cat")) for model in both)
    assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-4)


def test_rolling_log_likelihoods_of_texts_longer_than_a_row(both, monkeypatch):
    # With its own BOS the harness's model scores two of them: the second given the first.
    monkeypatch.setattr(both[1], "add_bos_token", False)
    texts = [(TEXT * 3,), ("the red mat",)]
    assert len(both[0].tok_encode(TEXT * 3)) > 2 * ROW
    ours, theirs = (ask(model, "loglikelihood_rolling", *texts) for model in both)
    close(ours, theirs, 1e-4)


def test_generated_texts(both):
    settings = {"until": ["x"], "max_gen_toks": 8, "do_sample": False}
    prompts = [("the quick brown", settings), ("the red mat.", settings), ("dog", settings)]
    ours, theirs = (ask(model, "generate_until", *prompts) for model in both)
    assert ours == theirs and any(ours)


def test_a_task(both):
    from lm_eval.evaluator import evaluate

    from m3jax.evaluation.lm_eval.run import as_harness_task

    words = TEXT.replace(".", "").split()
    random = np.random.default_rng(0)
    docs = [
        {
            "text": " ".join(random.choice(words, 4)),
            "choices": random.choice(words, 3).tolist(),
            "gold": int(random.integers(3)),
        }
        for _ in range(20)
    ]
    task = LocalTask("words", "choice", docs)
    found = []
    for model in both:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = evaluate(
                model, {"tasks": {"words": as_harness_task(task, 1)}}, bootstrap_iters=0
            )
        samples = sorted(result["samples"]["words"], key=lambda one: one["doc_id"])
        scores = [float(score) for one in samples for score, _ in one["filtered_resps"]]
        found.append(
            (scores, [one["acc"] for one in samples], [one["arguments"] for one in samples])
        )
    close(found[0][0], found[1][0], 1e-4)
    assert found[0][1:] == found[1][1:] and 0 < np.mean(found[0][1]) < 1
