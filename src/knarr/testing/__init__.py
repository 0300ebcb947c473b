"""In-process clusters and fixtures for tests."""
