"""What the metrics share: a name or a value that cannot be meant is refused before a row is read or lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any

import evaluate

from pathalign.schema import InputError

LEAST = {  # of the options that are whole numbers
    "neighbours": 1,
    "levels": 2,
    "subsets": 1,
    "subset_size": 2,
    "bootstrap_samples": 1,
    "pairs": 0,
    "seed": 0,
}


class CheckedMetric(evaluate.Metric):
    """A metric whose `compute` takes its columns and the options of its method `measure`, and nothing else."""

    measure: Callable[..., dict[str, Any]]  # options are its arguments with defaults; results as in `_info`

    def compute(self, **given: Any) -> dict[str, Any]:
        """Add what is given under the names of columns, and measure all rows.

        Raises:
            InputError: If there is no such column or option, or an option is out of range.
        """
        arguments = signature(self.measure).parameters.values()
        options = [argument.name for argument in arguments if argument.default is not Parameter.empty]
        refuse_unknown(self.name, given, [*self.features, *options])
        check_options({name: given[name] for name in options if name in given})
        return super().compute(**given)


def refuse_unknown(metric: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError where a name is not one of the known ones."""
    known = list(known)
    for name in given:
        if name not in known:
            raise InputError(f"{metric} knows no `{name}`; it takes {', '.join(f'`{other}`' for other in known)}.")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError where an option is out of range."""
    for name, value in options.items():
        if name == "confidence":
            if not (isinstance(value, Real) and 0 < float(value) < 1):
                raise InputError(f"`confidence` is {value!r}; give a number between 0 and 1, such as 0.95.")
        elif isinstance(value, bool) or not isinstance(value, Integral) or int(value) < LEAST[name]:
            raise InputError(f"`{name}` is {value!r}; give a whole number, at least {LEAST[name]}.")


def texts(values: Iterable[Any]) -> list[str | None]:
    """Names as text; None stays None."""
    return [None if value is None else str(value) for value in values]
