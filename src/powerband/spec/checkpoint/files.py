"""Which files of a checkpoint hold its weights, and under which names: for loading, fetching and counting. No torch.

The order is that of transformers: `model.safetensors`, then the shards that an index names. Without either, complete
shards, then whatever safetensors there are, but for copies in other layouts and adapters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from powerband.documents import parse_json, read_bytes
from powerband.errors import EnvironmentFault, UsageError
from powerband.files import open_regular
from powerband.spec.checkpoint.safetensors import Header, read_header, unreadable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The same weights in another layout (Mistral's own, Meta's), and what is no model.
SET_ASIDE = ("consolidated*.safetensors", "adapter_*.safetensors", "optimizer*.safetensors", "training_*.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_MAX_INDEX_BYTES = 64 << 20
_PIECE_BYTES = 8 << 20


def choose(names: Iterable[str], indexed: Collection[str] | None) -> list[str]:
    """Of the file names in a checkpoint's folder, those to load. indexed: what its index names; None: it has none.

    The result may name files that are not there, where an index or the names of other shards ask for them.
    """
    there = {name for name in names if name.endswith(".safetensors")}
    if indexed is not None and SINGLE in indexed and there.issuperset(indexed):
        return sorted(indexed)
    if SINGLE in there:
        return [SINGLE]
    if indexed is not None:
        return sorted(indexed)
    loose = sorted(name for name in there if not any(fnmatch(name, pattern) for pattern in SET_ASIDE))
    series: dict[tuple[str, str], list[str]] = {}
    for name in loose:
        if found := _SHARD.fullmatch(name):
            series.setdefault((found[1], found[2]), []).append(name)
    for (base, count), shards in sorted(series.items(), key=lambda item: len(item[1]) < int(item[0][1])):
        # Some count their shards from 0.
        whole = len(shards) >= int(count)
        return shards if whole else [f"{base}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    return loose


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises EnvironmentFault or UsageError that name the file at fault."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    index = folder / INDEX
    indexed = None
    if INDEX in names:
        try:
            indexed = indexed_files(index)
        except (EnvironmentFault, UsageError):
            if SINGLE not in names:  # else it is not needed
                raise
    chosen = choose(names, indexed)
    missing = [name for name in chosen if name not in names]
    if missing:
        source = f"files that {INDEX} names" if indexed is not None else "shards"
        raise EnvironmentFault(
            f"{folder} lacks {missing[0]}, one of {len(chosen)} {source}.",
            hint="The download is incomplete; fetch it again.",
            code="weights_not_found",
            param="model",
        )
    if not chosen:
        raise nothing_to_load(str(folder), names)
    return [folder / name for name in chosen]


def indexed_files(index: Path) -> set[str]:
    """The files that an index names. Raises EnvironmentFault or UsageError."""
    try:
        names = set(parse_json(read_bytes(index, "index", max_bytes=_MAX_INDEX_BYTES))["weight_map"].values())
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise unreadable(index, problem) from problem
    if not inside:
        raise UsageError(f"{index} names files outside its folder.", code="bad_weights")
    return names


def nothing_to_load(where: str, names: Collection[str]) -> EnvironmentFault:
    """The error for a checkpoint of which `choose` chose nothing."""
    others = sorted(name for name in names if name.endswith(".safetensors"))
    pickled = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLED))
    if others:
        problem = f"holds only {others[0]}, which is a copy in another layout or an adapter, not the model"
        hint = "Use the model's own safetensors: model.safetensors, or its shards and their index."
    elif pickled:
        problem = f"holds only pickled weights ({pickled[0]}), which can run code and are never loaded"
        hint = "Use the model's safetensors version, or convert it once with transformers' save_pretrained."
    else:
        problem = "holds no safetensors file"
        hint = "Give a folder with model.safetensors, or use --load-format dummy for random weights."
    code = "pickled_weights" if pickled and not others else "weights_not_found"
    return EnvironmentFault(f"{where} {problem}.", hint=hint, code=code, param="model")


# ---- names of tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What torch.compile, FSDP and activation checkpointing write between the parts of a name.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_TEXT_PARTS = ("embed_tokens.", "layers.", "norm.")


@dataclass(frozen=True, slots=True)
class TensorNames:
    """stored_as: a checkpoint's names by ours (model.…, lm_head.…). outside: those of other parts, such as a value head
    or an image encoder, which are no part of the text model.
    """

    stored_as: dict[str, str]
    outside: frozenset[str]


def tensor_names(stored: Collection[str]) -> TensorNames:
    """The names of a text model's tensors, whatever its checkpoint puts before them. Raises UsageError.

    Before "embed_tokens.weight" stands "model." as transformers writes it, nothing where the model was saved without
    its head, "language_model.model." inside a multimodal model, "module." or "base_model.model.model." of trainers.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    base = _base(set(plain.values()))
    found: dict[str, str] = {}
    outside = set()
    for name, without in sorted(plain.items()):
        ours = _our_name(without, base)
        if ours is None:
            ours = without
            outside.add(ours)
        if ours in found:
            raise UsageError(
                f"{found[ours]} and {name} are both the checkpoint's {ours}.",
                hint="Remove the files that belong to another checkpoint.",
                code="bad_weights",
            )
        found[ours] = name
    return TensorNames(found, frozenset(outside))


