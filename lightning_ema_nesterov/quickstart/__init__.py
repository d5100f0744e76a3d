"""The quickstart: AdamW and AdamW with EMA-Nesterov on text that every machine has."""
