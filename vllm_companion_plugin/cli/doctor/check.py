"""One finding of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Check:
    """One finding. `mend` is the command or act that repairs the fault; empty if all is well."""

    name: str
    level: str
    text: str
    mend: str = ""
