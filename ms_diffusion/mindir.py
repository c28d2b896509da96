"""MindIR, the file format of MindSpore's graphs: writing a network's graph, reading it, translating it into ONNX.

MindSpore's own ONNX exporter (2.7 to 2.10) lacks GroupNorm and a dynamic batch; its MindIR has both.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from .files import temporary_folder
from .runtime import UserError

Input = tuple[str, tuple[int, ...], str]  # name, shape without the batch, "float32" or "int32"
OPSET, IR_VERSION = 17, 8  # of ONNX, from 2022
BATCH = 251  # the size of the batch in a graph for `to_onnx`: no other dimension is a multiple of this prime


class Method(nn.Cell):
    """A method of a network as a network of its own, such as an autoencoder's `decode`."""

    def __init__(self, net: nn.Cell, name: str):
        super().__init__(auto_prefix=False)
        self.net, self.method = net, getattr(net, name)

    def construct(self, x: Tensor) -> Tensor:
        return self.method(x)


def export(net: nn.Cell, inputs: Sequence[Input], batch_size: int | None = None) -> bytes:
    """The MindIR of `net`, for a batch of any size or of one. `net` must be built without this library's CPU kernels. Raises
    UserError if it does not fit one file."""
    types = {"float32": ms.float32, "int32": ms.int32}
    examples = [Tensor(shape=[batch_size, *shape], dtype=types[dtype]) for _, shape, dtype in inputs]
    with temporary_folder() as folder, fixed_rank_resize(), contextlib.redirect_stdout(io.StringIO()):
        ms.export(net, *examples, file_name=f"{folder}/net", file_format="MINDIR")
        if not (file := folder / "net.mindir").exists():  # MindSpore splits what has more than 1 GB
            raise UserError("the network has more than 1 GB of weights and does not fit one file")
        return file.read_bytes()


@contextlib.contextmanager
def fixed_rank_resize() -> Iterator[None]:
    """Within the block, ops.interpolate is the operator that it calls for the nearest pixel. Its own checks make a graph
    with branches if the batch is dynamic, which neither format can express (MindSpore 2.10)."""
    original, resize = ops.interpolate, ops.ResizeNearestNeighborV2()

    def interpolate(x, size, mode):
        return resize(x, Tensor(size, ms.int32))

    ops.interpolate = interpolate
    try:
        yield
    finally:
        ops.interpolate = original


class Node:
    """An operator of a graph: its type, its attributes, the names of its inputs and its output, and the output's shapes,
    a list for each of its tensors."""

    def __init__(self, node: Any, primitives: dict[str, Any]):
        primitive = primitives.get(node.op_type.removeprefix("REF::"))
        self.type = primitive.op_type if primitive else node.op_type
        self.inputs, self.output = list(node.input), node.output[0]
        self.attributes = {a.name: a for a in (*node.attribute, *(primitive.attribute if primitive else ()))}
        shape = self.attributes.get("shape")
        parts = shape.values if shape and shape.values else [shape] if shape else []
        self.shapes = [list(part.tensors[0].dims) for part in parts if part.tensors]

    def __getitem__(self, name: str) -> Any:
        return read_value(self.attributes[name])


def read_graph(data: bytes) -> tuple[Any, list[Node]]:
    """The protobuf message of a MindIR, and the nodes of its graph in order."""
    model = import_module("mindspore.train.mind_ir_pb2").ModelProto()
    model.ParseFromString(data)
    primitives = {p.name: p for p in model.primitives}
    return model, [Node(node, primitives) for graph in (model.graph, *model.functions) for node in graph.node]


def read_value(attribute: Any) -> Any:
    """A number, text, tuple or array from MindIR; None for what is none of these."""
    kind = attribute.AttributeType.Name(attribute.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(map(read_value, attribute.values))
    if kind == "TENSORS":
        return read_array(attribute.tensors[0])
    if kind in ("FLOAT", "DOUBLE"):
        return attribute.floats[0] if attribute.floats else attribute.f or attribute.d
    if kind == "STRING":
        return (attribute.strings or [attribute.s])[0].decode()
    whole = kind == "BOOL" or kind.startswith(("INT", "UINT"))
    return (attribute.ints[0] if attribute.ints else attribute.i) if whole else None


def read_array(tensor: Any) -> np.ndarray:
    dtypes = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
    dtype = dtypes[tensor.DataType.Name(tensor.data_type)]
    return np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))


