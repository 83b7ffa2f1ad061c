"""Context managers that read or replace what flows through a module, and leave no trace."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor, nn

from safebridge.errors import ShapeError

__all__ = [
    "capture_input",
    "capture_output",
    "is_preliminary",
    "name_arguments",
    "preliminary_pass",
    "replace_input",
    "replace_method",
    "replace_output",
    "set_on_instance",
]


_IS_PRELIMINARY: Final = ContextVar("is_preliminary", default=False)


@contextmanager
def preliminary_pass() -> Iterator[None]:
    """Mark a pass that a defense makes before the one it was asked for, e.g. to read a gate.

    Hooks that read activations look away meanwhile: what they were put there for is the pass
    that comes.

    Yields:
        Nothing.
    """
    token = _IS_PRELIMINARY.set(True)
    try:
        yield
    finally:
        _IS_PRELIMINARY.reset(token)


def is_preliminary() -> bool:
    """Say whether a pass marked by `preliminary_pass` is running."""
    return _IS_PRELIMINARY.get()


@contextmanager
def replace_output(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass a module's output through `fn` while the context is open.

    If the module returns a tuple, its first tensor is replaced and the rest is kept.

    Args:
        module: Any module that returns a tensor or a tuple that starts with one.
        fn: Takes the output and returns its replacement of the same shape; it must
            not write into its argument.

    Yields:
        Nothing; the hook is gone afterwards, also on an error.

    Raises:
        ShapeError: If `fn` returns another shape.
    """

    def hook(owner: nn.Module, _args: Any, output: Any) -> Any:
        return _with_first(output, fn, owner)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_input(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass a module's first positional argument through `fn` while the context is open.

    On a layout's `attention_output` the argument holds the heads side by side, so this
    is where one head is changed.

    Args:
        module: Any module that is called with a tensor first.
        fn: Takes the input and returns its replacement of the same shape; it must not
            write into its argument.

    Yields:
        Nothing; the hook is gone afterwards, also on an error.

    Raises:
        ShapeError: If `fn` returns another shape.
    """

    def hook(owner: nn.Module, args: tuple[Any, ...]) -> Any:
        return _with_first(args, fn, owner)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs, one for each call, while the context is open.

    Args:
        module: Any module that returns a tensor or a tuple that starts with one.

    Yields:
        A list that grows with every call. The tensors are the ones that flow on, with
        their graph; clone what must outlive an in-place change.
    """
    captured: list[Tensor] = []

    def hook(owner: nn.Module, _args: Any, output: Any) -> None:
        if not is_preliminary():
            captured.append(_first(output, owner))

    handle = module.register_forward_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def capture_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's first positional argument, one for each call.

    Args:
        module: Any module that is called with a tensor first.

    Yields:
        A list that grows with every call, as in `capture_output`.
    """
    captured: list[Tensor] = []

    def hook(owner: nn.Module, args: tuple[Any, ...]) -> None:
        if not is_preliminary():
            captured.append(_first(args, owner))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def replace_method(model: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let a wrapper stand in for a method of one instance while the context is open.

    Args:
        model: The instance; its class is not touched.
        name: The method, e.g. "generate".
        wrapper: Called with the method first, then with the arguments of the call.

    Yields:
        Nothing; the method is as before afterwards, also on an error.
    """
    original = getattr(model, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    with set_on_instance(model, name, value=method):
        yield


@contextmanager
def set_on_instance(model: Any, name: str, *, value: Any) -> Iterator[None]:
    """Set an attribute on the instance alone and put back what was there.

    Args:
        model: The instance.
        name: The attribute.
        value: What it holds while the context is open.

    Yields:
        Nothing.
    """
    was_there = name in model.__dict__
    before = model.__dict__.get(name)
    model.__dict__[name] = value
    try:
        yield
    finally:
        if was_there:
            model.__dict__[name] = before
        else:
            del model.__dict__[name]


def name_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Args:
        function: What is called.
        args: Its positional arguments.
        kwargs: Its other arguments.
    """
    if not args:
        return dict(kwargs)
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _first(value: Any, owner: nn.Module) -> Tensor:
    """Return the tensor that a hook is about."""
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, torch.Tensor):
        raise ShapeError(
            f"{type(owner).__name__} handles {type(first).__name__} where a tensor was expected. "
            "Hook a module that takes and returns tensors, e.g. one of the layout's places."
        )
    return first


def _with_first(value: Any, fn: Callable[[Tensor], Tensor], owner: nn.Module) -> Any:
    """Return `value` with its tensor passed through `fn`."""
    old = _first(value, owner)
    new = fn(old)
    if new.shape != old.shape:
        raise ShapeError(
            f"the replacement at {type(owner).__name__} has shape {tuple(new.shape)}, but "
            f"{tuple(old.shape)} flows there. Return a tensor of the shape you were given."
        )
    return (new, *value[1:]) if isinstance(value, tuple) else new
