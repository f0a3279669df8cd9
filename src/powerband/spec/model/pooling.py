"""How a checkpoint turns the hidden states of a prompt into one vector: an embedding, or the scores of a classifier.

Read from the files of sentence-transformers (modules.json and what it names), and from the architecture in config.json:

checkpoint                                   becomes
modules.json with a Pooling                  embeddings, as its modules say; no generation
architecture *ForSequenceClassification      scores of a classifier; no generation
an encoder without modules.json              embeddings: the mean over all tokens (sentence-transformers' default)
architecture *Model (no head), a decoder     embeddings: the last token, normalised (vLLM's default)

Only names and numbers are read; nothing is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from powerband.documents import parse_json, read_bytes, read_json_table
from powerband.errors import InvalidRequest, UsageError
from powerband.spec.config_reader import MAX_POSITIONS, MAX_WIDTH, ConfigReader, shown

MODULES = "modules.json"
_MAX_BYTES = 1 << 20
_MAX_PROMPT_CHARS = 4096
_MAX_PROMPTS = 64

PoolingMode = Literal["last", "mean", "cls"]
Activation = Literal["identity", "tanh", "relu", "gelu", "sigmoid", "softmax"]
_MODES: Mapping[str, PoolingMode] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
# sentence-transformers wrote one switch for each until version 5.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# What other APIs (Cohere, Voyage, NVIDIA) call the two sides of a search, and the prompts that sentence-transformers
# looks for.
SIDES = {
    "query": ("query",),
    "search_query": ("query",),
    "document": ("document", "passage", "corpus"),
    "passage": ("document", "passage", "corpus"),
    "search_document": ("document", "passage", "corpus"),
}
_ACTIVATIONS: Mapping[str, Activation] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
}


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A projection of the pooled vector."""

    folder: str  # of its weights, inside the checkpoint's; "": they are among the model's own
    name: str  # of its tensors, before ".weight" and ".bias"
    in_features: int
    out_features: int
    bias: bool
    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """From hidden states to a vector, in this order: pool, project, (classify,) normalise or activate."""

    task: Literal["embed", "classify"]
    mode: PoolingMode
    dimension: int  # of the vector; of a classifier: its labels
    dense: tuple[DenseSpec, ...] = ()
    normalize: bool = False
    activation: Activation = "identity"  # of a classifier's scores
    lowercase: bool = False  # texts, before they are tokenized
    prompts: tuple[tuple[str, str], ...] = ()  # (name, text): goes before a text
    default_prompt: str | None = None  # name of the prompt for texts that come without one
    matryoshka_dimensions: tuple[int, ...] | None = None  # to which it may be cut; None: to any

    @property
    def needs_every_position(self) -> bool:
        """Whether the vector is made of more than the last position."""
        return self.mode != "last"

    @property
    def num_parameters(self) -> int:
        """Of the projections, which are held in float32."""
        return sum(layer.out_features * (layer.in_features + layer.bias) for layer in self.dense)

    def check_scores(self) -> None:
        """Raise InvalidRequest for a classifier of several labels, which gives no single score."""
        if self.task == "classify" and self.dimension != 1:
            raise InvalidRequest(
                f"The model is a classifier of {self.dimension} labels; a score needs one with a single label.",
                param="model",
                code="model_does_not_score",
            )

    def prompt(self, name: str | None, field: str = "prompt_name") -> str:
        """The text of a prompt of the checkpoint; None: of its default, if it has one. Raises InvalidRequest."""
        prompts = dict(self.prompts)
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(sorted(prompts)) or "no prompts"
            raise InvalidRequest(f"'{field}' is {shown(name)}; the checkpoint has {known}.", param=field)
        return prompts[name]

    def side_prompt(self, side: str) -> str:
        """What sentence-transformers' encode_query and encode_document put before a text; "": nothing."""
        prompts = dict(self.prompts)
        return next((prompts[name] for name in SIDES[side] if name in prompts), "")

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise InvalidRequest unless vectors can be cut to so many dimensions."""
        allowed = self.matryoshka_dimensions
        if dimensions is None:
            return
        if self.task == "classify":
            problem = "this model gives scores, not embeddings"
        elif dimensions > self.dimension:
            problem = f"the model's embeddings have {self.dimension}"
        elif allowed is not None and dimensions not in allowed:
            problem = f"the checkpoint says that they can be {', '.join(map(str, allowed))}"
        else:
            return
        raise InvalidRequest(f"'dimensions' is {dimensions}, but {problem}.", param="dimensions")


def last_token(hidden_size: int) -> PoolingSpec:
    """The usual pooling of decoders: the last token's hidden state, normalised."""
    return PoolingSpec(task="embed", mode="last", dimension=hidden_size, normalize=True)


