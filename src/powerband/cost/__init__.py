"""What an engine costs on a device, before it runs. No torch."""

from powerband.cost.memory import MemoryPlan, plan_memory

__all__ = ["MemoryPlan", "plan_memory"]
