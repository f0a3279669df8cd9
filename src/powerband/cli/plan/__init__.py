"""Commands that plan: plan, simulate, devices, calibrate."""
