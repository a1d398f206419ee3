"""One finding of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Check:
    """One finding. `mend` is a command or an act; empty if all is well."""

    name: str
    level: str
    text: str
    mend: str = ""
