"""Plans: sums, the best preset, what would fit, and what the compiler says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ernie_jax.chips import CHIPS, GIB
from ernie_jax.cli.models import presets
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.planner import compilation, costs, plan
from ernie_jax.planner.plan import Plan, Request, estimate_all, make_plan, measure, smallest_slice, suggest
from ernie_jax.planner.topology import parse_topology
from ernie_jax.sharding import make_layout

BF16 = jnp.dtype(jnp.bfloat16)


@pytest.fixture(scope="module")
def large() -> ModelConfig:
    return ModelConfig.from_file(presets()["ernie-4.5-21b-a3b"])


def request_for(config, topology, batch=16, context=8192, chunk=512, dtype=BF16) -> Request:
    return Request(config, parse_topology(topology), dtype, batch, context, chunk)


def test_sums_on_gpus(large):
    """Two H100s: half of the experts and heads each, a tenth kept free, no compiler."""
    found = make_plan(request_for(large, "h100:2"), "expert")
    assert not found.compiled and found.problem is None
    assert found.cache == (16 * 64 + 1) * 128 * 57_344 // 2
    assert found.temporaries == int(0.1 * 0.95 * 80e9)
    assert found.memory == int(0.95 * 80e9)
    assert found.total == found.weights + found.cache + found.temporaries
    assert found.left == found.memory - found.total and found.fits
    # What is neither weights nor temporaries holds pages, but for the scratch page.
    pages = (found.memory - found.weights - found.temporaries) // (128 * 57_344 // 2) - 1
    assert found.cache_tokens == 128 * pages
    assert found.most_sequences == pages // 64
    assert found.longest_context == min(pages // 16 * 128, 131072)
    more = make_plan(request_for(large, "h100:2", batch=found.most_sequences), "expert")
    over = make_plan(request_for(large, "h100:2", batch=found.most_sequences + 1), "expert")
    assert more.fits and not over.fits


def test_room_is_counted_by_group(large):
    """Each of 8 groups has its own pages and its own share of the batch."""
    found = make_plan(request_for(large, "h100:8", batch=9, context=1000), "expert+data")
    assert found.layout.groups == 8
    assert found.cache == (2 * 8 + 1) * 128 * 57_344  # two sequences of 8 pages in the fullest
    assert found.most_sequences == 8 * (found.group_pages // 8)
    assert found.longest_context == min(found.group_pages // 2 * 128, 131072)


def test_an_8_bit_cache(large):
    request = request_for(large, "h100:2")
    found = make_plan(dataclasses.replace(request, kv_dtype=jnp.dtype(jnp.int8)), "expert")
    assert found.cache == (16 * 64 + 1) * 128 * 28 * 8 * (128 + 4) // 2
    assert found.weights == make_plan(request, "expert").weights


@pytest.mark.parametrize(("where", "preset", "form"), [("h100:2", "expert", "int8"), ("v5e:2x4", "expert+data", "fp8")])
def test_an_8_bit_cache_is_named_where_it_would_fit(where, preset, form, large):
    """By estimates, which is all that `suggest` goes by."""
    batch = make_plan(request_for(large, where), preset, build=False).most_sequences + 1
    over = make_plan(request_for(large, where, batch=batch), preset, build=False)
    assert not over.fits and any(advice.startswith(f"--kv_dtype={form} --sharding=") for advice in suggest(over))


def test_an_8_bit_cache_on_a_slice_keeps_heads_together(large):
    """With one head a chip, XLA would turn the whole cache over in every step."""
    request = dataclasses.replace(request_for(large, "v5e:2x4"), kv_dtype=jnp.dtype(jnp.int8))
    words = "--kv_dtype=int8 needs 4 or more key/value heads on each TPU device, and sharding expert .* leaves 1 of 4"
    with pytest.raises(UserError, match=words):
        make_plan(request, "expert", build=False)
    assert "needs 4 or more" in estimate_all(request)["tensor"]
    assert make_plan(request, build=False).layout.preset in ("expert+data", "exchange")


def test_the_best_preset_is_the_default_unless_another_is_faster(large):
    every = estimate_all(request_for(large, "h200:8"))
    assert set(every) == {"expert", "expert+tensor", "expert+data", "exchange", "tensor"}
    best = make_plan(request_for(large, "h200:8"))
    assert best.layout.preset == "expert"
    fastest = min(p.decode.roofline.seconds for p in every.values())
    assert best.decode.roofline.seconds <= 1.02 * fastest
    # With very many tokens in flight over slow links the exchange sends least.
    slow = dataclasses.replace(CHIPS["h200"], port_bandwidth=1e9)
    request = request_for(large, "h200:8", batch=256, context=1024)
    request = dataclasses.replace(request, topology=dataclasses.replace(request.topology, chip=slow))
    assert make_plan(request).layout.preset == "exchange"


def test_one_device_has_one_preset(large):
    assert set(estimate_all(request_for(large, "h200:1"))) == {"single"}
    assert make_plan(request_for(large, "h200:1")).layout.preset == "single"


def test_presets_that_do_not_divide_come_with_the_reason(large):
    every = estimate_all(request_for(large, "h100:7"))
    assert all(isinstance(reason, str) for reason in every.values())
    assert "the model's experts (64) cannot be split 7 ways" in every["expert"]


def test_what_would_fit(large):
    request = request_for(large, "h100:1", batch=16, context=8192, dtype=jnp.dtype(jnp.float32))
    assert list(suggest(make_plan(request))) == [
        "--dtype=bfloat16 --sharding=single",
        "--quantize=int8 --sharding=single",
        "--topology=h100:2 --sharding=expert, the fewest of NVIDIA H100 that do",
    ]
    found = make_plan(request_for(large, "h100:1", batch=64, context=32768))
    batch, context, topology = suggest(found)
    assert batch == f"--batch={found.most_sequences}, each of 32,768 tokens" and found.most_sequences > 0
    assert context == f"--context={found.longest_context}, of 64 sequences"
    assert make_plan(request_for(large, "h100:1", batch=found.most_sequences, context=32768)).fits
    assert make_plan(request_for(large, "h100:1", batch=64, context=found.longest_context)).fits
    assert not make_plan(request_for(large, "h100:1", batch=64, context=found.longest_context + 128)).fits
    assert topology.startswith("--topology=h100:4 ")


def test_a_form_of_fewer_bits_can_be_what_fits(large):
    """On a GPU of 24 GB and a v5e chip only int4 does."""
    for where in ("l4:1", "v5e:1x1"):
        request = request_for(large, where, batch=8, context=8192)
        assert "--quantize=int4 --sharding=single" in list(suggest(make_plan(request, build=False)))
        for form, fits in (("int8", False), ("fp8", False), ("int4", True)):
            config = dataclasses.replace(large, quantize=form)
            found = make_plan(dataclasses.replace(request, config=config), build=False)
            assert found.fits == fits
            advice = [] if fits else [line for line in suggest(found) if "quantize" in line]
            assert advice == ([] if fits else ["--quantize=int4 --sharding=single"])


def test_another_sharding_can_be_what_fits(large):
    """256 sequences on 8 devices: pages of whole heads on one device are the same bytes, replicated weights are not."""
    request = request_for(large, "a100-40:8", batch=1, context=8192)
    room = estimate_all(request)
    more = room["exchange"].most_sequences + 8
    assert more <= room["expert"].most_sequences
    found = make_plan(dataclasses.replace(request, batch=more), "exchange")
    assert not found.fits
    assert "--sharding=expert" in list(suggest(found))


def test_the_smallest_slice(large):
    v5e = CHIPS["v5e"]
    topology, preset = smallest_slice(request_for(large, "v5e:1x1"), v5e)
    assert (topology.name, preset) == ("v5e:2x2", "expert")
    whole = ModelConfig.from_file(presets()["ernie-4.5-300b-a47b"])
    assert smallest_slice(request_for(whole, "v5e:1x1"), v5e)[0].name == "v5e:8x8"
    for name in ("v5e:4x4", "v5e:4x8"):
        assert not make_plan(request_for(whole, name), build=False).fits
    assert list(suggest(make_plan(request_for(whole, "h100:8")))) == [
        "--quantize=int8 --sharding=expert",
        "no host of NVIDIA H100 is large enough",
        "--topology=h200:8 --sharding=expert, the fewest of NVIDIA H200 that do",
        "--topology=b200:8 --sharding=expert, the fewest of NVIDIA B200 that do",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "--batch=0"),
        ({"context": 0}, "--context=0"),
        ({"chunk": -1}, "--prefill_chunk=-1"),
        ({"context": 131073}, "--context=131073"),
    ],
)
def test_requests_that_make_no_sense(large, changes, words):
    with pytest.raises(UserError, match=words):
        request_for(large, "h100:8", **changes)


def test_a_chunk_is_no_longer_than_the_context(large):
    assert request_for(large, "h100:8", context=100).chunk == 100


@pytest.mark.parametrize(
    ("sharding", "mesh", "words"),
    [
        ("zigzag", None, ["zigzag", "expert+tensor"]),
        ("fsdp", None, ["fsdp", "training", "expert"]),
        (None, "expert:16", ["--mesh=expert:16", "16", "8"]),
        (None, "pipeline:8", ["pipeline", "data, expert, tensor"]),
        (None, "expert:x", ["expert"]),
        ("tensor", "expert:8", ["tensor", "expert"]),
    ],
)
def test_layouts_that_do_not_suit(large, sharding, mesh, words):
    with pytest.raises(UserError) as error:
        make_plan(request_for(large, "h100:8"), sharding, mesh)
    assert all(word in str(error.value) for word in words), error.value


def test_compiled_for_a_slice(small_config):
    """Cloud names lead to the slice; the program's own figures are in the plan."""
    pytest.importorskip("libtpu")
    found = make_plan(request_for(small_config, "v5e-4", batch=8, context=1024, chunk=128))
    assert found.compiled and found.fits and found.problem is None
    estimated = make_plan(found.request, found.layout.preset, build=False)
    assert not estimated.compiled
    assert (found.weights, found.cache) == (estimated.weights, estimated.cache)
    for name in ("decode", "prefill"):
        step = getattr(found, name)
        arguments = step.program.arguments - found.weights - found.cache
        assert 0 <= arguments <= 1 << 20, name
        assert 0 < step.program.temporaries <= found.temporaries
        # Two sums a layer and the embedding's.
        assert [(c.kind, c.count, c.group_size) for c in step.collectives] == [("all-reduce", 5, 4)]
        assert step.collectives == step.program.collectives == getattr(estimated, name).collectives
        assert step.roofline == getattr(estimated, name).roofline
    programs = found.decode.program, found.prefill.program
    assert found.total == max(program.arguments + program.temporaries for program in programs)