def pooling_of_config(config: ConfigReader, hidden_size: int, *, is_encoder: bool) -> PoolingSpec | None:
    """What the architecture in config.json says; None where the model generates."""
    architectures = config.texts("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return _classifier(config, hidden_size, is_encoder=is_encoder)
    if architectures[0].endswith("Model") and not is_encoder:
        return last_token(hidden_size)
    if is_encoder:
        return PoolingSpec(task="embed", mode="mean", dimension=hidden_size)
    return None


def _classifier(config: ConfigReader, hidden_size: int, *, is_encoder: bool) -> PoolingSpec:
    labels = config.table("id2label")
    num_labels = config.integer("num_labels", len(labels.values) if labels is not None else 2, high=1 << 16)
    own = config.table("sentence_transformers") or ConfigReader({}, config.source)
    path = own.text("activation_fn", config.text("sbert_ce_default_activation_function", ""))
    default = "torch.nn.modules.activation.Sigmoid" if num_labels == 1 else "torch.nn.modules.linear.Identity"
    known = ConfigReader({"activation_fn": path or default}, config.source)
    size = hidden_size

    def layer(name: str, out: int, *, bias: bool, activation: Activation = "identity") -> DenseSpec:
        return DenseSpec("", name, size, out, bias, activation)

    family = config.text("model_type", "")
    if not is_encoder:
        head: tuple[DenseSpec, ...] = (layer("score", num_labels, bias=False),)
    elif family == "bert":
        head = (layer("pooler.dense", size, bias=True, activation="tanh"), layer("classifier", num_labels, bias=True))
    else:
        inner = layer("classifier.dense", size, bias=True, activation="tanh")
        head = (inner, layer("classifier.out_proj", num_labels, bias=True))
    return PoolingSpec(
        task="classify",
        mode="cls" if is_encoder else "last",
        dimension=num_labels,
        dense=head,
        activation=_activation(known, "activation_fn", default),
    )


def read_pooling(folder: Path, hidden_size: int, config: Mapping[str, Any]) -> PoolingSpec | None:
    """What a folder's modules.json says; None where there is none. Raises UsageError or EnvironmentFault."""
    modules = folder / MODULES
    if not modules.is_file():
        return None
    found = _modules(modules)
    if [kind for kind, _ in found] == ["Transformer"]:  # a cross-encoder, whose head is in the model itself
        return None
    if not found or found[0] != ("Transformer", ""):
        raise _unsupported(modules, "the first module must be a Transformer in the folder itself")
    kinds = [kind for kind, _ in found if kind != "Dropout"]
    if kinds[1:2] != ["Pooling"]:
        raise _unsupported(modules, f"its modules are {', '.join(kinds)}, but the second must be a Pooling")
    rest = kinds[2:]
    normalize = bool(rest) and rest[-1] == "Normalize"
    if set(rest[: len(rest) - normalize]) - {"Dense"}:
        raise _unsupported(modules, f"after the Pooling there may be Dense modules and then Normalize, not {rest}")
    pooling = _table(folder / dict(found)["Pooling"] / "config.json")
    dense = tuple(_dense(folder, path) for kind, path in found if kind == "Dense")
    size = hidden_size
    for layer in dense:
        if layer.in_features != size:
            raise _unsupported(modules, f"{layer.folder} takes {layer.in_features} numbers and is given {size}")
        size = layer.out_features
    texts = _optional_table(folder / "config_sentence_transformers.json")
    bert = _optional_table(folder / "sentence_bert_config.json")
    if "message" in (bert.table("modality_config") or ConfigReader({}, "")):
        raise bert.error(
            "texts are put into the chat template before they are embedded, which is not supported",
            "modality_config",
            "Send what the template makes of a text, from a copy whose modality_config has only 'text'.",
        )
    prompts = _prompts(texts)
    default = texts.text("default_prompt_name", "") or None
    if default is not None and default not in dict(prompts):
        raise texts.error(f"its default prompt {shown(default)} is none of its prompts", "default_prompt_name")
    return PoolingSpec(
        task="embed",
        mode=_mode(pooling, prompts),
        dimension=size,
        dense=dense,
        normalize=normalize,
        lowercase=bert.boolean("do_lower_case", False),
        prompts=prompts,
        default_prompt=default,
        matryoshka_dimensions=_matryoshka(ConfigReader(config, str(folder / "config.json")), size),
    )


def module_folders(folder: Path) -> list[str]:
    """The folders inside a checkpoint's that its modules.json names; empty where there is none. Raises UsageError."""
    modules = folder / MODULES
    return [path for _, path in _modules(modules) if path] if modules.is_file() else []


def _modules(path: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module, in order."""
    try:
        listed = parse_json(read_bytes(path, "list of modules", max_bytes=_MAX_BYTES))
        found = [(str(item["type"]).rpartition(".")[2], str(item.get("path", ""))) for item in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise _unsupported(path, f"it is no list of modules ({problem})") from problem
    for _, folder in found:
        if Path(folder).name != folder:
            raise _unsupported(path, f"the folder {shown(folder)} lies elsewhere")
    return found


def _mode(fields: ConfigReader, prompts: tuple[tuple[str, str], ...]) -> PoolingMode:
    named: Any = fields.values.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in _OLD_MODES.items() if fields.boolean(key, False)] or "mean"
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _MODES:
        raise fields.error(
            f"pooling by {shown(named)} is not supported", "pooling_mode", f"Supported: one of {', '.join(_MODES)}."
        )
    if not fields.boolean("include_prompt", True) and any(text for _, text in prompts):
        raise fields.error("prompts that are left out of the pooling are not supported", "include_prompt")
    return _MODES[modes[0]]


def _dense(folder: Path, path: str) -> DenseSpec:
    fields = _table(folder / path / "config.json")
    if fields.boolean("use_residual", False):
        raise fields.error("a Dense module with a residual is not supported", "use_residual")
    for name in ("module_input_name", "module_output_name"):
        if fields.text(name, "") not in ("", "sentence_embedding"):
            raise fields.error(f"a Dense module on {shown(fields.values[name])} is not supported", name)
    return DenseSpec(
        folder=path,
        name="linear",
        in_features=fields.integer("in_features"),
        out_features=fields.integer("out_features"),
        bias=fields.boolean("bias", True),
        activation=_activation(fields, "activation_function", "torch.nn.modules.activation.Tanh"),
    )


def _activation(fields: ConfigReader, name: str, default: str) -> Activation:
    """A class of torch.nn by its path, which is only read."""
    path = fields.text(name, default)
    found = _ACTIVATIONS.get(path.rpartition(".")[2]) if path.startswith("torch.nn.modules.") else None
    if found is None:
        known = ", ".join(_ACTIVATIONS)
        raise fields.error(f"activation {shown(path)} is not supported", name, f"Supported, of torch.nn: {known}.")
    return found


def _prompts(fields: ConfigReader) -> tuple[tuple[str, str], ...]:
    table = fields.table("prompts")
    if table is None:
        return ()
    if len(table.values) > _MAX_PROMPTS:
        raise fields.error(f"it has {len(table.values)} prompts; the limit is {_MAX_PROMPTS}", "prompts")
    found = tuple((name, table.text(name, "")) for name in table.values)
    for name, text in found:
        if len(text) > _MAX_PROMPT_CHARS:
            raise fields.error(f"prompt {shown(name)} has more than {_MAX_PROMPT_CHARS} characters", "prompts")
    return found


def read_max_tokens(folder: Path) -> int | None:
    """How long a text may be, where the folder says it: max_seq_length of sentence-transformers, or the tokenizer's
    model_max_length, which is 1e30 where there is no limit.
    """
    own = _optional_table(folder / "sentence_bert_config.json").optional_integer("max_seq_length", high=MAX_POSITIONS)
    if own is not None:
        return own
    fields = _optional_table(folder / "tokenizer_config.json")
    limit = fields.values.get("model_max_length")
    return limit if type(limit) is int and 1 <= limit <= MAX_POSITIONS else None


def _matryoshka(config: ConfigReader, size: int) -> tuple[int, ...] | None:
    """Dimensions that config.json lists (as vLLM reads it). Most models that can be cut do not say so."""
    if config.values.get("is_matryoshka") is False:
        return (size,)
    listed = config.integers("matryoshka_dimensions", low=1, high=MAX_WIDTH)
    return tuple(sorted({*listed, size})) if listed else None


def _table(path: Path) -> ConfigReader:
    return ConfigReader(read_json_table(path, "module's configuration", max_bytes=_MAX_BYTES), str(path))


def _optional_table(path: Path) -> ConfigReader:
    return _table(path) if path.is_file() else ConfigReader({}, str(path))


def _unsupported(path: Path, problem: str) -> UsageError:
    return UsageError(f"{path}: {problem}.", code="unsupported_model", param="model")
