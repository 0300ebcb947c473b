"""The Common Expression Language as Kubernetes uses it: parse, check, evaluate under a cost budget.

    program = cel.base().compile("object.spec.replicas <= 5", {"object": cel.DYN}, result=cel.BOOL)
    program.evaluate({"object": {...}})

Values are plain JSON values and the classes of `values`. Pure; knows nothing of admission or schemas.
"""

from knarr.api.cel.environment import PER_CALL_LIMIT, TOTAL_LIMIT, Environment, Program, base
from knarr.api.cel.errors import CELError, CompileError, CostExceeded, EvalError, ResultTypeError
from knarr.api.cel.evaluator import Budget
from knarr.api.cel.types import BOOL, DYN, INT, STRING, ObjectType, Type

__all__ = [
    "BOOL", "DYN", "INT", "PER_CALL_LIMIT", "STRING", "TOTAL_LIMIT", "Budget", "CELError", "CompileError", "CostExceeded", "Environment",
    "EvalError", "ObjectType", "Program", "ResultTypeError", "Type", "base",
]
