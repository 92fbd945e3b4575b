"""`twofold serve` and `twofold key`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import verb
from twofold.cli.show import print_hints, print_json


@verb
def serve(
    index: Annotated[Path, arg(metavar="INDEX")],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Annotated[Path | None, arg(metavar="FILE")] = None,
    roots: Annotated[tuple[Path, ...], arg(metavar="DIR …")] = (),
    hosts: Annotated[tuple[str, ...], arg(metavar="NAME …")] = (),
) -> None:
    """Serve an index: a page to search it in the browser, and an API for programs. Ctrl-C ends it.

    It listens on this machine only. To let others in, give --host 0.0.0.0 with --keys, and put a proxy that speaks
    HTTPS in front.

    examples:
      twofold serve photos.index
      twofold key keys.json ann --scope write
      twofold serve photos.index --host 0.0.0.0 --keys keys.json --hosts photos.example.org

    Args:
        index: the index's folder
        host: the address to listen on
        port: the port to listen on; 0 takes a free one
        keys: a file of keys, made by `twofold key`; without it whoever reaches the port may read and give feedback
        roots: folders whose pictures may be shown, if not those that the index was made from
        hosts: names that the service may be called by, besides this machine's own
    """
    import contextlib
    import logging
    import socket

    import uvicorn

    from twofold.errors import UsageError
    from twofold.serve.app import app
    from twofold.serve.keys import Keys
    from twofold.serve.log import JsonLines

    held = Keys(keys) if keys else None
    if held is not None and not len(held):
        raise UsageError(f"{keys} holds no key yet. `twofold key {keys} NAME --scope read` makes one.")
    open_to_others = host not in ("127.0.0.1", "localhost", "::1")
    if open_to_others and held is None:
        raise UsageError(f"--host {host} lets others in, so it needs --keys: `twofold key keys.json NAME` makes one.")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    names = ["localhost", "127.0.0.1", "[::1]", *hosts, *([host] if host not in ("0.0.0.0", "::") else [])]
    print(f"  opening {index} …", file=sys.stderr, flush=True)
    served = app(index, roots=roots, keys=held, hosts=names)
    print_hints(served.state.service.opened.hints())
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        raise UsageError(
            f"Nothing can listen on {host} port {port} ({error.strerror}). Give another --port."
        ) from error
    print(f"  http://{host}:{taken.getsockname()[1]}   Ctrl-C ends it", flush=True)
    config = uvicorn.Config(
        served,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,  # seconds for what is being answered
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has answered what was asked, and raises it again
        uvicorn.Server(config).run(sockets=[taken])


@verb
def key(
    file: Annotated[Path, arg(metavar="FILE")],
    name: Annotated[str, arg(metavar="NAME")],
    /,
    *,
    scope: Literal["read", "write"] = "read",
    json: bool = False,
) -> None:
    """Make an API key for `twofold serve --keys FILE`. It is printed once; the file keeps its hash only.

    examples:
      twofold key keys.json ann
      twofold key keys.json curator --scope write

    Args:
        file: the file of keys; made if it is not there
        name: whose key it is; delete the line of that name to take it back
        scope: read, or write: read and give feedback
        json: print the result as JSON
    """
    from twofold.serve.keys import Keys

    made = Keys(file).add(name, scope)
    if json:
        print_json({"name": name, "scope": scope, "key": made})
    else:
        print(made)
