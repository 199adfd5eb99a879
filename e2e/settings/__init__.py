"""Typed settings: schema, YAML layers, command line."""