def test_what_a_ragged_exchange_sends_is_estimated(small_config):
    """The program has its buffers only, which no routing overflows."""
    pytest.importorskip("libtpu")
    found = make_plan(request_for(small_config, "v5e-4", batch=64, context=1024, chunk=128), "exchange")
    kinds = {c.kind: c for c in found.decode.collectives}
    assert set(kinds) == {"all-reduce", "all-gather", "ragged-all-to-all"}
    estimated = make_plan(found.request, "exchange", build=False)
    assert found.decode.roofline == estimated.decode.roofline
    assert found.decode.roofline.sent < sum(c.link_bytes for c in found.decode.collectives)


def test_a_program_too_large_to_compile_is_reported(small_config):
    """Weights and cache fit to the last page, temporaries do not."""
    pytest.importorskip("libtpu")
    empty = make_plan(request_for(small_config, "v5e:1x1"), build=False)
    pages = (empty.memory - empty.weights) // empty.page_bytes - 1
    batch = min(range(64, 128), key=lambda rows: pages % rows if pages // rows <= 1024 else pages)
    request = request_for(small_config, "v5e:1x1", batch=batch, context=pages // batch * 128)
    estimated = make_plan(request, build=False)
    assert 0 <= estimated.memory - estimated.weights - estimated.cache < 4 << 20
    found = make_plan(request)
    assert not found.fits and not found.compiled
    assert "are needed and 15.75 are there" in found.problem
    # The plan's sum is what the compiler says, which it rounds.
    assert found.total == pytest.approx(float(found.problem.split(" GiB")[0].split()[-1]) * GIB, abs=0.01 * GIB)
    assert found.left <= 0  # by less than the compiler's last digit, it may be
    assert any(line.startswith("--topology=v5e:2x2 ") for line in suggest(found))


def test_nothing_is_compiled_that_plainly_does_not_fit(large, monkeypatch):
    monkeypatch.setattr(plan, "compile_all", lambda *_: pytest.fail("compiled"))
    found = make_plan(request_for(large, "v5e:1x1"))
    assert not found.fits and not found.compiled
    assert found.left < -20 * GIB


def test_other_failures_of_the_compiler_are_not_hidden(small_config, monkeypatch):
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    for message in ("INTERNAL: hbm", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            compilation.compile_all({"decode": Lowered(message)})
    with pytest.raises(compilation.TooLarge, match="refuses decode: RESOURCE_EXHAUSTED: no room in HBM") as error:
        compilation.compile_all({"decode": Lowered("RESOURCE_EXHAUSTED: no room in HBM\nand more")})
    assert error.value.needed is None


def test_a_plan_for_gpus_is_not_compiled(large):
    found = make_plan(request_for(large, "h100:2"), build=False)
    assert measure(found) is found


@pytest.mark.parametrize("name", ["v4-128", "v5e-16", "v5e-256", "v5p-64", "v6e-16", "v6e-64", "v6e-256", "tpu7x-128"])
def test_every_sharding_finds_its_mesh_on_a_slice(large, name):
    """Also where a mesh axis takes part of an axis of the torus."""
    pytest.importorskip("libtpu")
    request = request_for(large, name)
    devices = request.topology.compile_devices()
    for preset, found in estimate_all(request).items():
        if isinstance(found, Plan):
            assert dict(make_layout(large, devices, None, preset).mesh.shape) == dict(found.layout.mesh.shape)


def test_a_mesh_of_ones_own(large):
    found = make_plan(request_for(large, "h100:8"), mesh="data:2,expert:2,tensor:2")
    assert dict(found.layout.mesh.shape) == {"data": 2, "expert": 2, "tensor": 2}
    assert isinstance(found, Plan) and found.layout.preset == "expert+tensor"
    assert found.weights == costs.weight_bytes(large, BF16, found.layout)
