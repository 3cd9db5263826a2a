"""Which tokens are kept: against loops over one reference at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import close

from m3jax.memory.sparsify import (
    received_weights,
    reconstruction_weights,
    select,
    sparsify,
    token_weights,
)
from m3jax.model.attention_mask import KeyValues
from m3jax.model.layer import EncodedReferences, Heads

R, W, K, G, H, P = 4, 9, 2, 3, 4, 4
LENGTHS = (9, 5, 2, 0)
USABLE = np.arange(W) < np.array(LENGTHS)[:, None]
RULES = ("exact", "approximate", "received", "reconstruction")
COUNTS = (None, (4, 1), (0, 3))


def arrays(seed: int = 0, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(R, W, K, G, H)), random.normal(size=(R, W, K, H))
    return jnp.asarray(scale * q, jnp.float32), jnp.asarray(k, jnp.float32)


def encoded(
    prefix: int = 2,
    counts: tuple[int, ...] | None = None,
    slots: int = P,
    scale: float = 1.0,
    seed: int = 11,
) -> EncodedReferences:
    """Random heads of references with copies, all of them unrelated to each other.

    So a rule that takes the wrong ones, or those of padding, does not agree with its loop.
    """
    random = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(scale * random.normal(size=shape), jnp.float32)

    q, plain_q = array(R, 2 * W, K, G, H), array(R, 2 * W, K, G, H)
    k, v, plain_k = array(R, 2 * W, K, H), array(R, 2 * W, K, H), array(R, 2 * W, K, H)
    constant = KeyValues(array(prefix, K, H), array(prefix, K, H)) if prefix else None
    heads, behind = Heads(q, k, v, plain_q, plain_k), array(R, W, K, G, H)
    counts_K = None if counts is None else jnp.asarray(counts)
    return EncodedReferences(heads, behind, constant, jnp.asarray(USABLE), slots, counts_K)


def double(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def loops(q: Any, k: Any, selection: str) -> np.ndarray:
    """w of Memory³ §3.3 in float64, each reference cut to its usable tokens."""
    q, k = double(q), double(k)
    result = np.full((R, K, W), -np.inf)
    for r, head in np.ndindex(R, K):
        n = LENGTHS[r]
        result[r, head, :n] = 0
        for g in range(G):
            for i in range(n):
                scores = np.exp([q[r, i, head, g] @ k[r, j, head] / H**0.5 for j in range(n)])
                result[r, head, :n] += scores / scores.sum() if selection == "exact" else scores
    return result


def received_loops(e: EncodedReferences) -> np.ndarray:
    """Attention from behind, times the size of each value."""
    result = loops(e.behind_q, e.heads.k, "exact")
    for r, head in np.ndindex(R, K):
        for j in range(LENGTHS[r]):
            result[r, head, j] *= np.sqrt(np.sum(double(e.heads.v)[r, j, head] ** 2))
    return result


def reconstruction_loops(e: EncodedReferences) -> np.ndarray:
    """The most that a token of the copy, which begins at the reference's end, pays to a token."""
    q, k, result = double(e.heads.q), double(e.heads.k), np.full((R, K, W), -np.inf)
    for r, head in np.ndindex(R, K):
        n = LENGTHS[r]
        result[r, head, :n] = 0
        for i in range(n, 2 * n):  # the copy's tokens
            keys = [k[r, j, head] for j in range(i + 1)]
            if e.prefix is not None:
                keys += list(double(e.prefix.keys)[:, head])
            for g in range(G):
                scores = np.exp([q[r, i, head, g] @ key / H**0.5 for key in keys])
                attention = (scores / scores.sum())[:n]
                result[r, head, :n] = np.maximum(result[r, head, :n], attention)
    return result


def weights_by_loops(e: EncodedReferences, rule: str) -> np.ndarray:
    if rule in ("exact", "approximate"):
        return loops(e.heads.plain_q, e.heads.plain_k, rule)
    return received_loops(e) if rule == "received" else reconstruction_loops(e)


