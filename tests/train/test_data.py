"""Packing: what a batch holds, and that documents in one row never see each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.model import Backends, Ernie, initialize
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import single
from ernie_jax.train.data import Batch, Documents, Stream, TrainingData, heldout_batches, read_documents
from ernie_jax.train.losses import IGNORED

END = 2


def make_documents(rng, count, longest=40) -> list[list[int]]:
    return [[*rng.integers(3, 320, rng.integers(0, longest)).tolist(), END] for _ in range(count)]


def write(path, documents):
    np.save(path, np.concatenate(documents).astype(np.uint16))
    return path


def read(tmp_path, documents) -> Documents:
    return read_documents([write(tmp_path / "documents.npy", documents)], END, 320)


def test_batches_are_the_stream_cut_into_rows(tmp_path, rng):
    documents = make_documents(rng, 30)
    order = rng.permutation(30)
    batch = Stream(read(tmp_path, documents), order).batch(start=21, rows=3, length=50)
    flat = [(d, i, token) for d in order for i, token in enumerate(documents[d])]
    for row in range(3):
        shown = flat[21 + row * 50 : 21 + row * 50 + 51]
        seen = []
        for t, ((document, index, token), after) in enumerate(zip(shown, shown[1:], strict=False)):
            if document not in seen:
                seen.append(document)
                first = index
            assert batch.tokens[row, t] == token
            assert batch.segments[row, t] == len(seen) - 1
            assert batch.positions[row, t] == index - first
            assert batch.targets[row, t] == (after[2] if after[0] == document else IGNORED)


def test_an_epoch_shows_every_document_once_in_an_order_of_its_own(tmp_path, rng):
    documents = [[i, END] for i in range(3, 103)]
    data = TrainingData(read(tmp_path, documents), rows=2, length=20, seed=int(rng.integers(1000)))
    assert data.steps_per_epoch == 4
    epochs = [
        np.concatenate([data.batch(step).tokens.reshape(-1) for step in range(e * 4, e * 4 + 4)]) for e in range(2)
    ]
    for tokens in epochs:
        assert len(set(tokens[::2].tolist())) == 80
    assert epochs[0].tolist() != epochs[1].tolist()
    np.testing.assert_array_equal(data.batch(1).tokens.reshape(-1), epochs[0][40:80])


def test_heldout_batches_show_every_target_once(tmp_path, rng):
    documents = make_documents(rng, 25)
    targets = np.concatenate([b.targets.reshape(-1) for b in heldout_batches(read(tmp_path, documents), 2, 32)])
    expected = sorted(token for document in documents for token in document[1:])
    assert sorted(targets[targets != IGNORED].tolist()) == expected


def test_packed_documents_never_see_each_other(tmp_path, tiny_config, rng):
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, single(), seed=int(rng.integers(1000)), scale=0.2)

    def logits(batch: Batch):
        def attend(q, k, v, cache):
            return packed_attention(q, k, v, jnp.asarray(batch.segments)), cache

        return np.asarray(model.logits(model(batch.tokens, batch.positions, attend, backends=Backends("dense")).hidden))

    documents = [rng.integers(3, 320, n).tolist() + [END] for n in (9, 14, 7)]
    batch = Stream(read(tmp_path, documents), np.arange(3)).batch(0, 1, 32)
    before = logits(batch)[0]
    documents[1] = rng.integers(3, 320, 14).tolist() + [END]
    after = logits(Stream(read(tmp_path, documents), np.arange(3)).batch(0, 1, 32))[0]
    changed = np.zeros(32, bool)
    changed[10:25] = True
    np.testing.assert_array_equal(before[~changed], after[~changed])
    assert (before[10:24] != after[10:24]).any()

    alone = Stream(read(tmp_path, documents), np.array([2])).batch(0, 1, 7)
    np.testing.assert_allclose(logits(alone)[0], after[25:], atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not numpy", "not a .npy file"),
        (np.zeros((2, 2), np.int32), "expected a row of token ids"),
        (np.array([1.5, 2.0]), "expected a row of token ids"),
        (np.array([5, 6]), "not closed by the end token 2"),
        (np.array([400, END]), "do not fit vocab_size 320"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=f"bad.npy: .*{message}"):
        read_documents([path], END, 320)


def test_too_little_data_for_a_batch(tmp_path, rng):
    with pytest.raises(UserError, match="less than one batch"):
        TrainingData(read(tmp_path, [[5, END]]), rows=2, length=16, seed=0)
