"""StatefulSet: pods with a number, a name and claims of their own. `util` is pure, `pods` writes, `controller` decides."""
