"""Attention over pages and over packed sequences, against a float64 reference on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    dynamic_validate_inputs,
    ref_ragged_paged_attention,
)

from ernie_jax.engine.batching import Run, build_batch
from ernie_jax.errors import UserError
from ernie_jax.ops import (
    attention,
    check_attention_backend,
    default_attention_backend,
    packed,
    packed_attention,
    paged_attention,
)
from ernie_jax.ops.pages import ScaledPages, quantize_heads, round_to

K, R, H, PAGE = 2, 3, 16, 8


def reference(q, k, v, visible):
    """Attend q [Tq, K, R, H] over k, v [Tk, K, H] where visible [Tq, Tk]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("qkrh,skh->krqs", q, k) / np.sqrt(H)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("krqs,skh->qkrh", weights / weights.sum(-1, keepdims=True), v)


def heads(rng, tokens, dtype):
    shapes = ((tokens, K, R, H), (tokens, K, H), (tokens, K, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# A prefill chunk that continues, a decode step, a fresh prompt, a long decode: (cached before, new tokens).
MIXTURE = [(13, 9), (30, 1), (0, 17), (90, 1)]


def describe(runs, tokens, decode=0):
    query = max((len(run.tokens) for run in runs), default=1)
    sizes = {"tokens": tokens, "rows": len(runs) + 2, "pages": 16, "query": query, "decode": decode}
    return build_batch(runs, **sizes, page_size=PAGE, scratch_page=63)


def stored(x, dtype):
    """Return numbers [..., H] as pages of a dtype hold them, and their scales [...]."""
    x = np.asarray(x, np.float32)
    if dtype == jnp.int8:
        largest = np.abs(x).max(-1)
        return np.rint(x * (np.float32(127) / largest)[..., None]).astype(np.int8), largest * np.float32(1 / 127)
    if dtype == jnp.float8_e4m3fn:
        x = np.clip(x, -448, 448)
    return np.asarray(x, dtype), np.ones(x.shape[:-1], np.float32)


def worth(values, scales):
    """Return the numbers that stored ones stand for."""
    return np.asarray(values, np.float64) * np.asarray(scales, np.float64)[..., None]


def check(mixture, dtype, bound, rng, run, decode=0, kv_dtype=None):
    """Compare run(q, k, v, pages, batch) with float64, for (cached before, new tokens) of each sequence."""
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    num_pages = 64
    order = rng.permutation(num_pages - 1).tolist()  # pages in no order; the last page is scratch
    pages, scales = stored(rng.normal(size=(num_pages, PAGE, 2 * K, H)), kv_dtype)  # stale content everywhere
    histories, runs = [], []
    for cached, new in mixture:
        mine = [order.pop() for _ in range(-(-(cached + new) // PAGE))]
        old = stored(np.stack(heads(rng, cached, dtype)[1:], 2).reshape(cached, 2 * K, H), kv_dtype)
        for position in range(cached):
            place = mine[position // PAGE], position % PAGE
            pages[place], scales[place] = (part[position] for part in old)
        histories.append(old)
        runs.append(Run([0] * new, cached, mine))
    total = sum(new for _, new in mixture)
    batch = describe(runs, total + 5, decode)
    q, k, v = heads(rng, total + 5, dtype)
    given = jnp.asarray(pages)
    if kv_dtype == jnp.int8:
        given = ScaledPages(given, jnp.asarray(scales.swapaxes(1, 2)))
    out, written = run(q, k, v, given, batch)
    if kv_dtype == jnp.int8:
        written, found = np.asarray(written.values), np.asarray(written.scales).swapaxes(1, 2)
    else:
        written, found = np.asarray(written), scales
    assert np.isfinite(np.asarray(out, np.float32)).all()
    live = np.flatnonzero(batch.kv_lengths)
    for (cached, new), old, row, place in zip(mixture, histories, runs, live, strict=True):
        here = np.flatnonzero(batch.rows == place)
        assert len(here) == new
        added = stored(np.stack([k[here], v[here]], 2).reshape(new, 2 * K, H), kv_dtype)
        values, scale = (np.concatenate(pair) for pair in zip(old, added, strict=True))
        visible = np.arange(cached + new) <= (cached + np.arange(new))[:, None]
        expected = reference(q[here], *np.moveaxis(worth(values, scale).reshape(-1, K, 2, H), 2, 0), visible)
        error = np.linalg.norm(np.asarray(out[here], np.float64) - expected) / np.linalg.norm(expected)
        assert error < bound
        np.testing.assert_array_equal(written[row.pages].reshape(-1, 2 * K, H)[: cached + new], values)
        np.testing.assert_array_equal(found[row.pages].reshape(-1, 2 * K)[: cached + new], scale)
    used = {page for row in runs for page in row.pages}
    others = [page for page in range(num_pages - 1) if page not in used]
    np.testing.assert_array_equal(written[others], pages[others])
    np.testing.assert_array_equal(found[others], scales[others])


MIXTURES = pytest.mark.parametrize(
    "mixture", [MIXTURE, [(90, 1), (3, 1), (50, 1)], [(40, 33)]], ids=["mixed", "decode", "chunk"]
)
SMALL = pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "fp8"])
DTYPES = pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])


@DTYPES
@pytest.mark.parametrize("block", [16, 2048], ids=["many blocks", "one block"])
@MIXTURES
def test_paged_attention_matches_float64(mixture, block, dtype, bound, rng, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    check(mixture, dtype, bound, rng, jax.jit(paged_attention))


@DTYPES
def test_the_decoding_part_may_be_apart(dtype, bound, rng):
    """Two of four rows are in use, and the kernel's part is computed by itself."""
    mixture = [(30, 1), (90, 1), (13, 9), (0, 17)]
    check(mixture, dtype, bound, rng, jax.jit(paged_attention), decode=4)


@DTYPES
@SMALL
@MIXTURES
def test_pages_in_8_bits(mixture, kv_dtype, dtype, bound, rng, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 16)
    check(mixture, dtype, bound, rng, jax.jit(paged_attention), kv_dtype=kv_dtype)


@SMALL
def test_pages_in_8_bits_with_the_decoding_part_apart(kv_dtype, rng):
    mixture = [(30, 1), (90, 1), (13, 9), (0, 17)]
    check(mixture, jnp.float32, 2e-6, rng, jax.jit(paged_attention), decode=4, kv_dtype=kv_dtype)


@SMALL
def test_numbers_that_8_bits_do_not_hold(kv_dtype):
    """Nothing becomes NaN: a head of zeros, some beyond the largest fp8, and some below the least."""
    x = jnp.asarray([[0.0] * H, [1000.0, *[-1.0] * (H - 1)], [1e-37, *[0.0] * (H - 1)]], jnp.float32)
    if kv_dtype == jnp.int8:
        found = worth(*quantize_heads(x))
        np.testing.assert_allclose(found[1], x[1], atol=1000 / 254)
        assert (found[[0, 2]] == 0).all()
    else:
        np.testing.assert_array_equal(round_to(x, kv_dtype), [[0] * H, [448, *[-1] * (H - 1)], [0] * H])


def stand_in(q, *arguments, num_kv_pages_per_block, num_queries_per_block, **options):
    """The TPU kernel by its authors' reference, with the garbage that the kernel leaves in rows of no sequence."""
    arguments = [np.asarray(argument) for argument in arguments]
    dynamic_validate_inputs(q, *map(jnp.asarray, arguments), **options)
    out = ref_ragged_paged_attention(q, jnp.asarray(arguments[0]), *arguments[1:], **options)
    return jnp.full_like(q, jnp.nan).at[: len(out)].set(out)


@DTYPES
@MIXTURES
def test_rpa_hands_the_kernel_what_it_takes(mixture, dtype, bound, rng, monkeypatch):
    """The kernel itself runs on TPUs only; tests/tpu compiles it."""
    monkeypatch.setattr(attention, "ragged_paged_attention", stand_in)
    monkeypatch.setattr(f"{__name__}.H", 128)
    check(mixture, dtype, bound, rng, lambda *arguments: paged_attention(*arguments, "rpa"))


def test_rpa_reads_fp8(rng, monkeypatch):
    monkeypatch.setattr(attention, "ragged_paged_attention", stand_in)
    monkeypatch.setattr(f"{__name__}.H", 128)
    run = lambda *arguments: paged_attention(*arguments, "rpa")  # noqa: E731
    check([(5, 3), (20, 1)], jnp.bfloat16, 1e-2, rng, run, kv_dtype=jnp.float8_e4m3fn)


def test_rpa_reads_scratch_in_a_group_without_sequences(rng, monkeypatch):
    seen = {}

    def kernel(q, pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options):
        seen.update(lengths=kv_lens, table=page_indices, starts=cu_q_lens, count=num_seqs)
        return stand_in(q, pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options)

    monkeypatch.setattr(attention, "ragged_paged_attention", kernel)
    monkeypatch.setattr(f"{__name__}.H", 128)
    pages = jnp.asarray(rng.normal(size=(64, PAGE, 2 * K, H)), jnp.float32)
    out, _ = paged_attention(*heads(rng, 4, jnp.float32), pages, describe([], 4), "rpa")
    np.testing.assert_array_equal(out, 0)
    assert seen["count"].tolist() == [1] and seen["starts"].tolist() == [0, 1, 1]
    assert seen["lengths"][0] == 1 and seen["table"][0, 0] == 63


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ((128, jnp.bfloat16, 4, jnp.int8), "takes one scale for all pages, not int8's for each token and head"),
        ((128, jnp.bfloat16, 1, jnp.float8_e4m3fn), "takes 2 or more key/value heads a shard with an 8-bit cache"),
        ((128, jnp.float32, 4, jnp.bfloat16), "takes float32 or fp8 pages of float32 heads, not bfloat16"),
    ],
)
def test_rpa_refuses_pages(heads, problem):
    with pytest.raises(UserError, match=f"attention backend rpa {problem}.*; use attention backend xla"):
        check_attention_backend("rpa", *heads)


def test_rpa_refuses_what_the_kernel_does_not_take(rng):
    pages = jnp.zeros((64, PAGE, 2 * K, H))
    with pytest.raises(UserError, match="takes heads of a multiple of 128, not of 16; use attention backend xla"):
        paged_attention(*heads(rng, 4, jnp.float32), pages, describe([], 4), "rpa")


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ((64, jnp.bfloat16, 4), "takes heads of 128, not of 64"),
        ((128, jnp.float32, 4), "takes bfloat16 heads, not float32"),
    ],
)
def test_cuda_refuses_what_the_kernel_does_not_take(heads, problem):
    with pytest.raises(UserError, match=f"attention backend cuda {problem}; use attention backend xla"):
        check_attention_backend("cuda", *heads)


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        (("tpu", 128, jnp.bfloat16, 1), "rpa"),
        (("tpu", 128, jnp.float32, 16), "rpa"),
        (("tpu", 64, jnp.bfloat16, 1), "xla"),
        (("tpu", 128, jnp.bfloat16, 3), "xla"),
        (("tpu", 128, jnp.float8_e4m3fn, 2), "xla"),
        (("tpu", 128, jnp.bfloat16, 2, jnp.float8_e4m3fn), "rpa"),
        (("tpu", 128, jnp.bfloat16, 2, jnp.int8), "xla"),
        (("gpu", 128, jnp.bfloat16, 2, jnp.int8), "cuda"),
        (("gpu", 128, jnp.float32, 2, jnp.int8), "xla"),
        (("gpu", 128, jnp.bfloat16, 3), "cuda"),
        (("gpu", 128, jnp.float32, 1), "xla"),
        (("gpu", 64, jnp.bfloat16, 1), "xla"),
        (("cpu", 128, jnp.bfloat16, 1), "xla"),
    ],
)
def test_default_backend(arguments, backend):
    assert default_attention_backend(*arguments) == backend


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_packed_attention_matches_float64(dtype, bound, rng):
    segments = np.array([[0] * 7 + [1] * 12 + [2], [4] * 20])
    q, k, v = (jnp.stack(pair) for pair in zip(heads(rng, 20, dtype), heads(rng, 20, dtype), strict=True))
    out = np.asarray(packed_attention(q, k, v, jnp.asarray(segments)), np.float64)
    for row in range(2):
        visible = np.tri(20, dtype=bool) & (segments[row][:, None] == segments[row])
        expected = reference(q[row], k[row], v[row], visible)
        assert np.linalg.norm(out[row] - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize("length", [64, 90])
def test_long_packed_rows_are_those_of_short_ones(length, monkeypatch, rng):
    """In blocks and at once, values and gradients are the same."""
    q = jnp.asarray(rng.normal(size=(2, length, 2, 3, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(-1, 4, (2, length)))[:, ::-1] * -1)
    pull = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def attend():
        def loss(q, k, v):
            out = packed_attention(q, k, v, segments)
            return jnp.sum(out * pull), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    expected = attend()
    monkeypatch.setattr(packed, "_WHOLE_ROW", 16)
    monkeypatch.setattr(packed, "_QUERIES", 4)
    for found, one in zip(jax.tree.leaves(attend()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, one, atol=2e-5)


def test_scores_of_long_packed_rows_are_not_held():
    rows = (jax.ShapeDtypeStruct((1, 8192, *heads, 16), jnp.float32) for heads in ((1, 2), (1,), (1,)))
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(q, k, v, segments):
        return packed_attention(q, k, v, segments).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*rows, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 8192 * 8192 * 4 / 4
