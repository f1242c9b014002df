"""The short way to Triton's kernels, for eager mode on GPUs; eager.py is its like on CPUs.

Past the public operators, whose way through torch's dispatcher in Python takes longer than most of the kernels run, and
several layers in one launch. The launches themselves are repeated by the extension (replay.py). What is compiled,
traced, under autocast or out of the ordinary in another way is left to the public operators, layer by layer.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from harlora.kernels import dispatch, eager, replay
from harlora.kernels.configurations import tf32_allowed
from harlora.kernels.reference import Block, BlockWanted, Layer, Norm

_Quantized = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]


def serves(x: Tensor) -> bool:
    """Whether Triton's kernels may be called for ``x`` past the public operators."""
    return _plain(x) and dispatch.served_by_triton(x.device, x.dtype) and not _autocast(x)


def serves_blocks(x: Tensor) -> bool:
    """Whether `encoder_blocks` may be called for ``x``."""
    if not _plain(x):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    there = dispatch.served_by_triton(x.device, x.dtype) or dispatch.encodes_at_once(x.device, x.dtype, rows)
    return there and not _autocast(x)


def _plain(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dim() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)  # which devices without autocast refuse to say


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _readable(dtype: torch.dtype, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> bool:
    """Whether kernels of ``dtype`` read these as they are: an adapter may be float32, as it is by default."""
    if bias is not None and bias.dtype is not dtype:
        return False
    return A is None or B is None or (A.dtype is B.dtype and A.dtype in (dtype, torch.float32))


def _arithmetic(x: Tensor) -> tuple[Hashable, ...]:
    """The dtype, and whether products of float32 are TF32, which may be switched between calls."""
    return x.dtype, x.dtype is torch.float32 and tf32_allowed()


def _adapter(A: Tensor | None) -> Hashable:
    return None if A is None else (A.shape[0], A.dtype)


# One layer ----------------------------------------------------------------------------------------------------------


def qlora_linear(x: Tensor, *arguments: Any) -> Tensor | None:
    """The output of the operator of that name, or None where only the public operator serves.

    arguments: a `Layer`, and, if any, dropout and its seed.
    """
    layer: Layer = arguments[:11]
    dropout, seed = arguments[11:] or (0.0, None)
    _, _, nested_absmax, _, quant_type, blocksize, out_features, bias, lora_A, lora_B, scaling = layer
    if not serves(x) or not x.numel() or not _readable(x.dtype, bias, lora_A, lora_B):
        return None
    key = (
        "qlora_linear", x.get_device(), *_arithmetic(x), x.shape, quant_type, blocksize, out_features, scaling,
        nested_absmax is None, bias is None, _adapter(lora_A), dropout, seed is None,
    )  # fmt: skip
    if not _trains(x, bias, lora_A, lora_B):
        return _forward(key, x, layer, dropout, seed)[0]
    y: Tensor = _Linear.apply(key, x, bias, lora_A, lora_B, layer[:7], scaling, dropout, seed)
    return y


def _forward(key: Hashable, x: Tensor, layer: Layer, dropout: float, seed: Tensor | None) -> Sequence[Tensor]:
    """Y and t; every argument but x's sizes and the tensors is in ``key``."""
    function = partial(_checked_forward, key, x, layer, dropout, seed)
    if not x.is_contiguous():
        return function()
    return replay.run(key, _present(x, *layer[:4], *layer[7:10], seed), function)


def _checked_forward(key: Hashable, x: Tensor, layer: Layer, dropout: float, seed: Tensor | None) -> Sequence[Tensor]:
    facts = [
        tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for tensor in (*layer[:4], *layer[7:10], seed)
    ]
    if replay.remembered.get((key, "checked")) != facts:
        _check(x, x.shape[-1], layer, dropout, seed)
        replay.remember((key, "checked"), facts)
    return _function(key, "qlora_linear", x, *layer, dropout, seed)(x, *layer, dropout, seed)


def _function(key: Hashable, operator: str, *arguments: Any) -> Callable[..., Sequence[Tensor]]:
    """What computes the operator for arguments of which all that decides is in ``key``."""
    found: Callable[..., Sequence[Tensor]] | None = replay.remembered.get((key, "function"))
    if found is None:
        found = dispatch.proven_function(operator, *arguments)
        if found is None:
            return dispatch.select(operator, arguments[0].device, arguments[0].dtype)
        replay.remember((key, "function"), found)
    return found


def _check(x: Tensor, in_features: int, layer: Layer, dropout: float = 0.0, seed: Tensor | None = None) -> None:
    """Raise as the public operator does, unless the arguments fit each other."""
    from harlora.kernels import ops

    ops.check_qlora("qlora_linear", x, in_features, layer[:6], *layer[6:10], wide_adapter=True)
    ops.check_dropout("qlora_linear", x, dropout, seed)


def _backward(
    grad: Tensor, x: Tensor | None, t: Tensor | None, quantized: _Quantized, in_features: int, A: Tensor | None,
    B: Tensor | None, scaling: float, mask: Sequence[bool], dropout: float, seed: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    """The gradients of x, bias, lora_A and lora_B, each empty unless ``mask`` asks for it."""
    grad = grad.contiguous()
    key = (
        "qlora_linear_backward", grad.get_device(), *_arithmetic(grad), grad.shape, in_features, *quantized[4:],
        scaling, tuple(mask), x is None, t is None, quantized[2] is None, _adapter(A), dropout, seed is None,
    )  # fmt: skip
    arguments = (grad, x, t, *quantized, in_features, A, B, scaling, mask, dropout, seed)

    def function() -> Sequence[Tensor]:
        return _function(key, "qlora_linear_backward", *arguments)(*arguments)

    if x is not None and not x.is_contiguous():
        return function()
    return replay.run(key, _present(grad, x, t, *quantized[:4], A, B, seed), function)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Hashable, x: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, quantized: Any,
        scaling: float, dropout: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, t = _forward(key, x, (*quantized, bias, A, B, scaling), dropout, seed)
        _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        # x is kept for dA alone and t for dB alone; the dequantised weight is not kept at all.
        ctx.save_for_backward(x if needs_A else None, t if needs_B else None, A, B, seed, *quantized[:4])
        ctx.facts = (quantized[4:6], x.shape[-1], scaling, dropout)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        x, t, A, B, seed, *packed = ctx.saved_tensors
        facts, in_features, scaling, dropout = ctx.facts
        needs = ctx.needs_input_grad[1:5]
        grads = _backward(grad, x, t, (*packed, *facts), in_features, A, B, scaling, needs, dropout, seed)
        wanted = (each if needed else None for each, needed in zip(grads, needs, strict=True))
        return None, *wanted, None, None, None, None


# Several layers -----------------------------------------------------------------------------------------------------


def _key(operator: str, x: Tensor, *layers: Layer) -> Hashable:
    facts = ((*layer[4:7], layer[10], layer[2] is None, layer[7] is None, _adapter(layer[8])) for layer in layers)
    return (operator, x.get_device(), *_arithmetic(x), x.shape, *facts)


def _in_dtype_of(x: Tensor, *layers: Layer) -> Any:
    dtype = x.dtype
    if all(_readable(dtype, *layer[7:10]) for layer in layers):
        return layers
    return tuple(
        (*layer[:7], *(None if tensor is None else tensor.to(dtype) for tensor in layer[7:10]), layer[10])
        for layer in layers
    )


def _tensors(*layers: Layer) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (*layer[:4], *layer[7:10]) if tensor is not None]


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Hashable, x: Tensor, quantized: Any, functions: tuple[Any, Any], *values: Any
    ) -> tuple[Tensor, ...]:
        layers = [(*packed, *values[4 * i : 4 * i + 4]) for i, packed in enumerate(quantized)]
        y, t = _run(key, x, layers, 3 * x.shape[-1:], partial(functions[0], x, layers))
        adapters = [tensor for layer in layers for tensor in layer[8:10]]
        packed = [tensor for layer in layers for tensor in layer[:4]]
        ctx.save_for_backward(x, t, *adapters, *packed)
        ctx.facts = [(layer[4:7], layer[10]) for layer in layers]
        ctx.key, ctx.function = key, functions[1]
        q, k, v = y.unbind(0)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        x, t, *tensors = ctx.saved_tensors
        adapters, packed = tensors[:6], tensors[6:]
        layers = [
            (*packed[4 * i : 4 * i + 4], *facts, None, *adapters[2 * i : 2 * i + 2], scaling)
            for i, (facts, scaling) in enumerate(ctx.facts)
        ]
        needs = ctx.needs_input_grad
        wanted = (needs[1], *(any(needs[4 + place :: 4]) for place in range(3)))
        grads = tuple(grad.contiguous() for grad in grads)
        function = partial(ctx.function, grads, x, t, layers, wanted)
        inputs = [*grads, x, t, *_tensors(*layers)]
        grad_x, *stacked = (
            replay.run(("backward", ctx.key, wanted), inputs, function) if x.is_contiguous() else function()
        )
        results: list[Tensor | None] = [None, grad_x if needs[1] else None, None, None]
        for i in range(3):
            results += [each[i] if needs[4 + 4 * i + place] else None for place, each in enumerate(stacked)]
            results.append(None)  # scaling
        return tuple(results)


