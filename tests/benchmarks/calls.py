"""Methods by the calls of a script, without what they train: ``SOAP``, ``KFAC(lr=0.1)``."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

import precond


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword arguments of a call, in which the names of ``precond`` and ``nn`` are known.

    >>> read_call("KFAC(lr=0.1, curvature_update_period=Doubling(10))")
    ('KFAC', {'lr': 0.1, 'curvature_update_period': Doubling(period=10)})
    """
    found: Any = ast.parse(text, mode="eval").body
    name, keywords = (found.func.id, found.keywords) if isinstance(found, ast.Call) else (found.id, [])
    known = {public: getattr(precond, public) for public in precond.__all__} if keywords else {}  # they load late
    return name, {k.arg: eval(ast.unparse(k.value), known | {"nn": nn}) for k in keywords}
