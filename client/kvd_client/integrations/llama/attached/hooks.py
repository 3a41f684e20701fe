"""Replaces methods of one object, and puts back what was there."""

from collections.abc import Callable, Mapping
from typing import Any

_NOTHING = object()


class Hooks:
    """`replacements` in the place of an object's methods, each by its name.

    Keeps no reference to the object, so that it still goes when nobody else has one.
    """

    def __init__(self, target: Any, replacements: Mapping[str, Callable[..., Any]]) -> None:
        self._before = {name: target.__dict__.get(name, _NOTHING) for name in replacements}
        target.__dict__.update(replacements)

    def call(self, target: Any, name: str, *arguments: Any, **named: Any) -> Any:
        """Call the method that was replaced."""
        before = self._before[name]
        if before is _NOTHING:
            return getattr(type(target), name)(target, *arguments, **named)
        return before(*arguments, **named)

    def remove(self, target: Any) -> None:
        """Put everything back."""
        for name, before in self._before.items():
            if before is _NOTHING:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = before
