"""Any other server with OpenAI's API, such as Ollama, LM Studio, LocalAI and Dynamo.

Only GET /v1/models is assumed: it lists the models that the server has loaded.
"""

from __future__ import annotations

from powerband.engines.base import EngineAdapter

OPENAI = EngineAdapter(name="openai", display_name="OpenAI-compatible", ready_path="/v1/models", metrics_path="")
