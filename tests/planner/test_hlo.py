"""The reader of collectives, on programs compiled here for 8 virtual devices and on lines as libtpu prints them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ernie_jax.planner.hlo import Collective, collectives


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *shapes, dtype=jnp.float32):
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(sharded).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile().as_text()


@pytest.mark.parametrize(
    ("axes", "group", "fraction"), [("a", 2, 1.0), ("b", 4, 1.5), (("a", "b"), 8, 1.75), (("b", "a"), 8, 1.75)]
)
def test_all_reduce(mesh, rng, axes, group, fraction):
    rows, columns = rng.integers(100, 300, 2).tolist()
    text = compiled(mesh, lambda x: jax.lax.psum(x, axes), (rows, columns))
    found = collectives(text)
    assert found == [Collective("all-reduce", rows * columns * 4, 1, group)]
    assert found[0].link_bytes == fraction * rows * columns * 4


def test_groups_written_out(mesh):
    text = compiled(mesh, lambda x: jax.lax.psum(x, "b", axis_index_groups=[[0, 3], [1, 2]]), (64, 64))
    assert "replica_groups={{" in text
    assert collectives(text) == [Collective("all-reduce", 64 * 64 * 4, 1, 2)]


def test_every_kind_counts_what_a_device_brings_or_ends_up_with(mesh):
    def step(x):  # [256, 64] float32: 64 KiB
        gathered = jax.lax.all_gather(x, "b", tiled=True)  # 256 KiB
        scattered = jax.lax.psum_scatter(gathered * 2, "a", tiled=True)  # from 256 KiB to 128 KiB
        moved = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])  # 64 KiB
        exchanged = jax.lax.all_to_all(x + 1, "b", 1, 1, tiled=True)  # 64 KiB
        return scattered, moved, exchanged

    found = {c.kind: c for c in collectives(compiled(mesh, step, (256, 64)))}
    kib = 1024
    assert found == {
        "all-gather": Collective("all-gather", 256 * kib, 1, 4),
        "reduce-scatter": Collective("reduce-scatter", 256 * kib, 1, 2),
        "collective-permute": Collective("collective-permute", 64 * kib, 1, 2),
        "all-to-all": Collective("all-to-all", 64 * kib, 1, 4),
    }
    sent = {kind: c.link_bytes / kib for kind, c in found.items()}
    assert sent == {"all-gather": 192, "reduce-scatter": 128, "collective-permute": 64, "all-to-all": 48}


def test_equal_ones_are_added_up_and_variadic_ones_are_one(mesh):
    def step(x, y):
        x, y = jax.lax.psum((x, y), "a")
        for _ in range(3):
            x = jax.lax.psum(jnp.sin(x), "b")
        return x, y

    found = collectives(compiled(mesh, step, (64, 64), (32, 32)))
    assert found == [
        Collective("all-reduce", 64 * 64 * 4, 3, 4),
        Collective("all-reduce", (64 * 64 + 32 * 32) * 4, 1, 2),
    ]


def test_loops_count_their_turns(mesh, rng):
    outer, inner = rng.integers(2, 9, 2).tolist()

    def step(x):
        def turn(x, _):
            x = jax.lax.fori_loop(0, inner, lambda _, x: jax.lax.psum(jnp.sin(x), "b"), x)
            return jax.lax.psum(jnp.cos(x), "a"), None

        return jax.lax.scan(turn, x, None, length=outer)[0]

    found = collectives(compiled(mesh, step, (64, 64)))
    size = 64 * 64 * 4
    assert {(c.group_size, c.count, c.bytes, c.open_loop) for c in found} == {
        (4, outer * inner, size, False),
        (2, outer, size, False),
    }


def test_a_loop_of_unknown_length_says_so(mesh):
    def step(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: jax.lax.psum(x, "b") + 1, x)

    assert collectives(compiled(mesh, step, (64, 64))) == [Collective("all-reduce", 64 * 64 * 4, 1, 4, open_loop=True)]


def test_the_dearer_branch_of_a_conditional_counts(mesh):
    def step(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.psum(x, ("a", "b")), x)

    assert collectives(compiled(mesh, step, (64, 64))) == [Collective("all-reduce", 64 * 64 * 4, 1, 8)]


def test_a_program_without_any(mesh):
    assert collectives(compiled(mesh, lambda x: x @ x, (64, 64))) == []


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule nothing")


# The forms below come from libtpu and not from the CPU compiler; the types and attributes are as it prints them.
_ADD = """
%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}
"""


def module(computations: str, entry: str) -> str:
    main = f"ENTRY %main (p: bf16[64,512]) -> bf16[] {{\n{entry}\n}}\n"
    return f"HloModule jit_step, is_scheduled=true\n{_ADD}\n{computations}\n\n{main}"


def test_a_start_and_its_done_are_one():
    text = module(
        "",
        """
  %p = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %s = (bf16[64,512]{1,0}, bf16[64,512]{1,0}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1}}
  %d = bf16[64,512]{1,0:T(8,128)(2,1)} collective-permute-done(%s)
  %g = (bf16[64,512]{1,0}, bf16[512,512]{1,0}) all-gather-start(%d), replica_groups=[2,8]<=[4,4]T(1,0), dimensions={0}
  ROOT %h = bf16[512,512]{1,0} all-gather-done(%g)""",
    )
    size = 64 * 512 * 2
    assert collectives(text) == [
        Collective("all-gather", 8 * size, 1, 8),
        Collective("collective-permute", size, 1, 2),
    ]


def test_wrapped_collectives_are_found_once():
    """Asynchronous wrappers, SparseCore offload of tpu7x, and the fused reduce-scatter of v5e."""
    text = module(
        """
