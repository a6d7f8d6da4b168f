"""serve."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import threading

from absl import flags

from ernie_jax import distributed
from ernie_jax.cli import hosts, models
from ernie_jax.cli.command import Command, UsageError
from ernie_jax.distributed import is_primary, say
from ernie_jax.errors import UserError

_LAST_SECONDS = 8  # for answers to end and the ledger to be written, when another process has ended


def _define(values: flags.FlagValues) -> None:
    models.define_model_flags(values)
    hosts.define_flags(values)
    flags.DEFINE_string(
        "tokenizer",
        None,
        "a model's directory whose tokenizer and template go with --random_weights",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", None, "draws --random_weights", flag_values=values)
    flags.DEFINE_integer("max_sequences", 64, "sequences decoded at the same time", flag_values=values)
    flags.DEFINE_bool(
        "prefix_caching", True, "keep earlier prompts' keys and values for ones that begin alike", flag_values=values
    )
    flags.DEFINE_string(
        "host", "127.0.0.1", "address to listen at; 0.0.0.0 for all of this machine's", flag_values=values
    )
    flags.DEFINE_integer("port", 8000, "0 takes a free one", 0, 65535, flag_values=values)
    flags.DEFINE_string(
        "name", None, "the model's name in the API; default: the last part of --model", flag_values=values
    )
    flags.DEFINE_integer("max_waiting", 256, "sequences that may wait; more get 503", 0, flag_values=values)
    flags.DEFINE_float(
        "request_timeout", None, "seconds a request may take; default: no limit", 0.001, flag_values=values
    )
    flags.DEFINE_float("drain_seconds", 30.0, "how long answers may go on after SIGTERM", 0.0, flag_values=values)
    flags.DEFINE_list("cors", [], "origins of web pages that may use the server; * for all", flag_values=values)
    flags.DEFINE_integer("body_limit_mb", 16, "size of a request's body", 1, flag_values=values)
    flags.DEFINE_string(
        "api_keys", None, "file of keys, one a line: 'KEY' or 'NAME KEY'; also $ERNIE_API_KEYS", flag_values=values
    )
    flags.DEFINE_integer("requests_per_minute", None, "of each key; default: no limit", 1, flag_values=values)
    flags.DEFINE_integer("tokens_per_minute", None, "of each key; default: no limit", 1, flag_values=values)
    flags.DEFINE_string("ledger", None, "SQLite file for the usage of each key: main.py usage", flag_values=values)
    flags.DEFINE_bool("log_prompts", False, "let errors in the log quote what users say", flag_values=values)
    flags.DEFINE_string("tls_cert", None, "PEM file with the certificate chain: serve HTTPS", flag_values=values)
    flags.DEFINE_string("tls_key", None, "PEM file with the certificate's private key", flag_values=values)
    flags.DEFINE_bool(
        "warm_up", True, "compile all programs before the port opens, not when they are needed", flag_values=values
    )


def _serve(values: flags.FlagValues) -> None:
    if (values.tls_cert is None) != (values.tls_key is None):
        raise UsageError("--tls_cert and --tls_key go together")
    hosts.join(values)
    if not is_primary():
        hosts.follow(_load(values).engine)
        return
    for path in filter(None, (values.tls_cert, values.tls_key)):
        if not pathlib.Path(path).is_file():
            raise UserError(f"{path}: no such file")
    from ernie_jax.server.access import Access
    from ernie_jax.server.app import App
    from ernie_jax.server.hooks import FileLedger
    from ernie_jax.server.keys import Keys
    from ernie_jax.server.ledger import Ledger
    from ernie_jax.server.listen import Listener, bind, check_certificate
    from ernie_jax.server.logs import Log
    from ernie_jax.server.metrics import Metrics
    from ernie_jax.server.model import ServedModel
    from ernie_jax.server.runner import Runner

    if values.tls_cert:
        check_certificate(values.tls_cert, values.tls_key)
    keys = Keys.load(values.api_keys)
    ledger = Ledger(values.ledger) if values.ledger else None
    access = Access(keys, values.requests_per_minute, values.tokens_per_minute, ledger)
    # Taken before minutes of loading, so that a port in use is told at once; nobody is heard until the model is ready.
    listener = bind(values.host, values.port)
    llm = _load(values)
    name = values.name or values.model.rstrip("/").rpartition("/")[2]
    model = ServedModel(llm, name)
    runner = Runner(llm.engine, values.max_waiting)
    app = App(
        model,
        runner,
        access=access,
        ledger=FileLedger(ledger) if ledger else None,
        metrics=Metrics(),
        log=Log(log_prompts=values.log_prompts),
        origins=values.cors,
        body_limit=values.body_limit_mb * 2**20,
        request_timeout=values.request_timeout,
    )
    scheme = "https" if values.tls_cert else "http"
    host, port = listener.getsockname()[:2]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    ended = threading.Event()

    class Announced(Listener):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            loop = asyncio.get_running_loop()

            def abandon() -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.abandon)
                ended.wait(_LAST_SECONDS)

            distributed.before_fall(abandon)
            say(f"serving {name} at {url}/v1, and a page to chat with it at {url}")
            say(
                f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d "
                f'\'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
            )

    server = Announced(app, runner, values.drain_seconds, say, values.tls_cert, values.tls_key)
    try:
        with hosts.leading(llm.engine):
            asyncio.run(server.serve([listener]), loop_factory=server.config.get_loop_factory())
            if runner.failure:
                raise runner.failure
            if server.force_exit and distributed.process_count() > 1:
                raise KeyboardInterrupt  # in the midst of a step
    finally:
        if ledger:
            ledger.close()
        ended.set()


def _load(values: flags.FlagValues):
    """Load the model and, unless told otherwise, warm it up: what all processes do alike. Returns an LLM."""
    llm = models.load(values, prefix_caching=values.prefix_caching)
    if values.warm_up:
        _warm_up(llm)
    return llm


def _warm_up(llm) -> None:
    """Compile what requests can ask for, with a bar."""
    from tqdm import tqdm

    from ernie_jax.engine.sampling import MAX_TOP_LOGPROBS

    recommended = llm.sampling_params()
    kinds = [
        {"temperature": 0.0},
        {"temperature": recommended.temperature or 1.0},
        {"temperature": 0.0, "logprobs": True, "top_logprobs": MAX_TOP_LOGPROBS},
        {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {0: 0.0}},
    ]
    with tqdm(desc="warm-up", unit="program", disable=not is_primary()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        llm.engine.warm_up([llm.sampling_params(**kind) for kind in kinds], grammars=True, progress=show)


SERVE = Command(
    "serve",
    "Serve a model over HTTP, as OpenAI's API: chat, completions and responses, streamed or whole. Many requests share "
    "one engine. SIGTERM ends it once the answers in the making are complete. Several processes run one model on the "
    "devices of all, and process 0 listens. docs/serving.md tells more.",
    (
        "main.py serve --model=checkpoints/21b --port=8000",
        "main.py serve --model=baidu/ERNIE-4.5-0.3B-PT --host=0.0.0.0 --tls_cert=chain.pem --tls_key=key.pem",
        "main.py serve --model=ernie-4.5-21b-a3b --random_weights --tokenizer=models/ernie-embedded",
        "main.py serve --model=... --sharding=expert --coordinator=host0:8476 --num_processes=4 --process_id=2",
    ),
    _define,
    _serve,
)
