"""What all routes of one replica share: engine, tokenizer, chat template, and whether new requests are accepted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

import msgspec
from starlette.requests import Request

from powerband.engine.client.messages import EngineInfo, Heartbeat
from powerband.engine.client.supervisor import EngineProcess
from powerband.errors import InvalidRequest, PowerbandError
from powerband.folders import expand_user
from powerband.metrics.prometheus import EngineMetrics
from powerband.output_parsers.formats import OutputFormat
from powerband.server.adapters import ServedAdapter, ServedAdapters
from powerband.server.compatibility import Amendment
from powerband.server.settings import ServerSettings
from powerband.spec.model.pooling import PoolingSpec
from powerband.spec.settings import EngineSettings
from powerband.structured.compiler import GrammarCompiler
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer
from powerband.web.body import decode, read_body
from powerband.web.errors import HttpError
from powerband.web.middleware import note_ignored_fields
from powerband.web.turns import Decoding, FairTurns

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Body = TypeVar("Body")
_TEXT_THREADS = 4
_BODIES_OF_A_TURN = 8  # decoded in one turn of the event loop
LARGE_TEXT_BYTES = 256 << 10
HUGE_TEXT_BYTES = 1 << 20
_MAX_LOGGED_FIELDS = 256
_MAX_SHOWN_NAMES = 20


@dataclass(slots=True)
class Model:
    """What is known once the engine has started."""

    info: EngineInfo
    tokenizer: Tokenizer | None  # None: the checkpoint has none, and only token ids are taken
    template: ChatTemplate | None
    grammars: GrammarCompiler | None = None
    format: OutputFormat = field(default_factory=OutputFormat)  # in which it calls tools and reasons
    created_s: int = field(default_factory=lambda: int(time.time()))

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                "This model has no tokenizer.", hint="Send token ids to /v1/completions.", code="no_tokenizer"
            )
        return self.tokenizer

    def need_grammars(self) -> GrammarCompiler:
        if self.grammars is None:
            raise InvalidRequest(
                "This model has no tokenizer, which structured output needs.", hint="Ask without a form."
            )
        return self.grammars

    def need_template(self) -> ChatTemplate:
        if self.template is None:
            raise InvalidRequest(
                "This model has no chat template.", hint="Use /v1/completions.", code="no_chat_template"
            )
        return self.template


_WANTED = {"embed": "embeddings", "score": "scores"}


def _embeds(info: EngineInfo) -> bool:
    return info.pooling is not None and info.pooling.task == "embed"


def _gives(info: EngineInfo) -> str:
    if info.pooling is None:
        return "text"
    return "embeddings" if _embeds(info) else "scores"


class ServerState:
    """One engine and its API. Belongs to one event loop."""

    def __init__(
        self,
        engine_settings: EngineSettings,
        settings: ServerSettings,
        make_engine: Callable[..., EngineProcess] = EngineProcess,
    ) -> None:
        self.engine_settings = engine_settings
        self.settings = settings
        self.name = engine_settings.served_model_name or engine_settings.model
        self.metrics = EngineMetrics(self.name)
        self.phase = "process and imports"
        self.engine = make_engine(
            engine_settings,
            log=(settings.log_level, settings.log_format),
            on_phase=self._on_phase,
            on_heartbeat=self._on_heartbeat,
            on_step=self.metrics.observe_step,
            on_residual=self.metrics.observe_residual,
            on_restart=self._on_restart,
        )
        self.adapters = ServedAdapters()
        self.draining = False  # asked for by an operator, who may take it back
        self.ending = False  # asked for by a signal
        self.paused = False
        self.num_active = 0  # HTTP requests that generate
        self.seconds: dict[str, float] = {}  # of the start, by phase
        self._loading_s = 0.0  # when the engine's process had its imports done
        self._model: Model | None = None
        self._logged_fields: set[str] = set()  # ignored ones that the log has named
        self._idle = asyncio.Event()
        self._idle.set()
        self._decoding = Decoding(FairTurns(_BODIES_OF_A_TURN))
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="text")
        self._large_texts = asyncio.Semaphore(_TEXT_THREADS // 2)
        self._huge_text = asyncio.Lock()

    async def start(self) -> EngineInfo:
        """Start the engine and load the tokenizer, concurrently if the folder is known. Raises the errors of both."""
        start_s = time.monotonic()
        folder = expand_user(self.engine_settings.model)
        early = asyncio.create_task(self._load_tokenizer(str(folder))) if folder.is_dir() else None
        try:
            info = await self.engine.start()
        except BaseException:
            if early is not None:
                early.cancel()
            raise
        engine_s = time.monotonic()
        tokenizer = await (early if early is not None else self._load_tokenizer(info.model_folder))
        template = None
        if tokenizer is not None:
            template = await self.in_thread(ChatTemplate.load, tokenizer, self.engine_settings.chat_template)
        self.adapters.engine_started(info)
        info = info.with_end(tokenizer.eos_token_id if tokenizer is not None else None)
        settings, source = self.engine_settings, template.source if template is not None else ""
        grammars = None
        if tokenizer is not None:
            grammars = GrammarCompiler(tokenizer, info.vocab_size, info.eos_token_ids)
        format = OutputFormat.of(source, settings.tool_call_parser, settings.reasoning_parser)
        self._model = Model(info, tokenizer, template, grammars, format)
        loading_s = self._loading_s or engine_s
        self.seconds = {
            "process and imports": loading_s - start_s,
            "engine": engine_s - loading_s,
            "tokenizer": time.monotonic() - engine_s,
        }
        return info

    async def _load_tokenizer(self, model_folder: str) -> Tokenizer | None:
        asked, revision = self.engine_settings.tokenizer, self.engine_settings.revision
        return await self.in_thread(Tokenizer.load, asked or model_folder, revision=None if asked else revision)

    async def stop(self) -> None:
        await self.engine.stop()
        if self._model is not None and self._model.template is not None:
            self._model.template.close()
        if self._model is not None and self._model.grammars is not None:
            self._model.grammars.close()
        self._threads.shutdown(wait=False)
        self._decoding.close()

    @property
    def started(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Model:
        """Raises HttpError 503 while the engine starts."""
        if self._model is None:
            raise HttpError(503, "starting", f"The engine is starting ({self.phase}).", hint="Wait for /readyz.")
        return self._model

    async def read(self, request: Request, kind: type[Body], amends: type[Amendment] = Amendment) -> Body:
        """The body of a request as `kind`. Raises InvalidRequest naming the field, and HttpError.

        amends: what becomes of fields that other servers have. Fields that are ignored are named in the response, and
        in the log once each.
        """
        amendment = amends(kind, self.name, ignores_unknown=self.settings.unknown_fields == "ignore")
        data = await read_body(request, self.settings.max_body_bytes)
        client = "" if request.client is None else request.client.host
        body = await self._decoding.decode(client, data, lambda data: decode(data, kind, amendment))
        if amendment.ignored:
            note_ignored_fields(request.scope, amendment.ignored)
            new = [name for name in amendment.ignored if name not in self._logged_fields]
            for name in new[: _MAX_LOGGED_FIELDS - len(self._logged_fields)]:
                self._logged_fields.add(name)
                logger.warning("Requests have the field %r, which is ignored. This is logged once.", name[:100])
        return body

    def check_name(self, name: str | None) -> None:
        """Raise HttpError 404 unless it is the model's name, or that of an adapter."""
        if name is not None:
            self.adapter(name)

    def adapter(self, name: str | None) -> ServedAdapter | None:
        """The adapter of this name; None for the model itself. Raises HttpError 404 for other names."""
        if name is None or name == self.name:
            return None
        adapter = self.adapters.find(name)
        if adapter is None:
            raise HttpError(
                404,
                "model_not_found",
                f"The model {name[:100]!r} does not exist.",
                hint=f"This server has {self._names_shown()}.",
                param="model",
            )
        return adapter

    def _names_shown(self) -> str:
        names = [self.name, *(adapter.info.name for adapter in self.adapters.all())]
        more = f" and {len(names) - _MAX_SHOWN_NAMES} others" if len(names) > _MAX_SHOWN_NAMES else ""
        return ", ".join(map(repr, names[:_MAX_SHOWN_NAMES])) + more

    def accept(self) -> Model:
        """The model, if new requests to generate are accepted.

        Raises HttpError 503 while starting or draining, and 400 where the model does not generate.
        """
        model = self._open_model()
        if not model.info.generates:
            raise HttpError(
                400,
                "model_does_not_generate",
                f"The model {self.name!r} gives {_gives(model.info)} and does not generate text.",
                hint="Send it to /v1/embeddings." if _embeds(model.info) else "Send it to /v1/score or /v1/rerank.",
                param="model",
            )
        return model

    def accept_pooling(self, task: Literal["embed", "score"]) -> tuple[Model, PoolingSpec]:
        """The model and how it pools, if new requests to embed or score are accepted. Raises as `accept`."""
        model = self._open_model()
        pooling = model.info.pooling
        if pooling is None or (task == "embed" and pooling.task != "embed"):
            raise HttpError(
                400,
                "model_does_not_embed",
                f"The model {self.name!r} gives {_gives(model.info)}, and no {_WANTED[task]}.",
                hint="Serve a checkpoint with sentence-transformers' modules.json, or start with --convert embed."
                if pooling is None
                else "Send it to /v1/score or /v1/rerank.",
                param="model",
            )
        return model, pooling

    def _open_model(self) -> Model:
        if self.draining or self.ending:
            raise HttpError(503, "draining", "This replica takes no new requests.", hint="Send it to another.")
        return self.model

    def unready(self) -> str:
        """Why the replica is not ready; empty when it is."""
        if self.draining or self.ending:
            return "This replica is draining."
        if self._model is None:
            return f"The engine is starting ({self.phase})."
        if self.paused:
            return "The engine is paused."
        return self.engine.health().reason

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts the requests that are refused in this block, before any output."""
        try:
            yield
        except PowerbandError as error:
            if error.http_status < 500:
                self.metrics.observe_rejection(error.code)
            raise

    def begin(self) -> None:
        self.num_active += 1
        self._idle.clear()

    def end(self) -> None:
        self.num_active -= 1
        if self.num_active == 0:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Accept no new requests and wait for the running ones. False if some were still running at the timeout."""
        self.ending = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow function in a thread, so that the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def room_for_text(self, num_bytes: int) -> AbstractAsyncContextManager[object]:
        """Enter it to render or encode a text in a thread: large texts get half of the threads, so that small ones do
        not wait for all of them. Huge ones, of which a tokenizer may take 300 times their size, run one at a time.
        """
        if num_bytes >= HUGE_TEXT_BYTES:
            return self._huge_text
        return self._large_texts if num_bytes >= LARGE_TEXT_BYTES else nullcontext()

    def _on_phase(self, name: str, fraction: float) -> None:
        self._loading_s = self._loading_s or time.monotonic()
        self.phase = f"{name} {fraction:.0%}"

    def _on_restart(self, info: EngineInfo) -> None:
        self.adapters.engine_restarted(self.engine, info)

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.paused = heartbeat.stats.paused
        self.metrics.update(msgspec.to_builtins(heartbeat.stats))