def _base(names: set[str]) -> str:
    """What stands before the parts of the text model."""
    ends = ("embed_tokens.weight", "norm.weight")  # a tied model may be stored with its head only
    for end in ends:
        found = [name.removesuffix(end) for name in names if name == end or name.endswith("." + end)]
        bases = [base for base in found if any(name.startswith(f"{base}layers.0.") for name in names)]
        if bases:
            return min(bases, key=lambda base: (len(base), base))
    return "model."


def _our_name(name: str, base: str) -> str | None:
    """None: it is no part of the text model."""
    inside = name.removeprefix(base)
    if name.startswith(base) and inside.startswith(_TEXT_PARTS):
        return f"model.{inside}"
    before, head, rest = name.rpartition("lm_head.")
    if head and base.startswith(before):
        return f"lm_head.{rest}"
    # What lies in the text model's own part belongs to it, known or not; beside it there may be anything.
    return f"model.{inside}" if base and name.startswith(base) else None


# ---- the head


def has_own_head(folder: Path) -> bool:
    """Whether the weights in `folder` hold a head that differs from the embedding, whatever their configuration says.

    False where there are no weights, or they are damaged: loading will say so.
    """
    try:
        found = {name: (path, header) for path, header in _headers(folder) for name in header.tensors}
        names = tensor_names(found).stored_as
    except (EnvironmentFault, UsageError):
        return False
    if any(name.startswith("lm_head.") and name.endswith(("qweight", "weight_packed")) for name in names):
        return True
    if EMBEDDING not in names or HEAD not in names:
        return False
    try:
        return not _same_bytes(*((*found[names[name]], names[name]) for name in (EMBEDDING, HEAD)))
    except OSError:
        return False


def _headers(folder: Path) -> list[tuple[Path, Header]]:
    return [(path, read_header(path)) for path in weight_files(folder)]


def _same_bytes(one: tuple[Path, Header, str], other: tuple[Path, Header, str]) -> bool:
    """Whether two tensors are equal in type, shape and every byte; read in pieces, up to the first that differ."""
    a, b = (header.tensors[name] for _, header, name in (one, other))
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open_regular(one[0]) as first, open_regular(other[0]) as second:
        first.seek(one[1].data_start + a.start)
        second.seek(other[1].data_start + b.start)
        for done in range(0, a.end - a.start, _PIECE_BYTES):
            count = min(_PIECE_BYTES, a.end - a.start - done)
            if first.read(count) != second.read(count):
                return False
    return True
