"""Any other server that speaks OpenAI's API, such as Ollama, LM Studio, LocalAI and Dynamo.

All that is known of it is that GET /v1/models lists what it serves.
"""

from __future__ import annotations

from powerband.engines.base import EngineAdapter

OPENAI = EngineAdapter(name="openai", display_name="OpenAI-compatible", ready_path="/v1/models", metrics_path="")