class OnnxGraph:
    """The nodes and constants of an ONNX graph as it grows. A value is the name of a result, or a numpy array. `shapes` are
    those of MindIR's values by its names; the first of `inputs` has the batch size."""

    def __init__(self, inputs: Sequence[Input], shapes: dict[str, list]):
        self.shapes, self.nodes = shapes, []
        self.constants: dict[int, tuple[str, np.ndarray]] = {}  # by the array's id
        self.batch_size = self.add("Shape", inputs[0][0], start=0, end=1)

    def add(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Append an operator; returns the name of its result, or a list of names."""
        from onnx import helper

        names = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.name_of(value) for value in inputs], names, **attributes))
        return names[0] if outputs == 1 else names

    def name_of(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        return self.constants.setdefault(id(value), (f"constant_{len(self.constants)}", value))[0]  # value stays alive

    def transposed(self, x: Any, transpose: bool, rank: int) -> Any:
        """x with its last two axes swapped if `transpose`."""
        if not transpose:
            return x
        if isinstance(x, np.ndarray):
            return np.ascontiguousarray(x.swapaxes(-1, -2))
        return self.add("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])

    def repeated(self, row: np.ndarray) -> str:
        """The array `row` (1, ...) for each item of the batch."""
        return self.add("Expand", row, self.add("Concat", self.batch_size, np.array(row.shape[1:]), axis=0))


def of_any_batch(shape: Sequence[int]) -> np.ndarray:
    """A shape in which the dimension that depends on the size of the batch is left open."""
    return np.array([-1 if size % BATCH == 0 else size for size in shape])


# A rule for each operator: rule(graph, node, *values of the inputs) -> the value of the output


def convolution(op: str) -> Callable:
    def rule(g: OnnxGraph, node: Node, x: str, w: np.ndarray, *_: Any) -> str:
        top, bottom, left, right = node["pad_list"]
        options: dict[str, Any] = {"pads": [top, left, bottom, right], "strides": node["stride"][2:], "group": node["group"]}
        return g.add(op, x, w, dilations=node["dilation"][2:], kernel_shape=w.shape[2:], **options)

    return rule


def plain(op: str) -> Callable:
    return lambda g, node, *values: g.add(op, *values)


def with_number(op: str) -> Callable:
    return lambda g, node, x, number: g.add(op, x, np.array(number, np.float32))


def bias_add(g: OnnxGraph, node: Node, x: str, bias: np.ndarray, *_: Any) -> str:
    return g.add("Add", x, bias.reshape(-1, *[1] * (len(node.shapes[0]) - 2)))


def matmul(g: OnnxGraph, node: Node, a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> str:
    rank = len(node.shapes[0])
    return g.add("MatMul", g.transposed(a, transpose_a, rank), g.transposed(b, transpose_b, rank))


def reshape(g: OnnxGraph, node: Node, x: str, *_: Any) -> str:
    return g.add("Reshape", x, of_any_batch(node.shapes[0]))


def group_norm(g: OnnxGraph, node: Node, x: str, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> list:
    """GroupNormalization is too new for many programs; an instance norm of the groups is the same."""
    shape = node.shapes[0]
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    x = g.add("InstanceNormalization", g.add("Reshape", x, np.array([0, groups, -1])), ones, zeros, epsilon=eps)
    weight, bias = (each.reshape(-1, *[1] * (len(shape) - 2)) for each in (weight, bias))
    return [g.add("Add", g.add("Mul", g.add("Reshape", x, of_any_batch(shape)), weight), bias)]


def layer_norm(g: OnnxGraph, node: Node, x: str, weight: Any, bias: Any, axis: int, _: int, eps: float) -> list:
    return [g.add("LayerNormalization", x, weight, bias, axis=axis, epsilon=eps)]


def split(g: OnnxGraph, node: Node, x: str, axis: int, num: int) -> list:
    return g.add("Split", x, outputs=num, axis=axis)


def resize(g: OnnxGraph, node: Node, x: str, *_: Any) -> str:
    """The nearest pixel: each is repeated a whole number of times."""
    new, old = node.shapes[0][2:], g.shapes[node.inputs[0]][0][2:]
    scales = np.array([1, 1, *np.divide(new, old)], np.float32)
    nearest: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.add("Resize", x, "", scales, **nearest)


def zeros(g: OnnxGraph, node: Node, *_: Any) -> str:
    return g.repeated(np.zeros([1, *node.shapes[0][1:]], np.float32))


def average_pool(g: OnnxGraph, node: Node, x: str, kernel: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> str:
    return g.add("AveragePool", x, kernel_shape=kernel[-2:], strides=strides[-2:])


def expand_dims(g: OnnxGraph, node: Node, x: Any, axis: int) -> Any:
    return np.expand_dims(x, axis) if isinstance(x, np.ndarray) else g.add("Unsqueeze", x, np.array([axis]))


def cast(g: OnnxGraph, node: Node, x: str, _: int) -> str:
    kinds = {1: 1, 6: 6}  # MindIR's numbers of float32 and int32 are ONNX's
    return g.add("Cast", x, to=kinds[node.attributes["shape"].tensors[0].data_type])


def total(g: OnnxGraph, node: Node, x: str, axis: Any, keep_dims: bool = False, *_: Any) -> str:
    return g.add("ReduceSum", x, np.array(axis).reshape(-1), keepdims=int(keep_dims))


def mean(g: OnnxGraph, node: Node, x: str, axis: Any, keep_dims: bool = False, *_: Any) -> str:
    keep_dims = node["keep_dims"] if "keep_dims" in node.attributes else keep_dims
    return g.add("ReduceMean", x, axes=np.array(axis).reshape(-1).tolist(), keepdims=int(keep_dims))


def gelu(g: OnnxGraph, node: Node, x: str) -> str:
    """MindSpore's GeLU is the approximation by tanh, which ONNX has from opset 20 on."""
    cube = g.add("Mul", g.add("Mul", x, x), g.add("Mul", x, np.array(0.044715, np.float32)))
    inner = g.add("Mul", g.add("Add", x, cube), np.array(math.sqrt(2 / math.pi), np.float32))
    gate = g.add("Add", g.add("Tanh", inner), np.array(1, np.float32))
    return g.add("Mul", g.add("Mul", x, np.array(0.5, np.float32)), gate)


def argmin(g: OnnxGraph, node: Node, x: str, axis: int, *_: Any) -> str:
    return g.add("Cast", g.add("ArgMin", x, axis=axis, keepdims=0), to=6)  # int32


RULES: dict[str, Callable] = {
    **{op: plain(op) for op in ("Add", "Sub", "Mul", "Div", "Erf", "Sin", "Cos", "Exp", "Tanh", "Sigmoid")},
    **{f"{op}s": with_number(op) for op in ("Add", "Sub", "Mul", "Div")},
    "ReLU": plain("Relu"),
    "SiLU": lambda g, node, x: g.add("Mul", x, g.add("Sigmoid", x)),
    "Softmax": lambda g, node, x, axis: g.add("Softmax", x, axis=axis[0] if isinstance(axis, tuple) else axis),
    "Conv2D": convolution("Conv"),
    "Conv2DTranspose": convolution("ConvTranspose"),
    "BiasAdd": bias_add,
    "MatMul": matmul,
    "BatchMatMul": matmul,
    "MatMulExt": plain("MatMul"),
    "GeLU": gelu,
    "ReduceMean": mean,
    "Rsqrt": lambda g, node, x: g.add("Reciprocal", g.add("Sqrt", x)),
    "Square": lambda g, node, x: g.add("Mul", x, x),
    "SumExt": total,
    "Argmin": argmin,
    "GroupNorm": group_norm,
    "LayerNorm": layer_norm,
    "Gather": lambda g, node, table, index, axis, *_: g.add("Gather", table, index, axis=axis),
    "Cast": cast,
    "Reshape": reshape,
    "Transpose": lambda g, node, x, perm: g.add("Transpose", x, perm=perm),
    "ExpandDims": expand_dims,
    "Concat": lambda g, node, parts, axis: g.add("Concat", *parts, axis=axis),
    "Split": split,
    "ResizeNearestNeighborV2": resize,
    "AvgPool": average_pool,
    "Zeros": zeros,
    "MakeTuple": lambda g, node, *values: list(values),
    "TupleGetItem": lambda g, node, values, i: values and values[i],
    "Shape": lambda g, node, x: None,  # what is made of it is known from the shapes of the outputs
    "Load": lambda g, node, parameter, *_: parameter,
    "Depend": lambda g, node, x, *_: x,
    "UpdateState": lambda g, node, *_: None,
}


def to_onnx(net: nn.Cell, inputs: Sequence[Input], output: str) -> bytes:
    """`net` as an ONNX model for a batch of any size, with these names of its inputs and its output. `net` must be built
    without this library's CPU kernels. Raises UserError without the onnx package, or if an operator has no rule."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as e:
        raise UserError('ONNX needs the onnx package: pip install "ms_diffusion[export]", or use --format mindir') from e

    model, nodes = read_graph(export(net, inputs, BATCH))
    if unknown := {node.type for node in nodes} - {"Constant", *RULES}:
        raise UserError(f"there is no rule to write {', '.join(sorted(unknown))} as ONNX: use --format mindir")
    values: dict[str, Any] = {p.name: read_array(p) for p in model.graph.parameter}
    values |= {info.name: name for info, (name, *_) in zip(model.graph.input, inputs, strict=True)}
    shapes = {info.name: [list(info.tensor[0].dims)] for info in model.graph.input}
    g = OnnxGraph(inputs, shapes)
    for node in nodes:
        shapes[node.output] = node.shapes
        if node.type == "Constant":
            value = node["value"]
            of_batch = isinstance(value, np.ndarray) and value.shape[:1] == (BATCH,)
            values[node.output] = g.repeated(value[:1]) if of_batch else value
        else:
            values[node.output] = RULES[node.type](g, node, *(values[name] for name in node.inputs))
    g.nodes.append(helper.make_node("Identity", [values[model.graph.output[0].name]], [output]))

    def describe(name: str, shape: Sequence[int], dtype: str) -> Any:
        types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        return helper.make_tensor_value_info(name, types[dtype], ["batch", *shape])

    ends = [describe(*each) for each in inputs], [describe(output, shapes[model.graph.output[0].name][0][1:], "float32")]
    constants = [numpy_helper.from_array(array, name) for name, array in g.constants.values()]
    graph = helper.make_graph(g.nodes, "net", *ends, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()
