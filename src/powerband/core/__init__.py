"""The torch-free heart: what decides, step by step, which request computes how many tokens.

Start reading at `loop.EngineCore.step`, then `scheduler.Scheduler.schedule`. `step` holds the contract with executors,
`request.EngineRequest` with clients; `simulation` runs the same classes in virtual time. Standard library only.
"""
