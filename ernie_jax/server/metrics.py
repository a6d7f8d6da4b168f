"""What /metrics shows, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ernie_jax.engine.engine import Stats

# Seconds, each bucket about twice the one before: a small model's decode step to a long prompt's prefill.
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_EXPERT_LABELS = ("layer", "expert")
_REQUEST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class _ExpertLoad(Collector):
    """Show totals that the engine keeps: `load` has them by layer."""

    load: Mapping[int, Sequence[int]] = MappingProxyType({})

    def collect(self) -> Iterator[CounterMetricFamily]:
        if self.load:
            family = CounterMetricFamily("ernie_expert_tokens", "Tokens that chose the expert.", labels=_EXPERT_LABELS)
            for layer, counts in self.load.items():
                for expert, count in enumerate(counts):
                    family.add_metric((str(layer), str(expert)), count)
            yield family


class Metrics:
    """Count and time, from any thread; all of it in a registry of its own, so that servers in one process don't mix."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> prometheus.Counter:
            return prometheus.Counter(f"ernie_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> prometheus.Gauge:
            return prometheus.Gauge(f"ernie_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> prometheus.Histogram:
            return prometheus.Histogram(f"ernie_{name}", text, labels, registry=registry, buckets=buckets)

        self._first_token = histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST_TOKEN)
        self._token = histogram("time_per_token_seconds", "Between two tokens of an answer.", _TOKEN)
        self._seconds = histogram("request_seconds", "From a request to its end.", _REQUEST, ("endpoint",))
        self._requests = counter("requests", "Finished requests.", ("endpoint", "status"))
        self._prompt = counter("prompt_tokens", "Tokens of prompts, found in the prefix cache or not.")
        self._cached = counter("prefix_hit_tokens", "Tokens of prompts that were found in the prefix cache.")
        self._generated = counter("generated_tokens", "Tokens of answers.")
        self._running = gauge("running_sequences", "Sequences that the engine works at.")
        self._waiting = gauge("waiting_sequences", "Sequences in the queue.")
        pages = gauge("kv_pages", "Pages of the KV cache; cached ones are unused but known.", ("state",))
        self._pages = {state: pages.labels(state) for state in ("used", "cached", "free")}
        self._preemptions = counter("preemptions", "Sequences that gave up their pages, to be computed again.")
        self._seen_preemptions = 0
        self._experts = _ExpertLoad()
        registry.register(self._experts)

    def observe_first_token(self, seconds: float) -> None:
        """Time the first token of an answer, since its request came."""
        self._first_token.observe(seconds)

    def observe_token(self, seconds: float) -> None:
        """Time a later token, since the one before."""
        self._token.observe(seconds)

    def count_tokens(self, prompt: int, cached: int, generated: int) -> None:
        """Count a request's tokens; the cached ones are among the prompt's."""
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._generated.inc(generated)

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a finished request; `endpoint` is the route's path, one of few, never what a client made up."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def set_stats(self, stats: Stats) -> None:
        """Show what the engine holds now; from one thread."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        for state, gauge in self._pages.items():
            gauge.set(getattr(stats, f"{state}_pages"))
        # A total that falls is that of a new engine.
        new = stats.preemptions - self._seen_preemptions
        self._preemptions.inc(new if new >= 0 else stats.preemptions)
        self._seen_preemptions = stats.preemptions

    def set_experts(self, load: Mapping[int, Sequence[int]]) -> None:
        """Show by layer how many tokens have chosen each of its experts since the engine began."""
        self._experts.load = load

    def render(self) -> tuple[str, bytes]:
        """Return the content type and the text."""
        return prometheus.CONTENT_TYPE_LATEST, prometheus.generate_latest(self._registry)
