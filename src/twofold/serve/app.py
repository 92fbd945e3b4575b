"""The HTTP face of an index: a page for people, an API for programs, numbers for whoever watches over it.

    GET  /                    the page
    POST /api/v1/search       words, items and filters in, hits out
    POST /api/v1/search/picture   the same with a picture
    POST /api/v1/items        items as they come, nothing being looked for
    GET  /api/v1/item         one item; its picture under /api/v1/picture
    POST /api/v1/feedback     this hit was meant, or was not
    GET  /api/v1/corrected    what that changed: judged questions, answered by the model before and now
    GET  /health /ready /metrics

Every answer carries X-Request-ID, every error is JSON that says what to do. No address is ever fetched on a client's
behalf, and no file outside the indexed folders is ever read.
"""

import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import anyio
from anyio import to_thread
from fastapi import Depends, FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold import __version__
from twofold.errors import DecodeError, EmbedderError, StoreError, TwofoldError
from twofold.retrieve.corrected import Corrected, change
from twofold.retrieve.feedback import Click
from twofold.retrieve.filters import parse_where
from twofold.retrieve.store import Hit, Via
from twofold.serve.keys import Keys
from twofold.serve.service import Service

UPLOAD = 20 << 20  # bytes of a request
SECONDS = 20.0  # that a search may take
MAP_SECONDS = 600.0  # that laying out a map may take; it is kept
CHOSEN = 100_000  # items that a search may be kept to
AT_ONCE = 4  # searches that compute side by side; more wait
COOKIE = "twofold_key"
PROBES = ("/health", "/ready")  # asked by address; they tell nothing that a page elsewhere could use
FIGURES = ("rank", "first", "wrong")  # of a `Change`, before and after
PAGE = ("index.html", "style.css", "app.js", "changes.js", "element.js", "map.js")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MISSED = {
    (404, "Not Found"): "There is nothing at this address. /openapi.json lists what there is.",
    (405, "Method Not Allowed"): "This address answers another method. /openapi.json says which.",
}

log = logging.getLogger("twofold.serve")
T = TypeVar("T")

Id = Annotated[str, Field(min_length=1, max_length=4096)]
Words = Annotated[str, Field(max_length=10_000)]
Filters = list[Annotated[str, Field(max_length=1000)]]
Chosen = list[Id] | None


class Wanted(BaseModel):
    """What to look for. Words, items and a picture may come together; at least one of them must."""

    model_config = ConfigDict(extra="forbid")

    text: Words | None = Field(None, description="what to look for, in words")
    minus: Words | None = Field(None, description="words to lead away from")
    like: list[Id] = Field([], max_length=50, description="items to look for the like of")
    unlike: list[Id] = Field([], max_length=50, description="items to lead away from")
    weight: float = Field(0.5, ge=0, le=1, description="the words' share beside a picture or items")
    spread: float = Field(0.0, ge=0, le=1, description="how much the hits shall differ from each other")
    distinct: float | None = Field(None, ge=-1, le=1, description="leave out hits of this cosine with a better one")
    via: Via = Field("both", description="which of the index's spaces answers words")
    where: Filters = Field([], max_length=50, description="filters: column=value")
    within: Chosen = Field(None, max_length=CHOSEN, description="these items only, each of them compared")
    k: int = Field(24, ge=1, le=200, description="how many hits")
    offset: int = Field(0, ge=0, le=10_000, description="how many to pass over first")


class Browsed(BaseModel):
    """Which items to list, without looking for anything."""

    model_config = ConfigDict(extra="forbid")

    where: Filters = Field([], max_length=50, description="filters: column=value")
    within: Chosen = Field(None, max_length=CHOSEN, description="these items only")
    k: int = Field(24, ge=1, le=200, description="how many")
    offset: int = Field(0, ge=0, description="how many to pass over first")


class Item(BaseModel):
    id: str
    meta: dict[str, str | int | float | bool]


class FoundIn(BaseModel):
    """Where one space of the index, or one of its modalities, has a hit in its own answer."""

    space: str = Field(description="items or texts; of an index of several modalities also the item's own")
    rank: int = Field(description="from 1")
    score: float = Field(description="the cosine in that space, −1..1, or what a remedy made of it")
    text: str | None = Field(None, description="which of the item's texts was nearest, in the space of texts")


