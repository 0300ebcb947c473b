"""DaemonSet: one pod on every node that fits. `util` is pure, `rolling` plans updates, `controller` acts."""
