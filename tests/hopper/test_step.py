"""Whole models at full size, compiled for H100s that are not here: they fit, send what they should, by our kernels."""

import collections
import dataclasses
import functools
import re

import jax.numpy as jnp
import pytest

from ernie_jax.config import ModelConfig
from ernie_jax.engine.aot import decode_shape, lower_step, mixed_shape, prefill_shape
from ernie_jax.engine.cache import PAGE_SIZE, bytes_per_token
from ernie_jax.planner.hlo import collectives
from ernie_jax.sharding import make_layout
from tests.hopper.conftest import h100s

LAYERS = 3  # of the model's 28, of which the first is dense: the others are alike
PAGES = 2000
# (sharding, GPUs, tokens of a decode step, of a prompt, or of a prompt beside 64 sequences)
STEPS = [
    ("single", 1, "decode", 1),
    ("single", 1, "decode", 8),
    ("single", 1, "decode", 64),
    ("single", 1, "decode", 256),
    ("single", 1, "prefill", 2048),
    ("single", 1, "mixed", 2048),
    ("expert", 2, "decode", 64),
    ("tensor", 2, "decode", 64),
    ("expert", 2, "prefill", 2048),
    ("expert+data", 4, "decode", 64),
    ("expert+data", 4, "mixed", 2048),
    ("expert+tensor", 4, "decode", 1),
]


@functools.cache
def compile_step(
    sharding, gpus, kind, tokens, layers=LAYERS, quantize=None, embedding=False, kv_dtype=None, **backends
):
    """Return config, layout, shape, and of the compiled program what it takes of memory and its text."""
    config = ModelConfig.from_file("configs/ernie-4.5-21b-a3b.json")
    forms = {"quantize": quantize, "quantize_embedding": embedding}
    config = dataclasses.replace(config, num_hidden_layers=layers, num_nextn_predict_layers=0, **forms)
    layout = make_layout(config, h100s(gpus), preset=sharding)
    if kind == "mixed":
        shape = mixed_shape(config, layout, 64, tokens, 8192)
    else:
        shape = (prefill_shape if kind == "prefill" else decode_shape)(config, layout, tokens, 8192)
    lowered = lower_step(config, layout, jnp.bfloat16, shape, PAGES, kv_dtype=kv_dtype, **backends)
    compiled = lowered.compile()
    return config, layout, shape, compiled.memory_analysis(), compiled.as_text()


def test_shards_of_shared_experts_that_the_kernels_do_not_take():
    """Each of 8 GPUs has 384 of the shared experts' 3,072 columns, and the kernels go by 256: XLA computes those."""
    _, layout, _, _, text = compile_step("expert", 8, "decode", 1)
    assert layout.size("mlp") == 8
    assert "ernie_experts_half" not in text and "ernie_experts" in text
    assert "/shared/" in text


def launches(text):
    """Return what the program's entry launches, in order: a kernel's target, or the kind of instruction."""
    found = []
    for line in text[text.index("\nENTRY") :].splitlines():
        if match := re.search(r" (custom-call|fusion|dot|copy|transpose|sort|while)\(", line):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            found.append(target[1] if target else match[1])
    return found


@pytest.mark.parametrize("case", STEPS, ids=lambda case: "-".join(map(str, case)))
def test_a_step_fits_and_sends_what_it_must(case):
    config, layout, _, memory, text = compile_step(*case)
    cache = PAGES * PAGE_SIZE * bytes_per_token(config, jnp.bfloat16) // layout.size("kv_head")
    found = launches(text)
    print(f"{layout.describe()}: {len(found)} launches, temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB")
    # Of the cache nothing is copied, and no weight is.
    assert memory.alias_size_in_bytes >= cache
    check_no_large_copies(text)
    sent = collections.Counter()
    for item in collectives(text):
        sent[item.kind] += item.count
    sums = 2 * LAYERS + 1 if layout.mesh.size > 1 else 0
    assert sent == ({"all-reduce": sums} if sums else {})
    if case[2] != "decode":
        # Mosaic takes no slice of a larger array where it lies, unless that is a multiple of 256 bytes.
        slices = [part for part in text.split("\n\n") if part.lstrip("%").startswith("dynamic-slice-fusion")]
        assert not [part for part in slices if "mosaic_gpu_v2" in part]
        # Without unique indices, pages are written by loops of compare-and-swap.
        writes = [line for line in text.splitlines() if " scatter(" in line and f"bf16[{PAGES}," in line]
        assert writes and all("unique_indices=true" in line for line in writes)
        # Products are cuBLAS', which take no compiling and multiply by no norm's weight.
        assert "__cublas$" in text and "gemm_fusion" not in text


@pytest.mark.parametrize(("kind", "tokens"), [("decode", 8), ("decode", 64), ("mixed", 2048)])
def test_an_8_bit_cache(kind, tokens):
    """Decoding reads bytes; prompts read what one kernel a layer writes in bfloat16, of the pages of their rows."""
    config, _, _, memory, text = compile_step("single", 1, kind, tokens, kv_dtype=jnp.int8)
    assert memory.alias_size_in_bytes >= PAGES * PAGE_SIZE * bytes_per_token(config, jnp.int8)
    check_no_large_copies(text)
    found = {name: text.count(f'custom_call_target="ernie_{name}"') for name in ("decode_attention", "widen_pages")}
    halves = text.count('custom_call_target="ernie_attention_half"')
    assert found["decode_attention"] + halves == LAYERS
    assert found["widen_pages"] == (LAYERS if kind == "mixed" else 0)
    assert (halves == LAYERS) == (tokens <= 16)
    for dtype in ("s8", "f32"):
        writes = [line for line in text.splitlines() if " scatter(" in line and f"{dtype}[{PAGES}," in line]
        assert len(writes) == found["widen_pages"] and all("unique_indices=true" in line for line in writes)


