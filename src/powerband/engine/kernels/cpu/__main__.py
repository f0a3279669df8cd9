"""`python -m powerband.engine.kernels.cpu`: compile the kernels now rather than at the first start."""

from powerband.engine.kernels.cpu.library import load

status = load()
print(f"CPU kernels: {status.tier or 'none'}: {status.reason}")
