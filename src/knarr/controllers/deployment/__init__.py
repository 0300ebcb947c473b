"""Deployment: rollouts of ReplicaSets. `util` is pure, `replicasets` writes, `controller` decides."""
