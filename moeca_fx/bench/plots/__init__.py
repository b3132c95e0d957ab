"""Figures, one file each; all are drawn without a display and written whole or not at all."""
