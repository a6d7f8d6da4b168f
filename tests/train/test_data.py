"""Batches: what they hold, in which order, and that documents in one row never see each other."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.model import Backends, Ernie, initialize
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import single
from ernie_jax.train.data import Batch, Part, PreferenceData, TrainingData, claim_data
from ernie_jax.train.documents import Documents, read_documents
from ernie_jax.train.losses import IGNORED

pytestmark = pytest.mark.usefixtures("quick_compiling")

END = 2


def make_documents(rng, count, longest=40) -> list[list[int]]:
    return [[*rng.integers(3, 320, rng.integers(0, longest)).tolist(), END] for _ in range(count)]


def write(path, documents):
    np.save(path, np.concatenate(documents).astype(np.uint16))
    return path


def read(tmp_path, documents) -> Documents:
    return read_documents(write(tmp_path / "documents.npy", documents), END, 320)


def in_order(documents: Documents, rows: int, length: int) -> TrainingData:
    return TrainingData([Part((documents,))], rows, length, seed=None)


def epoch(data: TrainingData, number: int) -> list[Batch]:
    return [data.batch(step) for step in range(data.steps(number), data.steps(number + 1))]


def test_batches_are_the_stream_cut_into_rows(tmp_path, rng):
    documents = make_documents(rng, 30)
    data = in_order(read(tmp_path, documents), 3, 21)
    flat = [(d, i, token) for d, tokens in enumerate(documents) for i, token in enumerate(tokens)]
    assert data.steps(1) == -(-len(flat) // 63)
    for row in range(3 * data.steps(1)):
        batch = data.batch(row // 3)
        tokens, positions, segments, targets = (part[row % 3] for part in batch)
        shown = flat[row * 21 : row * 21 + 22]
        seen = []
        for t, (document, index, token) in enumerate(shown[:21]):
            if document not in seen:
                seen.append(document)
                first = index
            after = shown[t + 1] if t + 1 < len(shown) else (None, 0, 0)
            assert tokens[t] == token
            assert segments[t] == len(seen) - 1
            assert positions[t] == index - first
            assert targets[t] == (after[2] if after[0] == document else IGNORED)
        assert (segments[len(shown) :] == -1).all() and (targets[len(shown) :] == IGNORED).all()


def test_an_epoch_shows_every_document_once_in_an_order_of_its_own(tmp_path, rng):
    documents = [[i, END] for i in range(3, 103)]
    data = TrainingData([Part((read(tmp_path, documents),))], rows=3, length=20, seed=int(rng.integers(1000)))
    assert data.steps(1) == 4 and data.steps(2) == 8
    assert [data.epoch(step) for step in (0, 3, 4, 9)] == [0, 0, 1, 2]
    orders = [np.concatenate([batch.tokens[batch.segments >= 0] for batch in epoch(data, e)])[::2] for e in range(2)]
    for tokens in orders:
        assert sorted(tokens.tolist()) == list(range(3, 103))
    assert orders[0].tolist() != orders[1].tolist()


def test_a_batch_depends_on_seed_and_step_alone(tmp_path, rng):
    documents, seed = make_documents(rng, 60), int(rng.integers(1000))
    whole, masked = read(tmp_path, documents), with_masks(tmp_path, documents, rng)[0]
    for found in (whole, masked):
        data = TrainingData([Part((found,), 1.5)], 2, 48, seed)
        batches = [data.batch(step) for step in range(data.steps(3))]
        for step in (data.steps(3) - 1, data.steps(2), 3, 0):  # a fresh one each, as after an interruption
            np.testing.assert_array_equal(TrainingData([Part((found,), 1.5)], 2, 48, seed).batch(step), batches[step])
        other = TrainingData([Part((found,), 1.5)], 2, 48, seed + 1)
        assert any((other.batch(step).tokens != batches[step].tokens).any() for step in range(3))


def test_an_epoch_shows_each_part_as_often_as_it_is_to(tmp_path):
    often = read_documents(write(tmp_path / "a.npy", [[i, END] for i in range(3, 13)]), END, 320)
    seldom = read_documents(write(tmp_path / "b.npy", [[i, END] for i in range(100, 140)]), END, 320)
    data = TrainingData([Part((often,), 2), Part((seldom,), 0.3)], rows=1, length=8, seed=0)
    shown = [np.concatenate([b.tokens[b.segments >= 0] for b in epoch(data, e)])[::2].tolist() for e in range(10)]
    for tokens in shown:
        assert sorted(token for token in tokens if token < 100) == sorted([*range(3, 13)] * 2)
        assert sum(token >= 100 for token in tokens) == 12
    over = [token for tokens in shown for token in tokens if token >= 100]
    assert sorted(over) == sorted([*range(100, 140)] * 3)  # no document a fourth time before all came thrice


def test_an_epoch_must_show_something(tmp_path):
    with pytest.raises(UserError, match="shows no example"):
        TrainingData([Part((read(tmp_path, [[5, END]]),), 0.5)], 1, 8, 0).batch(0)


def test_heldout_batches_show_every_target_once(tmp_path, rng):
    documents = make_documents(rng, 25)
    batches = in_order(read(tmp_path, documents), 2, 32).first_epoch()
    targets = np.concatenate([b.targets.reshape(-1) for b in batches])
    expected = sorted(token for document in documents for token in document[1:])
    assert sorted(targets[targets != IGNORED].tolist()) == expected


def with_masks(tmp_path, documents, rng) -> tuple[Documents, list[list[bool]]]:
    masks = [(rng.random(len(document)) < 0.4).tolist() for document in documents]
    np.save(tmp_path / "masked.learnt.npy", np.concatenate(masks))
    return read_documents(write(tmp_path / "masked.npy", documents), END, 320), masks


def test_where_only_parts_are_learnt_documents_stand_whole_in_their_rows(tmp_path, rng):
    documents = [[i, *rng.integers(3, 320, rng.integers(0, 30)).tolist(), END] for i in range(3, 63)]
    data, masks = with_masks(tmp_path, documents, rng)
    training = TrainingData([Part((data,))], rows=2, length=32, seed=int(rng.integers(1000)))
    orders = []
    for number in range(2):
        found = []
        for batch in epoch(training, number):
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
        assert sorted(found) == list(range(60))
        orders.append(found)
    assert orders[0] != orders[1]
    heldout = in_order(data, 2, 32).first_epoch()
    assert sum((b.targets != IGNORED).sum() for b in heldout) == sum(sum(mask[1:]) for mask in masks)


def test_contents_name_what_a_batch_holds(tmp_path, rng):
    documents = [[i, *rng.integers(100, 320, rng.integers(0, 12)).tolist(), END] for i in range(3, 43)]
    first, _ = with_masks(tmp_path, documents[:25], rng)
    second = read_documents(write(tmp_path / "second.npy", documents[25:]), END, 320)
    data = TrainingData([Part((first,)), Part((second,))], 3, 24, 5)
    for step in range(data.steps(2)):
        batch = data.batch(step)
        starts = (batch.positions == 0) & (batch.segments >= 0)
        named = itertools.chain(*data.contents(step))
        assert batch.tokens[starts].tolist() == [documents[25 * part + index][0] for part, index in named]


def test_texts_too_long_for_a_row_are_cut_where_others_stand_whole(tmp_path, rng):
    masked, _ = with_masks(tmp_path, make_documents(rng, 20, 8), rng)
    long = [*range(3, 60), END]
    text = read_documents(write(tmp_path / "text.npy", [long]), END, 320)
    data = TrainingData([Part((masked,)), Part((text,))], 2, 16, 0)
    pieces = []
    for step in range(data.steps(1)):
        batch = data.batch(step)
        for row, contents in enumerate(data.contents(step)):
            for segment, (part, _) in enumerate(contents):
                if part:
                    shown = batch.segments[row] == segment
                    pieces.append((batch.tokens[row][shown].tolist(), batch.targets[row][shown].tolist()))
    pieces.sort(key=lambda piece: long.index(piece[0][0]))
    assert [token for tokens, _ in pieces for token in tokens] == long
    assert [target for _, targets in pieces for target in targets] == [*long[1:], IGNORED]


def test_pairs_stand_in_the_same_row_and_segment(tmp_path, rng):
    def side(name, numbers):
        documents = [[n, *rng.integers(100, 320, rng.integers(1, 14)).tolist(), END] for n in numbers]
        np.save(tmp_path / f"{name}.learnt.npy", np.ones(sum(map(len, documents)), bool))
        return read_documents(write(tmp_path / f"{name}.npy", documents), END, 320)

    chosen, rejected = side("chosen", range(3, 53)), side("rejected", range(3, 53))
    data = PreferenceData([Part((chosen, rejected), 1.5)], 2, 40, 1)
    shown = []
    for step in range(data.steps(2)):
        batch = data.batch(step)
        assert batch.pairs.shape == (2, data.segments)
        for row in range(2):
            count = int((batch.pairs[row] >= 0).sum())
            assert (batch.pairs[row, count:] == -1).all()
            for segment, pair in enumerate(batch.pairs[row, :count]):
                for rows, documents in ((batch.chosen, chosen), (batch.rejected, rejected)):
                    found = rows.segments[row] == segment
                    begin = documents.starts[pair]
                    expected = documents.tokens[begin : begin + documents.lengths[pair]]
                    assert rows.tokens[row][found].tolist() == expected.tolist()
            assert batch.chosen.segments[row].max() == batch.rejected.segments[row].max() == count - 1
            shown += batch.pairs[row, :count].tolist()
    assert sorted(shown) == sorted([*range(50)] * 3)


def test_packed_documents_never_see_each_other(tmp_path, tiny_config, rng):
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, single(), seed=int(rng.integers(1000)), scale=0.2)

    def logits(batch: Batch):
        def attend(q, k, v, cache):
            return packed_attention(q, k, v, jnp.asarray(batch.segments)), cache

        return np.asarray(model.logits(model(batch.tokens, batch.positions, attend, backends=Backends("dense")).hidden))

    documents = [rng.integers(3, 320, n).tolist() + [END] for n in (9, 14, 7)]
    before = logits(in_order(read(tmp_path, documents), 1, 32).batch(0))[0]
    documents[1] = rng.integers(3, 320, 14).tolist() + [END]
    after = logits(in_order(read(tmp_path, documents), 1, 32).batch(0))[0]
    changed = np.zeros(32, bool)
    changed[10:25] = True
    np.testing.assert_array_equal(before[~changed], after[~changed])
    assert (before[10:24] != after[10:24]).any()

    alone = in_order(read(tmp_path, documents[2:]), 1, 7).batch(0)
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
        read_documents(path, END, 320)


def test_what_is_learnt_must_fit_the_documents(tmp_path, rng):
    path = write(tmp_path / "other.npy", make_documents(rng, 20))
    np.save(tmp_path / "other.learnt.npy", np.ones(3, bool))
    with pytest.raises(UserError, match="other.learnt.npy: expected a bool for each"):
        read_documents(path, END, 320)


def test_data_that_changed_since_a_checkpoint_is_named(tmp_path):
    claim_data(tmp_path, {"a.jsonl": "1", "b.jsonl": "2"}, 0)
    claim_data(tmp_path, {"a.jsonl": "1", "b.jsonl": "2"}, 40)
    with pytest.raises(UserError, match="data file b.jsonl changed since step 40's checkpoint"):
        claim_data(tmp_path, {"a.jsonl": "1", "b.jsonl": "3"}, 40)
    claim_data(tmp_path, {"a.jsonl": "1", "b.jsonl": "3"}, 0)  # nothing was saved yet
    claim_data(tmp_path, {"a.jsonl": "1", "b.jsonl": "3"}, 20)
