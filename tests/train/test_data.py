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
    batch = Stream(read(tmp_path, documents), order, 21).batch(first=1, rows=3)
    flat = [(d, i, token) for d in order for i, token in enumerate(documents[d])]
    for row in range(3):
        shown = flat[21 + row * 21 : 21 + row * 21 + 22]
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


def with_masks(tmp_path, documents, rng) -> tuple[Documents, list[list[bool]]]:
    masks = [(rng.random(len(document)) < 0.4).tolist() for document in documents]
    np.save(tmp_path / "documents.learnt.npy", np.concatenate(masks))
    return read(tmp_path, documents), masks


def test_where_only_parts_are_learnt_documents_stand_whole_in_their_rows(tmp_path, rng):
    documents = [[i, *rng.integers(3, 320, rng.integers(0, 30)).tolist(), END] for i in range(3, 63)]
    data, masks = with_masks(tmp_path, documents, rng)
    training = TrainingData(data, rows=2, length=32, seed=int(rng.integers(1000)))
    orders = []
    for epoch in range(2):
        found = []
        for step in range(training.steps_per_epoch):
            batch = training.batch(epoch * training.steps_per_epoch + step)
            for tokens, positions, segments, targets in zip(*batch, strict=True):
                assert (targets[segments < 0] == IGNORED).all()
                for segment in range(segments.max() + 1):
                    shown = segments == segment
                    index = tokens[shown][0] - 3
                    assert tokens[shown].tolist() == documents[index]
                    assert positions[shown].tolist() == list(range(len(documents[index])))
                    pairs = zip(documents[index][1:], masks[index][1:], strict=True)
                    assert targets[shown].tolist() == [t if learnt else IGNORED for t, learnt in pairs] + [IGNORED]
                    found.append(index)
        assert len(set(found)) == len(found) > 50
        orders.append(found)
    assert orders[0] != orders[1]
    heldout = heldout_batches(data, 2, 32)
    assert sum((b.targets != IGNORED).sum() for b in heldout) == sum(sum(mask[1:]) for mask in masks)


def test_what_is_learnt_must_fit_the_documents(tmp_path, rng):
    documents = make_documents(rng, 20)
    data, _ = with_masks(tmp_path, documents, rng)
    with pytest.raises(UserError, match="has [0-9]+ tokens, and rows have 8: make sequence_length larger"):
        TrainingData(data, rows=1, length=8, seed=0)
    other = write(tmp_path / "other.npy", documents)
    with pytest.raises(UserError, match="only some have a file .learnt.npy"):
        read_documents([tmp_path / "documents.npy", other], END, 320)
    np.save(tmp_path / "other.learnt.npy", np.ones(3, bool))
    with pytest.raises(UserError, match="other.learnt.npy: expected a bool for each"):
        read_documents([other], END, 320)


def test_packed_documents_never_see_each_other(tmp_path, tiny_config, rng):
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, single(), seed=int(rng.integers(1000)), scale=0.2)

    def logits(batch: Batch):
        def attend(q, k, v, cache):
            return packed_attention(q, k, v, jnp.asarray(batch.segments)), cache

        return np.asarray(model.logits(model(batch.tokens, batch.positions, attend, backends=Backends("dense")).hidden))

    documents = [rng.integers(3, 320, n).tolist() + [END] for n in (9, 14, 7)]
    batch = Stream(read(tmp_path, documents), np.arange(3), 32).batch(0, 1)
    before = logits(batch)[0]
    documents[1] = rng.integers(3, 320, 14).tolist() + [END]
    after = logits(Stream(read(tmp_path, documents), np.arange(3), 32).batch(0, 1))[0]
    changed = np.zeros(32, bool)
    changed[10:25] = True
    np.testing.assert_array_equal(before[~changed], after[~changed])
    assert (before[10:24] != after[10:24]).any()

    alone = Stream(read(tmp_path, documents), np.array([2]), 7).batch(0, 1)
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
