"""The command that serves models on a port."""

import importlib.util
from typing import Annotated

import typer

from tether.cli.asked import listen
from tether.cli.output import quiet_libraries, say, tell
from tether.cli.placing import load

__all__ = ["serve"]

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
"""Modules of the extra `serve`."""


def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders, aliases or hub ids; requests call them by folder name."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TETHER_API_KEY", help="Key that requests must bring; others on a machine see options."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer at most.")] = 1024,
) -> None:
    """Serve models to clients of OpenAI's interface: chat and completions, streaming or not, until Ctrl-C."""
    from tether.errors import ConfigError

    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"serving needs {', '.join(missing)}; install them with: pip install 'tether[serve]'"
        )
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise ConfigError(
            "--api-key: expected printable ASCII characters, at least one; leave it out to let all in"
        )
    quiet_libraries()
    from tether.server.app import Server, build_app, is_loopback, open_port
    from tether.server.models import Models, names_of

    names_of(models)
    # The port is taken first: models may take minutes to load.
    with open_port(host, port) as taken:
        if api_key is None and not is_loopback(host):
            tell(
                f"{host} can be reached from other machines, and no key is asked for: set TETHER_API_KEY",
                "yellow",
            )
        served = Models(models, load)
        app = build_app(served, key=api_key, new_tokens=max_tokens)
        address = f"[{host}]" if ":" in host else host
        where = f"http://{address}:{taken.getsockname()[1]}/v1"
        server = Server(app, lambda: say(f"serving {', '.join(served.served)} at {where}; Ctrl-C ends it"))
        try:
            server.run(sockets=[taken])
        except KeyboardInterrupt:
            # That is how a server ends; nothing was cut off that could go on.
            listen()