def _together(
    key: Hashable, x: Tensor, layers: Sequence[Layer], fit: Callable[[], bool], *operators: str
) -> tuple[Callable[..., Any], ...] | None:
    """Triton's functions of ``operators`` over layers, or None where they have to run one by one."""
    remembered: tuple[Callable[..., Any], ...] | None = replay.remembered.get(key)
    if remembered is None or not replay.known(key):
        if not fit():
            return None
        functions = [dispatch.group(operator, x, tuple(layers)) for operator in operators]
        if None in functions:
            return None
        remembered = tuple(function for function in functions if function is not None)
        replay.remember(key, remembered)
    return remembered


def _run(
    key: Hashable, x: Tensor, layers: Sequence[Layer], in_features: Sequence[int], function: Callable[[], Any]
) -> Any:
    def checked() -> Any:
        for layer, width in zip(layers, in_features, strict=True):
            _check(x, width, layer)
        return function()

    return replay.run(key, [x, *_tensors(*layers)], checked) if x.is_contiguous() else checked()


def qlora_qkv(x: Tensor, q: Layer, k: Layer, v: Layer) -> tuple[Tensor, ...] | None:
    """Three layers over one ``x``, or None where they have to run one by one.

    The sums of `qlora_linear` for each; backward adds the three gradients of x in one launch.
    """
    if not serves(x):
        return None
    from harlora.kernels.triton.qlora_qkv import alike

    layers = _in_dtype_of(x, q, k, v)
    key = _key("qlora_qkv", x, *layers)
    functions = _together(key, x, layers, partial(alike, x, layers), "qlora_qkv", "qlora_qkv_backward")
    if functions is None:
        return None
    values = [value for layer in layers for value in layer[7:]]
    if not _trains(x, *(value for layer in layers for value in layer[7:10])):
        y, _ = _run(key, x, layers, 3 * x.shape[-1:], partial(functions[0], x, layers))
        together: tuple[Tensor, ...] = y.unbind(0)
        return together
    result: tuple[Tensor, ...] = _QKV.apply(key, x, [layer[:7] for layer in layers], functions, *values)
    return result


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Hashable, x: Tensor, quantized: Any, functions: tuple[Any, Any], *values: Any
    ) -> Tensor:  # fmt: skip
        fc1, fc2 = ((*packed, *values[4 * i : 4 * i + 4]) for i, packed in enumerate(quantized))
        y: Tensor
        y, h, t1, t2 = _run(key, x, (fc1, fc2), (x.shape[-1], fc1[6]), partial(functions[0], x, fc1, fc2, True))
        ctx.save_for_backward(x, h, t1, t2, *fc1[8:10], *fc2[8:10], *fc1[:4], *fc2[:4])
        ctx.facts = [(layer[4:7], layer[10]) for layer in (fc1, fc2)]
        ctx.key, ctx.function = key, functions[1]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        x, h, t1, t2, *tensors = ctx.saved_tensors
        adapters, packed = tensors[:4], tensors[4:]
        layers = [
            (*packed[4 * i : 4 * i + 4], *facts, None, *adapters[2 * i : 2 * i + 2], scaling)
            for i, (facts, scaling) in enumerate(ctx.facts)
        ]
        needs = ctx.needs_input_grad
        wanted = (needs[1], *needs[4:7], *needs[8:11])
        grad = grad.contiguous()
        function = partial(ctx.function, grad, x, h, t1, t2, *layers, wanted)
        inputs = [grad, x, h, t1, t2, *_tensors(*layers)]
        grad_x, *grads = (
            replay.run(("backward", ctx.key, wanted), inputs, function) if x.is_contiguous() else function()
        )
        results = [None, grad_x, None, None, *grads[:3], None, *grads[3:], None]
        return tuple(result if needed else None for result, needed in zip(results, needs, strict=True))