%offloaded (q: bf16[64,512]) -> bf16[64,512] {
  %q = bf16[64,512]{1,0} parameter(0)
  ROOT %r = bf16[64,512]{1,0} all-reduce(%q), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%add
}

%wrapped (q.1: bf16[64,512]) -> bf16[64,512] {
  %q.1 = bf16[64,512]{1,0} parameter(0)
  ROOT %r.1 = bf16[64,512]{1,0} all-to-all(%q.1), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.1 (q.2: bf16[64,512]) -> bf16[16,512] {
  %q.2 = bf16[64,512]{1,0} parameter(0)
  %i = u32[] constant(0)
  %r.2 = bf16[64,512]{1,0} all-reduce(%q.2), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = bf16[16,512]{1,0} dynamic-slice(%r.2, %i, %i), dynamic_slice_sizes={16,512}
}""",
        """
  %p = bf16[64,512]{1,0} parameter(0)
  %a = ((), (), (s32[40960]{0:T(1024)}, /*index=5*/s32[0]{0})) custom-call-start(), called_computations={%offloaded}
  %b = ((bf16[64,512]{1,0}), bf16[64,512]{1,0}) custom-call-update(%a, %p), output_to_operand_aliasing={{1}: (0, {})}
  %c = bf16[64,512]{1,0} custom-call-done(%b)
  %d = ((bf16[64,512]{1,0}), bf16[64,512]{1,0}, u32[]) async-start(%c), calls=%wrapped
  %e = bf16[64,512]{1,0} async-done(%d), calls=%wrapped
  ROOT %f = bf16[16,512]{1,0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1""",
    )
    size = 64 * 512 * 2
    assert set(collectives(text)) == {
        Collective("all-reduce", size, 1, 4),
        Collective("all-to-all", size, 1, 4),
        Collective("reduce-scatter", size, 1, 4),
    }


@pytest.mark.parametrize(("start", "limit", "step", "turns"), [(0, 5, 1, 5), (2, 9, 1, 7), (0, 10, 4, 3), (7, 7, 1, 0)])
@pytest.mark.parametrize("carried", [False, True], ids=["limit in the condition", "limit carried"])
def test_the_turns_of_a_loop_without_a_note(start, limit, step, turns, carried):
    """libtpu drops the known trip count: it is read from the counter."""
    end = "get-tuple-element(%state.1), index=2" if carried else f"constant({limit})"
    text = module(
        f"""
%body (state: (s32[], bf16[64,512], s32[])) -> (s32[], bf16[64,512], s32[]) {{
  %state = (s32[]{{:T(128)}}, bf16[64,512]{{1,0}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x.1 = bf16[64,512]{{1,0}} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %r = bf16[64,512]{{1,0}} all-reduce(%x.1), channel_id=1, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  ROOT %out = (s32[], bf16[64,512]{{1,0}}, s32[]) tuple(%next, %r, %n)
}}

%condition (state.1: (s32[], bf16[64,512], s32[])) -> pred[] {{
  %state.1 = (s32[], bf16[64,512]{{1,0}}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] {end}
  ROOT %less = pred[]{{:T(512)}} compare(%j, %end), direction=LT
}}""",
        f"""
  %p = bf16[64,512]{{1,0}} parameter(0)
  %zero = s32[] constant({start})
  %limit = s32[] constant({limit})
  %from = s32[] copy(%zero)
  %tuple = (s32[], bf16[64,512]{{1,0}}, s32[]) tuple(%from, %p, %limit)
  ROOT %loop = (s32[], bf16[64,512]{{1,0}}, s32[]) while(%tuple), condition=%condition, body=%body""",
    )
    assert collectives(text) == ([Collective("all-reduce", 64 * 512 * 2, turns, 2)] if turns else [])


def test_a_ragged_exchange_counts_its_send_buffer():
    operands = "%p, %p, %sizes, %sizes, %sizes, /*index=5*/%sizes"
    text = module(
        "",
        f"""
  %p = bf16[64,512]{{1,0}} parameter(0)
  %sizes = s32[4]{{0}} constant({{1, 2, 3, 4}})
  ROOT %r = bf16[64,512]{{1,0}} ragged-all-to-all({operands}), channel_id=1, replica_groups={{{{0,1,2,3}}}}""",
    )
    assert collectives(text) == [Collective("ragged-all-to-all", 64 * 512 * 2, 1, 4)]


def test_bytes_follow_the_dtype(mesh):
    text = compiled(mesh, lambda x: jax.lax.all_gather(x, "b"), (128, 64), dtype=jnp.int8)
    assert collectives(text) == [Collective("all-gather", 4 * 128 * 64, 1, 4)]
