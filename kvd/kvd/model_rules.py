"""What the configuration says of models: the tables [models.NAME], of a minimum and a cap each.

NAME is what clients call the model. What that does: kvd.core.shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvd.core.shares import ModelRule
from kvd.kinds import Kind, Size, Unusable, read_table

MAX_NAME = 200
"""Characters, as in the protocol."""
MAX_RULES = 256
"""An eviction looks at each."""
KINDS: Mapping[str, Kind] = {"minimum": Size(0, 1 << 44), "cap": Size(1 << 20, 1 << 44)}
"""What a table of a model may say."""


@dataclass(frozen=True, slots=True)
class ModelTables(Kind):
    """The tables of all models."""

    metavar: ClassVar[str] = "TABLES"
    is_table: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return 'tables of the configuration file: [models."NAME"]'

    def read(self, value: Any) -> tuple[ModelRule, ...]:
        """Raises Unusable with all that is wrong."""
        if not isinstance(value, dict):
            raise Unusable([f"models: it is {self.allowed}"])
        errors: list[str] = []
        if len(value) > MAX_RULES:
            errors.append(f"models: there may be {MAX_RULES}, not {len(value)}")
        rules: list[ModelRule] = []
        for name, table in value.items():
            if not 0 < len(name) <= MAX_NAME:
                errors.append(
                    f"models: a model's name has 1 to {MAX_NAME} letters, not {name[:40]!r}"
                )
                continue
            try:
                values = read_table(f"models.{name}", table, KINDS)
            except Unusable as error:
                errors += error.errors
                continue
            rules.append(ModelRule(name, values.get("minimum", 0), values.get("cap")))
        if errors:
            raise Unusable(errors)
        return tuple(rules)

    def show(self, value: Any) -> str:
        return ", ".join(rule.name for rule in value) or "none"

    def plain(self, value: Any) -> list[str]:
        return [rule.name for rule in value]