def check_no_large_copies(text):
    entry = text[text.index("\nENTRY") :].splitlines()
    copied = [line for line in entry if re.search(r"%\w*(copy|transpose)[\w.]* = ", line) and large(line)]
    assert not copied, copied[0]


def large(line):
    """Tell whether an instruction's result has millions of elements."""
    sizes = re.search(r"= \w+\[([\d,]+)\]", line)
    elements = 1
    for size in sizes[1].split(",") if sizes else ():
        elements *= int(size)
    return elements > 1 << 22


@pytest.mark.parametrize(("tokens", "backend"), [(8, "cuda"), (64, "dense")])
def test_experts_of_other_gpus_are_read_where_they_lie(tokens, backend):
    """What GPUs that are not Hopper take: no experts are copied, transposed or converted, alone or in a fusion."""
    config, _, _, memory, text = compile_step("single", 1, "decode", tokens, expert_backend=backend)
    assert text.count('custom_call_target="ernie_experts"') == (LAYERS - 1 if backend == "cuda" else 0)
    check_no_large_copies(text)
    down = config.moe_num_experts * config.moe_intermediate_size * config.hidden_size
    assert memory.temp_size_in_bytes < down / 4  # in bfloat16 an eighth of the smaller half of a layer's experts


def test_a_mixed_step_decodes_by_the_decode_kernel():
    _, _, shape, _, text = compile_step("single", 1, "mixed", 2048)
    assert (shape.tokens, shape.decode) == (2112, 64)
    moe_layers = LAYERS - 1
    assert text.count('custom_call_target="ernie_decode_attention"') == LAYERS
    assert text.count('custom_call_target="mosaic_gpu_v2"') == LAYERS + 2 * moe_layers  # prompts, and experts


def test_products_by_cublas_write_what_is_read_next():
    """Their float32 results other kernels would have to round."""
    *_, text = compile_step("single", 1, "prefill", 2048)
    entry = text[text.index("\nENTRY") :].splitlines()
    products = [i for i, line in enumerate(entry) if "matmul" in line and "custom_call_target" in line]
    shared = [i for i in products if "/shared/" in entry[i]]
    assert len(shared) == 2 * (LAYERS - 1)
    for gate_up, down in zip(shared[::2], shared[1::2], strict=True):
        between = [line for line in entry[gate_up + 1 : down] if "/shared/" in line and " fusion(" in line]
        assert len(between) == 1 and " = bf16[2048,3072]" in between[0]
    for line in (entry[i] for i in products if "/router/" not in entry[i]):
        assert " = (bf16[" in line, line


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_a_decode_step_is_our_kernels(tokens):
    config, *_, text = compile_step("single", 1, "decode", tokens)
    launched, found = launches(text), collections.Counter(re.findall(r'custom_call_target="(\w+)"', text))
    moe_layers = sum(map(config.is_moe_layer, range(LAYERS)))
    if tokens == 1:  # nothing of XLA's stands between the halves of layers
        assert found["ernie_experts_half"] == moe_layers
        first = launched.index("ernie_experts_half")
        # The fusion is the attention's half with slices of the step's numbers, which are no launches.
        assert launched[first : first + 3] == ["ernie_experts_half", "fusion", "ernie_experts_half"]
    else:  # the chosen experts' products and the shared ones'; the attention's first one, of more tokens both
        products = {8: 0, 64: 1, 256: 2}[tokens] * LAYERS
        assert found["mosaic_gpu_v2"] == 4 * moe_layers + products
        assert found["ernie_route"] == found["ernie_sort_pairs"] == found["ernie_combine_pairs"] == moe_layers
    assert found["ernie_attention_half"] == (LAYERS if tokens <= 16 else 0)
    assert len(launched) <= 15 * LAYERS + 10


@pytest.mark.parametrize(
    ("form", "kind", "tokens", "embedding"),
    [
        ("fp8", "decode", 1, True),
        ("int8", "decode", 16, True),
        ("int4", "decode", 64, True),
        ("int8", "decode", 128, False),
        ("fp8", "decode", 128, False),
        ("int4", "prefill", 2048, True),
    ],
)
def test_quantised_weights_are_read_as_they_lie(form, kind, tokens, embedding):
    *_, memory, text = compile_step("single", 1, kind, tokens, layers=2, quantize=form, embedding=embedding)
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB")
    found = collections.Counter(re.findall(r'custom_call_target="(\w+)"', text))
    assert found["ernie_attention_half"] == (2 if tokens <= 16 else 0)
    if tokens == 1:
        assert found["ernie_experts_half"] == 1 and not found["mosaic_gpu_v2"]
    else:  # the experts'; of many tokens the attention's; and products that neither "cuda" nor XLA does
        head = kind == "decode" and tokens > 16 and embedding
        more = {("prefill", 2048): 2, ("decode", 16): 0, ("decode", 64): 8, ("decode", 128): 6}[kind, tokens]
        beside = 2 * ((form, tokens) == ("fp8", 128))  # the shared experts, which go along with int8
        assert found["mosaic_gpu_v2"] == 2 + head + more + beside
    print(dict(found))
    if kind == "prefill":  # dense weights are made bfloat16, one at a time, and the products round their own sums
        products = re.findall(r"= \((\w+)\[[\d,]+\].*__cublas.*/(attention|mlp|shared)/checkpoint", text)
        assert len(products) == 8 and {dtype for dtype, _ in products} == {"bf16"}
        assert memory.temp_size_in_bytes < 0.4e9
    if kind == "decode":  # no weight is made bfloat16 in memory: the smallest would be 13 MB
        assert memory.temp_size_in_bytes < 13e6
        check_no_large_copies(text)
