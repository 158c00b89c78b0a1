"""Register the ops of the product with torch, so that compilers and captures see one opaque call with a fake.

An op is defined through torch.library.Library itself. The decorator torch.library.custom_op does the same and then
looks every default and every written tensor of a call up in Python: for `moe_ffn_cached` a quarter of a millisecond,
which is more than a step of decoding takes on a card. torch.library.register_autograd refuses an op that writes an
argument, and saves all arguments for the backward, also arguments that are overwritten before it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from globe_kernels.errors import RequestError
from globe_kernels.ops.triton_import import on_its_device

_LIBRARY = torch.library.Library("globe", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

Backward = Callable[..., dict[str, torch.Tensor]]


def register_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Backward | None = None,
    differentiable: tuple[str, ...] = ("hidden", "top_k_weights"),
) -> Callable[..., Any]:
    """Define `torch.ops.globe.<schema>`, which calls `run` on the device of its tensors, and return the op.

    `schema` is that of a torch operator, such as "scale(Tensor x, float by) -> Tensor"; `fake` returns empty results of
    the right shape, dtype and device.

    `backward` takes the gradient of the result, a tensor, and by name the arguments that it needs: these alone are kept
    until then. It returns {argument: gradient} for `differentiable`, all of them tensors; a call in which another
    tensor requires a gradient raises RequestError. A backward through the result of an op without `backward` raises
    RuntimeError.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, on_its_device(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"globe::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.globe, name).default
    places = {argument.name: place for place, argument in enumerate(op._schema.arguments)}
    needed = [] if backward is None else list(inspect.signature(backward).parameters)[1:]

    def below(keyset: Any, arguments: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, arguments: tuple, names: list[str], *tensors: torch.Tensor) -> Any:
            leaves, ctx.structure = tree_flatten([arguments[places[argument]] for argument in needed])
            is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
            ctx.save_for_backward(*(leaf if saved else None for leaf, saved in zip(leaves, is_tensor, strict=True)))
            ctx.others = [None if saved else leaf for leaf, saved in zip(leaves, is_tensor, strict=True)]
            ctx.names = names
            return below(keyset, arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if backward is None:
                raise RuntimeError(
                    f"globe::{name} has no gradient; GloBE experts pass first derivatives to hidden states and router "
                    "weights alone, and a call under torch.no_grad() needs none."
                )
            leaves = [o if s is None else s for s, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
            found = backward(gradients[0], *tree_unflatten(leaves, ctx.structure))
            return None, None, None, *(found[argument] for argument in ctx.names)

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            # in lists too: autograd sees only the tensors that it is given one by one
            tensors = [
                (argument, item)
                for argument, value in zip(places, arguments, strict=True)
                for item in (value if isinstance(value, (list, tuple)) else [value])
                if isinstance(item, torch.Tensor) and item.requires_grad
            ]
            if tensors:
                names, inputs = zip(*tensors, strict=True)
                if backward is not None and (others := sorted(set(names) - set(differentiable))):
                    raise RequestError(
                        f"A tensor in {', '.join(others)} of globe::{name} requires a gradient, and only "
                        f"{' and '.join(differentiable)} can have one; call requires_grad_(False) on the factors of "
                        "the experts, which stay frozen, or train the dense model."
                    )
                return Differentiable.apply(keyset, arguments, names, *inputs)
        return below(keyset, arguments)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return op
