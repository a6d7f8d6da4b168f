"""plan: what it prints for people and for programs, and bad input."""

import json
import subprocess
import sys

import pytest

from ernie_jax.planner import topology


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A Hugging Face directory without weights: two layers, with dimensions that TPU kernels take."""
    folder = tmp_path_factory.mktemp("small")
    fields = {
        "model_type": "ernie4_5_moe",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_num_shared_experts": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_a_slice_for_people(run, model):
    pytest.importorskip("libtpu")
    result = run("plan", f"--model={model}", "--topology=v5e-4", "--batch=4", "--context=1024")
    assert result.code == 0
    assert result.err.startswith("compiling for v5e:2x2")
    first, second, _, verdict = result.out.splitlines()[:4]
    assert first == f"{model}, bfloat16, on v5e:2x2 (v5litepod-4): 4 x TPU v5e, 1 host"
    assert second == "sharding expert (data:2,expert:2): batch 4, context 1,024, prefill chunks of 512"
    assert verdict.startswith("FITS: 15.") and verdict.endswith("GiB of a chip are left")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    for words in ("weights 0.0", "KV cache 0.0", "temporaries 0.0", "total 0.", "of 15.75 usable", "left 15.",
                  "roofline, bound by", "5 all-reduce", "compiled for the slice: decode"):  # fmt: skip
        assert any(words in line for line in lines), words
    assert all(len(line) <= 120 for line in result.out.splitlines())


def test_a_slice_for_programs(run, model):
    pytest.importorskip("libtpu")
    result = run("plan", f"--model={model}", "--topology=tpu7x-2", "--batch=4", "--json", "--sharding=tensor")
    assert (result.code, result.out.count("\n")) == (0, 1)
    found = json.loads(result.out)
    assert found["fits"] is True and found["sharding"] == "tensor" and found["compiled"] is True
    assert found["mesh"] == {"data": 1, "expert": 1, "tensor": 2}
    assert found["topology"] == {
        "name": "tpu7x:1x1x1", "cloud_name": "tpu7x-2", "chip": "TPU7x", "chips": 1, "devices": 2, "hosts": 1,
    }  # fmt: skip
    assert (found["context"], found["prefill_chunk"]) == (4096, 512)  # the model's most; the engine's
    memory = found["per_device"]
    assert memory["total"] == memory["weights"] + memory["kv_cache"] + memory["temporaries"]
    assert memory["left"] == memory["memory"] - memory["total"] > 0
    for step, tokens in (("decode", 4), ("prefill", 512)):
        times = {name: found[step][f"{name}_seconds"] for name in ("memory", "compute", "link")}
        assert found[step]["tokens"] == tokens
        assert found[step]["seconds"] == max(times.values()) == times[found[step]["bound"].removesuffix("s")]
        assert times["link"] == 0  # both devices are of one chip
        assert found[step]["serial_seconds"] == pytest.approx(sum(times.values()))
        assert [(c["kind"], c["count"]) for c in found[step]["collectives"]] == [("all-reduce", 5)]


def test_gpus_without_a_compiler(run, monkeypatch):
    monkeypatch.setattr(topology.Topology, "compile_devices", lambda self: pytest.fail("compiled"))
    result = run("plan", "--model=ernie-4.5-21b-a3b", "--topology=h100:2", "--compare")
    assert (result.code, result.err) == (0, "")
    assert "FITS" in result.out and "a tenth, which the engine keeps free; not compiled" in result.out
    table = result.out.split("all shardings")[1].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["sharding", "expert", "expert+tensor", "expert+data", "exchange",
                                                   "tensor"]  # fmt: skip
    assert [line.split()[0] for line in table if "*" in line] == ["expert"]
    found = json.loads(run("plan", "--model=ernie-4.5-21b-a3b", "--topology=h100:2", "--compare", "--json").out)
    assert found["fits"] is True and found["sharding"] == "expert" and found["compiled"] is False
    assert {name: plan["fits"] for name, plan in found["compare"].items()} == dict.fromkeys(
        ("expert", "expert+tensor", "expert+data", "exchange", "tensor"), True
    )
    assert found["compare"]["expert"]["per_device"] == found["per_device"]


def test_int8_weights(run):
    arguments = ("plan", "--model=ernie-4.5-21b-a3b", "--topology=h100:1", "--json")
    exact, small = (json.loads(run(*arguments, *more).out) for more in ((), ("--quantize=int8",)))
    assert (exact["quantize"], small["quantize"]) == (None, "int8")
    less = json.loads(run(*arguments, "--quantize=int8", "--quantize_embedding").out)
    saved = small["per_device"]["weights"] - less["per_device"]["weights"]
    assert less["quantize_embedding"] and saved == 103_424 * (2560 - 4)
    result = run(*arguments, "--quantize_embedding")
    assert (result.code, result.out) == (1, "") and "--quantize_embedding goes with --quantize" in result.err
    assert 0.5 < small["per_device"]["weights"] / exact["per_device"]["weights"] < 0.52
    assert "ernie-4.5-21b-a3b, bfloat16 and int8 weights, on h100:1" in run(*arguments[:3], "--quantize=int8").out
    result = run(*arguments, "--quantize=int3")
    assert (result.code, result.out) == (1, "") and "--quantize=int3: unknown; choose int8 or fp8 or int4" in result.err


def test_what_does_not_fit_and_what_would(run):
    arguments = ("plan", "--model=ernie-4.5-300b-a47b", "--topology=v5e-8", "--batch=8")
    result = run(*arguments)
    assert result.code == 0
    assert "DOES NOT FIT" in result.out
    assert "--topology=v5e:8x8 --sharding=expert, the smallest slice that does" in result.out
    found = json.loads(run(*arguments, "--json").out)
    assert found["fits"] is False and found["sharding"] == "expert" and not found["compiled"]
    assert found["would_fit"] == ["--topology=v5e:8x8 --sharding=expert, the smallest slice that does"]
    assert found["per_device"]["left"] < 0


def test_a_number_of_gpus_that_no_sharding_takes(run):
    result = run("plan", "--model=ernie-4.5-21b-a3b", "--topology=h200:6")
    assert (result.code, result.out) == (1, "")
    assert "6 devices" in result.err and result.err.count("\n") == 1


def test_shardings_that_do_not_suit_are_named(run):
    result = run("plan", "--model=ernie-4.5-0.3b", "--topology=h200:2", "--compare")
    assert result.code == 0
    table, notes = result.out.split("all shardings")[1].split("\n  exchange: ")
    assert "tensor *" in table and "no experts" in notes


def test_will_21b_run_on_my_v5e_8_with_32k_context_and_16_sequences():
    """The whole question, in a fresh process: one object on stdout, nothing of libtpu's on stderr."""
    pytest.importorskip("libtpu")
    program = "import sys; from ernie_jax.cli import main; main(['main.py', *sys.argv[1:]])"
    arguments = ["plan", "--model=ernie-4.5-21b-a3b", "--topology=v5e-8", "--context=32768", "--batch=16", "--json"]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert result.stderr == "compiling for v5e:2x4, sharding expert (data:2,expert:4): about a minute at most\n"
    found = json.loads(result.stdout)
    assert found["fits"] is True and found["compiled"] is True
    assert (found["sharding"], found["mesh"]) == ("expert", {"data": 2, "expert": 4, "tensor": 1})
    gib = 1 << 30
    memory = {name: size / gib for name, size in found["per_device"].items()}
    assert memory["memory"] == 15.75
    assert 5.0 < memory["weights"] < 5.5 and 3.5 <= memory["kv_cache"] < 3.51
    assert 0 < memory["temporaries"] < 1
    assert found["most_sequences"] >= 16 and found["kv_tokens"] > 16 * 32768
    for step in ("decode", "prefill"):
        # Two sums a layer and the embedding's.
        assert [(c["kind"], c["count"], c["group_size"]) for c in found[step]["collectives"]] == [("all-reduce", 57, 8)]
    assert found["decode"]["bound"] == "memory"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v9-8"], ["--topology=v9-8", "v5e", "tpu7x", "h100"]),
        (["--topology=v5e:3x3"], ["2x4", "v5litepod-8"]),
        (["--topology=h100:16"], ["h100:1 to h100:8"]),
        (["--topology=v5e-8", "--sharding=zigzag"], ["--sharding=zigzag", "expert+tensor"]),
        (["--topology=v5e-8", "--sharding=fsdp"], ["--sharding=fsdp", "training"]),
        (["--topology=v5e-8", "--mesh=expert:4"], ["--mesh=expert:4", "4 devices", "8"]),
        (["--topology=v5e-8", "--mesh=pipe:8"], ["'pipe'", "data, expert, tensor"]),
        (["--topology=v5e-8", "--batch=0"], ["--batch=0"]),
        (["--topology=v5e-8", "--context=5000"], ["--context=5000", "4,096"]),
        (["--topology=v5e-8", "--context=0"], ["--context=0"]),
        (["--topology=v5e-8", "--prefill_chunk=0"], ["--prefill_chunk=0"]),
        (["--topology=v5e-8", "--dtype=int3"], ["int3", "bfloat16"]),
    ],
)
def test_bad_input_is_one_sentence(run, model, arguments, words):
    result = run("plan", f"--model={model}", *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_without_libtpu_there_is_one_sentence(run, model, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    result = run("plan", f"--model={model}", "--topology=v5e-8")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and "pip install libtpu" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], ["give --model", "give --topology"]), (["--model=ernie-4.5-0.3b"], ["give --topology", "v5e:2x4"])],
)
def test_what_must_be_given(run, arguments, words):
    result = run("plan", *arguments)
    assert (result.code, result.out) == (2, "")
    assert all(word in result.err for word in words)


def test_an_8_bit_cache(run):
    command = ("plan", "--model=ernie-4.5-21b-a3b", "--topology=h100:1", "--batch=1", "--context=1024")
    whole, small = (json.loads(run(*command, "--json", *more).out) for more in ((), ("--kv_dtype=int8",)))
    assert (whole["kv_dtype"], small["kv_dtype"]) == ("bfloat16", "int8")
    assert small["per_device"]["kv_cache"] * 256 == whole["per_device"]["kv_cache"] * (128 + 4)
    assert ", int8 KV cache, on h100:1" in run(*command, "--kv_dtype=int8").out.splitlines()[0]
    result = run(*command, "--kv_dtype=int3")
    assert result.code == 1 and "kv_dtype=int3: unknown; choose one of bfloat16, int8, fp8" in result.err
