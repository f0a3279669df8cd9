"""The examples at the end of each command's --help: a command line, and what it does."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "serve": (
        ("powerband serve demo", "the model in the package, on 127.0.0.1:8000"),
        ("powerband serve Qwen/Qwen3-0.6B --quantization int8", "a model of the Hugging Face hub, in 8 bits (CPU)"),
        ("powerband serve ./models/mine --host 0.0.0.0 --api-key-file key.txt", "for other machines"),
        ("powerband serve --config powerband.yaml", "settings in a file"),
        ("POWERBAND_PORT=9000 powerband serve demo", "every option is also a variable"),
    ),
    "generate": (
        ('powerband generate demo --prompt "What does os.path.join do?"', "a question"),
        ("powerband generate demo --raw --prompt - --max-tokens 64 < file.txt", "goes on from a text"),
    ),
    "memory": (
        ("powerband memory Qwen/Qwen3-0.6B", "fetches everything but the weights"),
        ("powerband memory Qwen/Qwen3-0.6B --max-model-len 8192 --max-num-seqs 32", "what would that take?"),
    ),
    "eval": (
        ("powerband eval demo", "in the precision of the checkpoint and this machine's best"),
        ("powerband eval demo --quantization int4 --samples 50", "in 4 bits, fewer exercises"),
    ),
    "plan": (
        ("powerband plan demo --devices L4 --rate 4 --prompt-tokens 32-512 --output-tokens 16-96", "without network"),
        ("powerband plan Qwen/Qwen3-8B --devices L4,A100-80G --workload chat --rate 4 --html plan.html", "a page"),
        ("powerband plan Qwen/Qwen3-8B --devices H100 --engine vllm --rate 20 -o plan.yaml", "for vLLM"),
        ("powerband plan Qwen/Qwen3-0.6B --rate 0.2 --prompt-tokens 64-512 --output-tokens 16-128", "on this machine"),
    ),
    "simulate": (
        ("powerband simulate plan.yaml", "the plan's own load"),
        ("powerband simulate plan.yaml --rate 8 --duration 5min", "twice the load?"),
        ("powerband simulate plan.yaml --set L4.bandwidth_bytes_per_s=4e11", "a faster memory?"),
    ),
    "devices": (
        ("powerband devices", "all"),
        ("powerband devices H100", "all that is known of one, with sources"),
    ),
    "calibrate": (
        ("powerband calibrate", "once for each machine"),
        ("powerband calibrate Qwen/Qwen3-0.6B --quantization int8", "one model, as it will be served"),
        ("powerband calibrate demo --threads 1", "for replicas with one thread each"),
        ("powerband calibrate --from steps.jsonl", "from the step log of a running engine"),
    ),
    "deploy": (
        ("powerband deploy plan.yaml", "start it, load it, compare with the promise"),
        ("powerband deploy demo --rate 2 --slo ttft=2s@p95,tpot=100ms@p95", "plan first"),
        ("powerband deploy plan.yaml --host 0.0.0.0 --auth keys --verify-seconds 120 --strict", "for other machines"),
        ("powerband deploy plan.yaml --engine-command /opt/vllm/bin/vllm", "a plan for vLLM"),
        ("powerband deploy plan.yaml --reset-replicas", "with the plan's number of replicas, after 'powerband scale'"),
        ("powerband deploy", "after a reboot: start what was deployed"),
    ),
    "status": (
        ("powerband status", "all services"),
        ("powerband status --watch", "every second"),
        ("powerband status demo --json", "for programs"),
        ("powerband status demo", "exits with 3 until it can answer"),
    ),
    "scale": (
        ("powerband scale 3", "three replicas"),
        ("powerband scale demo 3", "of one of several services"),
        ("powerband scale 0=2 1=1", "two of the first pool, one of the second"),
    ),
    "drain": (
        ("powerband drain r2", "nothing new for r2"),
        ("powerband drain demo r2", "of one of several services"),
        ("powerband drain r2 --undo", "send it requests again"),
    ),
    "events": (
        ("powerband events", "crashes, restarts and changes, the newest last"),
        ("powerband events demo --watch", "of one of several services, every second"),
    ),
    "logs": (
        ("powerband logs", "the last lines of all"),
        ("powerband logs r2 -n 100", "of one replica, also of one that crashed"),
        ("powerband logs demo r2", "of one of several services"),
        ("powerband logs gateway -f", "of the gateway, as they come"),
    ),
    "remove": (
        ("powerband remove", "keeps keys, usage and audit log"),
        ("powerband remove demo --purge", "deletes them, too"),
    ),
    "incidents": (
        ("powerband incidents", "those that are open"),
        ("powerband incidents --all --json", "also those that are over"),
    ),
    "usage": (
        ("powerband usage", "of the last 24 hours, by key and model"),
        ("powerband usage --by key,day --since 30d --csv usage.csv", "a month, by key and day"),
        ("powerband usage --url http://127.0.0.1:8080", "of a gateway that was not deployed"),
    ),
    "audit": (
        ("powerband audit demo", "of one of several services"),
        ("powerband audit", "exits with 1 if an entry was changed or removed"),
    ),
    "gateway": (
        ("powerband gateway --replica http://127.0.0.1:8001 --replica http://127.0.0.1:8002", "vLLM or others"),
        ("powerband gateway --routes routes.yaml --host 0.0.0.0 --auth keys", "every request needs a key"),
        ("powerband gateway", "the routes of the last run"),
    ),
    "bench": (
        ("powerband bench localhost:8000 --rate 4 --slo ttft=500ms,tpot=50ms", "does the server meet that?"),
        ("powerband bench localhost:8000 --find-rate --slo ttft=500ms,tpot=50ms", "up to which rate?"),
        ("powerband bench localhost:8000 --concurrency 16 --requests 200 --workload rag", "16 users at once"),
        ("powerband bench --compare bench-runs/one bench-runs/two", "is the second faster?"),
    ),
    "doctor": (
        ("powerband doctor", "what is here, what is missing"),
        ("powerband doctor --compile", "before the first start, for instance in a container image"),
    ),
    "version": (("powerband version", "for a bug report; the same as powerband --version"),),
    "keys create": (
        ("powerband keys create app", "prints the key, this once"),
        ("powerband keys create demo app", "at one of several services"),
        (
            "powerband keys create app --requests-per-min 60 --tokens-per-min 100000 --usd 20 --expires 90d",
            "with limits",
        ),
        ("powerband keys create prometheus --scopes metrics", "for GET /metrics"),
    ),
    "keys list": (("powerband keys list", "with limits and what they have used"),),
    "keys limit": (
        ("powerband keys limit app --usd 50", "the others stay"),
        ("powerband keys limit app --lift tokens_per_min", "remove a limit"),
    ),
    "keys revoke": (("powerband keys revoke app", "rejected from now on"),),
    "config show": (
        ("powerband config show", "each setting, and where its value comes from"),
        ("powerband config show demo --max-num-seqs 8", "what 'powerband serve' with these options would use"),
    ),
    "--install-completion": (
        ("powerband --install-completion", "for the shell that it is typed in"),
        ("powerband --install-completion --shell bash --output powerband.bash", "only writes the file"),
    ),
}
_WIDTH = 78


def help_examples(command: str) -> str:
    """The last part of a command's --help. command: with its group, as in 'keys create'."""
    lines = ["Examples:"]
    for line, comment in EXAMPLES[command]:
        lines += ["", f"  # {comment}", *_wrapped(line)]
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    """A command line over as many lines as it needs, broken before options, as one would type it into a shell."""
    first, *options = line.split(" --")
    lines = [f"  {first}"]
    for option in options:
        if len(f"{lines[-1]} --{option} \\") <= _WIDTH:
            lines[-1] += f" --{option}"
        else:
            lines[-1] += " \\"
            lines.append(f"    --{option}")
    return lines
