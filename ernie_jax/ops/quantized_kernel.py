"""A grouped product of quantised weights for Hopper GPUs, in Pallas for Mosaic GPU. Import it only where it is to run.

The weights are the tall operand: they come to shared memory as they are stored, become bfloat16 on the way to
registers, and meet the rows of few or many tokens. So nothing but the stored bytes is read, and few tokens leave no
tile half empty.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ernie_jax.ops.quantized import Quantized

_SMS = 132  # of an H100 or H200; right with any number, fastest with the real one
_SIDE = 64  # outputs, and inputs, that a warpgroup multiplies together
GROUP = 128  # inputs of an int4 scale
ALIGNMENT = 8  # rows, at a multiple of which an expert's rows begin: those of a tile in shared memory


class Tiling(NamedTuple):
    """How a product is cut up. Two warpgroups multiply, each by 64 or 128 rows of weights; a third one loads.

    Attributes:
      block: rows of a tile; they all belong to one expert.
      depth: bytes of each row of weights that are loaded together, 64 or 128.
      steps: loads in flight.
      band: column tiles that are walked together, for the second-level cache.
      halves: times 64 weights of a warpgroup; of a gated product 2.
      splits: parts of the inputs that are summed up apart from each other, so that few tiles keep a GPU busy.
    """

    block: int
    depth: int
    steps: int
    band: int
    halves: int = 2
    splits: int = 1


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))  # so that all layers share one lowering
def grouped_product(
    rows: jax.Array,  # [M, K]
    weight: Quantized,  # [E, 1 or 2, N, K]
    blocks: jax.Array,  # [blocks, 3] int32
    live: jax.Array,  # [1] int32
    tiling: Tiling,
    shared: Quantized | None = None,
    interpret=None,
) -> jax.Array:
    """Do what `mosaic_kernel.grouped_product` does with bfloat16 weights.

    Returns:
      [M, N] in the dtype of `rows`; with splits [splits, M, N] float32, of which the sum is the product.

    Raises:
      ValueError: if the sizes are no multiples of the tiles.
    """
    values, scales = weight.values, weight.scales
    packed = values.dtype == jnp.uint8  # two inputs in a byte
    (count, inner), (experts, gates, outputs, stored) = rows.shape, values.shape  # stored: bytes of a row
    block, depth, halves = tiling.block, tiling.depth, tiling.halves
    width = halves * _SIDE // gates  # of the output, per warpgroup
    pieces = depth * inner // stored // _SIDE  # of the inputs, contracted one after the other
    turns = stored // (depth * tiling.splits)
    whole = outputs % (2 * width) == 0 == stored % (depth * tiling.splits) and turns >= tiling.steps
    if not whole or packed and weight.group != GROUP:
        raise ValueError(f"{tiling} does not divide rows {rows.shape} and weights {values.shape}")
    column_tiles = outputs // (2 * width)
    leave = min(block, 64)  # rows that leave a warpgroup at a time
    beside = (outputs, 0) if shared is None or shared.values.shape[2] == stored else (0, stored)  # from one to the next
    layout = plgpu.Layout.WGMMA

    dtype = rows.dtype if tiling.splits == 1 else jnp.float32

    def tile_of(index, live):
        tile = plgpu.planar_snake(
            lax.div(index, tiling.splits), (live, column_tiles), 1, min(tiling.band, column_tiles)
        )
        return *tile, lax.rem(index, tiling.splits)

    def load(refs, live, a, b, full, free):
        blocks_ref, rows_ref, weight_ref, shared_ref = refs
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.nd_loop((live * column_tiles * tiling.splits,), collective_axes="sm")
        def _(info):
            row_tile, column_tile, split = tile_of(info.index[0], live)
            chosen, first_row = blocks_ref[row_tile, 0], pl.multiple_of(blocks_ref[row_tile, 1], ALIGNMENT)

            @pl.loop(0, turns)
            def _(turn):
                step = info.local_index * turns + turn
                slot = lax.rem(step, tiling.steps)
                turn += split * turns

                @pl.when(step >= tiling.steps)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                def load_weights(part):
                    first = (column_tile * 2 + part // gates) * width
                    target = a.at[slot, pl.ds(part * width, width)]

                    def load_chosen():
                        window = pl.ds(first, width), pl.ds(turn * depth, depth)
                        plgpu.copy_gmem_to_smem(weight_ref.at[chosen, part % gates, *window], target, full.at[slot])

                    def load_shared():
                        down, right = ((chosen - experts) * size for size in beside)
                        window = pl.ds(down + first, width), pl.ds(right + turn * depth, depth)
                        plgpu.copy_gmem_to_smem(shared_ref.at[part % gates, *window], target, full.at[slot])

                    if shared is None:
                        load_chosen()
                    else:
                        pl.when(chosen < experts)(load_chosen)
                        pl.when(chosen >= experts)(load_shared)

                for part in range(2 * gates):
                    load_weights(part)
                for piece in range(pieces):
                    window = pl.ds(first_row, block), pl.ds((turn * pieces + piece) * _SIDE, _SIDE)
                    plgpu.copy_gmem_to_smem(rows_ref.at[*window], b.at[slot, piece], full.at[slot])

        mine = lax.div(live * column_tiles * tiling.splits + _SMS - 1 - lax.axis_index("sm"), _SMS) * turns

        @pl.loop(jnp.maximum(mine - tiling.steps, 0), mine)
        def _(step):
            plgpu.barrier_wait(free.at[lax.rem(step, tiling.steps)])  # no barrier is left half used

    def multiply(blocks_ref, scales_refs, out_ref, live, a, b, out, full, free):
        group = lax.axis_index("wg")
        plgpu.set_max_registers(232, action="increase")

        @plgpu.nd_loop((live * column_tiles * tiling.splits,), collective_axes="sm")
        def _(info):
            row_tile, column_tile, split = tile_of(info.index[0], live)
            chosen = blocks_ref[row_tile, 0]
            first = (column_tile * 2 + group) * width

            def load_scales(half, *groups):
                """Bring the scales of the 64 outputs of a half, of int4 those of a group of inputs."""
                gate, output = (half, first) if gates == 2 else (0, first + half * _SIDE)

                def bring(ref, *at):
                    return plgpu.layout_cast(plgpu.load(ref.at[*at], optimized=False), layout.reduce(1))

                def of_chosen():
                    return bring(scales_refs[0], chosen, gate, pl.ds(output, _SIDE), *groups)

                def of_shared():
                    down, right = ((chosen - experts) * size for size in (beside[0], beside[1] // (GROUP // 2)))
                    return bring(scales_refs[1], gate, pl.ds(down + output, _SIDE), *(right + g for g in groups))

                return of_chosen() if shared is None else lax.cond(chosen < experts, of_chosen, of_shared)

            def spread(scale, columns):
                return lax.broadcast_in_dim(scale, (_SIDE, columns), [0])

            def step_of(turn, totals):
                step = info.local_index * turns + turn
                slot = lax.rem(step, tiling.steps)
                if packed:  # asked for before the weights are waited for
                    count = pieces // 2
                    group_scales = [
                        [load_scales(half, (split * turns + turn) * count + at) for half in range(halves)]
                        for at in range(count)
                    ]
                plgpu.barrier_wait(full.at[slot])
                lines = [pl.ds((group * halves + half) * _SIDE, _SIDE) for half in range(halves)]
                found = [plgpu.layout_cast(a[slot, at], plgpu.Layout.WGMMA_UPCAST_2X) for at in lines]

                def widened():
                    for piece in range(pieces):
                        if not packed:
                            yield [to_bfloat16(part[:, piece * _SIDE : (piece + 1) * _SIDE]) for part in found]
                        elif piece % 2 == 0:  # low and high nibbles are 64 inputs each
                            group_of = slice(piece * _SIDE // 2, piece * _SIDE // 2 + _SIDE)
                            both = [
                                scaled_nibbles(part[:, group_of], spread(scale, _SIDE))
                                for part, scale in zip(found, group_scales[piece // 2], strict=True)
                            ]
                            yield from zip(*both, strict=True)

                totals = add_products(totals, widened, [b.at[slot, piece] for piece in range(pieces)])
                plgpu.barrier_arrive(free.at[slot])
                return totals

            zeros = plgpu.layout_cast(jnp.zeros((_SIDE, block), jnp.float32), layout)
            y = lax.fori_loop(0, turns, step_of, (zeros,) * halves)
            if not packed:
                y = [total * spread(load_scales(half), block) for half, total in enumerate(y)]
            if gates == 2:
                gate, up = y
                y = [gate / (1 + jnp.exp(-gate)) * up]
            first_row, rows_here = pl.multiple_of(blocks_ref[row_tile, 1], ALIGNMENT), blocks_ref[row_tile, 2]
            down = block // leave
            for piece in range(len(y) * down):
                i, j = divmod(piece, down)
                j *= leave
                # Not that of the piece before, of a tile before.
                buffer = lax.rem(info.local_index * len(y) * down + piece, 2)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                part = y[i][:, j : j + leave].astype(dtype)
                out.at[group, buffer].transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()

                def store(at, size, i=i, j=j, buffer=buffer):
                    target = out_ref if tiling.splits == 1 else out_ref.at[split]
                    target = target.at[pl.ds(first_row + j + at, size), pl.ds(first + i * _SIDE, _SIDE)]
                    plgpu.copy_smem_to_gmem(out.at[group, buffer, pl.ds(at, size)], target, commit_group=False)

                # The rows behind the block's are another's.
                whole = rows_here >= j + leave
                pl.when(whole)(functools.partial(store, 0, leave))
                for at in range(0, leave, ALIGNMENT):
                    some = jnp.logical_not(whole) & (rows_here > j + at)
                    pl.when(some)(functools.partial(store, at, ALIGNMENT))
                plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    def body(blocks_ref, live_ref, rows_ref, weight_ref, scales_ref, *more):
        *along, out_ref = more
        shared_ref, shared_scales_ref = along or (None, None)
        tiled = plgpu.TilingTransform((8, depth)), plgpu.SwizzleTransform(depth)  # of bytes
        swizzled, left = (
            (plgpu.TilingTransform((8, 128 // jnp.dtype(kind).itemsize)), plgpu.SwizzleTransform(128))
            for kind in (rows.dtype, dtype)
        )

        @functools.partial(
            pl.run_scoped,
            a=plgpu.SMEM((tiling.steps, 2 * halves * _SIDE, depth), values.dtype, transforms=tiled),
            b=plgpu.SMEM((tiling.steps, pieces, block, _SIDE), rows.dtype, transforms=swizzled),
            out=plgpu.SMEM((2, 2, leave, _SIDE), dtype, transforms=left),
            full=plgpu.Barrier(num_arrivals=2 * gates + pieces, num_barriers=tiling.steps),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.steps),
            collective_axes="wg",
        )
        def _(a, b, out, full, free):
            live = live_ref[0]
            loads = lax.axis_index("wg") == 2
            refs = blocks_ref, rows_ref, weight_ref, shared_ref
            scales_refs = scales_ref, shared_scales_ref
            pl.when(loads)(lambda: load(refs, live, a, b, full, free))
            pl.when(jnp.logical_not(loads))(
                lambda: multiply(blocks_ref, scales_refs, out_ref, live, a, b, out, full, free)
            )

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*[tiling.splits] * (tiling.splits > 1), count, outputs), dtype),
        grid=(_SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(blocks, live, rows, values, scales, *([] if shared is None else [shared.values, shared.scales]))


def to_bfloat16(stored):
    """Return int8 or fp8 numbers in bfloat16, as tensor cores take them from registers."""
    if stored.dtype == jnp.int8:  # lanes exchange bytes, which are fewer
        return whole_numbers(plgpu.layout_cast(stored, plgpu.Layout.WGMMA))
    wide = stored.astype(jnp.float32).astype(jnp.bfloat16)  # no instruction makes bfloat16 of fp8
    return plgpu.layout_cast(wide, plgpu.Layout.WGMMA)


def whole_numbers(stored):
    """Return int8 numbers [64, 64] in bfloat16; a function for tests to replace."""
    return _by_words(stored, _WIDEN, 1)[0]


def scaled_nibbles(stored, scale):
    """Return what the low nibbles of bytes stand for and what the high ones do, in bfloat16."""
    low, high = nibbles(plgpu.layout_cast(stored, plgpu.Layout.WGMMA))
    scale = scale.astype(jnp.bfloat16)
    return low * scale, high * scale


def nibbles(stored):
    """Return the low and the high nibbles of bytes [64, 64], less 8, in bfloat16; a function for tests to replace."""
    return _by_words(stored, _SPLIT, 2)


# Of two bytes each, below 0x43, the upper byte of 128 in bfloat16. Said in words, it would become two to three times as
# many instructions. Whole numbers: the low seven bits, less 128 without the sign and 256 with it.
_WIDEN = """{
    .reg .b32 bytes, less;
    prmt.b32 bytes, $1, 0x43, %s;
    and.b32 less, bytes, 0xff80ff80;
    and.b32 bytes, bytes, 0xff7fff7f;
    sub.bf16x2 $0, bytes, less;
}"""
# The low and the high four bits as the last of the fraction, less 136.
_SPLIT = """{
    .reg .b32 bytes, above, both, less;
    mov.b32 less, 0x43084308;
    prmt.b32 bytes, $2, 0x43, %s;
    shr.u32 above, bytes, 4;
    lop3.b32 both, bytes, 0x000f000f, 0x43004300, 0xea;
    sub.bf16x2 $0, both, less;
    lop3.b32 both, above, 0x000f000f, 0x43004300, 0xea;
    sub.bf16x2 $1, both, less;
}"""


def _by_words(stored, instructions, count):
    """Return `count` arrays in bfloat16 that instructions make of bytes [64, 64]: of two bytes two numbers each."""
    wide = plgpu.ShapeDtypeStruct(stored.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    made = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(wide,) * count)
    return made(functools.partial(_emit, instructions=instructions, count=count))(stored)


def _emit(_, stored, *, instructions, count):
    i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    results = [np.empty_like(stored.registers) for _ in range(count)]
    for index, register in np.ndenumerate(stored.registers):
        selector = "0x4140"
        source = getattr(register.owner, "opview", None)
        if isinstance(source, vector.ExtractStridedSliceOp) and mgpu.utils.bitwidth(source.source.type) == 32:
            # Half of a word: take it from there.
            selector = "0x4342" if ir.IntegerAttr(source.offsets[0]).value else selector
            word = mgpu.utils.bitcast(source.source, i32)
        else:
            word = arith.extui(i32, mgpu.utils.bitcast(register, ir.IntegerType.get_signless(16)))
        kind = i32 if count == 1 else llvm.StructType.get_literal([i32] * count)
        found = llvm.inline_asm(kind, [word], instructions % selector, ",".join(["=r"] * count + ["r"]))
        for at, parts in enumerate(results):
            part = found if count == 1 else llvm.extractvalue(i32, found, [at])
            parts[index] = mgpu.utils.bitcast(part, two)
    return tuple(mgpu.FragmentedArray(_registers=parts, _layout=stored.layout, _is_signed=None) for parts in results)


def add_products(totals, weights, rows):
    """Add to each of the totals [64, block] the products of its weights [64, 64] and rows [block, 64], transposed.

    A function because no interpreter knows it.

    Args:
      weights: returns an iterator over the pieces of the inputs, of each the weights of all totals; what a piece takes
        to make goes on while the tensor cores have the one before.
      rows: of the same pieces.
    """

    def multiply(sums):
        for parts, piece in zip(weights(), rows, strict=True):
            for total, part in zip(sums, parts, strict=True):
                plgpu.wgmma(total, part, piece.transpose((1, 0)))

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(total) for total in totals))