def qlora_mlp(x: Tensor, fc1: Layer, fc2: Layer) -> Tensor | None:
    """``fc2(gelu(fc1(x)))``, or None where the layers have to run one by one.

    Backward keeps x, fc1(x) and x·lora_Aᵀ of both layers, and computes gelu(fc1(x)) anew.
    """
    if not serves(x):
        return None
    from harlora.kernels.triton.qlora_mlp import fits

    layers = _in_dtype_of(x, fc1, fc2)
    train = _trains(x, *(tensor for layer in layers for tensor in layer[7:10]))
    key = (_key("qlora_mlp", x, *layers), train)
    operators = ("qlora_mlp", "qlora_mlp_backward") if train else ("qlora_mlp",)
    functions = _together(key, x, layers, partial(fits, x, *layers), *operators)
    if functions is None:
        return None
    values = [value for layer in layers for value in layer[7:]]
    if not train:
        widths = (x.shape[-1], layers[0][6])
        result: Tensor = _run(key, x, layers, widths, partial(functions[0], x, *layers, False))[0]
        return result
    trained: Tensor = _MLP.apply(key, x, [layer[:7] for layer in layers], functions, *values)
    return trained


# The blocks of an encoder -------------------------------------------------------------------------------------------

# Of a layer: quant_type, blocksize, out_features, scaling, and whether it has a nested scale, a bias and an adapter.
Facts = tuple[str, int, int, float, bool, bool, bool]


