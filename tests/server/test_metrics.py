"""/metrics, read as Prometheus reads it."""

import dataclasses
import threading

from prometheus_client.parser import text_string_to_metric_families

from ernie_jax.engine.engine import Stats
from ernie_jax.server.metrics import Metrics

STATS = Stats(
    running=3, waiting=2, free_pages=10, cached_pages=20, used_pages=30, preemptions=4, prompt_tokens=0,
    cached_tokens=0, generated_tokens=0, steps=9,
)  # fmt: skip


def read(metrics):
    """Return {(sample's name, *its labels' values in the order of the labels' names): value}."""
    content_type, text = metrics.render()
    assert content_type.startswith("text/plain") and isinstance(text, bytes)
    families = list(text_string_to_metric_families(text.decode()))
    assert all(family.documentation and family.name.startswith("ernie_") for family in families)
    return {
        (sample.name, *dict(sorted(sample.labels.items())).values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_new_server_shows_zeros():
    found = read(Metrics())
    names = ("prompt_tokens", "prefix_hit_tokens", "generated_tokens", "preemptions")
    assert all(found[f"ernie_{name}_total",] == 0 for name in names)
    assert found["ernie_kv_pages", "free"] == found["ernie_waiting_sequences",] == 0
    assert not any(name.startswith("ernie_expert") for name, *_ in found)


def test_times():
    metrics = Metrics()
    for seconds in (0.02, 0.3, 500):
        metrics.observe_first_token(seconds)
        metrics.observe_token(seconds / 10)
    found = read(metrics)
    first, token = "ernie_time_to_first_token_seconds", "ernie_time_per_token_seconds"
    assert [found[f"{first}_bucket", edge] for edge in ("0.01", "0.025", "0.5", "120.0", "+Inf")] == [0, 1, 2, 2, 3]
    assert [found[f"{token}_bucket", edge] for edge in ("0.001", "0.0025", "0.03", "+Inf")] == [0, 1, 2, 3]
    assert found[f"{first}_sum",] == 500.32 and found[f"{first}_count",] == 3


def test_requests_and_tokens():
    metrics = Metrics()
    metrics.count_request("/v1/chat/completions", 200, 1.5)
    metrics.count_request("/v1/chat/completions", 200, 2.5)
    metrics.count_request("/v1/completions", 429, 0.001)
    metrics.count_tokens(100, 64, 7)
    metrics.count_tokens(1, 0, 1)
    found = read(metrics)
    assert found["ernie_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["ernie_requests_total", "/v1/completions", "429"] == 1
    assert found["ernie_request_seconds_sum", "/v1/chat/completions"] == 4
    totals = [found[f"ernie_{name}_total",] for name in ("prompt_tokens", "prefix_hit_tokens", "generated_tokens")]
    assert totals == [101, 64, 8]


def test_engine():
    metrics = Metrics()
    metrics.set_stats(STATS)
    found = read(metrics)
    assert [found["ernie_kv_pages", state] for state in ("free", "cached", "used")] == [10, 20, 30]
    assert (found["ernie_running_sequences",], found["ernie_waiting_sequences",]) == (3, 2)
    preemptions = [found["ernie_preemptions_total",]]
    for total in (4, 9, 2, 3):  # at 2 the engine was a new one
        metrics.set_stats(dataclasses.replace(STATS, preemptions=total, running=0))
        preemptions.append(read(metrics)["ernie_preemptions_total",])
    assert preemptions == [4, 4, 9, 11, 12]
    assert read(metrics)["ernie_running_sequences",] == 0


def test_experts():
    metrics = Metrics()
    metrics.set_experts({1: [5, 0, 2], 2: [0, 7, 0]})
    assert read(metrics)["ernie_expert_tokens_total", "2", "1"] == 2
    metrics.set_experts({1: [6, 0, 3], 2: [0, 7, 0]})
    found = read(metrics)
    assert [found["ernie_expert_tokens_total", str(expert), "1"] for expert in range(3)] == [6, 0, 3]
    assert [found["ernie_expert_tokens_total", str(expert), "2"] for expert in range(3)] == [0, 7, 0]


def test_servers_of_one_process_do_not_mix():
    one, other = Metrics(), Metrics()
    one.count_tokens(5, 0, 5)
    assert read(other)["ernie_prompt_tokens_total",] == 0


def test_labels_are_escaped():
    metrics = Metrics()
    metrics.count_request('a"b\\c\nd', 200, 0.1)
    assert read(metrics)["ernie_requests_total", 'a"b\\c\nd', "200"] == 1


def test_many_threads():
    metrics = Metrics()

    def work():
        for _ in range(1000):
            metrics.count_tokens(3, 2, 1)
            metrics.observe_token(0.01)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read(metrics)
    assert found["ernie_prompt_tokens_total",] == 24_000 and found["ernie_time_per_token_seconds_count",] == 8000
