"""Immutable records: what ``dataclass(frozen=True)`` gives, without the time that its definition takes.

Process: every process. Never: import :mod:`dataclasses`.

:mod:`dataclasses` generates and compiles source text for each class, which takes 1 ms of CPU time or more.
Every start of gunicorn would pay that for each message between the master and a worker.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_options: bool) -> Any:
        return lambda kind: kind


_Self = TypeVar("_Self", bound="Record")


@dataclass_transform(frozen_default=True)
class Record:
    """Base of records. A subclass lists its fields as annotations, with their defaults."""

    #: the annotation of each field, in the order of the parameters
    fields: ClassVar[dict[str, str]] = {}
    defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own: dict[str, str] = inspect.get_annotations(cls)
        cls.fields = {**cls.fields, **{n: kind for n, kind in own.items() if not kind.startswith("ClassVar")}}
        cls.defaults = {name: getattr(cls, name) for name in cls.fields if hasattr(cls, name)}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """:raises TypeError: when a field is missing, given twice, or unknown."""
        given = dict(zip(self.fields, args, strict=False))
        values = {**self.defaults, **given, **kwargs}
        if len(args) > len(self.fields) or given.keys() & kwargs or values.keys() != self.fields.keys():
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self.fields)}")
        self.__dict__.update((name, values[name]) for name in self.fields)

    def replace(self: _Self, **changes: Any) -> _Self:
        """A copy with other values of some fields."""
        return type(self)(**{**vars(self), **changes})

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"