def kept_by_loops(e: EncodedReferences, rule: str, each: int = 0) -> list[list[list[int]]]:
    """Of every reference and head the tokens kept, ascending."""
    weights, first = weights_by_loops(e, rule), received_loops(e)
    kept: list[list[list[int]]] = []
    for r in range(R):
        kept.append([])
        for head in range(K):
            count = e.slots if e.counts_K is None else int(e.counts_K[head])
            left = list(range(LENGTHS[r]))
            taken = sorted(left, key=lambda j: -first[r, head, j])[: min(each, count)]  # noqa: B023
            left = [j for j in left if j not in taken]
            left.sort(key=lambda j: -weights[r, head, j])  # noqa: B023
            kept[-1].append(sorted(taken + left[: count - len(taken)]))
    return kept


# -- weights


def test_exact_weights() -> None:
    q, k = arrays()
    found = np.asarray(token_weights(q, k, jnp.asarray(USABLE), "exact"))
    expected = loops(q, k, "exact")
    close(found, expected)
    # Every usable query gives one unit of attention for each query head.
    total = np.where(USABLE[:, None], found, 0).sum(-1)
    close(total, np.broadcast_to(G * USABLE.sum(1)[:, None], (R, K)))


def test_approximate_weights_up_to_one_factor_a_head() -> None:
    q, k = arrays()
    found = np.asarray(token_weights(q, k, jnp.asarray(USABLE), "approximate"))
    expected = loops(q, k, "approximate")
    for r, head in np.ndindex(R - 1, K):
        n = USABLE[r].sum()
        factor = expected[r, head, 0] / found[r, head, 0]
        close(factor * found[r, head, :n], expected[r, head, :n])
    assert (found[3] == -np.inf).all()


def test_received_weights() -> None:
    e = encoded()
    close(received_weights(e), received_loops(e))
    # What is not a usable token's, and what other rules read, does not matter.
    read = np.pad(USABLE, ((0, 0), (0, W)))[..., None, None]
    heads = Heads(
        e.heads.plain_q,
        *(jnp.where(read, x, 50.0) for x in (e.heads.k, e.heads.v)),
        e.heads.q,
        e.heads.v,
    )
    close(received_weights(e._replace(heads=heads, prefix=None)), received_loops(e))


@pytest.mark.parametrize("prefix", [0, 2])
def test_reconstruction_weights(prefix: int) -> None:
    e = encoded(prefix)
    found = np.asarray(reconstruction_weights(e))
    close(found, reconstruction_loops(e))
    assert found.max() <= 1 and (found[3] == -np.inf).all()
    # Neither what comes behind the copy nor the reference's own queries matter.
    behind = np.arange(2 * W) >= 2 * np.array(LENGTHS)[:, None]
    own = np.arange(2 * W) < np.array(LENGTHS)[:, None]
    heads = e.heads._replace(
        q=jnp.where((own | behind)[..., None, None, None], 50.0, e.heads.q),
        k=jnp.where(behind[..., None, None], 50.0, e.heads.k),
    )
    close(reconstruction_weights(e._replace(heads=heads)), found)


@pytest.mark.parametrize("rule", RULES)
def test_large_scores_do_not_overflow(rule: str) -> None:
    e = encoded(scale=1e3)
    q, k = arrays(scale=1e4)
    weights = {
        "received": lambda: received_weights(e),
        "reconstruction": lambda: reconstruction_weights(e),
    }.get(rule, lambda: token_weights(q, k, jnp.asarray(USABLE), rule))()
    found = np.asarray(weights)
    assert np.isfinite(found[:, :, 0][:3]).all() and not np.isnan(found).any()


# -- the choice


def test_the_rules_differ() -> None:
    kept = [np.asarray(select(encoded(scale=2.0), rule)[0]) for rule in RULES]
    kept.append(np.asarray(select(encoded(scale=2.0), "reconstruction", each=2)[0]))
    for i, one in enumerate(kept):
        assert all((one != other).any() for other in kept[:i])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("rule", "each"), [*((rule, 0) for rule in RULES), *(("reconstruction", n) for n in (1, 2, 4))]
)
def test_the_heaviest_are_kept_in_reference_order(
    rule: str, each: int, counts: tuple[int, ...] | None
) -> None:
    """Each head as many as its count and the reference's length allow; the rest is zeros."""
    e = encoded(counts=counts)
    written = sparsify(e, selection=rule, each=each)
    np.testing.assert_array_equal(written.length, [4, 4, 2, 0])
    expected = kept_by_loops(e, rule, each)
    for r, head in np.ndindex(R, K):
        kept = expected[r][head]
        n = min(P if counts is None else counts[head], LENGTHS[r])
        assert list(written.indices[r, head, :n]) == kept and len(kept) == n
        for stored, source in ((written.keys, e.heads.k), (written.values, e.heads.v)):
            np.testing.assert_array_equal(stored[r, head, :n], source[r, np.array(kept, int), head])
            assert not np.asarray(stored[r, head, n:]).any()
        assert not np.asarray(written.indices[r, head, n:]).any()


