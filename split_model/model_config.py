"""What is known of a model before its weights are opened: its shape, and the names that its family gives to its tensors."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from storage import ModelError

from .config_file import ConfigFile
from .rotary import Rotary

__all__ = ["LAYER_NORM", "MOST_LAYERS", "RMS_NORM", "Family", "ModelConfig", "Names"]

LAYER_NORM, RMS_NORM = "layer", "rms"
MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Names:
    """What transformers calls a model's modules; those of a block without what the names of the block begin with."""

    prefix: str
    """What the stored names of all tensors but the head's begin with; old checkpoints leave it out."""
    blocks: str
    """The list of blocks: the names of what belongs to block 3 begin with f"{blocks}.3."."""
    table: str
    """The token embedding."""
    positions: str = ""
    """The table of positions, in a family that has one."""
    attention_norm: str
    qkv: tuple[str, ...]
    """
    Linear layers whose outputs, side by side, are queries, keys and values: three of them, or one that makes all.
    """
    query_norm: str = ""
    key_norm: str = ""
    """Norms of each head, in a family that has them."""
    projection: str
    """The linear layer behind attention."""
    mlp_norm: str
    up: tuple[str, ...]
    """The same of an MLP's inner elements; in a gated MLP first the gate, then what it gates."""
    down: str
    final_norm: str
    head: str
    """The LM head, where it is a matrix of its own."""
    other_modules: tuple[str, ...] = ()
    other_modules_of_a_block: tuple[str, ...] = ()
    """What else has a name, and no weights: PEFT matches a stranger's regular expressions with it, too."""
    constants_of_a_block: tuple[str, ...] = ()
    """Tensors that old checkpoints keep, and that follow from the configuration."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is known of a family: its names, and what its config.json says. Its file in `families` makes one."""

    model_type: str
    """In config.json."""
    title: str
    """In messages."""
    architecture: str
    """transformers' class of such a model, as config.json names it; that class knows its class of configurations."""
    names: Names
    stores_in_out: bool = False
    """Linear layers' matrices are stored as (in, out), as by transformers' Conv1D; else as (out, in), as by torch's Linear."""
    usual_targets: tuple[str, ...]
    """What PEFT adapts of it by default."""
    read: Callable[[ConfigFile], "ModelConfig"]
    """
    Makes the configuration of a config.json. It asks for every option that the family has, and `read_config` refuses a file
    with others.
    """
    settings: Callable[["ModelConfig"], dict[str, Any]]
    """What makes transformers' configuration of such a model: the way back from `read`."""
    without_effect: frozenset[str] = frozenset()
    """Keys of such files that change nothing of what is computed here, besides those of all families."""
    position_keys: tuple[str, ...] = ("max_position_embeddings",)
    """Where in config.json runtimes look for the number of positions."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """
    One model: a pre-norm decoder, described by its options. d elements in a row, H heads of queries and K of keys and values, D
    elements each, V tokens in the vocabulary.
    """

    family: Family = field(repr=False)
    num_layers: int
    width: int
    """Elements of a hidden state, d."""
    num_heads: int
    """Of queries, H."""
    num_key_value_heads: int
    """K, which divides H: each is seen by H / K heads of queries."""
    head_width: int
    """Elements of one head of attention, D."""
    inner_width: int
    """Elements between the matrices of an MLP."""
    num_positions: int
    """Longest sequence, in tokens."""
    vocabulary_size: int
    """V."""
    norm_epsilon: float
    activation: str
    """Between the matrices of an MLP, under transformers' name."""
    tied_head: bool
    """Whether the LM head is the token embedding."""
    end_token: int
    """Id of the token that ends a text."""
    stop_tokens: tuple[int, ...] = ()
    """Other tokens with which a model ends what it generates."""
    norm: str = LAYER_NORM
    is_gated: bool = False
    """Whether an MLP multiplies its activated gate with what the gate lets through (GLU, arXiv 2002.05202)."""
    without_bias: tuple[str, ...] = ()
    """The linear layers of a block that have no bias."""
    rotary: Rotary | None = None
    """None: positions are added to the token embedding, from a table."""
    normalises_heads: bool = False
    """Whether queries and keys pass a norm, head by head, before they are turned."""
    windows: tuple[int | None, ...] = ()
    """
    By block, how many tokens a token sees, itself and those before it; None: all. Empty: all, in every block.
    """

    def identity(self) -> dict[str, Any]:
        """
        The fields that make another model, for `PretrainedModel.fingerprint`. A field with its usual value is left out, so that
        none of the models known before becomes another one when a field is added. A field that is renamed does that to all.
        """
        usual: dict[str, Any] = {"num_key_value_heads": self.num_heads, "head_width": self.width // self.num_heads}
        usual |= {each.name: each.default for each in fields(self) if each.default is not MISSING}
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("family", "stop_tokens")}
        different = {name: value for name, value in found.items() if name not in usual or usual[name] != value}
        return {name: asdict(value) if isinstance(value, Rotary) else value for name, value in different.items()}

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens with which a model ends what it generates."""
        return (self.end_token, *self.stop_tokens)

    @property
    def names(self) -> Names:
        return self.family.names

    @property
    def has_layer_norms(self) -> bool:
        """Whether norms subtract the mean and add an offset; else they are root mean square norms."""
        return self.norm == LAYER_NORM

    @property
    def query_width(self) -> int:
        """Elements of all heads of queries."""
        return self.num_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Elements of all heads of keys, and of values."""
        return self.num_key_value_heads * self.head_width

    def window(self, block: int) -> int | None:
        return self.windows[block] if self.windows else None

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """A block's linear layers, which LoRA may adapt, in the order of the forward pass: name in the block -> (in, out)."""
        names, d = self.names, self.width
        qkv = [self.query_width, self.key_width, self.key_width]
        up = [self.inner_width] * (2 if self.is_gated else 1)
        shapes = {name: (d, width) for name, width in _divided(names.qkv, qkv)}
        shapes[names.projection] = (self.query_width, d)
        shapes |= {name: (d, width) for name, width in _divided(names.up, up)}
        return {**shapes, names.down: (self.inner_width, d)}

    @property
    def norm_widths(self) -> dict[str, int]:
        """A block's norms: name in the block -> elements."""
        names = self.names
        widths = {names.attention_norm: self.width, names.mlp_norm: self.width}
        if self.normalises_heads:
            widths |= {names.query_norm: self.head_width, names.key_norm: self.head_width}
        return widths

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the model in the order of the forward pass: transformers' name without `prefix` -> shape as stored."""
        names, table = self.names, (self.vocabulary_size, self.width)
        shapes: dict[str, tuple[int, ...]] = {self.table_name: table}
        if self.rotary is None:
            shapes[self.positions_name] = (self.num_positions, self.width)
        for block in map(self.block_name, range(self.num_layers)):
            for name, width in self.norm_widths.items():
                shapes |= self._norm_shapes(f"{block}.{name}", width)
            for name, (inputs, outputs) in self.layer_shapes.items():
                stored = (inputs, outputs) if self.family.stores_in_out else (outputs, inputs)
                shapes[f"{block}.{name}.weight"] = stored
                if name not in self.without_bias:
                    shapes[f"{block}.{name}.bias"] = (outputs,)
        shapes |= self._norm_shapes(names.final_norm, self.width)
        return shapes if self.tied_head else shapes | {self.separate_head_name: table}

    @property
    def turned_matrices(self) -> frozenset[str]:
        """The tensors of linear layers, if they are stored as (out, in)."""
        if self.family.stores_in_out:
            return frozenset()
        blocks = map(self.block_name, range(self.num_layers))
        return frozenset(f"{block}.{layer}.weight" for block in blocks for layer in self.layer_shapes)

    def _norm_shapes(self, name: str, width: int) -> dict[str, tuple[int, ...]]:
        parameters = ("weight", "bias") if self.has_layer_norms else ("weight",)
        return {f"{name}.{parameter}": (width,) for parameter in parameters}

    @property
    def table_name(self) -> str:
        """The tensor of the token embedding, (V, d)."""
        return f"{self.names.table}.weight"

    @property
    def positions_name(self) -> str:
        """The tensor of the table of positions, where there is one: (positions, d)."""
        return f"{self.names.positions}.weight"

    @property
    def separate_head_name(self) -> str:
        """The tensor of an LM head that is a matrix of its own, (V, d)."""
        return f"{self.names.head}.weight"

    @property
    def head_name(self) -> str:
        """The tensor of the LM head, (V, d)."""
        return self.table_name if self.tied_head else self.separate_head_name

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """What PEFT's target_modules, and the flag --lora-targets, may name: the last components of the layers' names."""
        return tuple(dict.fromkeys(layer.rpartition(".")[2] for layer in self.layer_shapes))

    def block_name(self, block: int) -> str:
        """What the names of a block's tensors begin with, without `Names.prefix` and without a dot at the end."""
        return f"{self.names.blocks}.{block}"

    def stored_name(self, tensor: str) -> str:
        """The name under which transformers stores a tensor."""
        return tensor if tensor == self.separate_head_name else f"{self.names.prefix}{tensor}"

    @property
    def other_modules(self) -> list[str]:
        """Full names of all modules but the blocks' linear layers."""
        names = self.names
        outer = [names.prefix.removesuffix("."), names.head]
        of_all = (names.table, names.positions, names.blocks, names.final_norm, *names.other_modules)
        outer += [f"{names.prefix}{name}" for name in of_all if name]
        within = {name.rpartition(".")[0] for name in (*self.layer_shapes, *self.norm_widths)} - {""}
        inner = ("", *sorted(within), *self.norm_widths, *names.other_modules_of_a_block)
        blocks = [f"{names.prefix}{self.block_name(block)}" for block in range(self.num_layers)]
        return outer + [f"{block}.{name}" if name else block for block in blocks for name in inner]

    def check(self, file: ConfigFile) -> None:
        """
        Raises:
            ModelError: sizes of the file do not go together.
        """
        if self.num_heads % self.num_key_value_heads:
            raise ModelError(
                f"{file.path}: {self.num_heads} heads of queries are not a multiple of {self.num_key_value_heads} heads of keys"
            )
        self.check_ends(self.ends, file.path)

    def check_ends(self, ends: Iterable[int], path: Path) -> None:
        """
        Args:
            ends: the tokens that a file says to end a text.

        Raises:
            ModelError: one is not in the vocabulary.
        """
        for token in ends:
            if token >= self.vocabulary_size:
                size = self.vocabulary_size
                raise ModelError(f"{path}: eos_token_id {token} is not below the vocabulary's {size} tokens; correct the file")


def _divided(names: tuple[str, ...], widths: list[int]) -> list[tuple[str, int]]:
    """Each width by its layer, or their sum by the one layer that makes all of them."""
    return [(names[0], sum(widths))] if len(names) == 1 else list(zip(names, widths, strict=True))