class Blocks:
    """What about an encoder's blocks is the same in every call; their tensors come with the call. Made by `blocks_of`.

    facts: of q, k, v, o, fc1 and fc2 of each block; eps: of norm1 and norm2 of each, then of the last norm.

    The tensors of a norm are weight and bias; of a layer packed, absmax, nested_absmax, nested_offset, bias, lora_A and
    lora_B, as far as there are such; of a block those of norm1, q, k, v, o, norm2, fc1 and fc2; last the last norm's.
    """

    def __init__(self, heads: int, facts: tuple[Facts, ...], eps: tuple[float, ...]) -> None:
        self.heads, self.facts, self.eps = heads, facts, eps
        # Of each tensor: its block, the number of its gradient there (`BlockWanted`), and whose it is of q, k and v.
        self.places: list[tuple[int, int, int | None] | None] = []
        for number, (*_, nested, bias, adapter) in enumerate(facts):
            block, role = divmod(number, 6)
            frozen = 2 * (role in (0, 4)) + (4 if nested else 2)
            first = 3 * max(0, role - 2)
            fields = [*[first] * bias, *[first + 1, first + 2] * adapter]
            self.places += [None] * frozen
            self.places += [(block, field, role if role < 3 else None) for field in fields]
        self.places += [None, None]

    def assembled(self, tensors: Sequence[Tensor]) -> tuple[list[Block], Norm]:
        """The blocks and the last norm as the operators take them."""
        given, eps = iter(tensors), iter(self.eps)

        def norm() -> Norm:
            return next(given), next(given), next(eps)

        def layer(facts: Facts) -> Layer:
            quant_type, blocksize, out_features, scaling, nested, bias, adapter = facts
            packed = [next(given) if there else None for there in (True, True, nested, nested)]
            rest = [next(given) if there else None for there in (bias, adapter, adapter)]
            return (*packed, quant_type, blocksize, out_features, *rest, scaling)  # type: ignore[return-value]

        blocks = []
        for first in range(0, len(self.facts), 6):
            norm1, attention = norm(), [layer(facts) for facts in self.facts[first : first + 4]]
            norm2, (fc1, fc2) = norm(), [layer(facts) for facts in self.facts[first + 4 : first + 6]]
            blocks.append((norm1, *attention, norm2, fc1, fc2))
        return blocks, norm()  # type: ignore[return-value]


# One object for equal facts, which is a key by itself.
blocks_of = lru_cache(maxsize=1024)(Blocks)


@dataclass(frozen=True, eq=False)
class _Route:
    """Which tensors have gradients, and where those are among the gradients of the blocks."""

    wanted: tuple[BlockWanted, ...]
    leaves: list[int]
    places: list[tuple[int, int | None]]


