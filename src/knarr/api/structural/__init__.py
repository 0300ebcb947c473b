"""Custom resources' structural schemas, compiled: see custom.py for what callers use."""

from knarr.api.structural.custom import CustomSchema, Scaler

__all__ = ["CustomSchema", "Scaler"]
