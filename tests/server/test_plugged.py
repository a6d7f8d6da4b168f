"""Keys, limits, the ledger, metrics and the log where they belong: in a running server."""

import datetime
import io
import json
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ernie_jax.server.access import Access
from ernie_jax.server.hooks import FileLedger
from ernie_jax.server.keys import Keys
from ernie_jax.server.ledger import Ledger, totals
from ernie_jax.server.logs import Log
from ernie_jax.server.metrics import Metrics
from tests.server.conftest import NAME, running

KEYS = "alice sk-alice-0123456789\nbob sk-bob-0123456789\n"


def client_of(server, key):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(client):
    return client.completions.create(model=NAME, prompt="In the beginning", max_tokens=4, temperature=0)


def test_keys_limits_ledger_metrics_and_log(llm, tmp_path):
    keys, stream, path = Keys(), io.StringIO(), str(tmp_path / "usage.db")
    keys.add(KEYS, "a test")
    ledger = Ledger(path)
    plugged = {
        "access": Access(keys, requests_per_minute=3),
        "ledger": FileLedger(ledger),
        "metrics": Metrics(),
        "log": Log(stream),
    }
    with running(llm, **plugged) as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(client_of(server, "sk-nobody"))
        assert refused.value.code == "invalid_api_key"
        usage = [ask(client_of(server, "sk-alice-0123456789")).usage for _ in range(3)]
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client_of(server, "sk-alice-0123456789"))
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        ask(client_of(server, "sk-bob-0123456789"))
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
            families = {f.name: f for f in text_string_to_metric_families(response.read().decode())}
    ledger.close()
    today = datetime.datetime.now(datetime.UTC).date()
    found = {total.key: total for total in totals(path, today, today + datetime.timedelta(1), by_day=False)}
    assert {key: total.requests for key, total in found.items()} == {"alice": 3, "bob": 1}
    assert found["alice"].prompt_tokens == sum(u.prompt_tokens for u in usage)
    assert found["alice"].generated_tokens == sum(u.completion_tokens for u in usage)
    samples = [sample for sample in families["ernie_requests"].samples if sample.name.endswith("_total")]
    counted = {sample.labels["status"]: sample.value for sample in samples}
    assert counted["200"] == 4 and counted["401"] == counted["429"] == 1
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("key") for line in lines if line["event"] == "request"][:4] == [None, "alice", "alice", "alice"]
    assert "sk-" not in stream.getvalue() and "beginning" not in stream.getvalue()