@pytest.mark.parametrize(("rule", "each"), [("exact", 0), ("received", 0), ("reconstruction", 2)])
def test_more_slots_than_tokens_keep_all(rule: str, each: int) -> None:
    e = encoded(counts=(W, 7), slots=W)
    indices, length = select(e, rule, each)
    np.testing.assert_array_equal(length, LENGTHS)
    np.testing.assert_array_equal(indices[1], [[*range(5), 0, 0, 0, 0]] * 2)
    assert np.count_nonzero(np.diff(indices[0, 1][:7]) > 0) == 6 and not indices[0, 1, 7:].any()


def test_of_equal_weights_the_earlier_token_wins() -> None:
    usable = jnp.asarray([[False, True, True, True, True, False]])
    q, k = jnp.zeros((1, 6, 1, 1, 4)), jnp.zeros((1, 6, 1, 4))
    e = EncodedReferences(Heads(q, k, k, q, k), q, None, usable, 3, None)
    for rule in ("exact", "approximate", "received"):
        indices, length = select(e, rule)
        np.testing.assert_array_equal(indices, [[[1, 2, 3]]])
        np.testing.assert_array_equal(length, [3])


def test_a_mixture_of_none_or_all_is_one_rule() -> None:
    """`each` = 0 is reconstruction alone, `each` ≥ the counts attention from behind alone."""
    e = encoded(counts=(3, 4))
    alone = select(e, "received")[0]
    np.testing.assert_array_equal(select(e, "reconstruction", each=4)[0], alone)
    without, some = (select(e, "reconstruction", each=n)[0] for n in (0, 1))
    assert (without != alone).any() and (some != without).any() and (some != alone).any()


@pytest.mark.parametrize("rule", RULES)
def test_gradients_flow_to_what_is_kept_and_not_to_the_choice(rule: str) -> None:
    e = encoded(counts=(4, 1))

    def loss(heads: Heads, behind: Any, prefix: Any) -> Any:
        changed = e._replace(heads=heads, behind_q=behind, prefix=prefix)
        written = sparsify(changed, selection=rule, each=1 if rule == "reconstruction" else 0)
        return jnp.sum(written.keys) + 2 * jnp.sum(written.values)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(e.heads, e.behind_q, e.prefix)
    heads, *others = gradients
    expected = np.zeros((R, 2 * W, K))
    for r, kept in enumerate(kept_by_loops(e, rule, 1 if rule == "reconstruction" else 0)):
        for head, tokens in enumerate(kept):
            expected[r, tokens, head] = 1
    for unmoved in (heads.q, heads.plain_q, heads.plain_k, *jax.tree.leaves(others)):
        assert not np.asarray(unmoved).any()
    for gradient, factor in ((heads.k, 1), (heads.v, 2)):
        np.testing.assert_array_equal(
            gradient, np.broadcast_to(factor * expected[..., None], (R, 2 * W, K, H))
        )


@pytest.mark.parametrize("counts", COUNTS)
def test_keys_of_heads_that_keep_many_are_scaled(counts: tuple[int, ...] | None) -> None:
    given = encoded(counts=counts)
    options: Any = {"selection": "reconstruction", "each": 1}
    plain, scaled = sparsify(given, **options), sparsify(given, **options, key_scale=1.5)
    np.testing.assert_array_equal(scaled.values, plain.values)
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    for head in range(K):
        factor = 1.5 if (P if counts is None else counts[head]) > 2 else 1.0
        close(scaled.keys[:, head], factor * np.asarray(plain.keys[:, head]))
