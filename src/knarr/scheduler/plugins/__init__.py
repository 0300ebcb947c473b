"""The plugins of the scheduling framework, one module each; `registry` puts them together."""
