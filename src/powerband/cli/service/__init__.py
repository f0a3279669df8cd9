"""Commands for a service: deploy, status, scale, drain, logs, incidents, remove."""
