"""Deploys a plan on a target, keeps its replicas and gateway running, verifies and monitors its SLO."""