class Found(Item):
    score: float = Field(description="cosine with what was looked for, −1..1, or of both spaces: an order here")
    probability: float | None = Field(None, description="that it is meant, where the model was calibrated")
    spaces: list[FoundIn] = Field([], description="which spaces found it, where the texts were asked, too")


class Answer(BaseModel):
    hits: list[Found]
    more: bool = Field(description="whether there may be further hits behind `offset + k`")
    none_fits: bool = Field(False, description="a calibrated model thinks that nothing here is what was looked for")
    notes: list[str] = Field([], description="what to know of this answer: a space that could not be asked")
    milliseconds: float


class SpaceFacts(BaseModel):
    name: Literal["items", "texts"]
    fingerprint: str
    dim: int
    rows: int = Field(description="items, or texts")
    embedder: str = Field(description="the text embedder's name; empty for the model's own space")


class Listed(BaseModel):
    hits: list[Item]
    more: bool = Field(description="whether there are further items behind `offset + k`")


class Facts(BaseModel):
    """What is served."""

    items: int
    modality: str
    modalities: dict[str, str] = Field(
        description="by what items are found, and its kind; of several, the column `modality` tells an item's"
    )
    asks: list[str] = Field(description="what one may look with: text, image")
    fingerprint: str
    spaces: list[SpaceFacts]
    built: str
    version: str
    writes: bool = Field(description="whether this caller may give feedback")
    corrected: bool = Field(description="whether judged questions were answered by another model before")
    columns: dict[str, list[tuple[str | int | float | bool, int]]]
    hints: list[str] = Field([], description="what whoever keeps the index may want to do, with the command for it")


class Plane(BaseModel):
    """One entry an item in `ids`, `x` and `y`, which are 0..1."""

    ids: list[str]
    x: list[float]
    y: list[float]
    words: list[str] = Field([], description="ids of items that have words and no picture to show")


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Id
    relevant: bool
    text: Words | None = None
    like: list[Id] = Field([], max_length=50)


class Place(Item):
    before: int | None = Field(description="where it stood with the model before, 1 is best; null beyond the first 100")
    after: int | None = Field(description="where it stands now")
    relevant: bool | None = Field(None, description="what was said of it; null where nobody said anything")


class CorrectedQuestion(BaseModel):
    """A question that was judged, as it was answered by the model before and is answered now."""

    text: str | None
    like: list[str]
    before: list[Place] = Field(description="the first hits of the model before")
    after: list[Place] = Field(description="the first hits now")
    judged: list[Place] = Field(description="the items that were judged")


class Corrections(BaseModel):
    questions: list[CorrectedQuestion]
    right: int = Field(description="questions that have an item found right")
    rank: tuple[float, float] | None = Field(description="mean place of the first of these, before and after")
    first: tuple[float, float] | None = Field(description="share of them that have it in the first place, 0..1")
    wrong: tuple[float, float] | None = Field(description="items found wrong among the first ten, a question")


class Problem(BaseModel):
    error: str = Field(description="what happened, what was expected, what to do")
    request: str = Field(description="the X-Request-ID, for whoever reads the log")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": said}
    for status, said in {
        400: "The request is not HTTP as it should be.",
        401: "A key is needed, and none or a wrong one was given.",
        403: "The key does not allow this.",
        404: "There is no such item, or no picture of it that may be shown.",
        413: "The request is too large.",
        422: "The request cannot be understood or carried out.",
        503: "Busy, or the index cannot be read at the moment.",
    }.items()
}


