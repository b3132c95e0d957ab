"""Tests of moeca_fx over many structures: tiny MoE diffusion transformers, written in the ways that real code is."""
