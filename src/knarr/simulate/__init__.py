"""Simulated nodes and the lives of pods on them: a component that speaks to the API only and runs no container."""
