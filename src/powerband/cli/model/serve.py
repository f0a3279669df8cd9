"""`powerband serve`: one model behind an OpenAI-compatible API, until a signal ends it."""

from __future__ import annotations

from powerband.cli.flags import takes_settings
from powerband.errors import UsageError
from powerband.extras import require
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved


@takes_settings(EngineSettings, ServerSettings)
def serve(settings: Resolved) -> int:
    """Serve MODEL over an OpenAI-compatible API until Ctrl-C or SIGTERM.

    The first signal drains: no new requests, and running ones may finish. The second stops at once.
    """
    require_engine(settings)
    from powerband.server.run import serve as run

    return run(settings.engine, settings.values[ServerSettings])


def require_engine(settings: Resolved) -> None:
    """Raise UsageError if no model was named, EnvironmentFault or UsageError if it cannot be loaded, and MissingPackage
    without torch: at once, for importing torch and starting an engine take seconds.
    """
    from powerband.engine.model_loader.checkpoint import check_local_model

    if "model" not in settings.asked:
        raise UsageError(
            "No model was given.",
            hint="Give a folder, a Hugging Face id, or 'demo' for the model in the package.",
            param="model",
        )
    check_local_model(settings.engine)
    require("torch", "Powerband's engine")
