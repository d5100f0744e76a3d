"""Text that a LitGPT YAML names by ``data.class_path``."""
