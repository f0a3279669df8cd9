"""Load injection: send a Workload's schedule to any OpenAI-compatible server, and report figures that can be trusted.

Workload ─ draw ─► Schedule ─ shares of chains ─► workers (processes) ─ HTTP ─► server
                                                      │ samples                   │ /metrics
                                                      ▼                           ▼
                                      run.json · requests.jsonl · report.html ◄── scraped beside
"""
