"""HorizontalPodAutoscaler: `metrics` asks the metrics APIs, `calculator` proposes, `behavior` limits, `controller` acts."""
