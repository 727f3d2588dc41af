"""An ONNX graph that grows node by node, its large weights in a file beside it."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MICROSOFT", "Graph"]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
PAGE_BYTES, CACHE_LINE_BYTES = 4096, 64
SMALLEST_PAGED_BYTES = 1 << 16
"""Smaller tensors do not begin a page: the gaps before them would be a noticeable part of the file."""
SMALLEST_EXTERNAL_BYTES = 1024
"""Smaller tensors stay in the graph, where shape inference can see them."""

LONGEST_SHOWN = 100
"""Characters of a constant that are its name. A longer one is named by its digest: a device refuses names without end."""

PRODUCTS = ("Gemm", "MatMul")

Array = NDArray[Any]
Shape = Sequence[int | str]


class Graph:
    """
    Nodes, inputs, outputs and initializers of one model. Values are known by their names.

    Initializers that are not small go straight to ``path`` + "_data", so that a model of any size is written in the memory of
    its largest tensor; large ones at the beginning of a page, so that a runtime can map them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_path = path.with_name(f"{path.name}_data")
        self._data: BinaryIO | None = None
        """Opened for the first tensor that is not small: a graph without weights has no such file."""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""

    def __enter__(self) -> "Graph":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._data is not None:
            self._data.close()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes that are added within this context begin with the part of the model that they belong to."""
        outer, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = outer

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name. An optional input that is left out is ""."""
        output = f"{self._scope}{operator}_{len(self._nodes)}"
        self.node_with_outputs(operator, inputs, [output], domain=domain, **attributes)
        return output

    def node_with_outputs(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node whose outputs get these names."""
        name = f"{self._scope}{operator}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes))

    def cast(self, value: str, dtype: DTypeLike) -> str:
        return self.node("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        self._inputs.append(_described(name, dtype, shape))
        return name

    def output(self, name: str, dtype: DTypeLike, shape: Shape) -> None:
        self._outputs.append(_described(name, dtype, shape))

    def name_output(self, name: str, value: str, dtype: DTypeLike, shape: Shape) -> str:
        """An output under a name of its own: the node's value is called so from here on, rather than copied."""
        for node in self._nodes:
            for values in (node.input, node.output):
                values[:] = [name if each == value else each for each in values]
        self.output(name, dtype, shape)
        return name

    def constant(self, value: Any, dtype: DTypeLike = np.int64) -> str:
        """A small initializer; equal constants share one."""
        array = np.array(value, dtype)
        shown = str(array.tolist())
        if len(shown) > LONGEST_SHOWN:
            shown = f"{array.shape}/{hashlib.sha256(array.tobytes()).hexdigest()}"
        return self.weight(f"constant/{array.dtype}/{shown}", array)

    def has_weight(self, name: str) -> bool:
        return name in self._initializers

    def weight(self, name: str, array: Array) -> str:
        """An initializer. If there is one of this name already, that one stays: a tied matrix is stored once."""
        return self.weight_in_pieces(name, iter([array]))

    def weight_in_pieces(self, name: str, pieces: Iterator[Array]) -> str:
        """The same of an array that is given some rows at a time, so that it is never in memory as a whole."""
        if name not in self._initializers:
            first = np.ascontiguousarray(next(pieces))
            if first.nbytes < SMALLEST_PAGED_BYTES:
                first = np.concatenate([first, *pieces])
            large = first.nbytes >= SMALLEST_EXTERNAL_BYTES
            self._initializers[name] = self._external(name, first, pieces) if large else numpy_helper.from_array(first, name)
        return name

    def optional_input(self, name: str, default: Array) -> str:
        """An input with a default. Callers that do not know of it need not give it."""
        self.input(name, default.dtype, default.shape)
        return self.weight(name, default)

    def slot(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """An empty initializer that a caller, or an adapter, may replace. Dimensions given as words may have any size."""
        self.input(name, dtype, shape)
        empty = np.zeros([0 if isinstance(size, str) else size for size in shape], dtype)
        return self.weight(name, empty)

    def prune(self) -> None:
        """Leave out the nodes, the inputs and the initializers that no output depends on."""
        wanted = {output.name for output in self._outputs}
        kept = []
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(node.output):
                kept.append(node)
                wanted.update(node.input)
        self._nodes = kept[::-1]
        self._inputs = [each for each in self._inputs if each.name in wanted]
        self._initializers = {name: tensor for name, tensor in self._initializers.items() if name in wanted}

    def order_for_memory(self) -> None:
        """
        Put the nodes into an order in which ONNX Runtime holds little in memory at once. Of what is still to be computed, it
        takes the result that stands last in the file, and of a node's inputs first the one that stands last. So of two inputs,
        the one with more matrix products behind it, or else the deeper one, goes behind the other: what is quickly computed
        again, or cast, is not there before all else that the node takes. Results, which no node takes, go to the end, the first
        of them last: each is computed as soon as it can be.
        """
        depth: dict[str, tuple[int, int]] = {}
        """Of a value: how many matrix products, and nodes, have to be computed for it one after the other."""
        for node in self._nodes:
            before = [(0, 0), *(depth[name] for name in node.input if name in depth)]
            products, nodes = (max(counts) for counts in zip(*before, strict=True))
            depth.update(dict.fromkeys(node.output, (products + (node.op_type in PRODUCTS), nodes + 1)))
        taken = {name for node in self._nodes for name in node.input}
        inner = [node for node in self._nodes if not taken.isdisjoint(node.output)]
        results = [node for node in self._nodes if taken.isdisjoint(node.output)]
        self._nodes = [*sorted(inner, key=lambda node: depth[node.output[0]]), *reversed(results)]

    def save(self, name: str, opset: int, ir_version: int) -> None:
        """
        Write the file.

        Args:
            opset: version of the standard operators; runtimes refuse what is newer than they are.
            ir_version: of the file's format, likewise.
        """
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        domains = {"": opset} | {node.domain: 1 for node in self._nodes if node.domain}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="splitlora")
        if self._data is not None:
            self._data.flush()
        self.path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(self.path)

    def _external(self, name: str, first: Array, more: Iterator[Array]) -> onnx.TensorProto:
        alignment = PAGE_BYTES if first.nbytes >= SMALLEST_PAGED_BYTES else CACHE_LINE_BYTES
        if self._data is None:
            self._data = self.data_path.open("wb")
        begin = self._data.seek(-self._data.tell() % alignment, os.SEEK_CUR)
        rows = 0
        for piece in chain([first], more):
            self._data.write(np.ascontiguousarray(piece).data)
            rows += len(piece)
        tensor = TensorProto(name=name, dims=(rows, *first.shape[1:]), data_type=helper.np_dtype_to_tensor_dtype(first.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self.data_path.name, "offset": begin, "length": self._data.tell() - begin}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _described(name: str, dtype: DTypeLike, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
