"""A number that an implementation computes, beside the one of the authors' formula."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """One measured number.

    Attributes:
        name: identifies it in the result file and on the page.
        package: the package as it is installed.
        method: what was called.
        quantity: what was measured.
        measured: the number that the package gives.
        right: the number that the authors' formula gives.
    """

    name: str
    package: str
    method: str
    quantity: str
    measured: float
    right: float

    def line(self, version: str) -> str:
        """What is printed of it."""
        return (
            f'{self.name}: {self.package} {version}, {self.method}, {self.quantity}:'
            f' {shown(self.measured)} (right: {shown(self.right)})'
        )

    def as_json(self) -> dict[str, Any]:
        """Its fields but for the name; JSON has no NaN, so that becomes text."""
        fields = dataclasses.asdict(self)
        del fields['name']
        numbers = {key: _for_json(fields[key]) for key in ('measured', 'right')}
        return {**fields, **numbers}


def shown(number: float | str) -> str:
    """Four significant digits; NaN and infinity, text in JSON, by their names."""
    value = float(number)
    if math.isnan(value):
        return 'NaN'
    return f'{value + 0.0:.4g}'  # A negative zero is zero.


def _for_json(number: float) -> float | str:
    number = float(number)
    # Digits beyond the tenth hang on how the libraries were compiled.
    return float(f'{number:.10g}') if math.isfinite(number) else str(number)