def app(
    index: Path | str,
    *,
    roots: Sequence[Path | str] = (),
    keys: Keys | None = None,
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]"),
    upload: int = UPLOAD,
    seconds: float = SECONDS,
) -> FastAPI:
    """The service of one index. Without `keys` whoever reaches it may read and give feedback.

    `hosts` are the names that it may be called by: a page elsewhere cannot reach it through a name of its own.
    """
    service = Service(index, roots=roots)
    limiter = anyio.CapacityLimiter(AT_ONCE)
    registry = CollectorRegistry()
    latency = Histogram(
        "twofold_request_seconds", "Time to answer, by route and status", ["route", "status"], registry=registry
    )
    Gauge("twofold_items", "Items in the index", registry=registry).set_function(lambda: len(service.opened.store))
    waiting = Gauge("twofold_requests_in_flight", "Requests being answered", registry=registry)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        service.close()

    api = FastAPI(
        title="twofold",
        version=__version__,
        description="Search one index with words, pictures, items, or several of them together.",
        lifespan=lifespan,
        responses=PROBLEMS,
        docs_url=None,  # its page would fetch scripts from elsewhere; /openapi.json stays
        redoc_url=None,
    )

    async def compute(work: Callable[[], T], wait: float = seconds) -> T:
        """Run `work` in a thread, a few side by side; who waits too long is told so."""
        try:
            with anyio.fail_after(wait):
                return await to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)
        except TimeoutError:
            raise HTTPException(503, f"This took longer than {wait:g} s. Try again in a moment.") from None

    # -- who may do what ----------------------------------------------------------------------------------------------

    def scope(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        cookie: Annotated[str | None, Depends(APIKeyCookie(name=COOKIE, auto_error=False))],
    ) -> Literal["read", "write"]:
        if keys is None:
            return "write"
        given = bearer.credentials if bearer else cookie
        held = keys.scope(given) if given else None
        if held is None:
            raise HTTPException(401, "This service asks for a key: `Authorization: Bearer KEY`.")
        return held

    def may_write(held: Annotated[str, Depends(scope)]) -> None:
        if held != "write":
            raise HTTPException(403, "This key may read only; giving feedback needs one of scope write.")

    Reader = Depends(scope)

    # -- searching ----------------------------------------------------------------------------------------------------

    async def answer(wanted: Wanted, image: bytes | None = None) -> Answer:
        started = time.perf_counter()
        query = wanted.model_dump(exclude={"where", "k"}) | {"where": parse_where(wanted.where), "k": wanted.k + 1}
        found = await compute(partial(service.search, image=image, **query))
        return Answer(
            hits=[_found(hit) for hit in found.hits[: wanted.k]],
            more=len(found.hits) > wanted.k,
            none_fits=found.none_fits,
            notes=found.notes,
            milliseconds=round(1000 * (time.perf_counter() - started), 1),
        )

    @api.post("/api/v1/search", dependencies=[Reader])
    async def search(wanted: Wanted) -> Answer:
        """The items nearest to what is wanted, best first."""
        return await answer(wanted)

    @api.post("/api/v1/search/picture", dependencies=[Reader])
    async def search_with_picture(
        picture: Annotated[UploadFile, File(description="what to look for the like of")],
        wanted: Annotated[str, Form(description="as for /api/v1/search, in JSON")] = "{}",
    ) -> Answer:
        """The items nearest to a picture, and to what else is wanted. The picture is not kept."""
        try:
            parsed = Wanted.model_validate_json(wanted)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from error
        return await answer(parsed, await picture.read())

    # -- items --------------------------------------------------------------------------------------------------------

    @api.get("/api/v1/facts")
    async def facts(held: Annotated[str, Depends(scope)]) -> Facts:
        """What is served: how many items, what one may look with, and the columns to filter by."""
        columns = await compute(service.columns)
        opened = service.opened
        own, *texts = opened.head.spaces
        return Facts(
            items=len(opened.store),
            modality=opened.head.modality,
            modalities={name: tower.kind for name, tower in opened.towers.items()},
            asks=sorted({*opened.bundle.towers, *(["text"] if texts else [])}),
            spaces=[
                SpaceFacts(**{**asdict(space), "rows": rows})
                for space, rows in ((own, len(opened.store)), *((space, space.rows) for space in texts))
            ],
            fingerprint=opened.head.fingerprint,
            built=opened.head.built,
            version=__version__,
            writes=held == "write",
            corrected=bool(await compute(service.corrected)),
            columns={column.name: column.values for column in columns},
            hints=opened.hints() if held == "write" else [],
        )

    @api.post("/api/v1/items", dependencies=[Reader])
    async def items(browsed: Browsed) -> Listed:
        """Items in the order of their source, nothing being looked for."""
        where = parse_where(browsed.where)
        wanted = browsed.model_dump(include={"within", "offset"}) | {"where": where, "k": browsed.k + 1}
        found = await compute(partial(service.browse, **wanted))
        return Listed(hits=[Item(id=hit.id, meta=hit.meta) for hit in found[: browsed.k]], more=len(found) > browsed.k)

    @api.get("/api/v1/item", dependencies=[Reader])
    async def item(id: Annotated[Id, Query()]) -> Item:
        """One item's columns."""
        return Item(id=id, meta=await compute(partial(service.item, id)))

    @api.get(
        "/api/v1/picture",
        dependencies=[Reader],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "The picture."}},
    )
    async def picture(id: Annotated[Id, Query()], large: bool = False) -> Response:
        """An item's picture, small or large, as JPEG: its pixels only, not what the file says of place and camera."""
        content = await compute(partial(service.picture, id, large=large))
        if content is None:
            raise HTTPException(404, "There is no picture of this item that may be shown.")
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    @api.post("/api/v1/feedback", status_code=204, response_class=Response, dependencies=[Depends(may_write)])
    async def feedback(said: Said) -> Response:
        """Keep that a hit was meant, or was not; it becomes training data."""
        click = Click(said.text, tuple(said.like), said.id, said.relevant)
        await compute(partial(service.judge, click))
        return Response(status_code=204)

    @api.get("/api/v1/corrected", dependencies=[Reader])
    async def corrected(hits: Annotated[int, Query(ge=1, le=50)] = 8) -> Corrections:
        """The questions that were judged before the index got its last model: how they were answered then, and now."""
        return await compute(partial(_corrections, service, hits))

    @api.post("/api/v1/session", status_code=204, response_class=Response, include_in_schema=False)
    async def session(request: Request) -> Response:
        """For the page: keep the key of the Authorization header in a cookie that scripts cannot read."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if keys is None or keys.scope(given) is None:
            raise HTTPException(401, "This is none of the keys that the service knows.")
        response = Response(status_code=204)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
        return response

    @api.get("/api/v1/map", dependencies=[Reader])
    async def plane() -> Plane:
        """Where each item lies on a plane on which near ones are alike."""
        ids, places = await compute(service.plane, wait=MAP_SECONDS)
        words = await compute(service.words)
        return Plane(ids=ids, x=places[:, 0].tolist(), y=places[:, 1].tolist(), words=words)

    # -- watching -----------------------------------------------------------------------------------------------------

    @api.get("/health", response_class=PlainTextResponse, include_in_schema=False)
    async def health() -> str:
        """The process lives."""
        return "ok\n"

    @api.get("/ready", response_class=PlainTextResponse, include_in_schema=False)
    async def ready() -> str:
        """The index can be searched."""
        await compute(lambda: len(service.index.store))
        return "ready\n"

    @api.get("/metrics", include_in_schema=False, dependencies=[Reader])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # -- the page -----------------------------------------------------------------------------------------------------

    web = files("twofold.serve") / "web"

    def page(name: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            return FileResponse(str(web / name), headers={"Cache-Control": "no-cache"})

        return send

    for name in PAGE:
        api.get("/" if name == "index.html" else f"/{name}", include_in_schema=False)(page(name))

    # -- errors -------------------------------------------------------------------------------------------------------

    @api.exception_handler(TwofoldError)
    async def mendable(request: Request, error: TwofoldError) -> JSONResponse:
        if isinstance(error, EmbedderError):
            return _problem(request, 503, str(error))
        if isinstance(error, StoreError):
            return _problem(request, 404 if "There is no item" in str(error) else 503, str(error))
        reason = f"The picture cannot be read: {error.reason}." if isinstance(error, DecodeError) else str(error)
        return _problem(request, 422, reason)

    @api.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if request.method == "POST" and not kind.startswith(("application/json", "multipart/form-data")):
            return _problem(request, 422, "Send JSON, and say so: `Content-Type: application/json`.")
        return _problem(request, 422, "; ".join(map(_told, error.errors())))

    @api.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        said = MISSED.get((error.status_code, error.detail), str(error.detail))
        return _problem(request, error.status_code, said, headers=error.headers)

    api.add_middleware(_Watched, hosts=hosts, upload=upload, latency=latency, waiting=waiting)
    api.state.service = service
    return api


def _told(wrong: Mapping[str, Any]) -> str:
    """One thing that is wrong with a request: where, and what was expected."""
    reason = wrong.get("ctx", {}).get("error") if wrong["type"] == "json_invalid" else None
    return f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}{f' ({reason})' if reason else ''}"


def _found(hit: Hit) -> Found:
    spaces = [FoundIn(**place._asdict()) for place in hit.spaces]
    return Found(id=hit.id, score=hit.score, meta=hit.meta, probability=hit.probability, spaces=spaces)


def _corrections(service: Service, hits: int) -> Corrections:
    rows = service.corrected()

    def place(row: Corrected, id: str) -> Place:
        said = True if id in row.judged.positives else False if id in row.judged.negatives else None
        before, after = (answer.rank([id]) for answer in (row.before, row.after))
        return Place(id=id, meta=meta.get(id, {}), before=before, after=after, relevant=said)

    shown = [
        [*row.before.ids[:hits], *row.after.ids[:hits], *row.judged.positives, *row.judged.negatives] for row in rows
    ]
    meta = service.columns_of({id for ids in shown for id in ids})
    come = change(rows)
    figures = {name: None if math.isnan(pair[0]) else pair for name, pair in come._asdict().items() if name in FIGURES}
    return Corrections(
        questions=[
            CorrectedQuestion(
                text=row.judged.text,
                like=list(row.judged.like),
                before=[place(row, id) for id in row.before.ids[:hits]],
                after=[place(row, id) for id in row.after.ids[:hits]],
                judged=[place(row, id) for id in (*row.judged.positives, *row.judged.negatives)],
            )
            for row in rows
        ],
        right=come.right,
        **figures,
    )


def _problem(request: Request, status: int, said: str, headers: Any = None) -> JSONResponse:
    body = Problem(error=said, request=request.scope.get("request_id", ""))
    return JSONResponse(body.model_dump(), status, headers=headers)


class _Watched:
    """Around everything: a request id, the names it may be called by, a limit to what is read, headers that keep
    browsers strict, a line in a log."""

    def __init__(self, inner: ASGIApp, *, hosts: Sequence[str], upload: int, latency: Histogram, waiting: Gauge):
        self.inner, self.upload, self.latency, self.waiting = inner, upload, latency, waiting
        self.hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        name = scope["request_id"] = secrets.token_hex(8)
        started, status, read = time.perf_counter(), 500, 0
        too_large = f"A request may have {self.upload:,} bytes."

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.upload:
                raise StarletteHTTPException(413, too_large)
            return message

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"content-security-policy", POLICY.encode()),
                ]
            await send(message)

        async def refuse(code: int, said: str) -> None:
            await _problem(Request(scope), code, said)(scope, receive, labelled)

        self.waiting.inc()
        try:
            headers = dict(scope["headers"])
            length, host = headers.get(b"content-length", b"0"), headers.get(b"host", b"").decode("latin-1")
            if scope["path"] not in PROBES and not self._called(host):
                await refuse(400, f"Not called {host[:200]!r} here: `twofold serve … --hosts NAME` adds a name.")
            elif not length.isdigit() or int(length) > self.upload:
                await refuse(413, too_large)
            else:
                await self.inner(scope, counted, labelled)
        except Exception:
            log.exception("failed", extra={"fields": {"request": name}})
            if status == 500:
                await refuse(500, "Something went wrong here; the log has it under this request's id.")
        finally:
            self.waiting.dec()
            took = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self.latency.labels(route, status).observe(took)
            line = {"request": name, "method": scope["method"], "path": scope["path"], "status": status}
            log.info("answered", extra={"fields": line | {"ms": round(1000 * took, 1)}})

    def _called(self, host: str) -> bool:
        """Whether a Host header, with a port or without, is one of the names; "*.example.org" is any below it."""
        name = re.sub(r":\d*$", "", host).lower()
        return any(name == one or one == "*" or (one.startswith("*.") and name.endswith(one[1:])) for one in self.hosts)
