"""The API facts as package data."""
