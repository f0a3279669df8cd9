"""How near the latency model, the simulator and the memory plan come to what others measured."""