@lru_cache(maxsize=1024)
def _route(blocks: Blocks, trains: tuple[bool, ...]) -> _Route | None:
    """The route of what trains, or None where that has no gradient here."""
    wants = [[False] * 12 for _ in range(len(blocks.facts) // 6)]
    leaves = [i for i, train in enumerate(trains) if train]
    places = []
    for leaf in leaves:
        place = blocks.places[leaf]
        if place is None:
            return None
        block, field, which = place
        wants[block][field] = True
        places.append((12 * block + field, which))
    present = [i for i, want in enumerate(want for of_block in wants for want in of_block) if want]
    number = {place: i for i, place in enumerate(present)}
    return _Route(tuple(map(tuple, wants)), leaves, [(number[place], which) for place, which in places])


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Hashable, blocks: Blocks, route: _Route, found: Sequence[Tensor], tensors: Sequence[Tensor],
        x: Tensor, *_: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, *found[1:], *tensors)
        ctx.facts = key, blocks, route, len(found)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eager.refuse_second_derivative()
        key, blocks, route, count = ctx.facts
        want_x = ctx.needs_input_grad[5]
        inputs = [grad.contiguous(), *ctx.saved_tensors]

        def function() -> Sequence[Tensor]:
            grad, x, *rest = inputs
            kept, tensors = rest[: count - 1], rest[count - 1 :]
            functions = _block_functions(key, x, tensors, blocks, True)
            assert functions is not None  # forward took them
            layers, norm = blocks.assembled(tensors)
            grads: Sequence[Tensor] = functions[1](
                grad, x, kept, layers, norm, blocks.heads, (want_x, route.wanted)
            )  # fmt: skip
            return grads

        grads = list(replay.run(("backward", key, route, want_x), inputs, function))
        grad_x = grads.pop(0) if want_x else None
        # Those of q, k and v are parts of one tensor.
        of_leaves = (grads[i] if which is None else grads[i][which] for i, which in route.places)
        return None, None, None, None, None, grad_x, *of_leaves


def encoder_blocks(x: Tensor, tensors: Sequence[Tensor], blocks: Blocks) -> Tensor | None:
    """The last norm of what the blocks make of ``x``, or None where the modules have to run.

    x: ``(windows, tokens, width)``, which `serves_blocks` was asked about.
    tensors: as `Blocks` lists them.
    """
    train, route = False, None
    if torch.is_grad_enabled():
        trains = tuple([tensor.requires_grad for tensor in tensors])
        train = x.requires_grad or True in trains
        route = _route(blocks, trains)
        if train and route is None:
            return None
    x = x.contiguous()
    parts = 1 if train or not dispatch.served_by_triton(x.device, x.dtype) else _parts_of_batch(x)
    if parts > 1 and not dispatch.encodes_at_once(x.device, x.dtype, x.shape[0] * x.shape[1]):
        return _in_parts(x, parts, tensors, blocks)
    key = ("encoder_blocks", blocks, x.get_device(), *_arithmetic(x), x.shape, train)

    def function() -> Sequence[Tensor]:
        functions = _block_functions(key, x, tensors, blocks, train)
        if functions is None:
            return ()
        layers, norm = blocks.assembled(tensors)
        results: Sequence[Tensor] = functions[0](x, layers, norm, blocks.heads, train)
        return results

    with torch.no_grad():
        found = replay.run(key, [x, *tensors], function)
    if not found:
        return _in_parts(x, parts, tensors, blocks) if parts > 1 else None
    if not train:
        return found[0]
    assert route is not None
    trained: Tensor = _Encoder.apply(key, blocks, route, found, tensors, x, *[tensors[i] for i in route.leaves])
    return trained


def _in_parts(x: Tensor, parts: int, tensors: Sequence[Tensor], blocks: Blocks) -> Tensor | None:
    encoded = [encoder_blocks(part, tensors, blocks) for part in x.chunk(parts)]
    together = [each for each in encoded if each is not None]
    return torch.cat(together) if len(together) == len(encoded) else None


def _parts_of_batch(x: Tensor) -> int:
    """Into how many parts ``(windows, tokens, width)`` x is cut so that the launchers take each."""
    from harlora.kernels.triton.qlora_mlp import MOST_ROWS

    windows, tokens, _ = x.shape
    return -(-windows // max(1, MOST_ROWS // max(1, tokens)))


def _block_functions(
    key: Hashable, x: Tensor, tensors: Sequence[Tensor], blocks: Blocks, train: bool
) -> list[Callable[..., Any]] | None:
    """What computes forward and, to ``train``, backward, or None where the launchers do not take such tensors."""
    kinds = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in tensors]
    remembered = replay.remembered.get(key)
    if remembered is not None and remembered[0] == kinds:
        functions: list[Callable[..., Any]] | None = remembered[1]
        return functions
    functions = None
    layers, norm = blocks.assembled(tensors)
    like_x = all(
        vector.shape == x.shape[-1:] and (vector.dtype, vector.device) == (x.dtype, x.device) and vector.is_contiguous()
        for each in (norm, *(block[i] for block in layers for i in (0, 5))) for vector in each[:2]
    )  # fmt: skip
    if like_x and all(_readable(x.dtype, *layer[7:10]) for block in layers for layer in (*block[1:5], *block[6:])):
        for _, q, k, v, o, _, fc1, fc2 in layers:
            for layer, width in zip((q, k, v, o, fc1, fc2), (*[x.shape[-1]] * 5, fc1[6]), strict=True):
                _check(x, width, layer)
        functions = dispatch.encoder_blocks(x, layers, norm, blocks.heads, train)
    # What cannot be proven while a graph is captured can be later.
    if functions is not None or not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        replay.remember(key, (kinds, functions))
    return functions
