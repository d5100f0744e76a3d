"""Data modules that a LitGPT YAML names by ``data.class_path``: one file for each kind of text."""
